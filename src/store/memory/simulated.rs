//! A database for simulations, on machines of its own that processes share. It outlives them. For each statement, the
//! simulation decides how long it takes, whether it is executed, and whether its answer arrives. It also decides when
//! the power is lost, and when the standby is promoted while the earlier primary goes on. Processes commit through
//! `chain`, as with a real database.

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;
use tokio::{
    sync::{Mutex as AsyncMutex, oneshot},
    time::{Instant, sleep, sleep_until},
};

use super::{Kept, MemoryStore};
use crate::{
    clock::Clock,
    fault::Fault,
    ledger::{Hash, Node, Part},
    model::{CycleId, Epoch, Leader, RequestKey, Revision},
    ports::{
        Claim, ClaimId, Claimed, Contents, Durability, EventFilter, EventPage, Excess, Filter, Found, Leadership, Log,
        Observed, Page, PageLimits, Renewed, ResumeError, Retention, Seals, Stage, Store, StoreError, StoreSize, Write,
    },
    store::{
        chain::{Answer, Barrier, Chain, Database, Stored, Token},
        frontier::{Appended, Frontier},
        not_taken_over,
        trouble::Trouble,
    },
};

/// Its location in messages.
const STORE: &str = "the simulated store";

/// The kind of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Statement {
    /// It only reads.
    Read,
    /// It writes.
    Write,
    /// It reads or writes which replica leads. Those of a process have a connection of their own.
    Lead,
}

/// What happens to a statement. By default it is executed and answered at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// True if it is refused, after it has travelled.
    pub refused: bool,
    /// The time until it is executed.
    pub travels: Duration,
    /// The time from then on until what it has written can't be lost any more, if it waits for that.
    pub replicates: Duration,
    /// The time until its answer has come back.
    pub returns: Duration,
    /// Its answer is lost: its process learns this so long after it was sent, whether it was executed by then or not.
    pub lost_after: Option<Duration>,
    /// True if it is executed even if its process has ended meanwhile.
    pub outlives: bool,
    /// True if it reaches the server that was the primary before the present one, while that still runs.
    pub strays: bool,
}

/// The database.
#[derive(Clone)]
pub struct SimulatedDatabase(Arc<Machine>);

struct Machine {
    /// True if buffered writes don't survive the loss of power.
    buffers: bool,
    servers: Mutex<Servers>,
}

struct Servers {
    primary: Rows,
    /// The primary before, while it still runs. It has no standby, so nothing that it writes is acknowledged.
    replaced: Option<Rows>,
    /// Number of processes that have read their token.
    processes: i64,
}

/// Decides what happens to each statement of a process.
pub type Fates = Box<dyn FnMut(Statement) -> Fate + Send>;

/// The rows as of a statement.
#[derive(Clone)]
struct Version {
    kept: Kept,
    meta: Meta,
}

/// What a real database has in one row.
#[derive(Clone, Debug)]
struct Meta {
    token: Token,
    /// What the last barrier has found.
    found: Token,
    commits: u64,
    /// The last process has closed it.
    closed: bool,
    /// The machine has lost its power since the last commit.
    restarted: bool,
    checkpoint: Option<String>,
    /// The row that says which replica leads, without the time.
    lead: Observed,
}

/// The rows of one server.
struct Rows {
    now: Version,
    /// The versions before, from the newest one that survives the loss of power for sure, with their numbers.
    earlier: VecDeque<(u64, Version)>,
    /// The number of `now`.
    number: u64,
    /// Another one after each loss of power, and on each server.
    timeline: u64,
}

impl SimulatedDatabase {
    /// An empty database. With `buffers`, buffered writes don't survive the loss of power, as in a database on the
    /// machine of the process; otherwise each write that was acknowledged does.
    pub fn new(buffers: bool) -> Self {
        let none = Token(0);
        let lead = Observed {
            epoch: Epoch::default(),
            beat: 0,
            claim: ClaimId(0),
            leader: None,
            lease_ttl: Duration::ZERO,
            orchestrator_id: None,
            time: Timestamp::UNIX_EPOCH,
            behind: None,
        };
        let meta =
            Meta { token: none, found: none, commits: 0, closed: false, restarted: false, checkpoint: None, lead };
        let now = Version { kept: Kept::default(), meta };
        let primary = Rows { now, earlier: VecDeque::new(), number: 0, timeline: 0 };
        let servers = Mutex::new(Servers { primary, replaced: None, processes: 0 });
        Self(Arc::new(Machine { buffers, servers }))
    }

