//! The checks: each holds one rule of `subsystem.proto` against what the subsystem does.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use prost::Message;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tonic::{Code, Status};

use super::probe::Probe;
use crate::{
    model::{self, Answer, Issue, Limits, Payload, Severity},
    proto::subsystem::v1 as pb,
};

/// One rule, and how it is checked.
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) level: Level,
    /// What the contract says.
    pub(super) rule: &'static str,
    pub(super) run: for<'a> fn(&'a Probe) -> BoxFuture<'a, Result<(), Problem>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Required,
    Recommended,
}

impl Level {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Recommended => "recommended",
        }
    }
}

/// Why a check has not passed.
pub(super) enum Problem {
    Failed { sent: String, came: String },
    NotApplicable(String),
}

macro_rules! checks {
    ($($level:ident $name:literal $check:ident $rule:literal,)+) => {
        &[$(Check { name: $name, level: Level::$level, rule: $rule, run: |probe| Box::pin($check(probe)) },)+]
    };
}

/// All checks, in the order in which they run. The first two look at a subsystem that may not be initialized yet.
pub(super) const CHECKS: &[Check] = checks! {
    Required "status" status
        "GetStatus: a snapshot of the subsystem's own state, bounded like an output. Answered also before Initialize \
         and while a cycle runs. UNIMPLEMENTED means that there is none to show.",
    Required "run-before-initialize" run_before_initialize
        "RunCycle: FAILED_PRECONDITION means not initialized; the orchestrator calls Initialize and then this once more.",
    Required "initialize" initialize
        "Initialize is idempotent: it may be called any number of times with the same or with other parameters. A \
         subsystem that needs no initialization answers UNIMPLEMENTED, which counts as success.",
    Required "repeated-cycle" repeated_cycle
        "(cycle_id, subsystem) is the idempotency key: a repeated call, whatever its attempt, must do the work once and \
         return the first answer.",
    Required "concurrent-repeats" concurrent_repeats
        "(cycle_id, subsystem) is the idempotency key: a repeated call must do the work once and return the first \
         answer, also while the first one runs.",
    Required "older-epoch-in-run-cycle" older_epoch_in_run_cycle
        "RunCycle: ABORTED when epoch is older than one already seen: the caller has been superseded.",
    Required "older-epoch-in-initialize" older_epoch_in_initialize
        "Initialize: ABORTED when epoch is older than one already seen.",
    Required "deadline" deadline
        "A call that is late should stop working: nobody reads its answer. It must not keep the subsystem from \
         answering others.",
    Required "cancellation" cancellation
        "A call that is cancelled should stop working: nobody reads its answer. The next cycle is answered.",
    Required "unknown-subsystem" unknown_subsystem
        "Each request names the subsystem it is for; an endpoint that doesn't serve that name answers NOT_FOUND.",
    Required "unknown-fields" unknown_fields
        "Unknown fields are ignored by both sides, so that either can be newer than the other.",
    Required "absent-and-stale-inputs" absent_and_stale_inputs
        "inputs: one entry for each name in requires, after and reads, also when it is absent. An input may be \
         FRESHNESS_FRESH, FRESHNESS_STALE or FRESHNESS_ABSENT.",
    Required "large-input" large_input
        "inputs: an output may be as large as its registration allows. Servers of gRPC read 4 MiB by default, and so much \
         must be read.",
    Recommended "larger-input" larger_input
        "inputs: an output may be as large as its registration allows, and several may come in one request. A server \
         should read more than the 4 MiB of gRPC's default.",
    Recommended "concurrent-cycles" concurrent_cycles
        "Several subsystems may be served at one endpoint, over one connection, and are called at the same time.",
    Recommended "malformed-request" malformed_request
        "Errors are plain gRPC status codes. A request that can't be read is refused with one, other than UNKNOWN.",
    Required "output-limits" output_limits
        "output: at most 90 nested messages deep and as large as max_output_bytes. Metrics: a name is 1 to 128 bytes, at \
         most max_metrics of them. Issues: code at most 128 bytes, message at most 4 KiB, at most max_issues. The \
         defaults are 1 MiB, 64 and 32.",
    Required "status-has-no-effects" status_has_no_effects
        "GetStatus is free of side effects.",
    Recommended "health" health
        "grpc.health.v1.Health may be served beside this service. It is never required; where it is, a subsystem that \
         answers is SERVING.",
    Required "dropped-connection" dropped_connection
        "A call that is cancelled should stop working. A connection that drops in the middle of a call ends that call \
         only.",
};

