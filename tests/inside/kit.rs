//! The kit of these tests: a store and a fleet that each test scripts.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{Arc, Mutex, Once},
    time::Duration,
};

use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::{SignedDuration, Timestamp};
use orchestrator_core::{
    host::Host,
    ledger::{Hash, Node, Part, SealKeys, Signer, SigningKey},
    memory::{Memory, Shares},
    model::{
        Answer, Cause, Code, CycleId, CycleRequest, Epoch, IntervalLoop, LoopSpec, Name, Payload, RequestKey, Revision,
        Subsystem, SubsystemSpec, Trigger,
    },
    orchestrator::{Declared, Orchestrator, OrchestratorTasks, Refusal, Settings, TakenOver},
    ports::{
        CallError, Callee, Contents, EventFilter, EventPage, Excess, Filter, Found, InitializeCall, Left, Log, Page,
        PageLimits, Record, Reply, ResumeError, Retention, RunCall, Seals, Snapshot, Store, StoreError, StoreSize,
        Subsystems, Untraced, Write,
    },
    record, store,
};
use tokio::{sync::watch, time::sleep};
use tokio_stream::wrappers::WatchStream;
use tracing::Level;

/// The cause of changes of these tests.
pub(crate) fn by_test() -> Cause {
    Cause::of_service("test")
}

/// Decides the result of a commit.
pub(crate) type Commit =
    dyn Fn(Arc<dyn Store>, Arc<Write>) -> BoxFuture<'static, Result<(), StoreError>> + Send + Sync + 'static;

/// Runs before old records are removed.
pub(crate) type Prune = dyn Fn() -> Result<(), StoreError> + Send + Sync + 'static;

/// Decides what a reader gets of a record in the store.
pub(crate) type Read = dyn Fn(Record) -> Found + Send + Sync + 'static;

/// Decides the result of publishing a checkpoint.
pub(crate) type Publish = dyn Fn(&str) -> Result<(), StoreError> + Send + Sync + 'static;

/// Delays an answer.
pub(crate) type Delay = dyn Fn() -> BoxFuture<'static, ()> + Send + Sync + 'static;

/// A store that passes its commits to the test, and all other calls to another store.
pub(crate) struct Around {
    pub(crate) inner: Arc<dyn Store>,
    pub(crate) commit: Box<Commit>,
    pub(crate) prune: Box<Prune>,
    /// Decides the answer to [`Store::cycle`].
    pub(crate) read: Box<Read>,
    pub(crate) publish: Box<Publish>,
    /// The troubles that it reports beside its commits.
    pub(crate) trouble: watch::Sender<Option<StoreError>>,
    /// Delays the answer to a look-up of a request, once it is known.
    pub(crate) delay: Box<Delay>,
}

impl Around {
    /// A store that behaves as the other one, and reports no trouble.
    pub(crate) fn over(inner: Arc<dyn Store>) -> Self {
        Self {
            inner,
            commit: Box::new(|inner, write| Box::pin(async move { inner.commit(write).await })),
            prune: Box::new(|| Ok(())),
            read: Box::new(Ok),
            publish: Box::new(|_| Ok(())),
            trouble: watch::Sender::new(None),
            delay: Box::new(|| Box::pin(async {})),
        }
    }
}

/// A store that passes its commits to this function, and reports no trouble.
pub(crate) fn around(inner: Arc<dyn Store>, commit: Box<Commit>) -> Arc<dyn Store> {
    Arc::new(Around { commit, ..Around::over(inner) })
}

