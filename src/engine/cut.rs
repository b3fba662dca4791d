//! The plan of a cycle over some of the subsystems. The plan keeps these, and relays where several of them meet in
//! subsystems that are left out. Making it takes time and memory for all that they wait for, and these may be all that
//! are registered.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{
    Plan,
    plan::{Named, Relays, Step},
};
use crate::model::Name;

impl Plan {
    /// The plan of a cycle over `subset`; `None` means all.
    pub fn of_cycle(self: &Arc<Self>, subset: Option<&[Name]>) -> Arc<Self> {
        let (Some(positions), unregistered) = self.positions_of(subset) else { return self.clone() };
        Arc::new(self.cut(&positions, unregistered))
    }

    /// The plan of a cycle over `subset` that has locked these names. A subsystem whose lock it does not have got its
    /// name after the cycle was admitted, so that another cycle may be calling it. It counts as not registered.
    pub fn of_locked(self: &Arc<Self>, subset: &[Name], locked: &[Name]) -> Arc<Self> {
        let (positions, mut unregistered) = self.positions_of(Some(subset));
        let locked: HashSet<_> = locked.iter().collect();
        let is_locked = |position: &usize| locked.contains(&self.steps[*position].member.lock);
        let (positions, others): (Vec<_>, Vec<_>) = positions.into_iter().flatten().partition(is_locked);
        unregistered.extend(others.iter().map(|position| self.steps[*position].member.subsystem.name.clone()));
        Arc::new(self.cut(&positions, unregistered))
    }

    /// The plan of the subsystems at these positions. A subsystem that waits through ones that are left out still waits
    /// for them.
    fn cut(&self, positions: &[usize], unregistered: Vec<Name>) -> Self {
        let mut relays = Relays::default();
        // The node for each position: none for a subsystem that is left out and waits for no subsystem in the cycle.
        let mut nodes: HashMap<usize, usize> = positions.iter().copied().zip(0..).collect();
        let mut releases = vec![Vec::new(); positions.len()];
        let mut release = |relays: &mut Relays, earlier: &[usize], later: usize| {
            for earlier in earlier {
                match releases.get_mut(*earlier) {
                    Some(of_step) => of_step.push(later),
                    None => relays.releases.push((number(earlier - positions.len()), number(later))),
                }
            }
        };
        // Their dependencies are before them in the plan.
        for position in self.left_out_before(positions) {
            match &self.nodes_before(position, &nodes)[..] {
                [] => {}
                [one] => _ = nodes.insert(position, *one),
                several => {
                    let relay = positions.len() + relays.waits.len();
                    relays.waits.push(number(several.len()));
                    release(&mut relays, several, relay);
                    nodes.insert(position, relay);
                }
            }
        }
        let waits_for: Vec<_> = positions.iter().map(|position| self.nodes_before(*position, &nodes)).collect();
        for (step, earlier) in waits_for.iter().enumerate() {
            release(&mut relays, earlier, step);
        }
        relays.releases.sort_unstable();

        let mut phases: Vec<usize> = Vec::new();
        let mut latest = None;
        for position in positions {
            let phase = Some(self.steps[*position].member.subsystem.phase);
            match phases.last_mut() {
                Some(count) if phase == latest => *count += 1,
                _ => phases.push(1),
            }
            latest = phase;
        }
        let named = |named: &Named| match named {
            Named::Step(position) => positions
                .binary_search(position)
                .map_or_else(|_| Named::LeftOut(self.steps[*position].member.standing.clone()), Named::Step),
            other => other.clone(),
        };
        let cut = |((position, waits_for), releases): ((&usize, _), _)| {
            let step = &self.steps[*position];
            Step {
                member: step.member.clone(),
                waits_for,
                releases,
                requires: step.requires.iter().map(named).collect(),
                inputs: step.inputs.iter().map(|(name, it)| (name.clone(), named(it))).collect(),
            }
        };
        let steps: Vec<_> = positions.iter().zip(waits_for).zip(releases).map(cut).collect();
        let positions = steps.iter().map(|step| step.member.subsystem.name.clone()).zip(0..).collect();
        Self {
            relations: steps.iter().map(|step| step.waits_for.len()).sum(),
            steps,
            positions,
            phases,
            relays,
            unregistered,
            renamed: BTreeMap::new(),
        }
    }

