//! The checks. Each one checks that a subsystem follows one rule of `subsystem.proto`.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};
use prost::Message;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::{super::output::milliseconds, MAX_TEXT, bounded, probe::Probe};
use crate::{
    model::{Answer, Code, Issue, Limits, Payload, Severity, Subsystem},
    ports::CallError,
    proto::subsystem::v1 as pb,
};

/// One rule, and how it is checked.
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) level: Level,
    pub(super) needs: Needs,
    /// The rule, in the words of the contract.
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

/// The least that must work before a check can test its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// The server answers.
    Server,
    /// A plain `RunCycle` succeeds, see [`RUN_CYCLE`].
    Cycle,
}

/// Why a check has not passed.
pub(super) enum Problem {
    Failed { sent: String, came: String },
    NotApplicable(String),
}

macro_rules! checks {
    ($($level:ident $name:literal $check:ident needs $needs:ident: $rule:literal,)+) => {
        &[$(Check {
            name: $name,
            level: Level::$level,
            needs: Needs::$needs,
            rule: $rule,
            run: |probe| Box::pin($check(probe)),
        },)+]
    };
}

/// Name of the check that a plain `RunCycle` succeeds.
pub(super) const RUN_CYCLE: &str = "run-cycle";

/// All checks, in the order in which they run. The first two expect that the subsystem may not be initialized yet.
///
/// A rule quotes the comments of `subsystem.proto`; "…" marks an omission.
pub(super) const CHECKS: &[Check] = checks! {
    Required "status" status needs Server:
        "Returns a snapshot of the subsystem's own state, for people and dashboards. Free of side effects, answered \
         even before `Initialize` and while a cycle runs. UNIMPLEMENTED means that the subsystem has no status. … \
         Bounded like an output.",
    Required "run-before-initialize" run_before_initialize needs Server:
        "FAILED_PRECONDITION: not initialized (for instance because the process restarted). The orchestrator calls \
         `Initialize` and then `RunCycle` once more, within the same deadline.",
    Required "initialize" initialize needs Server:
        "Idempotent: it can be called any number of times, with the same or with other parameters; the last call \
         counts. A subsystem that needs no initialization answers UNIMPLEMENTED, which counts as success.",
    Required "run-cycle" run_cycle needs Server:
        "Does the subsystem's part in one cycle and returns its output for the others.",
    Required "repeated-cycle" repeated_cycle needs Cycle:
        "a repeated call, whatever its `attempt`, must do the work once and return the first answer.",
    Required "concurrent-repeats" concurrent_repeats needs Cycle:
        "a repeated call, whatever its `attempt`, must do the work once and return the first answer. While the first \
         call is in progress, a repeated call waits for its answer.",
    Required "older-epoch-in-run-cycle" older_epoch_in_run_cycle needs Cycle:
        "ABORTED: `epoch` is lower than one already seen: the caller has been superseded.",
    Required "older-epoch-in-initialize" older_epoch_in_initialize needs Server:
        "ABORTED if `epoch` is lower than one already seen.",
    Required "status-while-running" status_while_running needs Cycle:
        "Free of side effects, answered even before `Initialize` and while a cycle runs.",
    Required "deadline" deadline needs Cycle:
        "The orchestrator sends a `grpc-timeout` with each call and stops waiting after it. The server then ends the \
         call, as gRPC libraries do by themselves.",
    Required "cancellation" cancellation needs Cycle:
        "A call that is cancelled, late or lost with its connection affects no other call: it can be repeated, and \
         all others are answered as before.",
    Required "unknown-subsystem" unknown_subsystem needs Server:
        "Each request names its subsystem; an endpoint that doesn't serve that name answers NOT_FOUND.",
    Required "unknown-fields" unknown_fields needs Cycle:
        "Both sides ignore unknown fields, so that either can be newer than the other.",
    Required "absent-and-stale-inputs" absent_and_stale_inputs needs Cycle:
        "one entry for each name in `requires`, `after` and `reads` of the registration, even if the input is absent. \
         … Whether `output` was made in this cycle, in another one, or never. … Not set means an empty output, or, if \
         `freshness` is FRESHNESS_ABSENT, no output.",
    Required "large-input" large_input needs Cycle:
        "Together at most 64 MiB: requests of up to 4 MiB, the default of gRPC, must be readable, and larger ones \
         should be.",
    Recommended "larger-input" larger_input needs Cycle:
        "Together at most 64 MiB: requests of up to 4 MiB, the default of gRPC, must be readable, and larger ones \
         should be.",
    Required "concurrent-subsystems" concurrent_subsystems needs Cycle:
        "Several subsystems may be served at one endpoint, over one connection, and called at the same time.",
    Recommended "malformed-request" malformed_request needs Cycle:
        "Errors are plain gRPC status codes. … A request that can't be decoded may get any code.",
    Required "output-limits" output_limits needs Cycle:
        "At most 90 nested messages deep, which is 30 nested objects … and at most as large as the `max_output_bytes` \
         of the registration (default 1 MiB). … A name is 1 to 128 bytes; at most `max_metrics` of them (default 64). \
         … At most `max_issues` (default 32). … At most 128 bytes. … At most 4 KiB.",
    Required "status-has-no-effects" status_has_no_effects needs Cycle:
        "Free of side effects, answered even before `Initialize` and while a cycle runs.",
    Recommended "health" health needs Server:
        "`grpc.health.v1.Health` may be served beside this service, but is never required. While the server answers \
         calls, its status is SERVING.",
    Required "dropped-connection" dropped_connection needs Cycle:
        "A call that is cancelled, late or lost with its connection affects no other call: it can be repeated, and \
         all others are answered as before.",
};

