//! `orchestrator watch`: follows recorded and running cycles.

use std::{path::PathBuf, time::Duration};

use tokio::time::Instant;
use tonic::Streaming;

use super::{
    Exit, Failure, HOST,
    cycles::took,
    known,
    output::{
        Format, clean, clean_lines, coarse, count, cycle_state, is_terminal, json, milliseconds, note, one_of, painted,
        print, short, subsystem_state, telemetry, time, trigger,
    },
    pin::{Opened, Witness},
    progress::Bar,
    remote::{Health, Remote, is_passing, reason},
};
use crate::proto::orchestrator::v1::{self as pb, cycle_event::Event};

/// How cycles end, as arguments.
pub(super) const CYCLE_STATES: &[pb::CycleState] = &[
    pb::CycleState::Succeeded,
    pb::CycleState::Degraded,
    pb::CycleState::Failed,
    pb::CycleState::Cancelled,
    pb::CycleState::Interrupted,
];

/// Follow the cycles as they are recorded
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prints every recorded cycle once, in the order in which they were recorded, without a gap. On a terminal, the \
progress of the oldest running cycle is shown below, with the number of other running cycles. Lines of concurrent \
cycles are interleaved; each line names its cycle. If the service restarts, or the connection breaks or does not \
respond, the stream resumes after the last cycle that was shown, and stderr reports it. Ends only with Ctrl-C, or if \
required records are no longer retained (exit code 1), or something does not verify (with --pin, exit code 3). On a terminal, a longer line is cut. Subsystems and loops must exist or be in the history, so that a \
misspelt name is reported.

With --pin, each record is shown once it is proved, about a second after it was written: that the signed log contains \
exactly these bytes, and extends the log of the checkpoint in FILE, which then gets the newer checkpoint. So changes of \
what was seen are detected, even by a program that has the key of the service. `orchestrator checkpoint --pin` creates \
FILE with a key from another source.

Each cycle has a revision, its position in the history: see `orchestrator cycles show`, or the JSON.

Examples:
  orchestrator watch
  orchestrator watch --from-oldest --state failed --state degraded
  orchestrator watch --after 1200 --output json | jq -r .event.recorded.state
  orchestrator watch --progress --loop heartbeat
  orchestrator watch --pin orchestrator.pin")]
pub(super) struct Watch {
    /// Start after this revision; 0 starts with the first record. By default, only new cycles are shown
    #[arg(long, value_name = "REVISION", value_parser = parse_revision)]
    after: Option<u64>,
    /// Start with the oldest retained record
    #[arg(long, conflicts_with = "after")]
    from_oldest: bool,
    /// Also show when each subsystem of a running cycle starts and ends
    #[arg(long)]
    progress: bool,
    /// Only cycles of this loop; may be repeated
    #[arg(long = "loop", value_name = "NAME", value_delimiter = ',')]
    loops: Vec<String>,
    /// Only cycles that ended in this state; may be repeated
    #[arg(long = "state", value_name = "STATE", value_delimiter = ',', value_parser = one_of(CYCLE_STATES, cycle_state))]
    states: Vec<pb::CycleState>,
    /// Only cycles in which this subsystem took part; may be repeated
    #[arg(long = "subsystem", value_name = "NAME", value_delimiter = ',')]
    subsystems: Vec<String>,
    /// Verify each record, and that the log of the history extends the one in FILE, which is created if it does not
    /// exist
    #[arg(long, value_name = "FILE")]
    pin: Option<PathBuf>,
    #[command(flatten)]
    remote: Remote,
}

fn parse_revision(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "give a revision, a whole number: see `orchestrator cycles show`".to_owned())
}

impl Watch {
    /// Follows until it is interrupted.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let request = pb::WatchCyclesRequest {
            after_revision: self.after,
            from_oldest: self.from_oldest,
            progress: self.progress,
            loops: self.loops,
            states: self.states.into_iter().map(Into::into).collect(),
            subsystems: self.subsystems,
            after_epoch: 0,
        };
        let mut client = self.remote.connect().await?;
        // A misspelt name would wait forever.
        known::check(&self.remote, &mut client, &request.subsystems, &request.loops).await?;
        let witness = match self.pin {
            Some(path) => {
                let (mut witness, opened) = Witness::open(&self.remote, path, None).await?;
                witness.hold_newest().await?;
                Some((witness, opened))
            }
            None => None,
        };
        if let Some((witness, Opened::Trusted)) = &witness {
            note(&witness.trusted());
        }
        let witness = witness.map(|(witness, _)| witness);
        follow(&self.remote, request, witness, |_| false).await.map(|()| Exit::Done)
    }
}

