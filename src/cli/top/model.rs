//! The known state of the service. News goes in, rows come out; no I/O, no terminal, no clock.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    time::Duration,
};

use jiff::Timestamp;

use super::super::{
    cycles::{succeeded, why},
    output::{clean, cycle_state, subsystem_state, timestamp, trigger, word},
};
use crate::proto::orchestrator::v1 as pb;

/// Most recorded cycles that are kept: more than the widest terminal has columns.
pub(super) const KEPT_CYCLES: usize = 500;

/// The state of a cycle whose record can't be read.
pub(super) const UNREADABLE: &str = "UNREADABLE";

/// What the user has opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// The subsystem of this name.
    Subsystem(String),
    /// The cycle with this id.
    Cycle(u64),
}

/// A message of the service, or the loss of its connection.
#[derive(Debug)]
pub(super) enum News {
    /// The status of the service, without its last cycle.
    Status(Box<pb::OrchestratorStatus>),
    /// The caller, as the service knows it, and whether rights are enforced.
    Who(Box<pb::WhoAmIResponse>),
    /// A page of the registry. After the last page, the first one follows again.
    Page { subsystems: Vec<pb::SubsystemStatus>, is_last: bool },
    /// One subsystem with its latest output, or why it can't be shown.
    Subsystem(String, Result<Box<pb::SubsystemStatus>, String>),
    /// The record of one cycle, or why it can't be shown.
    Cycle(u64, Result<Box<pb::CycleTelemetry>, String>),
    /// A request got no answer.
    Unanswered(String),
    /// An earlier cycle, from the history.
    Past(Box<pb::CycleTelemetry>),
    /// A cycle was recorded.
    Recorded(Box<pb::CycleTelemetry>),
    /// A recorded cycle, new or earlier, whose record can't be read.
    Unreadable(pb::UnreadableCycle),
    /// A cycle has started, or was running when the stream started.
    Started(pb::CycleStarted),
    /// A running cycle has made progress.
    Progress(pb::CycleProgress),
    /// The stream is up to date.
    CaughtUp,
    /// The stream is interrupted, with the reason.
    Lost(String),
    /// The known cycles belong to another history.
    Forget,
}

/// The known state.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// The address of the service.
    pub(super) address: String,
    /// The last status.
    pub(super) status: Option<pb::OrchestratorStatus>,
    /// The caller, and whether rights are enforced.
    pub(super) who: Option<pb::WhoAmIResponse>,
    /// The reason and start of an interruption of the stream.
    pub(super) lost: Option<(String, Timestamp)>,
    /// The last error of a request.
    pub(super) unanswered: Option<String>,
    /// True once every page of the registry has been read.
    pub(super) is_loaded: bool,
    /// The latest recorded cycles, by increasing revision.
    pub(super) cycles: BTreeMap<u64, Cycle>,
    /// The running cycles, by id.
    pub(super) live: BTreeMap<u64, Live>,
    /// Highest number of concurrent cycles so far.
    pub(super) most_live: usize,
    subsystems: BTreeMap<String, Subsystem>,
    /// Number of complete readings of the registry, so that unregistered subsystems can be recognized.
    reading: u64,
}

/// A cycle in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    /// 0 if it can't be read.
    pub(super) id: u64,
    /// 0 until it is recorded.
    revision: u64,
}

impl Listed {
    /// True if both are the same cycle, which may have been recorded since.
    pub(super) fn is_of(self, other: Self) -> bool {
        self.id == other.id && (self.id != 0 || self.revision == other.revision)
    }
}

/// The summary of a recorded cycle.
#[derive(Clone, Debug)]
pub(super) struct Cycle {
    /// 0 if it can't be read either.
    id: u64,
    /// [`UNREADABLE`] if its record can't be read: then only its error is set.
    pub(super) state: &'static str,
    pub(super) trigger: String,
    pub(super) finished_at: Option<Timestamp>,
    pub(super) duration_ms: f64,
    pub(super) succeeded: String,
    pub(super) error: String,
}

/// The known state of one subsystem.
#[derive(Debug, Default)]
struct Subsystem {
    /// `None` until it has been read from the registry.
    registered: Option<Registered>,
    part: Option<Part>,
    output: Option<Output>,
    /// The last cycle with it whose start was received.
    live_in: Option<u64>,
    /// The last reading of the registry that contained it.
    reading: u64,
}

/// The state of a subsystem in the registry.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) endpoint: String,
    pub(super) suspended: bool,
    /// `CLOSED`, `OPEN` or `HALF_OPEN`; a dash if it is disabled.
    pub(super) breaker: &'static str,
    pub(super) lease_expires_at: Option<Timestamp>,
}

