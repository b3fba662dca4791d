//! The arithmetic of a report. Each cycle is counted once and dropped, so that the memory does not grow with the length
//! of the history: counters, and for durations a sketch of bounded size. Pure.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;
use sketches_ddsketch::{Config, DDSketch};

use crate::{
    model::{Name, NameError},
    proto::orchestrator::v1::{self as pb, CycleState, SkipReason, SubsystemState},
};

// ---------------------------------------------------------------------------------------------------------------
// Durations

/// A set of durations that answers quantiles.
///
/// The p-quantile of n durations is the smallest one that at least p·n of them don't exceed: the one of rank ⌈p·n⌉.
/// That is definition 1 of Hyndman and Fan, "Sample Quantiles in Statistical Packages", The American Statistician 50
/// (1996), and `percentile_disc` of SQL. The result is within 0.5 % of it, and rounded to the microsecond: durations
/// are kept in bins of that width, as Masson, Rim and Lee describe in "DDSketch", Proceedings of the VLDB Endowment 12
/// (2019). The durations of one period take 1 KiB if they are within a factor of 3.6 of each other, and at most 22 KiB.
struct Durations(DDSketch);

/// The quantiles of some durations, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
}

impl Default for Durations {
    fn default() -> Self {
        /// The relative error.
        const ERROR: f64 = 0.005;
        /// Milliseconds. A shorter duration counts as 0.
        const LEAST: f64 = 0.001;
        /// Enough bins for all durations between [`LEAST`] and [`Durations::MOST`], so that bins are never merged.
        const BINS: u32 = 4096;
        Self(DDSketch::new(Config::new(ERROR, BINS, LEAST)))
    }
}

impl Durations {
    /// Milliseconds: eleven days. A cycle takes at most one.
    const MOST: f64 = 1e9;

    fn add(&mut self, ms: f64) {
        self.0.add(bounded(ms));
    }

    /// `None` if there are no durations.
    fn quantiles(&self) -> Option<Quantiles> {
        Some(Quantiles { p50: self.percentile(50)?, p95: self.percentile(95)?, p99: self.percentile(99)? })
    }

    #[allow(clippy::cast_precision_loss, reason = "a count of cycles is far below 2^52")]
    fn percentile(&self, percent: usize) -> Option<f64> {
        let count = self.0.count();
        let rank = count.checked_mul(percent)?.div_ceil(100);
        // The library's own rank is rounded down from a share of the distance between the first and the last. Half a
        // rank more makes it ours, whatever is lost in the division.
        let share = ((rank as f64 - 0.5) / (count as f64 - 1.0)).clamp(0.0, 1.0);
        let ms = self.0.quantile(share).ok()??;
        // The middle of the first or of the last bin may be outside the range of its durations.
        Some(micros(ms.clamp(self.0.min()?, self.0.max()?)))
    }
}

/// Milliseconds within the range of the contract, whatever was sent.
fn bounded(ms: f64) -> f64 {
    if ms.is_nan() { 0.0 } else { ms.clamp(0.0, Durations::MOST) }
}

/// Milliseconds to the microsecond: the rest is noise.
fn micros(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

// ---------------------------------------------------------------------------------------------------------------
// Counting

/// Sums over the cycles of one period.
#[derive(Default)]
pub(super) struct Tally {
    succeeded: u64,
    degraded: u64,
    failed: u64,
    cancelled: u64,
    interrupted: u64,
    /// Cycles without a subsystem, of those that SUCCEEDED: they say nothing of success or durations.
    empty: u64,
    durations: Durations,
    /// Number of cycles by trigger and loop; the loop is empty if no loop started them.
    started_by: BTreeMap<(pb::Trigger, String), u64>,
    critical_ms: f64,
    parts: BTreeMap<Name, PartSums>,
}

/// Sums over the parts of one subsystem.
#[derive(Default)]
struct PartSums {
    succeeded: u64,
    failed: u64,
    timed_out: u64,
    skipped: u64,
    circuit_open: u64,
    cancelled: u64,
    /// Parts that count as failed by the contract.
    failures: u64,
    retries: u64,
    durations: Durations,
    critical_cycles: u64,
    critical_ms: f64,
}

/// Why a cycle can't be counted.
#[derive(Debug, thiserror::Error)]
pub(super) enum Uncountable {
    #[error("the service has sent a record that can't be read: {0}")]
    Name(#[from] NameError),
    #[error(
        "more than {MAX_NAMES} names of subsystems or loops took part; ask for a shorter period, or for one --loop"
    )]
    TooManyNames,
}

