//! One simulation: the service, its database, the fleet and the clients, on one thread and on paused time; and
//! everything that happens to them. The seed decides all of it.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use jiff::{SignedDuration, Timestamp};
use orchestrator_core::{
    clock::Clock,
    config::Config,
    fault::Fault,
    host::Host,
    model::Begin,
    proto::orchestrator::v1 as pb,
    serve::{self, Exit},
    store::{Fate, Fates, SimulatedDatabase, Statement},
};
use tokio::{
    runtime::Builder,
    sync::oneshot,
    task::{JoinHandle, JoinSet, yield_now},
    time::{Instant, sleep, timeout},
};

use crate::{
    callers::Client,
    chance::Chance,
    fleet::{Call, Fleet, Log},
    history::{DEADLINE, History},
    network::{Network, Weather},
};

/// The hosts of the subsystems.
const FLEET: [&str; 2] = ["fleet-0", "fleet-1"];
/// The hosts of the clients.
const WATCHERS: [&str; 2] = ["watcher-0", "watcher-1"];
const CLIENTS: [&str; 5] = ["runner-0", "runner-1", "registrar", "looper", "walker"];

/// The longest time for the end: until all cycles are recorded, and until watchers have seen a record.
const SETTLES: Duration = Duration::from_mins(2);
const SEES: Duration = Duration::from_secs(2);

/// The simulated service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// One process at a time.
    Alone,
    /// Three replicas over one database.
    Replicas,
}

/// What clients know of the world.
pub(crate) struct World {
    pub(crate) network: Network,
    chance: Chance,
    history: Mutex<History>,
    /// The hosts of the service, the one that was started last at the end.
    hosts: Mutex<Vec<String>>,
    over: AtomicBool,
    of: Service,
    rivals: AtomicBool,
}

impl World {
    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap()
    }

    /// The host to which a client connects now.
    pub(crate) fn host_for(&self, client: &str) -> String {
        let hosts = self.hosts.lock().unwrap();
        let number = self.chance.now(&("connects", client)).usize(..hosts.len().max(1));
        hosts.get(number).cloned().unwrap_or_default()
    }

    /// True once nothing more happens, and clients end.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// True if the process that answers may not have heard of the newest records: it follows, or was replaced.
    pub(crate) fn may_lag(&self) -> bool {
        self.of == Service::Replicas || self.had_rivals()
    }

    /// True if two processes have served at one time.
    pub(crate) fn had_rivals(&self) -> bool {
        self.rivals.load(Ordering::Relaxed)
    }
}

/// The result of a simulation.
pub(crate) struct Outcome {
    /// Broken promises.
    pub(crate) violations: Vec<String>,
    /// All that was seen.
    pub(crate) trace: Vec<String>,
    pub(crate) cycles: usize,
}

impl Outcome {
    /// A number that differs if anything was seen in another way.
    pub(crate) fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.trace.hash(&mut hasher);
        hasher.finish()
    }
}

/// Simulates a seed, with a fault if one is given. `key` is a file for the key of the log.
pub(crate) fn simulate(service: Service, seed: u64, fault: Option<Fault>, key: &Path) -> Outcome {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    Fault::plant(fault);
    let outcome = runtime.block_on(run(service, seed, key));
    drop(runtime);
    Fault::plant(None);
    outcome
}

/// How the database treats statements.
#[derive(Clone, Copy)]
struct Treatment {
    /// Of a thousand statements, the numbers of those that are refused, and whose answers are lost.
    refused: u32,
    lost: u32,
    /// The longest time of each part of a statement, in milliseconds.
    slow: u64,
    /// The longest time until the standby has what was written, likewise.
    behind: u64,
    /// The time that answers take beside that, likewise.
    late: u64,
    reaches: Reaches,
}

/// Where statements arrive.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reaches {
    Primary,
    /// The primary that was replaced.
    Replaced,
    Nothing,
}

impl Treatment {
    const CALM: Self = Self { refused: 0, lost: 0, slow: 2, behind: 2, late: 0, reaches: Reaches::Primary };