/// Long enough for a call to arrive, short enough for most to be still at work.
const SOON: Duration = Duration::from_millis(50);
/// How many calls are made at the same time.
const AT_ONCE: usize = 8;
/// What gRPC servers read by default.
const DEFAULT_LIMIT: usize = 4 << 20;
/// Field 2047 of the contract's messages, which has no meaning: a text.
const UNKNOWN_FIELD: &[u8] = b"\xfa\x7f\x05later";

// ---------------------------------------------------------------------------------------------------------------
// The checks

async fn status(probe: &Probe) -> Result<(), Problem> {
    let sent = || "GetStatus".to_owned();
    match probe.status().await {
        Ok(answer) => Payload::check(answer.status)
            .map(|_| ())
            .map_err(|malformed| Problem::Failed { sent: sent(), came: format!("a status that {malformed}") }),
        Err(status) if status.code() == Code::Unimplemented => {
            Err(Problem::NotApplicable("GetStatus is not implemented".into()))
        }
        Err(status) => failed(sent(), said(&status)),
    }
}

async fn run_before_initialize(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    match probe.run(&request).await {
        Ok(_) => Err(Problem::NotApplicable("it needs no initialization, or has been initialized before".into())),
        Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
        Err(status) => failed(format!("{}, before any Initialize", describe(&request)), said(&status)),
    }
}

async fn initialize(probe: &Probe) -> Result<(), Problem> {
    let request = probe.initialization();
    for call in ["the first", "the second"] {
        match probe.initialize(&request).await {
            Ok(()) => {}
            Err(status) if status.code() == Code::Unimplemented => {}
            Err(status) => {
                return failed(format!("Initialize of epoch {}, {call} time", request.epoch), said(&status));
            }
        }
    }
    answered(probe, &probe.next_cycle()).await.map(|_| ())
}

async fn repeated_cycle(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    let first = answered(probe, &request).await?;
    for attempt in [1, 2] {
        let request = pb::RunCycleRequest { attempt, ..request.clone() };
        same(&first, &answered(probe, &request).await?, || format!("{} again", describe(&request)))?;
    }
    Ok(())
}

async fn concurrent_repeats(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    let answers = join_all((0..AT_ONCE).map(|_| answered(probe, &request))).await;
    let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
    answers
        .iter()
        .try_for_each(|answer| same(&answers[0], answer, || format!("{}, {AT_ONCE} times at once", describe(&request))))
}

async fn older_epoch_in_run_cycle(probe: &Probe) -> Result<(), Problem> {
    let current = probe.next_cycle();
    answered(probe, &current).await?;
    let next = probe.next_cycle();
    let request = pb::RunCycleRequest { epoch: next.epoch - 1, ..next };
    let sent = format!("{}, after one of epoch {}", describe(&request), current.epoch);
    refused(Code::Aborted, sent, probe.run(&request).await)
}

async fn older_epoch_in_initialize(probe: &Probe) -> Result<(), Problem> {
    let current = probe.initialization();
    match probe.initialize(&current).await {
        Err(status) if status.code() == Code::Unimplemented => {
            return Err(Problem::NotApplicable("Initialize is not implemented".into()));
        }
        // The check of Initialize tells what is wrong with it.
        Ok(()) | Err(_) => {}
    }
    let request = pb::InitializeRequest { epoch: current.epoch - 1, ..current.clone() };
    let sent = format!("Initialize of epoch {}, after one of epoch {}", request.epoch, current.epoch);
    refused(Code::Aborted, sent, probe.initialize(&request).await)
}

async fn deadline(probe: &Probe) -> Result<(), Problem> {
    let (late, other) = (probe.next_cycle(), probe.next_cycle());
    let limit = SOON.min(probe.timeout());
    let (_whatever, answer) = tokio::join!(probe.run_within(&late, limit), probe.run(&other));
    let sent = |request| format!("{} beside one with a deadline of {limit:?}", describe(request));
    answer.or_else(|status| failed(sent(&other), said(&status)))?;
    let next = probe.next_cycle();
    let answer = probe.run(&next).await;
    answer.map(|_| ()).or_else(|status| failed(format!("{} after one that was late", describe(&next)), said(&status)))
}

