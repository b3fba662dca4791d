//! The one writer: every durable change of a running process goes through here, in one order.
//!
//! What waits to be written is taken together and committed as one write; one commit is in flight at a time. Only once it has
//! returned does memory change, and only then does anybody hear of it. So nothing is shown that a crash could take back, memory
//! can't differ from the store, and a caller that goes away leaves no change half done. The writer alone gives revisions, anew for
//! each attempt, and notes the ids of all cycles that were admitted by then: no id is heard before it is noted.

use std::{collections::HashSet, mem, sync::Arc, time::Duration};

use futures_util::StreamExt;
use tokio::{
    select,
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};

use super::{Refusal, Shared, State, admission::Admitted};
use crate::{
    engine::Engine,
    model::{CycleId, Revision},
    ports::{Durability, StoreError, Write},
};

/// Changes that may wait for the writer; whoever has a further one waits for a place.
pub(super) const WAITING: usize = 256;
/// The most changes of one commit.
const MAX_CHANGES: usize = 64;
/// The most bytes of one commit, unless a single change is larger.
const MAX_BYTES: usize = 8 << 20;
/// What a row counts for, beside its bytes: so a commit has about a thousand.
const ROW: usize = 8 << 10;
/// Waits between tries to write what has to be written: from the first, doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Something that is to be written.
pub(super) trait ToWrite: Send {
    /// It will be written next, and gets the next revision if it is a record. Called for each attempt, without the lock over the
    /// state.
    fn number(&mut self, _last: &mut Revision) {}

    /// Adds it to the write that is being made. Called for each attempt: the state may be another one.
    fn add_to(&mut self, write: &mut Write, state: &State);

    /// The most that it adds, in bytes and rows.
    fn size(&self) -> (usize, usize) {
        (0, 1)
    }

    /// The cycle that can't go on without it. Such a change is tried until it is written; others fail with the first error.
    fn insists(&self) -> Option<&Arc<Admitted>> {
        None
    }

    /// It is committed. Called before the state changes, and without the lock over it.
    fn committed(&mut self, _engine: &Engine) {}

    /// Does the same in memory.
    fn apply(&mut self, state: &mut State);

    /// It is committed, and the state has changed: tells those who wait for it.
    fn done(self: Box<Self>);

    /// It was not written, and will not be.
    fn failed(self: Box<Self>, error: StoreError);
}

/// A change that a caller waits for.
struct Edit<B, A, T> {
    build: B,
    apply: Option<A>,
    applied: Option<T>,
    caller: oneshot::Sender<Result<T, StoreError>>,
}

impl<B, A, T> ToWrite for Edit<B, A, T>
where
    B: Fn(&State) -> Write + Send,
    A: FnOnce(&mut State) -> T + Send,
    T: Send,
{
    fn add_to(&mut self, write: &mut Write, state: &State) {
        let Write { durability, subsystems, loops, close, .. } = (self.build)(state);
        write.durability = write.durability.min(durability);
        write.close |= close;
        write.subsystems.extend(subsystems);
        write.loops.extend(loops);
    }

    fn apply(&mut self, state: &mut State) {
        self.applied = self.apply.take().map(|apply| apply(state));
    }

    fn done(self: Box<Self>) {
        if let Some(applied) = self.applied {
            // Whoever asked for it may have gone away.
            let _ = self.caller.send(Ok(applied));
        }
    }

    fn failed(self: Box<Self>, error: StoreError) {
        let _ = self.caller.send(Err(error));
    }
}

impl State {
    /// The record of a cycle can't be written now. It is named if its number is noted.
    pub(super) fn unavailable(&self, cycle_id: CycleId, error: StoreError) -> Refusal {
        Refusal::StoreUnavailable(Some(cycle_id).filter(|id| *id <= self.noted), error)
    }
}