    /// The store of a process that has it for itself, which ends with the process.
    pub fn open(&self, clock: Clock, fates: Fates) -> Arc<dyn Store> {
        let fates = Arc::new(Mutex::new(fates));
        self.store(clock, fates, None)
    }

    /// The store of a replica that shares it with others. `time` is the clock of the database.
    pub fn share(&self, clock: Clock, time: Clock, fates: Fates) -> Arc<dyn Store> {
        let fates = Arc::new(Mutex::new(fates));
        let (process, claim, won) = (self.connect(fates.clone(), true), AsyncMutex::default(), Mutex::default());
        self.store(clock, fates, Some(Arc::new(LeaderRow { process, time, claim, won })))
    }

    fn connect(&self, fates: Arc<Mutex<Fates>>, is_for_lead: bool) -> Arc<Process> {
        Arc::new(Process { machine: self.0.clone(), fates, is_for_lead, last: Mutex::new(Instant::now()) })
    }

    fn store(&self, clock: Clock, fates: Arc<Mutex<Fates>>, leader: Option<Arc<LeaderRow>>) -> Arc<dyn Store> {
        SimulatedStore::of(self.connect(fates, false), leader, clock)
    }

    /// The machine loses its power, and restarts at once. All that was acknowledged as surviving that is kept, and of
    /// the rest, the statements before `kept`: a number from 0 to the returned one of another call with
    /// [`SimulatedDatabase::at_risk`]. Statements on their way are lost.
    pub fn lose_power(&self, kept: usize) {
        let mut servers = self.0.servers();
        servers.fork(kept);
        servers.replaced = None;
    }

    /// The standby is promoted. It has all that was acknowledged, and of the rest, the statements before `kept`, as for
    /// [`SimulatedDatabase::lose_power`]. The earlier primary still executes the statements that are on their way, and
    /// those that stray to it. None of those is acknowledged.
    pub fn promote(&self, kept: usize) {
        let mut servers = self.0.servers();
        servers.replaced = Some(servers.fork(kept));
    }

    /// The primary that was replaced ends, if it still runs.
    pub fn end_replaced(&self) {
        self.0.servers().replaced = None;
    }

    /// Number of executed statements that the loss of power could undo.
    pub fn at_risk(&self) -> usize {
        self.0.servers().primary.earlier.len()
    }

    /// The newest record that can't be lost any more.
    pub fn surviving(&self) -> Revision {
        let Rows { now, earlier, .. } = &self.0.servers().primary;
        let survives = earlier.front().map_or(now, |(_, version)| version);
        survives.kept.frontier.last_revision
    }

    /// The name of the replica that leads, if one does.
    pub fn leader(&self) -> Option<String> {
        let leader = self.0.servers().primary.now.meta.lead.leader.clone();
        leader.map(|leader| leader.replica.name)
    }
}

impl Machine {
    fn servers(&self) -> MutexGuard<'_, Servers> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Servers {
    /// The rows that a statement reaches.
    fn reached(&self, strays: bool) -> &Rows {
        self.replaced.as_ref().filter(|_| strays).unwrap_or(&self.primary)
    }

    /// Counts a process.
    fn enter(&mut self) -> i64 {
        self.processes += 1;
        self.processes
    }

    /// The rows of this timeline, unless they are lost.
    fn on(&mut self, timeline: u64) -> Option<&mut Rows> {
        [Some(&mut self.primary), self.replaced.as_mut()].into_iter().flatten().find(|rows| rows.timeline == timeline)
    }

    /// All that was executed up to the version of this number survives from now on. False if that was lost already.
    fn acknowledge(&mut self, number: u64, timeline: u64) -> bool {
        if self.primary.timeline != timeline {
            return false;
        }
        let earlier = &mut self.primary.earlier;
        while earlier.front().is_some_and(|(earlier, _)| *earlier < number) {
            earlier.pop_front();
        }
        true
    }

    /// Begins a timeline, which has all that was acknowledged, and the statements at risk before `kept`. Returns the
    /// rows of the earlier one.
    fn fork(&mut self, kept: usize) -> Rows {
        let Rows { now, earlier, number, timeline } = &self.primary;
        let (number, mut now) = earlier.get(kept).cloned().unwrap_or_else(|| (*number, now.clone()));
        now.meta.restarted = true;
        let earlier = earlier.iter().take(kept).cloned().collect();
        let forked = Rows { now, earlier, number, timeline: timeline + 1 };
        mem::replace(&mut self.primary, forked)
    }
}

