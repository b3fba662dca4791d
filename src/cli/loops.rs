//! `orchestrator loops`: interval loops.

use clap::Subcommand;
use prost::Message;

use super::{
    Exit, Failure, known,
    output::{age, count, duration, names, note, one_of, parse_duration, payload, print, sections, time, word},
    parameters::Parameters,
    remote::{Client, Remote},
    run::{OVERLAP_POLICIES, overlap_policy},
    subsystems::origin,
    table::{Facts, Page, Table, left, number, right, text},
};
use crate::proto::orchestrator::v1 as pb;

/// List, start, stop and pause the interval loops, which start cycles at a fixed rate
#[derive(Debug, clap::Args)]
pub(super) struct Loops {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the loops with their tick counts
    #[command(
        visible_alias = "ls",
        after_help = "\
DUE is the sum of RAN, SKIPPED (a cycle with a subsystem in common was running or waiting), MISSED (the service was \
down), COALESCED (merged into the cycle of another tick) and DROPPED (refused). The latest ticks that did not run are \
listed below the table.

Examples:
  orchestrator loops list
  orchestrator loops list --output ndjson | jq .ticks"
    )]
    List,
    Start(Box<Start>),
    /// Stop a loop
    #[command(after_help = "\
Its cycles continue. A loop that was started with `loops start` is deleted; a loop that the configuration file \
declares stays listed as stopped, and `loops start NAME` restarts it.

Examples:
  orchestrator loops stop heartbeat")]
    Stop {
        /// Its name
        name: String,
    },
    /// Pause loops: they keep their settings and counts, and have no ticks
    #[command(after_help = "\
Their cycles continue, and `orchestrator run` works as before. A pause survives restarts. --all is a pause of its own: \
loops that are started later are paused as well, and a loop that is also paused by its name stays paused when all are \
resumed. `orchestrator serve --paused` begins with it.

Examples:
  orchestrator loops pause heartbeat
  orchestrator loops pause --all")]
    Pause(Chosen),
    /// End the pause of loops
    #[command(after_help = "\
Their next ticks are those that are due from now on. Two pauses of a loop, by its name and with --all, are ended one by \
one.

Examples:
  orchestrator loops resume heartbeat
  orchestrator loops resume --all")]
    Resume(Chosen),
}

/// The loops that are paused or resumed.
#[derive(Debug, clap::Args)]
struct Chosen {
    /// Their names
    #[arg(value_name = "NAME", required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// All loops, also those that are started later
    #[arg(long)]
    all: bool,
}

/// Start a loop, or change the settings of one
#[derive(Debug, clap::Args)]
#[command(after_help = "\
It survives restarts of the service. To restart a stopped loop that the configuration file declares, give only its \
name. Ticks are due at multiples of the interval since 1970 (UTC), shifted by --offset: give loops with the same \
interval and a subsystem in common different offsets, or they take turns. --subsystem can name a subsystem that is \
registered later; until then its part fails.

Overlap policies, for a tick while a cycle with a subsystem in common runs or waits: skip, its cycle does not run; \
buffer_one, it waits if none of this loop waits yet; buffer_all, it waits in line; cancel_other, those that run are \
cancelled. Loops without a subsystem in common don't delay each other.

Examples:
  orchestrator loops start heartbeat --interval 5s
  orchestrator loops start nightly --interval 24h --offset 2h --catch-up one \\
      --catch-up-window 6h
  orchestrator loops start fast --interval 500ms --subsystem prices,news \\
      --overlap-policy buffer_one
  orchestrator loops start heartbeat")]
struct Start {
    /// Its name
    name: String,
    /// Time between ticks, 10ms to 366 days (8784h)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    interval: Option<prost_types::Duration>,
    /// Shifts the ticks; less than the interval [default: 0s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    offset: Option<prost_types::Duration>,
    /// Largest random delay of each cycle after its tick; less than the interval [default: 0s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    jitter: Option<prost_types::Duration>,
    /// What happens to a tick while a cycle with a subsystem in common runs or waits [default: skip]
    #[arg(long, value_name = "POLICY", value_parser = one_of(OVERLAP_POLICIES, overlap_policy))]
    overlap_policy: Option<pb::OverlapPolicy>,
    /// What happens to ticks that were due while the service was down: none, they are missed; one, the latest tick runs
    /// [default: none]
    #[arg(long, value_name = "WHAT", value_parser = one_of(CATCH_UPS, catch_up))]
    catch_up: Option<pb::CatchUp>,
    /// Largest age of ticks that are caught up [default: 60s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    catch_up_window: Option<prost_types::Duration>,
    /// Only this subsystem; may be repeated [default: all]
    #[arg(long = "subsystem", value_name = "NAME", value_delimiter = ',')]
    subsystems: Vec<String>,
    #[command(flatten)]
    parameters: Parameters,
    /// Deadline of its cycles, 1ms to 24h [default: the service's cycle.deadline]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    deadline: Option<prost_types::Duration>,
    /// Record all outputs of its cycles
    #[arg(long)]
    record_outputs: bool,
}