async fn cancellation(probe: &Probe) -> Result<(), Problem> {
    let cancelled = probe.next_cycle();
    // Dropping the call cancels it.
    let _ = tokio::time::timeout(SOON, probe.run(&cancelled)).await;
    let next = probe.next_cycle();
    let answer = probe.run(&next).await;
    let sent = || format!("{} after one that was cancelled", describe(&next));
    answer.map(|_| ()).or_else(|status| failed(sent(), said(&status)))
}

async fn unknown_subsystem(probe: &Probe) -> Result<(), Problem> {
    if !probe.is_named() {
        let why = "no --subsystem was given, and a subsystem that answers to a made-up name answers to every one";
        return Err(Problem::NotApplicable(why.into()));
    }
    let request = pb::RunCycleRequest { subsystem: "no-such-subsystem".into(), ..probe.next_cycle() };
    refused(Code::NotFound, format!("{} for {}", describe(&request), request.subsystem), probe.run(&request).await)
}

async fn unknown_fields(probe: &Probe) -> Result<(), Problem> {
    let mut request = probe.next_cycle();
    request.parameters = [&request.parameters[..], UNKNOWN_FIELD].concat().into();
    let bytes = [&request.encode_to_vec(), UNKNOWN_FIELD].concat();
    let answer = probe.run_raw(bytes.into()).await;
    let sent = || format!("{} with field 2047 in it and in its parameters", describe(&request));
    answer.map(|_| ()).or_else(|status| failed(sent(), said(&status)))
}

async fn absent_and_stale_inputs(probe: &Probe) -> Result<(), Problem> {
    let mut request = probe.next_cycle();
    for (name, input) in &mut request.inputs {
        *input = if name.len() % 2 == 0 { absent() } else { stale(input.output.clone(), request.cycle_id - 1) };
    }
    request.inputs.insert("absent-one".into(), absent());
    let output = object(&[("value", json!(1))])?;
    request.inputs.insert("stale-one".into(), stale(output, request.cycle_id - 1));
    let answer = probe.run(&request).await;
    let sent = || format!("{} with inputs that are absent and stale", describe(&request));
    answer.map(|_| ()).or_else(|status| failed(sent(), said(&status)))
}

async fn large_input(probe: &Probe) -> Result<(), Problem> {
    // Room for what else is in the request, so that the whole is just below the limit.
    with_input_of(probe, DEFAULT_LIMIT - (64 << 10)).await
}

async fn larger_input(probe: &Probe) -> Result<(), Problem> {
    with_input_of(probe, 2 * DEFAULT_LIMIT).await
}

async fn with_input_of(probe: &Probe, bytes: usize) -> Result<(), Problem> {
    let mut request = probe.next_cycle();
    let output = object(&[("large", "x".repeat(bytes).into())])?;
    let fresh = pb::Input { output, freshness: pb::Freshness::Fresh.into(), cycle_id: request.cycle_id };
    request.inputs.insert("large-one".into(), fresh);
    let answer = probe.run(&request).await;
    let sent = || format!("{} of {} bytes", describe(&request), request.encoded_len());
    answer.map(|_| ()).or_else(|status| failed(sent(), said(&status)))
}

async fn concurrent_cycles(probe: &Probe) -> Result<(), Problem> {
    let requests: Vec<_> = (0..AT_ONCE).map(|_| probe.next_cycle()).collect();
    let answers = join_all(requests.iter().map(|request| probe.run(request))).await;
    requests.iter().zip(answers).try_for_each(|(request, answer)| {
        let sent = || format!("{}, with {} others at once", describe(request), AT_ONCE - 1);
        answer.map(|_| ()).or_else(|status| failed(sent(), said(&status)))
    })
}

async fn malformed_request(probe: &Probe) -> Result<(), Problem> {
    let sent = || "RunCycle with bytes that are no message".to_owned();
    // Field 1 announces more bytes than there are.
    match probe.run_raw(Bytes::from_static(b"\x0a\x7fshort")).await {
        Ok(_) => failed(sent(), "OK".into()),
        Err(status) if status.code() == Code::Unknown => failed(sent(), said(&status)),
        Err(_) => Ok(()),
    }
}

async fn output_limits(probe: &Probe) -> Result<(), Problem> {
    const DEFAULT: Limits =
        Limits { max_message_bytes: 4 << 20, max_output_bytes: 1 << 20, max_metrics: 64, max_issues: 32 };
    let request = probe.next_cycle();
    let response = answered(probe, &request).await?;
    let bad = |came: String| Problem::Failed { sent: describe(&request), came };
    let output = Payload::check(response.output).map_err(|malformed| bad(format!("an output that {malformed}")))?;
    let issues = response.issues.into_iter().map(|pb::Issue { code, message, .. }| {
        // How bad it is has no bound.
        Issue { severity: Severity::Info, code, message }
    });
    let answer = Answer { output, metrics: response.metrics, issues: issues.collect() };
    DEFAULT.check(&answer).map_err(|over| bad(over.to_string()))
}

