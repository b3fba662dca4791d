//! Schedules: interval loops, their ticks, and tick counts.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{CycleId, CycleRequest, Name, Payload, Subsystem, Violations, name::with_present_names};

const MS: Duration = Duration::from_millis(1);
const YEAR: Duration = Duration::from_hours(24 * 366);

/// What happens to a cycle that is triggered while another one runs. The terms are those of Temporal
/// (<https://docs.temporal.io/schedule#overlap-policy>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OverlapPolicy {
    /// It does not run.
    Skip,
    /// It waits, unless a cycle with a subsystem in common and the same trigger already waits.
    BufferOne,
    /// It waits in line, up to a limit.
    BufferAll,
    /// Running cycles with a subsystem in common are cancelled, and this one runs after those that already wait.
    CancelOther,
}

/// The handling of ticks of a loop that were due while the process was down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CatchUp {
    /// All of them are missed.
    None,
    /// The latest tick inside the window runs, the others in it are coalesced into that one.
    One,
}

/// An interval loop before validation. Fields that are not set take the defaults that [`IntervalLoop`] documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "each field is that of `IntervalLoop`, before validation")]
pub struct LoopSpec {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<SignedDuration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<SignedDuration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<SignedDuration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap_policy: Option<OverlapPolicy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub catch_up: Option<CatchUp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub catch_up_window: Option<SignedDuration>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subsystems: Vec<String>,
    #[serde(skip_serializing_if = "Payload::is_empty")]
    pub parameters: Payload,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<SignedDuration>,
    pub record_outputs: bool,
}

/// An interval loop: starts cycles at a fixed rate. Its `n`-th tick is due at Unix time `n·interval + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct IntervalLoop {
    /// Unique name.
    pub name: Name,
    /// Time between ticks. 10 ms to 366 days.
    pub interval: Duration,
    /// Shifts the ticks. Below `interval`, default 0.
    pub offset: Duration,
    /// Largest random delay of each cycle after its tick. Below `interval`, default 0.
    pub jitter: Duration,
    /// What happens when a tick is due while a cycle with a subsystem in common runs or waits. Default: skip.
    pub overlap: OverlapPolicy,
    /// What happens to ticks that were due while the process was down. Default: none.
    pub catch_up: CatchUp,
    /// Largest age of ticks that are caught up. Up to 366 days, default 60 s.
    pub catch_up_window: Duration,
    /// Only these subsystems, at most [`CycleRequest::MAX_SUBSET`]; `None` means all.
    pub subset: Option<Arc<[Name]>>,
    /// Parameters, which take precedence over those of the registrations, [canonical](Payload::canonical).
    pub parameters: Payload,
    /// Deadline of its cycles; `None` means the configured one. 1 ms to 24 h.
    pub deadline: Option<Duration>,
    /// True if the records of its cycles contain all outputs.
    pub record_outputs: bool,
}

impl IntervalLoop {
    /// What its interval may be.
    pub const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(10)..=YEAR;
    /// The range of its offset, its jitter and its window for catching up. The first two are also below the interval.
    pub const SHIFTS: RangeInclusive<Duration> = Duration::ZERO..=YEAR;
    /// The range of the deadline of its cycles.
    pub const DEADLINES: RangeInclusive<Duration> = MS..=Duration::from_hours(24);
    /// The problem of a loop without an interval.
    pub const NO_INTERVAL: &str = "is missing; give the time between ticks, such as 5s";

