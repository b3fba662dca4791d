//! Changes of the registry: registering, unregistering and suspending, by callers and by the end of leases.
//!
//! Who may change a registration is decided here, when it is the turn of the change: of two callers that register the
//! same new name at the same time, one becomes its owner, and the other is refused.

use std::{collections::BTreeMap, iter::once, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{
    select,
    time::{Instant, sleep, sleep_until},
};

use super::{
    NotOwner, NotRenewed, Orchestrator, Refusal, Shared, State, Turn,
    offload::offload,
    registry::{Entries, Lease, Origin, Registered, footprint},
};
use crate::{
    engine::Member,
    memory::Held,
    model::{Cause, Identity, Name, Subsystem},
    ports::{Left, StoreError, Write},
};

/// While there are leases, the process finds out at this interval whether it has run all the time.
const PULSE: Duration = Duration::from_millis(500);
/// It did not, if it is late by this: short beside leases, and longer than a busy machine keeps a process waiting.
const STOPPED: Duration = Duration::from_secs(1);

/// The result of registering a subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not registered before.
    Created,
    /// Its registration, its owner or the length of its lease has changed.
    Replaced,
    /// Its registration is unchanged: at most its lease was renewed.
    Renewed,
}

/// A registration after a call that makes or changes it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The registration.
    pub registered: Registered,
    /// What the call has changed.
    pub change: Change,
    /// The registration before the call, if it was replaced.
    pub previous: Option<Registered>,
}

/// A subsystem after it was renamed.
#[derive(Clone, Debug)]
pub struct Renamed {
    /// Its registration.
    pub registered: Registered,
    /// The other subsystems that name it, by name.
    pub subsystems: Vec<Name>,
    /// The loops that name it, by name.
    pub loops: Vec<Name>,
}

/// A change of a name.
#[derive(Clone, Debug)]
struct Rename {
    former: Name,
    name: Name,
}

/// The caller of a change of a registration. Its grants already cover the change; this is about owners.
#[derive(Clone, Debug)]
pub enum Registrar {
    /// Callers are not known: any of them may change every registration, and owns none.
    Anyone,
    /// It may change the registrations that it owns or nobody owns. It owns those that it makes or replaces.
    Owner(Identity),
    /// It may change every registration. It owns those that it makes; those that it replaces keep their owner, so that
    /// an administrator can mend one without taking it away from its process.
    Admin(Identity),
}