impl Rows {
    /// Writes. The earlier content may come back.
    fn write(&mut self, change: impl FnOnce(&mut Version)) {
        self.earlier.push_back((self.number, self.now.clone()));
        self.number += 1;
        change(&mut self.now);
    }

    fn commit(&mut self, after: Token, token: Token, write: &Write) -> Option<()> {
        if self.now.meta.token != after && !Fault::SkippedFence.is_planted() {
            return None;
        }
        self.write(|Version { kept, meta }| {
            let waited: BTreeMap<_, _> = kept.open.clone();
            kept.keep(write);
            kept.epoch = write.epoch;
            (meta.token, meta.commits) = (token, meta.commits + 1);
            (meta.closed, meta.restarted) = (write.close, false);
            if Fault::WideDelete.is_planted()
                && let Some(last) = write.records.iter().map(|record| record.cycle_id).max()
            {
                kept.open.retain(|cycle_id, _| *cycle_id > last);
            }
            if Fault::BegunTwice.is_planted() {
                let begun = write.open.iter().filter(|open| matches!(open.stage, Stage::Begun(_)));
                let before = begun.filter_map(|open| waited.get(&open.cycle_id));
                kept.open.extend(before.map(|open| (open.cycle_id, open.clone())));
            }
        });
        Some(())
    }

    fn bar(&mut self, barrier: &Barrier) -> Option<Token> {
        let Meta { token: last, mut found, .. } = self.now.meta;
        let is_barred = barrier.earlier.contains(&last);
        if !is_barred && !barrier.notes(last) && !Fault::UnconditionalBarrier.is_planted() {
            return None;
        }
        if !is_barred {
            found = last;
        }
        self.write(|Version { meta, .. }| (meta.token, meta.found) = (barrier.token, found));
        Some(found)
    }
}

/// A process, and its connection, which keeps the order of its statements.
struct Process {
    machine: Arc<Machine>,
    fates: Arc<Mutex<Fates>>,
    /// True if its statements are about which replica leads.
    is_for_lead: bool,
    /// When the last statement is executed.
    last: Mutex<Instant>,
}

/// What a statement returned, and the version that it has made, with its timeline.
type Executed<T> = (Option<T>, u64, u64);

impl Process {
    fn fate(&self, statement: Statement) -> Fate {
        let statement = if self.is_for_lead { Statement::Lead } else { statement };
        self.fates.lock().unwrap_or_else(PoisonError::into_inner)(statement)
    }

    /// Sends a statement, which is executed after the earlier ones, or never.
    fn send<T: Send + 'static>(
        self: &Arc<Self>,
        fate: Fate,
        execute: impl FnOnce(&mut Rows) -> Option<T> + Send + 'static,
    ) -> oneshot::Receiver<Executed<T>> {
        let at = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            *last = (*last + Duration::from_millis(1)).max(Instant::now() + fate.travels);
            *last
        };
        let (reply, answer) = oneshot::channel();
        let (machine, process): (_, Weak<Self>) = (self.machine.clone(), Arc::downgrade(self));
        let timeline = machine.servers().reached(fate.strays).timeline;
        // No process owns a statement that was sent.
        tokio::spawn(async move {
            sleep_until(at).await;
            let mut servers = machine.servers();
            if let Some(rows) = servers.on(timeline).filter(|_| fate.outlives || process.strong_count() > 0) {
                let returned = execute(rows);
                // The process may have gone.
                let _ = reply.send((returned, rows.number, timeline));
            }
        });
        answer
    }

    /// Sends a statement that writes, and waits for its answer; with `waits`, until what it has written can't be lost.
    async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        waits: bool,
        execute: impl FnOnce(&mut Rows) -> Option<T> + Send + 'static,
    ) -> Answer<T> {
        let fate = self.fate(Statement::Write);
        if fate.refused {
            sleep(fate.travels).await;
            return Answer::Refused(unavailable("it was refused"));
        }
        let answer = self.send(fate, execute);
        let lost = || Answer::Lost(unavailable("the answer was lost"));
        if let Some(after) = fate.lost_after {
            sleep(after).await;
            return lost();
        }
        let Ok((returned, number, timeline)) = answer.await else { return lost() };
        if waits {
            sleep(fate.replicates).await;
        }
        let is_kept = !waits || self.machine.servers().acknowledge(number, timeline);
        sleep(fate.returns).await;
        match returned {
            Some(returned) if is_kept => Answer::Executed(returned),
            None if is_kept => Answer::Superseded,
            _ => lost(),
        }
    }

    /// Sends a statement that reads, and waits for its answer.
    async fn read<T>(&self, read: impl FnOnce(&Rows) -> T) -> Result<T, StoreError> {
        let fate = self.fate(Statement::Read);
        sleep(fate.travels).await;
        let found = read(self.machine.servers().reached(fate.strays));
        sleep(fate.returns).await;
        if fate.refused { Err(unavailable("it was refused")) } else { Ok(found) }
    }
}

