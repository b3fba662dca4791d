//! The report of a cycle: what its end makes of the parts that have not ended, and the sum of all.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{End, EndedPart, MAX_LOGGED, PartState, Ran, Run};
use crate::{
    engine::{LastPart, Part, member::Turn, plan::chain},
    ledger::Hash,
    model::{
        CycleState, FinishedCycle, Name, Output, SkipReason, SubsystemReport, SubsystemState,
        text::{clean, shortened},
    },
};

impl Run<'_> {
    /// Ends the remaining parts, and makes the report.
    pub(super) fn finish(mut self, end: End) -> Ran {
        let duration = self.start.elapsed();
        for position in 0..self.parts.len() {
            if self.parts[position].ended().is_none() {
                self.cut_off(position, end, duration);
            }
        }
        let not_registered = self.not_registered();
        let Self { engine, cycle, plan, parts: states, attempts, .. } = self;
        let finished_at = cycle.started_at.saturating_add(duration).unwrap_or(cycle.started_at);
        let called = |position: &usize| states[*position].started().is_some();
        let last =
            (0..states.len()).filter(called).max_by_key(|position| states[*position].ended().map(|part| part.ended));
        let critical_path = chain(last, |position| states[position].release().by).into_iter().filter(called);
        let critical_path = critical_path.map(|position| plan.steps[position].member.subsystem.name.clone()).collect();

        let mut reports = Vec::with_capacity(states.len());
        let mut parts = Vec::with_capacity(states.len());
        let mut held = Vec::new();
        for (position, part) in states.into_iter().enumerate() {
            let PartState::Ended(part) = part else { continue };
            let EndedPart { release, started, ended, turn, state, answer, held: its_held } = part;
            held.extend(its_held);
            let member = &plan.steps[position].member;
            let subsystem = &member.subsystem;
            let records_output = subsystem.record_output || cycle.request.record_outputs;
            let succeeded = state == SubsystemState::Succeeded;
            let report = Arc::new(SubsystemReport {
                name: subsystem.name.clone(),
                queued: started.unwrap_or(release.at).saturating_sub(release.at),
                started,
                ended,
                attempts: attempts[position].load(Ordering::Relaxed),
                issues: answer.issues,
                metrics: answer.metrics,
                output_sha256: succeeded.then(|| Hash::of_bytes(answer.output.as_bytes()).0),
                recorded_output: (succeeded && records_output).then(|| answer.output.clone()),
                state,
            });
            if let Some(was_whole) = turn {
                member.standing.lock().last_turn = Turn { cycle_id: cycle.cycle_id, was_whole };
            }
            let (cycle_id, started_at) = (cycle.cycle_id, cycle.started_at);
            parts.push(Part {
                standing: member.standing.clone(),
                last: LastPart { cycle_id, started_at, finished_at, report: report.clone() },
                output: succeeded.then_some(Output { cycle_id, payload: answer.output }),
            });
            reports.push((report, subsystem.critical));
        }
        for name in &plan.unregistered {
            let report = SubsystemReport::not_called(name.clone(), not_registered.clone());
            reports.push((Arc::new(report), false));
        }
        let (state, error) = sum_up(&reports, end);
        let finished = FinishedCycle {
            cycle_id: cycle.cycle_id,
            epoch: engine.epoch,
            trigger: cycle.request.trigger.clone(),
            scheduled_at: Some(cycle.request.scheduled_at),
            request_id: cycle.request.request_id.clone(),
            triggered_by: cycle.request.triggered_by.clone(),
            trace_id: cycle.trace.id(),
            started_at: Some(cycle.started_at),
            finished_at,
            duration,
            state,
            error,
            critical_path,
            subsystems: reports.into_iter().map(|(report, _)| report).collect(),
        };
        Ran { finished, parts, held }
    }

    /// Ends a part that had not ended when the cycle did.
    fn cut_off(&mut self, position: usize, end: End, now: Duration) {
        let deadline = self.cycle.deadline;
        let started = self.parts[position].started();
        let state = match (end, started) {
            (End::Deadline, Some(started)) => {
                let state = SubsystemState::TimedOut(format!("no answer within the cycle's deadline of {deadline:?}"));
                self.count_failure(&self.plan.steps[position].member, &state, now.saturating_sub(started));
                state
            }
            (End::Deadline, None) => {
                let waited = match self.waiting {
                    Some((waiting, bytes)) if waiting == position => {
                        format!("while it waited for memory for its inputs of {bytes} bytes")
                    }
                    _ => "before its turn".to_owned(),
                };
                let message = format!("the cycle's deadline of {deadline:?} passed {waited}");
                SubsystemState::Skipped(SkipReason::CycleDeadline, message)
            }
            (End::Cancelled | End::Complete, _) => SubsystemState::Cancelled,
        };
        let attempts = self.attempts[position].load(Ordering::Relaxed);
        self.observer.ended(position, &state, attempts, now);
        self.parts[position].end(state, now, started.map(|_| false), None);
    }
}

/// How a cycle ended, and its failures in one line: the causes first, then the subsystems that were skipped for them.
/// Only this function makes that line. A semicolon is only between two failures.
fn sum_up(reports: &[(Arc<SubsystemReport>, bool)], end: End) -> (CycleState, String) {
    const NAMED: usize = 8;
    let mut failed = 0;
    let mut ran = 0;
    let mut critical_failed = false;
    let (mut causes, mut skipped) = (Vec::new(), Vec::new());
    for (report, critical) in reports {
        let is_failure = report.state.is_failure();
        let counts = is_failure || matches!(report.state, SubsystemState::Succeeded | SubsystemState::Cancelled);
        ran += usize::from(counts);
        failed += usize::from(is_failure);
        critical_failed |= is_failure && *critical;
        match &report.state {
            _ if !is_failure => {}
            state @ SubsystemState::Skipped(SkipReason::RequirementFailed | SkipReason::CycleDeadline, _) => {
                skipped.push((&report.name, state));
            }
            state => causes.push((&report.name, state)),
        }
    }
    let state = match end {
        End::Cancelled => CycleState::Cancelled,
        _ if failed == 0 => CycleState::Succeeded,
        _ if critical_failed || failed == ran => CycleState::Failed,
        _ => CycleState::Degraded,
    };
    let mut text = Vec::new();
    if end == End::Cancelled {
        text.push("cancelled".to_owned());
    }
    if failed > 0 {
        let failures = causes.iter().chain(&skipped).take(NAMED).map(|(name, state)| failure(name, state));
        let mut failures: Vec<_> = failures.collect();
        if failed > NAMED {
            failures.push(format!("and {} more", failed - NAMED));
        }
        text.push(format!("{failed} of {} failed: {}", reports.len(), failures.join("; ")));
    }
    (state, text.join("; "))
}

fn failure(name: &Name, state: &SubsystemState) -> String {
    let message = clean(&shortened(state.message(), MAX_LOGGED)).replace(';', ",");
    let message = message.trim();
    match state {
        SubsystemState::Failed(code, _) => format!("{name} {code}: {message}"),
        SubsystemState::CircuitOpen(_) => format!("{name} circuit open: {message}"),
        SubsystemState::TimedOut(_) => format!("{name} timed out: {message}"),
        _ => format!("{name} skipped: {message}"),
    }
}
