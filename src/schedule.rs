//! Interval loops: due ticks, and the disposition of every tick. Pure bookkeeping: the orchestrator supplies the time
//! and starts the cycles.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;

use crate::{
    memory::Held,
    model::{CatchUp, CycleId, IntervalLoop, LoopChoice, LoopState, Name, TickDisposition},
    ports::StoredLoop,
    random::Random,
};

/// The loops of a process.
#[derive(Debug)]
pub struct Loops {
    entries: BTreeMap<Name, LoopEntry>,
    /// Loops whose state has changed since it was last written, with the version of the change.
    dirty: BTreeMap<Name, u64>,
    version: u64,
    /// When dropped ticks of a loop were last logged.
    warned_at: BTreeMap<Name, Timestamp>,
    /// Loops whose last cycle had no subsystem in it, which is logged once.
    empty: BTreeSet<Name>,
    /// True while all loops are paused. The stored state of each loop has it, too.
    all_paused: bool,
    /// True if no loop has ticks, and all are as they were left.
    are_still: bool,
    random: Random,
}

/// One loop.
#[derive(Clone, Debug)]
pub struct LoopEntry {
    /// Its settings.
    pub settings: Arc<IntervalLoop>,
    /// The origin of its settings.
    pub origin: LoopOrigin,
    /// Its state.
    pub state: LoopState,
    /// Its next tick; `None` while it is stopped or paused.
    pub next: Option<Tick>,
    /// Delay of its last cycle after its tick, in this process.
    pub lag: Option<Duration>,
    /// When the last cycle that it started ended, in this process.
    pub last_finished_at: Option<Timestamp>,
    /// The memory of its settings.
    pub(crate) _held: Option<Arc<Held>>,
}

/// The origin of a loop's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopOrigin {
    /// The configuration file declares it.
    Config,
    /// A caller started it.
    Rpc,
}

/// A future tick.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    /// When it is due.
    pub due_at: Timestamp,
    /// When its cycle starts: jitter later.
    pub fires_at: Timestamp,
    /// True once the clock has reached `due_at`; it may have been set back since.
    has_come: bool,
}

impl Loops {
    /// Largest correction of the clock for which ticks wait, so that no tick comes twice. After a larger one, waiting
    /// could take years.
    pub const MAX_SET_BACK: Duration = Duration::from_mins(1);

    /// No loops. Jitter is drawn from `random`.
    pub fn new(random: Random) -> Self {
        Self {
            entries: BTreeMap::new(),
            dirty: BTreeMap::new(),
            version: 0,
            warned_at: BTreeMap::new(),
            empty: BTreeSet::new(),
            all_paused: false,
            are_still: false,
            random,
        }
    }

    /// The same loops, all of them paused, also those that are restored or started later, if this is true.
    #[must_use]
    pub fn all_paused_if(self, all_paused: bool) -> Self {
        Self { all_paused, ..self }
    }

    /// The same loops, without ticks and as they were left, also those that are restored or started later, if this is
    /// true.
    #[must_use]
    pub fn still_if(self, are_still: bool) -> Self {
        Self { are_still, ..self }
    }

    /// True while all loops are paused.
    pub fn are_all_paused(&self) -> bool {
        self.all_paused
    }

    /// The loops, by name.
    pub fn iter(&self) -> impl Iterator<Item = &LoopEntry> {
        self.entries.values()
    }

    /// The loop of that name.
    pub fn get(&self, name: &Name) -> Option<&LoopEntry> {
        self.entries.get(name)
    }

    /// Number of loops.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are no loops.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Restores a loop of an earlier process: records the disposition of ticks that were due in between.
    pub fn restore(
        &mut self,
        settings: IntervalLoop,
        origin: LoopOrigin,
        state: LoopState,
        held: Option<Held>,
        now: Timestamp,
    ) {
        let state = LoopState { paused_with_all: self.all_paused, ..state };
        let mut entry = LoopEntry { _held: held.map(Arc::new), ..LoopEntry::new(settings, origin, state) };
        if entry.state.has_ticks() && !self.are_still {
            entry.catch_up(now, &self.random);
        }
        self.put(entry);
    }

