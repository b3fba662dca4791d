//! The stream: a watcher is a cursor into the history, and waits at its end.
//!
//! It costs its cursor, however slowly it reads; being behind is no state of its own. What it has read ahead from the store,
//! and what it looks for, it has as long as there is room for that of all watchers.

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
    Live, LiveCycle, LiveEvent, Orchestrator, Refusal, Shared,
    figures::WatcherPlace,
    history::{Recent, which_have, with_room},
    live::Events,
};
use crate::{
    memory::Held,
    model::{CycleId, CycleState, Name, Revision, Trigger},
    ports::{Found, PageLimits, Record, ResumeError, Unreadable},
    record::PartFilter,
};

/// From where on to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Only what comes.
    Now,
    /// The oldest record that is retained.
    Oldest,
    /// After this revision.
    After(Revision),
}

/// What a watcher wants to see.
#[derive(Clone, Debug, Default)]
pub struct WatchFilter {
    /// Cycles of these loops; empty means any.
    pub loops: HashSet<Name>,
    /// Cycles that ended so; empty means any.
    pub states: Vec<CycleState>,
    /// Cycles in which these took part.
    pub parts: PartFilter,
}

impl Orchestrator {
    /// Follows the record.
    ///
    /// # Errors
    /// Too many watch already, the records wanted are not all there, or there is no room for the filter.
    pub fn watch(&self, from: From, filter: WatchFilter, progress: bool) -> Result<Watcher, Refusal> {
        Watcher::new(self.0.clone(), from, filter, progress)
    }
}

impl WatchFilter {
    fn wants_trigger(&self, trigger: &Trigger) -> bool {
        self.loops.is_empty() || trigger.loop_name().is_some_and(|name| self.loops.contains(name))
    }

    /// Whether it wants this record, as far as that can be told without looking into it.
    fn wants_outside(&self, record: &Record) -> bool {
        self.wants_trigger(&record.trigger) && (self.states.is_empty() || self.states.contains(&record.state))
    }

    fn wants_live(&self, cycle: &LiveCycle) -> bool {
        let names = &self.parts.subsystems;
        self.wants_trigger(cycle.trigger()) && (names.is_empty() || cycle.has_any(names))
    }

    /// Bytes that it takes, about.
    fn bytes(&self) -> usize {
        const NAME: usize = 128;
        (self.loops.len() + self.parts.subsystems.len()) * NAME
    }
}

/// What a watcher is given.
#[derive(Debug)]
pub enum Event {
    /// A cycle was recorded.
    Recorded(Arc<Record>),
    /// A cycle was recorded, and its record can't be read.
    Unreadable(Unreadable),
    /// A cycle has started. Everything up to this revision was given before.
    Started(Arc<LiveCycle>, Revision),
    /// A running cycle has moved on, or stands so. The number tells how many updates of it were lost before these.
    Progress(Arc<LiveEvent>, Revision, u64),
    /// Everything up to this revision that passes the filter was given.
    Bookmark(Revision),
}

/// Follows the record.
pub struct Watcher {
    shared: Arc<Shared>,
    place: WatcherPlace,
    filter: WatchFilter,
    /// For the filter.
    _room: Held,
    cursor: Revision,
    newest: watch::Receiver<Revision>,
    /// Read from the store and not yet given, by revision; without those that are not wanted.
    page: VecDeque<(Revision, Option<Found>)>,
    progress: bool,
    live: Option<Events>,
    /// Taken from there, or what it begins with, and not yet given.
    next_live: VecDeque<Arc<LiveEvent>>,
    /// The running cycles that were heard of.
    heard: HashMap<CycleId, Heard>,
    /// What is taken from `live` before the next record at most; none while there is none to come.
    before_record: Option<usize>,
    caught_up: bool,
    bookmark_at: Instant,
}

/// What a watcher knows of a running cycle.
struct Heard {
    /// Where its record is, once there is one.
    revision: Arc<OnceLock<Revision>>,
    wanted: bool,
    /// Its start was given.
    started: bool,
    /// Updates that were given or passed over.
    updates: u64,
}

impl Shared {
    /// Moves watchers on to the latest record that was published to the state. Every source of records calls it after
    /// `State::publish`; here the writer is the only one.
    pub(super) fn show_newest(&self) {
        let newest = self.state().last_revision;
        self.newest.send_if_modified(|shown| mem::replace(shown, newest) != newest);
    }
}

impl Watcher {
    /// So often something is sent, so that both sides know that the stream is alive.
    const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
    /// Read at once from the history: little, since it is held while the watcher stalls.
    const PAGE: PageLimits = PageLimits { records: 32, bytes: 256 << 10 };

    pub(super) fn new(shared: Arc<Shared>, from: From, filter: WatchFilter, progress: bool) -> Result<Self, Refusal> {
        let max = shared.settings().max_watchers;
        let newest = shared.newest.subscribe();
        let cursor = {
            let state = shared.state();
            match from {
                From::Now => state.last_revision,
                From::Oldest => state.pruned_to,
                From::After(after) if after < state.pruned_to || after > state.last_revision => {
                    return Err(Refusal::RevisionNotRetained {
                        after,
                        oldest: state.pruned_to.next(),
                        newest: state.last_revision,
                    });
                }
                From::After(after) => after,
            }
        };
        let room = shared.watching.try_hold(filter.bytes())?;
        let place = shared.watchers.enter(cursor, max).ok_or(Refusal::TooManyWatchers(max))?;
        Ok(Self {
            shared,
            place,
            filter,
            _room: room,
            cursor,
            newest,
            page: VecDeque::new(),
            progress,
            live: None,
            next_live: VecDeque::new(),
            heard: HashMap::new(),
            before_record: None,
            caught_up: false,
            bookmark_at: Instant::now() + Self::BOOKMARK_EVERY,
        })
    }

