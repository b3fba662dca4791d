//! `orchestrator run`: runs one cycle, shows it as it moves, and then how it ended.

use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;

use super::{
    Exit, Failure,
    cycles::cycle,
    output::{is_error_terminal, json, note, one_of, parse_duration, print, telemetry, word},
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
Waits until the cycle is recorded and shows how it ended. Meanwhile stderr tells how it moves: live on a terminal, else \
line by line (not with --output json).

Leaving (Ctrl-C, or --timeout) does not stop the cycle; `orchestrator cancel` does. When the service restarts meanwhile, \
the cycle is recorded as INTERRUPTED, and this command waits for that, up to a minute.

Exit codes:
  0    it SUCCEEDED, which is also a cycle in which all subsystems were skipped and none failed: stderr says so then;
       with --async: it is admitted; with --validate-only: it could run
  1    refused by the service
  2    wrong usage
  4    the service can't be reached, or the cycle has not ended within --timeout; it may run on
  10   it was DEGRADED: some subsystems failed
  11   it FAILED: all subsystems failed, or a critical one
  12   it was CANCELLED or INTERRUPTED
  130  Ctrl-C; the cycle runs on

Examples:
  orchestrator run
  orchestrator run --subsystem prices --subsystem news --param 'day=\"2026-01-31\"'
  orchestrator run --async --request-id nightly-2026-01-31
  orchestrator run --overlap-policy skip --deadline 30s
  orchestrator run --validate-only
  orchestrator run --output json | jq -r .telemetry.state")]
pub(super) struct Run {
    /// Only this subsystem; may be repeated. The order among them stays
    #[arg(long = "subsystem", value_name = "NAME", value_delimiter = ',')]
    subsystems: Vec<String>,
    #[command(flatten)]
    parameters: Parameters,
    /// Makes the call idempotent: the same id again gets the same cycle. At most 128 bytes
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    request_id: Option<String>,
    /// What to do when another cycle is running [default: buffer_all]
    #[arg(long, value_name = "POLICY", value_parser = one_of(OVERLAP_POLICIES, overlap_policy))]
    overlap_policy: Option<pb::OverlapPolicy>,
    /// Deadline of the cycle, 1ms to 24h [default: the service's cycle.deadline]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    deadline: Option<prost_types::Duration>,
    /// Keep all outputs in the record of this cycle
    #[arg(long)]
    record_outputs: bool,
    /// Return as soon as the cycle is admitted, with its number
    #[arg(long)]
    r#async: bool,
    /// Run nothing: show the plan
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

/// A policy in a word.
pub(super) fn overlap_policy(policy: pb::OverlapPolicy) -> &'static str {
    word(policy.as_str_name(), "OVERLAP_POLICY_")
}

impl Run {
    /// Runs the cycle.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let request = pb::RunCycleRequest {
            subsystems: self.subsystems,
            parameters: self.parameters.encode()?,
            request_id: self.request_id.unwrap_or_default(),
            overlap_policy: self.overlap_policy.map_or(0, Into::into),
            validate_only: self.validate_only,
            // The number is needed early, to cancel it. Waiting is for the stream.
            r#async: !self.validate_only,
            deadline: self.deadline,
            record_outputs: self.record_outputs,
        };
        let remote = &self.remote;
        if self.validate_only {
            let response = remote.quickly(remote.connect().await?.run_cycle(request)).await?.into_inner();
            remote
                .format
                .show("RunCycleResponse", &response, |response| response.plan.as_ref().map(plan).unwrap_or_default())?;
            return Ok(Exit::Done);
        }
        if self.r#async {
            let response = remote.quickly(remote.connect().await?.run_cycle(request)).await?.into_inner();
            remote
                .format
                .show("RunCycleResponse", &response, |response| format!("cycle {} is admitted\n", response.cycle_id))?;
            return Ok(Exit::Done);
        }

        let mut view = View::new(self.quiet || remote.format.is_json(), self.quiet);
        let mut admitted = None;
        let ended = tokio::select! {
            ended = run_and_follow(remote, request, &mut view, &mut admitted) => Some(ended?),
            () = expired(remote.timeout) => None,
            _ = tokio::signal::ctrl_c() => {
                view.clear();
                note(&goes_on(remote, admitted));
                return Ok(Exit::Left);
            }
        };
        view.clear();
        let Some(response) = ended else {
            let mut late = remote.late(remote.timeout.unwrap_or_default());
            late.message = format!("{}\n{}", late.message, goes_on(remote, admitted));
            return Err(late);
        };
        let record = telemetry(&response.telemetry)?;
        if remote.format.is_json() {
            print(&format!("{}\n", json("RunCycleResponse", &response)?))?;
        } else {
            print(&cycle(&record, self.details))?;
            let is_skipped = |part: &pb::SubsystemTelemetry| part.state() == pb::SubsystemState::Skipped;
            if record.state() == pb::CycleState::Succeeded && record.subsystems.iter().all(is_skipped) {
                note("No subsystem was called: all were skipped, or none is registered.");
            }
        }
        Ok(match record.state() {
            pb::CycleState::Succeeded => Exit::Done,
            pb::CycleState::Degraded => Exit::Degraded,
            pb::CycleState::Failed | pb::CycleState::Unspecified => Exit::Failed,
            pb::CycleState::Cancelled | pb::CycleState::Interrupted => Exit::Cancelled,
        })
    }
}