/// Long enough for a call to arrive, short enough for most calls to be still in progress.
const SOON: Duration = Duration::from_millis(50);
/// A call that takes at least this long can be observed while it is in progress.
const LONG: Duration = Duration::from_millis(100);
/// Pause before a call that was refused as UNAVAILABLE is repeated.
const AGAIN: Duration = Duration::from_millis(10);
/// Number of calls that are made at the same time.
const AT_ONCE: usize = 8;
/// Default limit of gRPC servers on the bytes of a request.
const DEFAULT_LIMIT: usize = 4 << 20;
/// Bytes for the other fields of a request, so that a request with a large input is just below a limit.
const REST: usize = 64 << 10;
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
        Err(error) if error.code == Code::Unimplemented => {
            Err(Problem::NotApplicable("GetStatus is not implemented".into()))
        }
        Err(error) => failed(sent(), said(&error)),
    }
}

async fn run_before_initialize(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    match probe.run(&request).await {
        Ok(_) => Err(Problem::NotApplicable("the subsystem needs no initialization, or was initialized before".into())),
        Err(error) if error.code == Code::FailedPrecondition => Ok(()),
        Err(error) => failed(format!("{}, before any Initialize", describe(&request)), said(&error)),
    }
}

async fn initialize(probe: &Probe) -> Result<(), Problem> {
    let request = probe.initialization();
    for call in ["the first", "the second"] {
        match probe.initialize(&request).await {
            Ok(()) => {}
            Err(error) if error.code == Code::Unimplemented => {}
            Err(error) => {
                return failed(format!("Initialize of epoch {}, {call} time", request.epoch), said(&error));
            }
        }
    }
    Ok(())
}

async fn run_cycle(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    match probe.run(&request).await {
        Ok(_) => Ok(()),
        Err(error) if error.code == Code::FailedPrecondition && initialize(probe).await.is_err() => {
            Err(Problem::NotApplicable("it needs an Initialize that succeeds".into()))
        }
        Err(error) => failed(describe(&request), said(&error)),
    }
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
        Err(error) if error.code == Code::Unimplemented => {
            return Err(Problem::NotApplicable("Initialize is not implemented".into()));
        }
        // The check of Initialize reports its failures.
        Ok(()) | Err(_) => {}
    }
    let request = pb::InitializeRequest { epoch: current.epoch - 1, ..current.clone() };
    let sent = format!("Initialize of epoch {}, after one of epoch {}", request.epoch, current.epoch);
    refused(Code::Aborted, sent, probe.initialize(&request).await)
}

