//! The order among the registered subsystems, kept up to date entry by entry. Pure.
//!
//! Whether a change would make a circular dependency is decided by what the changed entry reaches and is reached by, so
//! that it takes no longer where the registry is large.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use super::{Ring, plan::order_of};
use crate::model::{Name, Subsystem};

/// Which subsystem waits for which.
#[derive(Debug, Default)]
pub struct Order {
    subsystems: HashMap<Name, Arc<Subsystem>>,
    /// By the name that they wait for, whether it is registered or not.
    waiting: HashMap<Name, BTreeSet<Name>>,
}

impl Order {
    /// The order among these.
    pub fn of(subsystems: impl IntoIterator<Item = Arc<Subsystem>>) -> Self {
        let mut order = Self::default();
        for subsystem in subsystems {
            order.put(subsystem);
        }
        order
    }

    /// Puts subsystems, each in the place of the one of its name, and removes others. Returns what undoes it.
    ///
    /// # Errors
    /// There would be no order any more; then nothing has changed.
    pub fn change(&mut self, put: Vec<Arc<Subsystem>>, removed: &[Name]) -> Result<Undo, Ring> {
        let names: Vec<_> = put.iter().map(|subsystem| subsystem.name.clone()).collect();
        let mut undo = Undo(Vec::with_capacity(put.len() + removed.len()));
        for name in removed {
            undo.0.push((name.clone(), self.remove(name)));
        }
        for subsystem in put {
            undo.0.push((subsystem.name.clone(), self.put(subsystem)));
        }
        // Mostly those that wait come after those that they wait for: then only settled ones wait for the last of the others.
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

    /// Makes the latest change undone.
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

    /// Others may go on waiting for its name.
    fn remove(&mut self, name: &Name) -> Option<Arc<Subsystem>> {
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

    /// Whether there still is an order after the subsystem of this name was put, where there was one before: a ring that it
    /// closes goes through it. Where several were put, all have to be there before each is checked; none goes through those
    /// that are `settled`, which were checked before.
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
        // Other than that, phases decide between those of different phases.
        self.ring_through(subsystem, settled).map_or(Ok(()), Err)
    }

    fn waiting_for(&self, name: &Name) -> impl Iterator<Item = &Subsystem> {
        self.waiting.get(name).into_iter().flatten().filter_map(|waiting| self.subsystems.get(waiting).map(|it| &**it))
    }

    /// A ring needs both a way out of the subsystem and a way back into it. They are searched for in turn, step by step,
    /// so that whichever ends first decides: most that are registered wait for others, and nobody for them yet.
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

/// How the order was before a change.
#[derive(Debug)]
pub struct Undo(Vec<(Name, Option<Arc<Subsystem>>)>);

/// A breadth-first search from a subsystem, so that the ring that is found is a short one.
struct Search<'a> {
    /// Each that was found, and by way of which.
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

    /// From `last` to where the search began.
    fn way(&self, last: &'a Subsystem) -> impl Iterator<Item = &'a Subsystem> {
        std::iter::successors(Some(last), |at| self.found.get(&at.name).copied().flatten())
    }
}

/// The ring in which `last` of the way out waits for `first` of the way back.
fn ring<'a>(out: &Search<'a>, last: &'a Subsystem, back: &Search<'a>, first: &'a Subsystem) -> Ring {
    let mut members: Vec<_> = out.way(last).collect();
    members.reverse();
    // Both ways have the subsystem from which the search began.
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
        /// Entry by entry, the order allows what a plan over all entries allows, and the rings that it names are there.
        #[test]
        fn what_is_checked_entry_by_entry_is_what_a_whole_plan_would_say(
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
    fn names_that_are_registered_later_count_then_and_a_change_of_several_counts_as_a_whole() {
        let after = |name: &str, earlier: &str| subsystem(name, 0, &[], &[earlier.to_owned()]);
        let mut order = Order::default();
        order.change(vec![after("a", "b")], &[]).unwrap();
        order.change(vec![after("b", "c")], &[]).unwrap();
        let ring = order.change(vec![after("d", "a"), after("c", "a")], &[]).unwrap_err().to_string();
        assert!(ring.ends_with("a is after b, b is after c, c is after a; remove one of these"), "{ring}");
        // Nothing of it was kept. Turned around as a whole, there is no ring, in whichever order they are given.
        order.change(vec![after("b", "d"), after("c", "b")], &[]).unwrap();
        let undo = order.change(vec![after("a", "c")], &[Name::parse("b").unwrap()]).unwrap();
        order.undo(undo);
        order.change(vec![after("b", "a")], &[]).unwrap_err();
        order.change(vec![after("b", "a"), after("a", "z")], &[]).unwrap();
    }
}
