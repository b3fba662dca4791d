//! The start of a process: restores the state of the earlier one from the store.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    iter,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::{
    sync::{Notify, mpsc, watch as latest},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Declared, Orchestrator, OrchestratorTasks, Position, Published, Refusal, Settings, Shared, State, Sums,
    admission::Admitted,
    attended::Attended,
    checkpoints::Checkpoints,
    figures::Counts,
    history::History,
    line::Line,
    registry::{FormerNames, Lease, Origin, Registered, Registry, footprint},
    writing,
};
use crate::{
    engine::{Engine, InputRoom, LastPart, Member, Order, RevokedOwners, Slots, Standing},
    host::Host,
    ledger::Signer,
    memory::{Memory, Shares},
    model::{
        AuditEvent, AuditTargets, Begin, Cause, Code, CycleId, CycleRequest, CycleState, Epoch, FinishedCycle,
        IntervalLoop, LoopChoice, Name, SkipReason, Subsystem, SubsystemState, Trigger,
    },
    ports::{
        Contents, Filter, Lost, OpenCycle, PageLimits, Record, Spans, Stage, Store, StoreError, StoredOutput,
        StoredSubsystem, Subsystems, UnreadableRow, Write,
    },
    record,
    schedule::{LoopOrigin, Loops},
};

/// A store that was taken over.
pub struct TakenOver {
    /// The store.
    pub store: Arc<dyn Store>,
    /// Its contents then.
    pub contents: Contents,
    /// What signs its log.
    pub signer: Signer,
    /// The encoded `ControlEntry` of a new log, if one begins.
    pub began: Option<Bytes>,
    /// The checkpoint that was published last, if the store is only looked at.
    pub published: Published,
    /// How the process begins.
    pub begin: Begin,
    /// What the process has summed up before. `None`: nothing.
    pub sums: Option<Sums>,
    /// What the process shows of the store beyond this term. `None`: nothing.
    pub history: Option<History>,
}

impl TakenOver {
    /// A store whose log goes on, for a process that begins where the earlier one ended.
    pub fn new(store: Arc<dyn Store>, contents: Contents, signer: Signer) -> Self {
        let published = Published::default();
        let (sums, history) = (None, None);
        Self { store, contents, signer, began: None, published, begin: Begin::Again, sums, history }
    }
}

