//! The running cycle as it moves: a bar at the bottom of a terminal.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::output::{count, milliseconds, names};
use crate::proto::orchestrator::v1::{self as pb, cycle_event::Event};

/// Shows the running cycle, if there is one, below everything that is printed with [`Bar::above`]. Gone when dropped.
pub(super) struct Bar {
    shown: Option<ProgressBar>,
    target: fn() -> ProgressDrawTarget,
    cycle_id: u64,
    running: BTreeSet<String>,
    ended: HashSet<String>,
    failed: u64,
}

impl Bar {
    /// On stdout.
    pub(super) fn on_stdout() -> Self {
        Self::new(ProgressDrawTarget::stdout)
    }

    /// On stderr.
    pub(super) fn on_stderr() -> Self {
        Self::new(ProgressDrawTarget::stderr)
    }

    fn new(target: fn() -> ProgressDrawTarget) -> Self {
        Self { shown: None, target, cycle_id: 0, running: BTreeSet::new(), ended: HashSet::new(), failed: 0 }
    }

    /// Prints something while the bar is out of the way.
    pub(super) fn above<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.shown {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Moves on by an event.
    pub(super) fn follow(&mut self, event: &Event) {
        match event {
            Event::Started(started) => self.start(started),
            Event::Progress(progress) if progress.cycle_id == self.cycle_id => self.update(&progress.updates),
            Event::Progress(_) | Event::Bookmark(_) => {}
            Event::Recorded(_) => self.clear(),
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.shown.take() {
            bar.finish_and_clear();
        }
        self.cycle_id = 0;
        self.running.clear();
        self.ended.clear();
        self.failed = 0;
    }

    fn start(&mut self, started: &pb::CycleStarted) {
        /// So often the time moves on, and no oftener.
        const TICK: Duration = Duration::from_millis(100);
        self.clear();
        self.cycle_id = started.cycle_id;
        let bar = ProgressBar::with_draw_target(Some(started.subsystems.len() as u64), (self.target)());
        // It has been running for a while when a watcher comes late.
        let since = started.started_at.and_then(|at| std::time::SystemTime::try_from(at).ok());
        let bar = bar.with_elapsed(since.and_then(|since| since.elapsed().ok()).unwrap_or_default());
        if let Ok(style) = ProgressStyle::with_template("cycle {prefix}  [{bar:24}] {pos}/{len}  {took}  {wide_msg}") {
            let took = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(&milliseconds((state.elapsed().as_secs_f64() * 10.0).floor() * 100.0));
            };
            bar.set_style(style.progress_chars("=> ").with_key("took", took));
        }
        bar.set_prefix(started.cycle_id.to_string());
        bar.enable_steady_tick(TICK);
        self.shown = Some(bar);
    }

    fn update(&mut self, updates: &[pb::SubsystemProgress]) {
        for update in updates {
            match update.state() {
                pb::SubsystemState::Waiting => _ = self.running.remove(&update.name),
                pb::SubsystemState::Running => _ = self.running.insert(update.name.clone()),
                state => {
                    self.running.remove(&update.name);
                    let is_failure = matches!(
                        state,
                        pb::SubsystemState::Failed | pb::SubsystemState::TimedOut | pb::SubsystemState::CircuitOpen
                    );
                    if self.ended.insert(update.name.clone()) && is_failure {
                        self.failed += 1;
                    }
                }
            }
        }
        if let Some(bar) = &self.shown {
            bar.set_position(self.ended.len() as u64);
            bar.set_message(self.message());
        }
    }

    /// What is running and what has failed.
    fn message(&self) -> String {
        /// More would not fit into a line.
        const NAMES: usize = 6;
        let failed = if self.failed == 0 { String::new() } else { format!("{}  ", count(self.failed, "failure")) };
        let first: Vec<_> = self.running.iter().take(NAMES).cloned().collect();
        match (first.is_empty(), self.running.len().saturating_sub(NAMES)) {
            (true, _) => failed,
            (false, 0) => format!("{failed}running {}", names(&first, NAMES)),
            (false, more) => format!("{failed}running {} and {more} more", names(&first, NAMES)),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(name: &str, state: pb::SubsystemState) -> pb::SubsystemProgress {
        pb::SubsystemProgress { name: name.into(), state: state.into(), ..pb::SubsystemProgress::default() }
    }

    fn progress(updates: Vec<pb::SubsystemProgress>) -> Event {
        Event::Progress(pb::CycleProgress { cycle_id: 7, updates, dropped: 0 })
    }

    #[test]
    fn follows_a_cycle() {
        use pb::SubsystemState::{Failed, Running, Succeeded};
        let mut bar = Bar::new(ProgressDrawTarget::hidden);
        let subsystems = ["a", "b", "c"].map(String::from).to_vec();
        bar.follow(&Event::Started(pb::CycleStarted { cycle_id: 7, subsystems, ..pb::CycleStarted::default() }));
        bar.follow(&progress(vec![update("a", Running), update("b\x1b[2J", Running)]));
        assert_eq!(bar.message(), "running a, b[2J");
        bar.follow(&progress(vec![update("a", Failed), update("b\x1b[2J", Succeeded)]));
        // How the cycle stands is sent again to those who fell behind.
        bar.follow(&progress(vec![update("a", Failed), update("c", Running)]));
        assert_eq!((bar.message().as_str(), bar.ended.len()), ("1 failure  running c", 2));
        assert_eq!(bar.shown.as_ref().map(ProgressBar::position), Some(2));
        bar.follow(&Event::Recorded(bytes::Bytes::new()));
        assert!(bar.shown.is_none() && bar.ended.is_empty());
    }
}