    /// The state of a loop that is started now: a new loop, or an existing one with new settings and its tick counts. A
    /// tick that is already due and waits for its jitter continues to wait, within the new jitter; if the due times
    /// have changed, it is dropped. A paused loop stays paused.
    pub fn started(&self, settings: IntervalLoop, origin: LoopOrigin, now: Timestamp) -> LoopEntry {
        let Some(earlier) = self.entries.get(&settings.name) else {
            let state = LoopState { paused_with_all: self.all_paused, ..LoopState::default() };
            let mut entry = LoopEntry::new(settings, origin, state);
            if !self.are_still {
                entry.begin_at(now, &self.random);
            }
            return entry;
        };
        let has_same_ticks =
            (earlier.settings.interval, earlier.settings.offset) == (settings.interval, settings.offset);
        let mut entry = earlier.clone();
        entry.follow_clock(now);
        let waiting = entry.waiting(now).filter(|_| has_same_ticks);
        if waiting.is_none() {
            entry.drop_waiting(now);
        }
        (entry.settings, entry.origin, entry.state.stopped) = (Arc::new(settings), origin, false);
        match waiting {
            Some(tick) => {
                let latest = tick.due_at.saturating_add(entry.settings.jitter).unwrap_or(tick.due_at);
                entry.next = Some(Tick { fires_at: tick.fires_at.min(latest), ..tick });
            }
            None => entry.begin_at(now, &self.random),
        }
        entry
    }

    /// The loops of this choice, by name.
    pub fn chosen(&self, choice: &LoopChoice) -> Vec<LoopEntry> {
        match choice {
            LoopChoice::Named(name) => self.get(name).cloned().into_iter().collect(),
            LoopChoice::All => self.iter().cloned().collect(),
        }
    }

    /// True if this choice is paused as such.
    pub fn is_paused(&self, choice: &LoopChoice) -> bool {
        match choice {
            LoopChoice::Named(name) => self.get(name).is_some_and(|entry| entry.state.paused),
            LoopChoice::All => self.all_paused,
        }
    }

    /// The states of the loops of this choice if they are paused now, or resumed if not `paused`. A tick that is due
    /// and waits for its jitter is dropped by a pause; ticks continue with those that are due after its end.
    pub fn with_pause(&self, choice: &LoopChoice, paused: bool, now: Timestamp) -> Vec<LoopEntry> {
        let mut loops = self.chosen(choice);
        for entry in &mut loops {
            let had_ticks = entry.state.has_ticks();
            match choice {
                LoopChoice::Named(_) => entry.state.paused = paused,
                LoopChoice::All => entry.state.paused_with_all = paused,
            }
            match (had_ticks, entry.state.has_ticks()) {
                (true, false) => entry.end_ticks(now),
                (false, true) => entry.begin_at(now, &self.random),
                _ => {}
            }
        }
        loops
    }

    /// Pauses the loops of this choice, or resumes them if not `paused`.
    pub fn set_paused(&mut self, choice: &LoopChoice, paused: bool, now: Timestamp) {
        if *choice == LoopChoice::All {
            self.all_paused = paused;
        }
        for entry in self.with_pause(choice, paused, now) {
            self.put(entry);
        }
    }

    /// The loops that name subsystems by former names, as they name them by their present ones. Their ticks stay.
    pub fn with_present_names(&self, present: impl Fn(&Name) -> Option<Name>) -> Vec<LoopEntry> {
        let renamed = |entry: &LoopEntry| {
            let settings = entry.settings.with_present_names(&present)?;
            Some(LoopEntry { settings: Arc::new(settings), ..entry.clone() })
        };
        self.iter().filter_map(renamed).collect()
    }

    /// Adds a loop, or replaces the one with its name.
    pub fn put(&mut self, entry: LoopEntry) {
        let name = entry.settings.name.clone();
        self.entries.insert(name.clone(), entry);
        self.touch(name);
    }

    /// Removes a loop.
    pub fn remove(&mut self, name: &Name) {
        self.entries.remove(name);
        self.dirty.remove(name);
        self.warned_at.remove(name);
        self.empty.remove(name);
    }

    /// Restarts the ticks of loops at `now` if the clock was set back by more than [`Self::MAX_SET_BACK`]. Returns
    /// these loops. A tick that was due before and waits for its jitter is dropped, since its time comes again.
    pub fn follow_clock(&mut self, now: Timestamp) -> Vec<Name> {
        let mut set_back = Vec::new();
        for (name, entry) in &mut self.entries {
            let Some(tick) = &mut entry.next else { continue };
            tick.has_come |= tick.due_at <= now;
            if entry.follow_clock(now) {
                entry.plan_next(now, &self.random);
                set_back.push(name.clone());
            }
        }
        for name in &set_back {
            self.touch(name.clone());
        }
        set_back
    }