async fn status_while_running(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    let run = probe.run(&request);
    tokio::pin!(run);
    let begun = Instant::now();
    match timeout(SOON, &mut run).await {
        Ok(Ok(_)) => return too_quick(begun.elapsed()),
        Ok(Err(error)) => return failed(describe(&request), said(&error)),
        Err(_) => {}
    }
    let asked = Instant::now();
    let status = probe.status().map(|answer| (answer, asked.elapsed()));
    let run = run.map(|answer| (answer, asked.elapsed()));
    let ((status, status_took), (answer, cycle_took)) = tokio::join!(status, run);
    let sent = || format!("GetStatus during {}", describe(&request));
    match status {
        Err(error) if error.code != Code::Unimplemented => failed(sent(), said(&error)),
        Err(_) if status_took > cycle_took => Err(Problem::NotApplicable(
            "GetStatus is not implemented, but answered only after the cycle had ended".into(),
        )),
        // If the cycle ended at the same time, that may be a coincidence.
        _ if status_took > cycle_took && cycle_took > SOON => {
            is_slow(probe).await?;
            failed(sent(), format!("no answer until the cycle had ended, {} later", spoken(cycle_took)))
        }
        _ => answer.map(|_| ()).or_else(|error| failed(describe(&request), said(&error))),
    }
}

async fn deadline(probe: &Probe) -> Result<(), Problem> {
    let late = probe.next_cycle();
    let sent = || format!("{} with a deadline of {}", describe(&late), spoken(SOON));
    let (answer, took) = probe.run_late(&late, SOON).await;
    match answer {
        // The answer was on its way.
        Ok(_) if took < LONG => too_quick(took),
        Ok(_) => {
            is_slow(probe).await?;
            failed(sent(), format!("OK, after {}", spoken(took)))
        }
        Err(error) if took >= probe.timeout() => failed(sent(), said(&error)),
        Err(_) => ends_alone(probe, &late, "was late").await,
    }
}

async fn cancellation(probe: &Probe) -> Result<(), Problem> {
    let cancelled = probe.next_cycle();
    let begun = Instant::now();
    // Dropping the call cancels it.
    let took = timeout(SOON, probe.run(&cancelled)).await.map(|_| begun.elapsed());
    ends_alone(probe, &cancelled, "was cancelled").await?;
    took.map_or(Ok(()), too_quick)
}

