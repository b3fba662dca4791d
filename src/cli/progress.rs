//! Progress of running cycles: a bar at the bottom of a terminal.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    time::Duration,
};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, TermLike};
use jiff::Timestamp;

use super::{
    HOST,
    output::{count, milliseconds, names, timestamp},
};
use crate::proto::orchestrator::v1 as pb;

/// Shows the oldest running cycle, and how many others run, below the lines that are printed with [`Bar::above`]. One
/// line, so that the printed lines do not jump when cycles start and end. Removed when dropped.
pub(super) struct Bar {
    shown: Option<(u64, ProgressBar)>,
    target: fn() -> ProgressDrawTarget,
    /// The running cycles, by id.
    cycles: BTreeMap<u64, Moving>,
}

/// A running cycle.
struct Moving {
    started_at: Option<Timestamp>,
    subsystems: HashSet<String>,
    running: BTreeSet<String>,
    ended: HashSet<String>,
    failed: u64,
}

impl Bar {
    /// On stdout.
    pub(super) fn on_stdout() -> Self {
        Self::new(|| Margin::on(Term::buffered_stdout()))
    }

    /// On stderr.
    pub(super) fn on_stderr() -> Self {
        Self::new(|| Margin::on(Term::buffered_stderr()))
    }

    fn new(target: fn() -> ProgressDrawTarget) -> Self {
        Self { shown: None, target, cycles: BTreeMap::new() }
    }

