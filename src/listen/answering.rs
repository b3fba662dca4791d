//! What answers cost until their clients have taken them: each one alone is bounded by what its handler answers, and all
//! of them together here.

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
    rooms::{Kept, Room},
    streams::Taking,
};
use crate::{memory::Held, proto::framing};

/// The body of an answer: in small pieces, and with room for its bytes as long as the client has not taken them.
///
/// A message that finds no room is refused. Those of a stream that has `patience` are not even made before there is room,
/// except for the first.
pub(super) struct Answer {
    /// `None` once it has ended.
    body: Option<Body>,
    room: Arc<Room>,
    taking: Arc<Taking>,
    patience: Patience,
    /// If it is that of a service beside.
    beside: Option<Beside>,
    /// What is left of the message that is being given.
    rest: Bytes,
    kept: Option<Arc<Kept>>,
}

/// Whether a message waits for room.
pub(super) enum Patience {
    /// It is refused if there is none.
    None,
    /// The first one is refused, further ones wait.
    AfterFirst,
    /// It waits if there is none.
    Some,
    /// It waits.
    Waiting(BoxFuture<'static, Held>),
}

impl Answer {
    /// What the library keeps of an answer beyond what its client wants now.
    const PIECE: usize = 16 << 10;
    /// Bytes of a message that always fits: what a stream costs contains it.
    pub(super) const SMALL: usize = 8 << 10;
    /// Room that must be there before a further message is made: as much as clients take by default.
    pub(super) const LARGEST: usize = 4 << 20;

    pub(super) fn new(
        body: Body,
        room: Arc<Room>,
        taking: Arc<Taking>,
        patience: Patience,
        beside: Option<Beside>,
    ) -> Self {
        Self { body: Some(body), room, taking, patience, beside, rest: Bytes::new(), kept: None }
    }

    /// Room for a message that would wait for it.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Option<Held>> {
        let largest = Self::LARGEST.min(self.room.max());
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

    /// Takes the room of a message, of that which was held before it was made.
    fn hold(&mut self, bytes: usize, before: Option<Held>) -> Result<(), Status> {
        let held = match before {
            Some(mut held) => held.resize(bytes).map(|()| held),
            None => self.room.try_hold(bytes),
        };
        self.kept = match held {
            Ok(held) => Some(Arc::new(self.room.keep(held, &self.taking))),
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
        // Nothing more is answered: what waits for its turn is to see that.
        self.taking.answered();
    }
}