    /// Accounts for ticks that were due while none could fire, as if no process had run, and plans the next ones.
    pub fn catch_up(&mut self, now: Timestamp) {
        let with_ticks = |(name, entry): (&Name, &LoopEntry)| entry.next.is_some().then(|| name.clone());
        for name in self.entries.iter().filter_map(with_ticks).collect::<Vec<_>>() {
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.catch_up(now, &self.random);
            }
            self.touch(name);
        }
    }

    /// When the next tick fires.
    pub fn next_at(&self) -> Option<Timestamp> {
        self.entries.values().filter_map(|entry| entry.next).map(|tick| tick.fires_at).min()
    }

    /// The loops with a tick to fire, the one whose last cycle is the oldest first, each with the due time of the tick.
    /// If several ticks of one loop have passed, the latest fires and earlier ones are missed. Call [`Loops::account`]
    /// for each.
    pub fn due(&mut self, now: Timestamp) -> Vec<(Arc<IntervalLoop>, Timestamp)> {
        let mut due = Vec::new();
        let mut touched = Vec::new();
        for (name, entry) in &mut self.entries {
            let Some(tick) = entry.next.filter(|tick| tick.fires_at <= now) else { continue };
            let latest = entry.latest_due(now).unwrap_or(tick.due_at).max(tick.due_at);
            entry.account_up_to(latest, TickDisposition::Missed);
            due.push((entry.settings.clone(), latest, entry.state.last_cycle_id));
            touched.push(name.clone());
        }
        // If ticks coincide, the first loop may keep the others from running, so the order must rotate.
        due.sort_by_key(|(.., last_cycle_id)| *last_cycle_id);
        for name in touched {
            self.touch(name);
        }
        due.into_iter().map(|(settings, due_at, _)| (settings, due_at)).collect()
    }

    /// Records the disposition of the tick from [`Loops::due`].
    pub fn account(
        &mut self,
        name: &Name,
        due_at: Timestamp,
        disposition: TickDisposition,
        cycle_id: Option<CycleId>,
        now: Timestamp,
    ) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.state.account(due_at, due_at, 1, disposition);
        if let Some(cycle_id) = cycle_id {
            entry.state.last_cycle_id = cycle_id;
        }
        entry.plan_next(now, &self.random);
        self.touch(name.clone());
    }

    /// The cycle of a tick begins.
    pub fn begun(&mut self, name: &Name, due_at: Timestamp, now: Timestamp) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.lag = Some(Duration::try_from(now.duration_since(due_at)).unwrap_or_default());
        }
    }

    /// The cycle of a tick has ended.
    pub fn finished(&mut self, name: &Name, finished_at: Timestamp) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.last_finished_at = Some(finished_at);
        }
    }

    /// True if dropped ticks of this loop should be logged now: once a minute, since a loop may have a hundred ticks a
    /// second.
    pub fn warns_of_drops(&mut self, name: &Name, now: Timestamp) -> bool {
        const PAUSE: Duration = Duration::from_mins(1);
        let is_news = self.warned_at.get(name).is_none_or(|at| now.duration_since(*at).unsigned_abs() >= PAUSE);
        if is_news {
            self.warned_at.insert(name.clone(), now);
        }
        is_news
    }

    /// Whether the log should say now that the cycles of this loop have no subsystem in them: when the first of them is
    /// so.
    pub fn warns_of_empty(&mut self, name: &Name, is_empty: bool) -> bool {
        if is_empty {
            self.entries.contains_key(name) && self.empty.insert(name.clone())
        } else {
            self.empty.remove(name);
            false
        }
    }

    /// The changes since the last write, and a mark for [`Loops::written`].
    pub fn unwritten(&self) -> (BTreeMap<Name, Option<StoredLoop>>, u64) {
        let stored = self.dirty.keys().filter_map(|name| {
            let entry = self.entries.get(name)?;
            Some((name.clone(), Some(entry.to_stored())))
        });
        (stored.collect(), self.version)
    }

    /// Marks the changes from [`Loops::unwritten`] with this mark as written.
    pub fn written(&mut self, mark: u64) {
        self.dirty.retain(|_, version| *version > mark);
    }

    fn touch(&mut self, name: Name) {
        self.version += 1;
        self.dirty.insert(name, self.version);
    }
}

impl LoopEntry {
    fn new(settings: IntervalLoop, origin: LoopOrigin, state: LoopState) -> Self {
        Self { settings: Arc::new(settings), origin, state, next: None, lag: None, last_finished_at: None, _held: None }
    }

    /// True if the configuration file declares it.
    pub fn is_declared(&self) -> bool {
        self.origin == LoopOrigin::Config
    }