impl Shared {
    /// Has a change written, and does the same in memory. `build` says what of subsystems and loops is written, from the state
    /// as it is then.
    ///
    /// # Errors
    /// It could not be written, or a commit before it is late; nothing has changed.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        build: impl Fn(&State) -> Write + Send + 'static,
        apply: impl FnOnce(&mut State) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let late = self.state().store_error.clone().filter(StoreError::is_late);
        match late {
            Some(late) => Err(late),
            None => self.write_in_turn(build, apply).await,
        }
    }

    /// Has a change written, after a commit that is late as well: the last one of the process.
    ///
    /// # Errors
    /// It could not be written, and nothing has changed.
    pub(super) async fn write_in_turn<T: Send + 'static>(
        &self,
        build: impl Fn(&State) -> Write + Send + 'static,
        apply: impl FnOnce(&mut State) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (caller, written) = oneshot::channel();
        self.ask_to_write(Box::new(Edit { build, apply: Some(apply), applied: None, caller })).await?;
        written.await.unwrap_or_else(|_| Err(self.store_ended()))
    }

    /// Gives the writer something to write.
    ///
    /// # Errors
    /// Nothing will be written any more.
    pub(super) async fn ask_to_write(&self, change: Box<dyn ToWrite>) -> Result<(), StoreError> {
        self.to_write.send(change).await.map_err(|_| self.store_ended())
    }

    /// Writes what it is given, for as long as the process lives.
    pub(super) async fn write_changes(self: Arc<Self>, mut asked: mpsc::Receiver<Box<dyn ToWrite>>) {
        let mut waiting: Vec<Box<dyn ToWrite>> = Vec::new();
        let mut pause = RETRY.0;
        loop {
            if waiting.is_empty() {
                pause = RETRY.0;
                // The sender lives as long as this task's `self`: it ends when it is aborted.
                let Some(change) = asked.recv().await else { return };
                waiting.push(change);
            }
            while waiting.len() < MAX_CHANGES
                && let Ok(change) = asked.try_recv()
            {
                waiting.push(change);
            }
            let rest = waiting.split_off(fitting(&waiting));
            let Err((tried, error)) = self.commit(mem::replace(&mut waiting, rest)).await else { continue };
            if error.is_final() {
                let again = self.commit_singly(tried, error).await;
                waiting.splice(0..0, again);
                continue;
            }
            let tried = tried.into_iter().chain(waiting.drain(..)).collect();
            waiting = self.put_off(tried, &error);
            if !waiting.is_empty() {
                tracing::error!(%error, "can't write; trying again in {pause:?}");
                // Whoever asks for something meanwhile learns at once whether it can be written by now.
                select! {
                    biased;
                    () = sleep(pause) => pause = (pause * 2).min(RETRY.1),
                    change = asked.recv() => waiting.extend(change),
                }
            }
        }
    }

    /// Commits these changes together, and then makes them in memory. Where that fails they are given back, and nothing has
    /// changed.
    async fn commit(&self, mut batch: Vec<Box<dyn ToWrite>>) -> Result<(), (Vec<Box<dyn ToWrite>>, StoreError)> {
        if let Some(error) = self.final_error() {
            return Err((batch, error));
        }
        let (write, mark) = self.draft(&mut batch);
        let (durability, last_cycle_id) = (write.durability, write.last_cycle_id);
        let started = Instant::now();
        let committed = self.await_commit(write, &cycles_of(&batch)).await;
        let took = started.elapsed();
        if let Err(error) = committed {
            let mut state = self.state();
            state.counts.commit_failed();
            // The commit has returned.
            state.store_error.take_if(|error| error.is_late());
            drop(state);
            return Err((batch, error));
        }
        for change in &mut batch {
            change.committed(&self.engine);
        }
        {
            let mut state = self.state();
            state.counts.committed(durability, took);
            state.store_error.take_if(|error| !error.is_final());
            state.loops.written(mark);
            state.noted = last_cycle_id;
            if durability == Durability::Durable {
                state.noted_durably = last_cycle_id;
            }
            for change in &mut batch {
                change.apply(&mut state);
            }
        }
        self.show_newest();
        for change in batch {
            change.done();
        }
        self.queue_changed.notify_one();
        Ok(())
    }

    /// Commits a write, and waits for the outcome, however long that takes. While the store reports trouble, nothing is
    /// admitted, and the callers of the cycles in the write are notified.
    async fn await_commit(&self, write: Write, cycles: &[Arc<Admitted>]) -> Result<(), StoreError> {
        let (mut commit, mut trouble) = (self.store.commit(Arc::new(write)), self.store.trouble());
        loop {
            select! {
                biased;
                committed = &mut commit => return committed,
                Some(trouble) = trouble.next() => match trouble {
                    Some(error) => {
                        tracing::error!(%error, "nothing is admitted until the commit returns");
                        self.notify_of(&error, cycles);
                    }
                    None => drop(self.state().store_error.take_if(|error| !error.is_final())),
                },
            }
        }
    }

    /// The write of these changes, with all ids that are not noted yet and what has changed in loops, and the mark of the latter.
    fn draft(&self, batch: &mut [Box<dyn ToWrite>]) -> (Write, u64) {
        let mut last = self.state().last_revision;
        for change in &mut *batch {
            change.number(&mut last);
        }
        let state = self.state();
        // Each change makes it as durable as it has to be.
        let mut write = Write { epoch: self.engine.epoch, durability: Durability::Buffered, ..Write::default() };
        for change in batch {
            change.add_to(&mut write, &state);
        }
        write.last_cycle_id = state.last_admitted;
        let records = write.records.iter().map(|record| record.cycle_id);
        let known: HashSet<_> = write.open.iter().map(|open| open.cycle_id).chain(records).collect();
        let admitted = state.live.range(state.noted.next()..).map(|(_, admitted)| admitted);
        let new: Vec<_> = admitted.filter(|it| !known.contains(&it.cycle_id)).cloned().collect();
        // The loss of power may hide what was written last. Then the next process takes the one id that may have been heard of
        // for interrupted, so there must not be two.
        if write.last_cycle_id > state.noted_durably.next() {
            write.durability = Durability::Durable;
        }
        let (loops, mark) = state.loops.unwritten();
        drop(state);
        for (name, stored) in loops {
            write.loops.entry(name).or_insert(stored);
        }
        // Only this task has cycles begin, so they still wait. Large requests take a while to encode.
        write.open.extend(new.iter().map(|admitted| admitted.to_waiting()));
        // A row is touched once.
        let Write { outputs, subsystems, .. } = &mut write;
        outputs.retain(|(name, _)| !matches!(subsystems.get(name), Some(None)));
        (write, mark)
    }

    /// These can't be written now. Returns those that are tried again, whose callers are told for the time being; the others
    /// fail.
    fn put_off(&self, batch: Vec<Box<dyn ToWrite>>, error: &StoreError) -> Vec<Box<dyn ToWrite>> {
        let (again, failed): (Vec<_>, Vec<_>) = batch.into_iter().partition(|change| change.insists().is_some());
        if !again.is_empty() {
            self.notify_of(error, &cycles_of(&again));
        }
        for change in failed {
            change.failed(error.clone());
        }
        again
    }

    /// The store takes no writes for this reason, until a commit returns. Notifies the callers of these cycles.
    fn notify_of(&self, error: &StoreError, cycles: &[Arc<Admitted>]) {
        let mut state = self.state();
        if state.store_error.as_ref().is_none_or(|error| !error.is_final()) {
            state.store_error = Some(error.clone());
        }
        for admitted in cycles {
            admitted.put_off(state.unavailable(admitted.cycle_id, error.clone()));
        }
    }

    /// These can't be written together, however often it is tried. What is not to blame for it is written, and then the process
    /// ends. Returns what is to be tried again.
    async fn commit_singly(&self, batch: Vec<Box<dyn ToWrite>>, error: StoreError) -> Vec<Box<dyn ToWrite>> {
        let alone = batch.len() == 1;
        let (mut again, mut to_blame) = (Vec::new(), Vec::new());
        for change in batch {
            let tried = if alone { Err((vec![change], error.clone())) } else { self.commit(vec![change]).await };
            match tried {
                Ok(()) => {}
                Err((failed, error)) if error.is_final() => to_blame.push((failed, error)),
                Err((failed, _)) => again.extend(failed),
            }
        }
        if let Some((_, error)) = to_blame.first() {
            self.store_ends(error);
        }
        for (failed, error) in to_blame {
            for change in failed {
                change.failed(error.clone());
            }
        }
        again
    }

    /// Sees to it that a cycle that a refusal names is noted, so that its number is not given to another one.
    pub(super) async fn note_named_by(&self, refusal: &Refusal) -> Result<(), StoreError> {
        let (Refusal::CycleRunning(named) | Refusal::CycleWaiting(named)) = refusal else { return Ok(()) };
        if self.state().noted >= *named {
            return Ok(());
        }
        self.write(|_| Write { durability: Durability::Buffered, ..Write::default() }, |_| ()).await
    }

    fn final_error(&self) -> Option<StoreError> {
        self.state().store_error.clone().filter(StoreError::is_final)
    }

    /// Why nothing will be written any more.
    pub(super) fn store_ended(&self) -> StoreError {
        self.final_error().unwrap_or_else(|| StoreError::Defect { problem: "the task that writes has ended".into() })
    }

    /// Nothing will be written any more: ends the process.
    pub(super) fn store_ends(&self, error: &StoreError) {
        self.state().store_error = Some(error.clone());
        self.store_has_ended.cancel();
    }
}

/// The cycles that can't go on without these changes.
fn cycles_of(changes: &[Box<dyn ToWrite>]) -> Vec<Arc<Admitted>> {
    changes.iter().filter_map(|change| change.insists()).cloned().collect()
}

/// How many of these changes, from the first on, one commit takes: one in any case.
fn fitting(waiting: &[Box<dyn ToWrite>]) -> usize {
    let mut taken = 0_usize;
    for (i, change) in waiting.iter().enumerate().take(MAX_CHANGES) {
        let (bytes, rows) = change.size();
        taken = taken.saturating_add(bytes).saturating_add(rows.saturating_mul(ROW));
        if i > 0 && taken > MAX_BYTES {
            return i;
        }
    }
    waiting.len().min(MAX_CHANGES)
}
