//! `orchestrator run`: runs one cycle, and shows its progress and its result.

use std::time::Duration;

use bytes::Bytes;
use clap::builder::NonEmptyStringValueParser;
use tokio::{sync::watch, time::Instant};

use super::{
    Exit, Failure,
    cycles::{cycle, why as why_skipped},
    known,
    output::{clean, clean_lines, is_error_terminal, json, note, one_of, parse_duration, print, telemetry, word},
    parameters::Parameters,
    plan::plan,
    progress::Bar,
    remote::Remote,
    watch::{Events, progress, started},
};
use crate::proto::orchestrator::v1::{self as pb, cycle_event::Event};

/// Policies, as arguments.
pub(super) const OVERLAP_POLICIES: &[pb::OverlapPolicy] = &[
    pb::OverlapPolicy::Skip,
    pb::OverlapPolicy::BufferOne,
    pb::OverlapPolicy::BufferAll,
    pb::OverlapPolicy::CancelOther,
];

/// Run one cycle now
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Waits until the cycle is recorded and shows its result. Meanwhile it shows the progress on stderr: live on a \
terminal, otherwise line by line (not with --output json). Callers without the \
right to watch all cycles see only the result.

Ctrl-C or --timeout does not stop the cycle; use `orchestrator cancel`. If the service restarts or does not respond, \
this command waits for it, up to a minute. A restart interrupts a running cycle, which is recorded as INTERRUPTED; a \
waiting cycle runs after the restart.

Cycles without a subsystem in common run at the same time; others wait in line for each other.

Exit codes:
  0    it SUCCEEDED, also if no subsystem was called, because none is registered
       or all were left out: then stderr says why. With --async: it runs or
       waits; with --validate-only: it could run
  1    refused by the service
  2    wrong usage
  4    the service can't be reached, or the cycle did not end within --timeout;
       it may continue
  10   it was DEGRADED: some subsystems failed
  11   it FAILED: all subsystems failed, also because all of those that are
       expected are not registered; or a critical one did
  12   it was CANCELLED or INTERRUPTED
  130  Ctrl-C; the cycle runs on

Examples:
  orchestrator run
  orchestrator run --subsystem prices,news --param 'day=\"2026-01-31\"'
  orchestrator run --async --request-id nightly-2026-01-31
  orchestrator run --overlap-policy skip --deadline 30s
  orchestrator run --validate-only
  orchestrator run --output json | jq -r .telemetry.state")]
pub(super) struct Run {
    /// Only these subsystems, such as a,b; may be repeated. Subsystems keep the order of the full plan
    #[arg(long = "subsystem", value_name = "NAME", value_delimiter = ',')]
    subsystems: Vec<String>,
    #[command(flatten)]
    parameters: Parameters,
    /// Makes the command idempotent: the same id gets the same cycle. At most 128 bytes
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    request_id: Option<String>,
    /// What to do when a cycle with a subsystem in common runs or waits [default: buffer_all]
    #[arg(long, value_name = "POLICY", value_parser = one_of(OVERLAP_POLICIES, overlap_policy))]
    overlap_policy: Option<pb::OverlapPolicy>,
    /// Deadline of the cycle, 1ms to 24h [default: the service's cycle.deadline]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    deadline: Option<prost_types::Duration>,
    /// Record all outputs of this cycle
    #[arg(long)]
    record_outputs: bool,
    /// Print the id of the cycle as soon as it runs or waits, and exit
    #[arg(long)]
    r#async: bool,
    /// Show the plan without running a cycle
    #[arg(long, visible_alias = "dry-run", conflicts_with = "async")]
    validate_only: bool,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
    /// Also show the metrics and outputs of its subsystems
    #[arg(long)]
    details: bool,
    #[command(flatten)]
    remote: Remote,
}

/// The word for a policy.
pub(super) fn overlap_policy(policy: pb::OverlapPolicy) -> &'static str {
    word(policy.as_str_name(), "OVERLAP_POLICY_")
}

