//! The stream: a watcher is a cursor into the history, and waits at its end.
//!
//! A watcher costs only its cursor, however slowly it reads; a slow watcher has no special state. Records that it has
//! read ahead, and its filter, are counted in the memory of all watchers.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    select,
    sync::{broadcast::error::TryRecvError, watch},
    task::yield_now,
    time::{Instant, sleep_until},
};

use super::{
    Live, LiveChange, LiveCycle, LiveEvent, Orchestrator, Published, Refusal, Shared,
    figures::WatcherPlace,
    history::{Recent, which_have, with_room},
    live::Events,
};
#[cfg(feature = "simulation")]
use crate::fault::Fault;
use crate::{
    memory::Held,
    model::{CycleId, CycleState, Epoch, Name, Revision, Trigger},
    ports::{Found, PageLimits, Record, ResumeError, Unreadable},
    record::PartFilter,
};

/// The start of a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// From now on.
    Now,
    /// From the oldest retained record.
    Oldest,
    /// After this position.
    After(Position),
}

/// A position in the history: after the record with this revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The revision; 0 is before all records.
    pub revision: Revision,
    /// The epoch of the record, if it is known: that shows whether the history was rewritten since, from an earlier
    /// point on.
    pub epoch: Option<Epoch>,
}

/// The filter of a watcher.
#[derive(Clone, Debug, Default)]
pub struct WatchFilter {
    /// Only cycles of these loops; empty means any.
    pub loops: HashSet<Name>,
    /// Only cycles in these states; empty means any.
    pub states: Vec<CycleState>,
    /// Only cycles in which these subsystems took part.
    pub parts: PartFilter,
}

impl Position {
    /// The position after this record.
    #[must_use]
    pub fn after(record: &Record) -> Self {
        Self { revision: record.revision, epoch: Some(record.epoch) }
    }
}

impl Orchestrator {
    /// Follows the record.
    ///
    /// # Errors
    /// There are too many watchers, some of the requested records are missing, or there is no memory for the filter.
    /// That the history was rewritten is the error of the first [event](Watcher::next).
    pub fn watch(&self, from: From, filter: WatchFilter, progress: bool) -> Result<Watcher, Refusal> {
        Watcher::new(self.0.clone(), from, filter, progress)
    }
}

impl WatchFilter {
    fn wants_trigger(&self, trigger: &Trigger) -> bool {
        self.loops.is_empty() || trigger.loop_name().is_some_and(|name| self.loops.contains(name))
    }

    /// True if this record passes, as far as that is known without decoding it.
    fn wants_outside(&self, record: &Record) -> bool {
        self.wants_trigger(&record.trigger) && (self.states.is_empty() || self.states.contains(&record.state))
    }

    /// `parts` are its own, with all names of the subsystems.
    fn wants_live(&self, cycle: &LiveCycle, parts: &PartFilter) -> bool {
        let names = &parts.subsystems;
        self.wants_trigger(cycle.trigger()) && (names.is_empty() || cycle.has_any(names))
    }

    /// Its approximate bytes in memory.
    fn bytes(&self) -> usize {
        const NAME: usize = 128;
        (self.loops.len() + self.parts.subsystems.len()) * NAME
    }
}

/// An event for a watcher.
#[derive(Debug)]
pub enum Event {
    /// A cycle was recorded.
    Recorded(Arc<Record>),
    /// A cycle was recorded, and its record can't be read.
    Unreadable(Unreadable),
    /// A cycle has started. Every record up to this position was sent before.
    Started(Arc<LiveCycle>, Position),
    /// The progress or the state of a running cycle, with the number of its updates that were lost before.
    Progress(Arc<LiveEvent>, Position, u64),
    /// Every record up to this position that passes the filter was sent. With the newest checkpoint of the log, if it
    /// is newer than that of the last bookmark.
    Bookmark(Position, Option<Arc<str>>),
}

/// Follows the record.
pub struct Watcher {
    shared: Arc<Shared>,
    place: WatcherPlace,
    filter: WatchFilter,
    /// Memory for the filter.
    _room: Held,
    cursor: Position,
    /// True until the epoch of the cursor is compared with that of the record.
    is_unchecked: bool,
    newest: watch::Receiver<Revision>,
    /// Records from the store that are not sent yet, by position, without those that don't pass.
    page: VecDeque<(Position, Option<Found>)>,
    progress: bool,
    live: Option<Events>,
    /// Events from there, or the initial ones, that are not sent yet.
    next_live: VecDeque<Arc<LiveEvent>>,
    /// The known running cycles.
    heard: HashMap<CycleId, Heard>,
    /// Most events to take from `live` before the next record; `None` while no record is due.
    before_record: Option<usize>,
    caught_up: bool,
    bookmark_at: Instant,
    /// The size of the log in the last checkpoint that was sent.
    checkpoint: Option<u64>,
}

