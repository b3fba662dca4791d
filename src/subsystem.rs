//! Serves subsystems written in Rust: implement [`Subsystem`], give it a name, listen.
//!
//! A package with a subsystem depends on this crate without the feature `service`. That is the orchestrator itself, with a
//! database, a web server and a terminal, which a subsystem need not compile:
//!
//! ```toml
//! [dependencies]
//! orchestrator-core = { path = "…", default-features = false }
//! ```
//!
//! ```
//! use std::{collections::VecDeque, error::Error, sync::Mutex, time::Duration};
//!
//! use orchestrator_core::subsystem::{Answer, Cycle, Failure, Input, Object, Server, Severity, Subsystem};
//!
//! /// Averages what its inputs call `value`, over as many values as its parameter `window` says.
//! #[derive(Default)]
//! struct Average {
//!     values: Mutex<VecDeque<f64>>,
//! }
//!
//! impl Subsystem for Average {
//!     async fn run_cycle(&self, cycle: Cycle) -> Result<Answer, Failure> {
//!         let window = cycle.parameters.get("window").and_then(|window| window.as_f64()).unwrap_or(10.0);
//!         let mut values = self.values.lock().unwrap();
//!         let mut answer = Answer::default();
//!         for (name, input) in &cycle.inputs {
//!             if let Input::Stale { cycle_id, .. } = input {
//!                 answer.issue(Severity::Info, "STALE", format!("{name} is of cycle {cycle_id}"));
//!             }
//!             match input.output().and_then(|output| output.get("value")?.as_f64()) {
//!                 Some(value) => values.push_back(value),
//!                 None => answer.issue(Severity::Warning, "NO_VALUE", format!("{name} gave no value")),
//!             }
//!         }
//!         while values.len() as f64 > window {
//!             values.pop_front();
//!         }
//!         answer.output("average", values.iter().sum::<f64>() / values.len().max(1) as f64);
//!         answer.metric("values", values.len() as f64);
//!         Ok(answer)
//!     }
//!
//!     async fn get_status(&self) -> Option<Object> {
//!         let values = self.values.lock().unwrap();
//!         Some(Object::from_iter([("values".into(), values.iter().copied().collect())]))
//!     }
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn Error>> {
//!     let serving = Server::new().subsystem("Average", Average::default()).listen("127.0.0.1:0").await?;
//!     println!("register Average with the endpoint {}", serving.endpoint());
//! #   let asked_to_stop = || async {
//! #       use orchestrator_core::{model::Payload, proto::subsystem::v1::{self as pb, subsystem_client::SubsystemClient}};
//! #       let mut client = SubsystemClient::connect(serving.endpoint().to_owned()).await?;
//! #       let fresh = |value: f64| pb::Input {
//! #           output: Payload::from_json(&Object::from_iter([("value".into(), value.into())])).unwrap().as_bytes().clone(),
//! #           freshness: pb::Freshness::Fresh.into(),
//! #           cycle_id: 1,
//! #       };
//! #       let inputs = [("A".into(), fresh(1.0)), ("B".into(), fresh(2.0)), ("C".into(), pb::Input::default())].into();
//! #       let request = pb::RunCycleRequest { subsystem: "Average".into(), cycle_id: 1, inputs, ..Default::default() };
//! #       let answer = client.run_cycle(request).await?.into_inner();
//! #       assert_eq!(Payload::check(answer.output)?.to_json()["average"], 1.5);
//! #       assert_eq!((answer.metrics["values"], answer.issues[0].code.as_str()), (2.0, "NO_VALUE"));
//! #       Ok::<_, Box<dyn Error>>(())
//! #   };
//!     asked_to_stop().await?; // such as tokio::signal::ctrl_c()
//!     serving.stop(Duration::from_secs(10)).await;
//!     Ok(())
//! }
//! ```
//!
//! A function will do where there is no state: `.subsystem("Pulse", |cycle: Cycle| async move { … })`. A whole process,
//! which also registers itself, is in `examples/rust`.
//!
//! What the contract asks of a subsystem and the [`Server`] sees to:
//!
//! * Work is done once. A repeated call of (`cycle_id`, `subsystem`) gets the first answer, and waits for it where the
//!   work still runs. A [`Failure`] is no answer: who asks again after one wants it tried again.
//! * One thing at a time: `initialize` and `run_cycle` of one subsystem never overlap. Different subsystems do.
//! * Work stops, at its next `await`, when nobody can want it any more: its deadline has passed, all its callers have
//!   cancelled, or a later cycle or epoch calls. It goes on when a connection broke, because then the orchestrator
//!   calls again, and half of the work followed by the whole of it would not be doing it once.
//! * An epoch older than one seen is ABORTED; a name that is not served is NOT_FOUND; a panic is INTERNAL, of that call
//!   alone.

mod calls;
mod server;

use std::{collections::BTreeMap, error::Error, future::Future};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tokio::time::Instant;

pub use self::server::{ListenError, Server, Serving};
pub use crate::model::{Code, Issue, Severity};

/// A JSON object, as which a `google.protobuf.Struct` is read and written.
pub type Object = Map<String, Value>;

/// What a subsystem does. Its methods take `&self`: state that changes goes behind a lock.
pub trait Subsystem: Send + Sync + 'static {
    /// `RunCycle` is answered FAILED_PRECONDITION until [`Subsystem::initialize`] has succeeded in this process; the
    /// orchestrator then initializes.
    const NEEDS_INITIALIZE: bool = false;

    /// Makes it ready, with the parameters of its registration. Idempotent: called at the first cycle of each epoch
    /// and when the registration has changed; the last call counts.
    ///
    /// # Errors
    /// It is not ready: its failure in the cycle that called.
    fn initialize(&self, parameters: Object) -> impl Future<Output = Result<(), Failure>> + Send {
        let _ = parameters;
        async { Ok(()) }
    }

    /// Does its share of one cycle.
    ///
    /// # Errors
    /// It failed in this cycle. [`Code::Unavailable`] says that nothing was done and that it may be called again.
    fn run_cycle(&self, cycle: Cycle) -> impl Future<Output = Result<Answer, Failure>> + Send;

    /// A snapshot of its state for people, free of side effects. Called at any time, also while a cycle runs. `None`
    /// says that there is none.
    fn get_status(&self) -> impl Future<Output = Option<Object>> + Send {
        async { None }
    }
}

