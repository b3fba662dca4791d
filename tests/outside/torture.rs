//! The service is killed with SIGKILL at random moments, repeatedly and under load. Its promises are checked from
//! outside: by the answers to callers, the calls of subsystems, and the events of a watcher.
//!
//! `ORCHESTRATOR_TORTURE_KILLS` sets the number of kills (default 50), `ORCHESTRATOR_TORTURE_SEED` the seed of the load
//! and of the moments. The seed is printed; the scheduling of the processes is not part of it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    env,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::common::{
    fleet::{Fleet, Method, Run, from_struct, to_struct},
    patiently,
    service::{Client, Home, Service, decode, registration},
};
use bytes::Bytes;
use fastrand::Rng;
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState, OverlapPolicy, cycle_event::Event};
use prost::Message;
use prost_types::Duration as Span;
use serde_json::json;
use tokio::{select, sync::watch, task::JoinSet, time::sleep};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

/// The subsystems that are always registered; each runs after the one before it.
const CHAIN: [&str; 4] = ["first", "second", "third", "fourth"];

#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_whenever_the_process_is_killed() {
    let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let kills = number("ORCHESTRATOR_TORTURE_KILLS").unwrap_or(50);
    let seed = number("ORCHESTRATOR_TORTURE_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("{kills} kills, ORCHESTRATOR_TORTURE_SEED={seed}");
    let mut rng = Rng::with_seed(seed);

    let home = Home::new();
    let fleet = Fleet::behind(3).await;
    fleet.run("second", Run::Late(Duration::from_millis(2), Box::new(Run::Echo)));
    fleet.run("third", Run::fail(Code::Internal));
    let acknowledged = Arc::new(Acknowledged::default());
    let clients = watch::Sender::new(None);
    let watched = Arc::new(Watched::default());
    let mut following = tokio::spawn(watched.clone().follow(clients.subscribe(), rng.fork()));
    let mut callers: Vec<Caller> = vec![
        Caller::Runner(Runner::new(1, &mut rng, &acknowledged)),
        Caller::Runner(Runner::new(2, &mut rng, &acknowledged)),
        Caller::Runner(Runner::new(3, &mut rng, &acknowledged)),
        Caller::Registrar(Registrar::new(1, &mut rng, &acknowledged, &fleet)),
        Caller::Registrar(Registrar::new(2, &mut rng, &acknowledged, &fleet)),
        Caller::Looper(Looper::new(&mut rng, &acknowledged)),
    ];

    let mut last_epoch = 0;
    for life in 0..kills {
        if life > 0 && rng.u8(..10) == 0 {
            // This kill is during the start, while the history is read.
            let starting = home.spawn();
            sleep(Duration::from_millis(rng.u64(..60))).await;
            starting.kill().await;
            continue;
        }
        let (service, client) = start(&home, &mut last_epoch).await;
        if life == 0 {
            register_chain(client.clone(), &fleet, &acknowledged).await;
        }
        clients.send_replace(Some(client.clone()));
        let mut running: JoinSet<Caller> = callers.into_iter().map(|caller| caller.live(client.clone())).collect();

        select! {
            () = moment(&mut rng, &acknowledged, &fleet, &watched) => {}
            ended = running.join_next() => panic!("a caller lost the service before it was killed: \
                                                   {:?}", ended.map(|ended| ended.map(drop))),
            ended = &mut following => panic!("the watcher has failed: {ended:?}"),
        }
        service.kill().await;
        callers = patiently("callers to notice that the service is gone", running.join_all()).await;
        // After this, no call of the dead process is on its way.
        fleet.until("the connections of the dead process to close", |state| state.connections == 0).await;
    }

    let (service, mut client) = start(&home, &mut last_epoch).await;
    clients.send_replace(Some(client.clone()));
    for caller in callers {
        caller.settle(client.clone()).await;
    }
    // No cycle starts after the last one, so that the compared data does not change.
    let stop = pb::StopIntervalLoopRequest { name: Looper::NAME.into() };
    let stopped = answer(client.stop_interval_loop(stop).await, &["LOOP_NOT_FOUND"]);
    match stopped {
        Answer::Response(_) => acknowledged.changed("StopIntervalLoop", Looper::TARGET),
        Answer::Refused => {}
        Answer::Killed => panic!("the service has failed"),
    }
    let last = client.run().await.unwrap();
    watched.until(last.revision).await;
    following.abort();
    let history = client.history().await.unwrap();
    check_history(&history, &acknowledged, &watched);
    check_calls(&fleet, &history);

    // The history is the same after a graceful end.
    assert_eq!(service.stop().await.code(), Some(0));
    check_audit(&home, &history, &acknowledged);
    let (_service, mut client) = start(&home, &mut last_epoch).await;
    assert_eq!(client.history().await.unwrap(), history);
    summarize(&history);
}