/// The state of a running cycle for a watcher.
struct Heard {
    /// The revision of its record, once it is recorded.
    revision: Arc<OnceLock<Revision>>,
    wanted: bool,
    /// True once its start was sent.
    started: bool,
    /// Number of updates that were sent or skipped.
    updates: u64,
}

impl Shared {
    /// Notifies watchers of the latest record in the state. Every source of records calls it after `State::add_record`;
    /// here the writer is the only one.
    pub(super) fn show_newest(&self) {
        let newest = self.state().last_revision;
        #[cfg(feature = "simulation")]
        if Fault::LostNotification.is_planted() && newest.0.is_multiple_of(3) {
            return;
        }
        self.newest.send_if_modified(|shown| mem::replace(shown, newest) != newest);
    }
}

impl Watcher {
    /// Longest time without an event, so that both sides know that the stream is alive.
    const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
    /// Size of a page from the history: small, since it is held while the watcher stalls.
    const PAGE: PageLimits = PageLimits { records: 32, bytes: 256 << 10 };

    pub(super) fn new(shared: Arc<Shared>, from: From, filter: WatchFilter, progress: bool) -> Result<Self, Refusal> {
        let max = shared.settings().max_watchers;
        let newest = shared.newest.subscribe();
        let cursor = {
            let state = shared.state();
            match from {
                From::Now => {
                    let last = state.last.as_ref().filter(|last| last.revision == state.last_revision);
                    Position { revision: state.last_revision, epoch: last.map(|last| last.epoch) }
                }
                From::Oldest => Position { revision: state.pruned_to, epoch: None },
                From::After(Position { revision: after, .. })
                    if after < state.pruned_to || after > state.last_revision =>
                {
                    let (oldest, newest) = (state.pruned_to.next(), state.last_revision);
                    return Err(state.unknown(Refusal::RevisionNotRetained { after, oldest, newest }));
                }
                From::After(after) => after,
            }
        };
        let room = shared.watching.try_hold(filter.bytes())?;
        let place = shared.watchers.enter(cursor.revision, max).ok_or(Refusal::TooManyWatchers(max))?;
        Ok(Self {
            shared,
            place,
            filter,
            _room: room,
            cursor,
            is_unchecked: matches!(from, From::After(Position { epoch: Some(_), .. })),
            newest,
            page: VecDeque::new(),
            progress,
            live: None,
            next_live: VecDeque::new(),
            heard: HashMap::new(),
            before_record: None,
            caught_up: false,
            bookmark_at: Instant::now() + Self::BOOKMARK_EVERY,
            checkpoint: None,
        })
    }

    /// The next event. Ends with an error, and only with one.
    ///
    /// # Errors
    /// The process shuts down, records were pruned before they could be given, the history was rewritten since the
    /// position from which it goes on, or the store can't be read.
    pub async fn next(&mut self) -> Result<Event, Refusal> {
        let event = self.find_next().await?;
        self.place.given(self.cursor.revision);
        Ok(event)
    }

    /// Checks that the record at the cursor is the one that the watcher had before: of the same epoch. Retention may
    /// have removed it meanwhile; then nothing shows it.
    async fn check_cursor(&mut self) -> Result<(), Refusal> {
        let Position { revision, epoch: Some(epoch) } = self.cursor else { return Ok(()) };
        let before = Revision(revision.0.saturating_sub(1));
        let limits = PageLimits { records: 1, bytes: 1 };
        let found = match self.shared.store.cycles_after(before, limits).await {
            Ok(found) => found.into_iter().next().and_then(Result::ok),
            Err(ResumeError::NotRetained { .. }) => None,
            Err(ResumeError::Store(error)) => return Err(error.into()),
        };
        match found.filter(|found| found.revision == revision) {
            Some(found) if found.epoch != epoch => {
                Err(Refusal::HistoryRewritten { after: revision, epoch, now: found.epoch })
            }
            _ => Ok(()),
        }
    }