impl Registrar {
    /// Checks that it may change this registration.
    ///
    /// # Errors
    /// Another caller owns it.
    pub(super) fn check(&self, entry: &Registered) -> Result<(), NotOwner> {
        match (self, &entry.member.owner) {
            (Self::Owner(identity), Some(owner)) if identity != owner => {
                Err(NotOwner { name: entry.name().clone(), owner: owner.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The owner of a registration that it makes, or that replaces an earlier one.
    fn owner(&self, earlier: Option<&Registered>) -> Option<Identity> {
        match (self, earlier) {
            (Self::Anyone, None) => None,
            (Self::Owner(identity), _) | (Self::Admin(identity), None) => Some(identity.clone()),
            (Self::Anyone | Self::Admin(_), Some(earlier)) => earlier.member.owner.clone(),
        }
    }
}

impl Orchestrator {
    /// Registers a subsystem, or replaces its registration.
    ///
    /// # Errors
    /// There would be a circular dependency, the file declares the name, another caller owns it, the registry is full,
    /// the store can't be written, or the process drains.
    pub async fn register(
        &self,
        subsystem: Subsystem,
        lease: Option<Duration>,
        by: &Registrar,
        cause: Cause,
    ) -> Result<Outcome, Refusal> {
        let mut registered = self.register_all(vec![subsystem], lease, by, cause).await?;
        // One result for each.
        Ok(registered.remove(0))
    }

    /// Registers all of these subsystems, each name once, or none: in one commit. Otherwise as
    /// [`Orchestrator::register`], for each, in their order.
    ///
    /// # Errors
    /// One can't be registered, for one of the reasons of [`Orchestrator::register`].
    pub async fn register_all(
        &self,
        subsystems: Vec<Subsystem>,
        lease: Option<Duration>,
        by: &Registrar,
        cause: Cause,
    ) -> Result<Vec<Outcome>, Refusal> {
        let by = by.clone();
        self.change(cause, move |shared, turn| async move { shared.register(turn, subsystems, lease, &by).await }).await
    }

    /// Replaces a registration by what `revise` makes of it when it is the turn of this change. Its owner, its lease
    /// and its suspension stay. `revise` also gets the present names of subsystems by their former ones, since these
    /// are what the former ones mean in its result.
    ///
    /// # Errors
    /// It is not registered, `revise` refuses, or the result can't be registered, for one of the reasons of
    /// [`Orchestrator::register`].
    pub async fn update(
        &self,
        name: &Name,
        revise: impl FnOnce(&Subsystem, &BTreeMap<Name, Name>) -> Result<Subsystem, Refusal> + Send + 'static,
        by: &Registrar,
        cause: Cause,
    ) -> Result<Outcome, Refusal> {
        let (name, by) = (name.clone(), by.clone());
        self.change(cause, move |shared, turn| async move { shared.update(turn, &name, revise, &by).await }).await
    }

    /// The present names of subsystems by their former ones.
    pub fn renamed(&self) -> Arc<BTreeMap<Name, Name>> {
        self.0.state().registry.renamed().clone()
    }

    /// Gives a subsystem another name. Its latest output, its owner, its suspension and its lease, which begins anew,
    /// are those of the new name, and other registrations and loops that name it name it so. Its former name stays its
    /// own: its earlier cycles are found by both. `judge` gets its registration, and the one that it would have.
    ///
    /// # Errors
    /// It is not registered, the file declares it, another caller owns it, or `judge` refuses. Another subsystem has
    /// the new name, or had it; there would be a circular dependency or too many former names; there is no memory for
    /// the changes; the store can't be written; or the process drains.
    pub async fn rename(
        &self,
        name: &Name,
        new_name: Name,
        judge: impl FnOnce(&Subsystem, &Subsystem) -> Result<(), Refusal> + Send + 'static,
        by: &Registrar,
        cause: Cause,
    ) -> Result<Renamed, Refusal> {
        let (name, by) = (name.clone(), by.clone());
        self.change(cause, move |shared, turn| async move { shared.rename(turn, &name, new_name, judge, &by).await })
            .await
    }

    /// Removes a subsystem and its latest output.
    ///
    /// # Errors
    /// It is not registered, the file declares it, another caller owns it, the store can't be written, or the process
    /// drains.
    pub async fn unregister(&self, name: &Name, by: &Registrar, cause: Cause) -> Result<(), Refusal> {
        let (name, by) = (name.clone(), by.clone());
        self.change(cause, move |shared, turn| async move { shared.unregister(turn, &name, &by).await }).await
    }

    /// Suspends a subsystem, or resumes it and closes its breaker.
    ///
    /// # Errors
    /// It is not registered, the store can't be written, or the process drains.
    pub async fn suspend(&self, name: &Name, suspended: bool, by: Cause) -> Result<Registered, Refusal> {
        let name = name.clone();
        self.change(by, |shared, turn| async move { shared.suspend(turn, &name, suspended).await }).await
    }

    /// Renews a lease. Returns its new end.
    ///
    /// # Errors
    /// It is not registered, has no lease, or another caller owns it.
    pub fn renew_lease(&self, name: &Name, by: &Registrar) -> Result<Timestamp, NotRenewed> {
        let _open = self.open_change();
        let lease = {
            let mut state = self.0.state();
            let at = state.leases_held.unwrap_or_else(|| state.last_ran());
            state.registry.renew(name, by, at)?
        };
        Ok(self.lease_ends_at(&lease))
    }

    /// When a lease ends, on the wall clock.
    pub fn lease_ends_at(&self, lease: &Lease) -> Timestamp {
        let left = lease.expires.saturating_duration_since(Instant::now());
        self.0.clock.now().saturating_add(left).unwrap_or(Timestamp::MAX)
    }
}

/// Checks that a caller may replace or remove this registration.
///
/// # Errors
/// The file declares it, or another caller owns it.
fn may_change(entry: &Registered, by: &Registrar) -> Result<(), Refusal> {
    if entry.is_declared() {
        return Err(Refusal::DeclaredInConfig(entry.name().clone()));
    }
    Ok(by.check(entry)?)
}

impl State {
    /// Adds or replaces a registration. Returns the subsystem that has left its endpoint, if any; its breaker is
    /// closed, since its failures were there.
    fn put(&mut self, entry: Registered) -> Option<Left> {
        let standing = entry.member.standing.clone();
        self.registry.put(entry).inspect(|_| {
            standing.close_breaker();
        })
    }

    /// When the next lease ends; `None` also while none does.
    fn next_expiry(&self) -> Option<Instant> {
        self.registry.next_expiry().filter(|_| self.leases_held.is_none())
    }

    /// At most `max` subsystems whose lease has expired.
    fn expired(&self, max: usize) -> Vec<Name> {
        if self.leases_held.is_some() { Vec::new() } else { self.registry.expired(self.last_ran(), max) }
    }

    /// From now on no lease expires: renewals may be refused.
    pub(super) fn hold_leases(&mut self) {
        let now = self.last_ran();
        self.leases_held.get_or_insert(now);
    }

    /// Now. Or, if the process did not run since it was last known to, until a moment ago, that time: since then it
    /// could take no renewal.
    fn last_ran(&self) -> Instant {
        let now = Instant::now();
        self.ran_at.filter(|ran| now.duration_since(*ran) > PULSE + STOPPED).unwrap_or(now)
    }

    /// The process runs. Returns for how long it did not, if that was long: then the leases that had not expired before
    /// begin anew.
    fn runs(&mut self) -> Option<Duration> {
        let (now, last) = (Instant::now(), self.last_ran());
        let stopped = Some(now.duration_since(last)).filter(|stopped| !stopped.is_zero());
        if stopped.is_some() && self.leases_held.is_none() {
            self.registry.begin_leases_anew(last);
        }
        self.ran_at = self.registry.next_expiry().map(|_| now);
        stopped
    }

    /// Once changes can be written again, the leases that had not expired before begin anew.
    pub(super) fn release_leases(&mut self) {
        let can_write = !self.has_lapsed && self.store_error.borrow().is_none();
        if can_write && let Some(held) = self.leases_held.take() {
            self.registry.begin_leases_anew(held);
        }
    }
}

impl Shared {
    async fn register(
        &self,
        turn: Turn,
        subsystems: Vec<Subsystem>,
        lease: Option<Duration>,
        by: &Registrar,
    ) -> Result<Vec<Outcome>, Refusal> {
        let max = self.settings().max_subsystems;
        let (earlier, registered): (Vec<_>, _) = {
            let state = self.state();
            let earlier = subsystems.iter().map(|subsystem| state.registry.get(&subsystem.name).cloned());
            (earlier.collect(), state.registry.len())
        };
        earlier.iter().flatten().try_for_each(|earlier| may_change(earlier, by))?;
        let subsystems = self.with_present_names(subsystems)?;
        let new = earlier.iter().filter(|earlier| earlier.is_none()).count();
        if new > 0 && registered + new > max {
            return Err(Refusal::RegistryFull { registered, new, max });
        }
        let origin = move || Origin::Rpc { lease: lease.map(|length| Lease::new(length, Instant::now())) };
        let outcome = |(subsystem, previous): (Subsystem, Option<Registered>)| {
            let owner = by.owner(previous.as_ref());
            if let Some(registered) = &previous
                && *registered.member.subsystem == subsystem
                && registered.member.owner == owner
                && registered.lease().map(|lease| lease.length) == lease
            {
                return Ok(Outcome { registered: registered.clone(), change: Change::Renewed, previous: None });
            }
            let change = if previous.is_some() { Change::Replaced } else { Change::Created };
            let member = self.member(subsystem, previous.as_ref(), owner)?;
            let former_names = previous.as_ref().map(|previous| previous.former_names.clone()).unwrap_or_default();
            Ok(Outcome { registered: Registered { member, origin: origin(), former_names }, change, previous })
        };
        let outcomes: Result<Vec<_>, Refusal> = subsystems.into_iter().zip(earlier).map(outcome).collect();
        let outcomes = outcomes?;

        let changed = outcomes.iter().filter(|outcome| outcome.change != Change::Renewed);
        let changed: Vec<_> = changed.map(|outcome| outcome.registered.clone()).collect();
        let put = move |state: &mut State| {
            let (mut outcomes, mut left) = (outcomes, Vec::new());
            // Without the time of writing, and the same for all.
            let origin = origin();
            for Outcome { registered, change, .. } in &mut outcomes {
                registered.origin = origin;
                match (*change, registered.lease()) {
                    // Nothing durable changes.
                    (Change::Renewed, Some(lease)) => state.registry.set_lease(registered.name(), lease),
                    (Change::Renewed, None) => {}
                    (Change::Created | Change::Replaced, _) => left.extend(state.put(registered.clone())),
                }
            }
            (outcomes, left)
        };
        let outcomes = if changed.is_empty() {
            put(&mut self.state()).0
        } else {
            self.write_registered(turn, changed, None, put).await?
        };
        self.leases_changed.notify_one();
        for Outcome { registered, change, .. } in &outcomes {
            let (name, endpoint) = (registered.name(), &registered.member.subsystem.endpoint);
            let owner = registered.member.owner.as_ref().map(tracing::field::display);
            match change {
                Change::Created => tracing::info!(subsystem = %name, %endpoint, owner, "registered"),
                Change::Replaced => tracing::info!(subsystem = %name, %endpoint, owner, "registered with changes"),
                Change::Renewed => {}
            }
        }
        Ok(outcomes)
    }

    async fn update(
        &self,
        turn: Turn,
        name: &Name,
        revise: impl FnOnce(&Subsystem, &BTreeMap<Name, Name>) -> Result<Subsystem, Refusal>,
        by: &Registrar,
    ) -> Result<Outcome, Refusal> {
        let (previous, renamed) = {
            let state = self.state();
            (state.registry.find(name)?.clone(), state.registry.renamed().clone())
        };
        may_change(&previous, by)?;
        let revised = revise(&previous.member.subsystem, &renamed)?;
        let subsystem = revised.by_present_names(|name| renamed.get(name).cloned());
        if *previous.member.subsystem == subsystem {
            return Ok(Outcome { registered: previous, change: Change::Renewed, previous: None });
        }
        let member = self.member(subsystem, Some(&previous), previous.member.owner.clone())?;
        let entry = Registered { member, ..previous.clone() };
        let changed = vec![entry.clone()];
        let put = move |state: &mut State| {
            let entry = entry.with_present_lease(&state.registry);
            let left = state.put(entry.clone());
            (entry, left.into_iter().collect())
        };
        let registered = self.write_registered(turn, changed, None, put).await?;
        let Subsystem { name, endpoint, .. } = &*registered.member.subsystem;
        tracing::info!(subsystem = %name, %endpoint, "changed");
        Ok(Outcome { registered, change: Change::Replaced, previous: Some(previous) })
    }

    /// Gives a subsystem another name, in its own registration and in all that name it.
    async fn rename(
        &self,
        turn: Turn,
        name: &Name,
        new_name: Name,
        judge: impl FnOnce(&Subsystem, &Subsystem) -> Result<(), Refusal>,
        by: &Registrar,
    ) -> Result<Renamed, Refusal> {
        let (previous, Entries { registered: others, .. }) = {
            let state = self.state();
            let previous = state.registry.find(name)?.clone();
            may_change(&previous, by)?;
            if *name == new_name {
                return Err(Refusal::invalid("new_name", format!("is {name}, the name that it has")));
            }
            if state.registry.get(&new_name).is_some() {
                return Err(Refusal::NameTaken(new_name));
            }
            if let Some(other) = state.registry.present(&new_name).filter(|other| other != name) {
                return Err(Refusal::NameReserved { former: new_name, name: other });
            }
            (previous, state.registry.snapshot())
        };
        let present = |named: &Name| (named == name).then(|| new_name.clone());
        let subsystem = Subsystem { name: new_name.clone(), ..(*previous.member.subsystem).clone() };
        let subsystem = subsystem.by_present_names(present);
        judge(&previous.member.subsystem, &subsystem)?;
        // It may get a former name back.
        let former_names = once(name).chain(&*previous.former_names).filter(|former| **former != new_name);
        let former_names: Arc<[Name]> = former_names.cloned().collect();
        if former_names.len() > Subsystem::MAX_FORMER_NAMES {
            return Err(Refusal::TooManyFormerNames(name.clone()));
        }
        let dependents = others.iter().filter(|entry| entry.name() != name);
        let dependents =
            dependents.filter_map(|entry| Some((entry, entry.member.subsystem.with_present_names(present)?)));
        let mut changed = Vec::new();
        for (entry, subsystem) in dependents {
            let member = self.member(subsystem, Some(entry), entry.member.owner.clone())?;
            changed.push(Registered { member, ..(**entry).clone() });
        }
        let subsystems = changed.iter().map(|entry| entry.name().clone()).collect();
        let held = self.hold(&subsystem, previous.member.owner.as_ref(), &former_names)?;
        let member = previous.member.with(subsystem, held);
        let entry = Registered { member, former_names, ..previous };
        let renamed = Rename { former: name.clone(), name: new_name.clone() };
        changed.push(entry);
        let (put, former) = (changed.clone(), name.clone());
        let put = move |state: &mut State| {
            let lease = state.registry.get(&former).and_then(Registered::lease);
            let mut left = Vec::new();
            for mut entry in put {
                if *entry.name() == new_name {
                    let lease = lease.map(|lease| Lease::new(lease.length, Instant::now()));
                    entry.origin = Origin::Rpc { lease };
                } else {
                    entry = entry.with_present_lease(&state.registry);
                }
                left.extend(state.put(entry));
            }
            left.extend(state.registry.remove(&former));
            let mut loops = Vec::new();
            for entry in state.loops.with_present_names(|named| (*named == former).then(|| new_name.clone())) {
                loops.push(entry.settings.name.clone());
                state.loops.put(entry);
            }
            (state.registry.find(&new_name).cloned().map(|registered| Renamed { registered, subsystems, loops }), left)
        };
        let outcome = self.write_registered(turn, changed, Some(renamed), put).await??;
        // Its failures were those of a subsystem that was called by another name.
        outcome.registered.member.standing.close_breaker();
        self.leases_changed.notify_one();
        tracing::info!(subsystem = %outcome.registered.name(), former = %name, "renamed");
        Ok(outcome)
    }

    /// These registrations, where others are named by their present names: a component that registers itself may know
    /// only former ones.
    ///
    /// # Errors
    /// The name of a registration itself is a former name.
    fn with_present_names(&self, subsystems: Vec<Subsystem>) -> Result<Vec<Subsystem>, Refusal> {
        let state = self.state();
        let renamed = state.registry.renamed();
        if renamed.is_empty() {
            return Ok(subsystems);
        }
        let present = |subsystem: Subsystem| match renamed.get(&subsystem.name) {
            Some(name) => Err(Refusal::NameReserved { former: subsystem.name, name: name.clone() }),
            None => Ok(subsystem.by_present_names(|name| renamed.get(name).cloned())),
        };
        subsystems.into_iter().map(present).collect()
    }

    /// The member of a registration that is new or replaces another one.
    fn member(
        &self,
        subsystem: Subsystem,
        previous: Option<&Registered>,
        owner: Option<Identity>,
    ) -> Result<Member, Refusal> {
        let former_names = previous.map_or(&[][..], |previous| &previous.former_names);
        let held = self.hold(&subsystem, owner.as_ref(), former_names)?;
        let member = match previous {
            Some(previous) => previous.member.with(subsystem, held),
            None => Member::new(Arc::new(subsystem), false, Arc::default()).holding(held),
        };
        Ok(member.owned_by(owner))
    }

    /// Memory for a registration.
    fn hold(&self, subsystem: &Subsystem, owner: Option<&Identity>, former_names: &[Name]) -> Result<Held, Refusal> {
        let held = self.memory.try_hold(footprint(subsystem, owner, former_names));
        held.map_err(Refusal::RegistryMemoryFull)
    }

    /// Writes new and changed registrations, unless they would make a circular dependency, and then applies them by
    /// `put`, which also returns the subsystems that have left their endpoints. One of them may be `renamed`; loops
    /// that name it are then written as well.
    async fn write_registered<T: Send + 'static>(
        &self,
        turn: Turn,
        changed: Vec<Registered>,
        renamed: Option<Rename>,
        put: impl FnOnce(&mut State) -> (T, Vec<Left>) + Send + 'static,
    ) -> Result<T, Refusal> {
        let names = changed.iter().map(|entry| &entry.member.subsystem).map(|it| it.requires.len() + it.after.len());
        let work = self.state().registry.len() + names.sum::<usize>();
        let removed: Vec<_> = renamed.iter().map(|renamed| renamed.former.clone()).collect();
        let (mut turn, checked) = offload(work, move || {
            let mut turn = turn;
            let subsystems = changed.iter().map(|entry| entry.member.subsystem.clone()).collect();
            let checked = turn.order.change(subsystems, &removed).map(|undo| {
                // The file has the registrations that it declares.
                let stored = changed.iter().filter(|entry| !entry.is_declared());
                let stored = stored.map(|entry| (entry.name().clone(), Some(Arc::new(entry.to_stored()))));
                (undo, stored.collect::<BTreeMap<_, _>>())
            });
            (turn, checked)
        })
        .await;
        let (undo, subsystems) = checked.map_err(Refusal::OrderRing)?;
        let write = move |state: &State| {
            let mut write = Write { subsystems: subsystems.clone(), ..Write::default() };
            if let Some(Rename { former, name }) = &renamed {
                let loops = state.loops.with_present_names(|named| (named == former).then(|| name.clone()));
                let loops = loops.into_iter().map(|entry| (entry.settings.name.clone(), Some(entry.to_stored())));
                write.loops.extend(loops);
                write.renamed.insert(former.clone(), name.clone());
            }
            write
        };
        match self.write(&mut turn, write, put).await {
            Ok((value, left)) => {
                self.engine.subsystems.forget(&left);
                Ok(value)
            }
            Err(error) => {
                turn.order.undo(undo);
                Err(error.into())
            }
        }
    }

    async fn unregister(&self, mut turn: Turn, name: &Name, by: &Registrar) -> Result<(), Refusal> {
        may_change(self.state().registry.find(name)?, by)?;
        self.forget(&mut turn, std::slice::from_ref(name)).await?;
        tracing::info!(subsystem = %name, "unregistered");
        Ok(())
    }

    async fn suspend(&self, mut turn: Turn, name: &Name, suspended: bool) -> Result<Registered, Refusal> {
        let earlier = self.state().registry.find(name)?.clone();
        if !suspended && earlier.member.standing.close_breaker() {
            tracing::info!(subsystem = %name, "its circuit breaker is closed: it is resumed");
        }
        if earlier.member.suspended == suspended {
            return Ok(earlier);
        }
        let member = earlier.member.suspended(suspended);
        let entry = Registered { member, ..earlier };
        let subsystems = BTreeMap::from([(name.clone(), Some(Arc::new(entry.to_stored())))]);
        let put = move |state: &mut State| {
            let entry = entry.with_present_lease(&state.registry);
            state.registry.put(entry.clone());
            entry
        };
        let write = move |_: &State| Write { subsystems: subsystems.clone(), ..Write::default() };
        let entry = self.write(&mut turn, write, put).await?;
        tracing::info!(subsystem = %name, "{}", if suspended { "suspended" } else { "resumed" });
        Ok(entry)
    }

    /// Removes subsystems durably.
    async fn forget(&self, turn: &mut Turn, names: &[Name]) -> Result<(), StoreError> {
        let subsystems: BTreeMap<_, _> = names.iter().map(|name| (name.clone(), None)).collect();
        let leaving = names.to_vec();
        let remove = move |state: &mut State| -> Vec<_> {
            leaving.iter().filter_map(|name| state.registry.remove(name)).collect()
        };
        let write = move |_: &State| Write { subsystems: subsystems.clone(), ..Write::default() };
        let left = self.write(turn, write, remove).await?;
        for name in names {
            turn.order.remove(name);
        }
        self.engine.subsystems.forget(&left);
        Ok(())
    }

    /// Unregisters subsystems whose lease has expired. While no change can be written, or the process does not run,
    /// none expires.
    pub(super) async fn expire_leases(self: Arc<Self>) {
        /// Pause after a failed write.
        const RETRY: Duration = Duration::from_secs(1);
        loop {
            let next = self.state().next_expiry();
            let is_due = async {
                select! {
                    biased;
                    () = self.leases_changed.notified() => false,
                    () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => true,
                }
            };
            if !self.noticing_stops(is_due).await {
                continue;
            }
            let forgotten = self.noticing_stops(self.forget_expired()).await;
            self.state().counts.leases.tried(&forgotten, self.clock.now());
            if let Err(error) = forgotten {
                tracing::error!(%error, "can't unregister subsystems with expired leases; retrying");
                self.noticing_stops(sleep(RETRY)).await;
            }
        }
    }

    /// Awaits this. Meanwhile it notices, while there are leases, whether the process did not run: it was stopped, its
    /// machine stood still, or nothing had a turn.
    async fn noticing_stops<T>(&self, awaited: impl Future<Output = T>) -> T {
        tokio::pin!(awaited);
        loop {
            let counts = self.state().ran_at.is_some();
            let result = select! {
                biased;
                result = &mut awaited => Some(result),
                () = sleep(PULSE), if counts => None,
            };
            if let Some(stopped) = self.state().runs() {
                tracing::warn!(?stopped, "this process did not run for a while: the leases of subsystems begin anew");
                self.leases_changed.notify_one();
            }
            if let Some(result) = result {
                return result;
            }
        }
    }

    async fn forget_expired(&self) -> Result<(), StoreError> {
        /// Most subsystems in one commit, which then hardly delays the start of a cycle.
        const MAX: usize = 1000;
        let order = self.order.clone().lock_owned().await;
        let expired = self.state().expired(MAX);
        let targets = expired.iter().map(Name::as_str).collect();
        let mut turn = Turn { order, cause: Cause { targets, ..Cause::of_service("lease_end") }, late: None };
        if !expired.is_empty() {
            self.forget(&mut turn, &expired).await?;
        }
        for name in expired {
            tracing::info!(subsystem = %name, "unregistered: its lease was not renewed");
        }
        Ok(())
    }
}