/// A subsystem's part in the last cycle in which it has ended.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) cycle_id: u64,
    pub(super) state: &'static str,
    /// True if it counts as a failure of the cycle.
    pub(super) failed: bool,
    /// `None` if it was not called.
    pub(super) duration_ms: Option<f64>,
    pub(super) attempts: u32,
    pub(super) reason: String,
    finished_at: Option<Timestamp>,
}

/// A subsystem's latest output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    /// The cycle that made it.
    pub(super) cycle_id: u64,
    /// When it was made, if known.
    pub(super) made_at: Option<Timestamp>,
}

/// A running cycle.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) cycle_id: u64,
    pub(super) trigger: String,
    pub(super) started_at: Option<Timestamp>,
    /// In the order of the plan.
    pub(super) stands: Vec<Stand>,
    positions: HashMap<String, usize>,
}

/// The state of a subsystem's part in a running cycle.
#[derive(Clone, Debug)]
pub(super) struct Stand {
    pub(super) name: String,
    pub(super) state: pb::SubsystemState,
    /// When the start of its first call was received, in milliseconds since the cycle's start.
    pub(super) began_ms: Option<f64>,
}

/// Number of parts of a running cycle by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) waiting: usize,
    pub(super) running: usize,
    pub(super) succeeded: usize,
    pub(super) failed: usize,
    /// Skipped, or cancelled.
    pub(super) other: usize,
}

/// One subsystem for display.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    pub(super) name: &'a str,
    pub(super) registered: &'a Registered,
    pub(super) part: Option<&'a Part>,
    pub(super) output: Option<Output>,
    /// The running cycle that it is in, and the state of its part.
    pub(super) live: Option<(&'a Live, &'a Stand)>,
}

/// The columns of the fleet, which it can be sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Column {
    #[default]
    Subsystem,
    Last,
    Duration,
    Attempts,
    Breaker,
    Output,
    Reason,
}

impl Column {
    pub(super) const ALL: [Self; 7] =
        [Self::Subsystem, Self::Last, Self::Duration, Self::Attempts, Self::Breaker, Self::Output, Self::Reason];

    /// True if it is sorted from A to Z, otherwise the largest or worst value comes first.
    pub(super) fn is_text(self) -> bool {
        matches!(self, Self::Subsystem | Self::Reason)
    }

    /// Its heading.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Subsystem => "SUBSYSTEM",
            Self::Last => "LAST",
            Self::Duration => "DURATION",
            Self::Attempts => "ATTEMPTS",
            Self::Breaker => "BREAKER",
            Self::Output => "OUTPUT",
            Self::Reason => "REASON",
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// What goes in

impl Model {
    pub(super) fn new(address: String) -> Self {
        Self { address, reading: 1, ..Self::default() }
    }

    /// Takes in news.
    pub(super) fn learn(&mut self, news: News, now: Timestamp) {
        match news {
            News::Status(status) => {
                self.status = Some(*status);
                self.unanswered = None;
            }
            News::Who(who) => self.who = Some(*who),
            News::Page { subsystems, is_last } => self.read(subsystems, is_last),
            // The view takes them, not the model.
            News::Subsystem(..) | News::Cycle(..) => {}
            News::Unanswered(why) => self.unanswered = Some(why),
            // The registry has the last part of each subsystem.
            News::Past(cycle) => self.keep(cycle.revision, Cycle::new(&cycle)),
            News::Recorded(cycle) => {
                self.is_heard();
                self.live.remove(&cycle.cycle_id);
                self.record(&cycle);
            }
            News::Unreadable(cycle) => {
                self.is_heard();
                self.live.remove(&cycle.cycle_id);
                // If the revision can't be read either, the id is used instead.
                let revision = if cycle.revision == 0 { cycle.cycle_id } else { cycle.revision };
                self.keep(revision, Cycle::unreadable(&cycle));
            }
            News::Started(started) => {
                self.is_heard();
                self.start(started);
            }
            News::Progress(progress) => {
                self.is_heard();
                let Some(live) = self.live.get_mut(&progress.cycle_id) else { return };
                for update in &progress.updates {
                    if let Some(part) = live.update(update) {
                        self.subsystems.entry(update.name.clone()).or_default().take_part(part);
                    }
                }
            }
            News::CaughtUp => self.is_heard(),
            News::Lost(why) => {
                let since = self.lost.take().map_or(now, |(_, since)| since);
                self.lost = Some((why, since));
            }
            News::Forget => {
                self.cycles.clear();
                self.live.clear();
                self.subsystems.values_mut().for_each(|it| (it.part, it.output) = (None, None));
            }
        }
    }

