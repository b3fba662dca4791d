//! The registry: the registered subsystems, and their order.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{NotRegistered, NotRenewed, Orchestrator, Refusal, registration::Registrar};
use crate::{
    engine::{Member, Plan, Ring, Standing, SubsystemCounts},
    memory::{Full, Memory},
    model::{Endpoint, Identity, Name, Subsystem},
    ports::{Left, StoredSubsystem},
};

/// The registered subsystems, with sums over all of them, so that these need not be computed each time.
#[derive(Debug, Default)]
pub(super) struct Registry {
    /// Shared, so that work over all entries needs no lock.
    entries: BTreeMap<Name, Arc<Registered>>,
    /// Subsystems by the end of their lease.
    expiries: BTreeSet<(Instant, Name)>,
    /// The present names of subsystems by their former ones, none of which is registered.
    renamed: Arc<BTreeMap<Name, Name>>,
    /// The locks of subsystems that are locked by another name than their present one.
    locks: BTreeMap<Name, Name>,
    /// Number of declared subsystems.
    declared: usize,
    /// Number of subsystems at each endpoint.
    endpoints: HashMap<Endpoint, usize>,
    /// Names that should be registered,
    expected: BTreeSet<Name>,
    /// and those of them that are not.
    missing: BTreeSet<Name>,
    /// Number of changes.
    version: u64,
    /// The latest plan, and its version.
    plan: (Arc<Plan>, u64),
}

/// One registered subsystem.
#[derive(Clone, Debug)]
pub struct Registered {
    /// Its registration and its state between cycles.
    pub member: Member,
    /// The origin of its registration.
    pub origin: Origin,
    /// Its former names, newest first. No other subsystem has one of them.
    pub former_names: Arc<[Name]>,
}

/// The origin of a registration.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// The configuration file declares it.
    Config,
    /// A caller registered it, with a lease or without an end.
    Rpc {
        /// The lease.
        lease: Option<Lease>,
    },
}

/// A lease: the registration expires unless it is renewed.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// Its length.
    pub length: Duration,
    /// When it ends.
    pub expires: Instant,
}

/// All entries of a registry, the present names by former ones, the names that are missing, and its version.
pub(super) struct Entries {
    pub(super) registered: Vec<Arc<Registered>>,
    renamed: BTreeMap<Name, Name>,
    missing: Vec<Name>,
    version: u64,
}

impl Lease {
    /// A lease that begins at this time: leases that begin together end together.
    pub(super) fn new(length: Duration, begin: Instant) -> Self {
        Self { length, expires: begin + length }
    }
}

impl Registered {
    /// Its name.
    pub(super) fn name(&self) -> &Name {
        &self.member.subsystem.name
    }

    /// Its counters.
    pub fn counts(&self) -> SubsystemCounts {
        self.member.standing.counts()
    }

    /// True if the configuration file declares it.
    pub(super) fn is_declared(&self) -> bool {
        matches!(self.origin, Origin::Config)
    }

    /// Its lease, if it has one.
    pub fn lease(&self) -> Option<Lease> {
        match self.origin {
            Origin::Config => None,
            Origin::Rpc { lease } => lease,
        }
    }

    /// This entry with the lease that it has now, which may have been renewed since.
    pub(super) fn with_present_lease(self, registry: &Registry) -> Self {
        let origin = registry.get(self.name()).map_or(self.origin, |now| now.origin);
        Self { origin, ..self }
    }

    /// Its stored form.
    pub(super) fn to_stored(&self) -> StoredSubsystem {
        let subsystem = &self.member.subsystem;
        StoredSubsystem {
            name: subsystem.name.clone(),
            spec: (!self.is_declared()).then(|| subsystem.to_spec()),
            lease: self.lease().map(|lease| lease.length),
            suspended: self.member.suspended,
            owner: self.member.owner.clone(),
            former_names: if self.is_declared() { Vec::new() } else { self.former_names.to_vec() },
        }
    }
}

/// Most bytes of a registration in memory.
pub(super) fn footprint(subsystem: &Subsystem, owner: Option<&Identity>, former_names: &[Name]) -> usize {
    /// Of a former name, with its entries in the registry and in the plan.
    const NAMED: usize = 256;
    subsystem.footprint() + owner.map_or(0, Identity::footprint) + former_names.len() * NAMED
}

/// The former names of registrations that come together from the configuration file and the store.
#[derive(Debug, Default)]
pub(super) struct FormerNames {
    /// The present names by former ones.
    renamed: BTreeMap<Name, Name>,
}

