//! Limits the memory of requests while they are being received: each message has a limit on its size and time, and all
//! of them share a limit.

use std::{
    error::Error,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body as _, Frame};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tonic::Status;

use super::{connections::Beside, streams::Taking};
use crate::{
    memory::{Held, Memory},
    proto::{
        framing::Prefix,
        gzip::{Inflating, NotInflated},
    },
};

/// The limits of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// Most bytes of one message.
    pub(super) max_bytes: usize,
    /// True if there may be many messages.
    pub(super) is_stream: bool,
}

/// The body of a request, which passes on whole messages, uncompressed. The library would allocate the length in the
/// prefix of a message; here the buffer grows with the received bytes, and its memory is reserved before.
///
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>
pub(super) struct Received<B> {
    body: Upload<B>,
    rule: Rule,
    /// True if its compressed messages are in gzip.
    is_gzip: bool,
    room: Memory,
    held: Option<Held>,
    /// Memory for the headers, which are kept as long.
    _headers: Option<Held>,
    /// Received bytes that are not passed on yet.
    gathered: BytesMut,
    /// The only message, if it came in one piece: nothing is copied then.
    whole: Option<Bytes>,
    /// A message that is being decompressed.
    inflating: Option<Inflating>,
    /// A message whose prefix has been passed on.
    message: Option<Bytes>,
    messages: usize,
    taking: Arc<Taking>,
    /// Set until the first message is complete.
    arriving: Option<Beside>,
    /// When the awaited bytes must have arrived.
    due: Option<Instant>,
    clock: Option<Pin<Box<Sleep>>>,
}

impl<B> Received<B> {
    /// Longest time for a message to arrive: enough for the largest one over a slow link.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// Most bytes of the headers of a request.
    pub(super) const MAX_HEADERS: u32 = 16 << 10;
    /// Bytes of a message that needs no reservation: they are included in the cost of a stream.
    const SMALL: usize = 8 << 10;

    pub(super) fn new(
        body: Upload<B>,
        rule: Rule,
        is_gzip: bool,
        room: Memory,
        headers: Option<Held>,
        taking: Arc<Taking>,
        arriving: Option<Beside>,
    ) -> Self {
        Self {
            body,
            rule,
            is_gzip,
            room,
            held: None,
            _headers: headers,
            gathered: BytesMut::new(),
            whole: None,
            inflating: None,
            message: None,
            messages: 0,
            taking,
            arriving,
            // A stream may be silent before each message; any other request must arrive completely.
            due: (!rule.is_stream).then(|| Instant::now() + Self::PATIENCE),
            clock: None,
        }
    }

    /// Received bytes that are not passed on yet.
    fn came(&self) -> &[u8] {
        self.whole.as_deref().unwrap_or(&self.gathered)
    }

    /// Bytes of the current message, with its prefix, once that is known.
    fn announced(&self) -> Result<Option<usize>, Status> {
        self.announced_in(self.came())
    }

    fn announced_in(&self, came: &[u8]) -> Result<Option<usize>, Status> {
        let Some(prefix) = came.first_chunk() else { return Ok(None) };
        let Prefix { flag, length } = Prefix::read(*prefix);
        match flag {
            0 => {}
            1 if self.is_gzip => {}
            1 => {
                let message = "the request is compressed, but not by gzip (grpc-encoding); use gzip, or send it \
                               uncompressed";
                return Err(Status::unimplemented(message));
            }
            flag => {
                let message = format!("the request is not gRPC: its message begins with the flag {flag}, not 0");
                return Err(Status::invalid_argument(message));
            }
        }
        let Rule { max_bytes, is_stream } = self.rule;
        if !is_stream && self.messages > 0 {
            return Err(Status::invalid_argument(MORE_THAN_ONE));
        }
        if length > max_bytes {
            let message =
                format!("message length too large: it has {length} bytes, and the limit is {max_bytes} bytes");
            return Err(Status::out_of_range(message));
        }
        Ok(Some(Prefix::BYTES + length))
    }

    fn is_whole(&self) -> Result<bool, Status> {
        Ok(self.announced()?.is_some_and(|bytes| self.came().len() >= bytes))
    }