impl Store for Around {
    fn take_over(&self, seals: Seals) -> BoxFuture<'_, Result<Contents, StoreError>> {
        self.inner.take_over(seals)
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        (self.commit)(self.inner.clone(), write)
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        Box::pin(WatchStream::from_changes(self.trouble.subscribe()))
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        Box::pin(async move { Ok(self.inner.cycle(cycle_id).await?.map(|found| found.and_then(&self.read))) })
    }

    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        Box::pin(async {
            let found = self.inner.cycle_of_request(request).await;
            (self.delay)().await;
            found
        })
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        page: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        self.inner.cycles_before(before, filter, page)
    }

    fn cycles_after(&self, revision: Revision, page: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        self.inner.cycles_after(revision, page)
    }

    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>> {
        self.inner.events_before(before, filter, limit)
    }

    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>> {
        match (self.prune)() {
            Ok(()) => self.inner.excess(retention, now, limit),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn log(&self) -> Log {
        self.inner.log()
    }

    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>> {
        self.inner.leaf(cycle_id)
    }

    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>> {
        self.inner.nodes(nodes)
    }

    fn parts(&self, leaves: Range<u64>, page: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>> {
        self.inner.parts(leaves, page)
    }

    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>> {
        match (self.publish)(&checkpoint) {
            Ok(()) => self.inner.publish_checkpoint(checkpoint),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        self.inner.size()
    }
}

/// A call that a subsystem received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) name: String,
    pub(crate) cycle_id: CycleId,
    pub(crate) epoch: Epoch,
}

/// Subsystems that answer after a second, and log their calls.
#[derive(Default)]
pub(crate) struct Fleet {
    /// Their answer.
    pub(crate) answer: Mutex<Answer>,
    /// The time that these subsystems take for a snapshot. Others have none.
    pub(crate) snapshots: BTreeMap<&'static str, Duration>,
    /// True if a call panics, as a defect would.
    pub(crate) call_panics: bool,
    /// True if each call fails.
    pub(crate) call_fails: bool,
    /// True if forgetting a subsystem panics, as a defect would.
    pub(crate) forget_panics: bool,
    pub(crate) received: Mutex<Vec<Received>>,
    /// The subsystems that have left their endpoints.
    pub(crate) left: Mutex<Vec<Left>>,
}

impl Subsystems for Fleet {
    fn initialize<'a>(&'a self, _to: Callee<'a>, _call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(async { Ok(()) })
    }

    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        assert!(!self.call_panics, "a defect");
        let received = Received { name: to.subsystem.name.to_string(), cycle_id: call.cycle_id, epoch: call.epoch };
        self.received.lock().unwrap().push(received);
        Box::pin(async {
            sleep(Duration::from_secs(1)).await;
            if self.call_fails {
                return Err(CallError::new(Code::Internal, "as scripted"));
            }
            Ok(Reply { answer: self.answer.lock().unwrap().clone(), held: Memory::whole(0).try_hold(0).unwrap() })
        })
    }

    fn get_status<'a>(&'a self, of: Callee<'a>, _timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async {
            let Some(takes) = self.snapshots.get(of.subsystem.name.as_str()) else {
                return Err(CallError::new(Code::Unimplemented, ""));
            };
            sleep(*takes).await;
            Ok(Snapshot { status: text(of.subsystem.name.as_str()), held: Memory::whole(0).try_hold(0).unwrap() })
        })
    }

    fn forget(&self, left: &[Left]) {
        assert!(!self.forget_panics || left.is_empty(), "a defect");
        self.left.lock().unwrap().extend_from_slice(left);
    }
}

/// A payload with this text.
pub(crate) fn text(text: &str) -> Payload {
    let object = serde_json::json!({ "text": text });
    Payload::from_json(object.as_object().unwrap()).unwrap()
}

pub(crate) fn subsystem(name: &str) -> Subsystem {
    let spec = SubsystemSpec { name: name.into(), endpoint: "http://127.0.0.1:1".into(), ..SubsystemSpec::default() };
    Subsystem::from_spec(&spec).unwrap()
}

/// A loop with a tick an hour, whose cycle starts up to 50 minutes later. Its draws show when its tick was planned.
pub(crate) fn hourly(name: &str) -> IntervalLoop {
    let (interval, jitter) = (Some(SignedDuration::from_hours(1)), Some(SignedDuration::from_mins(50)));
    IntervalLoop::from_spec(&LoopSpec { name: name.into(), interval, jitter, ..LoopSpec::default() }).unwrap()
}

/// A request for a cycle over all subsystems.
pub(crate) fn of_all() -> CycleRequest {
    CycleRequest::over_all(Trigger::Manual, Timestamp::UNIX_EPOCH)
}