    async fn find_next(&mut self) -> Result<Event, Refusal> {
        if mem::take(&mut self.is_unchecked) {
            self.check_cursor().await?;
        }
        loop {
            while let Some((position, found)) = self.page.pop_front() {
                self.cursor = position;
                match found {
                    Some(Ok(record)) => return Ok(Event::Recorded(Arc::new(record))),
                    Some(Err(unreadable)) => {
                        self.shared.state().tell_unreadable(&unreadable);
                        return Ok(Event::Unreadable(unreadable));
                    }
                    None => {}
                }
            }
            if self.cursor.revision < *self.newest.borrow_and_update() {
                // Remaining progress of the cycles with the next records comes first.
                if let Some(event) = self.before_next_record() {
                    return Ok(event);
                }
                if let Some(record) = self.read_on().await? {
                    return Ok(Event::Recorded(record));
                }
                continue;
            }
            // Checked before further events: those that the filter rejects may come without end.
            if !self.caught_up || Instant::now() >= self.bookmark_at {
                self.caught_up = true;
                return Ok(self.bookmark());
            }
            if self.progress && self.live.is_none() {
                let (now, live) = self.shared.live.join();
                (self.next_live, self.live) = (now.into(), Some(live));
            }
            if let Some(event) = self.next_live.pop_front() {
                if let Some(event) = self.live_event(event) {
                    return Ok(event);
                }
                continue;
            }
            let live = async {
                match &mut self.live {
                    Some(live) => live.recv().await,
                    None => std::future::pending().await,
                }
            };
            select! {
                biased;
                event = live => match event.ok().and_then(|event| event.upgrade()) {
                    Some(event) => self.next_live.push_back(event),
                    // It fell behind: start again with the current state of the cycles.
                    None => self.live = None,
                },
                changed = self.newest.changed() => changed.map_err(|_| Refusal::Draining)?,
                () = self.shared.closed.cancelled() => {
                    if self.cursor.revision >= *self.newest.borrow() {
                        return Err(Refusal::Draining);
                    }
                }
                () = sleep_until(self.bookmark_at) => {}
            }
        }
    }

    /// An event from before the next record, if it is cached: all progress of a cycle is sent before its record. Of
    /// later progress of other cycles, only the present events are sent before the record.
    fn before_next_record(&mut self) -> Option<Event> {
        let waiting = self.live.as_ref().map_or(0, Events::len);
        let mut left = self.before_record.take().unwrap_or(waiting);
        loop {
            let event = match self.next_live.pop_front() {
                Some(event) => event,
                None if left == 0 => return None,
                None => {
                    left -= 1;
                    match self.live.as_mut()?.try_recv() {
                        // Missed updates are counted in the next event of that cycle, and its record contains the
                        // result.
                        Ok(event) => match event.upgrade() {
                            Some(event) => event,
                            None => continue,
                        },
                        Err(TryRecvError::Lagged(_)) => continue,
                        Err(TryRecvError::Empty | TryRecvError::Closed) => return None,
                    }
                }
            };
            if let Some(event) = self.live_event(event) {
                self.before_record = Some(left);
                return Some(event);
            }
        }
    }

    fn bookmark(&mut self) -> Event {
        self.bookmark_at = Instant::now() + Self::BOOKMARK_EVERY;
        let Published { size, note } = self.shared.checkpoints.newest();
        let is_new = self.checkpoint < Some(size) && !note.is_empty();
        if is_new {
            self.checkpoint = Some(size);
        }
        Event::Bookmark(self.cursor, is_new.then_some(note))
    }

    /// The event to send for a live event, if it passes and its cycle is not over. A watcher that connects during a
    /// cycle receives its start, and then its current state.
    fn live_event(&mut self, event: Arc<LiveEvent>) -> Option<Event> {
        let cursor = self.cursor;
        // Remaining progress of a cycle whose record was sent is outdated.
        let is_old =
            |revision: &OnceLock<Revision>| revision.get().is_some_and(|revision| *revision <= cursor.revision);
        if is_old(&event.cycle.revision) {
            return None;
        }
        let cycle_id = event.cycle.cycle_id;
        if !self.heard.contains_key(&cycle_id) {
            self.heard.retain(|_, heard| !is_old(&heard.revision));
            let wanted = self.filter.wants_live(&event.cycle, &self.shared.with_all_names(&self.filter.parts));
            let revision = event.cycle.revision.clone();
            self.heard.insert(cycle_id, Heard { revision, wanted, started: false, updates: 0 });
        }
        let heard = self.heard.get_mut(&cycle_id).filter(|heard| heard.wanted)?;
        if !heard.started {
            heard.started = true;
            if !event.change.updates().is_empty() {
                self.next_live.push_front(event.clone());
            }
            return Some(Event::Started(event.cycle.clone(), cursor));
        }
        let lost = event.change.lost(heard.updates);
        heard.updates = event.change.known();
        let event = self.first_piece(event);
        Some(Event::Progress(event, cursor, lost))
    }

