//! Limits the memory of answers until their clients have read them: the handler limits each answer, and this module all
//! of them together.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http_body::Frame;
use tonic::{Status, body::Body};

use super::{
    connections::Beside,
    rooms::{Kept, LARGEST, Room},
    streams::Taking,
};
use crate::{memory::Held, proto::framing};

/// The body of an answer: in small pieces, with memory for its bytes until the client has read them.
///
/// A message without memory is refused. Messages of a stream with `patience`, except for the first, are not made before
/// there is memory.
pub(super) struct Answer {
    /// `None` once it has ended.
    body: Option<Body>,
    room: Arc<Room>,
    taking: Arc<Taking>,
    patience: Patience,
    /// Set for a service besides the own ones, such as health.
    beside: Option<Beside>,
    /// The rest of the current message.
    rest: Bytes,
    kept: Option<Arc<Kept>>,
}

/// The way in which a message waits for memory.
pub(super) enum Patience {
    /// Without memory, it is refused.
    None,
    /// Without memory, the first message is refused, and further ones wait.
    AfterFirst,
    /// Without memory, it waits.
    Some,
    /// It waits.
    Waiting(BoxFuture<'static, Held>),
}

impl Answer {
    /// Bytes of an answer that the library buffers beyond the client's window.
    const PIECE: usize = 16 << 10;
    /// Bytes of a message that needs no reservation: they are included in the cost of a stream.
    pub(super) const SMALL: usize = 8 << 10;

    pub(super) fn new(
        body: Body,
        room: Arc<Room>,
        taking: Arc<Taking>,
        patience: Patience,
        beside: Option<Beside>,
    ) -> Self {
        Self { body: Some(body), room, taking, patience, beside, rest: Bytes::new(), kept: None }
    }

    /// Reserves memory for a message that can wait.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Option<Held>> {
        let largest = LARGEST.min(self.room.max());
        if let Patience::Some = self.patience {
            if let Ok(held) = self.room.try_hold(largest) {
                return Poll::Ready(Some(held));
            }
            let room = self.room.clone();
            self.patience = Patience::Waiting(async move { room.hold(largest).await }.boxed());
        }
        if let Patience::Waiting(room) = &mut self.patience {
            let held = ready!(room.poll_unpin(cx));
            self.patience = Patience::Some;
            return Poll::Ready(Some(held));
        }
        Poll::Ready(None)
    }

    /// Takes the memory of a message from the part that was reserved before it was made.
    fn hold(&mut self, bytes: usize, before: Option<Held>) -> Result<(), Status> {
        let held = match before {
            Some(mut held) => held.resize(bytes).map(|()| held),
            None => self.room.try_hold(bytes),
        };
        self.kept = match held {
            Ok(held) => Some(Arc::new(self.room.keep(held, self.taking.abort()))),
            Err(_) if bytes <= Self::SMALL => None,
            Err(full) => {
                return Err(Status::resource_exhausted(format!(
                    "an answer of {bytes} bytes has no room: {full}; {}",
                    full.remedy()
                )));
            }
        };
        Ok(())
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if !this.rest.is_empty() {
                let piece = this.rest.split_to(this.rest.len().min(Self::PIECE));
                let kept = if this.rest.is_empty() { this.kept.take() } else { this.kept.clone() };
                return Poll::Ready(Some(Ok(Frame::data(this.taking.piece(piece, kept)))));
            }
            if this.body.is_none() {
                return Poll::Ready(None);
            }
            let before = ready!(this.poll_room(cx));
            let Some(body) = &mut this.body else { return Poll::Ready(None) };
            let Some(frame) = ready!(Pin::new(body).poll_frame(cx)?) else {
                this.body = None;
                return Poll::Ready(None);
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(trailers) => {
                    this.body = None;
                    let refused = this.taking.refused().map(framing::trailers).transpose()?;
                    return Poll::Ready(Some(Ok(refused.unwrap_or(trailers))));
                }
            };
            if let Patience::AfterFirst = this.patience {
                this.patience = Patience::Some;
            }
            if let Err(refused) = this.hold(data.len(), before) {
                this.body = None;
                return Poll::Ready(Some(framing::trailers(&refused)));
            }
            this.rest = data;
            this.taking.answered();
            if let Some(beside) = &this.beside {
                beside.was_used();
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.as_ref().is_none_or(Body::is_end_stream)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // The answer has ended, which waiters must see.
        self.taking.answered();
    }
}