impl Orchestrator {
    /// Restores the state of the earlier process, and starts running cycles, unless the store is only looked at.
    ///
    /// # Errors
    /// The declared and stored subsystems have a circular dependency, there is no memory for them, or the store can't
    /// be written.
    pub async fn start(
        settings: Settings,
        memory: &Shares,
        host: Host,
        subsystems: Arc<dyn Subsystems>,
        taken_over: TakenOver,
        declared: Declared,
        spans: Arc<dyn Spans>,
    ) -> Result<(Self, OrchestratorTasks), Refusal> {
        let TakenOver { store, mut contents, signer, began, published, begin: how, sums, history } = taken_over;
        let history = history.unwrap_or_else(|| History::new(store.clone(), &memory.history, &settings));
        let is_read_only = how == Begin::ReadOnly;
        let Host { clock, random, started } = host;
        let (now, begin) = (clock.now(), Instant::now());
        memory.outputs.set_max(settings.max_outputs_bytes);
        let revoked = RevokedOwners::default();
        revoked.set(settings.revoked.clone());
        let hold = |bytes| memory.registry.try_hold(bytes).map_err(Refusal::RegistryMemoryFull);
        let mut state = State {
            registry: Registry::default(),
            loops: Loops::new(random.clone())
                .still_if(is_read_only)
                .all_paused_if(contents.loops.iter().any(|stored| stored.state.paused_with_all)),
            line: Line::default(),
            live: BTreeMap::new(),
            requests: HashMap::new(),
            attended: Attended::default(),
            cancelled: VecDeque::new(),
            last_admitted: contents.last_cycle_id,
            noted: contents.last_cycle_id,
            noted_durably: contents.last_cycle_id,
            recorded: contents.last_cycle_id.0.saturating_sub(contents.open.len() as u64),
            last: None,
            last_revision: contents.last_revision,
            history: history.clone(),
            store_error: latest::Sender::new(None),
            draining: false,
            has_lapsed: false,
            leases_held: None,
            ran_at: None,
            counts: Counts::default(),
        };
        match contents.last_record.take() {
            Some(Ok(record)) => state.last = Some(Arc::new(record)),
            Some(Err(unreadable)) => history.extent().tell_unreadable(&unreadable),
            None => {}
        }
        let last = state.last.as_ref().filter(|last| last.revision == state.last_revision);
        let end = Position { revision: state.last_revision, epoch: last.map(|last| last.epoch) };
        tell_unreadable_rows(&contents.unreadable);
        let mut write = Write { epoch: contents.epoch, began, ..Write::default() };

        // The registry: a declared subsystem takes precedence over one that was registered by RPC under the same name.
        let mut latest: BTreeMap<Name, _> =
            std::mem::take(&mut contents.outputs).into_iter().map(|stored| (stored.name.clone(), stored)).collect();
        let mut stored: BTreeMap<Name, StoredSubsystem> =
            std::mem::take(&mut contents.subsystems).into_iter().map(|stored| (stored.name.clone(), stored)).collect();
        let is_declared: BTreeSet<_> = declared.subsystems.iter().map(|subsystem| subsystem.name.clone()).collect();
        let by_rpc = || stored.values().filter(|stored| stored.spec.is_some() && !is_declared.contains(&stored.name));
        let asked = declared.former_names.iter().map(|(name, former_names)| (name, &**former_names));
        let asked = asked.chain(by_rpc().map(|stored| (&stored.name, &*stored.former_names)));
        let unreadable = || contents.unreadable.iter().filter(|row| row.what == "subsystem");
        let is_registered = |name: &Name| {
            is_declared.contains(name)
                || stored.get(name).is_some_and(|stored| stored.spec.is_some())
                || unreadable().any(|row| row.key == name.as_str())
        };
        let former = FormerNames::of(asked, is_registered);
        let present = |name: &Name| former.present(name);
        let mut entries = Vec::new();
        let standing = |stored: Option<StoredOutput>| {
            let standing = |stored: StoredOutput| {
                Arc::new(Standing::with_output(stored.output, stored.finished_at, &memory.outputs))
            };
            stored.map_or_else(Arc::default, standing)
        };
        for subsystem in declared.subsystems {
            let subsystem = subsystem.by_present_names(present);
            let name = subsystem.name.clone();
            let asked = declared.former_names.get(&name).map_or(&[][..], |names| names);
            let former_names = former.of_declared(&name, asked);
            let (mut output, mut row) = (latest.remove(&name), stored.remove(&name));
            let by_former = |former: &&Name| latest.contains_key(*former) || stored.contains_key(*former);
            // It is new, and the file has declared it by this name until now.
            let earlier = former_names.iter().find(by_former).filter(|_| output.is_none() && row.is_none());
            if let Some(earlier) = earlier {
                (output, row) = (latest.remove(earlier), stored.remove(earlier));
                write.renamed.insert(earlier.clone(), name.clone());
                tracing::info!(subsystem = %name, former = %earlier, "renamed by the configuration file");
            }
            let held = hold(footprint(&subsystem, None, &former_names))?;
            let suspended = row.as_ref().is_some_and(|stored| stored.suspended);
            let is_written = row.is_some_and(|stored| stored.spec.is_some()) || (earlier.is_some() && suspended);
            let member = Member::new(Arc::new(subsystem), suspended, standing(output)).holding(held);
            let entry = Registered { member, origin: Origin::Config, former_names: former_names.clone() };
            if is_written {
                write.subsystems.insert(name, Some(Arc::new(entry.to_stored())));
            }
            entries.push(entry);
        }
        for (name, stored) in stored {
            let Some(spec) = &stored.spec else {
                // It was declared earlier, and no longer is.
                write.subsystems.insert(name, None);
                continue;
            };
            let standing = standing(latest.remove(&name));
            match Subsystem::from_spec(spec) {
                Ok(subsystem) => {
                    let owner = stored.owner.clone();
                    let former_names = former.of_subsystem(&name, &stored.former_names);
                    let renaming = subsystem.with_present_names(present);
                    let is_changed = renaming.is_some() || *former_names != *stored.former_names;
                    let subsystem = renaming.unwrap_or(subsystem);
                    let held = hold(footprint(&subsystem, owner.as_ref(), &former_names))?;
                    let member = Member::new(Arc::new(subsystem), stored.suspended, standing);
                    let member = member.owned_by(owner).holding(held);
                    let lease = stored.lease.map(|length| Lease::new(length, begin));
                    let entry = Registered { member, origin: Origin::Rpc { lease }, former_names };
                    if is_changed {
                        write.subsystems.insert(name, Some(Arc::new(entry.to_stored())));
                    }
                    entries.push(entry);
                }
                // Rules have become stricter since. It stays stored with its output, for a version that accepts it.
                Err(violations) => {
                    tracing::error!(subsystem = %name, %violations, "skipped: a stored registration is invalid");
                }
            }
        }
        // Unreadable rows stay stored, with their outputs.
        for row in unreadable() {
            latest.remove(row.key.as_str());
        }
        // Outputs of subsystems that are no longer registered.
        write.subsystems.extend(latest.into_keys().map(|name| (name, None)));
        let order = Order::of(entries.iter().map(|entry| entry.member.subsystem.clone()));
        restore_last_parts(&*store, &contents, &entries, &memory.registry).await?;
        state.registry = Registry::of(entries, declared.expected)?;

        // The loops.
        let mut stored: BTreeMap<Name, _> =
            std::mem::take(&mut contents.loops).into_iter().map(|stored| (stored.name.clone(), stored)).collect();
        for settings in declared.loops {
            let settings = settings.by_present_names(present);
            let held = hold(settings.footprint())?;
            if let Some(stored) = stored.remove(&settings.name) {
                state.loops.restore(settings, LoopOrigin::Config, stored.state, Some(held), now);
            } else {
                let entry = state.loops.started(settings, LoopOrigin::Config, now);
                state.loops.put(entry.holding(held));
            }
        }
        for (name, stored) in stored {
            match stored.spec.as_ref().map(IntervalLoop::from_spec) {
                Some(Ok(settings)) => {
                    let settings = settings.by_present_names(present);
                    let held = hold(settings.footprint())?;
                    state.loops.restore(settings, LoopOrigin::Rpc, stored.state, Some(held), now);
                }
                Some(Err(violations)) => {
                    tracing::error!("loop" = %name, %violations, "skipped: a stored loop is invalid");
                }
                None => {
                    write.loops.insert(name, None);
                }
            }
        }

        let of_subsystems = write.subsystems.iter().filter(|(_, row)| row.is_none()).map(|(name, _)| name);
        let of_loops = write.loops.iter().filter(|(_, row)| row.is_none()).map(|(name, _)| name);
        let undeclared: AuditTargets = of_subsystems.chain(of_loops).map(Name::as_str).collect();
        if !is_read_only && !undeclared.named.is_empty() {
            tracing::warn!(
                names = undeclared.named.join(", "),
                others = undeclared.left_out,
                "the configuration does not declare them any more: these subsystems are unregistered, and these loops \
                 removed, with their outputs and ticks"
            );
            let cause = Cause { targets: undeclared, ..Cause::of_service("serve") };
            write.audit.push(record::encode_event(&cause.event(now)));
        }

        // Ticks that were due before count as missed or dropped.
        if how == Begin::Paused && !state.loops.are_all_paused() {
            state.loops.set_paused(&LoopChoice::All, true, now);
            write.audit.push(record::encode_event(&Cause::of_service("serve --paused").event(now)));
        }
        if state.loops.are_all_paused() && !is_read_only {
            tracing::warn!("all loops are paused: `orchestrator loops resume --all` resumes them");
        }

        let recovered = if is_read_only {
            Vec::new()
        } else {
            state.recover(&contents, &mut write, settings.max_record_bytes, &memory.requests, now);
            let (loops, mark) = state.loops.unwritten();
            for (name, stored) in loops {
                write.loops.entry(name).or_insert(stored);
            }
            write.last_cycle_id = state.last_admitted;
            (state.noted, state.noted_durably) = (state.last_admitted, state.last_admitted);
            let write = Arc::new(write);
            store.commit(write.clone()).await?;
            write.audit.iter().for_each(record::copy_event);
            state.loops.written(mark);
            write.records.clone()
        };
        // All earlier records are acknowledged together with the first commit.
        history.begin(end, contents.pruned_to);
        history.set_unconfirmed(false);
        for record in recovered {
            state.add_record(record.into(), None);
        }
        history.checkpoint().send_replace(published);
        history.rename(state.registry.renamed());
        history.show();
        let reading_log = memory.history.part("entries of the log that are read", memory.history.max() / 4);
        let (to_write, asked) = mpsc::channel(writing::WAITING);
        let shared = Arc::new(Shared {
            engine: Engine {
                subsystems,
                orchestrator_id: settings.orchestrator_id.clone(),
                epoch: contents.epoch,
                outputs: memory.outputs.clone(),
                remembered: memory.registry.clone(),
                revoked,
                slots: Slots::new(settings.max_concurrent_calls),
                inputs: InputRoom::new(memory.inputs.clone()),
                spans,
                random,
            },
            is_read_only,
            checkpoints: Checkpoints::new(signer, history.checkpoint().clone()),
            sums: sums.unwrap_or_else(|| Sums::new(clock, settings.audit_reads)),
            reading_log,
            history,
            settings: Mutex::new(Arc::new(settings)),
            memory: memory.registry.clone(),
            requests: memory.requests.clone(),
            clock,
            started,
            term_began_at: clock.now(),
            store,
            state: Mutex::new(state),
            order: Arc::new(tokio::sync::Mutex::new(order)),
            to_write,
            planning: tokio::sync::Mutex::new(()),
            removing: tokio::sync::Mutex::new(()),
            changes: TaskTracker::new(),
            queue_changed: Notify::new(),
            loops_changed: Notify::new(),
            leases_changed: Notify::new(),
            attended_changed: Notify::new(),
            store_has_ended: CancellationToken::new(),
            closed: CancellationToken::new(),
        });
        let tasks =
            if is_read_only { OrchestratorTasks::only_read(&shared) } else { OrchestratorTasks::start(&shared, asked) };
        Ok((Self(shared), tasks))
    }
}