    fn gather(&mut self, mut data: Bytes) -> Result<(), Status> {
        // A message of a stream may have to wait, and would keep a larger read buffer of its connection alive.
        let is_first = !self.rule.is_stream && self.came().is_empty() && self.messages == 0;
        if is_first && self.announced_in(&data)? == Some(data.len()) {
            self.whole = Some(data);
            return Ok(());
        }
        if self.whole.is_some() && !data.is_empty() {
            return Err(Status::invalid_argument(MORE_THAN_ONE));
        }
        while !data.is_empty() {
            let needed = self.gathered.len() + data.len();
            let most = match self.announced()? {
                // First the prefix, which has the length.
                None => Prefix::BYTES,
                // A stream may receive further messages before the earlier ones are answered.
                Some(_) if self.is_whole()? && self.rule.is_stream => 2 * (Prefix::BYTES + self.rule.max_bytes),
                Some(_) if self.is_whole()? => {
                    return Err(Status::invalid_argument(MORE_THAN_ONE));
                }
                Some(bytes) => bytes,
            };
            if self.gathered.len() >= most {
                return Err(Status::resource_exhausted(
                    "too many requests are open on the stream; wait for their answers",
                ));
            }
            let some = data.split_to(data.len().min(most - self.gathered.len()));
            let needed = needed.min(most);
            if self.gathered.capacity() < needed {
                // Doubled each time, so that little is copied, but never more than the length.
                let capacity = (self.gathered.capacity() * 2).clamp(needed, most);
                self.hold(capacity)?;
                let mut grown = BytesMut::with_capacity(capacity);
                grown.put_slice(&self.gathered);
                self.gathered = grown;
            }
            self.gathered.put(some);
        }
        self.announced().map(|_| ())
    }

    /// Takes the complete message, and returns its prefix unless it has to be decompressed first.
    fn take(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let bytes = self.announced()?.unwrap_or_default();
        let came = self.whole.as_ref().map_or(self.gathered.capacity(), Bytes::len);
        let is_compressed = self.came().first() == Some(&1);
        // The library copies it. The prefixes don't count, so that a message of half the room fits.
        let copied = if is_compressed { 0 } else { bytes - Prefix::BYTES };
        self.hold(came + copied - Prefix::BYTES)?;
        let mut message = self.whole.take().unwrap_or_else(|| self.gathered.split_to(bytes).freeze());
        let prefix = message.split_to(Prefix::BYTES);
        self.messages += 1;
        self.arriving = None;
        self.body.has_arrived();
        if self.rule.is_stream {
            (self.due, self.clock) = (None, None);
        }
        if is_compressed {
            self.inflating = Some(Inflating::new(message, self.rule.max_bytes));
            return Ok(None);
        }
        self.message = Some(message);
        Ok(Some(Frame::data(prefix)))
    }

    /// Decompresses a message, and returns its prefix once it is complete.
    fn inflate(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let Some(mut inflating) = self.inflating.take() else { return Ok(None) };
        // What else has come of a stream.
        let gathered = self.gathered.capacity();
        let is_last = inflating.step(|bytes| self.hold(gathered + bytes).map_err(Refused))?;
        if !is_last {
            self.inflating = Some(inflating);
            return Ok(None);
        }
        let message = inflating.into_message();
        self.hold(gathered + message.capacity() + message.len())?;
        let prefix = Prefix::of(message.len());
        self.message = Some(message.into());
        Ok(Some(Frame::data(Bytes::copy_from_slice(&prefix))))
    }

    fn hold(&mut self, bytes: usize) -> Result<(), Status> {
        let held = match &mut self.held {
            Some(held) => held.resize(bytes),
            None => self.room.try_hold(bytes).map(|held| self.held = Some(held)),
        };
        match held {
            Err(full) if bytes > 2 * Self::SMALL => {
                Err(Status::resource_exhausted(format!("{full}; {}", full.remedy())))
            }
            _ => Ok(()),
        }
    }
}

/// The library drops it as soon as it has the messages.
impl<B> Drop for Received<B> {
    fn drop(&mut self) {
        if self.body.0.has_arrived.load(Ordering::Relaxed) {
            *self.body.body() = None;
        }
    }
}

/// The bytes of a request as they arrive. Clones share them, so that what a refused call does not read can be read to
/// the end.
pub(super) struct Upload<B>(Arc<Arriving<B>>);

struct Arriving<B> {
    /// `None` once nothing more is read.
    body: Mutex<Option<B>>,
    has_arrived: AtomicBool,
}

impl<B> Clone for Upload<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B> Upload<B> {
    /// Longest time for the rest of a request to arrive.
    const REST: Duration = Duration::from_secs(1);
    /// Most bytes of it: many times as many as most requests have.
    const MAX_REST: usize = 64 << 10;

    pub(super) fn of(body: B) -> Self {
        Self(Arc::new(Arriving { body: Mutex::new(Some(body)), has_arrived: AtomicBool::new(false) }))
    }

