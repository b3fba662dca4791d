//! The stream: a watcher is a cursor into the history, and waits at its end.
//!
//! It costs its cursor and the records that it is about to be given, however slowly it reads; being behind is no
//! state of its own.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    select,
    sync::{broadcast, watch},
    time::{Instant, sleep_until},
};

use super::{Live, LiveCycle, LiveEvent, Refusal, Shared, figures::Place};
use crate::{
    model::{CycleId, CycleState, Name, Revision, Trigger},
    ports::{PageLimits, Record, StoreError, Unreadable},
    record::Participation,
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
    pub loops: Vec<Name>,
    /// Cycles that ended so; empty means any.
    pub states: Vec<CycleState>,
    /// Cycles in which these took part.
    pub participation: Participation,
}

impl WatchFilter {
    fn wants_trigger(&self, trigger: &Trigger) -> bool {
        self.loops.is_empty() || trigger.loop_name().is_some_and(|name| self.loops.contains(name))
    }

    fn wants(&self, record: &Record) -> bool {
        self.wants_trigger(&record.trigger)
            && (self.states.is_empty() || self.states.contains(&record.state))
            && self.participation.wants(&record.bytes)
    }

    fn wants_live(&self, cycle: &LiveCycle) -> bool {
        let names = &self.participation.subsystems;
        self.wants_trigger(cycle.trigger()) && (names.is_empty() || cycle.names().any(|name| names.contains(name)))
    }
}

/// What a watcher is given.
#[derive(Debug)]
pub enum Event {
    /// A cycle was recorded.
    Recorded(Arc<Record>),
    /// A cycle was recorded, and its record can't be read.
    Unreadable(Unreadable),
    /// A cycle has started.
    Started(Arc<LiveEvent>),
    /// The running cycle has moved on. The number tells how many updates were lost before these.
    Progress(Arc<LiveEvent>, u64),
    /// Everything up to this revision that passes the filter was given.
    Bookmark(Revision),
}

/// Follows the record.
pub struct Watcher {
    shared: Arc<Shared>,
    place: Place,
    filter: WatchFilter,
    cursor: Revision,
    newest: watch::Receiver<Revision>,
    /// Read and not yet given.
    page: VecDeque<Result<Arc<Record>, Unreadable>>,
    progress: bool,
    live: Option<broadcast::Receiver<Arc<LiveEvent>>>,
    /// Read and not yet given, because records come before it.
    next_live: Option<Arc<LiveEvent>>,
    /// The last cycle whose start was given.
    cycle_seen: CycleId,
    /// Updates of it that were given or passed over.
    updates_seen: u64,
    caught_up: bool,
    bookmark_at: Instant,
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
        let place = shared.watchers.enter(cursor, max).ok_or(Refusal::TooManyWatchers(max))?;
        Ok(Self {
            shared,
            place,
            filter,
            cursor,
            newest,
            page: VecDeque::new(),
            progress,
            live: None,
            next_live: None,
            cycle_seen: CycleId::default(),
            updates_seen: 0,
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
            while let Some(found) = self.page.pop_front() {
                let record = match found {
                    Ok(record) => record,
                    Err(unreadable) => {
                        self.cursor = unreadable.revision;
                        self.shared.state().tell_unreadable(&unreadable);
                        return Ok(Event::Unreadable(unreadable));
                    }
                };
                self.cursor = record.revision;
                if self.filter.wants(&record) {
                    return Ok(Event::Recorded(record));
                }
            }
            if self.cursor < *self.newest.borrow_and_update() {
                // What is left of the cycle whose record is next comes before that.
                if let Some(event) = self.before_next_record() {
                    return Ok(self.live_event(event));
                }
                self.page = self.read_page().await?.into();
                continue;
            }
            if !self.caught_up {
                self.caught_up = true;
                return Ok(self.bookmark());
            }
            if self.progress && self.live.is_none() {
                let (now, live) = self.shared.live.join();
                self.live = Some(live);
                self.next_live = now.map(Arc::new);
            }
            if let Some(event) = self.next_live.take() {
                if event.revision > self.cursor {
                    // It belongs after records that are not given yet.
                    self.next_live = Some(event);
                    self.newest.mark_changed();
                    self.page = self.read_page().await?.into();
                } else if event.revision == self.cursor && self.filter.wants_live(&event.cycle) {
                    return Ok(self.live_event(event));
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
                event = live => match event {
                    Ok(event) => self.next_live = Some(event),
                    // Start over with how the cycle stands now.
                    Err(_lagged_or_closed) => self.live = None,
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

    /// Something that happened before the record that is next, if it is at hand.
    fn before_next_record(&mut self) -> Option<Arc<LiveEvent>> {
        loop {
            let event = match self.next_live.take() {
                Some(event) => event,
                None => self.live.as_mut()?.try_recv().ok()?,
            };
            if event.revision > self.cursor {
                self.next_live = Some(event);
                return None;
            }
            if event.revision == self.cursor && self.filter.wants_live(&event.cycle) {
                return Some(event);
            }
        }
    }

    fn bookmark(&mut self) -> Event {
        self.bookmark_at = Instant::now() + Self::BOOKMARK_EVERY;
        Event::Bookmark(self.cursor)
    }

    /// A watcher that comes to a running cycle is told that it has started, and then how it stands.
    fn live_event(&mut self, event: Arc<LiveEvent>) -> Event {
        if event.started && self.cycle_seen != event.cycle.cycle_id {
            self.cycle_seen = event.cycle.cycle_id;
            self.updates_seen = event.first;
            if !event.updates.is_empty() {
                self.next_live = Some(event.clone());
            }
            return Event::Started(event);
        }
        let event = self.first_piece(event);
        let lost = if event.started { 0 } else { event.first.saturating_sub(self.updates_seen) };
        self.updates_seen = event.first + if event.started { 0 } else { event.updates.len() as u64 };
        Event::Progress(event, lost)
    }

    /// How a large cycle stands is more than one message may hold: the rest is given next.
    fn first_piece(&mut self, event: Arc<LiveEvent>) -> Arc<LiveEvent> {
        if event.updates.len() <= Live::BATCH {
            return event;
        }
        let mut first = Arc::unwrap_or_clone(event);
        let rest = first.updates.split_off(Live::BATCH);
        self.next_live = Some(Arc::new(LiveEvent { updates: rest, cycle: first.cycle.clone(), ..first }));
        Arc::new(first)
    }

    /// The records after the cursor: those at hand, or a page from the store.
    async fn read_page(&self) -> Result<Vec<Result<Arc<Record>, Unreadable>>, Refusal> {
        let wanted = self.cursor.next();
        {
            let state = self.shared.state();
            if let Some(first) = state.recent.front().filter(|first| first.revision <= wanted) {
                #[allow(clippy::cast_possible_truncation, reason = "at most the length of the queue")]
                let skip = (wanted.0 - first.revision.0) as usize;
                return Ok(state.recent.iter().skip(skip).take(Self::PAGE.records).cloned().map(Ok).collect());
            }
        }
        match self.shared.store.cycles_after(self.cursor, Self::PAGE).await {
            Ok(records) => Ok(records.into_iter().map(|found| found.map(Arc::new)).collect()),
            Err(StoreError::NotRetained { oldest, newest }) => {
                Err(Refusal::RevisionNotRetained { after: self.cursor, oldest, newest })
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.watchers.leave(&self.place);
    }
}