impl State {
    /// Restores the open cycles. Cycles that had begun, or may have begun, are recorded as interrupted, in the order of
    /// their ids, and so are cycles of loops, whose ticks are decided again. Other cycles have only waited, and wait
    /// again under their ids.
    fn recover(
        &mut self,
        contents: &Contents,
        write: &mut Write,
        max_record: usize,
        requests: &Memory,
        now: Timestamp,
    ) {
        if let Some(lost) = &contents.lost {
            tell_lost(lost, contents);
        }
        let last_lost = contents.lost.map(|lost| (lost.last_cycle_id, lost.last_revision)).unwrap_or_default();
        // Starts may be lost with the power, or with the end of the store: then a cycle that seems to wait may have
        // begun.
        let any_may_have_begun = contents.may_lack_open || contents.lost.is_some();
        let mut revision = contents.last_revision;
        let mut interrupt = |cycle_id, open: Option<&OpenCycle>| {
            revision = revision.next();
            // The number of lost cycles is known, but not their ids.
            let is_lost = revision <= last_lost.1;
            let finished = interrupted(cycle_id, open, is_lost, contents.epoch, now);
            let record = record::encode(&finished, max_record).at(revision);
            if !is_lost {
                tracing::warn!(cycle_id = cycle_id.0, "recorded as interrupted: an earlier process ended while it ran");
            }
            write.records.push(record);
            if let Some(cause) = open.and_then(cause_of) {
                let event = AuditEvent { cycle_id, revision, code: Some(Code::Unknown), ..cause.event(now) };
                write.audit.push(record::encode_event(&event));
            }
        };
        let mut waiting = Vec::new();
        // Nothing is recorded of a row that another program may have written.
        for open in contents.open.iter().filter(|open| open.stage != Stage::Unsealed) {
            match waits_again(open).filter(|_| !any_may_have_begun) {
                Some(request) => waiting.push((open.cycle_id, request)),
                None => interrupt(open.cycle_id, Some(open)),
            }
        }
        // One known id may be missing after the loss of power: the writer ensures that it is at most one.
        let may_be_lost = if contents.may_lack_open { self.last_admitted.next() } else { CycleId::default() };
        while self.last_admitted < may_be_lost.max(last_lost.0) {
            self.last_admitted = self.last_admitted.next();
            interrupt(self.last_admitted, None);
        }
        for (cycle_id, request) in waiting {
            tracing::info!(cycle_id = cycle_id.0, "queued again: an earlier process had not started it");
            let room = requests.hold_beyond(request.footprint());
            let admitted = Admitted::new(cycle_id, Arc::new(request), Some(room), false);
            admitted.promise();
            self.enter(admitted);
        }
    }
}

