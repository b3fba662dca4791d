//! The network between the hosts: connections with latency, which can be slow, break, or be cut.
//!
//! What happens to bytes depends on the seed, the connection and the time only, and not on the order of what happens at
//! one time: see `chance`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::{pending, ready},
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures_util::future::BoxFuture;
use orchestrator_core::transport::{Admit, Connected, Destination, Listener, Origin, Transport};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Mutex as AsyncMutex, mpsc},
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};

use crate::chance::Chance;

/// Most bytes on their way in one direction of a connection.
const WINDOW: usize = 64 << 10;

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// The usual latency, in milliseconds, up to this.
    pub(crate) latency: u64,
    /// Of a thousand writes, the number that is lost, and sent again after up to a second.
    pub(crate) resent: u32,
    /// Of a thousand writes, the number at which the connection breaks.
    pub(crate) breaks: u32,
}

impl Weather {
    pub(crate) const CALM: Self = Self { latency: 2, resent: 0, breaks: 0 };
}

/// The network. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Network(Arc<Mutex<Wires>>);

struct Wires {
    chance: Chance,
    /// The number of connections so far from a host to another one.
    made: BTreeMap<[String; 2], u64>,
    weather: Weather,
    /// Each with the time since when. It is reached later than that: at its start, a process works on blocking threads,
    /// so the order of what it does and of what others do at that time is not known.
    listening: BTreeMap<(String, u16), (mpsc::Sender<End>, Instant)>,
    /// Pairs of hosts between which nothing passes.
    cut: BTreeSet<[String; 2]>,
    all: Vec<Weak<Wire>>,
}

/// A connection.
struct Wire {
    hosts: [String; 2],
    state: Mutex<State>,
}

struct State {
    chance: Chance,
    weather: Weather,
    is_cut: bool,
    broken: bool,
    /// What each side has sent.
    sent: [Way; 2],
}

#[derive(Default)]
struct Way {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Bytes on their way. The end of all has none.
struct Chunk {
    sent: Instant,
    arrives: Instant,
    bytes: Bytes,
}

/// One side of a connection.
pub(crate) struct End {
    wire: Arc<Wire>,
    side: usize,
    arrival: Option<Pin<Box<Sleep>>>,
    read: LastRead,
}

/// When the bytes were sent that one side of a connection has read last.
#[derive(Clone, Default)]
pub(crate) struct LastRead(Arc<Mutex<Option<[Instant; 2]>>>);

impl LastRead {
    /// Of all bytes that were read now, those that were sent first were sent then.
    pub(crate) fn sent(&self) -> Instant {
        let now = Instant::now();
        self.0.lock().unwrap().filter(|[read, _]| *read == now).map_or(now, |[_, sent]| sent)
    }

    fn note(&self, sent: Instant) {
        let sent = sent.min(self.sent());
        *self.0.lock().unwrap() = Some([Instant::now(), sent]);
    }
}

fn pair(one: &str, other: &str) -> [String; 2] {
    let mut hosts = [one.to_owned(), other.to_owned()];
    hosts.sort();
    hosts
}

impl Network {
    pub(crate) fn new(chance: Chance) -> Self {
        let (made, listening, cut, all) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new(), Vec::new());
        Self(Arc::new(Mutex::new(Wires { chance, made, weather: Weather::CALM, listening, cut, all })))
    }

    fn wires(&self) -> MutexGuard<'_, Wires> {
        self.0.lock().unwrap()
    }

    /// The place of a host.
    pub(crate) fn host(&self, name: &str) -> Host {
        Host { network: self.clone(), name: name.to_owned() }
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        let mut wires = self.wires();
        wires.weather = weather;
        wires.each(|wire| wire.state().weather = weather);
    }

    /// Nothing passes between these hosts any more. Sent bytes wait.
    pub(crate) fn cut(&self, one: &str, other: &str) {
        let mut wires = self.wires();
        let hosts = pair(one, other);
        wires.each(|wire| {
            if pair(&wire.hosts[0], &wire.hosts[1]) == hosts {
                wire.state().is_cut = true;
            }
        });
        wires.cut.insert(hosts);
    }

    /// All hosts reach each other again.
    pub(crate) fn heal(&self) {
        let mut wires = self.wires();
        wires.cut.clear();
        wires.each(|wire| {
            let mut state = wire.state();
            state.is_cut = false;
            state.wake();
        });
    }

    /// Breaks all connections of this host.
    pub(crate) fn reset(&self, host: &str) {
        self.wires().each(|wire| {
            if wire.hosts.iter().any(|it| it == host) {
                wire.state().shatter();
            }
        });
    }
}

impl Wires {
    fn each(&mut self, mut action: impl FnMut(&Wire)) {
        self.all.retain(|wire| wire.upgrade().inspect(|wire| action(wire)).is_some());
    }
}

impl Wire {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn wake(&mut self) {
        for way in &mut self.sent {
            way.reader.take().into_iter().chain(way.writer.take()).for_each(Waker::wake);
        }
    }

    fn shatter(&mut self) {
        self.broken = true;
        self.wake();
    }

