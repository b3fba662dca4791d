//! Connections: limited, idle ones are closed for new ones, and stalled ones are aborted.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use rustix::io::Errno;
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Connection, Secure},
    peer::{Certificates, Peer},
    repeated::Repeated,
    standing::Standing,
};
use crate::transport::{Listener, Origin};

/// Where connections come in.
pub(crate) struct Entrance {
    /// Accepts them.
    pub(crate) listener: Box<dyn Listener>,
    /// Their TLS, if they have any.
    pub(crate) secure: Option<Arc<Secure>>,
}

impl Entrance {
    /// Without TLS.
    pub(crate) fn plain(listener: Box<dyn Listener>) -> Self {
        Self { listener, secure: None }
    }
}

/// Serves connections until `stop` is cancelled, and then waits until open ones have ended. `cut_off` aborts all of
/// them.
pub(crate) async fn serve_each<F>(
    entrance: Entrance,
    connections: Arc<Connections>,
    stop: &CancellationToken,
    cut_off: CancellationToken,
    serve: impl Fn(Connection) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut open = JoinSet::new();
    {
        let mut incoming = pin!(incoming(entrance, connections, cut_off));
        loop {
            select! {
                biased;
                () = stop.cancelled() => break,
                Some(_) = open.join_next() => {}
                next = incoming.next() => match next {
                    Some(connection) => {
                        open.spawn(serve(connection));
                    }
                    // It can't accept any more. It returns without waiting for open connections, since its end reports
                    // the failure.
                    None => return,
                },
            }
        }
    }
    while open.join_next().await.is_some() {}
}

/// Incoming connections up to the limit. At the limit, idle connections are closed; if none is idle, further ones wait,
/// one here and the others in the kernel's queue. Ends when the listener can't accept any more.
fn incoming(
    entrance: Entrance,
    connections: Arc<Connections>,
    cut_off: CancellationToken,
) -> impl Stream<Item = Connection> {
    stream::unfold((entrance, connections, cut_off), move |(entrance, connections, cut_off)| async move {
        /// Pause while open files are exhausted, since accepting would fail again at once.
        const PAUSE: Duration = Duration::from_millis(100);
        let (stream, peer) = loop {
            match entrance.listener.accept().await {
                Ok(accepted) => break accepted,
                Err(error) if is_final(&error) => {
                    tracing::error!(%error, "can't accept connections any more");
                    return None;
                }
                Err(error) => {
                    if let Some(times) = connections.refused.note() {
                        tracing::warn!(%error, times, "can't accept a connection");
                    }
                    sleep(PAUSE).await;
                }
            }
        };
        let slot = connections.clone().slot(&cut_off, peer).await?;
        let connection = Connection::new(stream, slot, entrance.secure.as_deref());
        Some((connection, (entrance, connections, cut_off)))
    })
}

/// True if the listening socket itself has failed. Other errors are temporary: files or memory are exhausted, or the
/// error concerns the incoming connection. <https://man7.org/linux/man-pages/man2/accept.2.html>
fn is_final(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK))
}

/// The connections of a server, and their limit.
#[derive(Debug)]
pub(crate) struct Connections {
    max: usize,
    /// True if peers have to identify themselves.
    refuses_strangers: bool,
    permits: Arc<Semaphore>,
    open: Mutex<BTreeMap<u64, Arc<ConnectionState>>>,
    next: AtomicU64,
    full: Repeated,
    refused: Repeated,
    speaks_tls: Repeated,
}

impl Connections {
    /// No connections yet, with this limit.
    pub(crate) fn at_most(max: usize) -> Arc<Self> {
        Self::of(max, false)
    }

    /// No connections yet, with this limit. If it `refuses_strangers`, the connections of peers that don't identify
    /// themselves are closed: by a certificate, by the user of their process, or by a request with a credential.
    pub(crate) fn of(max: usize, refuses_strangers: bool) -> Arc<Self> {
        Arc::new(Self {
            max,
            refuses_strangers,
            permits: Arc::new(Semaphore::new(max)),
            open: Mutex::default(),
            next: AtomicU64::new(0),
            full: Repeated::default(),
            refused: Repeated::default(),
            speaks_tls: Repeated::default(),
        })
    }

    /// The limit.
    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Number of open connections.
    pub(crate) fn open(&self) -> usize {
        self.states().len()
    }