/// Shows the stream until it has shown `the_last` event, or is dropped: on a terminal with the oldest running cycle
/// below the recorded ones, otherwise as lines. Starts and ends inside a running cycle have lines only if `request`
/// asks for progress. A `witness` verifies each event before it is shown.
///
/// # Errors
/// The service can't be reached at first, or refuses; an event does not verify; or the output is closed.
pub(super) async fn follow(
    remote: &Remote,
    request: pb::WatchCyclesRequest,
    mut witness: Option<Witness>,
    mut the_last: impl FnMut(&pb::CycleEvent) -> bool,
) -> Result<(), Failure> {
    let mut view = WatchView::new(remote.format, request.progress);
    let request = pb::WatchCyclesRequest { progress: request.progress || view.bar.is_some(), ..request };
    let mut events = Events::open(remote, request, None).await?;
    // The witness finds out more of a history that was rewritten.
    events.compares_epochs = witness.is_none();
    loop {
        let event = events.next(|text| view.note(text)).await?;
        if let Some(witness) = &mut witness {
            view.verify(witness, &event).await?;
        }
        let is_last = the_last(&event);
        view.show(event)?;
        if is_last {
            return Ok(());
        }
    }
}

/// How events are shown.
struct WatchView {
    format: Format,
    /// On a terminal.
    bar: Option<Bar>,
    /// True if starts and ends inside a cycle have lines.
    with_progress: bool,
}

impl WatchView {
    fn new(format: Format, with_progress: bool) -> Self {
        let bar = (!format.is_json() && is_terminal()).then(Bar::on_stdout);
        Self { format, bar, with_progress }
    }

    /// Reports why the stream waits. The service sends running cycles again when it resumes.
    fn note(&mut self, text: &str) {
        if let Some(bar) = &mut self.bar {
            bar.clear();
        }
        note(text);
    }

    /// Verifies an event. If the service is away meanwhile, waits for it without a limit, as the stream does.
    async fn verify(&mut self, witness: &mut Witness, event: &pb::CycleEvent) -> Result<(), Failure> {
        let mut failures = 0;
        loop {
            match witness.see(event).await {
                Err(failure) if failure.exit == Exit::Unreachable => {
                    if failures == 0 {
                        self.note(&clean_lines(&format!("waiting for a proof: {}", failure.message)));
                    }
                }
                verified => return verified,
            }
            Events::pause(&mut failures).await;
            // If this fails, so does the next attempt.
            _ = witness.reconnect().await;
        }
    }

    fn show(&mut self, event: pb::CycleEvent) -> Result<(), Failure> {
        if self.format.is_json() {
            let response = pb::WatchCyclesResponse { event: Some(event) };
            return print(&format!("{}\n", json("WatchCyclesResponse", &response)?));
        }
        // A bar is removed before the line that replaces it.
        let lines = match &event.event {
            Some(Event::Recorded(record)) => {
                let record = telemetry(record)?;
                self.move_bar(|bar| bar.end(record.cycle_id));
                recorded(&record)
            }
            Some(Event::Unreadable(cycle)) => {
                self.move_bar(|bar| bar.end(cycle.cycle_id));
                unreadable(cycle) + "\n"
            }
            Some(Event::Started(event)) => {
                self.move_bar(|bar| bar.start(event));
                if self.with_progress { started(event) } else { String::new() }
            }
            Some(Event::Progress(event)) => {
                self.move_bar(|bar| bar.progress(event));
                if self.with_progress { progress(event) } else { String::new() }
            }
            Some(Event::Bookmark(_)) | None => String::new(),
        };
        match &self.bar {
            None => print(&lines),
            Some(bar) => bar.above(|| print(&self.format.page().cut_lines(&lines))),
        }
    }

    fn move_bar(&mut self, moved: impl FnOnce(&mut Bar)) {
        if let Some(bar) = &mut self.bar {
            moved(bar);
        }
    }
}

