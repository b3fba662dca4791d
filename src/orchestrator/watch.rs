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
    History, LiveChange, LiveCycle, LiveEvent, Published, Refusal,
    figures::WatcherPlace,
    history::{Extent, Recent, which_have, with_room},
    live::{Events, Live},
};
use crate::{
    memory::Held,
    model::{CycleId, CycleState, Epoch, Name, Revision},
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

impl History {
    /// Follows it.
    ///
    /// # Errors
    /// There are too many watchers, some of the requested records are missing, there is no memory for the filter, or
    /// this replica follows no leader.
    /// That the history was rewritten is the error of the first [event](Watcher::next).
    pub fn watch(&self, from: From, filter: WatchFilter, progress: bool) -> Result<Watcher, Refusal> {
        Watcher::new(self.clone(), from, filter, progress)
    }
}

impl WatchFilter {
    fn wants_loop(&self, name: Option<&Name>) -> bool {
        self.loops.is_empty() || name.is_some_and(|name| self.loops.contains(name))
    }

    /// True if this record passes, as far as that is known without decoding it.
    fn wants_outside(&self, record: &Record) -> bool {
        self.wants_loop(record.trigger.loop_name()) && (self.states.is_empty() || self.states.contains(&record.state))
    }

    /// `parts` are its own, with all names of the subsystems.
    fn wants_live(&self, cycle: &LiveCycle, parts: &PartFilter) -> bool {
        let names = &parts.subsystems;
        self.wants_loop(cycle.loop_name.as_ref()) && (names.is_empty() || cycle.has_any(names))
    }

    pub(super) fn is_by_subsystem(&self) -> bool {
        !self.parts.subsystems.is_empty()
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
    history: History,
    place: WatcherPlace,
    filter: WatchFilter,
    /// Memory for the filter.
    _room: Held,
    cursor: Position,
    /// True until the epoch of the cursor is compared with that of the record.
    is_unchecked: bool,
    /// True until the first event of one that starts with the oldest record, which may not be known yet.
    is_from_oldest: bool,
    newest: watch::Receiver<Revision>,
    /// How often the history was rewritten until the cursor was checked.
    rewrites: u64,
    /// False once this replica has not followed a leader for some time.
    fed: watch::Receiver<bool>,
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

impl Watcher {
    /// Longest time without an event, so that both sides know that the stream is alive.
    const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
    /// Size of a page from the history: small, since it is held while the watcher stalls.
    const PAGE: PageLimits = PageLimits { records: 32, bytes: 256 << 10 };

    fn new(history: History, from: From, filter: WatchFilter, progress: bool) -> Result<Self, Refusal> {
        let max = history.limits().max_watchers;
        let (newest, fed) = (history.revisions(), history.fed());
        if !*fed.borrow() {
            return Err(Refusal::NotFollowing);
        }
        // Before the cursor, which may be checked once too often.
        let rewrites = history.rewrites();
        let cursor = {
            let Extent { newest, pruned_to, .. } = &*history.extent();
            let (newest, pruned_to) = (newest.ok_or(Refusal::NotFollowing)?, *pruned_to);
            match from {
                From::Now => newest,
                From::Oldest => Position { revision: pruned_to, epoch: None },
                From::After(Position { revision: after, .. }) if after < pruned_to || after > newest.revision => {
                    let (oldest, newest) = (pruned_to.next(), newest.revision);
                    if after > newest && history.is_unconfirmed() {
                        return Err(Refusal::Unconfirmed);
                    }
                    return Err(Refusal::RevisionNotRetained { after, oldest, newest });
                }
                From::After(after) => after,
            }
        };
        let room = history.watching().try_hold(filter.bytes())?;
        let place = history.watchers().enter(cursor.revision, max).ok_or(Refusal::TooManyWatchers(max))?;
        history.enter(&filter, progress);
        Ok(Self {
            history,
            place,
            filter,
            _room: room,
            cursor,
            is_unchecked: matches!(from, From::After(Position { epoch: Some(_), .. })),
            is_from_oldest: from == From::Oldest,
            newest,
            rewrites,
            fed,
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
    /// position from which it goes on, this replica has followed no leader for some time, or the store can't be read.
    pub async fn next(&mut self) -> Result<Event, Refusal> {
        let event = self.find_next().await?;
        self.place.given(self.cursor.revision);
        self.is_from_oldest = false;
        Ok(event)
    }

    /// Checks that the history at the cursor is still what the watcher had before, after a leader was found to lack
    /// records that were acknowledged.
    async fn check_rewritten(&self) -> Result<(), Refusal> {
        let newest = self.history.newest().revision;
        if self.cursor.revision > newest {
            let (after, oldest) = (self.cursor.revision, self.history.pruned_to().next());
            return Err(Refusal::RevisionNotRetained { after, oldest, newest });
        }
        self.history.check(self.cursor).await
    }

    async fn find_next(&mut self) -> Result<Event, Refusal> {
        if mem::take(&mut self.is_unchecked) {
            self.history.check(self.cursor).await?;
        }
        loop {
            while let Some((position, found)) = self.page.pop_front() {
                self.cursor = position;
                match found {
                    Some(Ok(record)) => return Ok(Event::Recorded(Arc::new(record))),
                    Some(Err(unreadable)) => {
                        self.history.extent().tell_unreadable(&unreadable);
                        return Ok(Event::Unreadable(unreadable));
                    }
                    None => {}
                }
            }
            let newest = *self.newest.borrow_and_update();
            let rewrites = self.history.rewrites();
            if mem::replace(&mut self.rewrites, rewrites) != rewrites {
                self.check_rewritten().await?;
            }
            if self.cursor.revision < newest {
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
                let (now, live) = self.history.live().join();
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
                () = self.history.closed().cancelled() => {
                    if self.cursor.revision >= *self.newest.borrow() {
                        return Err(Refusal::Draining);
                    }
                }
                _ = self.fed.wait_for(|fed| !fed) => return Err(Refusal::NotFollowing),
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
        let Published { size, note } = self.history.checkpoint().borrow().clone();
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
        if self.heard.get(&cycle_id).is_none_or(|heard| is_old(&heard.revision)) {
            self.heard.retain(|_, heard| !is_old(&heard.revision));
            let wanted = self.filter.wants_live(&event.cycle, &self.history.with_all_names(&self.filter.parts));
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
        let parts = self.history.with_all_names(&self.filter.parts);
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
        let extent = self.history.extent();
        let first = extent.recent.front()?.record.revision;
        let skip = usize::try_from(wanted.0.checked_sub(first.0)?).ok()?;
        extent.recent.get(skip).cloned()
    }

    /// Reads the records after the cursor from the store, and keeps as many as there is memory for, at least one, which
    /// is sent at once.
    async fn read_page(&mut self) -> Result<(), Refusal> {
        let history = &self.history;
        let bytes = history.max_record().max(Self::PAGE.bytes).min(history.memory().max());
        let mut room = select! {
            biased;
            room = history.memory().hold(bytes) => room,
            () = history.closed().cancelled() => return Err(Refusal::Draining),
        };
        // The store may have records whose commits are not acknowledged yet, which a failover could lose.
        let newest = history.newest().revision;
        let records = match history.store().cycles_after(self.cursor.revision, Self::PAGE).await {
            Ok(records) => records,
            Err(ResumeError::NotRetained { oldest, newest }) => {
                let before = Revision(oldest.0.saturating_sub(1));
                history.pruned(before);
                if self.is_from_oldest && self.cursor.revision < before {
                    self.cursor = Position { revision: before, epoch: None };
                    return Ok(());
                }
                return Err(Refusal::RevisionNotRetained { after: self.cursor.revision, oldest, newest });
            }
            Err(ResumeError::Store(error)) => return Err(error.into()),
        };
        let revision = |found: &Found| found.as_ref().map_or_else(|it| it.revision, |record| record.revision);
        let records: Vec<_> = records.into_iter().take_while(|found| revision(found) <= newest).collect();
        let have = which_have(&records, &self.history.with_all_names(&self.filter.parts)).await;
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
            } else if let Ok(mut room) = history.watching().try_hold(record.bytes.len()) {
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
        self.history.watchers().leave(&self.place);
        self.history.leave(&self.filter, self.progress);
    }
}
