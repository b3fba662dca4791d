//! Inspects the bytes of a connection on their way to the HTTP/2 library: whether they are HTTP/2, whether they are
//! more than the calls on it need, and to which stream each frame belongs. The library closes a whole connection
//! because of one invalid frame, and does not report its stream.
//!
//! Frames are those of RFC 9113, section 4.1; a server's first one is SETTINGS (section 3.4).

use std::{
    collections::VecDeque,
    error::Error,
    fmt, io,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::MAX_HEADERS;
use crate::turn;

/// Bytes in the header of a frame.
const HEAD: usize = 9;
/// Bytes of a GOAWAY frame up to the end of the stream id.
const GOAWAY_HEAD: usize = HEAD + 4;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

/// Most bytes that a peer may send besides messages of answers while no call begins or ends, without the headers of
/// open calls. A peer that pings each second sends 1.5 MB in the longest call, a day; and when calls are cancelled, up
/// to a megabyte of their answers is still in transit. More would only waste processor time.
const MAX_BESIDE: usize = 4 << 20;

/// The error for a peer that sends more.
pub(super) fn flood() -> String {
    format!("it sent more than {MAX_BESIDE} bytes besides its answers while no call began or ended")
}

/// A connection that passes on frames so that frames of two streams are never in one read.
pub(super) struct Watched<T> {
    io: T,
    /// Bytes that were read and belong to a later stream.
    held_back: BytesMut,
    frames: Frames,
}

/// The observed traffic of a connection.
#[derive(Debug)]
pub(super) struct Seen {
    is_settled: AtomicBool,
    stream: AtomicU32,
    header_bytes: AtomicUsize,
    /// The latest streams with header blocks over half the limit: another stream may send the next block before their
    /// calls see the end of the connection.
    large_headers: Mutex<VecDeque<u32>>,
    last_processed: AtomicU32,
    /// Number of open calls.
    calls: AtomicUsize,
    /// Bytes besides messages of answers since the last start or end of a call.
    beside: AtomicUsize,
    /// Set when these are over the limit.
    flooded: OnceLock<Flooded>,
}

/// A connection was closed because its peer sent too much besides messages of answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flooded {
    /// No call was open.
    Unused,
    /// Calls were open.
    InCalls,
}

/// An open call on a connection, until this is dropped.
pub(super) struct Open<'a>(&'a Seen);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
        self.0.beside.store(0, Ordering::Relaxed);
    }
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            is_settled: AtomicBool::new(false),
            stream: AtomicU32::new(0),
            header_bytes: AtomicUsize::new(0),
            large_headers: Mutex::default(),
            last_processed: AtomicU32::new(u32::MAX),
            calls: AtomicUsize::new(0),
            beside: AtomicUsize::new(0),
            flooded: OnceLock::new(),
        }
    }
}

impl Seen {
    /// Waits for the peer's settings, which show that it speaks HTTP/2.
    pub(super) fn is_settled(&self) -> bool {
        self.is_settled.load(Ordering::Relaxed)
    }

    /// Registers a call.
    pub(super) fn open(&self) -> Open<'_> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.beside.store(0, Ordering::Relaxed);
        Open(self)
    }

    /// True if the connection was closed because its peer sent too much besides messages of answers.
    pub(super) fn flooded(&self) -> Option<Flooded> {
        self.flooded.get().copied()
    }

    /// Counts a frame, unless the limit is reached.
    fn note_frame(&self, kind: u8, payload: usize) -> Result<(), Unwanted> {
        let calls = self.calls.load(Ordering::Relaxed);
        // A piece of a message counts only as far as it is smaller than its frame header.
        let bytes = if kind == DATA && calls > 0 { HEAD.saturating_sub(payload) } else { HEAD + payload };
        let most = MAX_BESIDE + calls * MAX_HEADERS as usize;
        if self.beside.fetch_add(bytes, Ordering::Relaxed) + bytes <= most {
            return Ok(());
        }
        let _ = self.flooded.set(if calls == 0 { Flooded::Unused } else { Flooded::InCalls });
        Err(Unwanted(flood()))
    }

    /// The stream of the last frame; 0 is the connection itself.
    pub(super) fn stream(&self) -> u32 {
        self.stream.load(Ordering::Relaxed)
    }

    /// Bytes of the last header block so far.
    fn header_bytes(&self) -> usize {
        self.header_bytes.load(Ordering::Relaxed)
    }

    /// True if the peer recently sent a large header block on this stream.
    pub(super) fn had_large_headers(&self, stream: u32) -> bool {
        self.large_headers.lock().unwrap_or_else(PoisonError::into_inner).contains(&stream)
    }

    fn note_large_headers(&self, stream: u32) {
        /// Most such streams: no more calls end between the trailers of a call and its wakeup.
        const REMEMBERED: usize = 256;
        let mut large = self.large_headers.lock().unwrap_or_else(PoisonError::into_inner);
        if large.front() != Some(&stream) {
            large.truncate(REMEMBERED - 1);
            large.push_front(stream);
        }
    }

    /// True if the peer accepts no more calls on this connection.
    pub(super) fn is_going_away(&self) -> bool {
        self.last_processed.load(Ordering::Relaxed) != u32::MAX
    }

    /// True if the peer has announced that it does not process this stream.
    pub(super) fn is_unprocessed(&self, stream: u32) -> bool {
        stream > self.last_processed.load(Ordering::Relaxed)
    }
}

