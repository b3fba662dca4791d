//! The line of cycles: which of them may run now. Pure bookkeeping.
//!
//! A cycle locks its subsystems from its admission until its record is applied. It may start when it shares none of
//! them with a cycle before it, running or waiting. So cycles without a subsystem in common run concurrently, and no
//! cycle overtakes another: the number of cycles before a waiting one only decreases, and none starves.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

#[cfg(feature = "simulation")]
use crate::fault::Fault;
use crate::model::{CycleId, Name};

/// The most cycles that run at one time where the order of all has this number of relations: each is a task with
/// progress to show. A subsystem is in one of them at most; but each can take 12 bytes for each relation between
/// subsystems that it leaves out. The others wait as if for a lock.
pub(super) fn max_running(relations: usize) -> usize {
    const MAX: usize = 256;
    /// Relations, counted once for each running cycle: 96 MiB.
    const MAX_RELATIONS: usize = 1 << 23;
    (MAX_RELATIONS / relations.max(1)).clamp(1, MAX)
}

/// The subsystems that a cycle locks.
#[derive(Clone, Debug)]
pub(super) enum Locks {
    /// All subsystems, including those that are registered later.
    All,
    /// The subsystems with these names. Beside those of its request, a cycle locks the other names that they have, see
    /// [`Registry::locks_of`](super::registry::Registry::locks_of).
    Names(Arc<[Name]>),
}

/// All waiting and running cycles, in the order of their ids.
#[derive(Debug, Default)]
pub(super) struct Line {
    places: BTreeMap<CycleId, Place>,
    /// Cycles that lock all subsystems.
    all: BTreeSet<CycleId>,
    /// Cycles that lock a name, for each locked name.
    by_name: HashMap<Name, VecDeque<CycleId>>,
    /// Waiting cycles that are first at each of their names. Only a cycle that locks all can be before them.
    free: BTreeSet<CycleId>,
    running: usize,
}

#[derive(Debug)]
struct Place {
    locks: Locks,
    /// Number of its names at which another cycle is before it.
    behind: usize,
    /// All its names before this index are free of earlier cycles, and stay so.
    first_behind: usize,
    runs: bool,
}

/// The obstacle of a waiting cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Obstacle {
    /// The cycle before it.
    pub(super) cycle_id: CycleId,
    /// A subsystem that both lock; `None` if both lock all.
    pub(super) shared: Option<Name>,
}

impl Line {
    /// Adds a cycle at the end. Its id must be higher than all others.
    pub(super) fn enter(&mut self, cycle_id: CycleId, locks: Locks) {
        let (mut behind, mut first_behind) = (0, None);
        match &locks {
            Locks::All => _ = self.all.insert(cycle_id),
            Locks::Names(names) => {
                for (position, name) in names.iter().enumerate() {
                    let queue = self.by_name.entry(name.clone()).or_default();
                    // Each name counts once.
                    if queue.back() != Some(&cycle_id) {
                        if !queue.is_empty() {
                            behind += 1;
                            first_behind.get_or_insert(position);
                        }
                        queue.push_back(cycle_id);
                    }
                }
                if behind == 0 {
                    self.free.insert(cycle_id);
                }
            }
        }
        let first_behind = first_behind.unwrap_or_default();
        self.places.insert(cycle_id, Place { locks, behind, first_behind, runs: false });
    }

    /// Starts the first cycle that may run now, unless `max` cycles already run.
    pub(super) fn start_next(&mut self, max: usize) -> Option<CycleId> {
        if self.running >= max {
            return None;
        }
        let first_of_all = self.all.first().copied();
        #[cfg(feature = "simulation")]
        let first_of_all = first_of_all.filter(|all| !Fault::Overtaking.is_planted() || self.runs(*all));
        let free = self.free.first().copied().filter(|free| first_of_all.is_none_or(|all| *free < all));
        let first = || first_of_all.filter(|all| self.places.first_key_value().is_some_and(|(first, _)| first == all));
        let cycle_id = free.or_else(first)?;
        let place = self.places.get_mut(&cycle_id).filter(|place| !place.runs)?;
        place.runs = true;
        self.free.remove(&cycle_id);
        self.running += 1;
        Some(cycle_id)
    }

