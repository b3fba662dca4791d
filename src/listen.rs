//! The listening side of every gRPC server here: limits set on purpose, connections counted, the contract described.

mod receiving;

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{Stream, stream};
use rustix::io::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{
    Server,
    server::{Connected, Router},
};
use tonic_reflection::server::{Builder, Error};

pub(crate) use self::receiving::Receiving;
use crate::proto;

/// A server with the limits of every connection.
pub(crate) fn server(max_concurrent_streams: u32) -> Server {
    Server::builder()
        .max_concurrent_streams(max_concurrent_streams)
        // A peer that went away without a word is noticed after 40 s, and its streams end.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        // A client that opens and resets streams without end is cut off (CVE-2023-44487).
        .http2_max_pending_accept_reset_streams(Some(64))
        .http2_max_local_error_reset_streams(Some(256))
        .http2_max_header_list_size(16 << 10)
}

/// What adds reflection, v1 and v1alpha, of a service and of the health service beside it.
///
/// # Errors
/// The descriptors of the contract can't be read.
pub(crate) fn reflection<L>(service: &str) -> Result<impl FnOnce(Router<L>) -> Router<L> + use<L>, Error> {
    let descriptions = || {
        Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients can read the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(service)
            .with_service_name("grpc.health.v1.Health")
    };
    let (v1, v1alpha) = (descriptions().build_v1()?, descriptions().build_v1alpha()?);
    Ok(|router: Router<L>| router.add_service(v1).add_service(v1alpha))
}

/// What connections come in by.
pub(crate) trait Listener: Send + Sync + 'static {
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// Bytes that the kernel takes and can't send yet. Left alone it takes megabytes, and no more before a third of them is
/// sent: a slow peer would look like one that takes nothing, and what keeps a connection alive would wait behind them.
#[cfg(target_os = "linux")]
const MAX_UNSENT: u32 = 16 << 10;

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        let (stream, _peer) = self.accept().await?;
        // Without it small messages wait for acknowledgements of earlier ones.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "can't set TCP_NODELAY");
        }
        #[cfg(target_os = "linux")]
        if let Err(error) = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(MAX_UNSENT) {
            tracing::debug!(%error, "can't set TCP_NOTSENT_LOWAT");
        }
        Ok(stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _peer)| stream)
    }
}

/// How many connections a server may have at a time, and has.
#[derive(Debug)]
pub(crate) struct Connections {
    max: usize,
    permits: Arc<Semaphore>,
    open: AtomicUsize,
}

impl Connections {
    /// None yet, and room for so many.
    pub(crate) fn at_most(max: usize) -> Arc<Self> {
        Arc::new(Self { max, permits: Arc::new(Semaphore::new(max)), open: AtomicUsize::new(0) })
    }

    /// How many there may be.
    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// How many are open.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// One of the connections that a server may have. Given back when it is dropped.
struct Slot {
    connections: Arc<Connections>,
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    fn new(connections: Arc<Connections>, permit: OwnedSemaphorePermit) -> Self {
        connections.open.fetch_add(1, Ordering::Relaxed);
        Self { connections, _permit: permit }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connections that come in: as many as may be at a time, further ones wait in the kernel's line. All of them break
/// when `cut_off` is cancelled: the library has no way to end connections whose calls go on. Ends when the listener can't
/// accept any more.
pub(crate) fn incoming<L: Listener>(
    listener: L,
    connections: Arc<Connections>,
    cut_off: CancellationToken,
) -> impl Stream<Item = io::Result<Connection<L::Stream>>> {
    stream::unfold((listener, connections, cut_off), move |(listener, connections, cut_off)| async move {
        /// Accepting fails again at once while files are short, so it waits for some to be closed.
        const PAUSE: Duration = Duration::from_millis(100);
        if connections.permits.available_permits() == 0 {
            tracing::warn!(max = connections.max, "as many connections as may be are open: further ones wait");
        }
        let permit = connections.permits.clone().acquire_owned().await.ok()?;
        let stream = loop {
            match listener.accept().await {
                Ok(stream) => break stream,
                Err(error) if is_final(&error) => {
                    tracing::error!(%error, "can't accept connections any more");
                    return None;
                }
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    sleep(PAUSE).await;
                }
            }
        };
        let slot = Slot::new(connections.clone(), permit);
        Some((Ok(Connection::new(stream, cut_off.clone(), slot)), (listener, connections, cut_off)))
    })
}

/// It is the listening socket itself that is no good any more. Everything else passes: files or memory are short, or it
/// is about the connection that was to be accepted. <https://man7.org/linux/man-pages/man2/accept.2.html>
fn is_final(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK))
}