    /// The state of a large cycle does not fit into one message: the rest is sent next. Batches of updates always fit.
    fn first_piece(&mut self, mut event: Arc<LiveEvent>) -> Arc<LiveEvent> {
        if event.change.updates().len() > Live::BATCH
            && let LiveEvent { cycle, change: LiveChange::Stands(after, updates), room } = Arc::make_mut(&mut event)
        {
            let change = LiveChange::Stands(*after, updates.split_off(Live::BATCH));
            self.next_live.push_front(Arc::new(LiveEvent { cycle: cycle.clone(), change, room: room.clone() }));
        }
        event
    }

    /// Advances in the history: to the next record if it is cached, which is sent if it passes, or otherwise by a page
    /// from the store.
    async fn read_on(&mut self) -> Result<Option<Arc<Record>>, Refusal> {
        let Some(recent) = self.at_hand() else {
            self.read_page().await?;
            return Ok(None);
        };
        let parts = self.shared.with_all_names(&self.filter.parts);
        let wanted = self.filter.wants_outside(&recent.record) && recent.has(&parts).await;
        self.cursor = Position::after(&recent.record);
        if !wanted {
            // There may be many of them.
            yield_now().await;
        }
        Ok(wanted.then(|| recent.record.clone()))
    }

    /// The record after the cursor, if it is cached.
    fn at_hand(&self) -> Option<Arc<Recent>> {
        let wanted = self.cursor.revision.next();
        let state = self.shared.state();
        let first = state.recent.front()?.record.revision;
        let skip = usize::try_from(wanted.0.checked_sub(first.0)?).ok()?;
        state.recent.get(skip).cloned()
    }

    /// Reads the records after the cursor from the store, and keeps as many as there is memory for, at least one, which
    /// is sent at once.
    async fn read_page(&mut self) -> Result<(), Refusal> {
        let shared = &self.shared;
        let mut room = select! {
            biased;
            room = shared.history.hold(shared.max_record().max(Self::PAGE.bytes).min(shared.history.max())) => room,
            () = shared.closed.cancelled() => return Err(Refusal::Draining),
        };
        let records = match shared.store.cycles_after(self.cursor.revision, Self::PAGE).await {
            Ok(records) => records,
            Err(ResumeError::NotRetained { oldest, newest }) => {
                return Err(Refusal::RevisionNotRetained { after: self.cursor.revision, oldest, newest });
            }
            Err(ResumeError::Store(error)) => return Err(error.into()),
        };
        // The store may have records whose commits are not acknowledged yet, which a failover could lose.
        let newest = shared.state().last_revision;
        let revision = |found: &Found| found.as_ref().map_or_else(|it| it.revision, |record| record.revision);
        let records: Vec<_> = records.into_iter().take_while(|found| revision(found) <= newest).collect();
        let have = which_have(&records, &self.shared.with_all_names(&self.filter.parts)).await;
        let mut is_first = true;
        for (found, has) in records.into_iter().zip(have) {
            let record = match found {
                Ok(record) => record,
                Err(unreadable) => {
                    let position = Position { revision: unreadable.revision, epoch: None };
                    self.page.push_back((position, Some(Err(unreadable))));
                    continue;
                }
            };
            let position = Position::after(&record);
            if !has || !self.filter.wants_outside(&record) {
                self.page.push_back((position, None));
            } else if is_first {
                is_first = false;
                self.page.push_back((position, Some(Ok(with_room(record, &mut room)))));
            } else if let Ok(mut room) = shared.watching.try_hold(record.bytes.len()) {
                self.page.push_back((position, Some(Ok(with_room(record, &mut room)))));
            } else {
                break;
            }
        }
        Ok(())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.watchers.leave(&self.place);
    }
}