/// The state of the parser of frames.
struct Frames {
    seen: Arc<Seen>,
    /// The start of the current frame.
    head: [u8; GOAWAY_HEAD],
    /// Bytes of that frame that were read.
    read: usize,
    /// Its length in bytes, once its header has been read.
    len: usize,
}

impl<T> Watched<T> {
    pub(super) fn new(io: T, seen: Arc<Seen>) -> Self {
        let frames = Frames { seen, head: [0; GOAWAY_HEAD], read: 0, len: HEAD };
        Self { io, held_back: BytesMut::new(), frames }
    }
}

impl Frames {
    /// Parses bytes, and returns how many of them may be passed on: those before a frame of another stream.
    fn take(&mut self, bytes: &[u8]) -> Result<usize, Unwanted> {
        let mut at = 0;
        while at < bytes.len() {
            if self.read == self.len {
                (self.read, self.len) = (0, HEAD);
            }
            if self.read == 0 && at > 0 {
                let same = bytes[at..].first_chunk().is_some_and(|head| stream_of(head) == self.seen.stream());
                if !same {
                    break;
                }
            }
            let rest = &bytes[at..];
            let step = rest.len().min(self.len - self.read);
            if let Some(room) = self.head.get_mut(self.read..) {
                let copied = room.len().min(step);
                room[..copied].copy_from_slice(&rest[..copied]);
            }
            let had = self.read;
            self.read += step;
            at += step;
            self.look(had, bytes)?;
        }
        Ok(at)
    }

