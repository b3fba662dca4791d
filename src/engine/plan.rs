//! The plan: the order of a cycle as a DAG, compiled once per change of the registry. Pure.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{BreakerState, Member, RevokedOwners, Standing};
use crate::model::{Name, SkipReason, Subsystem, SubsystemState};

/// The order of a cycle over all registered subsystems, or [over some of them](Plan::of_cycle). Positions are indices
/// into `Plan::steps`, which are ordered by phase, by level in the phase, and then by name, so that all dependencies of
/// a subsystem are before it.
#[derive(Debug, Default)]
pub struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) positions: HashMap<Name, usize>,
    /// Number of steps of each phase, lowest phase first. Phases are consecutive ranges of positions.
    pub(super) phases: Vec<usize>,
    /// Empty in a plan over all subsystems.
    pub(super) relays: Relays,
    /// Requested names that are not registered; in a plan over all subsystems, expected ones.
    pub(super) unregistered: Vec<Name>,
    /// Number of dependencies inside phases.
    pub(super) relations: usize,
    /// The present names of subsystems by their former ones.
    pub(super) renamed: BTreeMap<Name, Name>,
}

/// Nodes that replace subsystems that are left out and wait for several others in the cycle: their dependents wait for
/// all of these. As nodes of the order, relays are numbered after the steps.
#[derive(Debug, Default)]
pub(super) struct Relays {
    /// For how many others each relay waits.
    pub(super) waits: Vec<u32>,
    /// Each relay, counted from 0, with a node that waits for it, in order.
    pub(super) releases: Vec<(u32, u32)>,
}

/// One subsystem in the order.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) member: Member,
    /// The nodes of the same phase that it waits for: those of `requires` and `after`, or relays. Lower phases have
    /// ended anyway.
    pub(super) waits_for: Vec<usize>,
    /// The nodes that wait for this one.
    pub(super) releases: Vec<usize>,
    /// Positions of `requires`.
    pub(super) requires: Vec<Named>,
    /// Its inputs, and the positions of their makers.
    pub(super) inputs: Vec<(Name, Named)>,
}

/// The place of a subsystem that a registration names.
#[derive(Clone, Debug)]
pub(super) enum Named {
    /// At this position of the plan.
    Step(usize),
    /// It is registered, but is not in the plan.
    LeftOut(Arc<Standing>),
    /// It is not registered.
    Nowhere,
}

/// The result of a subsystem, for subsystems that require it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Succeeded,
    Failed,
    LeftOut,
}

impl From<&SubsystemState> for Fate {
    fn from(state: &SubsystemState) -> Self {
        match state {
            SubsystemState::Succeeded => Self::Succeeded,
            SubsystemState::Skipped(reason, _) if !reason.is_failure() => Self::LeftOut,
            _ => Self::Failed,
        }
    }
}

/// A circular dependency. Each entry says why its subsystem has to run after the next one; the last one leads back to
/// the first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Ring(Vec<(Name, String)>);

impl Ring {
    /// The ring of these subsystems, each of which waits for the next one, and the last for the first. Starts with the
    /// first by name.
    pub(super) fn of(members: &[&Subsystem]) -> Self {
        let first = (0..members.len()).min_by_key(|&i| &members[i].name).unwrap_or_default();
        let from_first = members.iter().cycle().skip(first).take(members.len());
        let next = members.iter().cycle().skip(first + 1);
        let why = |member: &Subsystem, next: &Subsystem| {
            let relation = order_of(member).find(|(name, _)| **name == next.name);
            relation.map_or("", |(_, relation)| relation).to_owned()
        };
        Self(from_first.zip(next).map(|(member, next)| (member.name.clone(), why(member, next))).collect())
    }

    /// The ring of a subsystem that waits for one of a later phase.
    pub(super) fn across_phases(waiting: &Subsystem, later: &Subsystem) -> Self {
        let relation = order_of(waiting).find(|(name, _)| **name == later.name);
        let starts_only_after =
            format!("(phase {}) starts only after phase {} and so after", later.phase, waiting.phase);
        Self(vec![
            (waiting.name.clone(), relation.map_or("", |(_, relation)| relation).to_owned()),
            (later.name.clone(), starts_only_after),
        ])
    }