    /// Validates a loop.
    ///
    /// # Errors
    /// All invalid fields together.
    pub fn from_spec(spec: &LoopSpec) -> Result<Self, Violations> {
        let mut bad = Violations::default();
        if spec.interval.is_none() {
            bad.add("interval", IntervalLoop::NO_INTERVAL);
        }
        let interval = bad.duration("interval", spec.interval, YEAR, Self::INTERVALS);
        let subset = bad.subset("subsystems", &spec.subsystems, CycleRequest::MAX_SUBSET);
        let deadline = spec.deadline.map(|deadline| bad.duration("deadline", Some(deadline), MS, Self::DEADLINES));
        let this = Self {
            name: bad.name("name", &spec.name),
            interval,
            offset: bad.duration_below("offset", spec.offset, interval, "the interval"),
            jitter: bad.duration_below("jitter", spec.jitter, interval, "the interval"),
            overlap: spec.overlap_policy.unwrap_or(OverlapPolicy::Skip),
            catch_up: spec.catch_up.unwrap_or(CatchUp::None),
            catch_up_window: bad.duration(
                "catch_up_window",
                spec.catch_up_window,
                Duration::from_mins(1),
                Self::SHIFTS,
            ),
            subset,
            parameters: bad.payload("parameters", &spec.parameters, Subsystem::MAX_PARAMETERS),
            deadline,
            record_outputs: spec.record_outputs,
        };
        bad.into_result(this)
    }

    /// Most bytes of the loop in memory.
    #[must_use]
    pub fn footprint(&self) -> usize {
        /// Fixed cost of a loop, including its tick counts, and of a name in its list.
        const ALONE: usize = 2 << 10;
        const NAMED: usize = 48;
        let names = self.subset.iter().flat_map(|names| names.iter());
        ALONE + self.parameters.len() + names.map(|name| name.as_str().len() + NAMED).sum::<usize>()
    }

    /// The loop that names subsystems by their present names.
    #[must_use]
    pub fn by_present_names(self, present: impl Fn(&Name) -> Option<Name>) -> Self {
        self.with_present_names(present).unwrap_or(self)
    }

    /// The same; `None` if it names none by a former one.
    #[must_use]
    pub fn with_present_names(&self, present: impl Fn(&Name) -> Option<Name>) -> Option<Self> {
        let subset = with_present_names(self.subset.as_deref()?, present)?;
        Some(Self { subset: Some(subset.into()), ..self.clone() })
    }

    /// The loop with every default filled in, as it is shown and stored.
    #[must_use]
    pub fn to_spec(&self) -> LoopSpec {
        let signed = |duration: Duration| SignedDuration::try_from(duration).ok();
        LoopSpec {
            name: self.name.to_string(),
            interval: signed(self.interval),
            offset: signed(self.offset),
            jitter: signed(self.jitter),
            overlap_policy: Some(self.overlap),
            catch_up: Some(self.catch_up),
            catch_up_window: signed(self.catch_up_window),
            subsystems: self.subset.iter().flat_map(|names| names.iter().map(ToString::to_string)).collect(),
            parameters: self.parameters.clone(),
            deadline: self.deadline.and_then(signed),
            record_outputs: self.record_outputs,
        }
    }

    /// When the `n`-th tick is due; `None` if it is out of range.
    #[must_use]
    pub fn due_at(&self, n: u64) -> Option<Timestamp> {
        let since_1970 = self.interval.as_nanos().checked_mul(n.into())? + self.offset.as_nanos();
        Timestamp::from_nanosecond(since_1970.try_into().ok()?).ok()
    }

    /// The number of the first tick that is due after `time`.
    #[must_use]
    pub fn first_after(&self, time: Timestamp) -> u64 {
        let since_offset = time.as_nanosecond() - self.offset.as_nanos().cast_signed();
        let ticks = since_offset.div_euclid(self.interval.as_nanos().cast_signed()) + 1;
        u64::try_from(ticks).unwrap_or(0)
    }
}

/// A request to start a loop.
#[derive(Clone, Debug)]
pub enum LoopStart {
    /// The declared loop with this name.
    AsDeclared(Name),
    /// This one.
    Of(IntervalLoop),
}

impl LoopStart {
    /// Validates a request. A name without other fields means the declared loop.
    ///
    /// # Errors
    /// All invalid fields together.
    pub fn from_spec(spec: &LoopSpec) -> Result<Self, Violations> {
        let mut bad = Violations::default();
        if *spec != (LoopSpec { name: spec.name.clone(), ..LoopSpec::default() }) {
            return IntervalLoop::from_spec(spec).map(Self::Of);
        }
        let name = bad.name("name", &spec.name);
        bad.into_result(Self::AsDeclared(name))
    }
}

