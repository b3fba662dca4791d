//! One connection: its TLS, if it has any, whether it broke, and the limits on a peer that is silent or does not read.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

use super::{
    connections::{ConnectionState, Slot},
    peer::Certificates,
};
use crate::{transport::Stream, turn};

/// Makes the TLS handshake with the peer of an accepted connection. It needs no time limit of its own: the connection
/// ends it with the limit for silent peers.
pub(crate) type Secure =
    dyn Fn(Box<dyn Stream>, &ConnectionState) -> BoxFuture<'static, io::Result<Secured>> + Send + Sync;

/// A connection after its TLS handshake.
pub(crate) struct Secured {
    /// Its decrypted bytes, or those of a client that is accepted without TLS.
    pub(crate) stream: Box<dyn Stream>,
    /// The verified certificates of the peer, if it showed any.
    pub(crate) certificates: Option<Arc<dyn Certificates>>,
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

/// A counted connection that records whether it broke. A connection aborts by itself if it sends nothing after it was
/// accepted, if its peer has to identify itself and does not, or if it does not read: it would use a slot forever.
pub(crate) struct Connection {
    layer: Layer,
    broken: Broken,
    state: Arc<ConnectionState>,
    /// Set until the peer has sent its first bytes, and is known.
    silence: Option<Silence>,
    slot: Slot,
}

/// The layer between the protocol and the socket.
enum Layer {
    /// Nothing.
    Plain(Sending),
    /// TLS, whose handshake is under way. Whatever is read, written or flushed first drives it.
    Handshake(BoxFuture<'static, io::Result<Secured>>),
    /// TLS.
    Tls(Box<dyn Stream>),
    /// The handshake has failed.
    Failed,
}

/// Limits how long a peer may be silent before its first request, and, where peers have to identify themselves, before
/// the first one that does. With TLS, this includes the handshake.
struct Silence {
    ends: Pin<Box<Sleep>>,
    heard: usize,
    /// True once the connection is being closed in order.
    is_leaving: bool,
}

impl Silence {
    /// Longest wait for the first bytes of a peer.
    const PATIENCE: Duration = Duration::from_secs(10);
    /// Bytes of HTTP/2's preface; a request of HTTP/1.1 is at least as long.
    const PREFACE: usize = 24;

    fn poll_over(&mut self, state: &ConnectionState, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            ready!(self.ends.as_mut().poll(cx));
            let is_stranger = self.heard >= Self::PREFACE && !self.is_leaving;
            let until = match state.standing.stays_until() {
                Some(until) if is_stranger && until > Instant::now() => until,
                // A client that reads learns that its next request needs another connection.
                _ if is_stranger => {
                    self.is_leaving = true;
                    state.leave();
                    Instant::now() + ConnectionState::PARTING
                }
                _ => return Poll::Ready(io::ErrorKind::TimedOut.into()),
            };
            self.ends.as_mut().reset(until);
        }
    }
}

impl Connection {
    pub(super) fn new(stream: Box<dyn Stream>, slot: Slot, secure: Option<&Secure>) -> Self {
        let state = slot.state();
        let sending = Sending { stream, state: state.clone(), stall: None };
        let layer = match secure {
            None => Layer::Plain(sending),
            Some(secure) => Layer::Handshake(secure(Box::new(sending), &state)),
        };
        let silence = Some(Silence { ends: Box::pin(sleep(Silence::PATIENCE)), heard: 0, is_leaving: false });
        Self { layer, broken: Broken::default(), state, silence, slot }
    }

    /// The only connection of a server.
    #[cfg(test)]
    pub(crate) async fn of(stream: impl Stream + 'static) -> Self {
        Self::secured(stream, None).await
    }

    /// The only connection of a server with TLS.
    #[cfg(test)]
    pub(crate) async fn secured(stream: impl Stream + 'static, secure: Option<&Secure>) -> Self {
        Self::new(Box::new(stream), Slot::only().await, secure)
    }

    /// Whether it is broken, now and later.
    pub(crate) fn broken(&self) -> Broken {
        self.broken.clone()
    }

    /// The state of the connection.
    pub(crate) fn state(&self) -> Arc<ConnectionState> {
        self.state.clone()
    }