    /// Its stored form.
    pub fn to_stored(&self) -> StoredLoop {
        StoredLoop {
            name: self.settings.name.clone(),
            spec: (!self.is_declared()).then(|| self.settings.to_spec()),
            state: self.state.clone(),
        }
    }

    /// The same loop, with the memory of its settings.
    #[must_use]
    pub fn holding(self, held: Held) -> Self {
        Self { _held: Some(Arc::new(held)), ..self }
    }

    /// The state of the loop if it is stopped now: it stays listed, without ticks. A tick that is due and waits for its
    /// jitter is dropped.
    #[must_use]
    pub fn stopped(mut self, now: Timestamp) -> Self {
        self.end_ticks(now);
        self.state.stopped = true;
        self
    }

    /// Has no further ticks. One that is due and waits for its jitter is dropped.
    fn end_ticks(&mut self, now: Timestamp) {
        self.drop_waiting(now);
        self.next = None;
    }

    /// The tick that is due and has not fired.
    fn waiting(&self, now: Timestamp) -> Option<Tick> {
        self.next.filter(|tick| tick.has_come || tick.due_at <= now)
    }

    /// Records the disposition of all ticks that are due and have not fired: the latest is dropped, and earlier ones,
    /// for which the process was too late, are missed.
    fn drop_waiting(&mut self, now: Timestamp) {
        let Some(tick) = self.waiting(now) else { return };
        let latest = self.latest_due(now).unwrap_or(tick.due_at).max(tick.due_at);
        self.account_up_to(latest, TickDisposition::Missed);
        self.state.account(latest, latest, 1, TickDisposition::Dropped);
        self.next = None;
    }

    /// Due time of the latest tick that is due by `now`.
    fn latest_due(&self, now: Timestamp) -> Option<Timestamp> {
        self.settings.first_after(now).checked_sub(1).and_then(|n| self.settings.due_at(n))
    }

    /// Restarts the ticks at `now`.
    fn begin_at(&mut self, now: Timestamp, random: &Random) {
        self.state.accounted_to = self.state.accounted_to.max(Some(now));
        self.plan_next(now, random);
    }

    /// Discards accounted ticks that are further ahead than a correction of the clock explains. Returns true if there
    /// were any: their times were in the past then.
    fn follow_clock(&mut self, now: Timestamp) -> bool {
        let latest = now.saturating_add(Loops::MAX_SET_BACK).unwrap_or(Timestamp::MAX);
        if self.waiting(now).is_some_and(|tick| tick.due_at > latest) {
            self.drop_waiting(now);
        }
        let set_back = self.state.accounted_to.is_some_and(|to| to > latest);
        if set_back {
            self.state.accounted_to = Some(now);
        }
        set_back
    }

    /// Accounts for ticks that were due while no process ran, and plans the next tick.
    fn catch_up(&mut self, now: Timestamp, random: &Random) {
        self.follow_clock(now);
        if self.state.accounted_to.is_none() {
            self.state.accounted_to = Some(now);
        }
        let settings = self.settings.clone();
        let pending = self.latest_due(now).filter(|latest| self.state.accounted_to.is_some_and(|to| *latest > to));
        match (settings.catch_up, pending) {
            (CatchUp::One, Some(latest)) => {
                // A tick whose age is the whole window is inside it.
                let beyond = settings.catch_up_window.saturating_add(Duration::from_nanos(1));
                let before = now.saturating_sub(beyond).unwrap_or(Timestamp::MIN);
                let first_inside = settings.due_at(settings.first_after(before)).unwrap_or(now);
                if latest > before {
                    self.account_up_to(first_inside, TickDisposition::Missed);
                    self.account_up_to(latest, TickDisposition::Coalesced);
                    self.next = Some(Tick { due_at: latest, fires_at: now, has_come: true });
                    return;
                }
                self.account_through(latest, TickDisposition::Missed);
            }
            (CatchUp::None, Some(latest)) => self.account_through(latest, TickDisposition::Missed),
            (_, None) => {}
        }
        self.plan_next(now, random);
    }

    /// Records this disposition for all unaccounted ticks that are due before `end`.
    fn account_up_to(&mut self, end: Timestamp, disposition: TickDisposition) {
        let Some(accounted_to) = self.state.accounted_to else { return };
        let first = self.settings.first_after(accounted_to);
        let before_end = self.settings.first_after(end).saturating_sub(1);
        // `end` is itself the time of a tick, which is not included.
        if let (Some(first_due), Some(last_due)) = (
            self.settings.due_at(first),
            before_end.checked_sub(1).filter(|last| *last >= first).and_then(|last| self.settings.due_at(last)),
        ) {
            self.state.account(first_due, last_due, before_end - first, disposition);
        }
    }