    /// Inspects the new bytes of a frame, of which `had` bytes were known before.
    fn look(&mut self, had: usize, greeting: &[u8]) -> Result<(), Unwanted> {
        let settled = self.seen.is_settled();
        // A length of less than 64 KiB, and the type.
        if !settled && self.read >= 4 && (self.head[0] != 0 || self.head[3] != SETTINGS) {
            let mut said = self.head[..had.min(HEAD)].to_vec();
            said.extend(greeting);
            return Err(Unwanted::greeting(&said));
        }
        let kind = self.head[3];
        if had < HEAD && self.read >= HEAD {
            let [a, b, c, ..] = self.head;
            let payload = u32::from_be_bytes([0, a, b, c]) as usize;
            self.len = HEAD + payload;
            self.seen.stream.store(stream_of(&self.head[..HEAD].try_into().unwrap_or_default()), Ordering::Relaxed);
            self.seen.note_frame(kind, payload)?;
            let before = if kind == CONTINUATION { self.seen.header_bytes() } else { 0 };
            if kind == HEADERS || kind == CONTINUATION {
                self.seen.header_bytes.store(before + payload, Ordering::Relaxed);
                if before + payload > MAX_HEADERS as usize / 2 {
                    self.seen.note_large_headers(self.seen.stream());
                }
            }
        }
        if kind == GOAWAY && had < GOAWAY_HEAD && self.read >= GOAWAY_HEAD {
            let [.., a, b, c, d] = self.head;
            self.seen.last_processed.store(u32::from_be_bytes([a & 0x7f, b, c, d]), Ordering::Relaxed);
        }
        if !settled && self.read == self.len {
            self.seen.is_settled.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The stream id in the header of a frame.
fn stream_of(head: &[u8; HEAD]) -> u32 {
    let [.., a, b, c, d] = *head;
    u32::from_be_bytes([a & 0x7f, b, c, d])
}

/// Why the data of the peer is rejected.
#[derive(Debug)]
struct Unwanted(String);

impl Unwanted {
    /// The peer is not an HTTP/2 server.
    fn greeting(said: &[u8]) -> Self {
        /// Most bytes that are needed to recognize the protocol.
        const SHOWN: usize = 40;
        let line = said.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
        let shown: String = String::from_utf8_lossy(line).chars().take(SHOWN).collect();
        Self(match said {
            [0x15 | 0x16, 0x03, ..] => "it speaks TLS, so give https://".into(),
            // Further bytes of a slow peer have not arrived yet.
            [b'H', b'T', b'T', b'P', ..] => {
                format!("it speaks HTTP/1, not gRPC ({shown:?}); give the port of a gRPC server")
            }
            [b'S', b'S', b'H', b'-', ..] => format!("it speaks SSH ({shown:?}); give the port of a gRPC server"),
            _ => format!("it does not speak HTTP/2 (it sent {shown:?}); give the port of a gRPC server"),
        })
    }
}

impl fmt::Display for Unwanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Unwanted {}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, held_back, frames } = self.get_mut();
        let refuse = |unwanted: Unwanted| io::Error::new(io::ErrorKind::InvalidData, unwanted);
        if !held_back.is_empty() {
            let fitting = held_back.len().min(buf.remaining());
            let taken = frames.take(&held_back[..fitting]).map_err(refuse)?;
            buf.put_slice(&held_back[..taken]);
            held_back.advance(taken);
            if held_back.is_empty() {
                *held_back = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(io).poll_read(cx, buf))?;
        turn::end_sooner(cx, buf.filled().len() - before);
        let taken = match frames.take(&buf.filled()[before..]) {
            Ok(taken) => taken,
            Err(error) => {
                buf.set_filled(before);
                return Poll::Ready(Err(refuse(error)));
            }
        };
        held_back.extend_from_slice(&buf.filled()[before + taken..]);
        buf.set_filled(before + taken);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;

    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    #[tokio::test]
    async fn frames_of_two_streams_are_never_returned_together() {
        let settings = frame(SETTINGS, 0, &[]);
        let first = [frame(HEADERS, 1, b"headers"), frame(CONTINUATION, 1, b"more"), frame(0, 1, &[])].concat();
        let (second, goaway) = (frame(0, 3, b"data"), frame(GOAWAY, 0, &[0, 0, 0, 1, 0, 0, 0, 0]));
        let all = [&settings[..], &first, &second, &goaway].concat();
        // All at once, and split at every position.
        for pieces in 1..all.len() {
            let seen = Arc::new(Seen::default());
            let mut io = tokio_test_io(&all, pieces);
            let mut watched = Watched::new(&mut io, seen.clone());
            let (mut came, mut buffer) = (Vec::new(), [0; 1024]);
            loop {
                let read = watched.read(&mut buffer).await.unwrap();
                if read == 0 {
                    break;
                }
                came.extend_from_slice(&buffer[..read]);
                // The last stream is that of the last byte, once its header is complete.
                let expected = [(settings.len(), 0), (first.len(), 1), (second.len(), 3), (goaway.len(), 0)];
                let mut end = 0;
                for (len, stream) in expected {
                    let whole_head = came.len() >= end + HEAD;
                    end += len;
                    if came.len() <= end && whole_head {
                        assert_eq!(seen.stream(), stream, "{} of {}", came.len(), all.len());
                        break;
                    }
                }
            }
            assert_eq!(came, all);
            assert_eq!((seen.header_bytes(), seen.is_settled()), (11, true));
            assert!(seen.is_unprocessed(3) && !seen.is_unprocessed(1));
        }
    }

    #[tokio::test]
    async fn an_endless_sender_lets_others_have_their_turn() {
        let settings = frame(SETTINGS, 0, &[]);
        let mut watched = Watched::new(AsyncReadExt::chain(&settings[..], tokio::io::repeat(0)), Arc::default());
        let (mut read, mut buffer) = (0, vec![0; 8 << 10]);
        poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut buffer);
            while Pin::new(&mut watched).poll_read(cx, &mut buf).is_ready() {
                read += buf.filled().len();
                buf.clear();
            }
            Poll::Ready(())
        })
        .await;
        assert!((settings.len()..=settings.len() + (64 << 10)).contains(&read), "{read}");
    }

    /// Returns these bytes in pieces of this size.
    fn tokio_test_io(bytes: &[u8], size: usize) -> impl AsyncRead + Unpin {
        struct Pieces(Vec<u8>, usize);
        impl AsyncRead for Pieces {
            fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                let size = self.1.min(self.0.len()).min(buf.remaining());
                buf.put_slice(&self.0.drain(..size).collect::<Vec<_>>());
                Poll::Ready(Ok(()))
            }
        }
        Pieces(bytes.to_vec(), size)
    }

    #[tokio::test]
    async fn another_protocol_is_named() {
        for (said, words) in [
            (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "it speaks HTTP/1, not gRPC (\"HTTP/1.1 400 Bad Request\")"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "it speaks SSH"),
            (b"\x15\x03\x01\x00\x02\x02\x46", "it speaks TLS, so give https://"),
            (b"220 mail\r\n", "it does not speak HTTP/2 (it sent \"220 mail\")"),
        ] {
            for size in [1, 100] {
                let mut io = tokio_test_io(said, size);
                let error = Watched::new(&mut io, Arc::default()).read_to_end(&mut Vec::new()).await.unwrap_err();
                let (whole, beginning) = (error.to_string(), words.split(" (").next().unwrap());
                assert!(whole.contains(if size == 1 { beginning } else { words }), "{whole}");
            }
        }
    }
}