impl FormerNames {
    /// Of registrations with the former names that they ask for; each former name belongs to the first that asks for
    /// it. A name that is registered is no former name.
    pub(super) fn of<'a>(
        asked: impl IntoIterator<Item = (&'a Name, &'a [Name])>,
        is_registered: impl Fn(&Name) -> bool,
    ) -> Self {
        let mut renamed = BTreeMap::new();
        for (name, former_names) in asked {
            for former in former_names.iter().filter(|former| !is_registered(former)) {
                renamed.entry(former.clone()).or_insert_with(|| name.clone());
            }
        }
        Self { renamed }
    }

    /// The present name of the subsystem with this former name.
    pub(super) fn present(&self, former: &Name) -> Option<Name> {
        self.renamed.get(former).cloned()
    }

    /// The present names by former ones.
    pub(super) fn into_renamed(self) -> BTreeMap<Name, Name> {
        self.renamed
    }

    /// The former names that the configuration file gives a subsystem, and that it has; the others are logged.
    pub(super) fn of_declared(&self, name: &Name, asked: &[Name]) -> Arc<[Name]> {
        for former in asked.iter().filter(|former| self.renamed.get(*former) != Some(name)) {
            tracing::warn!(
                subsystem = %name,
                %former,
                "not a former name of it, although the configuration file says so: a subsystem of that name is \
                 registered by RPC; unregister it, and reload"
            );
        }
        self.of_subsystem(name, asked)
    }

    /// The former names that a subsystem asks for and has.
    pub(super) fn of_subsystem(&self, name: &Name, asked: &[Name]) -> Arc<[Name]> {
        asked.iter().filter(|former| self.renamed.get(*former) == Some(name)).cloned().collect()
    }
}

impl Entries {
    /// The plan over all entries; `None` after a defect.
    pub(super) fn plan(&self) -> Option<Arc<Plan>> {
        match Plan::compile(self.registered.iter().map(|entry| entry.member.clone())) {
            Ok(plan) => Some(Arc::new(plan.lacking(self.missing.clone()).with_former_names(self.renamed.clone()))),
            // Every entry was checked before it was added, so this is a defect.
            Err(ring) => {
                tracing::error!(%ring, "the registry has a circular dependency");
                None
            }
        }
    }
}

/// The changes that new declarations of the configuration file make.
pub(super) struct Declarations {
    /// Entries that are new or different.
    pub(super) put: Vec<Registered>,
    /// Removed names.
    pub(super) removed: Vec<Name>,
    /// Entries of `put` with another endpoint or another name.
    pub(super) moved: Vec<Arc<Standing>>,
    /// Changes of the store.
    pub(super) stored: BTreeMap<Name, Option<Arc<StoredSubsystem>>>,
    /// The new names of entries by the names that they had before.
    pub(super) renamed: BTreeMap<Name, Name>,
    /// The former names of all.
    pub(super) former_names: FormerNames,
    /// Names that remain registered by RPC.
    by_rpc: HashSet<Name>,
}

impl Declarations {
    /// The changes that these declarations make to a registry with the entries `before`. A subsystem that is new, and
    /// was declared by a former name of it until now, is renamed.
    ///
    /// # Errors
    /// There is no memory for the changes.
    pub(super) fn of(
        subsystems: Vec<Subsystem>,
        former_names: &BTreeMap<Name, Arc<[Name]>>,
        before: &[Arc<Registered>],
        memory: &Memory,
    ) -> Result<Self, Full> {
        let before: BTreeMap<_, _> = before.iter().map(|entry| (entry.name(), entry)).collect();
        let names: HashSet<_> = subsystems.iter().map(|subsystem| subsystem.name.clone()).collect();
        let others = || before.values().filter(|entry| !names.contains(entry.name()));
        let removed: Vec<_> = others().filter(|entry| entry.is_declared()).map(|entry| entry.name().clone()).collect();
        let by_rpc: HashSet<_> =
            others().filter(|entry| !entry.is_declared()).map(|entry| entry.name().clone()).collect();
        let asked = former_names.iter().map(|(name, former_names)| (name, &**former_names));
        let asked = asked.chain(others().filter(|it| !it.is_declared()).map(|it| (it.name(), &*it.former_names)));
        let former = FormerNames::of(asked, |name| names.contains(name) || by_rpc.contains(name));
        let mut changes = Self {
            put: Vec::new(),
            moved: Vec::new(),
            stored: removed.iter().map(|name| (name.clone(), None)).collect(),
            removed,
            renamed: BTreeMap::new(),
            former_names: former,
            by_rpc,
        };
        for subsystem in subsystems {
            let asked = former_names.get(&subsystem.name).map_or(&[][..], |names| names);
            changes.declare(subsystem, asked, &before, memory)?;
        }
        for entry in others().filter(|entry| !entry.is_declared()) {
            changes.keep(entry, memory)?;
        }
        Ok(changes)
    }