/// Most names whose figures are kept: five full registries of the default size, about 100 MB if all durations vary.
const MAX_NAMES: usize = 100_000;

impl Tally {
    /// Counts a cycle.
    ///
    /// # Errors
    /// It has invalid names, or there are too many names.
    pub(super) fn add(&mut self, cycle: &pb::CycleTelemetry) -> Result<(), Uncountable> {
        let count = match cycle.state() {
            CycleState::Succeeded => &mut self.succeeded,
            CycleState::Degraded => &mut self.degraded,
            CycleState::Failed | CycleState::Unspecified => &mut self.failed,
            CycleState::Cancelled => &mut self.cancelled,
            CycleState::Interrupted => &mut self.interrupted,
        };
        *count += 1;
        let is_empty = cycle.state() == CycleState::Succeeded && cycle.subsystems.is_empty();
        self.empty += u64::from(is_empty);
        // CANCELLED and INTERRUPTED cycles did not take their full time.
        if matches!(cycle.state(), CycleState::Succeeded | CycleState::Degraded | CycleState::Failed) && !is_empty {
            self.durations.add(cycle.duration_ms);
        }
        let starter = (cycle.trigger(), cycle.r#loop.clone());
        if self.started_by.len() == MAX_NAMES && !self.started_by.contains_key(&starter) {
            return Err(Uncountable::TooManyNames);
        }
        *self.started_by.entry(starter).or_default() += 1;
        let critical: HashSet<&str> = cycle.critical_path.iter().map(String::as_str).collect();
        for part in &cycle.subsystems {
            let is_critical = critical.contains(part.name.as_str());
            if is_critical {
                self.critical_ms += bounded(part.duration_ms);
            }
            self.parts_of(&part.name)?.add(part, is_critical);
        }
        Ok(())
    }

    fn parts_of(&mut self, name: &str) -> Result<&mut PartSums, Uncountable> {
        if !self.parts.contains_key(name) {
            if self.parts.len() == MAX_NAMES {
                return Err(Uncountable::TooManyNames);
            }
            self.parts.insert(Name::parse(name)?, PartSums::default());
        }
        self.parts.get_mut(name).ok_or(Uncountable::TooManyNames)
    }

    fn cycles(&self) -> u64 {
        self.succeeded + self.degraded + self.failed + self.cancelled + self.interrupted
    }

    fn success_rate(&self) -> Option<f64> {
        let succeeded = self.succeeded - self.empty;
        share(succeeded, succeeded + self.degraded + self.failed)
    }
}

impl PartSums {
    fn add(&mut self, part: &pb::SubsystemTelemetry, is_critical: bool) {
        let count = match part.state() {
            SubsystemState::Succeeded => &mut self.succeeded,
            SubsystemState::TimedOut => &mut self.timed_out,
            SubsystemState::Skipped => &mut self.skipped,
            SubsystemState::CircuitOpen => &mut self.circuit_open,
            SubsystemState::Cancelled => &mut self.cancelled,
            // These states are never recorded.
            SubsystemState::Failed
            | SubsystemState::Unspecified
            | SubsystemState::Waiting
            | SubsystemState::Running => &mut self.failed,
        };
        *count += 1;
        self.failures += u64::from(is_failure(part));
        self.retries += u64::from(part.attempts.saturating_sub(1));
        // The duration of the work: failed parts may have ended at once, while late ones took at least this long.
        if matches!(part.state(), SubsystemState::Succeeded | SubsystemState::TimedOut) && part.started_at.is_some() {
            self.durations.add(part.duration_ms);
        }
        if is_critical {
            self.critical_cycles += 1;
            self.critical_ms += bounded(part.duration_ms);
        }
    }