    fn fate(self, mut rng: Rng, statement: Statement) -> Fate {
        if self.reaches == Reaches::Nothing {
            return Fate { refused: true, travels: Duration::from_millis(500), ..Fate::default() };
        }
        // A process that starts works on blocking threads, and sends statements at any moment of that time.
        let travels = Duration::from_millis(rng.u64(1..=self.slow));
        let returns = Duration::from_millis(self.late + rng.u64(0..=self.slow));
        let replicates = Duration::from_millis(rng.u64(0..=self.behind));
        let is_read = statement == Statement::Read;
        let is_lost = !is_read && rng.u32(..1000) < self.lost;
        let refused = rng.u32(..1000) < if is_read { self.refused / 4 } else { self.refused };
        // Before or after it is executed.
        let after = Duration::from_millis(rng.u64(0..=2 * self.slow + 2));
        let (outlives, strays) = (rng.bool(), self.reaches == Reaches::Replaced);
        Fate { refused, travels, replicates, returns, lost_after: is_lost.then_some(after), outlives, strays }
    }
}

/// How the database treats the statements of one process, if not as those of all.
#[derive(Clone, Copy, Default)]
struct Own {
    all: Option<Treatment>,
    /// Those about which replica leads, if not as its others.
    lead: Option<Treatment>,
}

/// A process of the service.
struct Process {
    host: String,
    clock: Clock,
    own: Arc<Mutex<Own>>,
    task: JoinHandle<Result<Exit, String>>,
    stop: Option<oneshot::Sender<()>>,
}

/// Everything that the seed decides.
struct Simulation {
    world: Arc<World>,
    of: Service,
    chance: Chance,
    rng: Rng,
    key: PathBuf,
    database: SimulatedDatabase,
    /// The clock of the database.
    time: Clock,
    treatment: Arc<Mutex<Treatment>>,
    usual: Treatment,
    /// True if the database is on the machine of the service, which can lose buffered writes.
    buffers: bool,
    sets_clocks: bool,
    began: Instant,
    started: u32,
    /// The processes of the service, the one that was started last at the end.
    services: Vec<Process>,
    /// Processes that were replaced while they ran.
    replaced: Vec<Process>,
    fleet: Vec<(Fleet, JoinHandle<()>)>,
}

async fn run(of: Service, seed: u64, key: &Path) -> Outcome {
    let mut rng = Rng::with_seed(seed);
    let chance = Chance::new(seed);
    let buffers = rng.bool() && of == Service::Alone;
    let (refused, lost) = (rng.u32(..40), rng.u32(..60));
    let usual = Treatment { refused, lost, slow: rng.u64(1..40), behind: rng.u64(1..40), ..Treatment::CALM };
    let database = SimulatedDatabase::new(buffers);
    let network = Network::new(chance);
    let weather = Weather { latency: rng.u64(1..30), resent: rng.u32(..30), breaks: rng.u32(..8) };
    network.set_weather(weather);
    let log = Arc::new(Mutex::new(Log::default()));
    // With many, cycles take seconds.
    let silent = if rng.bool() { 40 } else { 0 };
    let mut fleet = Vec::new();
    for host in FLEET {
        let behind = Fleet::new(chance.of(&host), log.clone(), silent);
        let serving = behind.serve(&network.host(host));
        fleet.push((behind, serving));
    }
    let world = Arc::new(World {
        network,
        chance,
        history: Mutex::new(History::new(database.clone())),
        hosts: Mutex::default(),
        over: AtomicBool::new(false),
        of,
        rivals: AtomicBool::new(false),
    });
    let mut simulation = Simulation {
        world: world.clone(),
        of,
        chance,
        key: key.to_owned(),
        database,
        time: Clock::simulated(start_of_time()),
        treatment: Arc::new(Mutex::new(usual)),
        usual,
        buffers,
        sets_clocks: rng.u32(..4) == 0,
        began: Instant::now(),
        started: 0,
        services: Vec::new(),
        replaced: Vec::new(),
        fleet,
        rng,
    };
    simulation.supervise().await;
    let mut callers = JoinSet::new();
    for name in WATCHERS {
        let client = Client::new(&world, name, simulation.rng.fork());
        callers.spawn(client.watch());
    }
    let [runner, other, registrar, looper, walker] =
        CLIENTS.map(|name| Client::new(&world, name, simulation.rng.fork()));
    let mut ending = JoinSet::new();
    ending.spawn(runner.run_cycles());
    ending.spawn(other.run_cycles());
    ending.spawn(registrar.register("late"));
    ending.spawn(looper.keep_loop());
    ending.spawn(walker.walk());

    for _ in 0..simulation.rng.u32(4..14) {
        simulation.something_happens().await;
    }
    let records = simulation.end(ending).await;
    let mut history = world.history();
    let log = log.lock().unwrap();
    history.check(&records, &log);
    if of == Service::Replicas {
        log.overlaps.iter().for_each(|overlap| history.violated(overlap));
    }
    let mut calls: Vec<_> = log.calls.iter().map(|call| (call.at, &call.subsystem, call)).collect();
    calls.sort_by_key(|(at, subsystem, call)| (*at, *subsystem, call.cycle_id));
    for (at, subsystem, Call { cycle_id, epoch, attempt, answered, .. }) in calls {
        let how = if answered.is_some() { "answers" } else { "does not answer" };
        history.note("fleet", format_args!("{at:?} {subsystem} {how}: cycle {cycle_id}, {epoch}, attempt {attempt}"));
    }
    for record in &records {
        history.note("record", format_args!("{record:?}"));
    }
    drop(callers);
    Outcome { violations: std::mem::take(&mut history.violations), trace: history.trace(), cycles: records.len() }
}

