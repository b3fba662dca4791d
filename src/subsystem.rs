//! Serves subsystems written in Rust: implement [`Subsystem`], give it a name, and listen.
//!
//! A package with a subsystem depends on this crate without the feature `service`, which is the orchestrator itself
//! with a database, a web server and a terminal library:
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
//! /// Averages the `value` of its inputs, over the latest `window` values (a parameter).
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
//! A function is enough for a subsystem without state: `.subsystem("Pulse", |cycle: Cycle| async move { … })`.
//! `examples/rust` is a complete process, which also registers itself. With the feature `tls`, a server has TLS
//! ([`Server::tls`]) and accepts only the orchestrator.
//!
//! The [`Server`] implements these rules of the contract:
//!
//! * Work is done once. A repeated call of (`cycle_id`, `subsystem`) gets the first answer, and waits for it while the
//!   work still runs. A [`Failure`] is not an answer: a call after it does the work again.
//! * `initialize` and `run_cycle` of one subsystem never overlap; those of different subsystems may.
//! * Work stops at its next `await` when its result can no longer be used: its deadline has passed, all its callers
//!   have cancelled, or a later cycle or epoch calls. It continues after a broken connection, because the orchestrator
//!   then calls again, and work that was stopped halfway would be done more than once.
//! * A lower epoch than one already seen gets ABORTED; a name that is not served gets NOT_FOUND; a panic fails only its
//!   own call, with INTERNAL.

mod calls;
mod server;
#[cfg(feature = "tls")]
mod tls;

use std::{collections::BTreeMap, error::Error, future::Future};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tokio::time::Instant;

pub use self::server::{ListenError, Server, Serving};
#[cfg(feature = "tls")]
pub use self::tls::Tls;
pub use crate::model::{Code, Issue, Severity};

/// A JSON object, the form of a `google.protobuf.Struct` in this library.
pub type Object = Map<String, Value>;

/// The implementation of a subsystem. Its methods take `&self`: put mutable state behind a lock.
pub trait Subsystem: Send + Sync + 'static {
    /// `RunCycle` is answered FAILED_PRECONDITION until [`Subsystem::initialize`] has succeeded in this process; the
    /// orchestrator then initializes.
    const NEEDS_INITIALIZE: bool = false;

    /// Initializes it with the parameters of its registration. Idempotent: called before the first cycle of each epoch
    /// and after the registration has changed; the last call counts.
    ///
    /// # Errors
    /// It is not ready, and fails in the cycle that called.
    fn initialize(&self, parameters: Object) -> impl Future<Output = Result<(), Failure>> + Send {
        let _ = parameters;
        async { Ok(()) }
    }

    /// Does its part in one cycle.
    ///
    /// # Errors
    /// It failed in this cycle. [`Code::Unavailable`] means that nothing was done and that the call can be retried.
    fn run_cycle(&self, cycle: Cycle) -> impl Future<Output = Result<Answer, Failure>> + Send;

    /// A snapshot of its state for people, free of side effects. Called at any time, even while a cycle runs. `None`
    /// means that it has no status.
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

/// The call of a subsystem in one cycle.
#[derive(Clone, Debug)]
pub struct Cycle {
    /// The name of the called subsystem.
    pub subsystem: String,
    /// The id of the cycle: strictly increasing.
    pub cycle_id: u64,
    /// The term of the calling orchestrator.
    pub epoch: u64,
    /// The number of this call in its cycle: more than 1 if earlier ones have failed.
    pub attempt: u32,
    /// When the cycle was due: "now" for work that must be repeatable. `None` if the caller did not set it.
    pub scheduled_at: Option<Timestamp>,
    /// When the work is stopped. `None` if the call has no deadline.
    pub deadline: Option<Instant>,
    /// The parameters of the registration, merged with those of the cycle, which take precedence.
    pub parameters: Object,
    /// The outputs of the subsystems in `requires`, `after` and `reads` of the registration.
    pub inputs: BTreeMap<String, Input>,
}

/// The latest output of another subsystem.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Made in this cycle.
    Fresh(Object),
    /// Made in another cycle.
    Stale {
        /// The output.
        output: Object,
        /// The cycle that made it.
        cycle_id: u64,
    },
    /// No output exists: it was never made, or the name is not registered.
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

    /// Sets a field of the output for other subsystems.
    pub fn output(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.output.insert(key.into(), value.into());
    }

    /// Adds a number to follow over time.
    pub fn metric(&mut self, name: impl Into<String>, value: f64) {
        self.metrics.insert(name.into(), value);
    }

    /// Reports a problem or information without failing. `code` is a short constant for grouping by programs.
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
    /// A failure with a code that has a meaning for the orchestrator.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(Code::Unknown, error.to_string())
    }
}