    /// The next event. Ends with an error, and only with one.
    ///
    /// # Errors
    /// The process shuts down, records were pruned before they could be given, or the store can't be read.
    pub async fn next(&mut self) -> Result<Event, Refusal> {
        let event = self.find_next().await?;
        self.place.given(self.cursor);
        Ok(event)
    }

    async fn find_next(&mut self) -> Result<Event, Refusal> {
        loop {
            while let Some((revision, found)) = self.page.pop_front() {
                self.cursor = revision;
                match found {
                    Some(Ok(record)) => return Ok(Event::Recorded(Arc::new(record))),
                    Some(Err(unreadable)) => {
                        self.shared.state().tell_unreadable(&unreadable);
                        return Ok(Event::Unreadable(unreadable));
                    }
                    None => {}
                }
            }
            if self.cursor < *self.newest.borrow_and_update() {
                // What is left of the cycles whose records are next comes before these.
                if let Some(event) = self.before_next_record() {
                    return Ok(event);
                }
                if let Some(record) = self.read_on().await? {
                    return Ok(Event::Recorded(record));
                }
                continue;
            }
            if !self.caught_up {
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
                    // It came too late: start over with how the cycles stand now.
                    None => self.live = None,
                },
                changed = self.newest.changed() => changed.map_err(|_| Refusal::Draining)?,
                () = self.shared.closed.cancelled() => {
                    if self.cursor >= *self.newest.borrow() {
                        return Err(Refusal::Draining);
                    }
                }
                () = sleep_until(self.bookmark_at) => return Ok(self.bookmark()),
            }
        }
    }

    /// Something that happened before the record that is next, if it is at hand: all that a cycle sends is sent before it is
    /// recorded. Of what others go on sending meanwhile, no more than there is now is given before the record.
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
                        // What it came too late for is counted with the next event of that cycle, and its record tells it.
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
        Event::Bookmark(self.cursor)
    }

    /// What is given of something that happened, if it is wanted and not over. A watcher that comes to a running cycle is told
    /// that it has started, and then how it stands.
    fn live_event(&mut self, event: Arc<LiveEvent>) -> Option<Event> {
        let cursor = self.cursor;
        // What is left of a cycle whose record was given is old.
        let is_old = |revision: &OnceLock<Revision>| revision.get().is_some_and(|revision| *revision <= cursor);
        if is_old(&event.cycle.revision) {
            return None;
        }
        let cycle_id = event.cycle.cycle_id;
        if !self.heard.contains_key(&cycle_id) {
            self.heard.retain(|_, heard| !is_old(&heard.revision));
            let (revision, wanted) = (event.cycle.revision.clone(), self.filter.wants_live(&event.cycle));
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

    /// How a large cycle stands is more than one message may hold: the rest is given next.
    fn first_piece(&mut self, event: Arc<LiveEvent>) -> Arc<LiveEvent> {
        if event.change.updates().len() <= Live::BATCH {
            return event;
        }
        let mut first = Arc::unwrap_or_clone(event);
        let change = first.change.split_off(Live::BATCH);
        self.next_live.push_front(Arc::new(LiveEvent { change, ..first.clone() }));
        Arc::new(first)
    }

    /// Goes on in the history: to the next record if it is at hand, which is given if it is wanted, or else by a page from the
    /// store.
    async fn read_on(&mut self) -> Result<Option<Arc<Record>>, Refusal> {
        let Some(recent) = self.at_hand() else {
            self.read_page().await?;
            return Ok(None);
        };
        let wanted = self.filter.wants_outside(&recent.record) && recent.has(&self.filter.parts).await;
        self.cursor = recent.record.revision;
        if !wanted {
            // There may be many of them.
            yield_now().await;
        }
        Ok(wanted.then(|| recent.record.clone()))
    }

    /// The record after the cursor, if it is at hand.
    fn at_hand(&self) -> Option<Arc<Recent>> {
        let wanted = self.cursor.next();
        let state = self.shared.state();
        let first = state.recent.front()?.record.revision;
        let skip = usize::try_from(wanted.0.checked_sub(first.0)?).ok()?;
        state.recent.get(skip).cloned()
    }

    /// Reads what follows the cursor from the store, and keeps of it what there is room for, but one record anyway: the one that
    /// is given at once.
    async fn read_page(&mut self) -> Result<(), Refusal> {
        let shared = &self.shared;
        let mut room = select! {
            biased;
            room = shared.history.hold(shared.max_record().max(Self::PAGE.bytes).min(shared.history.max())) => room,
            () = shared.closed.cancelled() => return Err(Refusal::Draining),
        };
        let records = match shared.store.cycles_after(self.cursor, Self::PAGE).await {
            Ok(records) => records,
            Err(ResumeError::NotRetained { oldest, newest }) => {
                return Err(Refusal::RevisionNotRetained { after: self.cursor, oldest, newest });
            }
            Err(ResumeError::Store(error)) => return Err(error.into()),
        };
        let have = which_have(&records, &self.filter.parts).await;
        let mut is_first = true;
        for (found, has) in records.into_iter().zip(have) {
            let record = match found {
                Ok(record) => record,
                Err(unreadable) => {
                    self.page.push_back((unreadable.revision, Some(Err(unreadable))));
                    continue;
                }
            };
            let revision = record.revision;
            if !has || !self.filter.wants_outside(&record) {
                self.page.push_back((revision, None));
            } else if is_first {
                is_first = false;
                self.page.push_back((revision, Some(Ok(with_room(record, &mut room)))));
            } else if let Ok(mut room) = shared.watching.try_hold(record.bytes.len()) {
                self.page.push_back((revision, Some(Ok(with_room(record, &mut room)))));
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