/// A request for a cycle over these subsystems.
pub(crate) fn of(names: &[&str]) -> CycleRequest {
    let subset: Vec<_> = names.iter().map(|name| Name::parse(name).unwrap()).collect();
    CycleRequest { subset: Some(subset.into()), ..of_all() }
}

pub(crate) fn settings() -> Settings {
    Settings {
        orchestrator_id: "test".into(),
        cycle_deadline: Duration::from_secs(10),
        max_concurrent_calls: 10,
        max_queued: 100,
        max_record_bytes: 1 << 20,
        max_outputs_bytes: Some(1 << 20),
        max_subsystems: 100,
        max_loops: 10,
        max_watchers: 10,
        retention: Retention::default(),
        audit_reads: true,
        revoked: Arc::default(),
    }
}

/// The same time and the same randomness in every test.
pub(crate) fn host() -> Host {
    Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 0)
}

/// An empty store in memory.
pub(crate) async fn in_memory() -> Arc<dyn Store> {
    store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap()
}

/// What signs the log of every process, so that each can take over from another one.
fn signer() -> Signer {
    let key = SigningKey::of_seed("test", [7; SigningKey::SEED]).unwrap();
    Signer { origin: "test".into(), keys: vec![key] }
}

/// How every process takes a store over.
pub(crate) fn seals() -> Seals {
    Seals::Checked(SealKeys::of(&signer()))
}

/// The configuration of a process, and what it runs on.
pub(crate) struct Process {
    pub(crate) settings: Settings,
    pub(crate) declared: Declared,
    pub(crate) host: Host,
    pub(crate) memory: Shares,
    pub(crate) fleet: Arc<dyn Subsystems>,
}

impl Default for Process {
    fn default() -> Self {
        Self {
            settings: settings(),
            declared: Declared::default(),
            host: host(),
            memory: Shares::of(1 << 30),
            fleet: Arc::new(Fleet::default()),
        }
    }
}

impl Process {
    /// Takes over this store, and starts.
    pub(crate) async fn over(self, store: Arc<dyn Store>) -> Result<(Orchestrator, OrchestratorTasks), Refusal> {
        let contents = store.take_over(seals()).await.unwrap();
        self.with(store, contents).await
    }

    /// Starts with these contents of the store.
    async fn with(
        self,
        store: Arc<dyn Store>,
        contents: Contents,
    ) -> Result<(Orchestrator, OrchestratorTasks), Refusal> {
        let Self { settings, declared, host, memory, fleet } = self;
        let (store, spans) = (TakenOver::new(store, contents, signer()), Arc::new(Untraced));
        Orchestrator::start(settings, &memory, host, fleet, store, declared, spans).await
    }
}

/// An orchestrator that has taken over this store.
pub(crate) async fn start(
    settings: Settings,
    fleet: Arc<Fleet>,
    store: Arc<dyn Store>,
) -> (Orchestrator, OrchestratorTasks) {
    Process { settings, fleet, ..Process::default() }.over(store).await.unwrap()
}

/// An orchestrator that finds these contents in the store, at the time of this host.
pub(crate) async fn start_with(
    settings: Settings,
    host: Host,
    fleet: Arc<Fleet>,
    (store, contents): (Arc<dyn Store>, Contents),
) -> (Orchestrator, OrchestratorTasks) {
    Process { settings, host, fleet, ..Process::default() }.with(store, contents).await.unwrap()
}

thread_local! {
    static LOGGED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Takes the lines with warnings and errors that this thread has logged since the last call. Nothing is kept before the
/// first call.
pub(crate) fn warnings() -> String {
    static KEEPS: Once = Once::new();
    // For all threads: with a subscriber of its own, a thread may miss events that another one logs first.
    KEEPS.call_once(|| {
        tracing_subscriber::fmt().with_max_level(Level::WARN).with_ansi(false).with_writer(|| OfThisThread).init();
    });
    String::from_utf8(LOGGED.take()).unwrap()
}

/// Takes the lines with errors; the others are dropped.
pub(crate) fn errors() -> String {
    warnings().split_inclusive('\n').filter(|line| line.contains(" ERROR ")).collect()
}

struct OfThisThread;

impl io::Write for OfThisThread {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LOGGED.with_borrow_mut(|logged| logged.write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
