//! The order among the registered subsystems, kept up to date entry by entry. Pure.
//!
//! A change is checked for a circular dependency only along the paths from and to the changed entry, so that the time
//! does not depend on the size of the registry.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use super::{Ring, plan::order_of};
use crate::model::{Name, Subsystem};

/// The dependencies of subsystems.
#[derive(Debug, Default)]
pub struct Order {
    subsystems: HashMap<Name, Arc<Subsystem>>,
    /// Dependents by the name that they wait for, registered or not.
    waiting: HashMap<Name, BTreeSet<Name>>,
}

impl Order {
    /// The order of these subsystems.
    pub fn of(subsystems: impl IntoIterator<Item = Arc<Subsystem>>) -> Self {
        let mut order = Self::default();
        for subsystem in subsystems {
            order.put(subsystem);
        }
        order
    }

    /// Adds or replaces subsystems, and removes others. Returns the changes, to undo them.
    ///
    /// # Errors
    /// A circular dependency; then nothing has changed.
    pub fn change(&mut self, put: Vec<Arc<Subsystem>>, removed: &[Name]) -> Result<Undo, Ring> {
        let names: Vec<_> = put.iter().map(|subsystem| subsystem.name.clone()).collect();
        let mut undo = Undo(Vec::with_capacity(put.len() + removed.len()));
        for name in removed {
            undo.0.push((name.clone(), self.remove(name)));
        }
        for subsystem in put {
            undo.0.push((subsystem.name.clone(), self.put(subsystem)));
        }
        // Usually dependents come after their dependencies: then only settled subsystems wait for the last of the
        // others.
        let mut settled = HashSet::new();
        let checked = names.iter().rev().try_for_each(|name| {
            self.check(name, &settled)?;
            settled.insert(name);
            Ok(())
        });
        match checked {
            Ok(()) => Ok(undo),
            Err(ring) => {
                self.undo(undo);
                Err(ring)
            }
        }
    }

    /// Undoes the latest change.
    pub fn undo(&mut self, Undo(earlier): Undo) {
        for (name, earlier) in earlier.into_iter().rev() {
            match earlier {
                Some(earlier) => drop(self.put(earlier)),
                None => drop(self.remove(&name)),
            }
        }
    }

    fn put(&mut self, subsystem: Arc<Subsystem>) -> Option<Arc<Subsystem>> {
        let earlier = self.remove(&subsystem.name);
        for (name, _) in order_of(&subsystem) {
            self.waiting.entry(name.clone()).or_default().insert(subsystem.name.clone());
        }
        self.subsystems.insert(subsystem.name.clone(), subsystem);
        earlier
    }

    /// Removes a subsystem and returns it. Other subsystems may still wait for its name.
    pub fn remove(&mut self, name: &Name) -> Option<Arc<Subsystem>> {
        let subsystem = self.subsystems.remove(name)?;
        for (earlier, _) in order_of(&subsystem) {
            if let Some(waiting) = self.waiting.get_mut(earlier) {
                waiting.remove(name);
                if waiting.is_empty() {
                    self.waiting.remove(earlier);
                }
            }
        }
        Some(subsystem)
    }

    /// Checks that the order is still acyclic after this subsystem was added: a new ring must contain it. If several
    /// were added, add all before checking each; no ring contains `settled` subsystems, which were checked before.
    fn check(&self, name: &Name, settled: &HashSet<&Name>) -> Result<(), Ring> {
        let Some(subsystem) = self.subsystems.get(name) else { return Ok(()) };
        for (earlier, _) in order_of(subsystem) {
            if let Some(earlier) = self.subsystems.get(earlier).filter(|earlier| earlier.phase > subsystem.phase) {
                return Err(Ring::across_phases(subsystem, earlier));
            }
        }
        if let Some(waiting) = self.waiting_for(name).find(|waiting| subsystem.phase > waiting.phase) {
            return Err(Ring::across_phases(waiting, subsystem));
        }
        // Otherwise the phases decide the order of subsystems in different phases.
        self.ring_through(subsystem, settled).map_or(Ok(()), Err)
    }

    fn waiting_for(&self, name: &Name) -> impl Iterator<Item = &Subsystem> {
        self.waiting.get(name).into_iter().flatten().filter_map(|waiting| self.subsystems.get(waiting).map(|it| &**it))
    }

    /// A ring needs both a path out of the subsystem and a path back into it. Both are searched alternately, step by
    /// step, so that the search ends with the shorter one: most newly registered subsystems have dependencies but no
    /// dependents yet.
    fn ring_through(&self, subsystem: &Subsystem, settled: &HashSet<&Name>) -> Option<Ring> {
        let counts = |other: &Subsystem| other.phase == subsystem.phase && !settled.contains(&other.name);
        let (mut out, mut back) = (Search::from(subsystem), Search::from(subsystem));
        while let (Some(at), Some(to)) = (out.frontier.pop_front(), back.frontier.pop_front()) {
            for (name, _) in order_of(at) {
                let Some(earlier) = self.subsystems.get(name).filter(|it| counts(it)) else { continue };
                if back.found.contains_key(&earlier.name) {
                    return Some(ring(&out, at, &back, earlier));
                }
                out.go(at, earlier);
            }
            for waiting in self.waiting_for(&to.name).filter(|it| counts(it)) {
                if out.found.contains_key(&waiting.name) {
                    return Some(ring(&out, waiting, &back, to));
                }
                back.go(to, waiting);
            }
        }
        None
    }
}