    /// Removes a running or waiting cycle. Does nothing if it is not in line.
    pub(super) fn leave(&mut self, cycle_id: CycleId) {
        let Some(place) = self.places.remove(&cycle_id) else { return };
        self.running -= usize::from(place.runs);
        self.all.remove(&cycle_id);
        self.free.remove(&cycle_id);
        let Locks::Names(names) = place.locks else { return };
        for name in &*names {
            let Some(queue) = self.by_name.get_mut(name) else { continue };
            let Some(at) = queue.iter().position(|locks| *locks == cycle_id) else { continue };
            queue.remove(at);
            let Some(next) = queue.front().copied() else {
                self.by_name.remove(name);
                continue;
            };
            if at == 0
                && let Some(next_place) = self.places.get_mut(&next)
            {
                next_place.behind -= 1;
                if next_place.behind == 0 {
                    self.free.insert(next);
                }
            }
        }
    }

    /// The first cycle, waiting or running, that shares a subsystem with these locks.
    pub(super) fn first_conflict(&self, locks: &Locks) -> Option<CycleId> {
        match locks {
            Locks::All => self.places.keys().next().copied(),
            Locks::Names(names) => {
                let first = names.iter().filter_map(|name| self.by_name.get(name)?.front().copied()).min();
                first.into_iter().chain(self.all.first().copied()).min()
            }
        }
    }

    /// The waiting cycles, in the order of their ids.
    pub(super) fn all_waiting(&self) -> impl Iterator<Item = CycleId> {
        self.places.iter().filter(|(_, place)| !place.runs).map(|(cycle_id, _)| *cycle_id)
    }

    /// The cycle that a waiting cycle waits for. `None` if it only waits because too many cycles run.
    ///
    /// Names at which no cycle is before it are checked once, since no cycle overtakes.
    pub(super) fn obstacle(&mut self, cycle_id: CycleId) -> Option<Obstacle> {
        let place = self.places.get_mut(&cycle_id).filter(|place| !place.runs)?;
        let over_all = self.all.first().copied().filter(|other| *other < cycle_id);
        let Locks::Names(names) = &place.locks else {
            let (first, other) = self.places.first_key_value().filter(|(first, _)| **first < cycle_id)?;
            let shared = match &other.locks {
                Locks::Names(names) => names.first().cloned(),
                Locks::All => None,
            };
            return Some(Obstacle { cycle_id: *first, shared });
        };
        let mut at_name = None;
        if place.behind > 0 {
            let front = |name| self.by_name.get(name).and_then(|queue| queue.front()).filter(|it| **it != cycle_id);
            while let Some(name) = names.get(place.first_behind) {
                at_name = front(name).map(|other| Obstacle { cycle_id: *other, shared: Some(name.clone()) });
                if at_name.is_some() {
                    break;
                }
                place.first_behind += 1;
            }
        }
        let over_all = over_all.map(|cycle_id| Obstacle { cycle_id, shared: names.first().cloned() });
        at_name.into_iter().chain(over_all).min_by_key(|obstacle| obstacle.cycle_id)
    }

    /// Running cycles that share a subsystem with these locks.
    pub(super) fn running_conflicts(&self, locks: &Locks) -> BTreeSet<CycleId> {
        let candidates: BTreeSet<_> = match locks {
            Locks::All => self.places.keys().copied().collect(),
            Locks::Names(names) => {
                // Only the first in the queue of a name can run.
                let first = names.iter().filter_map(|name| self.by_name.get(name)?.front().copied());
                first.chain(self.all.first().copied()).collect()
            }
        };
        candidates.into_iter().filter(|cycle_id| self.runs(*cycle_id)).collect()
    }

    /// The first of these cycles, all in line, that shares a subsystem with these locks. Looked for in the queues of
    /// the names: to compare each cycle's names takes too long where both are many.
    pub(super) fn first_conflict_of(&self, cycles: &BTreeSet<CycleId>, locks: &Locks) -> Option<CycleId> {
        let Locks::Names(names) = locks else { return cycles.first().copied() };
        if cycles.is_empty() {
            return None;
        }
        let is_one = |cycle_id: &&CycleId| cycles.contains(cycle_id);
        let first = names.iter().filter_map(|name| self.by_name.get(name)?.iter().find(is_one)).min();
        first.into_iter().chain(self.all.iter().find(is_one)).min().copied()
    }

