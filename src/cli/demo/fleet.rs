//! The simulated subsystems.

use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    future,
    hash::{Hash, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fastrand::Rng;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    model::{self, Endpoint},
    subsystem::{Answer, Code, Cycle, Failure, Input, ListenError, Object, Server, Serving, Severity, Subsystem},
};

/// The servers of the simulation. They stop when this is dropped.
pub(super) struct Fleet {
    servers: Vec<Serving>,
    subsystems: usize,
}

impl Fleet {
    /// Serves all `subsystems`: subsystems with a common endpoint are served at one address, which replaces their
    /// endpoint. Their work takes `pace` times as long as by default.
    pub(super) async fn start(subsystems: &mut [model::Subsystem], seed: u64, pace: f64) -> Result<Self, ListenError> {
        let mut together: BTreeMap<Endpoint, Vec<&mut model::Subsystem>> = BTreeMap::new();
        let count = subsystems.len();
        for subsystem in subsystems {
            together.entry(subsystem.endpoint.clone()).or_default().push(subsystem);
        }
        let mut servers = Vec::new();
        for neighbours in together.into_values() {
            let server = neighbours.iter().fold(Server::new(), |server, it| {
                server.subsystem(it.name.as_str(), Simulated::new(it.name.as_str(), seed, pace))
            });
            let serving = server.listen("127.0.0.1:0").await?;
            for subsystem in neighbours {
                subsystem.endpoint = Endpoint::Http(serving.endpoint().to_owned());
            }
            servers.push(serving);
        }
        Ok(Self { servers, subsystems: count })
    }

    pub(super) fn subsystems(&self) -> usize {
        self.subsystems
    }

    pub(super) fn endpoints(&self) -> usize {
        self.servers.len()
    }

    /// Stops all servers. No calls are open any more, so this is quick.
    pub(super) async fn stop(self) {
        const GRACE: Duration = Duration::from_millis(500);
        join_all(self.servers.into_iter().map(|server| server.stop(GRACE))).await;
    }
}

/// A subsystem whose output is a signal: its last value, moved towards its inputs, with some randomness.
struct Simulated {
    seed: u64,
    /// Duration of its work relative to 1.
    pace: f64,
    /// Usual duration at pace 1.
    usual: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    signal: f64,
    cycles: u64,
    failures: u64,
}

/// The fate of a call.
#[derive(Debug)]
enum Fate {
    Works,
    /// Takes long, and reports it as an issue.
    IsSlow,
    /// Answers UNAVAILABLE first and then succeeds: the orchestrator retries it.
    IsBusy,
    Fails(Code, &'static str),
    /// Never answers.
    Hangs,
}

impl Fate {
    /// In a fleet of 28, a subsystem is slow in most cycles, busy or failing in every third, and hangs in every
    /// twentieth.
    fn draw(random: &mut Rng) -> Self {
        match random.u32(..1000) {
            0..4 => Self::Fails(Code::ResourceExhausted, "its queue is full"),
            4..8 => Self::Fails(Code::DataLoss, "a block failed its checksum"),
            8..12 => Self::Fails(Code::Internal, "its index is out of step"),
            12..24 => Self::IsBusy,
            24..26 => Self::Hangs,
            26..56 => Self::IsSlow,
            _ => Self::Works,
        }
    }
}

impl Simulated {
    fn new(name: &str, seed: u64, pace: f64) -> Self {
        let usual = Duration::from_millis(rng((seed, name)).u64(40..200));
        Self { seed, pace, usual, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A random number that is the same for the same `of`.
fn rng(of: impl Hash) -> Rng {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    Rng::with_seed(hasher.finish())
}

impl Subsystem for Simulated {
    async fn run_cycle(&self, cycle: Cycle) -> Result<Answer, Failure> {
        let mut random = rng((self.seed, &cycle.subsystem, cycle.cycle_id));
        let fate = Fate::draw(&mut random);
        let mut work = self.usual.mul_f64(0.6 + 0.8 * random.f64());
        if matches!(fate, Fate::IsSlow) {
            work += Duration::from_millis(random.u64(300..600));
        }
        let work = work.mul_f64(self.pace);
        match fate {
            Fate::Works | Fate::IsSlow => {}
            Fate::IsBusy if cycle.attempt > 1 => {}
            Fate::IsBusy => return Err(Failure::new(Code::Unavailable, "busy, try again")),
            Fate::Fails(code, why) => {
                sleep(work / 2).await;
                self.state().failures += 1;
                return Err(Failure::new(code, why));
            }
            Fate::Hangs => future::pending().await,
        }
        sleep(work).await;

        let mut answer = Answer::default();
        if matches!(fate, Fate::IsSlow) {
            answer.issue(Severity::Info, "SLOW", format!("took {} ms", work.as_millis()));
        }
        let heard = heard(&cycle, &mut answer);
        answer.output("heard", heard);
        let signals = || cycle.inputs.values().filter_map(|input| input.output()?.get("signal")?.as_f64());
        let mean = mean(signals());
        let signal = {
            let mut state = self.state();
            state.cycles += 1;
            state.signal = rounded(0.5 * state.signal + 0.4 * mean + random.f64() - 0.5);
            state.signal
        };
        answer.output("signal", signal);
        answer.metric("signal", signal);
        answer.metric("work_ms", rounded(work.as_secs_f64() * 1000.0));
        Ok(answer)
    }

    async fn get_status(&self) -> Option<Object> {
        let state = self.state();
        let status = json!({ "signal": state.signal, "cycles": state.cycles, "failures": state.failures });
        status.as_object().cloned()
    }
}

/// The freshness of the inputs, by name. Old or absent inputs are reported as issues.
fn heard(cycle: &Cycle, answer: &mut Answer) -> Value {
    let heard = cycle.inputs.iter().map(|(name, input)| {
        let how = match input {
            Input::Fresh(_) => "FRESH".to_owned(),
            Input::Stale { cycle_id, .. } => {
                if cycle_id + 1 < cycle.cycle_id {
                    answer.issue(Severity::Warning, "INPUT_OLD", format!("{name} is of cycle {cycle_id}"));
                }
                format!("STALE, of cycle {cycle_id}")
            }
            Input::Absent => {
                answer.issue(Severity::Info, "INPUT_ABSENT", format!("{name} has not run yet"));
                "ABSENT".to_owned()
            }
        };
        (name.clone(), how.into())
    });
    Value::Object(heard.collect())
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}

/// Rounds to a readable number of digits.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