    fn body(&self) -> MutexGuard<'_, Option<B>> {
        self.0.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a complete message has arrived.
    fn has_arrived(&self) {
        self.0.has_arrived.store(true, Ordering::Relaxed);
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> Upload<B> {
    /// True if its message was not read completely, and there may be more.
    pub(super) fn is_unfinished(&self) -> bool {
        !self.0.has_arrived.load(Ordering::Relaxed) && !self.is_end_stream()
    }

    /// Reads the rest and forgets it. A stream that ends before its request is reset, and data that is on its way to it
    /// counts as an error of the client: after 256 of them, the library would close the connection, with all other
    /// calls.
    pub(super) async fn forget_rest(mut self) {
        let rest = async {
            let mut bytes = 0;
            while bytes < Self::MAX_REST
                && let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut self).poll_frame(cx)).await
            {
                bytes += frame.data_ref().map_or(0, Bytes::len);
            }
        };
        let _ = timeout(Self::REST, rest).await;
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Upload<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.body().as_mut().map_or(Poll::Ready(None), |body| Pin::new(body).poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.body().as_ref().is_none_or(B::is_end_stream)
    }
}

/// The status of a message that was not decompressed.
struct Refused(Status);

impl From<NotInflated> for Refused {
    fn from(why: NotInflated) -> Self {
        let message = format!("the request is compressed, and {why}");
        Self(match why {
            NotInflated::TooLarge(_) => Status::out_of_range(message),
            NotInflated::Malformed(_) | NotInflated::Rest => Status::invalid_argument(message),
        })
    }
}

impl From<Refused> for Status {
    fn from(Refused(status): Refused) -> Self {
        status
    }
}

const MORE_THAN_ONE: &str = "the request has more than one message; send one";

type Failure = Box<dyn Error + Send + Sync>;

impl<B> Received<B>
where
    B: http_body::Body<Data = Bytes, Error: Into<Failure>> + Unpin,
{
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame<Bytes>>, Failure>> {
        if let Some(message) = self.message.take() {
            return Poll::Ready(Ok(Some(Frame::data(message))));
        }
        loop {
            if self.inflating.is_some() {
                let Some(prefix) = self.inflate()? else {
                    // Other tasks have their turn.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                };
                return Poll::Ready(Ok(Some(prefix)));
            }
            let is_whole = self.is_whole()?;
            if is_whole && self.taking.poll_turn(cx, self.messages).is_ready() {
                let Some(prefix) = self.take()? else { continue };
                return Poll::Ready(Ok(Some(prefix)));
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(frame)) => {
                    // Trailers have no meaning in a request.
                    if let Ok(data) = frame.map_err(Into::into)?.into_data() {
                        self.gather(data)?;
                    }
                }
                Poll::Ready(None) if is_whole => return Poll::Pending,
                Poll::Ready(None) if self.came().is_empty() => {
                    if self.messages == 0 && !self.rule.is_stream {
                        let status =
                            Status::invalid_argument("the request has no message; send one, even if it is empty");
                        return Poll::Ready(Err(status.into()));
                    }
                    return Poll::Ready(Ok(None));
                }
                Poll::Ready(None) => {
                    return Poll::Ready(Err(Status::invalid_argument("the request ends inside a message").into()));
                }
                Poll::Pending => {
                    if !is_whole && !self.came().is_empty() {
                        self.due.get_or_insert_with(|| Instant::now() + Self::PATIENCE);
                    }
                    let Some(due) = self.due else { return Poll::Pending };
                    ready!(self.clock.get_or_insert_with(|| Box::pin(sleep_until(due))).as_mut().poll(cx));
                    let message = format!("the request did not arrive completely within {:?}", Self::PATIENCE);
                    return Poll::Ready(Err(Status::deadline_exceeded(message).into()));
                }
            }
        }
    }
}

impl<B> http_body::Body for Received<B>
where
    B: http_body::Body<Data = Bytes, Error: Into<Failure>> + Unpin,
{
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        let next = ready!(self.poll_next(cx)).map_err(|failure| match failure.downcast::<Status>() {
            Ok(status) => self.taking.refuse(*status).into(),
            Err(failure) => failure,
        });
        Poll::Ready(next.transpose())
    }

    fn is_end_stream(&self) -> bool {
        let may_end = self.rule.is_stream || self.messages > 0;
        let is_passed_on = self.came().is_empty() && self.inflating.is_none() && self.message.is_none();
        may_end && is_passed_on && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, io::Write};

    use flate2::{Compression, write::GzEncoder};
    use futures_util::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
    use tonic::Code;

    use super::*;