    fn cycles(&self) -> u64 {
        self.succeeded + self.failed + self.timed_out + self.skipped + self.circuit_open + self.cancelled
    }

    fn success_rate(&self) -> Option<f64> {
        share(self.succeeded, self.succeeded + self.failures)
    }
}

/// True if the part counts as failed by the contract's `SubsystemState`.
fn is_failure(part: &pb::SubsystemTelemetry) -> bool {
    match part.state() {
        SubsystemState::Succeeded | SubsystemState::Cancelled => false,
        SubsystemState::Skipped => {
            !matches!(part.skip_reason(), SkipReason::Suspended | SkipReason::RequirementLeftOut)
        }
        _ => true,
    }
}

#[allow(clippy::cast_precision_loss, reason = "a count of cycles is far below 2^52")]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

// ---------------------------------------------------------------------------------------------------------------
// Comparing

/// The figures of all cycles. Rates are 0 to 1; figures without data are `null`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CycleFigures {
    pub(super) cycles: u64,
    pub(super) succeeded: u64,
    pub(super) degraded: u64,
    pub(super) failed: u64,
    pub(super) cancelled: u64,
    pub(super) interrupted: u64,
    /// Of cycles that were neither cancelled nor interrupted, as are the durations.
    pub(super) success_rate: Option<f64>,
    pub(super) p50_ms: Option<f64>,
    pub(super) p95_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
    /// Sum of the durations of all parts on the critical path of their cycle.
    pub(super) critical_ms: f64,
    pub(super) started_by: Vec<StartedBy>,
    pub(super) previous_cycles: u64,
    pub(super) previous_success_rate: Option<f64>,
    pub(super) previous_p50_ms: Option<f64>,
    pub(super) previous_p95_ms: Option<f64>,
    pub(super) success_rate_change: Option<f64>,
    pub(super) p50_change: Option<f64>,
    pub(super) p95_change: Option<f64>,
}

/// Number of cycles by trigger.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StartedBy {
    #[serde(serialize_with = "trigger_name")]
    pub(super) trigger: pb::Trigger,
    /// Empty if no loop started them.
    pub(super) r#loop: String,
    pub(super) cycles: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn trigger_name<S: serde::Serializer>(trigger: &pb::Trigger, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(trigger.as_str_name())
}

/// The figures of one subsystem: an object of the JSON, and a line of the CSV. Rates and shares are 0 to 1; figures
/// without data are `null`, or empty.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SubsystemFigures {
    pub(super) name: Name,
    /// Cycles in which it took part: the sum of the six counts below.
    pub(super) cycles: u64,
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    pub(super) timed_out: u64,
    pub(super) skipped: u64,
    pub(super) circuit_open: u64,
    pub(super) cancelled: u64,
    /// Of the parts that succeeded or count as failed.
    pub(super) success_rate: Option<f64>,
    /// Attempts beyond the first.
    pub(super) retries: u64,
    /// Of the parts that succeeded or timed out.
    pub(super) p50_ms: Option<f64>,
    pub(super) p95_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
    /// Cycles in which it was on the critical path.
    pub(super) critical_cycles: u64,
    /// Their share of its cycles.
    pub(super) critical_cycle_share: Option<f64>,
    /// Sum of its durations in them.
    pub(super) critical_ms: f64,
    /// Its share of [`CycleFigures::critical_ms`]. Those of all subsystems add up to 1.
    pub(super) critical_time_share: Option<f64>,
    pub(super) previous_cycles: u64,
    pub(super) previous_success_rate: Option<f64>,
    pub(super) previous_p50_ms: Option<f64>,
    pub(super) previous_p95_ms: Option<f64>,
    /// The difference: −0.1 is from 100 % to 90 %.
    pub(super) success_rate_change: Option<f64>,
    /// Relative: 0.1 is a tenth slower.
    pub(super) p50_change: Option<f64>,
    pub(super) p95_change: Option<f64>,
}