    /// The subsystems in the ring, each before its dependency.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.0.iter().map(|(name, _)| name)
    }
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Most entries that are shown: a ring can be as long as the registry.
        const SHOWN: usize = 16;
        f.write_str("circular dependency: ")?;
        for (i, (name, why)) in self.0.iter().take(SHOWN).enumerate() {
            let (next, _) = &self.0[(i + 1) % self.0.len()];
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{name} {why} {next}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => f.write_str("; remove one of these"),
            more => write!(f, ", and {more} more; remove one of these"),
        }
    }
}

/// The expected course of a cycle that starts now.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// The subsystems, in the order of the plan.
    pub subsystems: Vec<PlannedSubsystem>,
    /// Number of levels.
    pub levels: u32,
    /// The chain that is expected to end last.
    pub critical_path: Vec<Name>,
    /// Its expected duration.
    pub duration: Duration,
}

/// The expected course of one subsystem.
#[derive(Clone, Debug)]
pub struct PlannedSubsystem {
    /// Its name.
    pub name: Name,
    /// Its phase.
    pub phase: i32,
    /// 0 if it waits for nothing, else one more than the highest level that it waits for.
    pub level: u32,
    /// Names of the subsystems in its phase that it waits for.
    pub waits_for: Vec<Name>,
    /// Why it will not be called, and the required subsystem that is the reason, if any.
    pub skip: Option<(SkipReason, Option<Name>)>,
    /// State of its circuit breaker. While it is open, the subsystem is not called either.
    pub breaker: BreakerState,
    /// Its expected duration; zero if it has never run.
    pub duration: Duration,
}

impl Plan {
    /// Orders the members.
    ///
    /// # Errors
    /// The ring, if there is one.
    pub fn compile(members: impl IntoIterator<Item = Member>) -> Result<Self, Ring> {
        let mut members: Vec<_> = members.into_iter().collect();
        members.sort_by(|a, b| (a.subsystem.phase, &a.subsystem.name).cmp(&(b.subsystem.phase, &b.subsystem.name)));
        let index: HashMap<_, _> =
            members.iter().enumerate().map(|(i, member)| (member.subsystem.name.clone(), i)).collect();

        let mut waits_for = Vec::with_capacity(members.len());
        for member in &members {
            waits_for.push(waits_inside_phase(member, &members, &index)?);
        }
        let levels = levels(&waits_for).map_err(|stuck| ring_among(&members, &waits_for, &stuck))?;

        let mut order: Vec<_> = (0..members.len()).collect();
        // The sort is stable, and members are ordered by name inside a phase.
        order.sort_by_key(|&i| (members[i].subsystem.phase, levels[i]));
        let mut position_of = vec![0; members.len()];
        for (position, &i) in order.iter().enumerate() {
            position_of[i] = position;
        }

        let mut phases = Vec::new();
        for (i, member) in members.iter().enumerate() {
            if i > 0 && members[i - 1].subsystem.phase == member.subsystem.phase {
                *phases.last_mut().unwrap_or(&mut 0) += 1;
            } else {
                phases.push(1);
            }
        }
        let mut releases = vec![Vec::new(); members.len()];
        for (i, earlier) in waits_for.iter().enumerate() {
            for &j in earlier {
                releases[position_of[j]].push(position_of[i]);
            }
        }
        let positions: HashMap<_, _> = index.into_iter().map(|(name, i)| (name, position_of[i])).collect();
        let steps = order
            .iter()
            .zip(releases)
            .map(|(&i, releases)| {
                let subsystem = &members[i].subsystem;
                let at = |name: &Name| positions.get(name).copied().map_or(Named::Nowhere, Named::Step);
                Step {
                    waits_for: waits_for[i].iter().map(|&j| position_of[j]).collect(),
                    releases,
                    requires: subsystem.requires.iter().map(at).collect(),
                    inputs: subsystem.input_names().map(|name| (name.clone(), at(name))).collect(),
                    member: members[i].clone(),
                }
            })
            .collect();
        Ok(Self { steps, positions, phases, relations: waits_for.iter().map(Vec::len).sum(), ..Self::default() })
    }

    /// The same plan, over all subsystems, where these are missing: they are expected, but not registered.
    #[must_use]
    pub fn lacking(self, missing: Vec<Name>) -> Self {
        Self { unregistered: missing, ..self }
    }

    /// The same plan, where a request may name subsystems by these former names, each with its present name.
    #[must_use]
    pub fn with_former_names(self, renamed: BTreeMap<Name, Name>) -> Self {
        Self { renamed, ..self }
    }