const CATCH_UPS: &[pb::CatchUp] = &[pb::CatchUp::None, pb::CatchUp::One];

fn catch_up(catch_up: pb::CatchUp) -> &'static str {
    word(catch_up.as_str_name(), "CATCH_UP_")
}

impl Loops {
    /// Runs the subcommand.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let mut client = self.remote.connect().await?;
        match self.command.run(&self.remote, &mut client).await {
            Ok(()) => Ok(Exit::Done),
            Err(failure) => Err(known::explain(failure, &self.remote, &mut client).await),
        }
    }
}

impl Command {
    async fn run(self, remote: &Remote, client: &mut Client) -> Result<(), Failure> {
        let format = remote.format;
        match self {
            Self::List => {
                show(remote, &all(remote, client).await?)?;
            }
            Self::Start(start) => {
                let settings = start.settings()?;
                let subsystems = settings.subsystems.clone();
                let request = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
                let response = remote.quickly(client.start_interval_loop(request)).await?.into_inner();
                format.show("StartIntervalLoopResponse", &response, |response| {
                    one(response.r#loop.as_ref(), format.page())
                })?;
                known::note_missing(remote, client, &subsystems, "until it is, its part in these cycles fails").await;
            }
            Self::Stop { name } => {
                let request = pb::StopIntervalLoopRequest { name };
                let response = remote.quickly(client.stop_interval_loop(request)).await?.into_inner();
                format.show("StopIntervalLoopResponse", &response, |response| {
                    one(response.r#loop.as_ref(), format.page())
                })?;
            }
            Self::Pause(chosen) => {
                let mut loops = Vec::new();
                for (name, all) in chosen.each() {
                    let request = pb::PauseIntervalLoopsRequest { name, all };
                    loops.extend(remote.quickly(client.pause_interval_loops(request)).await?.into_inner().loops);
                }
                show(remote, &loops)?;
            }
            Self::Resume(chosen) => {
                let mut loops = Vec::new();
                for (name, all) in chosen.each() {
                    let request = pb::ResumeIntervalLoopsRequest { name, all };
                    loops.extend(remote.quickly(client.resume_interval_loops(request)).await?.into_inner().loops);
                }
                show(remote, &loops)?;
                let paused = loops.iter().filter(|status| status.paused);
                let paused: Vec<_> = paused.filter_map(|status| Some(status.r#loop.as_ref()?.name.clone())).collect();
                if !paused.is_empty() {
                    let (by, ends) = if chosen.all { ("by name", "NAME") } else { ("with all loops", "--all") };
                    let paused = names(&paused, usize::MAX);
                    note(&format!("still paused {by}: {paused}; `orchestrator loops resume {ends}` ends that"));
                }
            }
        }
        Ok(())
    }
}

impl Chosen {
    /// The name and `all` of each request.
    fn each(&self) -> Vec<(String, bool)> {
        if self.all {
            vec![(String::new(), true)]
        } else {
            self.names.iter().map(|name| (name.clone(), false)).collect()
        }
    }
}

/// Prints loops.
fn show(remote: &Remote, loops: &[pb::IntervalLoopStatus]) -> Result<(), Failure> {
    let Some(mut list) = remote.format.list("loops")? else {
        return print(&table(loops, remote.format.page()));
    };
    for status in loops {
        list.add("IntervalLoopStatus", &status.encode_to_vec())?;
    }
    list.end()
}

/// All loops, by name.
///
/// # Errors
/// The service can't be reached or refuses.
pub(super) async fn all<F: clap::Args>(
    remote: &Remote<F>,
    client: &mut Client,
) -> Result<Vec<pb::IntervalLoopStatus>, Failure> {
    let mut request = pb::ListIntervalLoopsRequest::default();
    let mut loops = Vec::new();
    loop {
        let page = remote.quickly(client.list_interval_loops(request)).await?.into_inner();
        loops.extend(page.loops);
        if page.next_page_token.is_empty() {
            return Ok(loops);
        }
        request = pb::ListIntervalLoopsRequest { page_token: page.next_page_token, ..Default::default() };
    }
}

impl Start {
    fn settings(self) -> Result<pb::IntervalLoop, Failure> {
        Ok(pb::IntervalLoop {
            name: self.name,
            interval: self.interval,
            offset: self.offset,
            jitter: self.jitter,
            overlap_policy: self.overlap_policy.map_or(0, Into::into),
            catch_up: self.catch_up.map_or(0, Into::into),
            catch_up_window: self.catch_up_window,
            subsystems: self.subsystems,
            parameters: self.parameters.encode()?,
            deadline: self.deadline,
            record_outputs: self.record_outputs,
        })
    }
}

/// The loops and their ticks, and below them the ticks that did not run.
pub(super) fn table(loops: &[pb::IntervalLoopStatus], page: Page) -> String {
    let mut table = Table::new([
        left("LOOP"),
        left("INTERVAL"),
        left("NEXT"),
        left("LAST CYCLE").minor(),
        right("DUE"),
        right("RAN"),
        right("SKIPPED"),
        right("MISSED"),
        right("COALESCED").minor(),
        right("DROPPED"),
    ]);
    let mut not_run = Table::new([left("LOOP"), left("TICKS NOT RUN"), left("FROM"), left("TO"), left("WHY")]);
    for status in loops {
        let settings = status.r#loop.clone().unwrap_or_default();
        let ticks = status.ticks.unwrap_or_default();
        table.row([
            text(&settings.name),
            text(duration(settings.interval.as_ref())),
            text(no_ticks(status).map_or_else(|| age(status.next_due_at.as_ref()), str::to_owned)),
            text(if status.last_cycle_id == 0 { "-".to_owned() } else { status.last_cycle_id.to_string() }),
            number(ticks.due),
            number(ticks.ran),
            number(ticks.skipped),
            number(ticks.missed),
            number(ticks.coalesced),
            number(ticks.dropped),
        ]);
        for range in &status.not_run {
            not_run.row([
                text(&settings.name),
                text(count(range.count, "tick")),
                text(time(range.first_due_at.as_ref())),
                text(time(range.last_due_at.as_ref())),
                text(word(range.disposition().as_str_name(), "TICK_DISPOSITION_")),
            ]);
        }
    }
    sections([table.or("no loops", page), not_run.finish_unless_empty(page)])
}

/// Why a loop has no ticks, if it has none.
pub(super) fn no_ticks(status: &pb::IntervalLoopStatus) -> Option<&'static str> {
    match (status.stopped, status.paused) {
        (true, _) => Some("stopped"),
        (false, true) => Some("paused"),
        (false, false) => None,
    }
}

/// One loop with its settings.
fn one(status: Option<&pb::IntervalLoopStatus>, page: Page) -> String {
    let Some(status) = status else { return String::new() };
    let settings = status.r#loop.clone().unwrap_or_default();
    let ticks = status.ticks.unwrap_or_default();
    let mut facts = Facts::new();
    facts.fact("loop", &settings.name);
    facts.fact("declared by", origin(status.origin()));
    let next = || format!("{} ({})", time(status.next_due_at.as_ref()), age(status.next_due_at.as_ref()));
    facts.fact("next tick", no_ticks(status).map_or_else(next, str::to_owned));
    facts.fact("interval", duration(settings.interval.as_ref()));
    facts.fact("offset", duration(settings.offset.as_ref()));
    facts.fact("jitter", duration(settings.jitter.as_ref()));
    facts.fact("overlap policy", overlap_policy(settings.overlap_policy()));
    let window = duration(settings.catch_up_window.as_ref());
    facts.fact("catch up", format!("{}, window {window}", catch_up(settings.catch_up())));
    facts.fact(
        "subsystems",
        if settings.subsystems.is_empty() { "all".to_owned() } else { names(&settings.subsystems, usize::MAX) },
    );
    if status.redacted {
        facts.fact("parameters", "left out: operators see them");
    } else if !settings.parameters.is_empty() {
        facts.fact("parameters", payload(&settings.parameters));
    }
    facts.fact("deadline", duration(settings.deadline.as_ref()));
    if settings.record_outputs {
        facts.fact("outputs", "recorded");
    }
    facts.fact(
        "ticks",
        format!(
            "{} due: {} ran, {} skipped, {} missed, {} coalesced, {} dropped",
            ticks.due, ticks.ran, ticks.skipped, ticks.missed, ticks.coalesced, ticks.dropped
        ),
    );
    facts.finish(page)
}

#[cfg(test)]
mod tests {
    use super::{super::table::tests::assert_screens, *};

    #[test]
    fn a_list_fits_its_terminal() {
        let status = |name: &str, due, skipped, last_cycle_id| pb::IntervalLoopStatus {
            r#loop: Some(pb::IntervalLoop {
                name: name.into(),
                interval: Some(prost_types::Duration { seconds: 90, nanos: 0 }),
                ..pb::IntervalLoop::default()
            }),
            ticks: Some(pb::TickCounts { due, ran: due - skipped, skipped, ..pb::TickCounts::default() }),
            last_cycle_id,
            // The time to the next tick would change with the time of the test.
            stopped: true,
            ..pb::IntervalLoopStatus::default()
        };
        let at = |seconds: i64| Some(prost_types::Timestamp { seconds: 1_795_860_000 + seconds, nanos: 0 });
        let not_run = pb::TickRange {
            count: 21,
            first_due_at: at(0),
            last_due_at: at(1_890),
            disposition: pb::TickDisposition::Skipped.into(),
        };
        let heartbeat = pb::IntervalLoopStatus { not_run: vec![not_run], ..status("heartbeat", 1_204_331, 21, 12_345) };
        let loops = [heartbeat, status("nightly-rebalancing", 4, 0, 0)];
        assert_screens("loops-list", |page| table(&loops, page));
    }
}