async fn unknown_subsystem(probe: &Probe) -> Result<(), Problem> {
    if probe.names().is_empty() {
        let why = "no --subsystem was given, and an endpoint that accepts a made-up name accepts every name";
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
    let sent = || format!("{} with the unknown field 2047 in the request and in its parameters", describe(&request));
    answer.map(|_| ()).or_else(|error| failed(sent(), said(&error)))
}

async fn absent_and_stale_inputs(probe: &Probe) -> Result<(), Problem> {
    let mut request = probe.next_cycle();
    for (name, input) in &mut request.inputs {
        if probe.requires(name) {
            continue;
        }
        *input = if name.len() % 2 == 0 { absent() } else { stale(input.output.clone(), request.cycle_id - 1) };
    }
    request.inputs.insert("absent-one".into(), absent());
    let output = object(&[("value", json!(1))])?;
    request.inputs.insert("stale-one".into(), stale(output, request.cycle_id - 1));
    let empty = pb::Input { freshness: pb::Freshness::Fresh.into(), cycle_id: request.cycle_id, output: Bytes::new() };
    request.inputs.insert("empty-one".into(), empty);
    let answer = probe.run(&request).await;
    let sent = || format!("{} with inputs that are absent, stale and empty", describe(&request));
    answer.map(|_| ()).or_else(|error| failed(sent(), said(&error)))
}

async fn large_input(probe: &Probe) -> Result<(), Problem> {
    with_input_of(probe, DEFAULT_LIMIT - REST).await
}

async fn larger_input(probe: &Probe) -> Result<(), Problem> {
    with_input_of(probe, Subsystem::MAX_INPUT_BYTES - REST).await
}

async fn with_input_of(probe: &Probe, bytes: usize) -> Result<(), Problem> {
    let mut request = probe.next_cycle();
    let output = object(&[("large", "x".repeat(bytes).into())])?;
    let fresh = pb::Input { output, freshness: pb::Freshness::Fresh.into(), cycle_id: request.cycle_id };
    request.inputs.insert("large-one".into(), fresh);
    let answer = probe.run(&request).await;
    let sent = || format!("{} of {} bytes", describe(&request), request.encoded_len());
    answer.map(|_| ()).or_else(|error| failed(sent(), said(&error)))
}

async fn concurrent_subsystems(probe: &Probe) -> Result<(), Problem> {
    let names = probe.names();
    if names.len() < 2 {
        let why = "it needs several subsystems; repeat --subsystem with the names of others at this endpoint";
        return Err(Problem::NotApplicable(why.into()));
    }
    for subsystem in names {
        // The check of Initialize reports its failures.
        let _ =
            probe.initialize(&pb::InitializeRequest { subsystem: subsystem.clone(), ..probe.initialization() }).await;
    }
    let cycle = probe.next_cycle();
    let requests: Vec<_> =
        names.iter().map(|name| pb::RunCycleRequest { subsystem: name.clone(), ..cycle.clone() }).collect();
    let answers = join_all(requests.iter().map(|request| probe.run(request))).await;
    requests.iter().zip(answers).try_for_each(|(request, answer)| {
        let sent = || format!("{} for {}, concurrent with those for the others", describe(request), request.subsystem);
        answer.map(|_| ()).or_else(|error| failed(sent(), said(&error)))
    })
}

async fn malformed_request(probe: &Probe) -> Result<(), Problem> {
    let sent = || "RunCycle with bytes that are not a message".to_owned();
    // Field 1 announces more bytes than follow.
    match probe.run_raw(Bytes::from_static(b"\x0a\x7fshort")).await {
        Ok(_) => failed(sent(), "OK".into()),
        Err(error) if error.code == Code::DeadlineExceeded => failed(sent(), said(&error)),
        Err(_) => answered(probe, &probe.next_cycle()).await.map(|_| ()),
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
        // The contract sets no bounds on the severity.
        Issue { severity: Severity::Info, code, message }
    });
    let answer = Answer { output, metrics: response.metrics, issues: issues.collect() };
    DEFAULT.check(&answer).map_err(|over| bad(over.to_string()))
}

async fn status_has_no_effects(probe: &Probe) -> Result<(), Problem> {
    let request = probe.next_cycle();
    let first = answered(probe, &request).await?;
    // Two snapshots can differ: they may contain the time.
    for _ in 0..2 {
        if let Err(error) = probe.status().await
            && error.code == Code::Unimplemented
        {
            return Err(Problem::NotApplicable("GetStatus is not implemented".into()));
        }
    }
    same(&first, &answered(probe, &request).await?, || format!("{} again after GetStatus", describe(&request)))?;
    answered(probe, &probe.next_cycle()).await.map(|_| ())
}

async fn health(probe: &Probe) -> Result<(), Problem> {
    use tonic_health::pb::health_check_response::ServingStatus;
    let sent = || "grpc.health.v1.Health/Check of the whole server".to_owned();
    match probe.health("").await {
        Ok(answer) if answer.status() == ServingStatus::Serving => Ok(()),
        Ok(answer) => failed(sent(), answer.status().as_str_name().to_owned()),
        Err(error) if error.code == Code::Unimplemented => {
            Err(Problem::NotApplicable("grpc.health.v1.Health is not served".into()))
        }
        Err(error) => failed(sent(), said(&error)),
    }
}

async fn dropped_connection(probe: &Probe) -> Result<(), Problem> {
    let cut = probe.next_cycle();
    let took = match probe.cut_off(&cut, SOON).await {
        Ok(took) => took,
        Err(error) => return failed(format!("{} on a second connection", describe(&cut)), said(&error)),
    };
    ends_alone(probe, &cut, "was cut off with its connection").await?;
    took.map_or(Ok(()), too_quick)
}

// ---------------------------------------------------------------------------------------------------------------
// Shared by the checks