/// Whether the connection of a call is broken: what tells a caller that cancelled from one that was cut off. Travels with
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

    /// The end of a connection is noted here before its calls hear of it.
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.set();
        }
        result
    }
}

/// A connection that counts as long as it lives, can be cut off, and remembers whether it broke. One that says nothing
/// after it was accepted, or does not take what it is sent, breaks by itself, for it would take the place of others for
/// ever.
pub(crate) struct Connection<S> {
    stream: S,
    broken: Broken,
    cut_off: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Until it has said something.
    silence: Option<Silence>,
    /// Since the peer takes nothing of what is to be written.
    stall: Option<Pin<Box<Sleep>>>,
    _slot: Slot,
}

struct Silence {
    ends: Pin<Box<Sleep>>,
    heard: usize,
}

impl Silence {
    /// How long a peer may take to say what it speaks.
    const PATIENCE: Duration = Duration::from_secs(10);
    /// Bytes of HTTP/2's preface; a request of HTTP/1.1 is no shorter.
    const PREFACE: usize = 24;
}

impl<S> Connection<S> {
    fn new(stream: S, cut_off: CancellationToken, slot: Slot) -> Self {
        Self {
            stream,
            broken: Broken::default(),
            cut_off: Box::pin(cut_off.cancelled_owned()),
            silence: Some(Silence { ends: Box::pin(sleep(Silence::PATIENCE)), heard: 0 }),
            stall: None,
            _slot: slot,
        }
    }

    /// How long a peer may take nothing.
    const STALL: Duration = Duration::from_mins(1);

    fn written<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stall = None;
        } else if self.stall.get_or_insert_with(|| Box::pin(sleep(Self::STALL))).as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.broken.note(Err(io::ErrorKind::TimedOut.into())));
        }
        written.map(|written| self.broken.note(written))
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Broken;

    fn connect_info(&self) -> Broken {
        self.broken.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.cut_off.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
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
        if buf.filled().len() == before {
            self.broken.set();
        }
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
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::timeout,
    };

    use super::*;

    async fn connection() -> (DuplexStream, Connection<DuplexStream>) {
        let connections = Connections::at_most(1);
        let permit = connections.permits.clone().acquire_owned().await.unwrap();
        let (peer, stream) = duplex(1024);
        (peer, Connection::new(stream, CancellationToken::new(), Slot::new(connections, permit)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_breaks() {
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
    async fn a_connection_that_takes_nothing_breaks() {
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

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn what_a_slow_peer_takes_is_soon_seen() {
        const PATIENCE: Duration = Duration::from_secs(10);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let stream = Listener::accept(&listener).await.unwrap();
        let fill = || {
            let mut filled = 0;
            while let Ok(written) = stream.try_write(&[0; 16 << 10]) {
                filled += written;
            }
            filled
        };
        stream.writable().await.unwrap();
        // The peer's side of the kernel gathers some before it tells ours.
        let some = fill().min(256 << 10);
        peer.read_exact(&mut vec![0; some]).await.unwrap();
        timeout(PATIENCE, stream.writable()).await.unwrap().unwrap();
        assert!(fill() > 0);
    }
}