    /// The members, in the order of the plan.
    pub fn members(&self) -> impl ExactSizeIterator<Item = &Member> {
        self.steps.iter().map(|step| &step.member)
    }

    /// Number of subsystems in a cycle: the members, and those that are not registered.
    pub fn size(&self) -> usize {
        self.steps.len() + self.unregistered.len()
    }

    /// The subsystem at this position of a cycle: those that are not registered come after the members.
    pub fn name(&self, position: usize) -> Option<&Name> {
        let member = self.steps.get(position).map(|step| &step.member.subsystem.name);
        member.or_else(|| self.unregistered.get(position.checked_sub(self.steps.len())?))
    }

    /// True if this subsystem is in the cycle.
    pub fn has(&self, name: &Name) -> bool {
        self.positions.contains_key(name) || self.unregistered.contains(name)
    }

    /// The same names, shared with the registrations, so that they take no further memory.
    ///
    /// # Errors
    /// The first one that is not registered.
    pub fn own_names(&self, names: &[Name]) -> Result<Arc<[Name]>, Name> {
        let own = |name: &Name| {
            let position = self.positions.get(name).ok_or_else(|| name.clone())?;
            Ok(self.steps[*position].member.subsystem.name.clone())
        };
        names.iter().map(own).collect()
    }

    /// The positions of the subsystems in a cycle over `subset`, in order, and the names in it that are not registered.
    /// No positions mean all; then the names are those that are missing. A former name means its subsystem.
    pub(super) fn positions_of(&self, subset: Option<&[Name]>) -> (Option<Vec<usize>>, Vec<Name>) {
        let Some(subset) = subset else { return (None, self.unregistered.clone()) };
        let mut positions = Vec::with_capacity(subset.len());
        let mut unregistered = Vec::new();
        for name in subset {
            let present = self.positions.get(name).or_else(|| self.positions.get(self.renamed.get(name)?));
            match present {
                Some(&position) => positions.push(position),
                None => unregistered.push(name.clone()),
            }
        }
        positions.sort_unstable();
        positions.dedup();
        (Some(positions), unregistered)
    }

    /// Why the subsystem at `position` can't run, given the results of those before it, and whether the parent of the
    /// cycle gives the output of a name that is not registered. A failed requirement takes precedence over one that was
    /// left out.
    pub(super) fn unmet_requirement(
        &self,
        position: usize,
        fate: impl Fn(usize) -> Fate,
        is_given: impl Fn(&Name) -> bool,
    ) -> Option<(SkipReason, &Name)> {
        let step = &self.steps[position];
        let mut left_out = None;
        for (name, required) in step.member.subsystem.requires.iter().zip(&step.requires) {
            let fate = match required {
                Named::Step(position) => fate(*position),
                Named::LeftOut(_) => Fate::LeftOut,
                Named::Nowhere if is_given(name) => Fate::Succeeded,
                Named::Nowhere => return Some((SkipReason::RequirementMissing, name)),
            };
            match fate {
                Fate::Failed => return Some((SkipReason::RequirementFailed, name)),
                Fate::LeftOut => left_out = left_out.or(Some((SkipReason::RequirementLeftOut, name))),
                Fate::Succeeded => {}
            }
        }
        left_out
    }