fn failed<T>(sent: String, came: String) -> Result<T, Problem> {
    Err(Problem::Failed { sent, came })
}

fn describe(request: &pb::RunCycleRequest) -> String {
    let pb::RunCycleRequest { cycle_id, epoch, attempt, .. } = request;
    format!("RunCycle of cycle {cycle_id}, epoch {epoch}, attempt {attempt}")
}

fn said(error: &CallError) -> String {
    if error.message.is_empty() { error.code.to_string() } else { error.to_string() }
}

async fn answered(probe: &Probe, request: &pb::RunCycleRequest) -> Result<pb::RunCycleResponse, Problem> {
    probe.run(request).await.or_else(|error| failed(describe(request), said(&error)))
}

/// Repeats the call while the answer is UNAVAILABLE, which means that nothing was done.
async fn answered_at_last(probe: &Probe, request: &pb::RunCycleRequest) -> Result<pb::RunCycleResponse, CallError> {
    let give_up = Instant::now() + probe.timeout();
    loop {
        match probe.run(request).await {
            Err(error) if error.code == Code::Unavailable && Instant::now() < give_up => sleep(AGAIN).await,
            answer => return answer,
        }
    }
}

/// Checks that a call that ended before its answer can be repeated, and that the next cycle is answered.
async fn ends_alone(probe: &Probe, ended: &pb::RunCycleRequest, how: &str) -> Result<(), Problem> {
    let again = pb::RunCycleRequest { attempt: ended.attempt + 1, ..ended.clone() };
    let sent = || format!("{}, after the first one {how}", describe(&again));
    let first = answered_at_last(probe, &again).await.or_else(|error| failed(sent(), said(&error)))?;
    same(&first, &answered(probe, &again).await?, || format!("{}, and once more", sent()))?;
    let next = probe.next_cycle();
    let answer = answered_at_last(probe, &next).await;
    answer.map(|_| ()).or_else(|error| failed(format!("{}, after one that {how}", describe(&next)), said(&error)))
}

/// Checks that a cycle usually takes long, not only once because the machine was busy.
async fn is_slow(probe: &Probe) -> Result<(), Problem> {
    let begun = Instant::now();
    answered(probe, &probe.next_cycle()).await?;
    let took = begun.elapsed();
    if took < LONG { too_quick(took) } else { Ok(()) }
}

fn too_quick(took: Duration) -> Result<(), Problem> {
    let why = format!("its cycle took only {}; use --param to make it work for longer", spoken(took));
    Err(Problem::NotApplicable(why))
}

fn spoken(took: Duration) -> String {
    milliseconds(took.as_secs_f64() * 1e3)
}

fn refused<T>(code: Code, sent: String, answer: Result<T, CallError>) -> Result<(), Problem> {
    match answer {
        Err(error) if error.code == code => Ok(()),
        Err(error) => failed(sent, said(&error)),
        Ok(_) => failed(sent, "OK".into()),
    }
}

/// Checks that two answers are equal, whatever the order of the entries of their maps.
fn same(
    first: &pb::RunCycleResponse,
    again: &pb::RunCycleResponse,
    sent: impl FnOnce() -> String,
) -> Result<(), Problem> {
    let [first, again] = [first, again].map(canonical);
    if first == again {
        return Ok(());
    }
    let [first, again] = [first, again].map(|answer| bounded(answer, MAX_TEXT / 3));
    failed(sent(), format!("{again}, though the first answer was {first}"))
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

#[cfg(test)]
mod tests {
    use super::CHECKS;

    #[test]
    fn every_rule_is_in_the_contract() {
        let contract = include_str!("../../../proto/dreamnet/subsystem/v1/subsystem.proto");
        let comments = contract.lines().filter_map(|line| line.trim_start().strip_prefix("//"));
        let words: Vec<_> = comments.flat_map(str::split_whitespace).collect();
        let comments = words.join(" ");
        for check in CHECKS {
            for part in check.rule.split(" … ") {
                assert!(comments.contains(part), "{}: the contract does not contain {part:?}", check.name);
            }
        }
    }
}