    /// Prints lines while the bar is hidden.
    pub(super) fn above<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.shown {
            Some((_, bar)) => bar.suspend(print),
            None => print(),
        }
    }

    /// A cycle has started.
    pub(super) fn start(&mut self, started: &pb::CycleStarted) {
        let moving = Moving::new(started);
        // A subsystem is in one cycle at a time, so a known cycle with a subsystem of this one has ended. The filter
        // may have dropped its record, and the end of its last part may have been lost.
        self.cycles.retain(|_, other| other.subsystems.is_disjoint(&moving.subsystems));
        if !moving.subsystems.is_empty() {
            self.cycles.insert(started.cycle_id, moving);
        }
        self.draw();
    }

    /// A cycle has made progress.
    pub(super) fn progress(&mut self, progress: &pb::CycleProgress) {
        if let Some(moving) = self.cycles.get_mut(&progress.cycle_id) {
            moving.update(&progress.updates);
            if moving.ended.len() >= moving.subsystems.len() {
                // No part is left to end.
                self.cycles.remove(&progress.cycle_id);
            }
            self.draw();
        }
    }

    /// A cycle has ended.
    pub(super) fn end(&mut self, cycle_id: u64) {
        self.cycles.remove(&cycle_id);
        self.draw();
    }

    /// Removes the bar.
    pub(super) fn clear(&mut self) {
        self.cycles.clear();
        self.draw();
    }

    fn draw(&mut self) {
        /// Interval at which the shown time changes.
        const TICK: Duration = Duration::from_millis(100);
        let oldest = self.cycles.first_key_value();
        if let Some((_, bar)) = self.shown.take_if(|(shown, _)| oldest.is_none_or(|(oldest, _)| oldest != shown)) {
            bar.finish_and_clear();
        }
        let Some((cycle_id, moving)) = oldest else { return };
        let is_new = self.shown.is_none();
        let (_, bar) = self.shown.get_or_insert_with(|| (*cycle_id, moving.bar((self.target)())));
        let others = self.cycles.len() - 1;
        // Complete from its first frame on: ticks, changes of the position and of the message draw it.
        bar.set_prefix(if others == 0 { cycle_id.to_string() } else { format!("{cycle_id} (+{others})") });
        bar.set_position(moving.ended.len() as u64);
        bar.set_message(moving.message());
        if is_new {
            bar.enable_steady_tick(TICK);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Moving {
    fn new(started: &pb::CycleStarted) -> Self {
        Self {
            started_at: started.started_at.as_ref().and_then(timestamp),
            subsystems: started.subsystems.iter().cloned().collect(),
            running: BTreeSet::new(),
            ended: HashSet::new(),
            failed: 0,
        }
    }

    /// A bar for this cycle. The cycle may have run for a while: the watcher came late, or other cycles were shown
    /// before.
    fn bar(&self, target: ProgressDrawTarget) -> ProgressBar {
        let elapsed = self
            .started_at
            .and_then(|at| Duration::try_from(HOST.clock.now().duration_since(at)).ok())
            .unwrap_or_default();
        let bar = ProgressBar::with_draw_target(Some(self.subsystems.len() as u64), target).with_elapsed(elapsed);
        if let Ok(style) = ProgressStyle::with_template("cycle {prefix}  [{bar:24}] {pos}/{len}  {took}  {wide_msg}") {
            let took = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(&milliseconds((state.elapsed().as_secs_f64() * 10.0).floor() * 100.0));
            };
            bar.set_style(style.progress_chars("=> ").with_key("took", took));
        }
        bar
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
    }

    /// The names that are running, and the number of failures.
    fn message(&self) -> String {
        /// Most names that fit into a line.
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

/// A terminal whose last columns are left free. indicatif fills a line with spaces, and if the user presses Ctrl-C
/// then, the terminal shows `^C` on a new line, below a bar that can no longer be removed.
#[derive(Debug)]
struct Margin(Term);

impl Margin {
    /// Columns of `^C`, and one more.
    const COLUMNS: u16 = 3;

    fn on(terminal: Term) -> ProgressDrawTarget {
        /// Width that indicatif assumes by default.
        const REDRAWS_PER_SECOND: u8 = 20;
        if terminal.is_term() {
            ProgressDrawTarget::term_like_with_hz(Box::new(Self(terminal)), REDRAWS_PER_SECOND)
        } else {
            ProgressDrawTarget::hidden()
        }
    }
}

impl TermLike for Margin {
    fn width(&self) -> u16 {
        self.0.width().saturating_sub(Self::COLUMNS)
    }

    fn height(&self) -> u16 {
        self.0.height()
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_up(n)
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_down(n)
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_right(n)
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_left(n)
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.0.write_line(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.0.write_str(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.0.clear_line()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
impl Bar {
    /// A hidden bar.
    pub(super) fn hidden() -> Self {
        Self::new(ProgressDrawTarget::hidden)
    }

    /// The text of the bar: the cycles, how many parts have ended, and the rest.
    pub(super) fn shown(&self) -> Option<(String, u64, String)> {
        self.shown.as_ref().map(|(_, bar)| (bar.prefix(), bar.position(), bar.message()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use pb::SubsystemState::{Failed, Running, Succeeded};

    use super::*;

    /// The output of all [`Recorder`]s.
    static WRITTEN: Mutex<String> = Mutex::new(String::new());

    /// A terminal that keeps its output.
    #[derive(Debug)]
    struct Recorder;

    impl TermLike for Recorder {
        fn width(&self) -> u16 {
            80
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            WRITTEN.lock().unwrap().push_str(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_first_frame_names_its_cycle() {
        let mut bar = Bar::new(|| ProgressDrawTarget::term_like(Box::new(Recorder)));
        bar.start(&started(7, &["a", "b"]));
        drop(bar);
        let written = WRITTEN.lock().unwrap();
        assert!(written.trim_start().starts_with("cycle 7  ["), "{written:?}");
    }

    fn started(cycle_id: u64, subsystems: &[&str]) -> pb::CycleStarted {
        let subsystems = subsystems.iter().map(|&name| name.into()).collect();
        pb::CycleStarted { cycle_id, subsystems, ..pb::CycleStarted::default() }
    }

    fn progress(cycle_id: u64, updates: &[(&str, pb::SubsystemState)]) -> pb::CycleProgress {
        let update = |&(name, state): &(&str, pb::SubsystemState)| pb::SubsystemProgress {
            name: name.into(),
            state: state.into(),
            ..pb::SubsystemProgress::default()
        };
        pb::CycleProgress { cycle_id, updates: updates.iter().map(update).collect(), dropped: 0 }
    }

    fn says(cycles: &str, ended: u64, message: &str) -> (String, u64, String) {
        (cycles.into(), ended, message.into())
    }

    #[test]
    fn follows_a_cycle() {
        let mut bar = Bar::hidden();
        bar.start(&started(7, &["a", "b\x1b[2J", "c"]));
        bar.progress(&progress(7, &[("a", Running), ("b\x1b[2J", Running)]));
        assert_eq!(bar.shown(), Some(says("7", 0, "running a, b[2J")));
        bar.progress(&progress(7, &[("a", Failed), ("b\x1b[2J", Succeeded)]));
        // The state of all parts is sent again to slow watchers.
        bar.progress(&progress(7, &[("a", Failed), ("c", Running)]));
        assert_eq!(bar.shown(), Some(says("7", 2, "1 failure  running c")));
        bar.end(7);
        assert_eq!(bar.shown(), None);

        // The bar is removed with the last part: the filter may drop the record itself.
        bar.start(&started(8, &["a", "b"]));
        bar.progress(&progress(8, &[("a", Failed), ("b", Running)]));
        assert!(bar.shown().is_some());
        bar.progress(&progress(8, &[("b", Succeeded)]));
        assert_eq!(bar.shown(), None);
    }

    #[test]
    fn the_oldest_of_several_running_cycles_is_shown() {
        let mut bar = Bar::hidden();
        bar.start(&started(8, &["c"]));
        bar.progress(&progress(8, &[("c", Running)]));
        // A cycle with a lower id can start later.
        bar.start(&started(7, &["a", "b"]));
        bar.progress(&progress(7, &[("b", Running)]));
        assert_eq!(bar.shown(), Some(says("7 (+1)", 0, "running b")));
        bar.progress(&progress(8, &[("c", Failed)]));
        assert_eq!(bar.shown(), Some(says("7", 0, "running b")));
        bar.start(&started(9, &["d", "e"]));
        bar.progress(&progress(9, &[("d", Succeeded)]));
        bar.end(7);
        assert_eq!(bar.shown(), Some(says("9", 1, "")));
        bar.progress(&progress(7, &[("a", Running)]));
        assert_eq!(bar.shown(), Some(says("9", 1, "")));
    }

    #[test]
    fn a_cycle_has_ended_if_another_one_has_its_subsystem() {
        let mut bar = Bar::hidden();
        bar.start(&started(1, &["a", "b"]));
        bar.start(&started(2, &["c"]));
        bar.start(&started(3, &["b"]));
        assert_eq!(bar.shown(), Some(says("2 (+1)", 0, "")));
        // The service sends it again when the stream resumes.
        bar.start(&started(2, &["c"]));
        assert_eq!(bar.shown(), Some(says("2 (+1)", 0, "")));
    }
}
