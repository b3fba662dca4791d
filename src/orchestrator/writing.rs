//! The only writer: every durable change of a running process goes through here, in one order.
//!
//! Waiting changes are committed together as one write; one commit is in flight at a time. Memory changes only after it
//! has returned, and only then is the change visible. So a crash can't take back visible state, memory can't differ
//! from the store, and a caller that disconnects leaves no change half done. Only the writer gives revisions, again for
//! each attempt, and notes the ids of all admitted cycles: no id is visible before it is noted.

use std::{collections::HashSet, mem, sync::Arc, time::Duration};

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::{
    select,
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};

use super::{NotRecorded, Shared, State, Turn, admission::Admitted, refusal::NotAdmitted};
use crate::{
    engine::Engine,
    model::{Cause, CycleId, Revision},
    ports::{AuditEntry, Durability, StoreError, Write},
    record,
};

/// Most changes in the queue of the writer; further ones wait to be queued.
pub(super) const WAITING: usize = 256;
/// Most changes of one commit.
const MAX_CHANGES: usize = 64;
/// Most bytes of one commit, unless a single change is larger.
const MAX_BYTES: usize = 8 << 20;
/// Weight of a row in addition to its bytes, so that a commit has about a thousand rows.
const ROW: usize = 8 << 10;
/// Pauses between retries: the first one, which is doubled each time, and the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A change to be written.
pub(super) trait ToWrite: Send {
    /// Prepares the write, with the next revision if it is a record, and with its audit events, at the time `now`.
    /// Called for each attempt, without the lock over the state.
    fn prepare(&mut self, _last: &mut Revision, _now: Timestamp) {}

    /// Adds it to the write. Called for each attempt: the state may have changed.
    fn add_to(&mut self, write: &mut Write, state: &State);

    /// Most bytes and rows that it adds.
    fn size(&self) -> (usize, usize) {
        (0, 1)
    }

    /// The cycle that needs this change. Such a change is retried until it is written; others fail with the first
    /// error.
    fn insists(&self) -> Option<&Arc<Admitted>> {
        None
    }

    /// False if cycles can go on when the store can never make this change, because of damage that concerns nothing
    /// else.
    fn is_needed(&self) -> bool {
        true
    }

    /// Called after the commit, before the state changes, without the lock over it.
    fn committed(&mut self, _engine: &Engine) {}

    /// Applies the change in memory.
    fn apply(&mut self, state: &mut State);

    /// Notifies waiting callers after the commit and the change in memory.
    fn done(self: Box<Self>);

    /// Called while its commit is late, and its outcome not known.
    fn late(&mut self, _error: &StoreError) {}

    /// Called if it was not written and will not be. The caller of a change that is dropped learns that no more writes
    /// are possible.
    fn failed(self: Box<Self>, _error: StoreError) {}
}

/// A change that a caller waits for.
struct Edit<B, A, T> {
    /// `None` if it is not audited, since it changes nothing that callers see.
    cause: Option<Cause>,
    event: Option<AuditEntry>,
    build: B,
    apply: Option<A>,
    applied: Option<T>,
    late: Option<oneshot::Sender<StoreError>>,
    caller: oneshot::Sender<Result<T, StoreError>>,
}

impl<B, A, T> Edit<B, A, T> {
    /// The change, and where its result arrives.
    fn new(
        cause: Option<Cause>,
        build: B,
        apply: A,
        late: Option<oneshot::Sender<StoreError>>,
    ) -> (Box<Self>, oneshot::Receiver<Result<T, StoreError>>) {
        let (caller, written) = oneshot::channel();
        (Box::new(Self { cause, event: None, build, apply: Some(apply), applied: None, late, caller }), written)
    }
}