    fn states(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<ConnectionState>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a connection of this peer.
    #[cfg(test)]
    pub(super) async fn slot_of(self: Arc<Self>, peer: Origin) -> Slot {
        let slot = self.slot(&CancellationToken::new(), peer).await;
        slot.unwrap_or_else(|| unreachable!("there is room for one"))
    }

    /// A slot for another connection, as soon as one is free.
    async fn slot(self: Arc<Self>, cut_off: &CancellationToken, peer: Origin) -> Option<Slot> {
        /// Time until idle connections are looked for again: a busy one may be idle by then.
        const AGAIN: Duration = Duration::from_millis(100);
        // One that answers leaves at once, and one that is silent takes its time: so there are twice as many each time.
        let mut at_once = 1;
        let permit = loop {
            if let Ok(permit) = self.permits.clone().try_acquire_owned() {
                break permit;
            }
            if let Some(times) = self.full.note() {
                let max = self.max;
                tracing::warn!(max, times, "the limit of connections is reached: idle ones are closed for new ones");
            }
            at_once = (2 * self.make_way(at_once)).max(1);
            if let Ok(permit) = timeout(AGAIN, self.permits.clone().acquire_owned()).await {
                break permit.ok()?;
            }
        };
        let is_stranger = self.refuses_strangers && !matches!(peer, Origin::User(_));
        let standing = if is_stranger { Standing::stranger() } else { Standing::default() };
        let state = ConnectionState { cut_off: cut_off.child_token(), standing, ..ConnectionState::of(peer) };
        let state = Arc::new(state);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.states().insert(id, state.clone());
        Some(Slot { connections: self, id, state, _permit: permit })
    }

    /// Asks the connections that have been idle longest to give way, first those without a stream, until `at_once` are
    /// leaving: one in any case, and further ones that are not new. Returns the number of leaving connections.
    fn make_way(&self, at_once: usize) -> usize {
        let states = self.states();
        // A connection that was asked, and then began a call, stays until that ends.
        let idle = states.values().filter_map(|state| Some((state.idle()?, state)));
        let (leaving, mut idle): (Vec<_>, Vec<_>) = idle.partition(|(_, state)| state.gives_way.is_cancelled());
        idle.sort_unstable_by_key(|(idle, _)| *idle);
        let mut asked = 0;
        for ((_, since), state) in idle.into_iter().take(at_once.saturating_sub(leaving.len())) {
            if asked == 0 || since.elapsed() >= ConnectionState::PARTING {
                state.gives_way.cancel();
                asked += 1;
            }
        }
        leaving.len() + asked
    }
}

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct ConnectionState {
    /// Where its peer comes from.
    origin: Origin,
    /// The certificates of its peer; set once, after the TLS handshake.
    certificates: OnceLock<Arc<dyn Certificates>>,
    /// Whether its peer is known.
    pub(super) standing: Standing,
    /// Number of open calls.
    calls: AtomicUsize,
    /// Number of open calls that count as idle: those that are silent, and those whose requests have not arrived.
    besides: AtomicUsize,
    /// When the last other call ended, or a message was sent.
    idle_since: Mutex<Instant>,
    /// True while the peer does not read.
    is_stalled: AtomicBool,
    gives_way: CancellationToken,
    cut_off: CancellationToken,
}

impl ConnectionState {
    /// Longest time for an orderly close of an idle connection.
    pub(super) const PARTING: Duration = Duration::from_secs(1);

    /// The state of a new connection of this peer.
    pub(super) fn of(origin: Origin) -> Self {
        Self {
            origin,
            certificates: OnceLock::new(),
            standing: Standing::default(),
            calls: AtomicUsize::new(0),
            besides: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            is_stalled: AtomicBool::new(false),
            gives_way: CancellationToken::new(),
            cut_off: CancellationToken::new(),
        }
    }

    /// The peer, as far as it is known: before the end of a TLS handshake, it has no certificates.
    pub(crate) fn peer(&self) -> Peer {
        Peer { origin: self.origin, certificates: self.certificates.get().cloned(), standing: self.standing.clone() }
    }

    /// Where the peer comes from.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// Records the certificates of the peer.
    pub(super) fn certified(&self, certificates: Option<Arc<dyn Certificates>>) {
        if let Some(certificates) = certificates {
            self.standing.identified();
            self.certificates.get_or_init(|| certificates);
        }
    }

    /// The network that counts as one peer.
    pub(super) fn network(&self) -> Option<IpAddr> {
        self.origin.network()
    }

    /// Registers a call, which is open until the returned value is dropped.
    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        let is_only = self.calls.fetch_add(1, Ordering::SeqCst) == 0;
        Busy { state: self.clone(), is_only }
    }

    /// Marks an open call to a service such as health: the connection counts as idle while the call is silent.
    /// The call holds this permit.
    pub(super) fn beside(self: &Arc<Self>, permit: Option<OwnedSemaphorePermit>) -> Beside {
        self.was_used();
        self.besides.fetch_add(1, Ordering::SeqCst);
        Beside { state: self.clone(), _permit: permit }
    }

    /// Marks an open call whose request has not arrived completely: the connection counts as idle until then, so that a
    /// peer that begins requests and never ends them keeps nobody out.
    pub(crate) fn arriving(self: &Arc<Self>) -> Beside {
        self.beside(None)
    }