fn start_of_time() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn config(key: &Path, replica: &str) -> Config {
    const RETRY: &str = r#"retry = { max_attempts = 3, initial_backoff = "50ms" }"#;
    let subsystem = |name: &str, host: &str, more: &str| {
        format!(
            "[[subsystems]]\nname = \"{name}\"\nendpoint = \"http://{host}:1\"\ntimeout = \"900ms\"\n{RETRY}\n{more}\n"
        )
    };
    let text = [
        &format!(
            r#"
            server.listen = "127.0.0.1:1"
            server.drain_grace = "5s"
            admin.listen = "off"
            store.url = "memory:"
            ledger.key_files = ["{}"]
            memory.max_bytes = 268435456
            dial.connect_timeout = "1s"
            cycle.deadline = "{DEADLINE}ms"
            cycle.max_queued = 16
            cluster.replica = "{replica}"
            cluster.lease_ttl = "2s"
            "#,
            key.display()
        ),
        &subsystem("a", "fleet-0", ""),
        &subsystem("b", "fleet-1", r#"after = ["a"]"#),
        &subsystem("c", "fleet-0", r#"requires = ["a"]"#),
        &subsystem("d", "fleet-1", r#"reads = ["b"]"#),
        &subsystem("e", "fleet-0", "after = [\"c\"]\nphase = 1"),
    ];
    Config::from_toml_str("simulated.toml", &text.map(String::as_str).join("\n")).unwrap()
}

impl Simulation {
    fn note(&self, event: impl std::fmt::Display) {
        self.world.history().note("world", event);
    }

    /// A duration of up to this many milliseconds.
    fn up_to(&mut self, milliseconds: u64) -> Duration {
        Duration::from_millis(self.rng.u64(0..=milliseconds))
    }

    /// Starts a process of the service on a new host, and sends the clients there. Returns after its work on blocking
    /// threads, during which time stands still.
    async fn start(&mut self) {
        self.started += 1;
        let name = format!("orchestrator-{}", self.started);
        self.note(format_args!("starts {name}"));
        let offset = if self.sets_clocks { self.rng.i64(-20_000..20_000) } else { 0 };
        let now = start_of_time() + self.began.elapsed() + SignedDuration::from_millis(offset);
        let host = Host::simulated(now, self.rng.u64(..));
        let clock = host.clock;
        let (transport, config) = (Arc::new(self.world.network.host(&name)), config(&self.key, &name));
        let own = Arc::new(Mutex::new(Own::default()));
        let (of_this, of_all, chance) = (own.clone(), self.treatment.clone(), self.chance.of(&name));
        let fates: Fates = Box::new(move |statement| {
            let Own { all, lead } = *of_this.lock().unwrap();
            let treatment = lead.filter(|_| statement == Statement::Lead).or(all);
            treatment.unwrap_or_else(|| *of_all.lock().unwrap()).fate(chance.now(&statement), statement)
        });
        let store = match self.of {
            Service::Alone => self.database.open(clock, fates),
            Service::Replicas => self.database.share(clock, self.time, fates),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let service = serve::Service::start_over(&config, Begin::Again, host, transport, async { Ok(store) }).await;
            let service = service.map_err(|error| error.to_string())?;
            Ok(service.run(async { drop(stopped.await) }, async || std::future::pending().await).await)
        });
        self.services.push(Process { host: name, clock, own, task, stop: Some(stop) });
        self.tell_hosts();
        sleep(Duration::from_millis(1)).await;
    }

    /// Lets clients know the hosts of the service.
    fn tell_hosts(&self) {
        let hosts = self.services.iter().map(|service| service.host.clone()).collect();
        *self.world.hosts.lock().unwrap() = hosts;
    }

    /// The number of one of the processes: mostly the one that leads.
    fn some_process(&mut self) -> usize {
        let leader = self.database.leader().filter(|_| self.rng.u32(..4) > 0);
        let leads = leader.and_then(|leader| self.services.iter().position(|service| service.host == leader));
        leads.unwrap_or_else(|| self.rng.usize(..self.services.len()))
    }

    /// Takes one of the processes.
    fn take(&mut self) -> Option<Process> {
        let number = self.rng.usize(..self.services.len().max(1));
        (number < self.services.len()).then(|| self.services.remove(number))
    }

    /// Kills a process: between any two steps of its tasks.
    async fn kill(&mut self, process: Process) {
        for _ in 0..self.rng.u32(..30) {
            yield_now().await;
        }
        self.note(format_args!("kills {}", process.host));
        process.task.abort();
        if let Ok(ended) = process.task.await {
            self.ended(&process.host, &ended, false);
        }
        // Its tasks are dropped when they would run the next time.
        yield_now().await;
        self.world.network.reset(&process.host);
    }

    /// Judges the end of a process.
    fn ended(&mut self, host: &str, ended: &Result<Exit, String>, was_stopped: bool) {
        self.note(format_args!("{host} has ended: {ended:?}"));
        let rivals = self.world.had_rivals();
        let is_expected = match ended {
            // The store may refuse the last write.
            Ok(Exit::Drained | Exit::Failed) => was_stopped,
            Ok(Exit::Fenced) => rivals,
            Ok(Exit::Aborted) => false,
            // Such a start is repeated. A commit of an earlier process may arrive between the two statements of it.
            Err(problem) => {
                let reasons = ["it was refused", "the answer was lost", "was in the way", "has taken over this store"];
                reasons.iter().any(|reason| problem.contains(reason))
            }
        };
        if !is_expected {
            self.world.history().violated(format_args!("{host} has ended: {ended:?}"));
        }
    }

    /// Starts processes in place of those that have ended.
    async fn supervise(&mut self) {
        let processes = if self.of == Service::Replicas { 3 } else { 1 };
        let (ended, running) = std::mem::take(&mut self.services).into_iter().partition(|it| it.task.is_finished());
        self.services = running;
        let ended: Vec<Process> = ended;
        for service in ended {
            let ended = service.task.await.unwrap_or_else(|panicked| Err(panicked.to_string()));
            self.ended(&service.host, &ended, false);
            self.world.network.reset(&service.host);
        }
        while self.services.len() < processes {
            self.start().await;
        }
    }

    async fn something_happens(&mut self) {
        let pause = self.up_to(1500);
        sleep(pause).await;
        self.supervise().await;
        let number = self.some_process();
        let current = self.services[number].host.clone();
        let last = if self.of == Service::Replicas { 160 } else { 100 };
        match self.rng.u32(..last) {
            0..25 => {
                if let Some(service) = self.take() {
                    self.kill(service).await;
                }
                let pause = self.up_to(500);
                sleep(pause).await;
                self.start().await;
                if self.rng.u32(..3) == 0 {
                    // It is killed while it starts.
                    let pause = self.up_to(60);
                    sleep(pause).await;
                    if let Some(service) = self.take() {
                        self.kill(service).await;
                    }
                    self.start().await;
                }
            }
            25..35 => self.lose_power().await,
            35..52 => {
                let others = [&FLEET[..], &CLIENTS, &WATCHERS].concat();
                let number = self.rng.usize(1..4);
                let cut: Vec<_> = (0..number).map(|_| others[self.rng.usize(..others.len())]).collect();
                self.note(format_args!("cuts {current} from {cut:?}"));
                for other in cut {
                    self.world.network.cut(&current, other);
                }
                let pause = self.up_to(4000);
                sleep(pause).await;
                self.note("heals");
                self.world.network.heal();
            }
            52..60 => {
                let others = [&FLEET[..], &CLIENTS, &WATCHERS].concat();
                let other = others[self.rng.usize(..others.len())];
                self.note(format_args!("resets {other}"));
                self.world.network.reset(other);
            }
            60..72 => {
                let treatment = match self.rng.u32(..3) {
                    0 => Treatment { refused: 500, ..self.usual },
                    1 => Treatment { lost: 500, ..self.usual },
                    _ => Treatment { slow: 8000, ..self.usual },
                };
                self.note(format_args!("the store: {} {} {}", treatment.refused, treatment.lost, treatment.slow));
                *self.treatment.lock().unwrap() = treatment;
                let pause = self.up_to(4000);
                sleep(pause).await;
                *self.treatment.lock().unwrap() = self.usual;
                self.note("the store is as usual");
            }
            72..80 => {
                if let Some(mut service) = self.take() {
                    self.note(format_args!("stops {}", service.host));
                    drop(service.stop.take());
                    if let Ok(ended) = timeout(Duration::from_secs(30), &mut service.task).await {
                        let ended = ended.unwrap_or_else(|panicked| Err(panicked.to_string()));
                        self.ended(&service.host, &ended, true);
                        self.world.network.reset(&service.host);
                    } else {
                        self.world.history().violated("the service does not stop");
                        self.kill(service).await;
                    }
                }
                self.start().await;
            }
            // Only a database elsewhere can be taken over from a process that lives.
            80..87 if !self.buffers && self.of == Service::Alone => {
                self.world.rivals.store(true, Ordering::Relaxed);
                self.replaced.append(&mut self.services);
                self.start().await;
            }
            80..87 if self.of == Service::Replicas => {
                self.note(format_args!("cuts {current} from the database"));
                let own = self.services[number].own.clone();
                own.lock().unwrap().all = Some(Treatment { reaches: Reaches::Nothing, ..self.usual });
                let pause = self.up_to(8000);
                sleep(pause).await;
                *own.lock().unwrap() = Own::default();
                self.note(format_args!("{current} reaches the database"));
            }
            100..130 => self.fail_over().await,
            130.. => {
                let late = self.rng.u64(1000..2500);
                self.note(format_args!("{current} learns {late} ms late that it leads, and then nothing"));
                let own = self.services[number].own.clone();
                own.lock().unwrap().lead = Some(Treatment { late, ..self.usual });
                let pause = Duration::from_secs(2) + self.up_to(2000);
                sleep(pause).await;
                let nothing = Treatment { reaches: Reaches::Nothing, ..self.usual };
                *own.lock().unwrap() = Own { all: self.rng.bool().then_some(nothing), lead: Some(nothing) };
                let pause = Duration::from_secs(2) + self.up_to(2000);
                sleep(pause).await;
                *own.lock().unwrap() = Own::default();
                self.note(format_args!("{current} reaches the database"));
            }
            87..93 if self.sets_clocks => {
                let step = self.rng.i64(-20_000..20_000);
                let service = &self.services[number];
                self.world.history().clock_was_set = true;
                service.clock.set(service.clock.now() + SignedDuration::from_millis(step));
                self.note(format_args!("sets the clock by {step} ms"));
            }
            _ => {
                let number = self.rng.usize(..FLEET.len());
                self.note(format_args!("restarts {}", FLEET[number]));
                let (fleet, serving) = &mut self.fleet[number];
                serving.abort();
                let ended = (&mut *serving).await;
                assert!(ended.is_err_and(|error| error.is_cancelled()));
                self.world.network.reset(FLEET[number]);
                *serving = fleet.serve(&self.world.network.host(FLEET[number]));
            }
        }
    }

    /// The machine of the database loses its power, or another one takes its place.
    async fn lose_power(&mut self) {
        if self.buffers
            && let Some(service) = self.take()
        {
            // It is on the same machine.
            self.kill(service).await;
            self.world.history().begins_may_be_lost = true;
        }
        let at_risk = self.database.at_risk();
        let kept = self.rng.usize(0..=at_risk);
        self.note(format_args!("the power is lost, and {kept} of {at_risk} statements are kept"));
        self.database.lose_power(kept);
        self.supervise().await;
    }

    /// The standby falls behind and is promoted, while the primary goes on, and some replicas still reach that one.
    async fn fail_over(&mut self) {
        self.note("the standby falls behind");
        *self.treatment.lock().unwrap() = Treatment { behind: 3000, ..self.usual };
        let pause = self.up_to(1000);
        sleep(pause).await;
        *self.treatment.lock().unwrap() = self.usual;
        let at_risk = self.database.at_risk();
        let kept = self.rng.usize(0..=at_risk);
        self.note(format_args!("the standby is promoted with {kept} of {at_risk} statements"));
        self.database.promote(kept);
        let strays = Treatment { reaches: Reaches::Replaced, ..self.usual };
        let leader = self.database.leader().filter(|_| self.rng.bool());
        let is_cut = self.rng.bool();
        let (mut behind, mut before) = (Vec::new(), Vec::new());
        for Process { host, own, .. } in &self.services {
            let [all, lead] = match &leader {
                // It is alone with the earlier primary.
                Some(leader) => [host == leader; 2],
                // Its connections were not made at the same time.
                None => [(); 2].map(|()| self.rng.bool()),
            };
            let [own_all, own_lead] = [all, lead].map(|strays_there| if strays_there { strays } else { self.usual });
            *own.lock().unwrap() = Own { all: Some(own_all), lead: Some(own_lead) };
            self.note(format_args!("{host} still reaches the primary before: {all}, and to lead: {lead}"));
            if all { &mut behind } else { &mut before }.push(host.clone());
        }
        for (one, other) in behind.iter().flat_map(|one| before.iter().map(move |other| (one, other))) {
            if is_cut {
                self.note(format_args!("cuts {one} from {other}"));
                self.world.network.cut(one, other);
            }
        }
        // Mostly long enough for another replica to take over.
        let pause = Duration::from_secs(2) + self.up_to(6000);
        sleep(pause).await;
        self.database.end_replaced();
        self.services.iter().for_each(|service| *service.own.lock().unwrap() = Own::default());
        self.world.network.heal();
        self.note("the primary before has ended");
    }

    /// Lets everything settle, and returns the records of the history, in the order of their revisions.
    async fn end(&mut self, mut ending: JoinSet<()>) -> Vec<bytes::Bytes> {
        self.note("the end");
        self.world.network.heal();
        self.world.network.set_weather(Weather::CALM);
        *self.treatment.lock().unwrap() = Treatment::CALM;
        self.fleet.iter().for_each(|(fleet, _)| fleet.tame());
        self.world.over.store(true, Ordering::Relaxed);
        for process in std::mem::take(&mut self.replaced) {
            self.kill(process).await;
        }
        while ending.join_next().await.is_some() {}
        let mut client = Client::new(&self.world, "closer", self.rng.fork());
        if timeout(SETTLES, self.settle(&mut client)).await.is_err() {
            self.world.history().violated("it does not settle");
        }
        for _ in 0..3 {
            let cycle_id = client.run_surely(pb::RunCycleRequest::default()).await;
            sleep(SEES).await;
            let mut history = self.world.history();
            let last = history.highest_revision();
            for watcher in WATCHERS {
                let seen = history.position(watcher);
                if seen != last {
                    history.violated(format_args!("{watcher} sees {seen} revisions after {cycle_id:?} got {last}"));
                }
            }
        }
        client.check_registration("late").await;
        let Some(mut records) = client.history(100).await else {
            self.world.history().violated("the history can't be read");
            return Vec::new();
        };
        records.reverse();
        if let Some(status) = client.status().await
            && status.total_cycles != records.len() as u64
        {
            let problem = format!("the status says {} cycles, and there are {}", status.total_cycles, records.len());
            self.world.history().violated(problem);
        }
        while let Some(service) = self.take() {
            self.kill(service).await;
        }
        records
    }

    /// Restarts the service, and waits until there is nothing to do.
    async fn settle(&mut self, client: &mut Client) {
        while let Some(service) = self.take() {
            self.kill(service).await;
        }
        loop {
            sleep(Duration::from_secs(1)).await;
            self.supervise().await;
            let stopped = client.stop_loop().await;
            let is_idle = |status: pb::OrchestratorStatus| {
                status.running_cycles.is_empty() && status.waiting_cycles.is_empty() && status.queued_cycles == 0
            };
            if stopped && client.status().await.is_some_and(is_idle) {
                break;
            }
        }
        // Watchers notice that nothing more happens.
        sleep(Duration::from_secs(15)).await;
    }
}