/// The loops that a request pauses or resumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoopChoice {
    /// The loop with this name.
    Named(Name),
    /// All loops, also those that are started later.
    All,
}

/// How a tick ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TickDisposition {
    /// Its cycle was admitted.
    Ran,
    /// A cycle with a subsystem in common was running or waiting.
    Skipped,
    /// The process was down, or started too late.
    Missed,
    /// Merged into the cycle of another tick.
    Coalesced,
    /// Refused.
    Dropped,
}

/// Number of a loop's ticks by disposition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "each field counts the disposition of its name")]
pub struct TickCounts {
    pub ran: u64,
    pub skipped: u64,
    pub missed: u64,
    pub coalesced: u64,
    pub dropped: u64,
}

impl TickCounts {
    /// Ticks that were due: the sum of all.
    #[must_use]
    pub fn due(&self) -> u64 {
        self.ran + self.skipped + self.missed + self.coalesced + self.dropped
    }
}

/// Consecutive ticks with the same disposition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TickRange {
    /// Due time of the first.
    pub first: Timestamp,
    /// Due time of the last.
    pub last: Timestamp,
    /// Number of ticks.
    pub count: u64,
    /// Their disposition.
    pub disposition: TickDisposition,
}

/// The state of a loop. Durable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopState {
    /// True if it is stopped.
    pub stopped: bool,
    /// True if it is paused by its name.
    #[serde(default)]
    pub paused: bool,
    /// True if it is paused with all loops.
    #[serde(default)]
    pub paused_with_all: bool,
    /// Every tick that is due up to this time has its disposition. `None` before the loop first started.
    pub accounted_to: Option<Timestamp>,
    /// The tick counts.
    pub ticks: TickCounts,
    /// The latest ticks that did not run, oldest first; at most [`LoopState::MAX_RANGES`].
    pub not_run: Vec<TickRange>,
    /// The last cycle that it started.
    pub last_cycle_id: CycleId,
}

impl LoopState {
    /// Most ranges of ticks that did not run: enough to see a pattern, few enough to be written with every cycle.
    pub const MAX_RANGES: usize = 16;

