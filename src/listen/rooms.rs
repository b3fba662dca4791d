//! Memory for the answers of all connections until their clients have read them. Each connection may use a part of it.
//! When it is full, the answers that have waited longest at the peer that holds the most are aborted for a newcomer
//! that holds no more: the push-out policy of switches with a shared buffer, after a short patience.
//!
//! W. Wei, Y. Coyle, M. Hsiao: "An optimal buffer management policy for high-performance packet switching", GLOBECOM
//! 1991.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use super::connections::ConnectionState;
use crate::memory::{Full, Held, Memory};

/// How long a message may wait for its client before it may be aborted.
const PATIENCE: Duration = Duration::from_secs(5);

/// Memory that must be free before a further message of a stream is made: the default limit of clients.
pub(super) const LARGEST: usize = 4 << 20;

/// Memory for the answers of a server.
#[derive(Debug)]
pub(super) struct Rooms {
    memory: Memory,
    waiting: Mutex<BTreeMap<u64, Waiting>>,
    next: AtomicU64,
}

/// The waiting messages of one connection.
#[derive(Debug)]
struct Waiting {
    peer: Option<IpAddr>,
    memory: Memory,
    /// In the order of their reservations.
    messages: BTreeMap<u64, Message>,
}

#[derive(Debug)]
struct Message {
    since: Instant,
    bytes: usize,
    abort: Arc<Abort>,
}

/// Aborts a stream when other clients need the memory of its messages.
#[derive(Debug, Default)]
pub(super) struct Abort {
    /// The connection of the stream.
    connection: Option<Arc<ConnectionState>>,
    /// True once the whole answer has been passed to the library, which can't abort the stream any more.
    is_over: AtomicBool,
    wanted: Notify,
}

impl Abort {
    /// For a stream of this connection.
    pub(super) fn of(connection: Arc<ConnectionState>) -> Self {
        Self { connection: Some(connection), ..Self::default() }
    }

    /// Records that the stream has ended.
    pub(super) fn stream_is_over(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    /// Waits until the stream is to be aborted.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Aborts the stream or, if it has ended, the connection with its unread end.
    fn abort(&self) {
        self.wanted.notify_one();
        if let Some(connection) = self.connection.as_ref().filter(|_| self.is_over.load(Ordering::SeqCst)) {
            connection.cut_off();
        }
    }

    /// True if the stream is to be aborted.
    #[cfg(test)]
    fn is_wanted(&self) -> bool {
        futures_util::FutureExt::now_or_never(self.wanted()).is_some()
    }
}

impl Rooms {
    pub(super) fn new(memory: Memory) -> Arc<Self> {
        Arc::new(Self { memory, waiting: Mutex::default(), next: AtomicU64::new(0) })
    }

    /// The memory of a new connection: a quarter of all, or one answer if that is more.
    pub(super) fn of_connection(self: &Arc<Self>, connection: &ConnectionState) -> Arc<Room> {
        let all = self.memory.max();
        let max = (all / 4).max(LARGEST).min(all);
        let memory = self.memory.part("answers that the client of this connection has not read yet", max);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        Arc::new(Room { all: self.clone(), id, peer: connection.network(), memory })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Aborts streams whose messages have waited too long, so that this many bytes are released soon. Takes them only
    /// from peers, and on the same peer from connections, that hold at least as much as `newcomer` would hold then;
    /// aborts nothing if that is not enough.
    fn make_way(&self, newcomer: &Room, bytes: usize) -> bool {
        let mut waiting = self.lock();
        let mut of_peers = HashMap::new();
        for connection in waiting.values() {
            *of_peers.entry(connection.peer).or_insert(0) += connection.memory.held();
        }
        let of_peer = |peer| of_peers.get(&peer).copied().unwrap_or_default();
        let least = (of_peer(newcomer.peer) + bytes, newcomer.memory.held() + bytes);
        let now = Instant::now();
        let has_waited = |message: &Message| now - message.since >= PATIENCE;
        let mut most: Vec<_> = waiting
            .iter()
            .filter_map(|(id, connection)| {
                let oldest = connection.messages.values().next().filter(|message| has_waited(message))?;
                let held = (of_peer(connection.peer), connection.memory.held());
                let is_no_less = if connection.peer == newcomer.peer { held.1 >= least.1 } else { held.0 >= least.0 };
                is_no_less.then_some((Reverse(held), oldest.since, *id))
            })
            .collect();
        most.sort_unstable();
        let old = most.into_iter().flat_map(|(_, _, id)| {
            let messages = waiting[&id].messages.iter().take_while(|(_, message)| has_waited(message));
            messages.map(move |(number, message)| (id, *number, message.bytes))
        });
        let (mut leaving, mut freed) = (Vec::new(), 0);
        for (id, number, bytes_of_it) in old {
            if freed >= bytes {
                break;
            }
            freed += bytes_of_it;
            leaving.push((id, number));
        }
        if freed < bytes {
            return false;
        }
        for (id, number) in leaving {
            if let Some(message) = waiting.get_mut(&id).and_then(|connection| connection.messages.remove(&number)) {
                message.abort.abort();
            }
        }
        true
    }
}

/// Memory for the answers of one connection.
#[derive(Debug)]
pub(super) struct Room {
    all: Arc<Rooms>,
    id: u64,
    peer: Option<IpAddr>,
    memory: Memory,
}

impl Room {
    /// Its limit in bytes.
    pub(super) fn max(&self) -> usize {
        self.memory.max()
    }