fn unavailable(problem: &str) -> StoreError {
    StoreError::Unavailable { store: STORE.into(), problem: problem.into() }
}

/// The commit of one write.
struct Attempt {
    process: Arc<Process>,
    write: Arc<Write>,
}

impl Database for Attempt {
    async fn commit(&mut self, after: Token, token: Token) -> Answer<()> {
        let (write, durability) = (self.write.clone(), self.write.durability);
        let execute = move |rows: &mut Rows| rows.commit(after, token, &write);
        let early = match durability {
            Durability::Durable => Fault::EarlyAcknowledgement,
            Durability::Buffered => Fault::LateNote,
        };
        if early.is_planted() {
            let fate = self.process.fate(Statement::Write);
            drop(self.process.send(Fate { outlives: false, ..fate }, execute));
            return Answer::Executed(());
        }
        let waits = durability == Durability::Durable || !self.process.machine.buffers;
        self.process.ask(waits, execute).await
    }

    async fn bar(&mut self, barrier: &Barrier) -> Answer<Token> {
        let barrier = barrier.clone();
        self.process.ask(true, move |rows| rows.bar(&barrier)).await
    }

    async fn read(&mut self) -> Result<Stored, StoreError> {
        self.process.read(|rows| stored(&rows.now)).await
    }
}

/// What the row says.
fn stored(Version { kept, meta }: &Version) -> Stored {
    Stored { epoch: kept.epoch, commits: meta.commits, claimed: meta.lead.epoch, token: meta.token }
}

/// The row that says which replica leads, over a connection of its own.
struct LeaderRow {
    process: Arc<Process>,
    /// The clock of the database.
    time: Clock,
    /// One statement at a time.
    claim: AsyncMutex<()>,
    /// The term that this replica has claimed last, and whose claim was acknowledged.
    won: Mutex<Option<Epoch>>,
}

impl LeaderRow {
    fn won(&self) -> Option<Epoch> {
        *self.won.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_won(&self, epoch: Epoch) {
        let mut won = self.won.lock().unwrap_or_else(PoisonError::into_inner);
        *won = (*won).max(Some(epoch));
    }

    async fn ask<T: Send + 'static>(
        &self,
        waits: bool,
        execute: impl FnOnce(&mut Rows) -> Option<T> + Send + 'static,
    ) -> Result<Option<T>, StoreError> {
        let _one = self.claim.lock().await;
        self.process.ask(waits, execute).await.returned()
    }
}

