//! The stream of a connection to the leader, which shows whether the other side speaks HTTP/2: the library for calls
//! does not say so before the first answer.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, oneshot},
};

use crate::transport::Stream;

/// The stream. It is dropped when the connection has ended.
pub(super) struct Socket {
    stream: Box<dyn Stream>,
    /// The beginning of the first frame: its length, and then its type.
    head: [u8; 4],
    /// Bytes of it that were read.
    read: usize,
    /// Is told once whether HTTP/2 has begun. The error is for people.
    settled: Option<oneshot::Sender<Result<(), String>>>,
    /// Counts the connection as long as it is open.
    _open: Arc<OwnedSemaphorePermit>,
}

impl Socket {
    /// A stream, and what tells whether the other side has begun HTTP/2. The connection counts as `open` until it ends.
    pub(super) fn new(
        stream: Box<dyn Stream>,
        open: Arc<OwnedSemaphorePermit>,
    ) -> (Self, oneshot::Receiver<Result<(), String>>) {
        let (tell, settled) = oneshot::channel();
        (Self { stream, head: [0; 4], read: 0, settled: Some(tell), _open: open }, settled)
    }

    /// Looks at the first bytes: the first frame of a server has its settings (RFC 9113, section 3.4).
    fn look(&mut self, bytes: &[u8]) {
        const SETTINGS: u8 = 4;
        if self.settled.is_none() {
            return;
        }
        if bytes.is_empty() {
            return self.tell(Err("it closed the connection before any HTTP/2; if it speaks TLS, its \
                                  cluster.advertise has to begin with https://"
                .into()));
        }
        let step = bytes.len().min(self.head.len() - self.read);
        self.head[self.read..][..step].copy_from_slice(&bytes[..step]);
        self.read += step;
        match self.head {
            // Settings of less than 64 KiB.
            [0, _, _, SETTINGS] if self.read == self.head.len() => self.tell(Ok(())),
            _ if self.read == self.head.len() => self.tell(Err("it does not speak HTTP/2".into())),
            _ => {}
        }
    }

    fn tell(&mut self, settled: Result<(), String>) {
        if let Some(tell) = self.settled.take() {
            // Nobody waits for it if the time is over.
            let _ = tell.send(settled);
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        match &read {
            Ok(()) => self.look(&buf.filled()[before..]),
            Err(error) => self.tell(Err(error.to_string())),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
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
