//! Starts, stops and pauses loops, and fires their ticks.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{select, time::sleep};

use super::{Orchestrator, Refusal, Shared, State, Turn, refusal::NotAdmitted};
use crate::{
    model::{Cause, CycleRequest, IntervalLoop, LoopChoice, LoopStart, Name, TickDisposition, Trigger},
    ports::Write,
    schedule::{LoopEntry, LoopOrigin},
};

impl Orchestrator {
    /// Starts a loop, or changes the settings of a running one.
    ///
    /// # Errors
    /// The file declares the name with other settings, or only a name is given that the file does not declare; there
    /// are too many loops, no memory for it, or it names too many subsystems; the store can't be written; or the
    /// process drains.
    pub async fn start_loop(&self, start: LoopStart, by: Cause) -> Result<LoopEntry, Refusal> {
        self.change(by, |shared, turn| async move { shared.start_loop(turn, start).await }).await
    }

    /// Stops a loop. A declared loop stays listed; others are deleted.
    ///
    /// # Errors
    /// No loop has the name, the store can't be written, or the process drains.
    pub async fn stop_loop(&self, name: &Name, by: Cause) -> Result<LoopEntry, Refusal> {
        let name = name.clone();
        self.change(by, |shared, turn| async move { shared.stop_loop(turn, &name).await }).await
    }

    /// Pauses loops, or resumes them if not `paused`, and returns them.
    ///
    /// # Errors
    /// No loop has the name, the store can't be written, or the process drains.
    pub async fn pause_loops(&self, choice: LoopChoice, paused: bool, by: Cause) -> Result<Vec<LoopEntry>, Refusal> {
        self.change(by, move |shared, turn| async move { shared.pause_loops(turn, choice, paused).await }).await
    }

    /// The loops, by name.
    pub fn loops(&self) -> Vec<LoopEntry> {
        self.0.state().loops.iter().cloned().collect()
    }
}

impl State {
    /// Restarts ticks at the time that the clock was set back to.
    pub(super) fn follow_clock(&mut self, now: Timestamp) {
        for name in self.loops.follow_clock(now) {
            tracing::warn!("loop" = %name, "the clock was set back: its ticks continue from the new time");
        }
    }
}

impl Shared {
    async fn start_loop(&self, mut turn: Turn, start: LoopStart) -> Result<LoopEntry, Refusal> {
        let limits = self.settings();
        if let LoopStart::Of(IntervalLoop { subset: Some(subset), .. }) = &start
            && subset.len() > limits.max_subsystems
        {
            // Each name is a part in the record of every cycle.
            let (named, max) = (subset.len(), limits.max_subsystems);
            return Err(Refusal::invalid("subsystems", format!("are {named}; registry.max_subsystems allows {max}")));
        }
        let now = self.clock.now();
        let (settings, origin) = {
            let state = self.state();
            let (LoopStart::AsDeclared(name) | LoopStart::Of(IntervalLoop { name, .. })) = &start;
            let earlier = state.loops.get(name);
            let settings = match (start, earlier) {
                (LoopStart::Of(settings), _) => settings.by_present_names(|name| state.registry.present(name)),
                (LoopStart::AsDeclared(_), Some(earlier)) if earlier.is_declared() => (*earlier.settings).clone(),
                (LoopStart::AsDeclared(_), _) => return Err(Refusal::invalid("interval", IntervalLoop::NO_INTERVAL)),
            };
            match earlier {
                Some(earlier) if *earlier.settings == settings && !earlier.state.stopped => return Ok(earlier.clone()),
                Some(earlier) if *earlier.settings != settings && earlier.is_declared() => {
                    return Err(Refusal::DeclaredInConfig(settings.name));
                }
                None if state.loops.len() >= limits.max_loops => return Err(Refusal::TooManyLoops(state.loops.len())),
                _ => (settings, earlier.map_or(LoopOrigin::Rpc, |earlier| earlier.origin)),
            }
        };
        let held = self.memory.try_hold(settings.footprint()).map_err(Refusal::RegistryMemoryFull)?;
        let (clock, started) = (self.clock, settings.clone());
        let build = move |state: &State| {
            let entry = state.loops.started(started.clone(), origin, now);
            Write { loops: BTreeMap::from([(started.name.clone(), Some(entry.to_stored()))]), ..Write::default() }
        };
        let put = move |state: &mut State| {
            // Ticks may have been due and accounted for in between.
            let now = clock.now();
            state.follow_clock(now);
            let entry = state.loops.started(settings.clone(), origin, now).holding(held);
            state.loops.put(entry.clone());
            entry
        };
        let entry = self.write(&mut turn, build, put).await?;
        self.loops_changed.notify_one();
        tracing::info!("loop" = %entry.settings.name, interval = ?entry.settings.interval, "a loop has started");
        Ok(entry)
    }