impl Leadership for LeaderRow {
    fn observe(&self) -> BoxFuture<'_, Result<Observed, StoreError>> {
        Box::pin(async move {
            let _one = self.claim.lock().await;
            let time = self.time;
            self.process.read(|rows| Observed { time: time.now(), ..rows.now.meta.lead.clone() }).await
        })
    }

    fn claim<'a>(&'a self, seen: &'a Observed, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        let ((epoch, beat), claim) = ((seen.epoch, seen.beat), claim.clone());
        let execute = move |rows: &mut Rows| {
            let Version { kept, meta } = &rows.now;
            if (meta.lead.epoch, meta.lead.beat) != (epoch, beat) {
                return None;
            }
            let epoch = meta.lead.epoch.next().max(kept.epoch.next()).max(claim.at_least);
            rows.write(|Version { meta, .. }| {
                meta.token = Token(claim.id.0.cast_signed());
                meta.lead = Observed {
                    epoch,
                    beat: meta.lead.beat + 1,
                    claim: claim.id,
                    leader: Some(Leader { replica: claim.replica, epoch }),
                    lease_ttl: claim.lease_ttl,
                    orchestrator_id: Some(claim.orchestrator_id),
                    time: meta.lead.time,
                    behind: None,
                };
            });
            Some(epoch)
        };
        Box::pin(async move {
            let Some(epoch) = self.ask(true, execute).await? else { return Ok(Claimed::Lost) };
            self.set_won(epoch);
            Ok(Claimed::Won(epoch))
        })
    }

    fn renew(&self, epoch: Epoch) -> BoxFuture<'_, Result<Renewed, StoreError>> {
        let execute = move |rows: &mut Rows| {
            let Observed { epoch: now, leader, .. } = &rows.now.meta.lead;
            if *now != epoch || leader.is_none() {
                return None;
            }
            rows.write(|Version { meta, .. }| meta.lead.beat += 1);
            Some(())
        };
        Box::pin(async move {
            let waits = !Fault::LocalRenewal.is_planted();
            let Some(()) = self.ask(waits, execute).await? else { return Ok(Renewed::Superseded) };
            self.set_won(epoch);
            Ok(Renewed::Acknowledged)
        })
    }

    fn release(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        let execute = move |rows: &mut Rows| {
            if rows.now.meta.lead.epoch != epoch {
                return None;
            }
            rows.write(|Version { meta, .. }| (meta.lead.beat, meta.lead.leader) = (meta.lead.beat + 1, None));
            Some(())
        };
        Box::pin(async move { self.ask(true, execute).await.map(drop) })
    }
}

/// The term of a process as the writer.
struct Term {
    epoch: Epoch,
    /// The epoch of the database while no other process has taken over.
    current: Epoch,
    frontier: Frontier,
    chain: Chain,
}

/// The store of one process.
struct SimulatedStore {
    process: Arc<Process>,
    leader: Option<Arc<LeaderRow>>,
    clock: Clock,
    /// Held across a commit: the next one builds on it. `None` until the store is taken over.
    term: AsyncMutex<Option<Term>>,
    /// The log as of the last commit.
    log: Mutex<Log>,
    /// See [`Store::require`].
    required: Mutex<(Revision, Epoch)>,
    trouble: Trouble,
}

impl SimulatedStore {
    fn of(process: Arc<Process>, leader: Option<Arc<LeaderRow>>, clock: Clock) -> Arc<Self> {
        let trouble = Trouble::new(STORE.into(), "it is simulated");
        let (term, log, required) = (AsyncMutex::new(None), Mutex::default(), Mutex::default());
        Arc::new(Self { process, leader, clock, term, log, required, trouble })
    }

    fn required(&self) -> MutexGuard<'_, (Revision, Epoch)> {
        self.required.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rows, to be read as those of a store in memory.
    async fn rows(&self) -> Result<MemoryStore, StoreError> {
        let (revision, epoch) = *self.required();
        let kept = self.process.read(|rows| rows.now.kept.clone()).await?;
        if kept.frontier.last_revision < revision || kept.epoch < epoch {
            let (store, newest) = (STORE.into(), kept.frontier.last_revision);
            return Err(StoreError::Behind { store, server: "an earlier primary".into(), known: revision, newest });
        }
        Ok(MemoryStore { clock: self.clock, kept: Mutex::new(kept) })
    }

    /// Reads what a process takes over. The loss of power can still undo statements that the process before has
    /// executed. A process that outlives that loss must not build on them, so it waits until they can't be lost. A
    /// replica has waited for the answer to its claim. A process on the machine of the database ends with it.
    async fn read_all(&self) -> Result<Version, StoreError> {
        if self.leader.is_some() || self.process.machine.buffers {
            return self.process.read(|rows| rows.now.clone()).await;
        }
        let read = self.process.ask(true, |rows| Some(rows.now.clone())).await.returned()?;
        read.ok_or_else(|| unavailable("it was not read"))
    }