    /// The expected course of a cycle over `subset` that starts now, without the subsystems of `revoked` owners.
    pub fn schedule(&self, subset: Option<&[Name]>, revoked: &RevokedOwners) -> Schedule {
        let (positions, unregistered) = self.positions_of(subset);
        let mut takes_part = vec![positions.is_none(); self.steps.len()];
        for position in positions.into_iter().flatten() {
            takes_part[position] = true;
        }
        let mut fates: Vec<Fate> = Vec::with_capacity(self.steps.len());
        let mut ends: Vec<Duration> = Vec::with_capacity(self.steps.len());
        let mut after: Vec<Option<usize>> = Vec::with_capacity(self.steps.len());
        // The level of dependents of the step, and of higher phases. A step that is left out takes no level, but its
        // dependents still come after its dependencies.
        let mut levels: Vec<u32> = Vec::with_capacity(self.steps.len());
        let (mut lower_level, mut latest_level) = (0, 0);
        let mut subsystems = Vec::new();
        let mut phases = self.phases.iter();
        let mut phase_ends_at = 0;
        // The last to end in all lower phases, and in this one too.
        let (mut lower, mut latest): (Option<usize>, Option<usize>) = (None, None);
        let now = Instant::now();

        for (position, step) in self.steps.iter().enumerate() {
            if position == phase_ends_at {
                phase_ends_at += phases.next().unwrap_or(&0);
                lower = latest;
                lower_level = latest_level;
            }
            let subsystem = &step.member.subsystem;
            let skip = if step.member.suspended {
                Some((SkipReason::Suspended, None))
            } else if revoked.owner_of(&step.member).is_some() {
                Some((SkipReason::OwnerRevoked, None))
            } else {
                let unmet = self.unmet_requirement(position, |earlier| fates[earlier], |_| false);
                unmet.map(|(reason, name)| (reason, Some(name.clone())))
            };
            let duration = step.member.standing.mean_duration().unwrap_or_default();
            let breaker = step.member.breaker(now);
            let is_held_back = matches!(breaker, BreakerState::Open(_));
            let runs = takes_part[position] && skip.is_none() && !is_held_back;
            fates.push(match &skip {
                _ if !takes_part[position] => Fate::LeftOut,
                None if is_held_back => Fate::Failed,
                None => Fate::Succeeded,
                Some((reason, _)) if reason.is_failure() => Fate::Failed,
                Some(_) => Fate::LeftOut,
            });
            let last = step.waits_for.iter().copied().chain(lower).max_by_key(|&earlier| ends[earlier]);
            ends.push(last.map_or(Duration::ZERO, |last| ends[last]) + if runs { duration } else { Duration::ZERO });
            after.push(last);
            if latest.is_none_or(|latest| ends[position] > ends[latest]) {
                latest = Some(position);
            }
            let level = step.waits_for.iter().map(|&earlier| levels[earlier]).fold(lower_level, u32::max);
            levels.push(level + u32::from(takes_part[position]));
            latest_level = latest_level.max(levels[position]);
            if takes_part[position] {
                let waits_for = step.waits_for.iter().filter(|&&earlier| takes_part[earlier]);
                subsystems.push(PlannedSubsystem {
                    name: subsystem.name.clone(),
                    phase: subsystem.phase,
                    level,
                    waits_for: waits_for.map(|&earlier| self.steps[earlier].member.subsystem.name.clone()).collect(),
                    skip,
                    breaker,
                    duration,
                });
            }
        }
        subsystems.extend(unregistered.into_iter().map(|name| PlannedSubsystem {
            name,
            phase: 0,
            level: 0,
            waits_for: Vec::new(),
            skip: Some((SkipReason::NotRegistered, None)),
            breaker: BreakerState::Closed,
            duration: Duration::ZERO,
        }));
        if subset.is_some() {
            // By level, and then by name: different levels of the whole plan may be the same here.
            subsystems.sort_by(|a, b| (a.level, &a.name).cmp(&(b.level, &b.name)));
        }
        Schedule {
            levels: subsystems.iter().map(|planned| planned.level + 1).max().unwrap_or(0),
            critical_path: chain(latest, |position| after[position])
                .into_iter()
                .filter(|&position| takes_part[position] && fates[position] == Fate::Succeeded)
                .map(|position| self.steps[position].member.subsystem.name.clone())
                .collect(),
            duration: latest.map_or(Duration::ZERO, |latest| ends[latest]),
            subsystems,
        }
    }

    /// Number of dependencies in its order: one for each subsystem that another one names in `requires` or `after` and
    /// that is of the same phase.
    pub fn relations(&self) -> usize {
        self.relations
    }

    /// The nodes that wait for this one.
    pub(super) fn releases(&self, node: usize) -> impl Iterator<Item = usize> {
        let (of_step, of_relay) = match self.steps.get(node) {
            Some(step) => (&step.releases[..], &[][..]),
            None => (&[][..], self.relays.released_by(node - self.steps.len())),
        };
        of_step.iter().copied().chain(of_relay.iter().map(|(_, later)| *later as usize))
    }
}

impl Relays {
    fn released_by(&self, relay: usize) -> &[(u32, u32)] {
        let start = self.releases.partition_point(|(earlier, _)| (*earlier as usize) < relay);
        let end = self.releases.partition_point(|(earlier, _)| *earlier as usize <= relay);
        &self.releases[start..end]
    }
}