async fn start(home: &Home, last_epoch: &mut u64) -> (Service, Client) {
    let service = home.serve().await;
    let mut client = service.client().await;
    let epoch = client.status().await.unwrap().epoch;
    assert!(epoch > *last_epoch, "epoch {epoch} came after {last_epoch}");
    *last_epoch = epoch;
    (service, client)
}

async fn register_chain(mut client: Client, fleet: &Fleet, acknowledged: &Acknowledged) {
    let mut before = None;
    for (i, name) in CHAIN.into_iter().enumerate() {
        let chained = pb::Registration {
            after: before.into_iter().collect(),
            breaker: Some(pb::BreakerPolicy { disabled: true, ..pb::BreakerPolicy::default() }),
            ..registration(name, &fleet.endpoints()[i % 3])
        };
        client.register(chained).await.unwrap();
        acknowledged.changed("RegisterSubsystem", name);
        before = Some(name.to_owned());
    }
}

/// Waits for the moment of the kill: after some acknowledgements, calls or records, or after a short while.
async fn moment(rng: &mut Rng, acknowledged: &Acknowledged, fleet: &Fleet, watched: &Watched) {
    match rng.u8(..4) {
        0 => acknowledged.until(acknowledged.count() + rng.usize(..40)).await,
        1 => {
            let calls = fleet.now(|state| state.calls.len()) + rng.usize(..60);
            fleet.until("calls", |state| state.calls.len() >= calls).await;
        }
        2 => watched.until(watched.revision() + rng.u64(..10)).await,
        _ => sleep(Duration::from_millis(rng.u64(..60))).await,
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Knowledge from outside

/// The acknowledgements that callers received.
#[derive(Default)]
struct Acknowledged {
    cycles: Mutex<BTreeMap<u64, Option<Bytes>>>,
    requests: Mutex<BTreeMap<String, u64>>,
    /// The cycles whose cancellation was acknowledged.
    cancelled: Mutex<BTreeSet<u64>>,
    /// Number of other changes, by their RPCs and targets.
    changes: Mutex<BTreeMap<(&'static str, String), u64>>,
    count: watch::Sender<usize>,
}

impl Acknowledged {
    /// Counts an acknowledgement.
    fn add(&self) {
        self.count.send_modify(|count| *count += 1);
    }

    /// Adds an acknowledged cycle, with its record if it has ended, and with its request id if it has one.
    fn cycle(&self, cycle_id: u64, record: &Bytes, request_id: &str) {
        assert!(cycle_id > 0);
        {
            let mut cycles = self.cycles.lock().unwrap();
            let known = cycles.entry(cycle_id).or_default();
            if !record.is_empty() {
                let first = known.get_or_insert_with(|| record.clone());
                assert_eq!(first, record, "cycle {cycle_id} was acknowledged with two records");
            }
        }
        if !request_id.is_empty() {
            let first = *self.requests.lock().unwrap().entry(request_id.to_owned()).or_insert(cycle_id);
            assert_eq!(first, cycle_id, "request {request_id} started two cycles");
        }
        self.add();
    }

    /// Counts a change that was made, whether it was acknowledged or seen later.
    fn changed(&self, rpc: &'static str, target: &str) {
        *self.changes.lock().unwrap().entry((rpc, target.to_owned())).or_default() += 1;
    }

    fn count(&self) -> usize {
        *self.count.borrow()
    }

    async fn until(&self, count: usize) {
        let mut counts = self.count.subscribe();
        patiently("acknowledgements", counts.wait_for(|now| *now >= count)).await.unwrap();
    }
}

/// The events of the watcher: the record of each revision.
#[derive(Default)]
struct Watched {
    records: Mutex<Vec<Bytes>>,
    revision: watch::Sender<u64>,
}

impl Watched {
    fn revision(&self) -> u64 {
        *self.revision.borrow()
    }

    async fn until(&self, revision: u64) {
        let mut revisions = self.revision.subscribe();
        patiently("the watcher", revisions.wait_for(|now| *now >= revision)).await.unwrap();
    }

    /// Watches, and continues at its position whenever the stream breaks.
    async fn follow(self: Arc<Self>, mut clients: watch::Receiver<Option<Client>>, mut rng: Rng) {
        while clients.changed().await.is_ok() {
            let client = clients.borrow_and_update().clone();
            let mut client = client.unwrap();
            // The watcher also disconnects and resumes without a failure.
            while self.watch(&mut client, rng.usize(1..100)).await {}
        }
    }

    /// Reads at most this number of events. Returns false if the service was killed.
    async fn watch(&self, client: &mut Client, events: usize) -> bool {
        let Answer::Response(mut stream) = answer(client.watch_after(self.revision()).await.map(Response::new), &[])
        else {
            return false;
        };
        for _ in 0..events {
            let Answer::Response(next) = answer(stream.message().await.map(Response::new), &[]) else { return false };
            let event = next.unwrap().event.unwrap();
            match event.event.unwrap() {
                Event::Recorded(record) => {
                    assert_eq!(event.revision, self.revision() + 1, "the watcher saw a gap or a repetition");
                    self.records.lock().unwrap().push(record);
                    self.revision.send_replace(event.revision);
                }
                Event::Bookmark(_) => assert_eq!(event.revision, self.revision()),
                live => panic!("{live:?} was not requested"),
            }
        }
        true
    }
}

/// The outcome of a call.
enum Answer<T> {
    Response(T),
    Refused,
    Killed,
}

/// Distinguishes refusals, of which only these are expected, from the end of the process.
fn answer<T>(answer: Result<Response<T>, Status>, expected: &[&str]) -> Answer<T> {
    match answer {
        Ok(response) => Answer::Response(response.into_inner()),
        Err(status) => match status.get_details_error_info() {
            Some(info) if expected.contains(&info.reason.as_str()) => Answer::Refused,
            None if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled) => {
                Answer::Killed
            }
            _ => panic!("{status:?}"),
        },
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Callers

/// A client that uses the service until it is killed, and continues when it is back.
enum Caller {
    Runner(Runner),
    Registrar(Registrar),
    Looper(Looper),
}

impl Caller {
    /// Uses the service until it is killed.
    async fn live(mut self, mut client: Client) -> Self {
        match &mut self {
            Self::Runner(runner) => while runner.act(&mut client).await.is_some() {},
            Self::Registrar(registrar) => while registrar.act(&mut client).await.is_some() {},
            Self::Looper(looper) => while looper.act(&mut client).await.is_some() {},
        }
        self
    }

    /// Resolves the calls that were never answered.
    async fn settle(mut self, mut client: Client) {
        let settled = match &mut self {
            Self::Runner(runner) => runner.settle(&mut client).await,
            Self::Registrar(registrar) => registrar.settle(&mut client).await,
            Self::Looper(looper) => looper.settle(&mut client).await,
        };
        assert!(settled.is_some(), "the service has failed");
    }
}

/// Runs cycles in every way.
struct Runner {
    name: u32,
    rng: Rng,
    acknowledged: Arc<Acknowledged>,
    requests: u32,
    /// A request with a request id that was never answered.
    unanswered: Option<pb::RunCycleRequest>,
}

impl Runner {
    fn new(name: u32, rng: &mut Rng, acknowledged: &Arc<Acknowledged>) -> Self {
        Self { name, rng: rng.fork(), acknowledged: acknowledged.clone(), requests: 0, unanswered: None }
    }

    /// `None` when the service was killed.
    async fn act(&mut self, client: &mut Client) -> Option<()> {
        self.settle(client).await?;
        match self.rng.u8(..8) {
            0..=2 => {
                let overlap_policy = match self.rng.u8(..8) {
                    0 => OverlapPolicy::Skip,
                    1 => OverlapPolicy::BufferOne,
                    2 => OverlapPolicy::CancelOther,
                    _ => OverlapPolicy::BufferAll,
                };
                let request = pb::RunCycleRequest {
                    overlap_policy: overlap_policy.into(),
                    record_outputs: self.rng.bool(),
                    ..pb::RunCycleRequest::default()
                };
                self.run(client, request, &["CYCLE_RUNNING"]).await.map(|_| ())
            }
            3..=5 => {
                self.requests += 1;
                self.unanswered = Some(pb::RunCycleRequest {
                    request_id: format!("runner {} request {}", self.name, self.requests),
                    r#async: self.rng.bool(),
                    ..pb::RunCycleRequest::default()
                });
                self.settle(client).await
            }
            6 if self.requests > 0 => {
                // An earlier request again: `Acknowledged` checks that it gets the same cycle.
                let request_id = format!("runner {} request {}", self.name, self.rng.u32(1..=self.requests));
                let request = pb::RunCycleRequest { request_id, ..pb::RunCycleRequest::default() };
                self.run(client, request, &[]).await.map(|_| ())
            }
            _ => {
                let request = pb::RunCycleRequest { r#async: true, ..pb::RunCycleRequest::default() };
                let cycle_id = self.run(client, request, &[]).await?;
                let cancelled = client.cancel_cycle(pb::CancelCycleRequest { cycle_id }).await;
                match answer(cancelled, &["CYCLE_FINISHED"]) {
                    Answer::Response(response) => {
                        self.acknowledged.cycle(cycle_id, &response.telemetry, "");
                        self.acknowledged.cancelled.lock().unwrap().insert(cycle_id);
                    }
                    Answer::Refused => {}
                    Answer::Killed => return None,
                }
                Some(())
            }
        }
    }

    async fn settle(&mut self, client: &mut Client) -> Option<()> {
        if let Some(request) = self.unanswered.clone() {
            self.run(client, request, &[]).await?;
            self.unanswered = None;
        }
        Some(())
    }

    /// The id of the cycle; 0 if it was refused.
    async fn run(&self, client: &mut Client, request: pb::RunCycleRequest, expected: &[&str]) -> Option<u64> {
        let (request_id, is_async) = (request.request_id.clone(), request.r#async);
        match answer(client.run_cycle(request).await, expected) {
            Answer::Response(response) => {
                if !is_async {
                    let record = decode(response.telemetry.clone());
                    assert_eq!((record.cycle_id, &record.request_id), (response.cycle_id, &request_id));
                }
                self.acknowledged.cycle(response.cycle_id, &response.telemetry, &request_id);
                Some(response.cycle_id)
            }
            Answer::Refused => Some(0),
            Answer::Killed => None,
        }
    }
}

/// Registers, unregisters, suspends and resumes subsystems of its own.
struct Registrar {
    rng: Rng,
    acknowledged: Arc<Acknowledged>,
    endpoints: Vec<String>,
    version: u32,
    /// The possible states by name: one, or two after a call that was never answered.
    possible: BTreeMap<String, Vec<Standing>>,
    /// The RPC of the last call for each.
    asked: BTreeMap<String, &'static str>,
}

/// The state of a subsystem; `None` if it is not registered.
type Standing = Option<Registered>;

#[derive(Clone, Debug, PartialEq)]
struct Registered {
    version: u32,
    suspended: bool,
}

impl Registrar {
    fn new(name: u32, rng: &mut Rng, acknowledged: &Arc<Acknowledged>, fleet: &Fleet) -> Self {
        Self {
            rng: rng.fork(),
            acknowledged: acknowledged.clone(),
            endpoints: fleet.endpoints().to_vec(),
            version: 0,
            possible: (1..=3).map(|i| (format!("registrar{name}-{i}"), vec![None])).collect(),
            asked: BTreeMap::new(),
        }
    }

    /// The registration of a subsystem in this version.
    fn registration(&self, name: &str, version: u32) -> pb::Registration {
        pb::Registration {
            phase: i32::try_from(version % 3).unwrap(),
            after: vec![CHAIN[version as usize % CHAIN.len()].to_owned()],
            timeout: Some(Span { seconds: 1, nanos: i32::try_from(version).unwrap() * 1000 }),
            parameters: to_struct(&json!({ "version": version })),
            critical: version.is_multiple_of(2),
            ..registration(name, &self.endpoints[version as usize % self.endpoints.len()])
        }
    }

    /// The state of a subsystem from its status, which must contain every registered field.
    fn standing(&self, status: &pb::SubsystemStatus) -> Registered {
        let found = status.registration.clone().unwrap();
        let version = from_struct(&found.parameters)["version"].as_u64().unwrap();
        let version = u32::try_from(version).unwrap();
        let given = pb::Registration {
            retry: found.retry.clone(),
            breaker: found.breaker,
            limits: found.limits,
            ..self.registration(&found.name, version)
        };
        assert_eq!(found, given);
        Registered { version, suspended: status.suspended }
    }

    async fn act(&mut self, client: &mut Client) -> Option<()> {
        self.settle(client).await?;
        loop {
            let index = self.rng.usize(..self.possible.len());
            let (name, possible) = self.possible.iter().nth(index).unwrap();
            let (name, now) = (name.clone(), possible[0].clone());
            match (now, self.rng.u8(..5)) {
                (now, 0 | 1) => {
                    self.version += 1;
                    let registration = self.registration(&name, self.version);
                    let suspended = now.as_ref().is_some_and(|now| now.suspended);
                    self.possible("RegisterSubsystem", &name, Some(Registered { version: self.version, suspended }));
                    let response = self.answered(client.register(registration).await.map(Response::new))?;
                    assert_eq!(response.created, now.is_none());
                    self.certain(&name, response.subsystem.as_ref());
                }
                (None, _) => {}
                (Some(_), 2) => {
                    self.possible("UnregisterSubsystem", &name, None);
                    let request = pb::UnregisterSubsystemRequest { name: name.clone() };
                    self.answered(client.unregister_subsystem(request).await)?;
                    self.certain(&name, None);
                }
                (Some(now), 3) => {
                    self.possible("SuspendSubsystem", &name, Some(Registered { suspended: true, ..now }));
                    let request = pb::SuspendSubsystemRequest { name: name.clone() };
                    let response = self.answered(client.suspend_subsystem(request).await)?;
                    self.certain(&name, response.subsystem.as_ref());
                }
                (Some(now), _) => {
                    self.possible("ResumeSubsystem", &name, Some(Registered { suspended: false, ..now }));
                    let request = pb::ResumeSubsystemRequest { name: name.clone() };
                    let response = self.answered(client.resume_subsystem(request).await)?;
                    self.certain(&name, response.subsystem.as_ref());
                }
            }
        }
    }

    /// Compares the state of each subsystem with the acknowledged or possible ones.
    async fn settle(&mut self, client: &mut Client) -> Option<()> {
        for name in self.possible.keys().cloned().collect::<Vec<_>>() {
            let request = pb::GetSubsystemRequest { name: name.clone(), ..pb::GetSubsystemRequest::default() };
            let found = match answer(client.get_subsystem(request).await, &["SUBSYSTEM_NOT_FOUND"]) {
                Answer::Response(response) => Some(self.standing(&response.subsystem.unwrap())),
                Answer::Refused => None,
                Answer::Killed => return None,
            };
            let possible = self.possible.get_mut(&name).unwrap();
            assert!(possible.contains(&found), "{name} is {found:?}, but the possible states are {possible:?}");
            self.found(&name, found);
        }
        Some(())
    }

    /// A state that is possible from now on, after a call of this RPC.
    fn possible(&mut self, rpc: &'static str, name: &str, standing: Standing) {
        self.asked.insert(name.to_owned(), rpc);
        self.possible.get_mut(name).unwrap().push(standing);
    }

    /// The last possible state was acknowledged.
    fn certain(&mut self, name: &str, status: Option<&pb::SubsystemStatus>) {
        let found = status.map(|status| self.standing(status));
        let possible = self.possible.get_mut(name).unwrap();
        assert_eq!(possible.last(), Some(&found));
        self.found(name, found);
    }

    /// This state is the only possible one. If it is not the one before the last call, that call has changed it.
    fn found(&mut self, name: &str, found: Standing) {
        let possible = self.possible.get_mut(name).unwrap();
        if possible[0] != found {
            self.acknowledged.changed(self.asked[name], name);
        }
        *possible = vec![found];
    }

    fn answered<T>(&self, response: Result<Response<T>, Status>) -> Option<T> {
        let Answer::Response(response) = answer(response, &[]) else { return None };
        self.acknowledged.add();
        Some(response)
    }
}

/// Starts and stops a loop.
struct Looper {
    rng: Rng,
    acknowledged: Arc<Acknowledged>,
    /// The possible intervals, in milliseconds; `None` if it is stopped.
    possible: Vec<Option<i32>>,
    /// The counts of its ticks when they were last read.
    due: u64,
}

impl Looper {
    const NAME: &str = "heartbeat";
    /// As the audit names it.
    const TARGET: &str = "loop:heartbeat";

    fn new(rng: &mut Rng, acknowledged: &Arc<Acknowledged>) -> Self {
        Self { rng: rng.fork(), acknowledged: acknowledged.clone(), possible: vec![None], due: 0 }
    }

    async fn act(&mut self, client: &mut Client) -> Option<()> {
        self.settle(client).await?;
        if self.possible[0].is_some() && self.rng.u8(..8) == 0 {
            self.possible.push(None);
            let request = pb::StopIntervalLoopRequest { name: Self::NAME.into() };
            let Answer::Response(_) = answer(client.stop_interval_loop(request).await, &[]) else { return None };
            self.found(None);
            self.due = 0;
        } else {
            let interval = self.rng.i32(10..80);
            self.possible.push(Some(interval));
            let settings = pb::IntervalLoop {
                name: Self::NAME.into(),
                interval: Some(Span { seconds: 0, nanos: interval * 1_000_000 }),
                subsystems: CHAIN[..2].iter().map(ToString::to_string).collect(),
                overlap_policy: OverlapPolicy::BufferOne.into(),
                ..pb::IntervalLoop::default()
            };
            let request = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
            let Answer::Response(_) = answer(client.start_interval_loop(request).await, &[]) else { return None };
            self.found(Some(interval));
        }
        self.acknowledged.add();
        // Let it tick for a while.
        sleep(Duration::from_millis(self.rng.u64(..40))).await;
        Some(())
    }

    /// Compares its state with the possible ones, and checks the sum of its ticks.
    async fn settle(&mut self, client: &mut Client) -> Option<()> {
        let response = client.list_interval_loops(pb::ListIntervalLoopsRequest::default()).await;
        let Answer::Response(pb::ListIntervalLoopsResponse { loops, next_page_token: _ }) = answer(response, &[])
        else {
            return None;
        };
        let found = loops.first().map(|status| {
            let settings = status.r#loop.as_ref().unwrap();
            assert_eq!((settings.name.as_str(), settings.subsystems.len()), (Self::NAME, 2));
            let ticks = status.ticks.unwrap();
            let pb::TickCounts { due, ran, skipped, missed, coalesced, dropped } = ticks;
            assert_eq!(due, ran + skipped + missed + coalesced + dropped, "{ticks:?}");
            assert!(self.possible.contains(&None) || due >= self.due, "{due} ticks after {}", self.due);
            self.due = due;
            settings.interval.unwrap().nanos / 1_000_000
        });
        if found.is_none() {
            // A loop that is started again counts from 0.
            self.due = 0;
        }
        assert!(self.possible.contains(&found), "the loop is {found:?}, but was acknowledged as {:?}", self.possible);
        self.found(found);
        Some(())
    }

    /// This interval is the only possible one. If it is not the one before the last call, that call has changed it.
    fn found(&mut self, found: Option<i32>) {
        if self.possible[0] != found {
            let rpc = if found.is_some() { "StartIntervalLoop" } else { "StopIntervalLoop" };
            self.acknowledged.changed(rpc, Self::TARGET);
        }
        self.possible = vec![found];
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Promises that must hold at the end

fn check_history(history: &[Bytes], acknowledged: &Acknowledged, watched: &Watched) {
    // A watcher sees every durable record once, in order, with no gap.
    let watched = watched.records.lock().unwrap();
    assert_eq!(watched.len(), history.len());
    for (seen, kept) in watched.iter().zip(history) {
        assert_eq!(seen, kept, "the watcher saw {:?}", decode(seen.clone()));
    }
    // Ids have no gap, a cycle is recorded once, and no record of an older epoch comes after one of a newer epoch.
    let cycles: Vec<_> = history.iter().cloned().map(decode).collect();
    assert!(cycles.iter().map(|cycle| cycle.revision).eq(1..=history.len() as u64));
    let by_id: BTreeMap<_, _> = cycles.iter().map(|cycle| cycle.cycle_id).zip(history).collect();
    assert!(by_id.keys().copied().eq(1..=history.len() as u64));
    assert!(cycles.is_sorted_by_key(|cycle| cycle.epoch));
    // An acknowledged cycle is never lost or changed.
    for (&cycle_id, record) in acknowledged.cycles.lock().unwrap().iter() {
        let kept = *by_id.get(&cycle_id).unwrap_or_else(|| panic!("cycle {cycle_id} was acknowledged, and is lost"));
        assert!(record.as_ref().is_none_or(|record| record == kept), "cycle {cycle_id} has changed");
    }
    // A request starts one cycle.
    let mut requests = HashMap::new();
    for cycle in cycles.iter().filter(|cycle| !cycle.request_id.is_empty()) {
        let earlier = requests.insert(cycle.request_id.clone(), cycle.cycle_id);
        assert_eq!(earlier, None, "request {:?} started two cycles", cycle.request_id);
    }
    for (request, cycle_id) in acknowledged.requests.lock().unwrap().iter() {
        assert_eq!(requests.get(request), Some(cycle_id), "request {request:?}");
    }
}

fn check_calls(fleet: &Fleet, history: &[Bytes]) {
    let calls = fleet.calls();
    // Once a newer epoch has called, no older one does.
    assert!(calls.is_sorted_by_key(|call| call.epoch));
    assert_eq!(fleet.now(|state| state.stale_calls), 0);
    let mut epochs = HashMap::new();
    let mut once = HashSet::new();
    let mut parts: HashMap<u64, BTreeMap<&str, (u64, u64)>> = HashMap::new();
    for call in calls.iter().filter(|call| call.method == Method::RunCycle) {
        // A cycle runs in one epoch, and none of its calls is made twice.
        assert_eq!(*epochs.entry(call.cycle_id).or_insert(call.epoch), call.epoch, "{call:?}");
        assert!(once.insert((call.cycle_id, &call.subsystem, call.attempt)), "made twice: {call:?}");
        // Every cycle that ran is recorded.
        assert!((1..=history.len() as u64).contains(&call.cycle_id), "not recorded: {call:?}");
        let ended = call.ended.map_or(u64::MAX, |(position, _)| position);
        let part = parts.entry(call.cycle_id).or_default().entry(&call.subsystem).or_insert((call.began, ended));
        part.1 = ended;
    }
    // No subsystem runs before the end of all subsystems that it waits for.
    for (cycle_id, parts) in parts {
        for pair in CHAIN.windows(2) {
            if let (Some((_, ended)), Some((began, _))) = (parts.get(pair[0]), parts.get(pair[1])) {
                assert!(ended < began, "cycle {cycle_id}: {} ran before {} had ended", pair[1], pair[0]);
            }
        }
    }
}

/// Each change has exactly one audit event, and each event has its change.
fn check_audit(home: &Home, history: &[Bytes], acknowledged: &Acknowledged) {
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    let mut query = database.prepare("SELECT event FROM audit ORDER BY leaf").unwrap();
    let events = query.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
    let (mut runs, mut cancels, mut others) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for event in events {
        let event = pb::AuditEvent::decode(&event.unwrap()[..]).unwrap();
        let count = match event.rpc.as_str() {
            "RunCycle" => runs.entry(event.cycle_id).or_insert(0_u64),
            "CancelCycle" => cancels.entry(event.cycle_id).or_insert(0),
            // The subsystems of the loop come after it.
            rpc => others.entry((rpc.to_owned(), event.targets[0].clone())).or_insert(0),
        };
        *count += 1;
    }
    let cycles = history.iter().cloned().map(decode).filter(|cycle| cycle.trigger() != pb::Trigger::Loop);
    assert_eq!(runs, cycles.map(|cycle| (cycle.cycle_id, 1)).collect());
    assert!(cancels.iter().all(|(cycle_id, count)| *count == 1 && runs.contains_key(cycle_id)), "{cancels:?}");
    let lost: Vec<_> = acknowledged
        .cancelled
        .lock()
        .unwrap()
        .iter()
        .filter(|cycle_id| !cancels.contains_key(cycle_id))
        .copied()
        .collect();
    assert_eq!(lost, Vec::<u64>::new(), "acknowledged cancellations without an event");
    let changes = acknowledged.changes.lock().unwrap();
    assert_eq!(
        others,
        changes.iter().map(|((rpc, target), count)| (((*rpc).to_owned(), target.clone()), *count)).collect()
    );
    println!("{} runs, {} cancellations and {} other changes are audited", runs.len(), cancels.len(), others.len());
}

/// Prints the numbers of checked cycles.
fn summarize(history: &[Bytes]) {
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    for cycle in history.iter().cloned().map(decode) {
        *states.entry(cycle.state().as_str_name()).or_default() += 1;
    }
    println!("{} cycles: {states:?}", history.len());
    assert!(states.contains_key(CycleState::Degraded.as_str_name()));
}
