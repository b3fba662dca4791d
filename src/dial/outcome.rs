//! What a gRPC status means for a call.

use std::error::Error;

use tonic::Status;

use crate::{
    model::{Code, excerpt},
    ports::CallError,
};

/// How tonic begins the message of the OUT_OF_RANGE status that it makes up for an answer over the limit.
const TOO_LARGE: &str = "Error, decoded message length too large";

/// The most bytes of a peer's message that are kept. A record takes no more, and all that tells of a call holds it.
const MAX_MESSAGE: usize = 1 << 10;

/// Reads a status. `late` says that the deadline had passed when it came.
pub(super) fn of(status: &Status, late: bool) -> CallError {
    // The peer's own words come without a source; what the client makes up for a broken connection has one.
    let is_local = status.source().is_some();
    let code = match Code::from_number(status.code() as i32) {
        // Servers answer an expired deadline with either.
        Code::Cancelled if late => Code::DeadlineExceeded,
        // The connection broke, and gRPC's word for that is UNAVAILABLE. RESOURCE_EXHAUSTED: because of what another
        // call on it was sent.
        Code::Unknown | Code::Cancelled | Code::ResourceExhausted if is_local => Code::Unavailable,
        Code::OutOfRange if status.message().starts_with(TOO_LARGE) => Code::ResourceExhausted,
        // An error by definition, though the peer says otherwise.
        Code::Ok => Code::Internal,
        code => code,
    };
    let message = match status.source() {
        Some(source) => chain(source),
        None => excerpt(status.message(), MAX_MESSAGE).to_owned(),
    };
    CallError { code, message }
}

/// An error and what caused it, in one line, without the words that say nothing.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        let says_nothing = text == "transport error" || text.is_empty();
        if !says_nothing && !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
        next = error.source();
    }
    let text = if parts.is_empty() { error.to_string() } else { parts.join(": ") };
    // What rustls says to an answer that is no TLS.
    if text.contains("InvalidContentType") { format!("it does not speak TLS, so give http:// ({text})") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_words_count_but_for_an_expired_deadline() {
        let peer = |code, late| of(&Status::new(code, "m"), late).code;
        assert_eq!(peer(tonic::Code::Cancelled, false), Code::Cancelled);
        assert_eq!(peer(tonic::Code::Cancelled, true), Code::DeadlineExceeded);
        assert_eq!(peer(tonic::Code::Unknown, false), Code::Unknown);
        assert_eq!(peer(tonic::Code::OutOfRange, false), Code::OutOfRange);
    }

    #[test]
    fn of_a_long_message_the_beginning_is_kept() {
        let kept = of(&Status::internal("ß".repeat(10_000)), false).message;
        assert_eq!((kept.len(), kept.capacity()), (MAX_MESSAGE, MAX_MESSAGE));
    }

    #[test]
    fn a_broken_connection_is_unavailable_and_says_why() {
        let io = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "reset by peer");
        let error = of(&Status::from_error(Box::new(io)), false);
        assert_eq!((error.code, error.message.as_str()), (Code::Unavailable, "reset by peer"));
    }
}
