//! Connections: limited, idle ones are closed for new ones, and stalled ones are aborted.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use rustix::io::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::repeated::Repeated;
use crate::{
    transport::{self, Listener},
    turn,
};

/// Serves connections until `stop` is cancelled, and then waits until open ones have ended. `cut_off` aborts all of
/// them.
pub(crate) async fn serve_each<F>(
    listener: Box<dyn Listener>,
    connections: Arc<Connections>,
    stop: &CancellationToken,
    cut_off: CancellationToken,
    serve: impl Fn(Connection<Box<dyn transport::Stream>>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut open = JoinSet::new();
    {
        let mut incoming = pin!(incoming(listener, connections, cut_off));
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
    listener: Box<dyn Listener>,
    connections: Arc<Connections>,
    cut_off: CancellationToken,
) -> impl Stream<Item = Connection<Box<dyn transport::Stream>>> {
    stream::unfold((listener, connections, cut_off), move |(listener, connections, cut_off)| async move {
        /// Pause while open files are exhausted, since accepting would fail again at once.
        const PAUSE: Duration = Duration::from_millis(100);
        let (stream, peer) = loop {
            match listener.accept().await {
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
        Some((Connection::new(stream, slot), (listener, connections, cut_off)))
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
    permits: Arc<Semaphore>,
    open: Mutex<BTreeMap<u64, Arc<Place>>>,
    next: AtomicU64,
    full: Repeated,
    refused: Repeated,
}

impl Connections {
    /// No connections yet, with this limit.
    pub(crate) fn at_most(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            permits: Arc::new(Semaphore::new(max)),
            open: Mutex::default(),
            next: AtomicU64::new(0),
            full: Repeated::default(),
            refused: Repeated::default(),
        })
    }

    /// The limit.
    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Number of open connections.
    pub(crate) fn open(&self) -> usize {
        self.places().len()
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Place>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for another connection, as soon as one is free.
    async fn slot(self: Arc<Self>, cut_off: &CancellationToken, peer: Option<IpAddr>) -> Option<Slot> {
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
        let place = Arc::new(Place { cut_off: cut_off.child_token(), ..Place::of(peer) });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.places().insert(id, place.clone());
        Some(Slot { connections: self, id, place, _permit: permit })
    }

    /// Asks the connections that have been idle longest to give way, first those without a stream, until `at_once` are
    /// leaving: one in any case, and further ones that are not new. Returns the number of leaving connections.
    fn make_way(&self, at_once: usize) -> usize {
        let places = self.places();
        // A connection that was asked, and then began a call, stays until that ends.
        let idle = places.values().filter_map(|place| Some((place.idle()?, place)));
        let (leaving, mut idle): (Vec<_>, Vec<_>) = idle.partition(|(_, place)| place.gives_way.is_cancelled());
        idle.sort_unstable_by_key(|(idle, _)| *idle);
        let mut asked = 0;
        for ((_, since), place) in idle.into_iter().take(at_once.saturating_sub(leaving.len())) {
            if asked == 0 || since.elapsed() >= Place::PARTING {
                place.gives_way.cancel();
                asked += 1;
            }
        }
        leaving.len() + asked
    }
}

/// The address that a connection comes from, if it has one. Travels with each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) Option<IpAddr>);

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct Place {
    /// Its peer, by address.
    peer: Peer,
    /// Number of open calls.
    calls: AtomicUsize,
    /// Number of open calls that count as idle while they are silent.
    besides: AtomicUsize,
    /// When the last other call ended, or a message was sent.
    idle_since: Mutex<Instant>,
    /// True while the peer does not read.
    is_stalled: AtomicBool,
    gives_way: CancellationToken,
    cut_off: CancellationToken,
}

impl Place {
    /// Longest time for an orderly close of an idle connection.
    const PARTING: Duration = Duration::from_secs(1);

    /// The state of a new connection of this peer.
    pub(super) fn of(peer: Option<IpAddr>) -> Self {
        Self {
            peer: Peer(peer),
            calls: AtomicUsize::new(0),
            besides: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            is_stalled: AtomicBool::new(false),
            gives_way: CancellationToken::new(),
            cut_off: CancellationToken::new(),
        }
    }

    /// The peer, by address.
    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }

    /// The network that counts as one peer.
    pub(super) fn network(&self) -> Option<IpAddr> {
        self.peer.0.map(network_of)
    }

    /// Registers a call, which is open until the returned value is dropped.
    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        let is_only = self.calls.fetch_add(1, Ordering::SeqCst) == 0;
        Busy { place: self.clone(), is_only }
    }

    /// Marks an open call to a service such as health: the connection counts as idle while the call is silent.
    pub(super) fn beside(self: &Arc<Self>) -> Beside {
        self.was_used();
        self.besides.fetch_add(1, Ordering::SeqCst);
        Beside { place: self.clone() }
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
    place: Arc<Place>,
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
        self.place.was_used();
        self.place.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A call to a service such as health: its client watches a value that rarely changes, and can start again.
#[derive(Debug)]
pub(super) struct Beside {
    place: Arc<Place>,
}

impl Beside {
    /// Records that a message was sent.
    pub(super) fn was_used(&self) {
        self.place.was_used();
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.place.was_used();
        self.place.besides.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A peer: an IPv4 address, or the 64-bit prefix of an IPv6 address, since a host may use any address in it (RFC 7421).
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// A slot for one connection of a server. Released when dropped.
struct Slot {
    connections: Arc<Connections>,
    id: u64,
    place: Arc<Place>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.places().remove(&self.id);
    }
}

/// Whether the connection of a call is broken, which distinguishes a cancelled call from a lost connection. Attached to
/// each request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Broken(Arc<AtomicBool>);

impl Broken {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Set before the calls of the connection are dropped.
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.set();
        }
        result
    }
}

/// A counted connection that records whether it broke. A connection that sends nothing after it was accepted, or does
/// not read, aborts by itself, since it would use a slot forever.
pub(crate) struct Connection<S> {
    stream: S,
    broken: Broken,
    place: Arc<Place>,
    /// Set until the peer has sent its first bytes.
    silence: Option<Silence>,
    /// Set while the peer does not read.
    stall: Option<Pin<Box<Sleep>>>,
    _slot: Slot,
}

struct Silence {
    ends: Pin<Box<Sleep>>,
    heard: usize,
}

impl Silence {
    /// Longest wait for the first bytes of a peer.
    const PATIENCE: Duration = Duration::from_secs(10);
    /// Bytes of HTTP/2's preface; a request of HTTP/1.1 is at least as long.
    const PREFACE: usize = 24;
}

impl<S> Connection<S> {
    fn new(stream: S, slot: Slot) -> Self {
        let place = slot.place.clone();
        Self {
            stream,
            broken: Broken::default(),
            place,
            silence: Some(Silence { ends: Box::pin(sleep(Silence::PATIENCE)), heard: 0 }),
            stall: None,
            _slot: slot,
        }
    }

    /// The only connection of a server.
    #[cfg(test)]
    pub(crate) async fn of(stream: S) -> Self {
        let slot = Connections::at_most(1).slot(&CancellationToken::new(), None).await;
        Self::new(stream, slot.unwrap_or_else(|| unreachable!("there is room for one")))
    }

    /// Whether it is broken, now and later.
    pub(crate) fn broken(&self) -> Broken {
        self.broken.clone()
    }

    /// The state of the connection.
    pub(crate) fn place(&self) -> Arc<Place> {
        self.place.clone()
    }

    /// Longest time that a peer may not read.
    const STALL: Duration = Duration::from_mins(1);

    fn written<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.stall.take().is_some() {
                self.place.is_stalled.store(false, Ordering::Relaxed);
            }
            return written.map(|written| self.broken.note(written));
        }
        self.place.is_stalled.store(true, Ordering::Relaxed);
        if self.stall.get_or_insert_with(|| Box::pin(sleep(Self::STALL))).as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.broken.note(Err(io::ErrorKind::TimedOut.into())));
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(silence) = &mut self.silence {
            silence.heard += buf.filled().len() - before;
            if silence.heard >= Silence::PREFACE {
                self.silence = None;
            } else if silence.ends.as_mut().poll(cx).is_ready() {
                return Poll::Ready(self.broken.note(Err(io::ErrorKind::TimedOut.into())));
            }
        }
        let read = ready!(read);
        let bytes = buf.filled().len() - before;
        if bytes == 0 {
            self.broken.set();
        }
        turn::end_sooner(cx, bytes);
        Poll::Ready(self.broken.note(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    async fn connection() -> (DuplexStream, Connection<DuplexStream>) {
        let (peer, stream) = duplex(1024);
        (peer, Connection::of(stream).await)
    }

    #[tokio::test(start_paused = true)]
    async fn silent_connections_do_not_block_new_ones() {
        const MAX: usize = 256;
        let (connections, never) = (Connections::at_most(MAX), CancellationToken::new());
        let slot = async || connections.clone().slot(&never, None).await.unwrap();
        let mut silent = JoinSet::new();
        for _ in 0..MAX {
            let (slot, never) = (slot().await, never.clone());
            silent.spawn(async move { slot.place.serve(std::future::pending::<()>(), |_| {}, &never).await });
        }
        sleep(Place::PARTING).await;
        let begun = Instant::now();
        let mut newcomers = Vec::new();
        for _ in 0..MAX {
            newcomers.push(slot().await);
        }
        assert!(begun.elapsed() < 5 * Place::PARTING, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_began_a_call_after_it_was_asked_to_leave_does_not_count_as_leaving() {
        let (connections, never) = (Connections::at_most(4), CancellationToken::new());
        let mut slots = Vec::new();
        for _ in 0..4 {
            slots.push(connections.clone().slot(&never, None).await.unwrap());
        }
        let leaving = || slots.iter().filter(|slot| slot.place.gives_way.is_cancelled()).count();
        let began = |slot: &Slot| {
            slot.place.gives_way.cancel();
            slot.place.busy()
        };
        let calls: Vec<_> = slots[..2].iter().map(began).collect();
        assert_eq!((connections.make_way(1), leaving()), (1, 3), "an idle one gives way");
        assert_eq!((connections.make_way(1), leaving()), (1, 3), "it is leaving");
        drop(calls);
        assert_eq!((connections.make_way(1), leaving()), (3, 3), "the others leave after their calls");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_sends_nothing_is_closed() {
        let (mut peer, mut connection) = connection().await;
        peer.write_all(b"PRI").await.unwrap();
        let error = connection.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(connection.broken.is_set());

        let (mut peer, mut connection) = self::connection().await;
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut read = Vec::new();
        let patience = tokio::time::timeout(Silence::PATIENCE * 10, connection.read_to_end(&mut read)).await;
        assert!(patience.is_err() && read.len() == Silence::PREFACE, "it may be silent from then on");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_reads_nothing_is_closed() {
        let (mut peer, mut connection) = connection().await;
        let sent = tokio::spawn(async move {
            let sent = connection.write_all(&[0; 5000]).await;
            (connection, sent)
        });
        // It may be slow.
        for _ in 0..3 {
            tokio::time::sleep(Connection::<DuplexStream>::STALL / 2).await;
            peer.read_exact(&mut [0; 1024]).await.unwrap();
        }
        let (connection, sent) = sent.await.unwrap();
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(connection.broken.is_set());
    }

    #[tokio::test]
    async fn an_endless_sender_lets_others_have_their_turn() {
        let mut connection = Connection::of(tokio::io::repeat(0)).await;
        let mut buf = vec![0; 8 << 10];
        let mut read = 0;
        std::future::poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut buf);
            while Pin::new(&mut connection).poll_read(cx, &mut buf).is_ready() {
                read += buf.filled().len();
                buf.clear();
            }
            Poll::Ready(())
        })
        .await;
        assert!((1..=64 << 10).contains(&read), "{read}");
    }
}