impl<F, R> Subsystem for F
where
    F: Fn(Cycle) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Answer, Failure>> + Send,
{
    fn run_cycle(&self, cycle: Cycle) -> impl Future<Output = Result<Answer, Failure>> + Send {
        self(cycle)
    }
}

/// One cycle, as a subsystem is called for it.
#[derive(Clone, Debug)]
pub struct Cycle {
    /// The name that is called.
    pub subsystem: String,
    /// The cycle's number: strictly increasing.
    pub cycle_id: u64,
    /// The term of the orchestrator that calls.
    pub epoch: u64,
    /// Which call of this cycle the work is done for: more than 1 when the earlier ones have failed.
    pub attempt: u32,
    /// When the cycle was due: "now" for work that must be repeatable. `None` when the caller did not say.
    pub scheduled_at: Option<Timestamp>,
    /// When the work is stopped. `None` when the caller waits without end.
    pub deadline: Option<Instant>,
    /// Those of the registration, overlaid by those of the cycle.
    pub parameters: Object,
    /// What the subsystems that the registration names in `requires`, `after` and `reads` have returned.
    pub inputs: BTreeMap<String, Input>,
}

/// The latest output of another subsystem.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Made in this cycle.
    Fresh(Object),
    /// Made by another cycle.
    Stale {
        /// What was returned.
        output: Object,
        /// The cycle that made it.
        cycle_id: u64,
    },
    /// Never made, or nobody registered that name.
    Absent,
}

impl Input {
    /// The output, fresh or stale, if there is one.
    pub fn output(&self) -> Option<&Object> {
        match self {
            Self::Fresh(output) | Self::Stale { output, .. } => Some(output),
            Self::Absent => None,
        }
    }
}

/// What a subsystem returns for a cycle. The registration's limits apply.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    output: Object,
    metrics: BTreeMap<String, f64>,
    issues: Vec<Issue>,
}

impl Answer {
    /// An answer with this output.
    pub fn new(output: Object) -> Self {
        Self { output, ..Self::default() }
    }

    /// Puts a value into the output, which the others may read.
    pub fn output(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.output.insert(key.into(), value.into());
    }

    /// Adds a number worth following over time.
    pub fn metric(&mut self, name: impl Into<String>, value: f64) {
        self.metrics.insert(name.into(), value);
    }

    /// Tells of something that went wrong without failing. `code` is a short constant that machines can group by.
    pub fn issue(&mut self, severity: Severity, code: impl Into<String>, message: impl Into<String>) {
        self.issues.push(Issue { severity, code: code.into(), message: message.into() });
    }
}

/// Why a call failed. Every error becomes one by `?`, as UNKNOWN with its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    /// A failure with a code that says something to the orchestrator.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(Code::Unknown, error.to_string())
    }
}