    /// Positions of left-out subsystems that a subsystem at `positions` waits for, directly or through other left-out
    /// ones, in plan order.
    fn left_out_before(&self, positions: &[usize]) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        let mut unseen = positions.to_vec();
        while let Some(position) = unseen.pop() {
            for earlier in &self.steps[position].waits_for {
                if positions.binary_search(earlier).is_err() && found.insert(*earlier) {
                    unseen.push(*earlier);
                }
            }
        }
        found
    }

    /// The nodes that the subsystem at this position waits for, each once.
    fn nodes_before(&self, position: usize, nodes: &HashMap<usize, usize>) -> Vec<usize> {
        let before: BTreeSet<_> =
            self.steps[position].waits_for.iter().filter_map(|it| nodes.get(it)).copied().collect();
        before.into_iter().collect()
    }
}

/// Nodes are fewer than the subsystems that may be registered.
fn number(node: usize) -> u32 {
    u32::try_from(node).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        engine::Member,
        model::{Subsystem, SubsystemSpec},
    };

    /// A plan of s00, s01 …, each with its phase and the numbers of its predecessors.
    fn plan(after: &[(i32, Vec<usize>)]) -> Arc<Plan> {
        let member = |(i, (phase, after)): (usize, &(i32, Vec<usize>))| {
            let spec = SubsystemSpec {
                name: format!("s{i:02}"),
                endpoint: "http://127.0.0.1:1".into(),
                phase: Some(*phase),
                after: after.iter().map(|earlier| format!("s{earlier:02}")).collect(),
                ..SubsystemSpec::default()
            };
            Member::new(Arc::new(Subsystem::from_spec(&spec).unwrap()), false, Arc::default())
        };
        Arc::new(Plan::compile(after.iter().enumerate().map(member)).unwrap())
    }

    fn names(numbers: impl IntoIterator<Item = usize>) -> Vec<Name> {
        numbers.into_iter().map(|i| Name::parse(&format!("s{i:02}")).unwrap()).collect()
    }

    /// The nodes before a node.
    fn nodes_before(plan: &Plan, node: usize) -> Vec<usize> {
        let nodes = 0..plan.steps.len() + plan.relays.waits.len();
        nodes.filter(|earlier| plan.releases(*earlier).any(|later| later == node)).collect()
    }

    /// The names of the direct and indirect dependencies of a subsystem.
    fn all_before(plan: &Plan, name: &Name) -> BTreeSet<Name> {
        let mut before = BTreeSet::new();
        let mut unseen = vec![plan.positions[name]];
        while let Some(node) = unseen.pop() {
            unseen.extend(nodes_before(plan, node).into_iter().filter(|earlier| before.insert(*earlier)));
        }
        before.into_iter().filter_map(|node| Some(plan.steps.get(node)?.member.subsystem.name.clone())).collect()
    }

    #[test]
    fn a_skipped_step_needs_a_relay_only_if_several_links_meet_in_it() {
        let relays = |plan: &Plan| plan.relays.waits.len();
        let chain: Vec<_> = (0..50).map(|i: usize| (0, i.checked_sub(1).into_iter().collect())).collect();
        let ends = plan(&chain).of_cycle(Some(&names([49, 0])));
        assert_eq!((ends.steps.len(), relays(&ends), &ends.phases[..]), (2, 0, &[2][..]));
        assert_eq!((nodes_before(&ends, 0), nodes_before(&ends, 1)), (vec![], vec![0]));
        // Two subsystems are before one, and that one is before two.
        let hourglass = plan(&[(0, vec![]), (0, vec![]), (0, vec![0, 1]), (0, vec![2]), (0, vec![2]), (0, vec![])]);
        let around = hourglass.of_cycle(Some(&names([0, 1, 3, 4])));
        assert_eq!((around.steps.len(), relays(&around)), (4, 1));
        assert_eq!([0, 2, 3, 4].map(|node| nodes_before(&around, node)), [vec![], vec![4], vec![4], vec![0, 1]]);
        let unrelated = hourglass.of_cycle(Some(&names([5, 2, 60])));
        assert_eq!((unrelated.steps.len(), relays(&unrelated), &unrelated.unregistered), (2, 0, &names([60])));
    }

    #[test]
    fn a_cycle_calls_only_subsystems_whose_locks_it_has_by_whichever_name() {
        let member = |name: &str, lock: &str| {
            let spec =
                SubsystemSpec { name: name.into(), endpoint: "http://127.0.0.1:1".into(), ..SubsystemSpec::default() };
            let mut member = Member::new(Arc::new(Subsystem::from_spec(&spec).unwrap()), false, Arc::default());
            member.lock = Name::parse(lock).unwrap();
            member
        };
        let name = |text: &str| Name::parse(text).unwrap();
        let renamed = [("old", "new"), ("older", "new")].map(|(former, present)| (name(former), name(present)));
        let plan = Plan::compile([member("new", "older"), member("other", "other")]).unwrap();
        let plan = Arc::new(plan.with_former_names(renamed.into()));
        let over = |subset: &[&str], locked: &[&str]| {
            let names = |texts: &[&str]| texts.iter().map(|text| name(text)).collect::<Vec<_>>();
            let cut = plan.of_locked(&names(subset), &names(locked));
            let called = cut.members().map(|member| member.subsystem.name.to_string()).collect::<Vec<_>>().join(" ");
            (called, cut.unregistered.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let of = |called: &str, unregistered: &str| (called.to_owned(), unregistered.to_owned());
        assert_eq!(over(&["new", "other"], &["new", "other", "older"]), of("new other", ""));
        assert_eq!(over(&["old", "older", "new"], &["old", "older", "new"]), of("new", ""));
        // It named the new name before the subsystem had it.
        assert_eq!(over(&["new", "other", "x"], &["new", "other", "x"]), of("other", "x new"));
    }

    proptest! {
        /// Participants wait for the same participants as in the whole plan.
        #[test]
        fn the_order_is_that_of_the_whole_plan(
            links in proptest::collection::vec((0..2_i32, proptest::collection::vec(any::<proptest::sample::Index>(), 0..4)), 1..16),
            subset in proptest::collection::btree_set(0..16_usize, 1..8),
        ) {
            let after = |i: usize, of: &[proptest::sample::Index]| -> BTreeSet<usize> {
                let earlier = (0..i).filter(|earlier| links[*earlier].0 == links[i].0).collect::<Vec<_>>();
                of.iter().filter(|_| !earlier.is_empty()).map(|index| *index.get(&earlier)).collect()
            };
            let links: Vec<_> =
                links.iter().enumerate().map(|(i, (phase, of))| (*phase, after(i, of).into_iter().collect())).collect();
            let whole = plan(&links);
            let subset: BTreeSet<_> = names(subset.into_iter().filter(|i| *i < links.len())).into_iter().collect();
            let cut = whole.of_cycle(Some(&subset.iter().cloned().collect::<Vec<_>>()));
            prop_assert_eq!((cut.steps.len(), cut.phases.iter().sum::<usize>()), (subset.len(), subset.len()));
            for name in &subset {
                let expected: BTreeSet<_> = all_before(&whole, name).intersection(&subset).cloned().collect();
                prop_assert_eq!(all_before(&cut, name), expected, "{}", name);
            }
            // The count of each node agrees with its links. Every relay joins several links.
            for (node, step) in cut.steps.iter().enumerate() {
                prop_assert_eq!(&step.waits_for, &nodes_before(&cut, node));
            }
            for (relay, waits) in cut.relays.waits.iter().enumerate() {
                let node = cut.steps.len() + relay;
                prop_assert_eq!(nodes_before(&cut, node).len(), *waits as usize);
                prop_assert!(*waits > 1 && cut.releases(node).next().is_some());
            }
        }
    }
}
