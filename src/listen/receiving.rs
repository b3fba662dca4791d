//! What requests cost while they are being received: each one alone is bounded by the size of a message, and all of
//! them together here.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body, codegen::http::Request};

use crate::memory::{Held, Memory};

/// Room for the requests that are being received.
#[derive(Clone)]
pub(crate) struct Receiving {
    room: Memory,
}

impl Receiving {
    /// How long a request may take to come: enough for the largest one over a slow line.
    const PATIENCE: Duration = Duration::from_secs(30);
    /// Requests of other services may be streams, which stay open, and are small.
    const BOUNDED: &str = "/dreamnet.";

    /// All of them within this limit.
    pub(crate) fn new(room: Memory) -> Self {
        Self { room }
    }

    /// Has the body of a request take its room as it comes.
    pub(crate) fn bound(&self, request: Request<Body>) -> Request<Body> {
        if !request.uri().path().starts_with(Self::BOUNDED) || request.body().is_end_stream() {
            return request;
        }
        request.map(|body| {
            let ends = Box::pin(sleep(Self::PATIENCE));
            Body::new(Bounded { body, room: self.room.clone(), taken: None, ends })
        })
    }
}

struct Bounded {
    body: Body,
    room: Memory,
    taken: Option<Held>,
    ends: Pin<Box<Sleep>>,
}

impl Bounded {
    fn take(&mut self, bytes: usize) -> Result<(), Status> {
        let taken = match &mut self.taken {
            Some(taken) => taken.grow(bytes),
            None => self.room.try_hold(bytes).map(|held| self.taken = Some(held)),
        };
        taken.map_err(|full| Status::resource_exhausted(format!("{full}; try again later")))
    }
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let taken = frame.data_ref().map_or(Ok(()), |data| self.take(data.len()));
                Poll::Ready(Some(taken.map(|()| frame)))
            }
            Poll::Pending if self.ends.as_mut().poll(cx).is_ready() => {
                let message = format!("the request has not come whole within {:?}", Receiving::PATIENCE);
                Poll::Ready(Some(Err(Status::deadline_exceeded(message))))
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};
    use tonic::Code;

    use super::*;

    /// A request of which so much comes, and then nothing.
    fn half_sent(path: &str, bytes: usize) -> Request<Body> {
        let frames = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(vec![0; bytes])))]).chain(stream::pending());
        Request::builder().uri(path).body(Body::new(StreamBody::new(frames))).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn all_that_come_have_bounded_room_until_they_are_gone() {
        let receiving = Receiving::new(Memory::whole(10 << 10));
        let mut first = receiving.bound(half_sent("/dreamnet.a/B", 8 << 10));
        assert!(first.body_mut().frame().await.unwrap().is_ok());
        let mut second = receiving.bound(half_sent("/dreamnet.a/B", 8 << 10));
        assert_eq!(second.body_mut().frame().await.unwrap().unwrap_err().code(), Code::ResourceExhausted);
        drop(first);
        let mut third = receiving.bound(half_sent("/dreamnet.a/B", 8 << 10));
        assert!(third.body_mut().frame().await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_end_is_ended() {
        let receiving = Receiving::new(Memory::whole(10 << 10));
        let mut request = receiving.bound(half_sent("/dreamnet.a/B", 1));
        assert!(request.body_mut().frame().await.unwrap().is_ok());
        assert_eq!(request.body_mut().frame().await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
        let mut stream = receiving.bound(half_sent("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 1));
        assert!(stream.body_mut().frame().await.unwrap().is_ok());
        let patience = Receiving::PATIENCE * 10;
        assert!(tokio::time::timeout(patience, stream.body_mut().frame()).await.is_err(), "it stays open");
    }
}