    /// Adds the changes by a declared subsystem that asks for these former names.
    fn declare(
        &mut self,
        subsystem: Subsystem,
        asked: &[Name],
        before: &BTreeMap<&Name, &Arc<Registered>>,
        memory: &Memory,
    ) -> Result<(), Full> {
        let subsystem = subsystem.by_present_names(|name| self.former_names.present(name));
        let name = subsystem.name.clone();
        let former_names = self.former_names.of_declared(&name, asked);
        let earlier = before.get(&name).or_else(|| former_names.iter().find_map(|former| before.get(former)));
        let member = match earlier {
            // An unchanged subsystem stays initialized.
            Some(earlier) if *earlier.member.subsystem == subsystem => earlier.member.clone(),
            Some(earlier) => {
                if earlier.member.subsystem.endpoint != subsystem.endpoint || *earlier.name() != name {
                    self.moved.push(earlier.member.standing.clone());
                }
                earlier.member.with(subsystem.clone(), memory.try_hold(footprint(&subsystem, None, &former_names))?)
            }
            None => {
                let held = memory.try_hold(footprint(&subsystem, None, &former_names))?;
                Member::new(Arc::new(subsystem), false, Arc::default()).holding(held)
            }
        };
        let is_same = earlier.is_some_and(|it| {
            let has_same_member = Arc::ptr_eq(&it.member.subsystem, &member.subsystem);
            it.is_declared() && has_same_member && it.former_names == former_names
        });
        let entry = Registered { member: member.owned_by(None), origin: Origin::Config, former_names };
        if let Some(earlier) = earlier {
            let is_renamed = *earlier.name() != name;
            if is_renamed {
                self.renamed.insert(earlier.name().clone(), name.clone());
            }
            if !earlier.is_declared() || (is_renamed && entry.member.suspended) {
                self.stored.insert(name, Some(Arc::new(entry.to_stored())));
            }
        }
        if !is_same {
            self.put.push(entry);
        }
        Ok(())
    }

    /// Adds the changes of a subsystem that stays registered by RPC: the file may have taken a former name from it, or
    /// renamed a subsystem that it names.
    fn keep(&mut self, entry: &Registered, memory: &Memory) -> Result<(), Full> {
        let former_names = self.former_names.of_subsystem(entry.name(), &entry.former_names);
        let renaming = entry.member.subsystem.with_present_names(|name| self.former_names.present(name));
        if renaming.is_none() && former_names == entry.former_names {
            return Ok(());
        }
        let member = match renaming {
            Some(subsystem) => {
                let bytes = footprint(&subsystem, entry.member.owner.as_ref(), &former_names);
                entry.member.with(subsystem, memory.try_hold(bytes)?)
            }
            None => entry.member.clone(),
        };
        let entry = Registered { member, former_names, origin: entry.origin };
        self.stored.insert(entry.name().clone(), Some(Arc::new(entry.to_stored())));
        self.put.push(entry);
        Ok(())
    }

    /// The refusal of these declarations because of this circular dependency.
    pub(super) fn refuse(&self, ring: Ring) -> Refusal {
        let by_rpc = ring.names().filter(|name| self.by_rpc.contains(*name)).cloned().collect();
        Refusal::DeclaredRing { ring, by_rpc }
    }
}

impl Registry {
    /// A registry of these entries, declared or registered by RPC, where these names are expected.
    ///
    /// # Errors
    /// They have a circular dependency.
    pub(super) fn of(entries: Vec<Registered>, expected: BTreeSet<Name>) -> Result<Self, Refusal> {
        let plan = Plan::compile(entries.iter().map(|entry| entry.member.clone())).map_err(|ring| {
            let is_by_rpc = |name: &&Name| entries.iter().any(|entry| entry.name() == *name && !entry.is_declared());
            let by_rpc = ring.names().filter(is_by_rpc).cloned().collect();
            Refusal::DeclaredRing { ring, by_rpc }
        })?;
        let mut registry = Self::default();
        for entry in entries {
            registry.put(entry);
        }
        registry.expect(expected);
        let missing = registry.missing.iter().cloned().collect();
        let plan = plan.lacking(missing).with_former_names((*registry.renamed).clone());
        registry.plan = (Arc::new(plan), registry.version);
        Ok(registry)
    }

