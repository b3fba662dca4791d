//! The listening side: every connection counted, every limit set on purpose.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo},
};

use crate::config::Config;

/// Sets the limits of every connection.
pub(super) fn limits(server: Server, config: &Config) -> Server {
    server
        .max_concurrent_streams(config.server.max_concurrent_streams)
        // A peer that went away without a word is noticed after 40 s, and its streams end.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        // A client that opens and resets streams without end is cut off (CVE-2023-44487).
        .http2_max_pending_accept_reset_streams(Some(64))
        .http2_max_local_error_reset_streams(Some(256))
        .http2_max_header_list_size(16 << 10)
        // What a client may send ahead of being read: requests are small, so this bounds memory and slows nothing.
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
}

/// The connections that come in: at most `max` at a time, further ones wait in the kernel's line.
pub(super) fn incoming(listener: TcpListener, max: usize) -> impl Stream<Item = io::Result<Connection>> {
    let permits = Arc::new(Semaphore::new(max));
    stream::unfold((listener, permits), |(listener, permits)| async move {
        /// Accepting fails again at once while files are short, so it waits for some to be closed.
        const PAUSE: Duration = Duration::from_millis(100);
        if permits.available_permits() == 0 {
            tracing::warn!("server.max_connections are open: further ones wait");
        }
        let permit = permits.clone().acquire_owned().await.ok()?;
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _peer)) => break stream,
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    sleep(PAUSE).await;
                }
            }
        };
        // Without it small messages wait for acknowledgements of earlier ones.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "can't set TCP_NODELAY");
        }
        Some((Ok(Connection { stream, _permit: permit }), (listener, permits)))
    })
}

/// A connection that counts as long as it lives.
pub(super) struct Connection {
    stream: TcpStream,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
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
