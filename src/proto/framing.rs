//! The framing of messages in gRPC: each follows a flag, which says whether it is compressed, and its length; the
//! status is last.
//!
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use prost::Message;
use tonic::{Status, codegen::http::HeaderMap};

/// The prefix of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// 0 for an uncompressed message, 1 for a compressed one.
    pub flag: u8,
    /// Bytes of the message.
    pub length: usize,
}

impl Prefix {
    /// Bytes of the prefix.
    pub const BYTES: usize = 5;

    /// Parses these bytes.
    #[must_use]
    pub fn read([flag, length @ ..]: [u8; Self::BYTES]) -> Self {
        Self { flag, length: u32::from_be_bytes(length) as usize }
    }

    /// The bytes of the prefix of an uncompressed message with this length.
    #[must_use]
    pub fn of(length: usize) -> [u8; Self::BYTES] {
        // Requests and answers are far below 4 GiB.
        let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        [0, a, b, c, d]
    }
}

/// Encodes a message with its prefix.
pub fn framed(message: &impl Message) -> Bytes {
    let mut framed = BytesMut::new();
    put(&mut framed, message);
    framed.freeze()
}

/// Adds the prefix to an encoded message, or to other bytes that are sent as one.
#[must_use]
pub fn framed_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    begin(&mut framed, message.len());
    framed.extend_from_slice(message);
    framed.freeze()
}

/// Appends a message with its prefix to others.
pub fn put(gathered: &mut BytesMut, message: &impl Message) {
    begin(gathered, message.encoded_len());
    // The buffer has enough capacity.
    let _ = message.encode(gathered);
}

fn begin(gathered: &mut BytesMut, length: usize) {
    gathered.reserve(Prefix::BYTES + length);
    gathered.extend_from_slice(&Prefix::of(length));
}

/// The trailers of an answer.
///
/// # Errors
/// The status can't be encoded in headers.
pub fn trailers<D>(status: &Status) -> Result<Frame<D>, Status> {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers)?;
    Ok(Frame::trailers(trailers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_framed_by_its_length() {
        let message = prost_types::Duration { seconds: 1, nanos: 0 };
        let framed = framed(&message);
        let (prefix, rest) = framed.split_first_chunk().unwrap();
        assert_eq!(Prefix::read(*prefix), Prefix { flag: 0, length: message.encoded_len() });
        assert_eq!((rest.to_vec(), &framed), (message.encode_to_vec(), &framed_bytes(&message.encode_to_vec())));
    }
}