    /// The stream, once the handshake is complete.
    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut dyn Stream>>> {
        if let Layer::Handshake(handshake) = &mut self.layer {
            let made = match (handshake.as_mut().poll(cx), &mut self.silence) {
                (Poll::Ready(made), _) => made,
                (Poll::Pending, Some(silence)) => Err(ready!(silence.poll_over(&self.state, cx))),
                (Poll::Pending, None) => return Poll::Pending,
            };
            self.layer = match self.broken.note(made) {
                Ok(Secured { stream, certificates }) => {
                    self.state.certified(certificates);
                    Layer::Tls(stream)
                }
                Err(error) => {
                    self.layer = Layer::Failed;
                    return Poll::Ready(Err(error));
                }
            };
        }
        Poll::Ready(match &mut self.layer {
            Layer::Plain(stream) => Ok(Pin::new(stream)),
            Layer::Tls(stream) => Ok(Pin::new(stream)),
            Layer::Handshake(_) | Layer::Failed => Err(io::ErrorKind::NotConnected.into()),
        })
    }

    /// Records that the peer has sent these bytes, or none yet.
    fn heard(&mut self, bytes: &[u8], cx: &mut Context<'_>) -> io::Result<()> {
        /// The first byte of each TLS connection, and of no request of HTTP.
        const TLS: u8 = 0x16;
        let Some(silence) = &mut self.silence else { return Ok(()) };
        if let (0, Some(&TLS), Layer::Plain(_)) = (silence.heard, bytes.first(), &self.layer) {
            self.slot.speaks_tls();
        }
        silence.heard += bytes.len();
        if silence.heard >= Silence::PREFACE && self.state.standing.is_known() {
            self.silence = None;
        } else if let Poll::Ready(error) = silence.poll_over(&self.state, cx) {
            return Err(error);
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(self.poll_stream(cx))?.poll_read(cx, buf);
        if let Err(error) = self.heard(&buf.filled()[before..], cx) {
            return Poll::Ready(self.broken.note(Err(error)));
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

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(self.poll_stream(cx))?.poll_write(cx, buf);
        written.map(|written| self.broken.note(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(self.poll_stream(cx))?.poll_write_vectored(cx, bufs);
        written.map(|written| self.broken.note(written))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.layer {
            Layer::Plain(stream) => stream.is_write_vectored(),
            // Asked before the handshake as well.
            Layer::Handshake(_) | Layer::Tls(_) | Layer::Failed => true,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(self.poll_stream(cx))?.poll_flush(cx);
        flushed.map(|flushed| self.broken.note(flushed))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.layer {
            Layer::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Layer::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            // Nothing was sent that has an end.
            Layer::Handshake(_) | Layer::Failed => Poll::Ready(Ok(())),
        }
    }
}

/// The bytes of a connection as the socket takes them. Below TLS, which buffers some, so that the limit is the same
/// with TLS and without.
struct Sending {
    stream: Box<dyn Stream>,
    state: Arc<ConnectionState>,
    /// Set while the peer does not read.
    stall: Option<Pin<Box<Sleep>>>,
}

impl Sending {
    /// Longest time that a peer may not read.
    const STALL: Duration = Duration::from_mins(1);

    fn written<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.stall.take().is_some() {
                self.state.set_stalled(false);
            }
            return written;
        }
        self.state.set_stalled(true);
        if self.stall.get_or_insert_with(|| Box::pin(sleep(Self::STALL))).as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for Sending {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Sending {
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
    use crate::{
        listen::{connections::Connections, standing::Standing},
        transport::Origin,
    };

    async fn connection() -> (DuplexStream, Connection) {
        let (peer, stream) = duplex(1024);
        (peer, Connection::of(stream).await)
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
    async fn a_connection_of_a_stranger_is_closed_and_a_probe_may_stay_longer() {
        let closed = async |act: fn(&Standing)| {
            let slot = Connections::of(1, true).slot_of(Origin::Unknown).await;
            let (mut peer, stream) = duplex(1024);
            let mut connection = Connection::new(Box::new(stream), slot, None);
            peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
            act(&connection.state.standing);
            let begun = Instant::now();
            let read = tokio::time::timeout(Standing::PROBE * 10, connection.read_to_end(&mut Vec::new())).await;
            read.is_ok().then(|| begun.elapsed())
        };
        let parted = |patience| Some(patience + ConnectionState::PARTING);
        assert_eq!(closed(|_| {}).await, parted(Silence::PATIENCE));
        assert_eq!(closed(Standing::probes).await, parted(Standing::PROBE));
        assert_eq!(closed(Standing::identified).await, None);
        assert_eq!(closed(|standing| (standing.identified(), standing.probes()).0).await, None);
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
            tokio::time::sleep(Sending::STALL / 2).await;
            peer.read_exact(&mut [0; 1024]).await.unwrap();
        }
        let (connection, sent) = sent.await.unwrap();
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(connection.broken.is_set());
    }

    #[tokio::test]
    async fn an_endless_sender_lets_others_have_their_turn() {
        let mut connection = Connection::of(tokio::io::join(tokio::io::repeat(0), tokio::io::sink())).await;
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
