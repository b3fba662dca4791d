//! Reload: replaces all settings and declarations, or none.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{
    Orchestrator, Refusal, Shared, State, Turn,
    offload::offload,
    registry::{Declarations, Entries},
};
use crate::{
    model::{Cause, Identity, IntervalLoop, Name, Subsystem},
    ports::{Retention, Write},
    schedule::LoopOrigin,
};

/// The settings, which can be changed while the process runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Sent to every subsystem in `Initialize`. A process keeps that of its start.
    pub orchestrator_id: Arc<str>,
    /// Deadline of cycles whose request has none.
    pub cycle_deadline: Duration,
    /// Most concurrent calls of all cycles together.
    pub max_concurrent_calls: usize,
    /// Most waiting cycles.
    pub max_queued: usize,
    /// Most bytes of one record.
    pub max_record_bytes: usize,
    /// Most bytes of the latest outputs of all subsystems together; `None` means their share of all memory.
    pub max_outputs_bytes: Option<usize>,
    /// Most registered subsystems.
    pub max_subsystems: usize,
    /// Most loops.
    pub max_loops: usize,
    /// Most watchers.
    pub max_watchers: usize,
    /// Limits of the history.
    pub retention: Retention,
    /// True if calls that change nothing have audit events.
    pub audit_reads: bool,
    /// The identities whose subsystems are not called.
    pub revoked: Arc<BTreeSet<Identity>>,
}

/// The declarations of the configuration file.
#[derive(Clone, Debug, Default)]
pub struct Declared {
    /// Subsystems, each name once.
    pub subsystems: Vec<Subsystem>,
    /// The former names of subsystems, newest first, by their name. Each is there once.
    pub former_names: BTreeMap<Name, Arc<[Name]>>,
    /// Loops, each name once.
    pub loops: Vec<IntervalLoop>,
    /// Subsystems that should be registered, here or by RPC: cycles over all subsystems record each that is not.
    pub expected: BTreeSet<Name>,
}

impl Declared {
    /// The names of the declared subsystems, with their former names.
    pub(super) fn names(&self) -> BTreeMap<Name, Arc<[Name]>> {
        let former = |name: &Name| self.former_names.get(name).cloned().unwrap_or_default();
        self.subsystems.iter().map(|subsystem| (subsystem.name.clone(), former(&subsystem.name))).collect()
    }
}

impl Orchestrator {
    /// Replaces the settings and declarations.
    ///
    /// # Errors
    /// There would be a circular dependency, there is no memory for what is declared, the store can't be written, or
    /// the process drains; then nothing has changed, except for what is revoked.
    pub async fn reload(&self, settings: Settings, declared: Declared) -> Result<(), Refusal> {
        // First, so that a revocation does not wait for the store.
        self.0.engine.revoked.set(settings.revoked.clone());
        if self.0.is_read_only {
            // What the file declares is changed by a restart only.
            self.0.apply(settings);
            return Ok(());
        }
        let cause = Cause::of_service("reload");
        self.change(cause, |shared, turn| async move { shared.reload(turn, settings, declared).await }).await
    }
}

impl Shared {
    async fn reload(&self, turn: Turn, settings: Settings, declared: Declared) -> Result<(), Refusal> {
        let Entries { registered: before, .. } = self.state().registry.snapshot();
        let Declared { subsystems, former_names, loops, expected } = declared;
        let memory = self.memory.clone();
        // The caller applies its part of the configuration after this one, so it waits for the outcome.
        let turn = Turn { late: None, ..turn };
        let (mut turn, changes) = offload(before.len() + subsystems.len(), move || {
            let mut turn = turn;
            let changes = Declarations::of(subsystems, &former_names, &before, &memory);
            let changes = changes.map_err(Refusal::RegistryMemoryFull).and_then(|changes| {
                let present = |name: &Name| changes.former_names.present(name);
                let hold = |settings: IntervalLoop| {
                    let settings = settings.by_present_names(present);
                    let held = memory.try_hold(settings.footprint()).map_err(Refusal::RegistryMemoryFull)?;
                    Ok((settings, held))
                };
                let loops = loops.into_iter().map(hold).collect::<Result<Vec<_>, Refusal>>()?;
                let put = changes.put.iter().map(|entry| entry.member.subsystem.clone()).collect();
                let ordered = turn.order.change(put, &changes.removed).map_err(|ring| changes.refuse(ring));
                ordered.map(|undo| (undo, changes, loops))
            });
            (turn, changes)
        })
        .await;
        let (undo, changes, loops) = changes?;
        let Declarations { put, removed, moved, stored, renamed, former_names, .. } = changes;
        let former_names = Arc::new(former_names);
        let stopped: Vec<_> = {
            let state = self.state();
            let declared = state.loops.iter().filter(|entry| entry.is_declared()).map(|entry| &entry.settings.name);
            declared.filter(|name| !loops.iter().any(|(settings, _)| settings.name == **name)).cloned().collect()
        };
        let (stopping, former) = (stopped.clone(), former_names.clone());
        let told: Vec<_> = renamed.iter().map(|(former, name)| (former.clone(), name.clone())).collect();
        let write = move |state: &State| {
            let changed = state.loops.with_present_names(|name| former.present(name));
            let changed = changed.into_iter().map(|entry| (entry.settings.name.clone(), Some(entry.to_stored())));
            Write {
                renamed: renamed.clone(),
                subsystems: stored.clone(),
                loops: changed.chain(stopping.iter().map(|name| (name.clone(), None))).collect(),
                ..Write::default()
            }
        };
        let clock = self.clock;
        let apply = move |state: &mut State| {
            let mut left = Vec::new();
            // First, so that the connection of a renamed subsystem stays.
            for entry in put {
                let entry = if entry.is_declared() { entry } else { entry.with_present_lease(&state.registry) };
                left.extend(state.registry.put(entry));
            }
            left.extend(removed.iter().filter_map(|name| state.registry.remove(name)));
            state.registry.expect(expected);
            for name in stopped {
                state.loops.remove(&name);
            }
            for entry in state.loops.with_present_names(|name| former_names.present(name)) {
                state.loops.put(entry);
            }
            let now = clock.now();
            state.follow_clock(now);
            for (settings, held) in loops {
                let entry = match state.loops.get(&settings.name) {
                    Some(earlier) if earlier.is_declared() && *earlier.settings == settings => continue,
                    Some(earlier) if earlier.state.stopped => {
                        state.loops.started(settings, LoopOrigin::Config, now).stopped(now)
                    }
                    _ => state.loops.started(settings, LoopOrigin::Config, now),
                };
                state.loops.put(entry.holding(held));
            }
            left
        };
        match self.write(&mut turn, write, apply).await {
            Ok(left) => self.engine.subsystems.forget(&left),
            Err(error) => {
                turn.order.undo(undo);
                return Err(error.into());
            }
        }
        for standing in moved {
            standing.close_breaker();
        }
        for (former, name) in told {
            tracing::info!(subsystem = %name, %former, "renamed by the configuration file");
        }

        self.engine.outputs.set_max(settings.max_outputs_bytes);
        self.engine.slots.set_max(settings.max_concurrent_calls);
        self.sums.set_reads(settings.audit_reads);
        self.apply(settings);
        self.loops_changed.notify_one();
        Ok(())
    }

    fn apply(&self, settings: Settings) {
        self.history.apply(&settings);
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
    }
}