    async fn stop_loop(&self, mut turn: Turn, name: &Name) -> Result<LoopEntry, Refusal> {
        if self.state().loops.get(name).is_none() {
            return Err(Refusal::LoopNotFound(name.clone()));
        }
        let (clock, stopping) = (self.clock, name.clone());
        let stopped = move |state: &State| Some(state.loops.get(&stopping)?.clone().stopped(clock.now()));
        let (still_stopped, stopping) = (stopped.clone(), name.clone());
        let build = move |state: &State| {
            let stored = stopped(state).filter(LoopEntry::is_declared).map(|entry| entry.to_stored());
            Write { loops: BTreeMap::from([(stopping.clone(), stored)]), ..Write::default() }
        };
        let put = move |state: &mut State| {
            state.follow_clock(clock.now());
            let entry = still_stopped(state)?;
            if entry.is_declared() {
                state.loops.put(entry.clone());
            } else {
                state.loops.remove(&entry.settings.name);
            }
            Some(entry)
        };
        let entry = self.write(&mut turn, build, put).await?;
        tracing::info!("loop" = %name, "a loop has stopped");
        entry.ok_or_else(|| Refusal::LoopNotFound(name.clone()))
    }

    async fn pause_loops(&self, mut turn: Turn, choice: LoopChoice, paused: bool) -> Result<Vec<LoopEntry>, Refusal> {
        {
            let state = self.state();
            if let LoopChoice::Named(name) = &choice
                && state.loops.get(name).is_none()
            {
                return Err(Refusal::LoopNotFound(name.clone()));
            }
            if state.loops.is_paused(&choice) == paused {
                return Ok(state.loops.chosen(&choice));
            }
        }
        let (clock, chosen) = (self.clock, choice.clone());
        let build = move |state: &State| {
            let loops = state.loops.with_pause(&chosen, paused, clock.now());
            let stored = loops.into_iter().map(|entry| (entry.settings.name.clone(), Some(entry.to_stored())));
            Write { loops: stored.collect(), ..Write::default() }
        };
        let applied = choice.clone();
        let put = move |state: &mut State| {
            let now = clock.now();
            state.follow_clock(now);
            state.loops.set_paused(&applied, paused, now);
            state.loops.chosen(&applied)
        };
        let loops = self.write(&mut turn, build, put).await?;
        self.loops_changed.notify_one();
        match (&choice, paused) {
            (LoopChoice::Named(name), true) => tracing::info!("loop" = %name, "a loop is paused"),
            (LoopChoice::Named(name), false) => tracing::info!("loop" = %name, "a loop is resumed"),
            (LoopChoice::All, true) => tracing::info!("all loops are paused"),
            (LoopChoice::All, false) => tracing::info!("all loops are resumed"),
        }
        Ok(loops)
    }

    /// Starts the cycles of loops when their ticks are due.
    pub(super) async fn fire_ticks(self: Arc<Self>) {
        /// Longest time between checks of the wall clock, which may be set.
        const LOOK_AGAIN: Duration = Duration::from_secs(1);
        loop {
            let next = self.state().next_tick_at();
            let wait = next.map(|at| Duration::try_from(at.duration_since(self.clock.now())).unwrap_or_default());
            select! {
                biased;
                () = self.loops_changed.notified() => {}
                () = sleep(wait.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN)), if next.is_some() => {}
            }
            self.fire_due_ticks();
        }
    }

    fn fire_due_ticks(&self) {
        let now = self.clock.now();
        let max_queued = self.settings().max_queued;
        let mut state = self.state();
        if state.has_lapsed {
            return;
        }
        state.follow_clock(now);
        for (settings, due_at) in state.loops.due(now) {
            let request = Arc::new(CycleRequest {
                subset: settings.subset.clone(),
                parameters: settings.parameters.clone(),
                overlap: settings.overlap,
                deadline: settings.deadline,
                record_outputs: settings.record_outputs,
                ..CycleRequest::over_all(Trigger::Loop(settings.name.clone()), due_at)
            });
            let (disposition, cycle_id) = match state.admit(request, None, false, max_queued) {
                Ok(admitted) => (TickDisposition::Ran, Some(admitted.cycle_id)),
                Err(NotAdmitted::CycleRunning(_)) => (TickDisposition::Skipped, None),
                Err(NotAdmitted::CycleWaiting(_)) => (TickDisposition::Coalesced, None),
                Err(NotAdmitted::Draining) => (TickDisposition::Dropped, None),
                Err(refusal @ (NotAdmitted::QueueFull(_) | NotAdmitted::StoreUnavailable(_))) => {
                    if state.loops.warns_of_drops(&settings.name, now) {
                        tracing::warn!("loop" = %settings.name, %due_at, %refusal, "ticks are dropped");
                    }
                    (TickDisposition::Dropped, None)
                }
            };
            state.loops.account(&settings.name, due_at, disposition, cycle_id, now);
        }
        drop(state);
        self.queue_changed.notify_one();
    }
}