    /// True if it is paused, by its name or with all loops.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused || self.paused_with_all
    }

    /// True if ticks of it are due.
    #[must_use]
    pub fn has_ticks(&self) -> bool {
        !self.stopped && !self.is_paused()
    }

    /// Records the disposition of `count` consecutive ticks, due from `first` to `last`.
    pub fn account(&mut self, first: Timestamp, last: Timestamp, count: u64, disposition: TickDisposition) {
        if count == 0 {
            return;
        }
        let counter = match disposition {
            TickDisposition::Ran => &mut self.ticks.ran,
            TickDisposition::Skipped => &mut self.ticks.skipped,
            TickDisposition::Missed => &mut self.ticks.missed,
            TickDisposition::Coalesced => &mut self.ticks.coalesced,
            TickDisposition::Dropped => &mut self.ticks.dropped,
        };
        *counter += count;
        let adjoins = self.accounted_to;
        self.accounted_to = Some(adjoins.map_or(last, |to| to.max(last)));
        if disposition == TickDisposition::Ran {
            return;
        }
        match self.not_run.last_mut() {
            Some(range) if range.disposition == disposition && Some(range.last) == adjoins => {
                range.last = last;
                range.count += count;
            }
            _ => {
                if self.not_run.len() == Self::MAX_RANGES {
                    self.not_run.remove(0);
                }
                self.not_run.push(TickRange { first, last, count, disposition });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every(interval: &str, offset: &str) -> IntervalLoop {
        IntervalLoop::from_spec(&LoopSpec {
            name: "l".into(),
            interval: Some(interval.parse().unwrap()),
            offset: Some(offset.parse().unwrap()),
            ..LoopSpec::default()
        })
        .unwrap()
    }

    #[test]
    fn ticks_lie_on_an_absolute_grid() {
        let hourly = every("1h", "5m");
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        for (now, next) in [
            ("2026-01-01T00:00:00Z", "2026-01-01T00:05:00Z"),
            ("2026-01-01T00:05:00Z", "2026-01-01T01:05:00Z"),
            ("2026-01-01T00:04:59.999999999Z", "2026-01-01T00:05:00Z"),
        ] {
            assert_eq!(hourly.due_at(hourly.first_after(at(now))), Some(at(next)), "{now}");
        }
    }

    #[test]
    fn ticks_that_ended_alike_share_a_range_and_the_list_is_bounded() {
        let tick = |n: u64| every("1s", "0s").due_at(n).unwrap();
        let mut state = LoopState::default();
        for n in 0..10 {
            state.account(tick(n), tick(n), 1, TickDisposition::Skipped);
        }
        assert_eq!(state.not_run.len(), 1);
        assert_eq!(state.not_run[0].count, 10);
        for n in 10..100 {
            let disposition = if n % 2 == 0 { TickDisposition::Ran } else { TickDisposition::Skipped };
            state.account(tick(n), tick(n), 1, disposition);
        }
        assert_eq!(state.not_run.len(), LoopState::MAX_RANGES);
        assert_eq!(state.ticks.due(), 100);
        assert_eq!(state.ticks.ran, 45);
    }

    #[test]
    fn a_loop_is_read_from_its_specification_as_it_was() {
        let spec = LoopSpec {
            name: "l".into(),
            interval: Some(SignedDuration::from_secs(10)),
            offset: Some(SignedDuration::from_secs(1)),
            jitter: Some(SignedDuration::from_secs(2)),
            overlap_policy: Some(OverlapPolicy::BufferOne),
            catch_up: Some(CatchUp::One),
            catch_up_window: Some(SignedDuration::from_secs(3)),
            subsystems: vec!["a".into(), "b".into()],
            parameters: Payload::from_json(serde_json::json!({ "p": 1 }).as_object().unwrap()).unwrap(),
            deadline: Some(SignedDuration::from_secs(4)),
            record_outputs: true,
        };
        let read = IntervalLoop::from_spec(&spec).unwrap();
        assert_eq!(read.to_spec(), spec);
        let simple = every("1s", "0s");
        assert_eq!(IntervalLoop::from_spec(&simple.to_spec()).unwrap(), simple);
    }

    #[test]
    fn a_name_alone_starts_the_declared_loop() {
        let named = LoopSpec { name: "l".into(), ..LoopSpec::default() };
        assert!(matches!(LoopStart::from_spec(&named), Ok(LoopStart::AsDeclared(name)) if name.as_str() == "l"));
        assert!(matches!(LoopStart::from_spec(&every("1s", "0s").to_spec()), Ok(LoopStart::Of(_))));
        assert!(LoopStart::from_spec(&LoopSpec { record_outputs: true, ..named }).is_err());
    }

    #[test]
    fn a_loop_names_as_many_subsystems_as_a_request_may() {
        let of = |count: usize| {
            let subsystems = (0..count).map(|i| format!("s{i}")).collect();
            IntervalLoop::from_spec(&LoopSpec { subsystems, ..every("1s", "0s").to_spec() })
        };
        assert!(of(CycleRequest::MAX_SUBSET).is_ok());
        for count in [CycleRequest::MAX_SUBSET + 1, CycleRequest::MAX_SUBSET + 2] {
            assert_eq!(of(count).unwrap_err().0[0].field, "subsystems");
        }
    }

    #[test]
    fn every_disposition_counts_as_a_due_tick() {
        let counts = TickCounts { ran: 1, skipped: 20, missed: 300, coalesced: 4_000, dropped: 50_000 };
        assert_eq!(counts.due(), 54_321);
    }

    #[test]
    fn offset_and_jitter_stay_below_the_interval() {
        let bad = LoopSpec {
            name: "l".into(),
            interval: Some(SignedDuration::from_secs(1)),
            offset: Some(SignedDuration::from_secs(1)),
            jitter: Some(SignedDuration::from_secs(2)),
            ..LoopSpec::default()
        };
        let Violations(found) = IntervalLoop::from_spec(&bad).unwrap_err();
        assert_eq!(found.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), ["offset", "jitter"]);
    }
}