    /// The stream resumes. The service sends cycles again that were running before the interruption.
    fn is_heard(&mut self) {
        if self.lost.take().is_some() {
            self.live.clear();
        }
    }

    fn start(&mut self, started: pb::CycleStarted) {
        let cycle_id = started.cycle_id;
        for name in &started.subsystems {
            let known = self.subsystems.entry(name.clone()).or_default();
            // A subsystem is in one cycle at a time: the earlier cycle has ended, even if its record was not received.
            if let Some(before) = known.live_in.replace(cycle_id).filter(|before| *before != cycle_id) {
                self.live.remove(&before);
            }
        }
        self.live.insert(cycle_id, Live::new(started));
        self.most_live = self.most_live.max(self.live.len());
    }

    fn record(&mut self, cycle: &pb::CycleTelemetry) {
        for part in &cycle.subsystems {
            let known = self.subsystems.entry(part.name.clone()).or_default();
            known.take_part(Part::new(cycle.cycle_id, part));
        }
        self.keep(cycle.revision, Cycle::new(cycle));
    }

    fn keep(&mut self, revision: u64, cycle: Cycle) {
        self.cycles.insert(revision, cycle);
        if self.cycles.len() > KEPT_CYCLES {
            self.cycles.pop_first();
        }
    }

    fn read(&mut self, page: Vec<pb::SubsystemStatus>, is_last: bool) {
        for status in page {
            let breaker = word(status.breaker().as_str_name(), "BREAKER_STATE_");
            let registration = status.registration.unwrap_or_default();
            let known = self.subsystems.entry(registration.name).or_default();
            known.reading = self.reading;
            known.registered = Some(Registered {
                endpoint: clean(&registration.endpoint),
                suspended: status.suspended,
                breaker: if registration.breaker.is_some_and(|breaker| breaker.disabled) { "-" } else { breaker },
                lease_expires_at: status.lease_expires_at.as_ref().and_then(timestamp),
            });
            if let Some(last) = &status.last {
                known.take_part(Part::new(status.last_cycle_id, last));
            }
            let cycle_id = status.output_cycle_id;
            known.output = match known.output {
                _ if cycle_id == 0 => None,
                // The stream may be ahead of the registry.
                Some(output) if output.cycle_id >= cycle_id => Some(output),
                _ => {
                    let maker = self.cycles.values().rev().find(|cycle| cycle.id == cycle_id);
                    let made_at = maker.and_then(|cycle| cycle.finished_at);
                    Some(Output { cycle_id, made_at })
                }
            };
        }
        if is_last {
            let reading = self.reading;
            self.subsystems.retain(|_, known| known.reading == reading);
            self.reading += 1;
            self.is_loaded = true;
        }
    }
}

impl Subsystem {
    fn take_part(&mut self, part: Part) {
        if self.part.as_ref().is_some_and(|known| known.cycle_id > part.cycle_id) {
            return;
        }
        if part.state == subsystem_state(pb::SubsystemState::Succeeded) {
            self.output = Some(Output { cycle_id: part.cycle_id, made_at: part.finished_at });
        }
        self.part = Some(part);
    }
}

impl Part {
    fn new(cycle_id: u64, part: &pb::SubsystemTelemetry) -> Self {
        let skipped_by_choice =
            matches!(part.skip_reason(), pb::SkipReason::Suspended | pb::SkipReason::RequirementLeftOut);
        let is_skipped = part.state() == pb::SubsystemState::Skipped;
        Self {
            cycle_id,
            state: subsystem_state(part.state()),
            failed: is_failure(part.state()) || (is_skipped && !skipped_by_choice),
            duration_ms: part.started_at.map(|_| part.duration_ms),
            attempts: part.attempts,
            reason: clean(&why(part)),
            finished_at: part.finished_at.as_ref().and_then(timestamp),
        }
    }
}

/// True if it failed by itself.
fn is_failure(state: pb::SubsystemState) -> bool {
    matches!(state, pb::SubsystemState::Failed | pb::SubsystemState::TimedOut | pb::SubsystemState::CircuitOpen)
}

impl Cycle {
    fn new(cycle: &pb::CycleTelemetry) -> Self {
        Self {
            id: cycle.cycle_id,
            state: cycle_state(cycle.state()),
            trigger: trigger(cycle.trigger(), &cycle.r#loop),
            finished_at: cycle.finished_at.as_ref().and_then(timestamp),
            duration_ms: cycle.duration_ms,
            succeeded: succeeded(cycle),
            error: clean(&cycle.error),
        }
    }

    fn unreadable(cycle: &pb::UnreadableCycle) -> Self {
        Self {
            id: cycle.cycle_id,
            state: UNREADABLE,
            trigger: "-".to_owned(),
            finished_at: None,
            duration_ms: 0.0,
            succeeded: "-".to_owned(),
            error: format!("its record can't be read: {}", clean(&cycle.problem)),
        }
    }

    /// Its id, if known.
    pub(super) fn number(&self) -> String {
        if self.id == 0 { "?".to_owned() } else { self.id.to_string() }
    }

    /// True if its duration and its parts are known: those of an interrupted cycle are not.
    pub(super) fn has_result(&self) -> bool {
        self.state != cycle_state(pb::CycleState::Interrupted) && self.state != UNREADABLE
    }
}

impl Live {
    fn new(started: pb::CycleStarted) -> Self {
        let mut live = Self {
            cycle_id: started.cycle_id,
            trigger: trigger(started.trigger(), &started.r#loop),
            started_at: started.started_at.as_ref().and_then(timestamp),
            stands: Vec::with_capacity(started.subsystems.len()),
            positions: HashMap::with_capacity(started.subsystems.len()),
        };
        started.subsystems.into_iter().for_each(|name| _ = live.stand(name));
        live
    }

    fn stand(&mut self, name: String) -> &mut Stand {
        let position = *self.positions.entry(name.clone()).or_insert_with(|| {
            self.stands.push(Stand { name, state: pb::SubsystemState::Waiting, began_ms: None });
            self.stands.len() - 1
        });
        &mut self.stands[position]
    }

    /// Applies an update, and returns the part of the subsystem if it has ended. Further details come with the record.
    fn update(&mut self, update: &pb::SubsystemProgress) -> Option<Part> {
        let state = update.state();
        let stand = self.stand(update.name.clone());
        stand.state = state;
        match state {
            // Only the record says whether a skipped part counts as a failure.
            pb::SubsystemState::Unspecified | pb::SubsystemState::Waiting | pb::SubsystemState::Skipped => return None,
            pb::SubsystemState::Running => {
                // A further attempt does not change when the part began.
                stand.began_ms.get_or_insert(update.elapsed_ms);
                return None;
            }
            _ => {}
        }
        let began_ms = stand.began_ms;
        Some(Part {
            cycle_id: self.cycle_id,
            state: subsystem_state(state),
            failed: is_failure(state),
            duration_ms: began_ms.map(|began_ms| update.elapsed_ms - began_ms),
            attempts: update.attempts,
            reason: clean(format!("{} {}", update.error_code, update.error_message).trim()),
            finished_at: self.started_at.map(|at| {
                let elapsed = Duration::try_from_secs_f64(update.elapsed_ms / 1e3).unwrap_or_default();
                at.saturating_add(elapsed).unwrap_or(at)
            }),
        })
    }

    /// Number of parts by state.
    pub(super) fn counts(&self) -> Counts {
        self.counts_of(0..self.stands.len())
    }

    /// Number of these parts by state.
    pub(super) fn counts_of(&self, range: Range<usize>) -> Counts {
        let mut counts = Counts::default();
        for stand in &self.stands[range] {
            *match stand.state {
                pb::SubsystemState::Waiting | pb::SubsystemState::Unspecified => &mut counts.waiting,
                pb::SubsystemState::Running => &mut counts.running,
                pb::SubsystemState::Succeeded => &mut counts.succeeded,
                state if is_failure(state) => &mut counts.failed,
                _ => &mut counts.other,
            } += 1;
        }
        counts
    }

    /// The parts that are being called, the longest first.
    pub(super) fn running(&self) -> Vec<&Stand> {
        let mut running: Vec<_> = self.stands.iter().filter(|it| it.state == pb::SubsystemState::Running).collect();
        running.sort_by(|a, b| a.began_ms.unwrap_or(0.0).total_cmp(&b.began_ms.unwrap_or(0.0)));
        running
    }
}

impl Counts {
    /// Number of parts that have ended.
    pub(super) fn ended(self) -> usize {
        self.succeeded + self.failed + self.other
    }
}

// ---------------------------------------------------------------------------------------------------------------
// What comes out

impl Model {
    /// The registered subsystems, by name.
    pub(super) fn fleet(&self) -> impl Iterator<Item = Row<'_>> {
        self.subsystems.iter().filter_map(|(name, known)| self.shown(name, known))
    }