    /// Sends these bytes, or the end.
    fn send(&mut self, side: usize, bytes: Bytes) {
        let mut rng = self.chance.now(&("sends", side));
        let mut latency = rng.u64(0..=self.weather.latency);
        if rng.u32(..1000) < self.weather.resent {
            latency += rng.u64(200..1000);
        }
        let (way, sent) = (&mut self.sent[side], Instant::now());
        let last = way.chunks.back().map_or(sent, |last| last.arrives);
        way.bytes += bytes.len();
        let arrives = last.max(sent + Duration::from_millis(latency));
        way.chunks.push_back(Chunk { sent, arrives, bytes });
        way.reader.take().into_iter().for_each(Waker::wake);
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut state = this.wire.state();
        if state.broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let is_cut = state.is_cut;
        let way = &mut state.sent[1 - this.side];
        way.reader = Some(cx.waker().clone());
        match way.chunks.front_mut() {
            Some(Chunk { arrives, .. }) if *arrives > Instant::now() => {
                let mut arrival = Box::pin(sleep_until(*arrives));
                if arrival.as_mut().poll(cx).is_ready() {
                    cx.waker().wake_by_ref();
                }
                this.arrival = Some(arrival);
                Poll::Pending
            }
            _ if is_cut => Poll::Pending,
            Some(Chunk { bytes, .. }) if bytes.is_empty() => Poll::Ready(Ok(())),
            Some(Chunk { sent, bytes, .. }) => {
                this.read.note(*sent);
                let length = bytes.len().min(into.remaining());
                into.put_slice(&bytes[..length]);
                bytes.advance(length);
                if bytes.is_empty() {
                    way.chunks.pop_front();
                }
                way.bytes -= length;
                way.writer.take().into_iter().for_each(Waker::wake);
                Poll::Ready(Ok(()))
            }
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.wire.state();
        if !state.broken && state.chance.now(&("breaks", self.side)).u32(..1000) < state.weather.breaks {
            state.shatter();
        }
        if state.broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if state.sent[1 - self.side].ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let way = &mut state.sent[self.side];
        if way.bytes >= WINDOW {
            way.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let bytes = &bytes[..bytes.len().min(WINDOW)];
        if !bytes.is_empty() {
            state.send(self.side, Bytes::copy_from_slice(bytes));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end();
        Poll::Ready(Ok(()))
    }
}

impl End {
    /// When the bytes were sent that are read from this.
    pub(crate) fn last_read(&self) -> LastRead {
        self.read.clone()
    }

    fn end(&self) {
        let mut state = self.wire.state();
        if !state.sent[self.side].ended {
            state.sent[self.side].ended = true;
            state.send(self.side, Bytes::new());
            state.wake();
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.end();
    }
}

/// A host.
#[derive(Clone)]
pub(crate) struct Host {
    network: Network,
    pub(crate) name: String,
}

/// The connections to a port of a host.
pub(crate) struct Incoming {
    at: (Network, (String, u16)),
    ends: AsyncMutex<mpsc::Receiver<End>>,
}

impl Transport for Host {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<(Box<dyn Listener>, SocketAddr)>> {
        Box::pin(async move { Ok((Box::new(self.incoming(address.port())) as _, address)) })
    }

    fn listen_at_path<'a>(&'a self, _: &'a Path, _: u32) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(ready(Err(io::ErrorKind::Unsupported.into())))
    }

    fn connect<'a>(
        &'a self,
        to: &'a Destination,
        _: Admit<'a>,
        within: Duration,
    ) -> BoxFuture<'a, io::Result<Connected>> {
        Box::pin(async move {
            let Destination::Tcp { host, port } = to else { return Err(io::ErrorKind::Unsupported.into()) };
            let connected = timeout(within, self.connect_to(host, *port)).await;
            let end = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            Ok((Box::new(end) as _, Origin::Unknown))
        })
    }
}

impl Host {
    /// Listens at this port.
    pub(crate) fn incoming(&self, port: u16) -> Incoming {
        let (sender, receiver) = mpsc::channel(64);
        let at = (self.name.clone(), port);
        self.network.wires().listening.insert(at.clone(), (sender, Instant::now()));
        Incoming { at: (self.network.clone(), at), ends: AsyncMutex::new(receiver) }
    }

    /// Connects to a port of a host, however long that takes.
    pub(crate) async fn connect_to(&self, host: &str, port: u16) -> io::Result<End> {
        let (chance, latency) = {
            let mut wires = self.network.wires();
            let hosts = [self.name.clone(), host.to_owned()];
            let number = wires.made.entry(hosts.clone()).or_default();
            *number += 1;
            let number = *number;
            let chance = wires.chance.of(&(hosts, number));
            (chance, chance.now(&"connects").u64(0..=wires.weather.latency))
        };
        sleep(Duration::from_millis(latency)).await;
        while self.network.wires().cut.contains(&pair(&self.name, host)) {
            sleep(Duration::from_millis(50)).await;
        }
        let (listener, wire) = {
            let mut wires = self.network.wires();
            let listener = wires.listening.get(&(host.to_owned(), port)).filter(|(_, since)| *since < Instant::now());
            let listener = listener.map(|(listener, _)| listener.clone());
            let state =
                State { chance, weather: wires.weather, is_cut: false, broken: false, sent: Default::default() };
            let wire = Arc::new(Wire { hosts: [self.name.clone(), host.to_owned()], state: Mutex::new(state) });
            wires.all.push(Arc::downgrade(&wire));
            (listener, wire)
        };
        let listener = listener.ok_or(io::ErrorKind::ConnectionRefused)?;
        let far = End { wire: wire.clone(), side: 1, arrival: None, read: LastRead::default() };
        listener.send(far).await.map_err(|_ended| io::ErrorKind::ConnectionRefused)?;
        Ok(End { wire, side: 0, arrival: None, read: LastRead::default() })
    }
}

impl Incoming {
    /// The next one.
    pub(crate) async fn next(&self) -> End {
        match self.ends.lock().await.recv().await {
            Some(end) => end,
            None => pending().await,
        }
    }
}

impl Listener for Incoming {
    fn accept(&self) -> BoxFuture<'_, io::Result<Connected>> {
        Box::pin(async { Ok((Box::new(self.next().await) as _, Origin::Unknown)) })
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let (network, at) = &self.at;
        network.wires().listening.remove(at);
    }
}