/// Gives each of these subsystems its part in the last cycle that was recorded with it, as far as the newest records
/// contain it. Unreadable records are passed over.
///
/// # Errors
/// The store can't be read.
async fn restore_last_parts<'e>(
    store: &dyn Store,
    contents: &Contents,
    entries: &'e [Registered],
    memory: &Memory,
) -> Result<(), StoreError> {
    /// Read in a few milliseconds, so that a start takes about as long as without them: the last cycle of a large
    /// fleet, or many cycles of a small one, whose loops may have different intervals.
    const NEWEST: PageLimits = PageLimits { records: 250, bytes: 3 << 20 };
    if entries.is_empty() {
        return Ok(());
    }
    let of_entry = |entry: &'e Registered| {
        let Registered { former_names, .. } = entry;
        iter::once(entry.name()).chain(&**former_names).map(move |name| (name, entry))
    };
    let by_name: BTreeMap<_, _> = entries.iter().flat_map(of_entry).collect();
    let mut restored = BTreeSet::new();
    let page = store.cycles_before(contents.last_revision.next(), Filter::default(), NEWEST).await?;
    for record in page.records.into_iter().flatten() {
        let Ok(Some((started_at, parts))) = record::parts(&record) else { continue };
        for part in parts {
            // It was registered since.
            let is_other = matches!(part.state, SubsystemState::Skipped(SkipReason::NotRegistered, _));
            if !is_other
                && let Some(entry) = by_name.get(&part.name)
                && restored.insert(entry.name())
            {
                let Record { cycle_id, finished_at, .. } = record;
                let standing = &entry.member.standing;
                standing.restore(LastPart { cycle_id, started_at, finished_at, report: Arc::new(part) }, memory);
            }
        }
        if restored.len() == entries.len() {
            break;
        }
    }
    Ok(())
}