    const ONE: Rule = Rule { max_bytes: 40 << 10, is_stream: false };
    const MANY: Rule = Rule { max_bytes: 1 << 10, is_stream: true };

    /// A request whose body stops after these pieces.
    fn unfinished(rule: Rule, room: &Memory, pieces: &[&[u8]]) -> Received<BoxBody<Bytes, Status>> {
        let pieces: Vec<_> = pieces.iter().map(|it| Ok(Frame::data(Bytes::copy_from_slice(it)))).collect();
        let body = StreamBody::new(stream::iter(pieces).chain(stream::pending()));
        Received::new(Upload::of(BoxBody::new(body)), rule, true, room.clone(), None, Arc::default(), None)
    }

    fn prefix(bytes: u32) -> [u8; Prefix::BYTES] {
        let [a, b, c, d] = bytes.to_be_bytes();
        [0, a, b, c, d]
    }

    /// The next piece that is passed on.
    async fn next<B>(received: &mut Received<B>) -> Result<Bytes, Code>
    where
        B: http_body::Body<Data = Bytes, Error: Into<Failure>> + Unpin,
    {
        let frame = received.frame().await.unwrap();
        frame
            .map(|frame| frame.into_data().unwrap())
            .map_err(|failure| failure.downcast_ref::<Status>().unwrap().code())
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_of_all_requests_is_bounded_until_they_end() {
        let room = Memory::whole(60 << 10);
        let begun = [&prefix(40 << 10)[..], &vec![0; 36 << 10]].concat();
        let mut first = unfinished(ONE, &room, &[&begun]);
        // It holds memory until it is complete.
        assert!(timeout(Duration::from_secs(1), first.frame()).await.is_err());
        let mut second = unfinished(ONE, &room, &[&begun]);
        assert_eq!(next(&mut second).await, Err(Code::ResourceExhausted));
        // A small message needs no memory.
        let mut small = unfinished(ONE, &room, &[&prefix(1), &[7]]);
        assert_eq!((next(&mut small).await.unwrap().len(), next(&mut small).await.unwrap().len()), (Prefix::BYTES, 1));
        drop((first, small));
        assert!(timeout(Duration::from_secs(1), unfinished(ONE, &room, &[&begun]).frame()).await.is_err());
    }

    #[tokio::test]
    async fn a_message_in_one_piece_is_passed_on_unchanged() {
        let room = Memory::whole(1 << 20);
        let piece = Bytes::from([&prefix(3)[..], &[1, 2, 3]].concat());
        let body = StreamBody::new(stream::iter([Ok::<_, Status>(Frame::data(piece.clone()))]));
        let mut received = Received::new(Upload::of(body), ONE, false, room.clone(), None, Arc::default(), None);
        assert_eq!(next(&mut received).await.unwrap()[..], prefix(3));
        let message = next(&mut received).await.unwrap();
        assert_eq!((&message[..], message.as_ptr()), (&[1, 2, 3][..], piece[Prefix::BYTES..].as_ptr()));
        assert!(received.frame().await.is_none());
        // A further message is not passed on either.
        let mut two = unfinished(ONE, &room, &[&[&prefix(1)[..], &[1]].concat(), &prefix(0)]);
        next(&mut two).await.unwrap();
        next(&mut two).await.unwrap();
        assert_eq!(next(&mut two).await, Err(Code::InvalidArgument));
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_reserved_for_received_bytes_not_for_announced_ones() {
        let room = Memory::whole(1 << 20);
        let mut begun = unfinished(ONE, &room, &[&prefix(40 << 10), &[0; 100]]);
        assert!(timeout(Duration::from_secs(1), begun.frame()).await.is_err());
        assert!(room.held() <= 2 * (Prefix::BYTES + 100), "{}", room.held());
        let mut too_large = unfinished(ONE, &room, &[&prefix((40 << 10) + 1)]);
        assert_eq!(next(&mut too_large).await, Err(Code::OutOfRange));
    }

    #[tokio::test]
    async fn a_malformed_message_is_an_error_of_the_client() {
        let room = Memory::whole(1 << 20);
        let mut compressed = unfinished(ONE, &room, &[&[1, 0, 0, 0, 1, 0]]);
        compressed.is_gzip = false;
        assert_eq!(next(&mut compressed).await, Err(Code::Unimplemented));
        assert_eq!(next(&mut unfinished(ONE, &room, &[&[1, 0, 0, 0, 1, 0]])).await, Err(Code::InvalidArgument));
        assert_eq!(next(&mut unfinished(ONE, &room, &[b"<html>"])).await, Err(Code::InvalidArgument));
        for (rule, expected) in [(ONE, Some(Code::InvalidArgument)), (MANY, None)] {
            let nothing = http_body_util::Empty::new().map_err(|infallible: Infallible| match infallible {});
            let mut received =
                Received::new(Upload::of(nothing), rule, false, room.clone(), None, Arc::default(), None);
            // The library does not read a body that has ended.
            assert_eq!(received.is_end_stream(), expected.is_none());
            let next = received.frame().await.map(Result::unwrap_err);
            assert_eq!(next.map(|failure| failure.downcast_ref::<Status>().unwrap().code()), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_does_not_end_in_time_is_aborted() {
        let room = Memory::whole(1 << 20);
        for rule in [ONE, MANY] {
            let begun = Instant::now();
            assert_eq!(next(&mut unfinished(rule, &room, &[&prefix(100), &[0]])).await, Err(Code::DeadlineExceeded));
            assert_eq!(begun.elapsed().as_secs(), 30);
        }
        assert_eq!(next(&mut unfinished(ONE, &room, &[])).await, Err(Code::DeadlineExceeded));
        // A stream may be silent, before its first message and between two.
        let mut silent = unfinished(MANY, &room, &[]);
        assert!(timeout(Duration::from_hours(1), silent.frame()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn messages_of_a_stream_wait_until_the_earlier_ones_are_answered() {
        let room = Memory::whole(1 << 20);
        let both = [&prefix(1)[..], &[1], &prefix(1), &[2]].concat();
        let mut received = unfinished(MANY, &room, &[&both]);
        let taking = received.taking.clone();
        next(&mut received).await.unwrap();
        assert_eq!(next(&mut received).await.unwrap()[..], [1]);
        assert!(timeout(Duration::from_hours(1), received.frame()).await.is_err());
        let answer = taking.piece(Bytes::from_static(b"1"), None);
        taking.answered();
        assert!(timeout(Duration::from_hours(1), received.frame()).await.is_err(), "it is not read");
        drop(answer);
        next(&mut received).await.unwrap();
        assert_eq!(next(&mut received).await.unwrap()[..], [2]);
        // And data that is sent ahead is limited.
        let message = [&prefix(1000)[..], &[0; 1000]].concat();
        let mut eager = unfinished(MANY, &room, &[&message, &message, &message, &message]);
        next(&mut eager).await.unwrap();
        next(&mut eager).await.unwrap();
        assert_eq!(next(&mut eager).await, Err(Code::ResourceExhausted));
    }

    /// A message of this number of zeros, compressed, with its prefix.
    fn zeros(bytes: usize) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&vec![0; bytes]).unwrap();
        let compressed = encoder.finish().unwrap();
        let mut prefix = prefix(compressed.len().try_into().unwrap());
        prefix[0] = 1;
        [&prefix[..], &compressed].concat()
    }

    #[tokio::test]
    async fn a_compressed_message_is_passed_on_uncompressed_and_keeps_its_limit() {
        let room = Memory::whole(1 << 20);
        for (rule, bytes) in [(ONE, 40 << 10), (ONE, 0), (MANY, 1 << 10)] {
            let mut received = unfinished(rule, &room, &[&zeros(bytes)]);
            assert_eq!(next(&mut received).await.unwrap()[..], prefix(bytes.try_into().unwrap()));
            assert!(!received.is_end_stream());
            if bytes > 0 {
                assert_eq!(next(&mut received).await.unwrap(), vec![0; bytes]);
            }
            drop(received);
            assert_eq!(next(&mut unfinished(rule, &room, &[&zeros(rule.max_bytes + 1)])).await, Err(Code::OutOfRange));
        }
        // Its memory is reserved as it grows.
        let bomb = zeros(40 << 10);
        assert!(bomb.len() < 1 << 10);
        let room = Memory::whole(30 << 10);
        assert_eq!(next(&mut unfinished(ONE, &room, &[&bomb])).await, Err(Code::ResourceExhausted));
        assert_eq!(room.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn compressed_messages_of_a_stream_follow_each_other() {
        let room = Memory::whole(1 << 20);
        let mut received = unfinished(MANY, &room, &[&[zeros(100), zeros(50)].concat()]);
        let taking = received.taking.clone();
        next(&mut received).await.unwrap();
        assert_eq!(next(&mut received).await.unwrap().len(), 100);
        assert!(timeout(Duration::from_hours(1), received.frame()).await.is_err());
        taking.answered();
        next(&mut received).await.unwrap();
        assert_eq!(next(&mut received).await.unwrap().len(), 50);
    }
}