/// The order before a change.
#[derive(Debug)]
pub struct Undo(Vec<(Name, Option<Arc<Subsystem>>)>);

/// A breadth-first search from a subsystem, which finds a short ring.
struct Search<'a> {
    /// The subsystems found, with their predecessors.
    found: HashMap<&'a Name, Option<&'a Subsystem>>,
    frontier: VecDeque<&'a Subsystem>,
}

impl<'a> Search<'a> {
    fn from(subsystem: &'a Subsystem) -> Self {
        Self { found: HashMap::from([(&subsystem.name, None)]), frontier: VecDeque::from([subsystem]) }
    }

    fn go(&mut self, from: &'a Subsystem, to: &'a Subsystem) {
        if !self.found.contains_key(&to.name) {
            self.found.insert(&to.name, Some(from));
            self.frontier.push_back(to);
        }
    }

    /// The path from `last` to the start of the search.
    fn way(&self, last: &'a Subsystem) -> impl Iterator<Item = &'a Subsystem> {
        std::iter::successors(Some(last), |at| self.found.get(&at.name).copied().flatten())
    }
}

/// The ring in which `last` of the path out waits for `first` of the path back.
fn ring<'a>(out: &Search<'a>, last: &'a Subsystem, back: &Search<'a>, first: &'a Subsystem) -> Ring {
    let mut members: Vec<_> = out.way(last).collect();
    members.reverse();
    // Both paths contain the start of the search.
    let back: Vec<_> = back.way(first).collect();
    members.extend(&back[..back.len() - 1]);
    Ring::of(&members)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        engine::{Member, Plan},
        model::SubsystemSpec,
    };

    fn subsystem(name: &str, phase: i32, requires: &[String], after: &[String]) -> Arc<Subsystem> {
        let others = |names: &[String]| {
            let others: BTreeSet<_> = names.iter().filter(|other| *other != name).cloned().collect();
            others.into_iter().collect()
        };
        let spec = SubsystemSpec {
            name: name.into(),
            endpoint: "http://127.0.0.1:1".into(),
            phase: Some(phase),
            requires: others(requires),
            after: others(after),
            ..SubsystemSpec::default()
        };
        Arc::new(Subsystem::from_spec(&spec).unwrap())
    }

    fn name(i: usize) -> String {
        format!("s{i}")
    }

    proptest! {
        /// Incrementally, the order accepts the same entries as a plan over all of them. Its circular dependencies
        /// exist.
        #[test]
        fn incremental_checks_agree_with_a_whole_plan(
            steps in proptest::collection::vec(
                (0..8_usize, 0..2_i32, proptest::collection::vec(0..8_usize, 0..3), any::<bool>(), 0..6_usize),
                1..40,
            )
        ) {
            let mut order = Order::default();
            let mut entries: BTreeMap<String, Arc<Subsystem>> = BTreeMap::new();
            for (i, phase, others, requires, action) in steps {
                let own = name(i);
                if action == 0 {
                    order.change(Vec::new(), &[Name::parse(&own).unwrap()]).unwrap();
                    entries.remove(&own);
                    continue;
                }
                let others: Vec<_> = others.into_iter().map(name).collect();
                let (requires, after): (&[_], &[_]) = if requires { (&others, &[]) } else { (&[], &others) };
                let new = subsystem(&own, phase, requires, after);
                let checked = order.change(vec![new.clone()], &[]);
                let mut all = entries.clone();
                all.insert(own.clone(), new.clone());
                let plan = Plan::compile(all.values().map(|it| Member::new(it.clone(), false, Arc::default())));
                prop_assert_eq!(plan.is_ok(), checked.is_ok(), "{:?} {:?}", plan.err(), checked.err());
                if let Err(ring) = checked {
                    let members: Vec<_> = ring.names().cloned().collect();
                    for (at, member) in members.iter().enumerate() {
                        let next = &members[(at + 1) % members.len()];
                        let waits = order_of(&all[member.as_str()]).any(|(earlier, _)| earlier == next);
                        prop_assert!(waits || members.len() == 2, "{}", ring);
                    }
                } else {
                    entries = all;
                }
            }
        }
    }

    #[test]
    fn an_order_of_registered_subsystems_refuses_a_circular_dependency_with_them() {
        let after = |name: &str, earlier: &str| subsystem(name, 0, &[], &[earlier.to_owned()]);
        let mut order = Order::of([after("a", "b"), after("b", "c")]);
        order.change(vec![after("c", "a")], &[]).unwrap_err();
        order.change(vec![after("c", "d")], &[]).unwrap();
    }

    #[test]
    fn later_registrations_are_checked_and_a_change_of_several_is_checked_as_a_whole() {
        let after = |name: &str, earlier: &str| subsystem(name, 0, &[], &[earlier.to_owned()]);
        let mut order = Order::default();
        order.change(vec![after("a", "b")], &[]).unwrap();
        order.change(vec![after("b", "c")], &[]).unwrap();
        let ring = order.change(vec![after("d", "a"), after("c", "a")], &[]).unwrap_err().to_string();
        assert!(ring.ends_with("a is after b, b is after c, c is after a; remove one of these"), "{ring}");
        // No entry was changed. The reversal of all of them is valid in any sequence.
        order.change(vec![after("b", "d"), after("c", "b")], &[]).unwrap();
        let undo = order.change(vec![after("a", "c")], &[Name::parse("b").unwrap()]).unwrap();
        order.undo(undo);
        order.change(vec![after("b", "a")], &[]).unwrap_err();
        order.change(vec![after("b", "a"), after("a", "z")], &[]).unwrap();
    }
}
