//! The running cycle as it moves: a bar at the bottom of a terminal.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    time::Duration,
};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, TermLike};

use super::output::{count, milliseconds, names};
use crate::proto::orchestrator::v1::{self as pb, cycle_event::Event};

/// Shows the running cycle, if there is one, below everything that is printed with [`Bar::above`]. Gone when dropped.
pub(super) struct Bar {
    shown: Option<ProgressBar>,
    target: fn() -> ProgressDrawTarget,
    cycle_id: u64,
    /// Where the history stood when the cycle started.
    started_after: u64,
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
        Self {
            shown: None,
            target,
            cycle_id: 0,
            started_after: 0,
            running: BTreeSet::new(),
            ended: HashSet::new(),
            failed: 0,
        }
    }

    /// Prints something while the bar is out of the way.
    pub(super) fn above<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.shown {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Moves on by an event that stands at this revision.
    pub(super) fn follow(&mut self, revision: u64, event: &Event) {
        match event {
            Event::Started(started) => {
                self.start(started);
                self.started_after = revision;
            }
            Event::Progress(progress) if progress.cycle_id == self.cycle_id => self.update(&progress.updates),
            Event::Progress(_) | Event::Bookmark(_) => {}
            Event::Recorded(_) | Event::Unreadable(_) => self.clear(),
        }
        // Its record may pass no filter, and the end of its last part may be lost on the way.
        if revision > self.started_after {
            self.clear();
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
            let ended = self.ended.len() as u64;
            bar.set_position(ended);
            bar.set_message(self.message());
            if bar.length() == Some(ended) {
                // Nothing moves any more.
                self.clear();
            }
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

/// A terminal whose last columns are left free. indicatif fills a line with spaces, and when somebody presses Ctrl-C then,
/// the terminal shows `^C` on a line of its own, below a bar that can't be taken away any more.
#[derive(Debug)]
struct Margin(Term);

impl Margin {
    /// Those that `^C` takes, and one more.
    const COLUMNS: u16 = 3;

    fn on(terminal: Term) -> ProgressDrawTarget {
        /// As indicatif has it.
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
        let started = Event::Started(pb::CycleStarted { cycle_id: 7, subsystems, ..pb::CycleStarted::default() });
        bar.follow(4, &started);
        bar.follow(4, &progress(vec![update("a", Running), update("b\x1b[2J", Running)]));
        assert_eq!(bar.message(), "running a, b[2J");
        bar.follow(4, &progress(vec![update("a", Failed), update("b\x1b[2J", Succeeded)]));
        // How the cycle stands is sent again to those who fell behind.
        bar.follow(4, &progress(vec![update("a", Failed), update("c", Running)]));
        assert_eq!((bar.message().as_str(), bar.ended.len()), ("1 failure  running c", 2));
        assert_eq!(bar.shown.as_ref().map(ProgressBar::position), Some(2));
        bar.follow(5, &Event::Recorded(bytes::Bytes::new()));
        assert!(bar.shown.is_none() && bar.ended.is_empty());

        // It is gone with the last part, and when the history has gone past it: the record itself may pass no filter.
        bar.follow(5, &started);
        bar.follow(5, &progress(vec![update("a", Failed), update("b", Succeeded), update("c", Running)]));
        assert!(bar.shown.is_some());
        bar.follow(5, &progress(vec![update("c", Succeeded)]));
        assert!(bar.shown.is_none());
        bar.follow(6, &started);
        bar.follow(6, &Event::Bookmark(pb::Bookmark {}));
        assert!(bar.shown.is_some());
        bar.follow(7, &Event::Bookmark(pb::Bookmark {}));
        assert!(bar.shown.is_none());
    }
}