/// The request of a cycle that had not begun, if it can still be run.
fn waits_again(open: &OpenCycle) -> Option<CycleRequest> {
    let Stage::Waiting(Some(request)) = &open.stage else { return None };
    match record::decode_request(request.clone()) {
        Ok(request) => Some(CycleRequest {
            scheduled_at: open.scheduled_at,
            trigger: open.trigger.clone(),
            request_id: open.request_id.clone(),
            triggered_by: open.triggered_by.clone(),
            cause: cause_of(open).map(Arc::new),
            ..request
        }),
        Err(problem) => {
            tracing::error!(cycle_id = open.cycle_id.0, problem, "the request of a waiting cycle can't be read");
            None
        }
    }
}

/// The cause of the event that is to be written with the record of a cycle.
fn cause_of(open: &OpenCycle) -> Option<Cause> {
    let cause = record::decode_cause(open.audit.clone()?);
    let unreadable = |problem: &String| {
        tracing::error!(
            cycle_id = open.cycle_id.0,
            problem,
            "the caller of an open cycle can't be read: it is not audited"
        );
    };
    cause.inspect_err(unreadable).ok()
}

/// The record of a cycle that an earlier process had started but not finished, or whose record is lost.
fn interrupted(
    cycle_id: CycleId,
    open: Option<&OpenCycle>,
    is_lost: bool,
    epoch: Epoch,
    now: Timestamp,
) -> FinishedCycle {
    let open = open.filter(|open| open.stage != Stage::Unknown);
    let started_at = open.and_then(|open| match open.stage {
        Stage::Begun(at) => Some(at),
        Stage::Waiting(_) | Stage::Unknown | Stage::Unsealed => None,
    });
    // The clock may have been set back since it started.
    let finished_at = started_at.map_or(now, |started_at| now.max(started_at));
    let duration = started_at.map(|started_at| finished_at.duration_since(started_at));
    FinishedCycle {
        cycle_id,
        epoch,
        trigger: open.map_or(Trigger::Unknown, |open| open.trigger.clone()),
        scheduled_at: open.map(|open| open.scheduled_at),
        request_id: open.and_then(|open| open.request_id.clone()),
        triggered_by: open.and_then(|open| open.triggered_by.clone()),
        trace_id: open.and_then(|open| open.trace_id),
        started_at,
        finished_at,
        duration: duration.and_then(|duration| duration.try_into().ok()).unwrap_or_default(),
        state: CycleState::Interrupted,
        error: if is_lost {
            "its record was lost because the end of the store was damaged".into()
        } else {
            "the process that ran it ended before it had finished".into()
        },
        critical_path: Vec::new(),
        subsystems: Vec::new(),
    }
}