impl Run {
    /// Runs the cycle. `parting` receives the text to print if the user presses Ctrl-C meanwhile.
    pub(super) async fn run(self, parting: watch::Sender<String>) -> Result<Exit, Failure> {
        let request = pb::RunCycleRequest {
            subsystems: self.subsystems,
            parameters: self.parameters.encode()?,
            request_id: self.request_id.unwrap_or_default(),
            overlap_policy: self.overlap_policy.map_or(0, Into::into),
            validate_only: self.validate_only,
            // Asynchronous, so that the id is known early and can be shown for `cancel`; the stream delivers the
            // record.
            r#async: !self.validate_only,
            deadline: self.deadline,
            record_outputs: self.record_outputs,
        };
        let remote = &self.remote;
        if self.validate_only {
            let response = ask(remote, request).await?;
            remote.format.show("RunCycleResponse", &response, |response| {
                response.plan.as_ref().map(|it| plan(it, remote.format.page())).unwrap_or_default()
            })?;
            return Ok(Exit::Done);
        }
        if self.r#async {
            let response = ask(remote, request).await?;
            remote
                .format
                .show("RunCycleResponse", &response, |response| format!("cycle {} is admitted\n", response.cycle_id))?;
            return Ok(Exit::Done);
        }

        let mut view = RunView::new(self.quiet || remote.format.is_json(), self.quiet);
        let mut admitted = None;
        parting.send_replace(goes_on(remote, None));
        let admitted_now = |id| {
            admitted = Some(id);
            parting.send_replace(goes_on(remote, admitted));
        };
        let ended = tokio::select! {
            ended = run_and_follow(remote, request, &mut view, admitted_now) => Some(ended),
            () = expired(remote.timeout) => None,
        };
        view.clear();
        let response = match ended {
            Some(Ok(response)) => response,
            Some(Err(failure)) if admitted.is_none() => return Err(failure),
            ended => {
                let late = || remote.late(remote.timeout.unwrap_or_default());
                let failure = ended.and_then(Result::err).unwrap_or_else(late);
                return Err(failure.and(&goes_on(remote, admitted)));
            }
        };
        let record = telemetry(&response.telemetry)?;
        // The cycle has ended.
        parting.send_replace(String::new());
        if remote.format.is_json() {
            print(&format!("{}\n", json("RunCycleResponse", &response)?))?;
        } else {
            print(&cycle(&record, self.details, remote.format.page()))?;
        }
        if let Some(why) = nothing_called(&record) {
            note(&why);
        }
        Ok(match record.state() {
            pb::CycleState::Succeeded => Exit::Done,
            pb::CycleState::Degraded => Exit::Degraded,
            pb::CycleState::Failed | pb::CycleState::Unspecified => Exit::Failed,
            pb::CycleState::Cancelled | pb::CycleState::Interrupted => Exit::Cancelled,
        })
    }
}

/// Why no subsystem was called in a cycle that did not fail; `None` if one was called.
fn nothing_called(record: &pb::CycleTelemetry) -> Option<String> {
    /// Most reasons that are shown; further ones repeat them.
    const SHOWN: usize = 3;
    let is_skipped = |part: &pb::SubsystemTelemetry| part.state() == pb::SubsystemState::Skipped;
    if record.state() != pb::CycleState::Succeeded || !record.subsystems.iter().all(is_skipped) {
        return None;
    }
    let none = "no subsystem is registered. Register one with `orchestrator subsystems register`, or declare it in \
                the configuration";
    let reasons = record.subsystems.iter().map(|part| clean(&format!("{}: {}", part.name, why_skipped(part))));
    let reasons = reasons.take(SHOWN).collect::<Vec<_>>().join("; ");
    Some(match record.subsystems.len() {
        0 => format!("no subsystem was called: {none}"),
        1..=SHOWN => format!("no subsystem was called: {reasons}"),
        all => format!("no subsystem was called: {reasons}; and {} more", all - SHOWN),
    })
}