    /// True if other connections may soon need the memory.
    pub(super) fn is_short(&self) -> bool {
        let all = &self.all.memory;
        all.held() > all.max() / 2
    }

    /// Reserves this many bytes.
    ///
    /// # Errors
    /// The memory is full, and no stream can be aborted.
    pub(super) fn try_hold(&self, bytes: usize) -> Result<Held, Full> {
        self.memory.try_hold(bytes).or_else(|full| {
            let is_own = self.memory.held() + bytes > self.memory.max();
            // Aborted messages are dropped soon, and counted until then.
            let has_room = !is_own && self.all.make_way(self, bytes);
            if has_room { Ok(self.memory.hold_beyond(bytes)) } else { Err(full) }
        })
    }

    /// Reserves this many bytes, and waits until they are free. At most [`Self::max`].
    pub(super) async fn hold(&self, bytes: usize) -> Held {
        loop {
            if let Ok(held) = self.try_hold(bytes) {
                return held;
            }
            // By then other streams may be aborted.
            if let Ok(held) = timeout(PATIENCE, self.memory.hold(bytes)).await {
                return held;
            }
        }
    }

    /// Keeps the memory of a message until its client has read it.
    pub(super) fn keep(self: &Arc<Self>, held: Held, abort: &Arc<Abort>) -> Kept {
        let number = self.all.next.fetch_add(1, Ordering::Relaxed);
        let message = Message { since: Instant::now(), bytes: held.bytes(), abort: abort.clone() };
        let new = || Waiting { peer: self.peer, memory: self.memory.clone(), messages: BTreeMap::new() };
        self.all.lock().entry(self.id).or_insert_with(new).messages.insert(number, message);
        Kept { room: self.clone(), number, _held: held }
    }
}

/// The memory of a message that its client has not read yet.
#[derive(Debug)]
pub(super) struct Kept {
    room: Arc<Room>,
    number: u64,
    _held: Held,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut waiting = self.room.all.lock();
        if let Some(connection) = waiting.get_mut(&self.room.id) {
            connection.messages.remove(&self.number);
            if connection.messages.is_empty() {
                waiting.remove(&self.room.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::transport::Origin;

    const ANSWER: usize = LARGEST;

    fn place_of(peer: Option<IpAddr>) -> ConnectionState {
        ConnectionState::of(peer.map_or(Origin::Unknown, Origin::Address))
    }

    /// Memory for this number of answers, two connections of one peer, and one of another.
    fn rooms(answers: usize) -> (Memory, [Arc<Room>; 3]) {
        let memory = Memory::whole(answers * ANSWER);
        let rooms = Rooms::new(memory.clone());
        let room = |peer: [u8; 4]| rooms.of_connection(&place_of(Some(peer.into())));
        (memory, [room([10, 0, 0, 1]), room([10, 0, 0, 1]), room([10, 0, 0, 2])])
    }

    fn keep(room: &Arc<Room>) -> Option<(Arc<Abort>, Kept)> {
        let abort = Arc::default();
        let held = room.try_hold(ANSWER).ok()?;
        let kept = room.keep(held, &abort);
        Some((abort, kept))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_has_a_share_of_all_memory() {
        let (memory, [room, other, _]) = rooms(8);
        let kept: Vec<_> = (0..8).map_while(|_| keep(&room)).collect();
        assert_eq!((kept.len(), memory.held()), (2, 2 * ANSWER));
        // This holds however long its own messages wait.
        advance(PATIENCE).await;
        assert!(keep(&room).is_none() && keep(&other).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn when_memory_is_full_the_oldest_of_the_largest_holder_are_aborted() {
        let (memory, [first, second, other]) = rooms(4);
        let mut kept: Vec<_> = [&first, &second, &other].map(|room| keep(room).unwrap()).into();
        advance(PATIENCE / 2).await;
        // Each connection may have one answer here, so this is a third connection of that peer.
        let third = first.all.of_connection(&place_of(first.peer));
        kept.push(keep(&third).unwrap());
        let another = || other.all.of_connection(&place_of(other.peer));
        let newcomer = another();
        // None of them has waited long enough.
        assert!(keep(&newcomer).is_none());
        advance(PATIENCE / 2).await;
        let given = keep(&newcomer).unwrap();
        assert!(kept[0].0.is_wanted() && !kept[1].0.is_wanted());
        // It is counted until it is dropped.
        assert_eq!(memory.held(), 5 * ANSWER);
        drop(kept.remove(0));
        assert_eq!(memory.held(), 4 * ANSWER);
        // Both peers hold the same now: the peer that would hold more gets memory only from its own connections.
        assert!(keep(&another()).is_some());
        assert!(kept[1].0.is_wanted(), "the connection of its own peer");
        drop(given);
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_message_gets_the_memory_of_those_that_have_waited_too_long() {
        let (_, [first, ..]) = rooms(1);
        let (abort, _kept) = keep(&first).unwrap();
        let begun = Instant::now();
        let second = first.all.of_connection(&place_of(first.peer));
        drop(second.hold(ANSWER).await);
        assert!(abort.is_wanted() && begun.elapsed() == PATIENCE);
    }
}