/// Logs unreadable rows of the earlier process's state, which are skipped. Each is an ERROR, also one without its seal:
/// a registration, a loop or a cycle may be missing from now on, and an operator has to see to it.
fn tell_unreadable_rows(rows: &[UnreadableRow]) {
    /// Most rows that are logged: if all are damaged, a few are enough.
    const TOLD: usize = 64;
    for UnreadableRow { what, key, problem, is_sealed } in rows.iter().take(TOLD) {
        if *is_sealed {
            tracing::error!(what, key, problem, "skipped: a row of the store can't be read; it stays in the store");
        } else {
            tracing::error!(
                what,
                key,
                problem,
                "skipped: a row of the store can't be read, and doesn't have its seal: another program may have \
                 written it; it stays in the store"
            );
        }
    }
    if rows.len() > TOLD {
        tracing::error!(rows = rows.len() - TOLD, "skipped: further rows of the store can't be read");
    }
}

/// Logs acknowledged commits that are no longer in the store.
fn tell_lost(lost: &Lost, contents: &Contents) {
    let Lost { last_revision, commits, .. } = lost;
    if *last_revision > contents.last_revision {
        let revisions = format!("{} to {last_revision}", contents.last_revision.next());
        tracing::error!(
            revisions,
            commits,
            "acknowledged records are missing: the end of the store was damaged, or an older copy replaced it. They \
             are recorded as interrupted, so that their numbers are not given again; what was registered or \
             changed meanwhile is missing as well"
        );
    } else {
        tracing::error!(
            commits,
            "acknowledged changes are missing, such as starts of cycles, registrations, loops or suspensions: the end \
             of the store was damaged, or an older copy was put in its place"
        );
    }
}