    /// Records this disposition for all unaccounted ticks that are due up to `last`.
    fn account_through(&mut self, last: Timestamp, disposition: TickDisposition) {
        let Some(accounted_to) = self.state.accounted_to else { return };
        let first = self.settings.first_after(accounted_to);
        let count = self.settings.first_after(last).saturating_sub(first);
        if let Some(first_due) = self.settings.due_at(first) {
            self.state.account(first_due, last, count, disposition);
        }
    }

    /// Plans the next tick, if it has any.
    fn plan_next(&mut self, now: Timestamp, random: &Random) {
        let after = self.state.accounted_to.unwrap_or(now);
        let due_at = self.settings.due_at(self.settings.first_after(after)).filter(|_| self.state.has_ticks());
        self.next = due_at.map(|due_at| {
            let jitter = self.settings.jitter.mul_f64(random.fraction());
            Tick { due_at, fires_at: due_at.saturating_add(jitter).unwrap_or(due_at), has_come: false }
        });
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        memory::Memory,
        model::{LoopSpec, TickCounts},
    };

    fn every(seconds: i64, catch_up: CatchUp) -> IntervalLoop {
        IntervalLoop::from_spec(&LoopSpec {
            name: "l".into(),
            interval: Some(SignedDuration::from_secs(seconds)),
            catch_up: Some(catch_up),
            ..LoopSpec::default()
        })
        .unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    fn name() -> Name {
        Name::parse("l").unwrap()
    }

    fn fire(loops: &mut Loops, now: Timestamp) -> Vec<Timestamp> {
        let due = loops.due(now);
        for (settings, due_at) in &due {
            loops.account(&settings.name, *due_at, TickDisposition::Ran, Some(CycleId(1)), now);
        }
        due.into_iter().map(|(_, due_at)| due_at).collect()
    }

    #[test]
    fn ticks_fire_when_due_and_late_ones_are_missed() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(3)));
        assert_eq!(loops.next_at(), Some(at(10)));
        assert!(fire(&mut loops, at(9)).is_empty());
        assert_eq!(fire(&mut loops, at(10)), [at(10)]);
        assert_eq!(fire(&mut loops, at(45)), [at(40)]);
        let state = &loops.get(&name()).unwrap().state;
        assert_eq!((state.ticks.ran, state.ticks.missed), (2, 2));
        assert_eq!((state.not_run[0].first, state.not_run[0].last), (at(20), at(30)));
    }

    #[test]
    fn ticks_of_a_pause_are_not_due_and_one_that_waits_is_dropped() {
        let (one, all) = (LoopChoice::Named(name()), LoopChoice::All);
        let mut loops = Loops::new(Random::seeded(0));
        let settings = IntervalLoop { jitter: Duration::from_secs(9), ..every(10, CatchUp::None) };
        loops.put(loops.started(settings.clone(), LoopOrigin::Rpc, at(3)));
        // The tick of second 10 waits for its jitter.
        assert!(loops.next_at() > Some(at(10)));
        loops.set_paused(&one, true, at(10));
        loops.set_paused(&all, true, at(12));
        loops.set_paused(&one, false, at(35));
        assert_eq!((loops.next_at(), loops.due(at(36)).len()), (None, 0));
        loops.set_paused(&all, false, at(41));
        assert_eq!(loops.get(&name()).unwrap().next.unwrap().due_at, at(50));
        let ticks = loops.get(&name()).unwrap().state.ticks;
        assert_eq!((ticks.due(), ticks.dropped), (1, 1));
        // Nor is a loop that is started or restored while all are paused an exception.
        let paused = Loops::new(Random::seeded(0)).all_paused_if(true);
        assert!(paused.started(settings.clone(), LoopOrigin::Rpc, at(41)).next.is_none());
        let mut paused = paused;
        paused.restore(settings, LoopOrigin::Rpc, LoopState::default(), None, at(41));
        assert_eq!(paused.next_at(), None);
    }

    #[test]
    fn downtime_is_caught_up_once_or_missed() {
        let down = LoopState { accounted_to: Some(at(10)), ..LoopState::default() };
        let mut loops = Loops::new(Random::seeded(0));
        loops.restore(every(10, CatchUp::None), LoopOrigin::Rpc, down.clone(), None, at(55));
        let state = &loops.get(&name()).unwrap().state;
        assert_eq!((state.ticks.missed, state.accounted_to), (4, Some(at(50))));
        assert_eq!(loops.next_at(), Some(at(60)));

        let mut loops = Loops::new(Random::seeded(0));
        loops.restore(every(10, CatchUp::One), LoopOrigin::Rpc, down, None, at(105));
        // The window is a minute: 50 to 100 are inside it, 20 to 40 before.
        assert_eq!(fire(&mut loops, at(105)), [at(100)]);
        let ticks = loops.get(&name()).unwrap().state.ticks;
        assert_eq!((ticks.missed, ticks.coalesced, ticks.ran), (3, 5, 1));
    }

    #[test]
    fn a_time_in_which_no_tick_could_fire_counts_as_downtime() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(3)));
        loops.catch_up(at(55));
        let state = &loops.get(&name()).unwrap().state;
        assert_eq!((state.ticks.missed, state.ticks.ran, state.accounted_to), (5, 0, Some(at(50))));
        assert_eq!(loops.next_at(), Some(at(60)));
    }

    #[test]
    fn a_tick_whose_age_is_the_whole_window_is_caught_up() {
        let down = LoopState { accounted_to: Some(at(0)), ..LoopState::default() };
        let older = at(160).saturating_add(Duration::from_nanos(1)).unwrap();
        for (restart_at, ran, missed) in [(at(160), 1, 0), (older, 0, 1)] {
            let mut loops = Loops::new(Random::seeded(0));
            loops.restore(every(100, CatchUp::One), LoopOrigin::Rpc, down.clone(), None, restart_at);
            assert_eq!(fire(&mut loops, restart_at).len(), ran);
            assert_eq!(loops.get(&name()).unwrap().state.ticks.missed, missed);
        }
    }

    #[test]
    fn a_correction_of_the_clock_by_a_minute_is_waited_for() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(1_000)));
        assert_eq!(fire(&mut loops, at(1_010)), [at(1_010)]);
        assert!(loops.follow_clock(at(950)).is_empty());
        assert_eq!(loops.follow_clock(at(949)), [name()]);

        // A tick that waits for its jitter.
        let jittered = IntervalLoop { jitter: Duration::from_secs(9), ..every(10, CatchUp::None) };
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(jittered, LoopOrigin::Rpc, at(1_005)));
        loops.follow_clock(at(1_010));
        loops.follow_clock(at(950));
        assert_eq!(loops.get(&name()).unwrap().state.ticks.dropped, 0);
        loops.follow_clock(at(949));
        assert_eq!(loops.get(&name()).unwrap().state.ticks.dropped, 1);
    }

    #[test]
    fn a_loop_is_listed_until_it_is_removed_and_holds_its_memory_until_then() {
        let memory = Memory::whole(1_000);
        let mut loops = Loops::new(Random::seeded(0));
        assert!(loops.is_empty());
        let held = memory.try_hold(100).unwrap();
        loops.restore(every(10, CatchUp::None), LoopOrigin::Rpc, LoopState::default(), Some(held), at(0));
        assert_eq!((loops.len(), loops.is_empty(), memory.held()), (1, false, 100));
        let held = memory.try_hold(200).unwrap();
        loops.put(loops.started(every(20, CatchUp::None), LoopOrigin::Rpc, at(0)).holding(held));
        assert_eq!((loops.len(), memory.held()), (1, 200));
        loops.remove(&name());
        assert_eq!((loops.len(), loops.unwritten().0.len(), memory.held()), (0, 0, 0));
    }

    #[test]
    fn settings_are_stored_unless_the_configuration_file_has_them() {
        let loops = Loops::new(Random::seeded(0));
        let of_caller = loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(0));
        assert!(!of_caller.is_declared());
        assert_eq!(of_caller.to_stored().spec, Some(every(10, CatchUp::None).to_spec()));
        let declared = loops.started(every(10, CatchUp::None), LoopOrigin::Config, at(0));
        assert!(declared.is_declared());
        assert_eq!(declared.to_stored().spec, None);
    }

    #[test]
    fn the_lag_and_the_end_of_the_last_cycle_are_known() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(0)));
        loops.begun(&name(), at(10), at(13));
        loops.finished(&name(), at(14));
        let entry = loops.get(&name()).unwrap();
        assert_eq!((entry.lag, entry.last_finished_at), (Some(Duration::from_secs(3)), Some(at(14))));
        // The clock may have been set back in between.
        loops.begun(&name(), at(20), at(17));
        assert_eq!(loops.get(&name()).unwrap().lag, Some(Duration::ZERO));
    }

    #[test]
    fn dropped_ticks_are_logged_once_a_minute_and_empty_cycles_once() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(0)));
        let logged = [0, 10, 59, 60, 119, 120].map(|second| loops.warns_of_drops(&name(), at(second)));
        assert_eq!(logged, [true, false, false, true, false, true]);
        let logged = [true, true, false, false, true].map(|is_empty| loops.warns_of_empty(&name(), is_empty));
        assert_eq!(logged, [true, false, false, false, true]);
        // A loop that was stopped and removed while its last cycle ran.
        assert!(!loops.warns_of_empty(&Name::parse("removed").unwrap(), true));
    }

    #[test]
    fn a_clock_that_is_set_back_a_little_is_awaited_and_else_followed() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(1_000)));
        assert_eq!(fire(&mut loops, at(1_010)), [at(1_010)]);
        assert!(loops.follow_clock(at(955)).is_empty());
        assert_eq!(loops.next_at(), Some(at(1_020)));
        assert_eq!(loops.follow_clock(at(505)), [name()]);
        assert_eq!(loops.next_at(), Some(at(510)));
        assert!(loops.follow_clock(at(506)).is_empty());
        assert_eq!(fire(&mut loops, at(510)), [at(510)]);
        assert_eq!(loops.get(&name()).unwrap().state.ticks.due(), 2);

        // The same holds at a restart, and when the loop is stopped and started again.
        let ahead = LoopState { accounted_to: Some(at(1_010)), ..LoopState::default() };
        loops.restore(every(10, CatchUp::One), LoopOrigin::Rpc, ahead.clone(), None, at(505));
        assert_eq!((loops.next_at(), fire(&mut loops, at(505)).len()), (Some(at(510)), 0));
        loops.put(LoopEntry::new(every(10, CatchUp::None), LoopOrigin::Rpc, ahead).stopped(at(505)));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(505)));
        assert_eq!(loops.next_at(), Some(at(510)));
    }

    #[test]
    fn two_loops_on_the_same_ticks_come_first_in_turn() {
        let mut loops = Loops::new(Random::seeded(0));
        let named = |name: &str| IntervalLoop { name: Name::parse(name).unwrap(), ..every(10, CatchUp::None) };
        for name in ["a", "b"] {
            loops.put(loops.started(named(name), LoopOrigin::Rpc, at(0)));
        }
        let mut first = Vec::new();
        for cycle in 1_u32..=4 {
            let now = at(10 * i64::from(cycle));
            let due = loops.due(now);
            assert_eq!(due.len(), 2);
            first.push(due[0].0.name.to_string());
            loops.account(&due[0].0.name, now, TickDisposition::Ran, Some(CycleId(cycle.into())), now);
            loops.account(&due[1].0.name, now, TickDisposition::Skipped, None, now);
        }
        assert_eq!(first, ["a", "b", "a", "b"]);
    }

    #[test]
    fn a_change_is_written_once() {
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(every(10, CatchUp::None), LoopOrigin::Rpc, at(3)));
        let (unwritten, mark) = loops.unwritten();
        assert_eq!(unwritten.len(), 1);
        fire(&mut loops, at(10));
        loops.written(mark);
        let (unwritten, mark) = loops.unwritten();
        assert_eq!(unwritten[&name()].as_ref().unwrap().state.ticks.ran, 1);
        loops.written(mark);
        assert!(loops.unwritten().0.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        TimePasses(i64),
        ClockIsSetBack(i64),
        Restart,
        Edit { interval: i64, offset: f64, jitter: f64 },
        Stop,
    }

    fn step() -> impl Strategy<Value = Step> {
        let below_one = || prop_oneof![Just(0.0), 0.0..1.0];
        prop_oneof![
            6 => (0_i64..200).prop_map(Step::TimePasses),
            1 => (1_i64..300).prop_map(Step::ClockIsSetBack),
            1 => Just(Step::Restart),
            3 => (prop_oneof![Just(10_i64), 1_i64..100], below_one(), below_one())
                .prop_map(|(interval, offset, jitter)| Step::Edit { interval, offset, jitter }),
            1 => Just(Step::Stop),
        ]
    }

    proptest! {
        /// Whatever happens to the process, the clock and the settings, every due tick gets exactly one disposition.
        #[test]
        fn dispositions_add_up_to_the_due_ticks(
            one in any::<bool>(),
            steps in proptest::collection::vec(step(), 1..40),
        ) {
            let catch_up = if one { CatchUp::One } else { CatchUp::None };
            let mut settings = every(10, catch_up);
            let mut loops = Loops::new(Random::seeded(0));
            loops.put(loops.started(settings.clone(), LoopOrigin::Rpc, at(0)));
            let (mut now, mut is_stopped) = (0, false);
            // Number of due ticks, and the time up to which they are counted.
            let (mut due, mut counted_to) = (0, at(0));
            let end = [Step::Edit { interval: 10, offset: 0.0, jitter: 0.9 }, Step::TimePasses(1_000)];
            for step in steps.into_iter().chain(end) {
                match step {
                    Step::TimePasses(pause) => {
                        now += pause;
                        let (first, end) = (settings.first_after(counted_to), settings.first_after(at(now)));
                        if !is_stopped && end > first {
                            due += end - first;
                            counted_to = settings.due_at(end - 1).unwrap();
                        }
                    }
                    Step::ClockIsSetBack(by) => now -= by,
                    Step::Restart => {
                        let LoopEntry { state, next, .. } = loops.get(&name()).unwrap().clone();
                        if next.is_some_and(|tick| tick.has_come && tick.due_at > at(now)) {
                            // The clock was set back, and a new process does not know that it was ahead: the time comes
                            // again.
                            due -= 1;
                            counted_to = state.accounted_to.unwrap();
                        }
                        let mut others = Loops::new(Random::seeded(0));
                        others.follow_clock(at(now));
                        others.restore(settings.clone(), LoopOrigin::Rpc, state, None, at(now));
                        loops = others;
                    }
                    Step::Edit { interval, offset, jitter } => {
                        let before = settings.clone();
                        let part_of_interval = |part: f64| Duration::from_secs(interval.unsigned_abs()).mul_f64(part);
                        settings = IntervalLoop {
                            offset: part_of_interval(offset),
                            jitter: part_of_interval(jitter),
                            ..every(interval, catch_up)
                        };
                        let waits = loops.get(&name()).unwrap().waiting(at(now)).is_some();
                        loops.put(loops.started(settings.clone(), LoopOrigin::Rpc, at(now)));
                        let has_same_ticks = (before.interval, before.offset) == (settings.interval, settings.offset);
                        if !(waits && has_same_ticks) {
                            let is_far_ahead = counted_to > at(now + 60);
                            counted_to = if is_far_ahead { at(now) } else { counted_to.max(at(now)) };
                        }
                        is_stopped = false;
                    }
                    Step::Stop => {
                        let entry = loops.get(&name()).unwrap().clone();
                        loops.put(entry.stopped(at(now)));
                        is_stopped = true;
                    }
                }
                loops.follow_clock(at(now));
                if !is_stopped && counted_to > at(now + 60) {
                    // Times that occur again have ticks again.
                    counted_to = at(now);
                }
                fire(&mut loops, at(now));
            }
            let entry = loops.get(&name()).unwrap();
            prop_assert_eq!(entry.state.ticks.due() + u64::from(entry.waiting(at(now)).is_some()), due);
        }
    }

    #[test]
    fn a_tick_that_waits_for_its_jitter_is_kept_or_counted() {
        let jittered = |interval, jitter| IntervalLoop { jitter, ..every(interval, CatchUp::None) };
        let almost_all = Duration::from_millis(9_999);
        let mut loops = Loops::new(Random::seeded(0));
        loops.put(loops.started(jittered(10, almost_all), LoopOrigin::Rpc, at(3)));
        let waiting = |loops: &Loops| loops.get(&name()).unwrap().next.map(|tick| tick.due_at);
        // The settings change, and the due times do not.
        loops.put(loops.started(jittered(10, almost_all / 2), LoopOrigin::Rpc, at(10)));
        assert_eq!((waiting(&loops), loops.get(&name()).unwrap().state.ticks.due()), (Some(at(10)), 0));
        // Without jitter, it does not wait.
        loops.put(loops.started(jittered(10, Duration::ZERO), LoopOrigin::Rpc, at(10)));
        assert_eq!(fire(&mut loops, at(10)), [at(10)]);
        // The due times change.
        loops.put(loops.started(jittered(10, almost_all), LoopOrigin::Rpc, at(11)));
        loops.put(loops.started(jittered(7, almost_all / 2), LoopOrigin::Rpc, at(20)));
        assert_eq!(loops.get(&name()).unwrap().state.ticks, TickCounts { ran: 1, dropped: 1, ..TickCounts::default() });
        // The loop is stopped while the last of several ticks waits.
        let next = waiting(&loops).unwrap();
        let late = next.saturating_add(Duration::from_secs(14)).unwrap();
        let stopped = loops.get(&name()).unwrap().clone().stopped(late);
        assert_eq!((stopped.state.ticks.missed, stopped.state.ticks.dropped, stopped.next.is_none()), (2, 2, true));
    }
}