    async fn take_over(&self) -> Result<Contents, StoreError> {
        let mut term = self.term.lock().await;
        let read = self.read_all().await?;
        let Version { kept, meta } = &read;
        // No process gives as many tokens.
        let given = Token(self.process.machine.servers().enter() << 32);
        let fixed = term.as_ref().map(|earlier| earlier.epoch.next()).unwrap_or_default();
        let claimed = meta.lead.epoch;
        let epoch = match self.leader.as_ref().and_then(|leader| leader.won()) {
            Some(won) if won != claimed || won <= kept.epoch => {
                return Err(StoreError::Fenced { by: claimed.max(kept.epoch) });
            }
            Some(won) => won,
            None => kept.next_epoch(self.clock.now()).max(claimed.next()).max(fixed),
        };
        let may_lack_open = self.process.machine.buffers && meta.restarted && !meta.closed && meta.commits > 0;
        let contents = Contents { may_lack_open, checkpoint: meta.checkpoint.clone(), ..kept.contents(epoch) };
        let chain = Chain::new(STORE.into(), epoch, stored(&read), given);
        self.set_log(&kept.frontier.log);
        let open = kept.open.keys().copied().collect();
        let frontier = Frontier { open, ..kept.frontier.clone() };
        *term = Some(Term { epoch, current: kept.epoch, frontier, chain });
        *self.required() = (contents.last_revision, Epoch::default());
        Ok(contents)
    }

    async fn commit(&self, write: Arc<Write>) -> Result<(), StoreError> {
        let mut term = self.term.lock().await;
        let Term { epoch, current, frontier, chain } = term.as_mut().ok_or_else(not_taken_over)?;
        if write.epoch != *epoch {
            return Err(StoreError::Fenced { by: *epoch });
        }
        frontier.check(&write).map_err(|problem| StoreError::Defect { problem })?;
        let appended = Appended::to(&frontier.log, &write);
        chain.commit(&mut Attempt { process: self.process.clone(), write: write.clone() }).await?;
        frontier.advance(&write, appended);
        *current = *epoch;
        self.set_log(&frontier.log);
        Ok(())
    }

    async fn find_excess(&self, retention: Retention, now: Timestamp, limit: usize) -> Result<Excess, StoreError> {
        let term = self.term.lock().await;
        let Term { current, .. } = term.as_ref().ok_or_else(not_taken_over)?;
        let read = |rows: &Rows| (rows.now.kept.epoch, rows.now.kept.excess(&retention, now, limit));
        let (by, excess) = self.process.read(read).await?;
        if by == *current { Ok(excess) } else { Err(StoreError::Fenced { by }) }
    }

    fn set_log(&self, log: &Log) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone_from(log);
    }
}

impl Store for SimulatedStore {
    fn take_over(&self, _: Seals) -> BoxFuture<'_, Result<Contents, StoreError>> {
        Box::pin(self.take_over())
    }

    fn leadership(&self) -> Option<Arc<dyn Leadership>> {
        Some(self.leader.clone()?)
    }

    fn look(&self) -> Option<Arc<dyn Store>> {
        self.leader.as_ref().map(|_| Self::of(self.process.clone(), None, self.clock) as _)
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.trouble.watch(self.commit(write)))
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        self.trouble.reports()
    }

    fn require(&self, revision: Revision, epoch: Epoch) {
        *self.required() = (revision, epoch);
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        Box::pin(async move { self.rows().await?.cycle(cycle_id).await })
    }

    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        Box::pin(async move { self.rows().await?.cycle_of_request(request).await })
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        limits: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        Box::pin(async move { self.rows().await?.cycles_before(before, filter, limits).await })
    }

    fn cycles_after(&self, revision: Revision, limits: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        Box::pin(async move { self.rows().await?.cycles_after(revision, limits).await })
    }

    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>> {
        Box::pin(async move { self.rows().await?.events_before(before, filter, limit).await })
    }

    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>> {
        Box::pin(self.find_excess(retention, now, limit))
    }

    fn log(&self) -> Log {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>> {
        Box::pin(async move { self.rows().await?.leaf(cycle_id).await })
    }

    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>> {
        Box::pin(async move { self.rows().await?.nodes(nodes).await })
    }

    fn parts(&self, leaves: Range<u64>, limits: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>> {
        Box::pin(async move { self.rows().await?.parts(leaves, limits).await })
    }

    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let publish = move |rows: &mut Rows| {
                rows.write(|Version { meta, .. }| meta.checkpoint = Some(checkpoint));
                Some(())
            };
            let published = self.process.ask(true, publish).await.returned()?;
            published.ok_or_else(|| unavailable("it was refused"))
        })
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        Box::pin(async move { self.rows().await?.size().await })
    }
}

#[cfg(test)]
mod tests;
