//! The kit of these tests: a store and a fleet that each test scripts.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;
use orchestrator_core::{
    host::Host,
    ledger::{Hash, Node, Signer},
    memory::{Memory, Shares},
    model::{Answer, Code, CycleId, CycleRequest, Epoch, Name, Revision, Subsystem, SubsystemSpec, Trigger},
    orchestrator::{Declared, Orchestrator, OrchestratorTasks, Settings},
    ports::{
        CallError, Contents, Excess, Filter, Found, InitializeCall, Left, Log, Page, PageLimits, Reply, ResumeError,
        Retention, RunCall, Snapshot, Store, StoreError, StoreSize, Subsystems, Untraced, Write,
    },
};
use tokio::{sync::watch, time::sleep};
use tokio_stream::wrappers::WatchStream;

/// Decides the result of a commit.
pub(crate) type Commit =
    dyn Fn(Arc<dyn Store>, Arc<Write>) -> BoxFuture<'static, Result<(), StoreError>> + Send + Sync + 'static;

/// Runs before old records are removed.
pub(crate) type Prune = dyn Fn() -> Result<(), StoreError> + Send + Sync + 'static;

/// Delays an answer.
pub(crate) type Delay = dyn Fn() -> BoxFuture<'static, ()> + Send + Sync + 'static;

/// A store that passes its commits to the test, and all other calls to another store.
pub(crate) struct Around {
    pub(crate) inner: Arc<dyn Store>,
    pub(crate) commit: Box<Commit>,
    pub(crate) prune: Box<Prune>,
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
    fn take_over(&self) -> BoxFuture<'_, Result<Contents, StoreError>> {
        self.inner.take_over()
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        (self.commit)(self.inner.clone(), write)
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        Box::pin(WatchStream::from_changes(self.trouble.subscribe()))
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        self.inner.cycle(cycle_id)
    }

    fn cycle_of_request(&self, request_id: String) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        Box::pin(async {
            let found = self.inner.cycle_of_request(request_id).await;
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

    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.publish_checkpoint(checkpoint)
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
    /// True if a call panics, as a defect would.
    pub(crate) call_panics: bool,
    /// True if forgetting a subsystem panics, as a defect would.
    pub(crate) forget_panics: bool,
    pub(crate) received: Mutex<Vec<Received>>,
    /// The subsystems that have left their endpoints.
    pub(crate) left: Mutex<Vec<Left>>,
}

impl Subsystems for Fleet {
    fn initialize<'a>(&'a self, _to: &'a Subsystem, _call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(async { Ok(()) })
    }

    fn run_cycle<'a>(&'a self, to: &'a Subsystem, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        assert!(!self.call_panics, "a defect");
        let received = Received { name: to.name.to_string(), cycle_id: call.cycle_id, epoch: call.epoch };
        self.received.lock().unwrap().push(received);
        Box::pin(async {
            sleep(Duration::from_secs(1)).await;
            Ok(Reply { answer: Answer::default(), held: Memory::whole(0).try_hold(0).unwrap() })
        })
    }

    fn get_status<'a>(&'a self, _of: &'a Subsystem, _timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async { Err(CallError { code: Code::Unimplemented, message: String::new() }) })
    }

    fn forget(&self, left: &[Left]) {
        assert!(!self.forget_panics || left.is_empty(), "a defect");
        self.left.lock().unwrap().extend_from_slice(left);
    }
}

pub(crate) fn subsystem(name: &str) -> Subsystem {
    let spec = SubsystemSpec { name: name.into(), endpoint: "http://127.0.0.1:1".into(), ..SubsystemSpec::default() };
    Subsystem::from_spec(&spec).unwrap()
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
    }
}

/// The same time and the same randomness in every test.
pub(crate) fn host() -> Host {
    Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 0)
}

/// An orchestrator that has taken over this store.
pub(crate) async fn start(
    settings: Settings,
    fleet: Arc<Fleet>,
    store: Arc<dyn Store>,
) -> (Orchestrator, OrchestratorTasks) {
    let contents = store.take_over().await.unwrap();
    start_with(settings, host(), fleet, (store, contents)).await
}

/// An orchestrator that finds these contents in the store, at the time of this host.
pub(crate) async fn start_with(
    settings: Settings,
    host: Host,
    fleet: Arc<Fleet>,
    (store, contents): (Arc<dyn Store>, Contents),
) -> (Orchestrator, OrchestratorTasks) {
    let memory = Shares::of(1 << 30);
    let (store, spans) = ((store, contents, Signer::generate("test").unwrap()), Arc::new(Untraced));
    Orchestrator::start(settings, &memory, host, fleet, store, Declared::default(), spans).await.unwrap()
}