/// Longest wait for a service that is unreachable. A restart takes only seconds.
const GIVE_UP_AFTER: Duration = Duration::from_mins(1);

/// Requests the cycle, and follows the stream until it is recorded. A caller without the right to watch all cycles
/// waits for the answer instead.
async fn run_and_follow(
    remote: &Remote,
    request: pb::RunCycleRequest,
    view: &mut RunView,
    mut admitted: impl FnMut(u64),
) -> Result<pb::RunCycleResponse, Failure> {
    // Watching starts before the cycle can, so that no event of it is missed.
    let watch = pb::WatchCyclesRequest { progress: view.wants_progress(), ..pb::WatchCyclesRequest::default() };
    let mut events = match Events::open(remote, watch, Some(GIVE_UP_AFTER)).await {
        Ok(events) => events,
        Err(failure) if failure.is_denied => {
            if view.wants_progress() {
                view.note(&clean_lines(&format!("no progress is shown: {}", failure.message)));
            }
            let request = pb::RunCycleRequest { r#async: false, ..request };
            return request_cycle(remote, request, |text| view.note(text)).await;
        }
        Err(failure) => return Err(failure),
    };
    // The first event contains the revision from which the stream can be resumed.
    events.next(|text| view.note(text)).await?;
    let response = request_cycle(remote, request, |text| view.note(text)).await?;
    if !response.telemetry.is_empty() {
        // An earlier call with this request id has run it.
        return Ok(response);
    }
    let cycle_id = response.cycle_id;
    admitted(cycle_id);
    let record = loop {
        let event = match events.next(|text| view.note(text)).await {
            Ok(event) => event.event,
            // The stream can't be resumed because records are no longer retained, but the record of the cycle may be.
            Err(failure) if failure.exit == Exit::Refused => match recorded(remote, cycle_id).await {
                Some(record) => break record,
                None => return Err(failure),
            },
            Err(failure) => return Err(failure),
        };
        match event {
            Some(Event::Recorded(record)) if telemetry(&record)?.cycle_id == cycle_id => break record,
            Some(event) => view.show(&event, cycle_id),
            None => {}
        }
    };
    Ok(pb::RunCycleResponse { telemetry: record, ..response })
}

/// Requests the cycle. After a lost answer it is unknown whether the request was received: it is repeated if it is
/// idempotent.
async fn request_cycle(
    remote: &Remote,
    request: pb::RunCycleRequest,
    mut note: impl FnMut(&str),
) -> Result<pb::RunCycleResponse, Failure> {
    /// Pause between attempts, in addition to the wait for each answer.
    const PAUSE: Duration = Duration::from_secs(1);
    let asked_since = Instant::now();
    loop {
        match ask(remote, request.clone()).await {
            Err(failure) if failure.exit != Exit::Unreachable => return Err(failure),
            Err(failure) if request.request_id.is_empty() || asked_since.elapsed() > GIVE_UP_AFTER => {
                let flag = remote.flag();
                return Err(failure.and(&format!(
                    "The cycle may have been admitted: see orchestrator status{flag}\nWith --request-id, repeating \
                     the same command gets the same cycle."
                )));
            }
            Err(_) => {
                note("the service does not answer; retrying");
                tokio::time::sleep(PAUSE).await;
            }
            answer => return answer,
        }
    }
}

/// The record of a cycle, if it is retained.
async fn recorded(remote: &Remote, cycle_id: u64) -> Option<Bytes> {
    let mut client = remote.connect().await.ok()?;
    let answer = remote.quickly(client.get_cycle(pb::GetCycleRequest { cycle_id })).await.ok()?;
    Some(answer.into_inner().telemetry)
}

/// Makes the call. It returns at once, unless it is to return the record of its cycle.
async fn ask(remote: &Remote, request: pb::RunCycleRequest) -> Result<pb::RunCycleResponse, Failure> {
    let (mut client, health) = remote.connect_for_long().await?;
    let is_quick = request.r#async || request.validate_only;
    let call = client.run_cycle(request);
    let answer = if is_quick { remote.quickly(call).await } else { remote.patiently(&health, call).await };
    match answer {
        Ok(response) => Ok(response.into_inner()),
        Err(failure) => Err(known::explain(failure, remote, &mut client).await),
    }
}

async fn expired(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

/// The text to print on Ctrl-C.
fn goes_on(remote: &Remote, admitted: Option<u64>) -> String {
    let flag = remote.flag();
    match admitted {
        Some(id) => format!(
            "Cycle {id} continues. To stop it: orchestrator cancel {id}{flag}\n\
             To see its result: orchestrator cycles show {id}{flag}"
        ),
        None => format!("The cycle may have been admitted: see orchestrator status{flag}"),
    }
}

/// The cycle's progress on stderr.
enum RunView {
    Live(Bar),
    Lines,
    Nothing,
}

impl RunView {
    /// With `no_lines`, progress is shown only on a terminal.
    fn new(no_lines: bool, quiet: bool) -> Self {
        match (quiet, is_error_terminal(), no_lines) {
            (false, true, _) => Self::Live(Bar::on_stderr()),
            (false, false, false) => Self::Lines,
            _ => Self::Nothing,
        }
    }

    fn wants_progress(&self) -> bool {
        !matches!(self, Self::Nothing)
    }

    /// Reports why the stream waits, and clears the progress: the service sends it again when the stream resumes.
    fn note(&mut self, text: &str) {
        self.clear();
        note(text);
    }

    /// Shows an event of this cycle. Events of other cycles come in between.
    fn show(&mut self, event: &Event, cycle_id: u64) {
        match (self, event) {
            (Self::Live(bar), Event::Started(event)) if event.cycle_id == cycle_id => bar.start(event),
            (Self::Live(bar), Event::Progress(event)) if event.cycle_id == cycle_id => bar.progress(event),
            (Self::Lines, Event::Started(event)) if event.cycle_id == cycle_id => note(started(event).trim_end()),
            (Self::Lines, Event::Progress(event)) if event.cycle_id == cycle_id => note(progress(event).trim_end()),
            _ => {}
        }
    }

    fn clear(&mut self) {
        if let Self::Live(bar) = self {
            bar.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_shows_only_its_own_cycle() {
        let started = |cycle_id, name: &str| {
            Event::Started(pb::CycleStarted {
                cycle_id,
                subsystems: vec![name.into(), "z".to_owned() + name],
                ..pb::CycleStarted::default()
            })
        };
        let progress = |cycle_id, name: &str| {
            let update = pb::SubsystemProgress {
                name: name.into(),
                state: pb::SubsystemState::Running.into(),
                ..pb::SubsystemProgress::default()
            };
            Event::Progress(pb::CycleProgress { cycle_id, updates: vec![update], dropped: 0 })
        };
        let mut view = RunView::Live(Bar::hidden());
        let shown = |view: &RunView| match view {
            RunView::Live(bar) => bar.shown(),
            RunView::Lines | RunView::Nothing => None,
        };
        // Events of other cycles come before, between and after its own.
        for event in [started(3, "a"), progress(3, "a")] {
            view.show(&event, 4);
        }
        assert_eq!(shown(&view), None);
        for event in [started(4, "b"), progress(3, "a"), progress(4, "b"), started(5, "c"), progress(5, "c")] {
            view.show(&event, 4);
        }
        assert_eq!(shown(&view), Some(("4".into(), 0, "running b".into())));
        view.show(&Event::Recorded(Bytes::new()), 4);
        assert!(shown(&view).is_some());
        // Its progress is not known while the stream is interrupted.
        view.note("the connection is lost; reconnecting");
        assert_eq!(shown(&view), None);
    }
}