/// A chain from its first to `last`, along `before`.
pub(super) fn chain(last: Option<usize>, before: impl Fn(usize) -> Option<usize>) -> Vec<usize> {
    let mut chain: Vec<_> = std::iter::successors(last, |&link| before(link)).collect();
    chain.reverse();
    chain
}

/// The indices of the dependencies of `member` inside its phase, each once.
fn waits_inside_phase(member: &Member, members: &[Member], index: &HashMap<Name, usize>) -> Result<Vec<usize>, Ring> {
    let subsystem = &member.subsystem;
    let mut found = Vec::new();
    for (name, _) in order_of(subsystem) {
        let Some(&i) = index.get(name) else { continue };
        let earlier = &members[i].subsystem;
        if earlier.phase > subsystem.phase {
            return Err(Ring::across_phases(subsystem, earlier));
        }
        if earlier.phase == subsystem.phase && !found.contains(&i) {
            found.push(i);
        }
    }
    Ok(found)
}

/// The dependencies of a subsystem, with the words for messages.
pub(super) fn order_of(subsystem: &Subsystem) -> impl Iterator<Item = (&Name, &'static str)> {
    let requires = subsystem.requires.iter().map(|name| (name, "requires"));
    requires.chain(subsystem.after.iter().map(|name| (name, "is after")))
}

/// The level of each member in its phase, by Kahn's algorithm (A. B. Kahn, "Topological sorting of large networks",
/// 1962), or the members without a level because they are in a ring or after one.
fn levels(waits_for: &[Vec<usize>]) -> Result<Vec<u32>, Vec<bool>> {
    let mut releases = vec![Vec::new(); waits_for.len()];
    let mut waits: Vec<_> = waits_for.iter().map(Vec::len).collect();
    for (i, earlier) in waits_for.iter().enumerate() {
        for &j in earlier {
            releases[j].push(i);
        }
    }
    let mut levels = vec![0; waits_for.len()];
    let mut stuck = vec![true; waits_for.len()];
    let mut free: VecDeque<_> = (0..waits_for.len()).filter(|&i| waits[i] == 0).collect();
    while let Some(i) = free.pop_front() {
        stuck[i] = false;
        for &later in &releases[i] {
            levels[later] = levels[later].max(levels[i] + 1);
            waits[later] -= 1;
            if waits[later] == 0 {
                free.push_back(later);
            }
        }
    }
    if stuck.contains(&true) { Err(stuck) } else { Ok(levels) }
}