impl<B, A, T> ToWrite for Edit<B, A, T>
where
    B: Fn(&State) -> Write + Send,
    A: FnOnce(&mut State) -> T + Send,
    T: Send,
{
    fn prepare(&mut self, _: &mut Revision, now: Timestamp) {
        self.event = self.cause.as_ref().map(|cause| record::encode_event(&cause.event(now)));
    }

    fn add_to(&mut self, write: &mut Write, state: &State) {
        let Write { durability, audit, renamed, subsystems, loops, close, .. } = (self.build)(state);
        write.audit.extend(self.event.clone().into_iter().chain(audit));
        write.durability = write.durability.min(durability);
        write.close |= close;
        write.renamed.extend(renamed);
        write.subsystems.extend(subsystems);
        write.loops.extend(loops);
    }

    fn apply(&mut self, state: &mut State) {
        if let Some(cause) = &self.cause {
            cause.own_event.set();
        }
        self.applied = self.apply.take().map(|apply| apply(state));
    }

    fn done(self: Box<Self>) {
        if let Some(applied) = self.applied {
            // The caller may have disconnected.
            let _ = self.caller.send(Ok(applied));
        }
    }

    fn late(&mut self, error: &StoreError) {
        if let Some(caller) = self.late.take() {
            let _ = caller.send(error.clone());
        }
    }

    fn failed(self: Box<Self>, error: StoreError) {
        let _ = self.caller.send(Err(error));
    }
}

/// Changes that are not committed yet.
struct Queue {
    /// New ones arrive here.
    asked: mpsc::Receiver<Box<dyn ToWrite>>,
    /// Those of the next commits: at most one commit, and changes of cycles that are put off.
    waiting: Vec<Box<dyn ToWrite>>,
}

impl Queue {
    /// Takes the changes of the next commit.
    fn next_batch(&mut self) -> Vec<Box<dyn ToWrite>> {
        while self.waiting.len() < MAX_CHANGES
            && let Ok(change) = self.asked.try_recv()
        {
            self.waiting.push(change);
        }
        let rest = self.waiting.split_off(fitting(&self.waiting));
        mem::replace(&mut self.waiting, rest)
    }
}

impl State {
    /// The refusal for a cycle whose record can't be written now. It names the cycle if its id is noted.
    pub(super) fn unavailable(&self, cycle_id: CycleId, error: StoreError) -> NotRecorded {
        NotRecorded::StoreUnavailable(Some(cycle_id).filter(|id| *id <= self.noted), error)
    }

    /// Clears the error of the store if it is of this kind. Returns whether it was.
    fn clear_error(&self, is_over: impl Fn(&StoreError) -> bool) -> bool {
        self.store_error.send_if_modified(|error| error.take_if(|error| is_over(error)).is_some())
    }
}

impl Shared {
    /// The store takes writes again, if it did not: new callers wait for records, and leases begin anew.
    fn recover(&self, state: &mut State) {
        if !state.clear_error(|error| !error.is_final()) {
            return;
        }
        tracing::info!("the store takes writes again");
        self.resume(state);
    }

    fn resume(&self, state: &mut State) {
        for admitted in state.live.values() {
            admitted.resume();
        }
        state.release_leases();
        self.leases_changed.notify_one();
    }