    /// One registered subsystem.
    pub(super) fn row(&self, name: &str) -> Option<Row<'_>> {
        self.subsystems.get_key_value(name).and_then(|(name, known)| self.shown(name, known))
    }

    fn shown<'a>(&'a self, name: &'a str, known: &'a Subsystem) -> Option<Row<'a>> {
        let registered = known.registered.as_ref()?;
        let live = known.live_in.and_then(|cycle_id| self.live.get(&cycle_id));
        let live = live.and_then(|live| Some((live, &live.stands[*live.positions.get(name)?])));
        Some(Row { name, registered, part: known.part.as_ref(), output: known.output, live })
    }

    /// The cycles in the order in which they are listed: running, waiting and recorded ones, each the newest first.
    pub(super) fn listed(&self) -> Vec<Listed> {
        let running = self.live.keys().rev().map(|id| Listed { id: *id, revision: 0 });
        let waiting = self.waiting().into_iter().rev().map(|it| Listed { id: it.cycle_id, revision: 0 });
        let recorded = self.cycles.iter().rev().map(|(revision, it)| Listed { id: it.id, revision: *revision });
        running.chain(waiting).chain(recorded).collect()
    }

    /// The waiting cycles of the last status, except those that run or are recorded since then.
    pub(super) fn waiting(&self) -> Vec<&pb::WaitingCycle> {
        let recorded: HashSet<u64> = self.cycles.values().map(|cycle| cycle.id).collect();
        let waiting = self.status.iter().flat_map(|status| &status.waiting_cycles);
        waiting.filter(|it| !self.live.contains_key(&it.cycle_id) && !recorded.contains(&it.cycle_id)).collect()
    }

    /// The rows with this text, in this order: failures and the largest values first, names from A to Z.
    pub(super) fn rows(&self, filter: &str, by: Column, reversed: bool) -> Vec<Row<'_>> {
        let filter = filter.to_lowercase();
        let mut rows: Vec<_> = self.fleet().filter(|row| row.has(&filter)).collect();
        // Rows are in the order of their names, and the sort is stable.
        match by {
            Column::Subsystem => {}
            Column::Last => rows.sort_by_key(|row| (row.severity(), row.last())),
            Column::Duration => rows.sort_by(|a, b| b.duration_ms().total_cmp(&a.duration_ms())),
            Column::Attempts => rows.sort_by_key(|row| Reverse(row.part.map_or(0, |part| part.attempts))),
            Column::Breaker => rows.sort_by_key(|row| match row.registered.breaker {
                "OPEN" => 0,
                "HALF_OPEN" => 1,
                _ => 2,
            }),
            Column::Output => rows.sort_by(|a, b| match (a.output, b.output) {
                (Some(a), Some(b)) => a.made_at.cmp(&b.made_at).then(a.cycle_id.cmp(&b.cycle_id)),
                (a, b) => a.is_some().cmp(&b.is_some()),
            }),
            Column::Reason => rows.sort_by(|a, b| match (a.reason(), b.reason()) {
                ("", "") => Ordering::Equal,
                ("", _) => Ordering::Greater,
                (_, "") => Ordering::Less,
                (a, b) => a.cmp(b),
            }),
        }
        if reversed {
            rows.reverse();
        }
        rows
    }

    /// Number of recorded cycles. Each has the next revision, and the stream is ahead of the status.
    pub(super) fn total_cycles(&self) -> u64 {
        let newest = self.cycles.last_key_value().map_or(0, |(revision, _)| *revision);
        let (total, then) = self.status.as_ref().map_or((0, 0), |status| (status.total_cycles, status.newest_revision));
        total + newest.saturating_sub(then)
    }
}