/// A recorded cycle in one line.
pub(super) fn recorded(cycle: &pb::CycleTelemetry) -> String {
    let failed = if cycle.error.is_empty() { String::new() } else { format!("  {}", clean(&cycle.error)) };
    format!(
        "{}  cycle {}  {}  {:>7}  {}{failed}\n",
        time(cycle.finished_at.as_ref()),
        cycle.cycle_id,
        painted(cycle_state(cycle.state()), 11),
        took(cycle),
        trigger(cycle.trigger(), &cycle.r#loop),
    )
}

/// A recorded cycle that can't be read in one line.
pub(super) fn unreadable(cycle: &pb::UnreadableCycle) -> String {
    let pb::UnreadableCycle { cycle_id, revision, problem } = cycle;
    let which = if *cycle_id == 0 { "a cycle".to_owned() } else { format!("cycle {cycle_id}") };
    format!("{which}  UNREADABLE  revision {revision}: {}", clean(problem))
}

/// The start of a cycle in one line.
pub(super) fn started(started: &pb::CycleStarted) -> String {
    format!(
        "{}  cycle {}  started      {}, {}\n",
        time(started.started_at.as_ref()),
        started.cycle_id,
        count(started.subsystems.len() as u64, "subsystem"),
        trigger(started.trigger(), &started.r#loop),
    )
}

/// The changes inside a cycle, one line each.
pub(super) fn progress(progress: &pb::CycleProgress) -> String {
    let mut lines = String::new();
    if progress.dropped > 0 {
        lines = format!("cycle {}  {} lost\n", progress.cycle_id, count(progress.dropped, "update"));
    }
    for update in &progress.updates {
        let why = clean(format!("{} {}", update.error_code, update.error_message).trim());
        let attempts = match (update.state(), update.attempts) {
            (_, 0 | 1) => String::new(),
            (pb::SubsystemState::Running, attempt) => format!("  attempt {attempt}"),
            (_, attempts) => format!("  after {}", count(attempts, "attempt")),
        };
        let line = format!(
            "cycle {}  +{:<8} {}  {}{attempts}  {why}",
            progress.cycle_id,
            milliseconds(update.elapsed_ms),
            painted(subsystem_state(update.state()), 12),
            clean(&update.name),
        );
        lines += line.trim_end();
        lines.push('\n');
    }
    lines
}

// ---------------------------------------------------------------------------------------------------------------
// The stream

/// The events of the stream. If the connection breaks or does not respond, or the service restarts, the stream resumes
/// after the last received revision.
pub(super) struct Events {
    remote: Remote,
    request: pb::WatchCyclesRequest,
    health: Health,
    stream: Streaming<pb::WatchCyclesResponse>,
    give_up_after: Option<Duration>,
    /// True if the stream ends where the history was rewritten.
    compares_epochs: bool,
    /// Attempts to resume since the last event.
    failures: u32,
}

impl Events {
    const FIRST_PAUSE: Duration = Duration::from_millis(100);
    /// Longest pause between attempts to reconnect.
    const LONGEST_PAUSE: Duration = Duration::from_secs(5);

    /// Opens the stream. Once it was open, it is resumed without a limit, or until the service has been unreachable for
    /// `give_up_after`.
    ///
    /// # Errors
    /// The service can't be reached, or refuses.
    pub(super) async fn open(
        remote: &Remote,
        request: pb::WatchCyclesRequest,
        give_up_after: Option<Duration>,
    ) -> Result<Self, Failure> {
        let (mut client, health) = remote.connect_for_long().await?;
        let stream = remote.quickly(client.watch_cycles(request.clone())).await?.into_inner();
        Ok(Self { remote: remote.clone(), request, health, stream, give_up_after, compares_epochs: true, failures: 0 })
    }

    /// The next event. `note` is called with the reason of a wait.
    ///
    /// # Errors
    /// The service refuses to resume, or has been unreachable for too long.
    pub(super) async fn next(&mut self, mut note: impl FnMut(&str)) -> Result<pb::CycleEvent, Failure> {
        loop {
            let Ok(message) = self.remote.while_there(&self.health, self.stream.message()).await else {
                self.resume("the service does not answer", &mut note).await?;
                continue;
            };
            match message {
                Ok(Some(pb::WatchCyclesResponse { event: Some(event) })) => {
                    self.failures = 0;
                    self.request.after_revision = Some(event.revision);
                    self.request.after_epoch = if self.compares_epochs { event.epoch } else { 0 };
                    self.request.from_oldest = false;
                    return Ok(event);
                }
                Ok(Some(_)) => {}
                Ok(None) => self.resume("the stream has ended", &mut note).await?,
                Err(status) if is_passing(&status) => {
                    let why = match reason(&status).as_str() {
                        "DRAINING" => "the service is shutting down".to_owned(),
                        "" => "the connection is lost".to_owned(),
                        _ => clean(status.message()),
                    };
                    self.resume(&why, &mut note).await?;
                }
                Err(status) => return Err(self.remote.failure(&status)),
            }
        }
    }

    /// Waits before the next attempt to reach the service, and counts it.
    async fn pause(failures: &mut u32) {
        let pause = Self::FIRST_PAUSE.saturating_mul(1 << (*failures).min(16)).min(Self::LONGEST_PAUSE);
        *failures += 1;
        // Jitter, so that not all watchers reconnect at once.
        tokio::time::sleep(pause.mul_f64(0.5 + HOST.random.fraction() / 2.0)).await;
    }

    async fn resume(&mut self, why: &str, mut note: impl FnMut(&str)) -> Result<(), Failure> {
        let away_since = Instant::now();
        note(&format!("{why}; reconnecting"));
        loop {
            Self::pause(&mut self.failures).await;
            let failure = match self.remote.connect_for_long().await {
                Ok((mut client, health)) => {
                    let opening = client.watch_cycles(self.request.clone());
                    match tokio::time::timeout(Self::LONGEST_PAUSE, opening).await {
                        Ok(Ok(stream)) => {
                            note("connected again");
                            self.health = health;
                            self.stream = stream.into_inner();
                            return Ok(());
                        }
                        Ok(Err(status)) if is_passing(&status) => self.remote.failure(&status),
                        Ok(Err(status)) => return Err(self.remote.failure(&status)),
                        Err(_) => self.remote.late(Self::LONGEST_PAUSE),
                    }
                }
                Err(failure) => failure,
            };
            let away = away_since.elapsed();
            if self.give_up_after.is_some_and(|patience| away > patience) {
                let message = format!("{}\nGave up after {}.", failure.message, short(coarse(away)));
                return Err(Failure::new(Exit::Unreachable, message));
            }
        }
    }
}