    /// Replaces the names that should be registered.
    pub(super) fn expect(&mut self, expected: BTreeSet<Name>) {
        if self.expected == expected {
            return;
        }
        self.version += 1;
        self.missing = expected.iter().filter(|name| !self.knows(name)).cloned().collect();
        self.expected = expected;
    }

    /// The names that should be registered and are not, in order.
    pub(super) fn missing(&self) -> &BTreeSet<Name> {
        &self.missing
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Number of declared subsystems.
    pub(super) fn declared(&self) -> usize {
        self.declared
    }

    /// Number of subsystems with a lease.
    pub(super) fn leases(&self) -> usize {
        self.expiries.len()
    }

    pub(super) fn get(&self, name: &Name) -> Option<&Registered> {
        self.entries.get(name).map(|entry| &**entry)
    }

    /// As [`Registry::get`].
    ///
    /// # Errors
    /// It is not registered.
    pub(super) fn find(&self, name: &Name) -> Result<&Registered, NotRegistered> {
        self.get(name).ok_or_else(|| self.not_registered(name.clone()))
    }

    /// That a name is not registered, with the present name of the subsystem that had it.
    pub(super) fn not_registered(&self, name: Name) -> NotRegistered {
        NotRegistered { renamed_to: self.present(&name), name }
    }

    /// The present name of the subsystem with this former name.
    pub(super) fn present(&self, former: &Name) -> Option<Name> {
        self.renamed.get(former).cloned()
    }

    /// The present names by former ones.
    pub(super) fn renamed(&self) -> &Arc<BTreeMap<Name, Name>> {
        &self.renamed
    }

    /// True if a subsystem has this name, or had it.
    fn knows(&self, name: &Name) -> bool {
        self.entries.contains_key(name) || self.renamed.contains_key(name)
    }

    /// The subsystem with this name, now or formerly.
    pub(super) fn get_by_any_name(&self, name: &Name) -> Option<&Registered> {
        self.get(self.renamed.get(name).unwrap_or(name))
    }

    /// The names that a cycle over these subsystems locks: besides them, their present names and their locks, where
    /// these are others.
    pub(super) fn locks_of(&self, subset: &Arc<[Name]>) -> Arc<[Name]> {
        let mut others = Vec::new();
        if !(self.renamed.is_empty() && self.locks.is_empty()) {
            for name in &**subset {
                let present = self.renamed.get(name);
                let lock = self.locks.get(present.unwrap_or(name));
                others.extend(present.into_iter().chain(lock.filter(|lock| *lock != name)).cloned());
            }
        }
        if others.is_empty() { subset.clone() } else { subset.iter().cloned().chain(others).collect() }
    }

    /// The entries after `name`, by name.
    pub(super) fn after(&self, name: Option<&str>) -> impl Iterator<Item = &Arc<Registered>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = name.map_or(Unbounded, Excluded);
        self.entries.range::<str, _>((from, Unbounded)).map(|(_, entry)| entry)
    }

    pub(super) fn snapshot(&self) -> Entries {
        Entries {
            registered: self.entries.values().cloned().collect(),
            renamed: (*self.renamed).clone(),
            missing: self.missing.iter().cloned().collect(),
            version: self.version,
        }
    }

    /// Adds or replaces an entry, which the caller has checked to add no circular dependency. Returns the subsystem
    /// that has left its endpoint, if any.
    pub(super) fn put(&mut self, entry: Registered) -> Option<Left> {
        let endpoint = entry.member.subsystem.endpoint.clone();
        let name = entry.name().clone();
        let left = self.remove(&name).filter(|left| left.endpoint != endpoint);
        *self.endpoints.entry(endpoint).or_default() += 1;
        self.declared += usize::from(entry.is_declared());
        self.expiries.extend(entry.lease().map(|lease| (lease.expires, name.clone())));
        self.missing.remove(&name);
        for former in &*entry.former_names {
            self.missing.remove(former);
            Arc::make_mut(&mut self.renamed).insert(former.clone(), name.clone());
        }
        if entry.member.lock != name {
            self.locks.insert(name.clone(), entry.member.lock.clone());
        }
        self.entries.insert(name, Arc::new(entry));
        left
    }