    /// The names that this cycle locks; `None` if it locks all, or is not in line.
    pub(super) fn locked_names(&self, cycle_id: CycleId) -> Option<Arc<[Name]>> {
        match &self.places.get(&cycle_id)?.locks {
            Locks::All => None,
            Locks::Names(names) => Some(names.clone()),
        }
    }

    /// True if this cycle runs.
    pub(super) fn runs(&self, cycle_id: CycleId) -> bool {
        self.places.get(&cycle_id).is_some_and(|place| place.runs)
    }

    /// True if this cycle waits.
    pub(super) fn waits(&self, cycle_id: CycleId) -> bool {
        self.places.get(&cycle_id).is_some_and(|place| !place.runs)
    }

    /// Number of running cycles.
    pub(super) fn running(&self) -> usize {
        self.running
    }

    /// Number of waiting cycles.
    pub(super) fn waiting(&self) -> usize {
        self.places.len() - self.running
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(names: &str) -> Locks {
        match names {
            "*" => Locks::All,
            names => Locks::Names(names.chars().map(|name| Name::parse(&name.to_string()).unwrap()).collect()),
        }
    }

    fn line(places: &[&str]) -> Line {
        let mut line = Line::default();
        for (i, locks) in places.iter().enumerate() {
            line.enter(CycleId(i as u64 + 1), names(locks));
        }
        line
    }

    fn started(line: &mut Line) -> Vec<u64> {
        std::iter::from_fn(|| line.start_next(256)).map(|cycle_id| cycle_id.0).collect()
    }

    #[test]
    fn cycles_that_share_nothing_run_side_by_side() {
        let mut line = line(&["ab", "cd", "be", "f"]);
        assert_eq!(started(&mut line), [1, 2, 4]);
        assert_eq!((line.running(), line.waiting()), (3, 1));
        let in_line = [1, 2, 3, 4, 5].map(CycleId);
        assert_eq!(in_line.map(|it| line.runs(it)), [true, true, false, true, false]);
        assert_eq!(in_line.map(|it| line.waits(it)), [false, false, true, false, false]);
        line.leave(CycleId(2));
        assert!(started(&mut line).is_empty());
        line.leave(CycleId(1));
        assert_eq!(started(&mut line), [3]);
    }

    #[test]
    fn no_cycle_overtakes_one_that_waits_for_all() {
        let mut line = line(&["a", "*", "b", "*"]);
        assert_eq!(started(&mut line), [1]);
        line.leave(CycleId(1));
        assert_eq!(started(&mut line), [2]);
        line.leave(CycleId(2));
        assert_eq!(started(&mut line), [3]);
        line.leave(CycleId(3));
        assert_eq!(started(&mut line), [4]);
    }

    #[test]
    fn a_cycle_that_leaves_before_its_turn_delays_no_others() {
        // The third waits for the second, which waits for the first.
        let mut line = line(&["a", "ab", "b"]);
        assert_eq!(started(&mut line), [1]);
        line.leave(CycleId(2));
        assert_eq!(started(&mut line), [3]);
    }

    #[test]
    fn conflicts_are_those_with_a_subsystem_in_common() {
        let mut line = line(&["ab", "b", "cd"]);
        started(&mut line);
        assert_eq!(line.first_conflict(&names("b")), Some(CycleId(1)));
        assert_eq!(line.first_conflict(&names("xd")), Some(CycleId(3)));
        assert_eq!(line.first_conflict(&names("x")), None);
        assert_eq!(line.running_conflicts(&names("bd")), BTreeSet::from([CycleId(1), CycleId(3)]));
        assert_eq!(line.running_conflicts(&Locks::All), BTreeSet::from([CycleId(1), CycleId(3)]));
        let of = |line: &Line, cycles: &[u64], locks| {
            line.first_conflict_of(&cycles.iter().map(|id| CycleId(*id)).collect(), &names(locks)).map(|id| id.0)
        };
        assert_eq!([of(&line, &[2], "b"), of(&line, &[2], "a"), of(&line, &[2, 3], "dbb")], [Some(2), None, Some(2)]);
        line.enter(CycleId(4), Locks::All);
        assert_eq!([of(&line, &[2, 4], "x"), of(&line, &[3, 4], "*"), of(&line, &[], "*")], [Some(4), Some(3), None]);
    }

    #[test]
    fn the_cause_of_each_wait_is_known() {
        let mut line = line(&["ab", "xb", "*", "x", "q", "*"]);
        started(&mut line);
        let obstacle = |line: &mut Line, id| {
            line.obstacle(CycleId(id)).map(|it| (it.cycle_id.0, it.shared.map_or("*".to_owned(), |it| it.to_string())))
        };
        let waits = |id, name: &str| Some((id, name.to_owned()));
        assert_eq!(line.all_waiting().map(|it| it.0).collect::<Vec<_>>(), [2, 3, 4, 5, 6]);
        let all = [1, 2, 3, 4, 5, 6].map(|id| obstacle(&mut line, id));
        assert_eq!(all, [None, waits(1, "b"), waits(1, "a"), waits(2, "x"), waits(3, "q"), waits(1, "a")]);
        // The number of cycles before it decreases.
        line.leave(CycleId(1));
        assert_eq!([2, 3, 4].map(|id| obstacle(&mut line, id)), [None, waits(2, "x"), waits(2, "x")]);
        line.leave(CycleId(2));
        assert_eq!([4, 6].map(|id| obstacle(&mut line, id)), [waits(3, "x"), waits(3, "*")]);
    }

    #[test]
    fn the_number_of_running_cycles_is_bounded() {
        let mut line = Line::default();
        for id in 1..=257 {
            line.enter(CycleId(id), Locks::Names([Name::parse(&format!("n{id}")).unwrap()].into()));
        }
        assert_eq!(started(&mut line).len(), 256);
        line.leave(CycleId(7));
        assert_eq!(started(&mut line), [257]);
        // One that waits only for that has no obstacle.
        let mut line = self::line(&["a", "*"]);
        assert_eq!(line.start_next(0), None);
        assert!(line.obstacle(CycleId(1)).is_none());
        line.leave(CycleId(1));
        assert!(line.obstacle(CycleId(2)).is_none());
        assert_eq!((line.running(), line.waiting()), (0, 1));
        line.leave(CycleId(2));
        assert_eq!(line.waiting(), 0);
        assert_eq!([0, 28, 32_768, 200_000, usize::MAX].map(max_running), [256, 256, 256, 41, 1]);
    }

    /// The rule itself, implemented literally.
    fn may_run(places: &BTreeMap<u64, (BTreeSet<u8>, bool)>, cycle_id: u64) -> bool {
        let (own, _) = &places[&cycle_id];
        let shares = |other: &BTreeSet<u8>| own.is_empty() || other.is_empty() || !own.is_disjoint(other);
        places.range(..cycle_id).all(|(_, (other, _))| !shares(other))
    }

    proptest! {
        #[test]
        fn the_line_keeps_the_rule(steps in prop::collection::vec((prop::collection::btree_set(0..6_u8, 0..4), 0..4_u8, any::<prop::sample::Index>()), 1..60)) {
            let mut line = Line::default();
            // An empty set locks all.
            let mut model: BTreeMap<u64, (BTreeSet<u8>, bool)> = BTreeMap::new();
            let mut last = 0;
            for (locks, step, which) in steps {
                if step == 0 && !model.is_empty() {
                    let cycle_id = *model.keys().nth(which.index(model.len())).unwrap();
                    model.remove(&cycle_id);
                    line.leave(CycleId(cycle_id));
                } else {
                    last += 1;
                    let text: String = locks.iter().map(|name| char::from(b'a' + name)).collect();
                    line.enter(CycleId(last), names(if locks.is_empty() { "*" } else { &text }));
                    model.insert(last, (locks, false));
                }
                while let Some(CycleId(cycle_id)) = line.start_next(256) {
                    prop_assert!(may_run(&model, cycle_id), "{cycle_id} of {model:?}");
                    prop_assert!(!std::mem::replace(&mut model.get_mut(&cycle_id).unwrap().1, true));
                }
                for (cycle_id, (_, runs)) in &model {
                    prop_assert!(*runs || !may_run(&model, *cycle_id), "{cycle_id} should run: {model:?}");
                }
            }
        }
    }
}