async fn status_has_no_effects(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    let first = answered(probe, &request).await?;
    if let Err(status) = probe.status().await
        && status.code() == Code::Unimplemented
    {
        return Err(Problem::NotApplicable("GetStatus is not implemented".into()));
    }
    same(&first, &answered(probe, &request).await?, || format!("{} again after GetStatus", describe(&request)))
}

async fn health(probe: &Probe) -> Result<(), Problem> {
    use tonic_health::pb::health_check_response::ServingStatus;
    let sent = || "grpc.health.v1.Health/Check of the whole server".to_owned();
    match probe.health("").await {
        Ok(answer) if answer.status() == ServingStatus::Serving => Ok(()),
        Ok(answer) => failed(sent(), answer.status().as_str_name().to_owned()),
        Err(status) if status.code() == Code::Unimplemented => {
            Err(Problem::NotApplicable("grpc.health.v1.Health is not served".into()))
        }
        Err(status) => failed(sent(), said(&status)),
    }
}

async fn dropped_connection(probe: &Probe) -> Result<(), Problem> {
    let cut = probe.next_cycle();
    let sent = |request| format!("{} after a connection was cut in the middle of one", describe(request));
    probe
        .cut_off(cut.clone(), SOON)
        .await
        .or_else(|error| failed(describe(&cut) + " on a second connection", error))?;
    let next = probe.next_cycle();
    let answer = probe.run(&next).await;
    answer.map(|_| ()).or_else(|status| failed(sent(&next), said(&status)))
}

// ---------------------------------------------------------------------------------------------------------------
// What they share

fn failed<T>(sent: String, came: String) -> Result<T, Problem> {
    Err(Problem::Failed { sent, came })
}

fn describe(request: &pb::RunCycleRequest) -> String {
    let pb::RunCycleRequest { cycle_id, epoch, attempt, .. } = request;
    format!("RunCycle of cycle {cycle_id}, epoch {epoch}, attempt {attempt}")
}

fn said(status: &Status) -> String {
    let code = model::Code::from_number(status.code().into());
    if status.message().is_empty() { code.to_string() } else { format!("{code}: {}", status.message()) }
}

async fn answered(probe: &Probe, request: &pb::RunCycleRequest) -> Result<pb::RunCycleResponse, Problem> {
    probe.run(request).await.or_else(|status| failed(describe(request), said(&status)))
}

fn refused<T>(code: Code, sent: String, answer: Result<T, Status>) -> Result<(), Problem> {
    match answer {
        Err(status) if status.code() == code => Ok(()),
        Err(status) => failed(sent, said(&status)),
        Ok(_) => failed(sent, "OK".into()),
    }
}

/// Two answers say the same, in whatever order their maps were written.
fn same(
    first: &pb::RunCycleResponse,
    again: &pb::RunCycleResponse,
    sent: impl FnOnce() -> String,
) -> Result<(), Problem> {
    let [first, again] = [first, again].map(canonical);
    if first == again { Ok(()) } else { failed(sent(), format!("{again}, though the first answer was {first}")) }
}

fn canonical(response: &pb::RunCycleResponse) -> String {
    let output = match Payload::check(response.output.clone()) {
        Ok(output) => Value::from(output.to_json()).to_string(),
        Err(malformed) => format!("({malformed}: {:?})", response.output),
    };
    format!("output {output}, metrics {:?}, issues {:?}", response.metrics, response.issues)
}

fn absent() -> pb::Input {
    pb::Input { freshness: pb::Freshness::Absent.into(), ..pb::Input::default() }
}

fn stale(output: Bytes, cycle_id: u64) -> pb::Input {
    pb::Input { output, freshness: pb::Freshness::Stale.into(), cycle_id }
}

fn object(fields: &[(&str, Value)]) -> Result<Bytes, Problem> {
    let object: Map<_, _> = fields.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let payload = Payload::from_json(&object);
    payload
        .map(|payload| payload.as_bytes().clone())
        .or_else(|malformed| failed("nothing".into(), format!("the input {malformed}")))
}