/// The figures of a period, beside those of the one before.
pub(super) fn compare(now: &Tally, previous: &Tally) -> (CycleFigures, Vec<SubsystemFigures>) {
    let nothing = PartSums::default();
    let subsystems = now.parts.iter().map(|(name, parts)| {
        subsystem(name.clone(), parts, previous.parts.get(name).unwrap_or(&nothing), now.critical_ms)
    });
    (cycles(now, previous), subsystems.collect())
}

fn cycles(now: &Tally, previous: &Tally) -> CycleFigures {
    let (quantiles, before) = (now.durations.quantiles(), previous.durations.quantiles());
    let (p50_ms, p95_ms) = (quantiles.map(|it| it.p50), quantiles.map(|it| it.p95));
    let (previous_p50_ms, previous_p95_ms) = (before.map(|it| it.p50), before.map(|it| it.p95));
    let started_by = now.started_by.iter().map(|((trigger, name), &cycles)| StartedBy {
        trigger: *trigger,
        r#loop: name.clone(),
        cycles,
    });
    CycleFigures {
        cycles: now.cycles(),
        succeeded: now.succeeded,
        degraded: now.degraded,
        failed: now.failed,
        cancelled: now.cancelled,
        interrupted: now.interrupted,
        success_rate: now.success_rate(),
        p50_ms,
        p95_ms,
        p99_ms: quantiles.map(|it| it.p99),
        critical_ms: micros(now.critical_ms),
        started_by: started_by.collect(),
        previous_cycles: previous.cycles(),
        previous_success_rate: previous.success_rate(),
        previous_p50_ms,
        previous_p95_ms,
        success_rate_change: difference(now.success_rate(), previous.success_rate()),
        p50_change: growth(p50_ms, previous_p50_ms),
        p95_change: growth(p95_ms, previous_p95_ms),
    }
}

fn subsystem(name: Name, now: &PartSums, previous: &PartSums, critical_ms: f64) -> SubsystemFigures {
    let (quantiles, before) = (now.durations.quantiles(), previous.durations.quantiles());
    let (p50_ms, p95_ms) = (quantiles.map(|it| it.p50), quantiles.map(|it| it.p95));
    let (previous_p50_ms, previous_p95_ms) = (before.map(|it| it.p50), before.map(|it| it.p95));
    SubsystemFigures {
        name,
        cycles: now.cycles(),
        succeeded: now.succeeded,
        failed: now.failed,
        timed_out: now.timed_out,
        skipped: now.skipped,
        circuit_open: now.circuit_open,
        cancelled: now.cancelled,
        success_rate: now.success_rate(),
        retries: now.retries,
        p50_ms,
        p95_ms,
        p99_ms: quantiles.map(|it| it.p99),
        critical_cycles: now.critical_cycles,
        critical_cycle_share: share(now.critical_cycles, now.cycles()),
        critical_ms: micros(now.critical_ms),
        critical_time_share: (critical_ms > 0.0).then(|| now.critical_ms / critical_ms),
        previous_cycles: previous.cycles(),
        previous_success_rate: previous.success_rate(),
        previous_p50_ms,
        previous_p95_ms,
        success_rate_change: difference(now.success_rate(), previous.success_rate()),
        p50_change: growth(p50_ms, previous_p50_ms),
        p95_change: growth(p95_ms, previous_p95_ms),
    }
}

fn difference(now: Option<f64>, previous: Option<f64>) -> Option<f64> {
    Some(now? - previous?)
}