impl<'a> Row<'a> {
    /// The state of its last part; a dash before the first.
    pub(super) fn last(&self) -> &'static str {
        self.part.map_or("-", |part| part.state)
    }

    /// FRESH if its last part made its latest output.
    pub(super) fn freshness(&self) -> &'static str {
        match (self.output, self.part) {
            (None, _) => "ABSENT",
            (Some(output), Some(part)) if part.cycle_id > output.cycle_id => "STALE",
            (Some(_), _) => "FRESH",
        }
    }

    /// Why its last part did not succeed.
    pub(super) fn reason(&self) -> &'a str {
        self.part.map_or("", |part| part.reason.as_str())
    }

    /// True if its last part counts as a failure.
    pub(super) fn is_failing(&self) -> bool {
        self.part.is_some_and(|part| part.failed)
    }

    fn severity(&self) -> u8 {
        match self.last() {
            _ if self.is_failing() => 0,
            "SUCCEEDED" => 3,
            "-" => 2,
            _ => 1,
        }
    }

    fn duration_ms(&self) -> f64 {
        self.part.and_then(|part| part.duration_ms).unwrap_or(-1.0)
    }

    /// True if any shown cell contains this text, which is in lower case.
    fn has(&self, filter: &str) -> bool {
        let suspended = if self.registered.suspended { "suspended" } else { "" };
        let Registered { endpoint, breaker, .. } = self.registered;
        let shown = [self.name, self.last(), self.reason(), self.freshness(), breaker, endpoint, suspended];
        filter.is_empty() || shown.iter().any(|text| text.to_lowercase().contains(filter))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn time(seconds: i64) -> prost_types::Timestamp {
        crate::proto::timestamp(at(seconds))
    }

    pub(in super::super) fn registered(name: &str) -> pb::SubsystemStatus {
        let registration = pb::Registration {
            name: name.into(),
            endpoint: "http://127.0.0.1:1".into(),
            ..pb::Registration::default()
        };
        pb::SubsystemStatus {
            registration: Some(registration),
            breaker: pb::BreakerState::Closed.into(),
            ..pb::SubsystemStatus::default()
        }
    }

    pub(in super::super) fn part(name: &str, state: pb::SubsystemState, duration_ms: f64) -> pb::SubsystemTelemetry {
        let failed = state == pb::SubsystemState::Failed;
        pb::SubsystemTelemetry {
            name: name.into(),
            state: state.into(),
            started_at: Some(time(0)),
            finished_at: Some(time(0)),
            duration_ms,
            attempts: if failed { 3 } else { 1 },
            error_code: if failed { "INTERNAL".into() } else { String::new() },
            error_message: if failed { format!("{name} is \x1b[31mbroken") } else { String::new() },
            ..pb::SubsystemTelemetry::default()
        }
    }

    /// A cycle that ended this number of seconds after the epoch, together with all its parts.
    pub(in super::super) fn cycle(
        cycle_id: u64,
        seconds: i64,
        state: pb::CycleState,
        mut subsystems: Vec<pb::SubsystemTelemetry>,
    ) -> pb::CycleTelemetry {
        for part in &mut subsystems {
            part.finished_at = Some(time(seconds));
        }
        pb::CycleTelemetry {
            cycle_id,
            revision: cycle_id,
            state: state.into(),
            finished_at: Some(time(seconds)),
            duration_ms: 100.0 * f64::from(u32::try_from(cycle_id).unwrap()),
            trigger: pb::Trigger::Loop.into(),
            r#loop: "heartbeat".into(),
            error: if state == pb::CycleState::Succeeded { String::new() } else { "1 of 2 failed".into() },
            subsystems,
            ..pb::CycleTelemetry::default()
        }
    }

    pub(in super::super) fn started(cycle_id: u64, seconds: i64, names: &[&str]) -> News {
        News::Started(pb::CycleStarted {
            cycle_id,
            started_at: Some(time(seconds)),
            subsystems: names.iter().map(|&name| name.into()).collect(),
            ..pb::CycleStarted::default()
        })
    }

    pub(in super::super) fn progress(cycle_id: u64, updates: &[(&str, pb::SubsystemState)]) -> News {
        let updates = updates.iter().map(|&(name, state)| pb::SubsystemProgress {
            name: name.into(),
            state: state.into(),
            elapsed_ms: 500.0,
            ..pb::SubsystemProgress::default()
        });
        News::Progress(pb::CycleProgress { cycle_id, updates: updates.collect(), dropped: 0 })
    }

    pub(in super::super) fn page(subsystems: Vec<pb::SubsystemStatus>) -> News {
        News::Page { subsystems, is_last: true }
    }

    pub(in super::super) fn knowing(news: impl IntoIterator<Item = News>) -> Model {
        let mut model = Model::new("http://127.0.0.1:7700".into());
        news.into_iter().for_each(|news| model.learn(news, at(0)));
        model
    }

    fn recorded(cycle: pb::CycleTelemetry) -> News {
        News::Recorded(Box::new(cycle))
    }

    fn names<'a>(rows: &[Row<'a>]) -> Vec<&'a str> {
        rows.iter().map(|row| row.name).collect()
    }

    #[test]
    fn a_cycle_progresses_and_ends() {
        use pb::SubsystemState::{Failed, Running, Skipped, Succeeded};
        let mut model = knowing([page(vec![registered("a"), registered("b"), registered("c")])]);
        model.learn(started(4, 0, &["a", "b", "c"]), at(0));
        model.learn(progress(4, &[("a", Running), ("b", Running)]), at(0));
        model.learn(progress(3, &[("c", Running)]), at(0));
        let live = &model.live[&4];
        assert_eq!(live.counts(), Counts { waiting: 1, running: 2, ..Counts::default() });
        assert_eq!(live.running()[0].name, "a");
        model.learn(progress(4, &[("a", Failed), ("b", Succeeded), ("c", Skipped)]), at(0));
        let counts = model.live[&4].counts();
        assert_eq!(counts, Counts { succeeded: 1, failed: 1, other: 1, ..Counts::default() });
        assert_eq!(counts.ended(), 3);
        let row = model.row("a").unwrap();
        assert_eq!((row.last(), row.part.unwrap().duration_ms, row.reason()), ("FAILED", Some(0.0), ""));
        assert_eq!(model.row("b").unwrap().freshness(), "FRESH");
        let parts = vec![part("a", Failed, 3.0), part("b", Succeeded, 2.0)];
        model.learn(recorded(cycle(4, 1, pb::CycleState::Degraded, parts)), at(1));
        assert!(model.live.is_empty());
        assert_eq!((model.total_cycles(), model.cycles[&4].state), (4, "DEGRADED"));
        assert_eq!(model.row("a").unwrap().reason(), "INTERNAL a is [31mbroken");
    }

    #[test]
    fn freshness_is_that_of_the_latest_output() {
        use pb::SubsystemState::{Failed, Succeeded};
        let mut model = knowing([page(vec![registered("a"), registered("b")])]);
        assert_eq!(model.row("a").unwrap().freshness(), "ABSENT");
        model.learn(recorded(cycle(1, 1, pb::CycleState::Succeeded, vec![part("a", Succeeded, 1.0)])), at(1));
        assert_eq!(model.row("a").unwrap().freshness(), "FRESH");
        model.learn(recorded(cycle(2, 9, pb::CycleState::Degraded, vec![part("a", Failed, 1.0)])), at(9));
        let stale = model.row("a").unwrap();
        assert_eq!((stale.freshness(), stale.output.unwrap().made_at), ("STALE", Some(at(1))));
        // A page that is older than the stream does not change the rows; nor does a page after a restart.
        let old = pb::SubsystemStatus {
            last: Some(part("a", Succeeded, 1.0)),
            last_cycle_id: 1,
            output_cycle_id: 1,
            ..registered("a")
        };
        model.learn(page(vec![old]), at(9));
        assert_eq!((model.row("a").unwrap().last(), model.row("a").unwrap().freshness()), ("FAILED", "STALE"));
        // After a new registration, it has no output.
        model.learn(page(vec![registered("a")]), at(9));
        assert_eq!(model.row("a").unwrap().freshness(), "ABSENT");
    }

    #[test]
    fn unregistered_subsystems_are_removed_after_all_pages() {
        let first = News::Page { subsystems: vec![registered("a")], is_last: false };
        let mut model = knowing([first, page(vec![registered("b")])]);
        assert_eq!(names(&model.rows("", Column::Subsystem, false)), ["a", "b"]);
        model.learn(News::Page { subsystems: vec![registered("b")], is_last: false }, at(1));
        assert!(model.row("a").is_some());
        model.learn(page(vec![]), at(1));
        assert_eq!(names(&model.rows("", Column::Subsystem, false)), ["b"]);
    }

    #[test]
    fn rows_are_sorted_and_filtered() {
        use pb::SubsystemState::{Failed, Succeeded, TimedOut};
        let open = pb::SubsystemStatus { breaker: pb::BreakerState::Open.into(), ..registered("c") };
        let suspended = pb::SubsystemStatus { suspended: true, ..registered("d") };
        let parts = vec![part("a", Succeeded, 5.0), part("b", Failed, 9.0), part("c", TimedOut, 7.0)];
        let model = knowing([
            page(vec![registered("a"), registered("b"), open, suspended]),
            recorded(cycle(1, 1, pb::CycleState::Degraded, parts)),
        ]);
        let sorted = |by, reversed| names(&model.rows("", by, reversed));
        assert_eq!(sorted(Column::Subsystem, true), ["d", "c", "b", "a"]);
        assert_eq!(sorted(Column::Last, false), ["b", "c", "d", "a"]);
        assert_eq!(sorted(Column::Duration, false), ["b", "c", "a", "d"]);
        assert_eq!(sorted(Column::Attempts, false), ["b", "a", "c", "d"]);
        assert_eq!(sorted(Column::Breaker, false), ["c", "a", "b", "d"]);
        assert_eq!(sorted(Column::Output, true), ["a", "d", "c", "b"]);
        assert_eq!(sorted(Column::Reason, false), ["b", "a", "c", "d"]);
        let filtered = |filter| names(&model.rows(filter, Column::Subsystem, false));
        for (filter, found) in [("B", vec!["b", "c", "d"]), ("suspend", vec!["d"]), ("timed_out", vec!["c"])] {
            // "b" is also in ABSENT.
            assert_eq!(filtered(filter), found, "{filter}");
        }
        assert!(filtered("nothing has this").is_empty());
    }

    #[test]
    fn a_lost_connection_keeps_the_last_known_state_until_the_stream_continues() {
        let mut model = knowing([page(vec![registered("a")]), started(7, 0, &["a"])]);
        model.learn(News::Lost("the connection is lost".into()), at(5));
        model.learn(News::Lost("still".into()), at(8));
        assert_eq!(model.lost, Some(("still".into(), at(5))));
        assert!(model.live.contains_key(&7));
        model.learn(News::CaughtUp, at(9));
        assert!(model.lost.is_none() && model.live.is_empty());
        model.learn(News::Forget, at(9));
        assert!(model.cycles.is_empty() && model.row("a").is_some());
    }

    #[test]
    fn the_history_is_bounded() {
        let many = u64::try_from(KEPT_CYCLES).unwrap() + 10;
        let model = knowing((1..=many).map(|id| recorded(cycle(id, 0, pb::CycleState::Succeeded, vec![]))));
        assert_eq!((model.cycles.len(), model.total_cycles()), (KEPT_CYCLES, many));
    }

    #[test]
    fn cycles_run_side_by_side_and_end_in_any_order() {
        use pb::SubsystemState::{Failed, Running, Succeeded};
        let mut model = knowing([page(["a", "b", "c", "d"].map(registered).to_vec())]);
        model.learn(started(4, 0, &["a", "b"]), at(0));
        model.learn(started(5, 1, &["c"]), at(1));
        model.learn(progress(5, &[("c", Running)]), at(1));
        model.learn(progress(4, &[("a", Running)]), at(1));
        model.learn(progress(4, &[("a", Failed)]), at(1));
        let stand = |model: &Model, name| model.row(name).unwrap().live.map(|(live, it)| (live.cycle_id, it.state));
        assert_eq!(stand(&model, "a"), Some((4, Failed)));
        assert_eq!(stand(&model, "b"), Some((4, pb::SubsystemState::Waiting)));
        assert_eq!(stand(&model, "c"), Some((5, Running)));
        assert_eq!(stand(&model, "d"), None);

        // The later cycle ends first, and the earlier one continues.
        let ended = pb::CycleTelemetry {
            revision: 4,
            ..cycle(5, 2, pb::CycleState::Succeeded, vec![part("c", Succeeded, 1.0)])
        };
        model.learn(recorded(ended), at(2));
        assert_eq!((stand(&model, "c"), stand(&model, "a")), (None, Some((4, Failed))));
        let ended =
            pb::CycleTelemetry { revision: 5, ..cycle(4, 3, pb::CycleState::Degraded, vec![part("a", Failed, 1.0)]) };
        model.learn(recorded(ended), at(3));
        assert_eq!((model.live.len(), model.most_live), (0, 2));
        let last = model.cycles.last_key_value().unwrap();
        assert_eq!((*last.0, last.1.id, model.total_cycles()), (5, 4, 5));
    }

    #[test]
    fn a_cycle_has_ended_if_another_one_has_its_subsystem() {
        let mut model = knowing([page(["a", "b", "c"].map(registered).to_vec())]);
        model.learn(started(1, 0, &["a", "b"]), at(0));
        model.learn(started(2, 0, &["c"]), at(0));
        model.learn(started(3, 1, &["b"]), at(1));
        assert_eq!(model.live.keys().collect::<Vec<_>>(), [&2, &3]);
        assert!(model.row("a").unwrap().live.is_none());
    }

    #[test]
    fn the_number_of_cycles_includes_events_since_the_status() {
        let status =
            pb::OrchestratorStatus { total_cycles: 7, newest_revision: 9, ..pb::OrchestratorStatus::default() };
        let mut model = knowing([News::Status(Box::new(status))]);
        for (cycle_id, revision) in [(8, 9), (12, 10), (10, 11)] {
            let cycle = pb::CycleTelemetry { revision, ..cycle(cycle_id, 0, pb::CycleState::Succeeded, vec![]) };
            model.learn(recorded(cycle), at(0));
        }
        assert_eq!(model.total_cycles(), 9);
    }
}
