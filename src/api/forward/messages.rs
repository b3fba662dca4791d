//! The messages in the body of an answer of the leader, for calls that read them here: those of the replica itself, and
//! those of callers of the admin address, which get JSON.

use std::{future::poll_fn, marker::PhantomData, pin::Pin};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::Body as _;
use prost::Message;
use tonic::{Status, body::Body, codegen::http};

use crate::{
    memory::{Held, Memory},
    proto::framing::Prefix,
};

/// The messages of one answer, and its status after them.
pub(super) struct Messages<A> {
    body: Body,
    /// Received bytes that are not in a message yet.
    gathered: BytesMut,
    /// Memory for the messages, which keep theirs.
    memory: Memory,
    held: Option<Held>,
    of: PhantomData<fn() -> A>,
}

impl<A: Message + Default> Messages<A> {
    /// Those of this response.
    ///
    /// # Errors
    /// The call has failed, with this status, and has no messages.
    pub(super) fn of(response: http::Response<Body>, memory: Memory) -> Result<Self, Status> {
        let (head, body) = response.into_parts();
        match Status::from_header_map(&head.headers) {
            Some(status) if status.code() != tonic::Code::Ok => Err(status),
            _ => Ok(Self { body, gathered: BytesMut::new(), memory, held: None, of: PhantomData }),
        }
    }

    /// The next message. `None` if the call has ended without an error.
    ///
    /// # Errors
    /// The status of the call. Or there is no memory for the message, or it is malformed.
    pub(super) async fn next(&mut self) -> Result<Option<A>, Status> {
        loop {
            if let Some(message) = self.take()? {
                let message = A::decode(message);
                return message.map(Some).map_err(|error| Status::internal(format!("the leader's answer: {error}")));
            }
            let frame = poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await;
            let Some(frame) = frame.transpose()? else { return Ok(None) };
            match frame.into_data() {
                Ok(data) => self.gather(&data)?,
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return match Status::from_header_map(&trailers) {
                        Some(status) if status.code() != tonic::Code::Ok => Err(status),
                        _ => Ok(None),
                    };
                }
            }
        }
    }

    /// The only message.
    ///
    /// # Errors
    /// Those of [`Messages::next`]. Or there is no message, or more than one.
    pub(super) async fn only(mut self) -> Result<A, Status> {
        let only = self.next().await?.ok_or_else(|| Status::internal("the leader's answer has no message"))?;
        match self.next().await? {
            None => Ok(only),
            Some(_) => Err(Status::internal("the leader's answer has more than one message")),
        }
    }

    /// Bytes of the current message, with its prefix, once that is known.
    fn announced(&self) -> Option<usize> {
        self.gathered.first_chunk().map(|prefix| Prefix::BYTES + Prefix::read(*prefix).length)
    }

    fn gather(&mut self, data: &[u8]) -> Result<(), Status> {
        /// Bytes that need no memory: those in flight have theirs.
        const SMALL: usize = 8 << 10;
        let bytes = self.gathered.len() + data.len();
        if bytes > SMALL {
            // All of a message at once, so that it is not moved while it arrives.
            let bytes = self.announced().unwrap_or_default().max(bytes);
            let held = match &mut self.held {
                Some(held) => held.resize(bytes),
                None => self.memory.try_hold(bytes).map(|held| self.held = Some(held)),
            };
            held.map_err(|full| Status::resource_exhausted(format!("{full}; {}", full.remedy())))?;
            self.gathered.reserve(bytes - self.gathered.len());
        }
        self.gathered.put_slice(data);
        Ok(())
    }

    /// A complete message, which keeps its memory.
    fn take(&mut self) -> Result<Option<Bytes>, Status> {
        let Some(bytes) = self.announced().filter(|bytes| self.gathered.len() >= *bytes) else { return Ok(None) };
        if self.gathered[0] != 0 {
            return Err(Status::internal("the leader's answer is compressed, which was not asked for"));
        }
        let held = self.held.as_mut().map(|held| held.split(bytes));
        let message = self.gathered.split_to(bytes).freeze().slice(Prefix::BYTES..);
        if self.gathered.is_empty() {
            // Others wait for the next message, which may take long.
            (self.gathered, self.held) = (BytesMut::new(), None);
        }
        Ok(Some(match held {
            Some(held) => held.around(message),
            None => message,
        }))
    }
}