/// `None` if a duration is missing, or the earlier one is 0.
fn growth(now: Option<f64>, previous: Option<f64>) -> Option<f64> {
    let (now, previous) = (now?, previous?);
    (previous > 0.0).then(|| now / previous - 1.0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]
#[allow(clippy::cast_precision_loss, reason = "the numbers of tests are small")]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::subsequence};

    use super::*;

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    fn part(name: &str, state: SubsystemState, ms: f64) -> pb::SubsystemTelemetry {
        let started_at = (state != SubsystemState::Skipped).then(prost_types::Timestamp::default);
        pb::SubsystemTelemetry {
            name: name.into(),
            state: state.into(),
            started_at,
            duration_ms: ms,
            attempts: 1,
            ..Default::default()
        }
    }

    fn figures(now: &[pb::CycleTelemetry], previous: &[pb::CycleTelemetry]) -> (CycleFigures, Vec<SubsystemFigures>) {
        let tally = |cycles: &[pb::CycleTelemetry]| {
            let mut tally = Tally::default();
            for cycle in cycles {
                tally.add(cycle).unwrap();
            }
            tally
        };
        let (cycles, mut subsystems) = compare(&tally(now), &tally(previous));
        subsystems.sort_by(|a, b| a.name.cmp(&b.name));
        (cycles, subsystems)
    }

    #[test]
    fn a_quantile_is_the_smallest_duration_that_its_share_does_not_exceed() {
        let quantiles = |durations: &[f64]| {
            let mut sketch = Durations::default();
            for &ms in durations {
                sketch.add(ms);
            }
            sketch.quantiles()
        };
        assert_eq!(quantiles(&[]), None);
        assert_eq!(quantiles(&[7.5]), Some(Quantiles { p50: 7.5, p95: 7.5, p99: 7.5 }));
        let two = quantiles(&[100.0, 1.0]).unwrap();
        assert!(close(Some(two.p50), Some(1.0)) && (two.p95, two.p99) == (100.0, 100.0), "{two:?}");
        // Invalid values that no service should send.
        let odd = quantiles(&[f64::NAN, -1.0, f64::INFINITY, f64::NEG_INFINITY]);
        assert_eq!(odd, Some(Quantiles { p50: 0.0, p95: Durations::MOST, p99: Durations::MOST }));
        // The range has both of its ends, and no merged bins between them.
        let wide: Vec<_> = (0..=11).map(|power| 10_f64.powi(power - 2)).collect();
        assert!(close(Some(quantiles(&wide).unwrap().p50), Some(1000.0)));
    }

    #[test]
    fn only_failures_by_the_contract_lower_the_success_rate() {
        let skipped = |reason: SkipReason| pb::SubsystemTelemetry {
            skip_reason: reason.into(),
            ..part("a", SubsystemState::Skipped, 0.0)
        };
        let parts = [
            part("a", SubsystemState::Succeeded, 1.0),
            part("a", SubsystemState::Failed, 50.0),
            part("a", SubsystemState::TimedOut, 9.0),
            part("a", SubsystemState::CircuitOpen, 0.0),
            part("a", SubsystemState::Cancelled, 70.0),
            skipped(SkipReason::Suspended),
            skipped(SkipReason::RequirementLeftOut),
            skipped(SkipReason::RequirementFailed),
        ];
        let cycles = parts.map(|part| pb::CycleTelemetry { subsystems: vec![part], ..Default::default() });
        let (_, subsystems) = figures(&cycles, &[]);
        let a = &subsystems[0];
        assert_eq!((a.cycles, a.skipped, a.cancelled, a.circuit_open), (8, 3, 1, 1));
        assert_eq!(a.success_rate, Some(0.2));
        let is_counted = close(a.p50_ms, Some(1.0)) && close(a.p99_ms, Some(9.0));
        assert!(is_counted, "neither the failed nor the cancelled one counts: {a:?}");
    }

    #[test]
    fn a_name_that_breaks_the_contract_is_refused() {
        let cycle = pb::CycleTelemetry {
            subsystems: vec![part("=cmd()", SubsystemState::Succeeded, 1.0)],
            ..Default::default()
        };
        assert!(matches!(Tally::default().add(&cycle), Err(Uncountable::Name(_))));
    }

    #[test]
    fn names_have_a_bound() {
        let mut tally = Tally::default();
        let subsystems = (0..MAX_NAMES).map(|i| part(&format!("s{i}"), SubsystemState::Succeeded, 1.0)).collect();
        tally.add(&pb::CycleTelemetry { subsystems, ..Default::default() }).unwrap();
        let known = vec![part("s7", SubsystemState::Succeeded, 1.0)];
        tally.add(&pb::CycleTelemetry { subsystems: known, ..Default::default() }).unwrap();
        let more = vec![part("more", SubsystemState::Succeeded, 1.0)];
        let refused = tally.add(&pb::CycleTelemetry { subsystems: more, ..Default::default() });
        assert!(matches!(refused, Err(Uncountable::TooManyNames)));
    }

    // -----------------------------------------------------------------------------------------------------------
    // Against a naive computation

    fn any_cycle() -> impl Strategy<Value = pb::CycleTelemetry> {
        let state = prop::sample::select(vec![
            SubsystemState::Succeeded,
            SubsystemState::Failed,
            SubsystemState::TimedOut,
            SubsystemState::Skipped,
            SubsystemState::CircuitOpen,
            SubsystemState::Cancelled,
        ]);
        // The durations span six orders of magnitude.
        let duration = (-2.0..4.0_f64).prop_map(|power| 10_f64.powf(power));
        let parts = vec((state, duration.clone(), 0..4_u32, 0..7_i32), NAMES.len());
        let names = || subsequence(NAMES.to_vec(), 0..=NAMES.len());
        (names(), names(), parts, 1..6_i32, duration, 0..3_i32).prop_map(
            |(names, critical, parts, state, duration_ms, trigger)| {
                let part = |(name, (state, ms, attempts, reason)): (&str, _)| {
                    let skip_reason = if state == SubsystemState::Skipped { reason } else { 0 };
                    pb::SubsystemTelemetry { attempts, skip_reason, ..part(name, state, ms) }
                };
                pb::CycleTelemetry {
                    state,
                    duration_ms,
                    trigger,
                    critical_path: critical.into_iter().filter(|name| names.contains(name)).map(String::from).collect(),
                    subsystems: names.into_iter().zip(parts).map(part).collect(),
                    ..Default::default()
                }
            },
        )
    }

    /// The quantile by its definition: counts the durations that do not exceed each one.
    fn naive_quantile(durations: &[f64], p: f64) -> Option<f64> {
        let enough = |candidate: f64| {
            durations.iter().filter(|&&ms| ms <= candidate).count() as f64 >= p * durations.len() as f64 - 1e-9
        };
        durations.iter().copied().filter(|&candidate| enough(candidate)).min_by(f64::total_cmp)
    }

    fn close(computed: Option<f64>, naive: Option<f64>) -> bool {
        match (computed, naive) {
            // Rounding changes a duration by half a microsecond at most.
            (Some(computed), Some(naive)) => (computed - naive).abs() <= naive * 0.005 + 0.000_5 + 1e-9,
            (computed, naive) => computed.is_none() && naive.is_none(),
        }
    }

    proptest! {
        #[test]
        fn figures_agree_with_a_naive_computation(
            now in vec(any_cycle(), 0..120),
            previous in vec(any_cycle(), 0..30),
        ) {
            let (cycles, subsystems) = figures(&now, &previous);
            let in_state = |state: CycleState| now.iter().filter(|cycle| cycle.state() == state).count() as u64;
            prop_assert_eq!(cycles.cycles, now.len() as u64);
            prop_assert_eq!(cycles.previous_cycles, previous.len() as u64);
            prop_assert_eq!(cycles.degraded, in_state(CycleState::Degraded));
            prop_assert_eq!(cycles.interrupted, in_state(CycleState::Interrupted));
            prop_assert_eq!(cycles.started_by.iter().map(|it| it.cycles).sum::<u64>(), cycles.cycles);
            let has_succeeded = |cycle: &&pb::CycleTelemetry| cycle.state() == CycleState::Succeeded;
            let ended = |cycle: &&pb::CycleTelemetry| {
                let is_empty = has_succeeded(cycle) && cycle.subsystems.is_empty();
                cycle.state <= CycleState::Failed as i32 && !is_empty
            };
            let (succeeded, all) =
                (now.iter().filter(ended).filter(has_succeeded).count(), now.iter().filter(ended).count());
            prop_assert_eq!(cycles.success_rate, (all > 0).then(|| succeeded as f64 / all as f64));
            let durations: Vec<_> = now.iter().filter(ended).map(|cycle| cycle.duration_ms).collect();
            prop_assert!(close(cycles.p50_ms, naive_quantile(&durations, 0.5)));
            prop_assert!(close(cycles.p99_ms, naive_quantile(&durations, 0.99)));

            let parts = |cycles: &[pb::CycleTelemetry], name: &str| -> Vec<(pb::SubsystemTelemetry, bool)> {
                let on_path = |cycle: &pb::CycleTelemetry, part: &pb::SubsystemTelemetry| {
                    (part.clone(), cycle.critical_path.contains(&part.name))
                };
                let of_cycle = |cycle: &pb::CycleTelemetry| -> Vec<_> {
                    cycle.subsystems.iter().filter(|part| part.name == name).map(|part| on_path(cycle, part)).collect()
                };
                cycles.iter().flat_map(of_cycle).collect()
            };
            let all_critical: f64 =
                NAMES.iter().flat_map(|name| parts(&now, name)).filter(|it| it.1).map(|it| it.0.duration_ms).sum();
            let present: Vec<_> = NAMES.into_iter().filter(|name| !parts(&now, name).is_empty()).collect();
            prop_assert_eq!(subsystems.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), present);
            for computed in &subsystems {
                let (mine, before) = (parts(&now, computed.name.as_str()), parts(&previous, computed.name.as_str()));
                let count = |state: SubsystemState| mine.iter().filter(|it| it.0.state() == state).count() as u64;
                prop_assert_eq!(computed.cycles, mine.len() as u64);
                prop_assert_eq!(computed.previous_cycles, before.len() as u64);
                prop_assert_eq!(computed.succeeded, count(SubsystemState::Succeeded));
                prop_assert_eq!(computed.timed_out, count(SubsystemState::TimedOut));
                let retries: u32 = mine.iter().map(|it| it.0.attempts.max(1) - 1).sum();
                prop_assert_eq!(computed.retries, u64::from(retries));
                let rate = |parts: &[(pb::SubsystemTelemetry, bool)]| {
                    let succeeded = parts.iter().filter(|it| it.0.state() == SubsystemState::Succeeded).count();
                    // Suspended is 1, left out 4.
                    let failed = parts.iter().filter(|it| match it.0.state() {
                        SubsystemState::Succeeded | SubsystemState::Cancelled => false,
                        _ => !matches!(it.0.skip_reason, 1 | 4),
                    });
                    let counted = succeeded + failed.count();
                    (counted > 0).then(|| succeeded as f64 / counted as f64)
                };
                prop_assert_eq!(computed.success_rate, rate(&mine));
                prop_assert_eq!(computed.previous_success_rate, rate(&before));
                let change = rate(&mine).zip(rate(&before)).map(|(now, before)| now - before);
                prop_assert_eq!(computed.success_rate_change, change);
                let durations = |parts: &[(pb::SubsystemTelemetry, bool)]| -> Vec<f64> {
                    let counts = |state| matches!(state, SubsystemState::Succeeded | SubsystemState::TimedOut);
                    parts.iter().filter(|it| counts(it.0.state())).map(|it| it.0.duration_ms).collect()
                };
                for (computed, p) in [(computed.p50_ms, 0.5), (computed.p95_ms, 0.95), (computed.p99_ms, 0.99)] {
                    prop_assert!(close(computed, naive_quantile(&durations(&mine), p)), "{computed:?} at {p}");
                }
                prop_assert!(close(computed.previous_p95_ms, naive_quantile(&durations(&before), 0.95)));
                let expected = computed.p95_ms.zip(computed.previous_p95_ms).map(|(now, before)| now / before - 1.0);
                prop_assert_eq!(computed.p95_change, expected);
                let critical: Vec<_> = mine.iter().filter(|it| it.1).map(|it| it.0.duration_ms).collect();
                prop_assert_eq!(computed.critical_cycles, critical.len() as u64);
                let its: f64 = critical.iter().sum();
                prop_assert!((computed.critical_ms - its).abs() < 0.001);
                if let Some(share) = computed.critical_time_share {
                    prop_assert!((share - its / all_critical).abs() < 1e-9);
                }
            }
            let shares: f64 = subsystems.iter().filter_map(|it| it.critical_time_share).sum();
            prop_assert!(shares == 0.0 || (shares - 1.0).abs() < 1e-9, "{}", shares);
        }
    }
}