    /// Removes an entry. Returns the subsystem that has left its endpoint.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Left> {
        self.version += 1;
        let entry = self.entries.remove(name)?;
        self.locks.remove(name);
        for former in &*entry.former_names {
            // After it was renamed, they are those of its new name.
            if self.renamed.get(former) == Some(name) {
                Arc::make_mut(&mut self.renamed).remove(former);
            }
        }
        for name in entry.former_names.iter().chain([name]) {
            if self.expected.contains(name) && !self.knows(name) {
                self.missing.insert(name.clone());
            }
        }
        self.declared -= usize::from(entry.is_declared());
        if let Some(lease) = entry.lease() {
            self.expiries.remove(&(lease.expires, name.clone()));
        }
        let endpoint = entry.member.subsystem.endpoint.clone();
        let others = self.endpoints.remove(&endpoint)?.saturating_sub(1);
        if others > 0 {
            self.endpoints.insert(endpoint.clone(), others);
        }
        Some(Left { endpoint, name: name.clone(), was_last: others == 0 })
    }

    /// Renews the lease of an entry for a caller that may change it, if it has one that has not expired by the time
    /// `at`: otherwise its end may already be being written.
    pub(super) fn renew(&mut self, name: &Name, by: &Registrar, at: Instant) -> Result<Lease, NotRenewed> {
        let not_found = || NotRenewed::SubsystemNotFound(self.not_registered(name.clone()));
        let entry = self.get(name).ok_or_else(not_found)?;
        by.check(entry)?;
        let lease = entry.lease().ok_or_else(|| NotRenewed::NoLease(name.clone()))?;
        if lease.expires <= at {
            return Err(not_found());
        }
        let lease = Lease::new(lease.length, Instant::now());
        self.set_lease(name, lease);
        Ok(lease)
    }

    /// Has all leases that had not expired by `held` begin now.
    pub(super) fn begin_leases_anew(&mut self, held: Instant) {
        let now = Instant::now();
        let of_held: Vec<_> = self.expiries.iter().filter(|(expires, _)| *expires > held).cloned().collect();
        for (_, name) in of_held {
            if let Some(lease) = self.get(&name).and_then(Registered::lease) {
                self.set_lease(&name, Lease::new(lease.length, now));
            }
        }
    }

    /// Replaces the lease of an entry, if it has one.
    pub(super) fn set_lease(&mut self, name: &Name, lease: Lease) {
        if let Some(entry) = self.entries.get_mut(name)
            && let Some(earlier) = entry.lease()
        {
            self.expiries.remove(&(earlier.expires, name.clone()));
            self.expiries.insert((lease.expires, name.clone()));
            Arc::make_mut(entry).origin = Origin::Rpc { lease: Some(lease) };
        }
    }

    /// When the next lease ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.expiries.first().map(|(expires, _)| *expires)
    }

    /// At most `max` entries whose lease has expired, the earliest first.
    pub(super) fn expired(&self, now: Instant, max: usize) -> Vec<Name> {
        let expired = self.expiries.iter().take_while(|(expires, _)| *expires <= now);
        expired.take(max).map(|(_, name)| name.clone()).collect()
    }

    /// The plan over all entries.
    ///
    /// # Errors
    /// There were changes since it was computed: compute it again from the snapshot.
    pub(super) fn plan(&self) -> Result<Arc<Plan>, Entries> {
        let (plan, version) = &self.plan;
        if *version == self.version { Ok(plan.clone()) } else { Err(self.snapshot()) }
    }

    /// Stores the plan of a snapshot. A snapshot without a plan keeps the previous one. Returns the stored plan.
    pub(super) fn planned(&mut self, snapshot: &Entries, plan: Option<Arc<Plan>>) -> Arc<Plan> {
        let plan = plan.unwrap_or_else(|| self.plan.0.clone());
        self.plan = (plan.clone(), snapshot.version);
        plan
    }

    /// Number of relations in the latest plan.
    pub(super) fn relations(&self) -> usize {
        self.plan.0.relations()
    }

    /// True if there were no changes since this plan.
    pub(super) fn is_as_planned(&self, plan: &Arc<Plan>) -> bool {
        Arc::ptr_eq(&self.plan.0, plan) && self.plan.1 == self.version
    }
}

impl Orchestrator {
    /// True while the owner of this subsystem is revoked, so that it is not called.
    pub fn is_revoked(&self, registered: &Registered) -> bool {
        self.0.engine.revoked.owner_of(&registered.member).is_some()
    }

    /// A subsystem.
    ///
    /// # Errors
    /// It is not registered.
    pub fn subsystem(&self, name: &Name) -> Result<Registered, NotRegistered> {
        self.0.state().registry.find(name).cloned()
    }

    /// Up to `max` subsystems after this name, by name.
    pub fn subsystems(&self, after: Option<&str>, max: usize) -> Vec<Arc<Registered>> {
        self.0.state().registry.after(after).take(max).cloned().collect()
    }
}
