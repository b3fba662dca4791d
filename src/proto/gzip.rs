//! Compressed messages in gRPC: gzip is accepted from either side, and never sent.
//!
//! <https://github.com/grpc/grpc/blob/master/doc/compression.md>

use std::{
    io::{Cursor, Read},
    sync::Arc,
};

use bytes::Bytes;
use flate2::bufread::GzDecoder;
use tonic::codegen::http::{HeaderMap, HeaderName, HeaderValue};

/// The encoding of compressed messages that follow these headers.
const ENCODING: &str = "grpc-encoding";

/// The header that offers to accept compressed messages.
pub const ACCEPTED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("grpc-accept-encoding"), HeaderValue::from_static("gzip"));

/// True if compressed messages after these headers are in gzip.
pub fn is_announced(headers: &HeaderMap) -> bool {
    headers.get(ENCODING).is_some_and(|encoding| encoding == "gzip")
}

/// Removes the encoding from the headers of a request whose messages are passed on uncompressed.
pub fn remove(headers: &mut HeaderMap) {
    headers.remove(ENCODING);
}

/// A message that is being decompressed, step by step, so that other tasks run in between. A few bytes may become very
/// many: more than the limit are never made.
#[derive(Debug)]
pub struct Inflating {
    decoder: GzDecoder<Cursor<Bytes>>,
    compressed: usize,
    max: usize,
    /// The message so far.
    message: Vec<u8>,
}

/// Why a message can't be decompressed.
#[derive(Debug, thiserror::Error)]
pub enum NotInflated {
    /// It has more bytes than the limit.
    #[error("it has more than {0} bytes when decompressed, which is the limit")]
    TooLarge(usize),
    /// It is not in gzip.
    #[error("it is not gzip: {0}")]
    Malformed(Arc<std::io::Error>),
    /// Other bytes follow the end of its gzip.
    #[error("it is not gzip: bytes follow its end")]
    Rest,
}

impl Inflating {
    /// Bytes that one step adds, in a fraction of a millisecond. Smaller messages take one step.
    const STEP: usize = 64 << 10;
    /// Smallest allocation.
    const LEAST: usize = 1 << 10;
    /// Bytes of the decoder, which counts between steps.
    const DECODER: usize = 48 << 10;

    /// This message, which has at most `max` bytes when decompressed.
    pub fn new(compressed: Bytes, max: usize) -> Self {
        let len = compressed.len();
        Self { decoder: GzDecoder::new(Cursor::new(compressed)), compressed: len, max, message: Vec::new() }
    }

    /// Takes a step, and returns true if it was the last one. `hold` makes room for this number of bytes, compressed or
    /// not, before they are kept.
    ///
    /// # Errors
    /// The message is malformed or too large, or there is no room.
    pub fn step<E: From<NotInflated>>(&mut self, mut hold: impl FnMut(usize) -> Result<(), E>) -> Result<bool, E> {
        let before = self.message.len();
        while self.message.len() < before + Self::STEP {
            let len = self.message.len();
            if len == self.message.capacity() {
                // Doubled each time, so that little is copied. One byte more than the limit shows that it is exceeded.
                let capacity = (2 * len).max(Self::LEAST).min(self.max + 1);
                let between_steps = if capacity > Self::STEP { Self::DECODER } else { 0 };
                hold(self.compressed + capacity + between_steps)?;
                self.message.reserve_exact(capacity - len);
            }
            self.message.resize(self.message.capacity().min(before + Self::STEP), 0);
            let read = self.decoder.read(&mut self.message[len..]);
            self.message.truncate(len + read.as_ref().map_or(0, |read| *read));
            if read.map_err(|error| NotInflated::Malformed(Arc::new(error)))? == 0 {
                let is_end = self.decoder.get_ref().position() == self.compressed as u64;
                return if is_end { Ok(true) } else { Err(NotInflated::Rest.into()) };
            }
            if self.message.len() > self.max {
                return Err(NotInflated::TooLarge(self.max).into());
            }
        }
        Ok(false)
    }

    /// The message, once the last step was taken.
    pub fn into_message(self) -> Vec<u8> {
        self.message
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn compressed(message: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(message).unwrap();
        encoder.finish().unwrap()
    }

    /// The message, and the most bytes that were held for it.
    fn inflated(compressed: &[u8], max: usize) -> (Result<Vec<u8>, NotInflated>, usize) {
        let mut inflating = Inflating::new(Bytes::copy_from_slice(compressed), max);
        let mut most = 0;
        loop {
            let step = inflating.step(|bytes| {
                most = most.max(bytes);
                Ok::<_, NotInflated>(())
            });
            match step {
                Ok(false) => {}
                Ok(true) => return (Ok(inflating.into_message()), most),
                Err(error) => return (Err(error), most),
            }
        }
    }

    #[test]
    fn a_message_is_decompressed_up_to_its_limit() {
        for bytes in [0, 1, 1000, Inflating::STEP, Inflating::STEP + 1, 1 << 20] {
            let message: Vec<_> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let gzip = compressed(&message);
            assert_eq!(inflated(&gzip, bytes).0.unwrap(), message, "{bytes}");
            if bytes > 0 {
                assert!(matches!(inflated(&gzip, bytes - 1).0, Err(NotInflated::TooLarge(_))), "{bytes}");
            }
        }
    }

    #[test]
    fn a_bomb_takes_no_more_memory_than_the_limit() {
        const MAX: usize = 1 << 20;
        let bomb = compressed(&vec![0; 64 << 20]);
        assert!(bomb.len() < 100 << 10, "{}", bomb.len());
        let (refused, most) = inflated(&bomb, MAX);
        assert!(matches!(refused, Err(NotInflated::TooLarge(MAX))), "{refused:?}");
        assert!(most <= bomb.len() + MAX + 1 + Inflating::DECODER, "{most}");
    }

    #[test]
    fn other_bytes_are_not_gzip() {
        let gzip = compressed(b"message");
        let mut damaged = gzip.clone();
        *damaged.last_mut().unwrap() ^= 1;
        for bytes in [&b""[..], b"no gzip", &gzip[..gzip.len() - 1], &damaged, &[&gzip[..], b"x"].concat()] {
            let refused = inflated(bytes, 1000).0.unwrap_err();
            assert!(refused.to_string().starts_with("it is not gzip: "), "{refused}");
        }
    }
}
