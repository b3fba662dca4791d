//! The registry: which subsystems are registered now, and their order.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::Refusal;
use crate::{
    engine::{Member, Plan, Ring},
    model::Name,
    ports::StoredSubsystem,
};

/// The registered subsystems and the plan over them.
#[derive(Debug, Default)]
pub(super) struct Registry {
    entries: BTreeMap<Name, Registered>,
    plan: Arc<Plan>,
    /// The plan is older than the entries.
    plan_is_stale: bool,
}

/// One registered subsystem.
#[derive(Clone, Debug)]
pub struct Registered {
    /// Its registration and what is remembered of it.
    pub member: Member,
    /// The configuration file declares it.
    pub declared: bool,
    /// When its registration ends.
    pub lease: Option<Lease>,
}

/// A registration that ends unless it is renewed.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// For how long it is renewed.
    pub length: Duration,
    /// When it ends.
    pub expires: Instant,
}

impl Lease {
    /// A lease that begins now.
    pub(super) fn new(length: Duration) -> Self {
        Self { length, expires: Instant::now() + length }
    }
}

impl Registered {
    /// As it is stored.
    pub(super) fn to_stored(&self) -> StoredSubsystem {
        let subsystem = &self.member.subsystem;
        StoredSubsystem {
            name: subsystem.name.clone(),
            spec: (!self.declared).then(|| subsystem.to_spec()),
            lease: self.lease.map(|lease| lease.length),
            suspended: self.member.suspended,
        }
    }
}

impl Registry {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, name: &Name) -> Result<&Registered, Refusal> {
        self.entries.get(name).ok_or_else(|| Refusal::SubsystemNotFound(name.clone()))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Registered> {
        self.entries.values()
    }

    /// Those after `name` in the order of names.
    pub(super) fn after(&self, name: Option<&str>) -> impl Iterator<Item = &Registered> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = name.map_or(Unbounded, Excluded);
        self.entries.range::<str, _>((from, Unbounded)).map(|(_, entry)| entry)
    }

    /// Whether the order would still be one with this entry.
    pub(super) fn check_order(&self, entry: &Registered) -> Result<(), Ring> {
        let subsystem = &entry.member.subsystem;
        // One that waits for nobody and for whom nobody waits can't be in a ring.
        let waits = !subsystem.requires.is_empty() || !subsystem.after.is_empty();
        let is_waited_for = || {
            self.entries
                .values()
                .map(|other| &other.member.subsystem)
                .any(|other| other.requires.contains(&subsystem.name) || other.after.contains(&subsystem.name))
        };
        if waits || is_waited_for() {
            let others = self.entries.values().filter(|other| other.member.subsystem.name != subsystem.name);
            Plan::compile(others.chain([entry]).map(|entry| entry.member.clone()))?;
        }
        Ok(())
    }

    /// Puts an entry whose order was checked.
    pub(super) fn put(&mut self, entry: Registered) {
        self.entries.insert(entry.member.subsystem.name.clone(), entry);
        self.plan_is_stale = true;
    }

    pub(super) fn remove(&mut self, name: &Name) {
        self.plan_is_stale = true;
        self.entries.remove(name);
    }

    /// A registry of these entries, some of which the configuration file declares.
    pub(super) fn of(entries: BTreeMap<Name, Registered>) -> Result<Self, Refusal> {
        let plan = Plan::compile(entries.values().map(|entry| entry.member.clone())).map_err(|ring| {
            let is_by_rpc = |name: &&Name| entries.get(*name).is_some_and(|entry| !entry.declared);
            let by_rpc = ring.names().filter(is_by_rpc).cloned().collect();
            Refusal::DeclaredRing { ring, by_rpc }
        })?;
        Ok(Self { entries, plan: Arc::new(plan), plan_is_stale: false })
    }

    pub(super) fn entries(&self) -> BTreeMap<Name, Registered> {
        self.entries.clone()
    }

    /// Takes over the lease of an entry that is otherwise the same.
    pub(super) fn renew_in_place(&mut self, entry: &Registered) {
        if let Some(kept) = self.entries.get_mut(&entry.member.subsystem.name) {
            kept.lease = entry.lease;
        }
    }

    /// Takes over the leases of entries that are in both.
    pub(super) fn keep_leases_of(&mut self, other: &Self) {
        for (name, entry) in &mut self.entries {
            entry.lease = other.entries.get(name).filter(|_| !entry.declared).and_then(|other| other.lease);
        }
    }

    /// Renews the lease of an entry, if it has one. Not one that has ended: its end may be being written.
    pub(super) fn renew(&mut self, name: &Name) -> Result<Lease, Refusal> {
        let entry = self.entries.get_mut(name).ok_or_else(|| Refusal::SubsystemNotFound(name.clone()))?;
        let lease = entry.lease.as_mut().ok_or_else(|| Refusal::NoLease(name.clone()))?;
        if lease.expires <= Instant::now() {
            return Err(Refusal::SubsystemNotFound(name.clone()));
        }
        *lease = Lease::new(lease.length);
        Ok(*lease)
    }

    /// When the next lease ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.entries.values().filter_map(|entry| entry.lease).map(|lease| lease.expires).min()
    }

    /// Those whose lease has ended.
    pub(super) fn expired(&self, now: Instant) -> Vec<Name> {
        let expired = self.entries.values().filter(|entry| entry.lease.is_some_and(|lease| lease.expires <= now));
        expired.map(|entry| entry.member.subsystem.name.clone()).collect()
    }

    /// The order over all entries. Compiled when it is first asked for after a change.
    pub(super) fn plan(&mut self) -> Arc<Plan> {
        if self.plan_is_stale {
            match Plan::compile(self.entries.values().map(|entry| entry.member.clone())) {
                Ok(plan) => self.plan = Arc::new(plan),
                // Every entry was checked before it was put, so this is a defect; the old order goes on.
                Err(ring) => tracing::error!(%ring, "the registry has no order"),
            }
            self.plan_is_stale = false;
        }
        self.plan.clone()
    }
}