    fn was_used(&self) {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// True if it has open calls, and since when it is idle; `None` if it is busy.
    fn idle(&self) -> Option<(bool, Instant)> {
        let besides = self.besides.load(Ordering::SeqCst);
        let is_idle = self.calls.load(Ordering::SeqCst) <= besides;
        is_idle.then(|| (besides > 0, *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// True while the peer does not read.
    pub(super) fn is_stalled(&self) -> bool {
        self.is_stalled.load(Ordering::Relaxed)
    }

    /// Records whether the peer reads.
    pub(super) fn set_stalled(&self, is_stalled: bool) {
        self.is_stalled.store(is_stalled, Ordering::Relaxed);
    }

    /// Closes the connection in order, as soon as it is idle.
    pub(super) fn leave(&self) {
        self.gives_way.cancel();
    }

    /// Aborts the connection.
    pub(super) fn cut_off(&self) {
        self.cut_off.cancel();
    }

    /// Runs a connection until it ends, or is aborted. `end` is called when `stop` is cancelled, or when it is closed
    /// for a new one.
    pub(crate) async fn serve<C, T>(
        &self,
        connection: C,
        end: impl Fn(Pin<&mut C>),
        stop: &CancellationToken,
    ) -> Option<T>
    where
        C: Future<Output = T>,
    {
        let served = async {
            let mut connection = pin!(connection);
            select! {
                biased;
                ended = connection.as_mut() => return Some(ended),
                () = stop.cancelled() => end(connection.as_mut()),
                () = self.gives_way.cancelled() => {
                    end(connection.as_mut());
                    if let Ok(ended) = timeout(Self::PARTING, connection.as_mut()).await {
                        return Some(ended);
                    }
                    // A call may have begun meanwhile. Otherwise the peer has not answered, and new connections wait
                    // for its slot.
                    if self.idle().is_some() {
                        return None;
                    }
                }
            }
            Some(connection.await)
        };
        select! {
            biased;
            ended = served => ended,
            () = self.cut_off.cancelled() => None,
        }
    }
}

/// An open call on a connection.
#[derive(Debug)]
pub(crate) struct Busy {
    state: Arc<ConnectionState>,
    is_only: bool,
}

impl Busy {
    /// True if it was the only call when it began.
    pub(super) fn is_only(&self) -> bool {
        self.is_only
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // Set before it counts as idle, so that it does not look as if it had been idle for long.
        self.state.was_used();
        self.state.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A call that counts as idle: to a service such as health, whose client watches a value that rarely changes, and can
/// start again; or one whose request has not arrived.
#[derive(Debug)]
pub(crate) struct Beside {
    state: Arc<ConnectionState>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Beside {
    /// Records that a message was sent.
    pub(super) fn was_used(&self) {
        self.state.was_used();
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.state.was_used();
        self.state.besides.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A slot for one connection of a server. Released when dropped.
pub(super) struct Slot {
    connections: Arc<Connections>,
    id: u64,
    state: Arc<ConnectionState>,
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    /// The only slot of a server.
    #[cfg(test)]
    pub(super) async fn only() -> Self {
        Connections::at_most(1).slot_of(Origin::Unknown).await
    }

    /// The state of its connection.
    pub(super) fn state(&self) -> Arc<ConnectionState> {
        self.state.clone()
    }

    /// Logs that its client speaks TLS to a server without.
    pub(super) fn speaks_tls(&self) {
        if let Some(times) = self.connections.speaks_tls.note() {
            let peer = self.state.origin;
            tracing::warn!(%peer, times, "a client speaks TLS to an address without TLS: it needs http://");
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.states().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silent_connections_do_not_block_new_ones() {
        const MAX: usize = 256;
        let (connections, never) = (Connections::at_most(MAX), CancellationToken::new());
        let slot = async || connections.clone().slot(&never, Origin::Unknown).await.unwrap();
        let mut silent = JoinSet::new();
        for _ in 0..MAX {
            let (slot, never) = (slot().await, never.clone());
            silent.spawn(async move { slot.state.serve(std::future::pending::<()>(), |_| {}, &never).await });
        }
        sleep(ConnectionState::PARTING).await;
        let begun = Instant::now();
        let mut newcomers = Vec::new();
        for _ in 0..MAX {
            newcomers.push(slot().await);
        }
        assert!(begun.elapsed() < 5 * ConnectionState::PARTING, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_began_a_call_after_it_was_asked_to_leave_does_not_count_as_leaving() {
        let (connections, never) = (Connections::at_most(4), CancellationToken::new());
        let mut slots = Vec::new();
        for _ in 0..4 {
            slots.push(connections.clone().slot(&never, Origin::Unknown).await.unwrap());
        }
        let leaving = || slots.iter().filter(|slot| slot.state.gives_way.is_cancelled()).count();
        let began = |slot: &Slot| {
            slot.state.gives_way.cancel();
            slot.state.busy()
        };
        let calls: Vec<_> = slots[..2].iter().map(began).collect();
        assert_eq!((connections.make_way(1), leaving()), (1, 3), "an idle one gives way");
        assert_eq!((connections.make_way(1), leaving()), (1, 3), "it is leaving");
        drop(calls);
        assert_eq!((connections.make_way(1), leaving()), (3, 3), "the others leave after their calls");
    }
}