/// One ring among the stuck members: each waits for another stuck one, so that following these leads back to a visited
/// one.
fn ring_among(members: &[Member], waits_for: &[Vec<usize>], stuck: &[bool]) -> Ring {
    let mut path: Vec<usize> = Vec::new();
    let mut next = stuck.iter().position(|&stuck| stuck);
    while let Some(i) = next {
        if let Some(start) = path.iter().position(|&earlier| earlier == i) {
            let ring: Vec<_> = path[start..].iter().map(|&i| &*members[i].subsystem).collect();
            return Ring::of(&ring);
        }
        path.push(i);
        next = waits_for[i].iter().copied().find(|&earlier| stuck[earlier]);
    }
    Ring(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Identity, Subsystem, SubsystemSpec};

    fn member(name: &str, phase: i32, requires: &[&str], after: &[&str]) -> Member {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let spec = SubsystemSpec {
            name: name.into(),
            endpoint: "http://127.0.0.1:1".into(),
            phase: Some(phase),
            requires: names(requires),
            after: names(after),
            ..SubsystemSpec::default()
        };
        Member::new(Arc::new(Subsystem::from_spec(&spec).unwrap()), false, Arc::default())
    }

    fn shown(plan: &Plan) -> Vec<(String, u32)> {
        let planned = plan.schedule(None, &RevokedOwners::default()).subsystems;
        planned.into_iter().map(|planned| (planned.name.to_string(), planned.level)).collect()
    }

    #[test]
    fn levels_follow_phases_and_names() {
        let plan = Plan::compile([
            member("z", -1, &[], &[]),
            member("c", 0, &["b"], &["a", "nobody"]),
            member("b", 0, &[], &["a"]),
            member("a", 0, &[], &["z"]),
            member("d", 5, &[], &[]),
            member("e", 0, &[], &[]),
        ])
        .unwrap();
        let expected = [("z", 0), ("a", 1), ("e", 1), ("b", 2), ("c", 3), ("d", 4)];
        assert_eq!(shown(&plan), expected.map(|(name, level)| (name.to_owned(), level)));
        assert_eq!(plan.phases, [1, 4, 1]);
    }

    #[test]
    fn a_circular_dependency_is_named() {
        let ring = Plan::compile([
            member("a", 0, &["b"], &[]),
            member("b", 0, &[], &["c"]),
            member("c", 0, &[], &["a"]),
            member("d", 0, &["a"], &[]),
        ])
        .unwrap_err();
        assert_eq!(
            ring.to_string(),
            "circular dependency: a requires b, b is after c, c is after a; remove one of these"
        );
    }

    #[test]
    fn the_start_of_a_long_circular_dependency_is_shown() {
        let names: Vec<_> = (0..1000).map(|n| format!("s{n}")).collect();
        let links = names.iter().zip(names.iter().cycle().skip(1));
        let ring = Plan::compile(links.map(|(name, next)| member(name, 0, &[next], &[]))).unwrap_err();
        assert_eq!(ring.names().count(), 1000);
        let text = ring.to_string();
        assert!(text.ends_with(", and 984 more; remove one of these") && text.len() < 1000, "{text}");
    }

    #[test]
    fn waiting_for_a_later_phase_is_a_circular_dependency() {
        let ring = Plan::compile([member("a", 0, &[], &["b"]), member("b", 10, &[], &[])]).unwrap_err();
        assert_eq!(
            ring.to_string(),
            "circular dependency: a is after b, b (phase 10) starts only after phase 0 and so after a; \
             remove one of these"
        );
    }

    #[test]
    fn a_schedule_shows_the_subsystems_that_would_be_skipped() {
        let plan = Plan::compile([
            member("a", 0, &["nobody"], &[]),
            member("b", 0, &["a"], &[]),
            member("c", 0, &[], &[]).suspended(true),
            member("d", 0, &["c"], &[]),
            member("e", 0, &[], &["c"]),
        ])
        .unwrap();
        let all = plan.schedule(None, &RevokedOwners::default());
        let skips = |schedule: Schedule| -> Vec<_> {
            let skip = |planned: PlannedSubsystem| {
                let (reason, requirement) = planned.skip?;
                Some((planned.name.to_string(), reason, requirement.map(|name| name.to_string()).unwrap_or_default()))
            };
            schedule.subsystems.into_iter().filter_map(skip).collect()
        };
        let skipped = |name: &str, reason, requirement: &str| (name.to_owned(), reason, requirement.to_owned());
        assert_eq!(
            skips(all),
            [
                skipped("a", SkipReason::RequirementMissing, "nobody"),
                skipped("c", SkipReason::Suspended, ""),
                skipped("b", SkipReason::RequirementFailed, "a"),
                skipped("d", SkipReason::RequirementLeftOut, "c"),
            ]
        );
        let subset = [Name::parse("e").unwrap(), Name::parse("x").unwrap()];
        let some = plan.schedule(Some(&subset), &RevokedOwners::default());
        assert_eq!(some.subsystems.len(), 2);
        assert_eq!(skips(some), [skipped("x", SkipReason::NotRegistered, "")]);
        let lacking = Plan::compile([member("a", 0, &[], &[])]).unwrap().lacking(vec![Name::parse("y").unwrap()]);
        let all = lacking.schedule(None, &RevokedOwners::default());
        assert_eq!((all.levels, skips(all)), (1, vec![skipped("y", SkipReason::NotRegistered, "")]));
        assert_eq!(skips(lacking.schedule(Some(&subset[..1]), &RevokedOwners::default())).len(), 1, "e");
    }

    #[test]
    fn the_levels_of_a_subset_are_its_own() {
        let plan = Plan::compile([
            member("a", 0, &[], &[]),
            member("b", 0, &[], &["a"]),
            member("c", 0, &[], &["b"]),
            member("z", 0, &[], &["c"]),
            member("late", 1, &[], &[]),
            member("later", 2, &[], &["late"]),
        ])
        .unwrap();
        let levels = |names: &[&str]| -> Vec<_> {
            let subset: Vec<_> = names.iter().map(|name| Name::parse(name).unwrap()).collect();
            let schedule = plan.schedule(Some(&subset), &RevokedOwners::default());
            assert_eq!(schedule.levels, schedule.subsystems.last().unwrap().level + 1);
            schedule.subsystems.iter().map(|planned| (planned.name.to_string(), planned.level)).collect()
        };
        let level = |name: &str, level: u32| (name.to_owned(), level);
        assert_eq!(levels(&["z"]), [level("z", 0)]);
        assert_eq!(levels(&["later"]), [level("later", 0)]);
        // z still waits for a, through subsystems outside the subset; a phase waits for the lower ones.
        assert_eq!(levels(&["later", "z", "a"]), [level("a", 0), level("z", 1), level("later", 2)]);
        assert_eq!(levels(&["b", "absent"]), [level("absent", 0), level("b", 0)]);
    }

    #[test]
    fn the_expected_critical_path_is_the_slowest_chain() {
        let plan = Plan::compile([
            member("a", 0, &[], &[]),
            member("b", 0, &[], &[]),
            member("c", 0, &[], &["a"]),
            member("d", 1, &[], &[]),
        ])
        .unwrap();
        for (name, ms) in [("a", 10), ("b", 15), ("c", 10), ("d", 5)] {
            let step = &plan.steps[plan.positions[name]];
            step.member.standing.lock().took(Duration::from_millis(ms));
        }
        let schedule = plan.schedule(None, &RevokedOwners::default());
        assert_eq!(schedule.duration, Duration::from_millis(25));
        let path: Vec<_> = schedule.critical_path.iter().map(Name::as_str).collect();
        assert_eq!(path, ["a", "c", "d"]);
    }

    #[test]
    fn the_expected_duration_is_that_of_the_subsystems_that_will_be_called() {
        let plan = Plan::compile([
            member("failing", 0, &[], &[]),
            member("left-out", 0, &[], &["failing"]),
            member("suspended", 0, &[], &["left-out"]).suspended(true),
            member("called", 0, &[], &["suspended"]),
            member("also-called", 0, &[], &["suspended"]),
            member("needs-failing", 0, &["failing"], &[]),
            member("needs-left-out", 0, &["left-out"], &[]),
            member("owned", 0, &[], &["left-out"]).owned_by(Some(Identity::Uid(7))),
        ])
        .unwrap();
        let revoked = RevokedOwners::default();
        revoked.set(Arc::new([Identity::Uid(7)].into()));
        for member in plan.members() {
            member.standing.lock().took(Duration::from_millis(10));
        }
        let policy = plan.steps[plan.positions[&Name::parse("failing").unwrap()]].member.subsystem.breaker;
        for _ in 0..policy.unwrap().failure_threshold {
            let failing = &plan.steps[plan.positions[&Name::parse("failing").unwrap()]].member;
            failing.standing.lock().breaker.failed(policy, Instant::now());
        }
        let subset = ["failing", "suspended", "called", "also-called", "needs-failing", "needs-left-out", "owned"];
        let schedule = plan.schedule(Some(&subset.map(|name| Name::parse(name).unwrap())), &revoked);
        let skip = |name: &str| {
            let planned = schedule.subsystems.iter().find(|planned| planned.name.as_str() == name).unwrap();
            planned.skip.as_ref().map(|(reason, _)| *reason)
        };
        assert_eq!((skip("failing"), skip("called"), skip("suspended")), (None, None, Some(SkipReason::Suspended)));
        assert_eq!(skip("needs-failing"), Some(SkipReason::RequirementFailed));
        assert_eq!(skip("needs-left-out"), Some(SkipReason::RequirementLeftOut));
        assert_eq!(skip("owned"), Some(SkipReason::OwnerRevoked));
        // Of two that are expected to end at the same time, the first one is shown.
        let path: Vec<_> = schedule.critical_path.iter().map(Name::as_str).collect();
        assert_eq!((path, schedule.duration), (vec!["also-called"], Duration::from_millis(10)));
    }

    #[test]
    fn a_plan_counts_the_dependencies_inside_its_phases() {
        let members = [
            member("early", -1, &[], &[]),
            member("a", 0, &[], &["early"]),
            member("b", 0, &["a"], &["a", "nobody"]),
            member("c", 0, &[], &["a", "b"]),
        ];
        let plan = Arc::new(Plan::compile(members).unwrap());
        assert_eq!(plan.relations(), 3);
        assert!(plan.has(&Name::parse("c").unwrap()) && !plan.has(&Name::parse("nobody").unwrap()));
    }
}