/// Has the cycle admitted, and follows the stream until it is recorded.
async fn run_and_follow(
    remote: &Remote,
    request: pb::RunCycleRequest,
    view: &mut View,
    admitted: &mut Option<u64>,
) -> Result<pb::RunCycleResponse, Failure> {
    /// A restart takes seconds; a service that stays away longer is another matter than this cycle.
    const GIVE_UP_AFTER: Duration = Duration::from_mins(1);
    // Watching begins before the cycle can, so that nothing of it is missed.
    let watch = pb::WatchCyclesRequest { progress: view.wants_progress(), ..pb::WatchCyclesRequest::default() };
    let mut events = Events::open(remote, watch, Some(GIVE_UP_AFTER)).await?;
    // With the first event it is known where to take the stream up again.
    events.next(|text| view.note(text)).await?;
    let response = remote.quickly(remote.connect().await?.run_cycle(request)).await?.into_inner();
    if !response.telemetry.is_empty() {
        // An earlier call with this request id has run it.
        return Ok(response);
    }
    let cycle_id = response.cycle_id;
    *admitted = Some(cycle_id);
    loop {
        let event = events.next(|text| view.note(text)).await?.event;
        match event {
            Some(Event::Recorded(record)) if telemetry(&record)?.cycle_id == cycle_id => {
                return Ok(pb::RunCycleResponse { telemetry: record, ..response });
            }
            Some(event) => view.show(&event, cycle_id),
            None => {}
        }
    }
}

async fn expired(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

/// What to know on leaving.
fn goes_on(remote: &Remote, admitted: Option<u64>) -> String {
    let flag = remote.flag();
    match admitted {
        Some(id) => format!(
            "Cycle {id} goes on. To stop it: orchestrator cancel {id}{flag}\n\
             To see how it ended: orchestrator cycles show {id}{flag}"
        ),
        None => format!("The cycle may have been admitted. To see: orchestrator status{flag}"),
    }
}

/// The cycle's progress on stderr.
enum View {
    Live(Bar),
    Lines,
    Nothing,
}

impl View {
    /// With `no_lines`, only a terminal is shown something.
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

    fn note(&self, text: &str) {
        match self {
            Self::Live(bar) => bar.above(|| note(text)),
            Self::Lines | Self::Nothing => note(text),
        }
    }

    fn show(&mut self, event: &Event, cycle_id: u64) {
        match (self, event) {
            (Self::Live(bar), event) => bar.follow(event),
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