    /// Writes the change of this turn with its audit event, and applies it in memory. `build` makes the write of
    /// subsystems and loops from the state at that time. Notifies the caller if the commit is late.
    ///
    /// # Errors
    /// It could not be written, or a commit before it is late; nothing has changed, and nothing will.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        turn: &mut Turn,
        build: impl Fn(&State) -> Write + Send + 'static,
        apply: impl FnOnce(&mut State) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (edit, written) = Edit::new(Some(turn.cause.clone()), build, apply, turn.late.take());
        self.ask_to_write(edit).await?;
        written.await.unwrap_or_else(|_| Err(self.store_ended()))
    }

    /// As [`Shared::write`], for a change without a turn, which is not audited unless `build` does it.
    pub(super) async fn edit<T: Send + 'static>(
        &self,
        build: impl Fn(&State) -> Write + Send + 'static,
        apply: impl FnOnce(&mut State) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (edit, written) = Edit::new(None, build, apply, None);
        self.ask_to_write(edit).await?;
        written.await.unwrap_or_else(|_| Err(self.store_ended()))
    }

    /// Queues a change for the writer.
    ///
    /// # Errors
    /// No more writes are possible.
    pub(super) async fn ask_to_write(&self, change: Box<dyn ToWrite>) -> Result<(), StoreError> {
        self.to_write.send(change).await.map_err(|_| self.store_ended())
    }

    /// Writes queued changes, as long as the process lives.
    pub(super) async fn write_changes(self: Arc<Self>, asked: mpsc::Receiver<Box<dyn ToWrite>>) {
        let mut queue = Queue { asked, waiting: Vec::new() };
        let (mut pause, mut retry_at) = (FIRST_PAUSE, Instant::now());
        loop {
            if queue.waiting.is_empty() {
                (pause, retry_at) = (FIRST_PAUSE, Instant::now());
                // The sender lives as long as this task's `self`, so the task ends only when it is aborted.
                let Some(change) = queue.asked.recv().await else { return };
                queue.waiting.push(change);
            }
            let batch = queue.next_batch();
            let Err((tried, error)) = self.commit(batch, &mut queue).await else { continue };
            if error.is_final() {
                let again = self.commit_singly(tried, error, &mut queue).await;
                queue.waiting.splice(0..0, again);
                continue;
            }
            let tried = tried.into_iter().chain(queue.waiting.drain(..)).collect();
            queue.waiting = self.put_off(tried, &error);
            if !queue.waiting.is_empty() {
                let now = Instant::now();
                if now >= retry_at {
                    tracing::error!(%error, "can't write; retrying in {pause:?}");
                    (pause, retry_at) = ((pause * 2).min(LONGEST_PAUSE), now + pause);
                }
                // A new change is tried at once, so that its caller gets a result. That is not logged: callers decide
                // how often it happens.
                select! {
                    biased;
                    () = sleep_until(retry_at) => {}
                    change = queue.asked.recv() => queue.waiting.extend(change),
                }
            }
        }
    }

    /// Commits these changes together, and then applies them in memory. On failure they are returned, and nothing has
    /// changed.
    async fn commit(
        &self,
        mut batch: Vec<Box<dyn ToWrite>>,
        queue: &mut Queue,
    ) -> Result<(), (Vec<Box<dyn ToWrite>>, StoreError)> {
        if let Some(error) = self.final_error() {
            return Err((batch, error));
        }
        let (write, mark) = self.draft(&mut batch);
        let (durability, last_cycle_id) = (write.durability, write.last_cycle_id);
        let copied = if record::copies_events() { write.audit.clone() } else { Vec::new() };
        let appends = !write.records.is_empty() || !write.audit.is_empty() || write.removal.entry.is_some();
        let started = Instant::now();
        let committed = self.await_commit(write, &mut batch, queue).await;
        let took = started.elapsed();
        if let Err(error) = committed {
            let mut state = self.state();
            state.counts.commit_failed();
            // The commit has returned.
            if state.clear_error(StoreError::is_late) {
                self.resume(&mut state);
            }
            drop(state);
            return Err((batch, error));
        }
        copied.iter().for_each(record::copy_event);
        for change in &mut batch {
            change.committed(&self.engine);
        }
        {
            let mut state = self.state();
            state.counts.committed(durability, took);
            self.recover(&mut state);
            state.loops.written(mark);
            state.noted = last_cycle_id;
            if durability == Durability::Durable {
                state.noted_durably = last_cycle_id;
            }
            for change in &mut batch {
                change.apply(&mut state);
            }
        }
        let renamed = self.state().registry.renamed().clone();
        self.history.rename(&renamed);
        self.history.show();
        if appends {
            self.checkpoints.appended.notify_one();
        }
        for change in batch {
            change.done();
        }
        self.queue_changed.notify_one();
        Ok(())
    }

    /// Commits the write of these changes, and waits for the outcome, however long that takes. While the store reports
    /// trouble, nothing is admitted, the callers of the changes are notified, and queued changes are put off.
    async fn await_commit(
        &self,
        write: Write,
        batch: &mut [Box<dyn ToWrite>],
        queue: &mut Queue,
    ) -> Result<(), StoreError> {
        let (mut commit, mut trouble) = (self.store.commit(Arc::new(write)), self.store.trouble());
        let mut late = None;
        loop {
            if let Some(error) = &late {
                queue.waiting = self.put_off(mem::take(&mut queue.waiting), error);
            }
            select! {
                biased;
                committed = &mut commit => return committed,
                Some(reported) = trouble.next() => {
                    if let Some(error) = &reported {
                        tracing::error!(%error, "no cycle is admitted until the commit returns");
                        self.notify_of(error, &cycles_of(batch));
                        for change in &mut *batch {
                            change.late(error);
                        }
                    } else {
                        self.recover(&mut self.state());
                    }
                    late = reported;
                }
                Some(change) = queue.asked.recv(), if late.is_some() => queue.waiting.push(change),
            }
        }
    }

    /// The write of these changes, with all ids that are not noted yet and the changes of loops, and the mark of the
    /// latter. The events of calls whose cycles are noted here are in it as well.
    fn draft(&self, batch: &mut [Box<dyn ToWrite>]) -> (Write, u64) {
        let (mut last, now) = (self.state().last_revision, self.clock.now());
        for change in &mut *batch {
            change.prepare(&mut last, now);
        }
        let state = self.state();
        // Each change raises the durability as needed.
        let mut write = Write { epoch: self.engine.epoch, durability: Durability::Buffered, ..Write::default() };
        for change in batch {
            change.add_to(&mut write, &state);
        }
        write.last_cycle_id = state.last_admitted;
        let records = write.records.iter().map(|record| record.cycle_id);
        let known: HashSet<_> = write.open.iter().map(|open| open.cycle_id).chain(records).collect();
        let new: Vec<_> = state.live.range(state.noted.next()..).map(|(_, admitted)| admitted.clone()).collect();
        // The loss of power may undo the last writes. Then the next process records the one id that may be known as
        // interrupted, so there must not be two.
        if write.last_cycle_id > state.noted_durably.next() {
            write.durability = Durability::Durable;
        }
        let (loops, mark) = state.loops.unwritten();
        drop(state);
        for (name, stored) in loops {
            write.loops.entry(name).or_insert(stored);
        }
        // Only this task writes starts of cycles, so these still wait. Large requests take a while to encode.
        write.audit.extend(new.iter().filter_map(|admitted| admitted.event_of_admission(now)));
        let unknown = new.iter().filter(|it| !known.contains(&it.cycle_id));
        write.open.extend(unknown.map(|admitted| admitted.to_waiting()));
        if !write.audit.is_empty() {
            write.durability = Durability::Durable;
        }
        // Each row is written once.
        let Write { outputs, subsystems, .. } = &mut write;
        outputs.retain(|(name, _)| !matches!(subsystems.get(name), Some(None)));
        (write, mark)
    }

    /// Handles changes that can't be written now. Returns those that are retried, whose callers are notified; the
    /// others fail.
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

    /// Records why the store accepts no writes, until a commit returns. Notifies the callers of these cycles, and of
    /// those that wait for their turn, since none begins without a write.
    fn notify_of(&self, error: &StoreError, cycles: &[Arc<Admitted>]) {
        let mut state = self.state();
        state.hold_leases();
        state.store_error.send_if_modified(|now| {
            let is_final = now.as_ref().is_some_and(StoreError::is_final);
            !is_final && now.replace(error.clone()).as_ref() != Some(error)
        });
        let waiting = state.line.all_waiting().filter_map(|cycle_id| state.live.get(&cycle_id));
        for admitted in cycles.iter().chain(waiting) {
            admitted.put_off(state.unavailable(admitted.cycle_id, error.clone()));
        }
    }

    /// Handles changes that can never be written together. Changes that are not the cause are written, and then the
    /// process ends. Returns the changes to retry.
    async fn commit_singly(
        &self,
        batch: Vec<Box<dyn ToWrite>>,
        error: StoreError,
        queue: &mut Queue,
    ) -> Vec<Box<dyn ToWrite>> {
        let alone = batch.len() == 1;
        let (mut again, mut to_blame) = (Vec::new(), Vec::new());
        for change in batch {
            let tried = if alone { Err((vec![change], error.clone())) } else { self.commit(vec![change], queue).await };
            match tried {
                Ok(()) => {}
                Err((failed, error)) if error.is_final() => to_blame.push((failed, error)),
                Err((failed, _)) => again.extend(failed),
            }
        }
        let is_damage = |error: &StoreError| matches!(error, StoreError::Corrupt { .. } | StoreError::Unusable { .. });
        let ends = |failed: &[Box<dyn ToWrite>], error| !is_damage(error) || failed.iter().any(|it| it.is_needed());
        if let Some((_, error)) = to_blame.iter().find(|(failed, error)| ends(failed, error)) {
            self.store_ends(error);
        }
        for (failed, error) in to_blame {
            for change in failed {
                change.failed(error.clone());
            }
        }
        again
    }

    /// Ensures that a cycle in a refusal is noted, so that its id is not given to another one.
    pub(super) async fn note_named_by(&self, refusal: &NotAdmitted) -> Result<(), StoreError> {
        let named = match refusal {
            NotAdmitted::CycleRunning(named) | NotAdmitted::CycleWaiting(named) => named,
            NotAdmitted::QueueFull(_) | NotAdmitted::StoreUnavailable(_) | NotAdmitted::Draining => return Ok(()),
        };
        if self.state().noted >= *named {
            return Ok(());
        }
        self.note(Durability::Buffered).await
    }

    /// Notes all admitted cycles. No other change depends on the outcome, so a late commit ends the wait.
    ///
    /// # Errors
    /// The note could not be written, or a commit is late; the cycles may be noted later.
    pub(super) async fn note(&self, durability: Durability) -> Result<(), StoreError> {
        select! {
            biased;
            late = self.late_commit() => Err(late),
            noted = self.edit(note(durability), |_| ()) => noted,
        }
    }

    /// Queues a note of the cycles that wait, unless the next write notes them anyway. No caller waits for it: as soon
    /// as it is written, their ids are shown.
    pub(super) fn note_waiting(&self) {
        let is_noted = {
            let state = self.state();
            state.line.waiting() == 0 || state.last_admitted == state.noted
        };
        let is_queued = self.to_write.capacity() < WAITING;
        if !is_noted && !is_queued {
            let (edit, _) = Edit::new(None, note(Durability::Buffered), |_: &mut State| (), None);
            // Without a place in the queue, another write comes first.
            let _ = self.to_write.try_send(edit);
        }
    }

    /// Waits until a commit is late. Returns the error for changes that would wait for it.
    pub(super) async fn late_commit(&self) -> StoreError {
        let mut error = self.state().store_error.subscribe();
        let late = error.wait_for(|error| error.as_ref().is_some_and(StoreError::is_late)).await;
        late.ok().and_then(|late| late.clone()).unwrap_or_else(|| self.store_ended())
    }

    /// Waits until no commit is late.
    pub(super) async fn no_late_commit(&self) {
        let mut error = self.state().store_error.subscribe();
        // The sender lives as long as `self`.
        let _ = error.wait_for(|error| !error.as_ref().is_some_and(StoreError::is_late)).await;
    }

    fn final_error(&self) -> Option<StoreError> {
        self.state().store_error.borrow().clone().filter(StoreError::is_final)
    }

    /// Why no more writes are possible.
    pub(super) fn store_ended(&self) -> StoreError {
        self.final_error().unwrap_or_else(|| StoreError::Defect { problem: "the task that writes has ended".into() })
    }

    /// No more writes are possible: ends the process.
    pub(super) fn store_ends(&self, error: &StoreError) {
        self.state().store_error.send_replace(Some(error.clone()));
        self.store_has_ended.cancel();
    }
}

/// The write that changes nothing: like every write, it notes the admitted cycles.
fn note(durability: Durability) -> impl Fn(&State) -> Write {
    move |_| Write { durability, ..Write::default() }
}

/// The cycles that need these changes.
fn cycles_of(changes: &[Box<dyn ToWrite>]) -> Vec<Arc<Admitted>> {
    changes.iter().filter_map(|change| change.insists()).cloned().collect()
}

/// Number of these changes, from the first on, in one commit: at least one.
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
