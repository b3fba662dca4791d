//! Maps results in HTTP/2 and gRPC to the result of a call.
//!
//! - gRPC over HTTP/2: <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md> (status, messages, error codes)
//! - answers without a gRPC status: <https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md>
//! - transparent retries: <https://github.com/grpc/proposal/blob/master/A6-client-retries.md>

use std::{error::Error, io};

use h2::Reason;
use http::{HeaderMap, StatusCode, header::CONTENT_TYPE};

use super::tls::tls_in_words;
use crate::{
    model::Code,
    ports::{CallError, ConnectionFault},
};

/// The status in headers or trailers; `None` if they contain no status. `late` is true if they came after the deadline.
pub(super) fn of_status(headers: &HeaderMap, late: bool) -> Option<Result<(), CallError>> {
    let status = headers.get("grpc-status")?.as_bytes();
    let message = headers.get("grpc-message").map(|it| percent_decoded(it.as_bytes())).unwrap_or_default();
    let number = std::str::from_utf8(status).ok().and_then(|text| text.parse().ok());
    let code = number.map_or(Code::Unknown, Code::from_number);
    let message = if matches!(number, Some(0..=16)) {
        message
    } else {
        // The value is not a code, so it is shown in the message.
        let told = String::from_utf8_lossy(excerpt_of(status, 20));
        let separator = if message.is_empty() { "" } else { ": " };
        format!("its grpc-status {told:?} is not a gRPC status code{separator}{message}")
    };
    Some(match code {
        Code::Ok => Ok(()),
        // Servers answer an expired deadline with either code.
        Code::Cancelled if late => Err(CallError::new(Code::DeadlineExceeded, message)),
        code => Err(CallError::new(code, message)),
    })
}

/// The error for headers that don't come from a gRPC server; `None` if they may be the start of a gRPC answer.
pub(super) fn of_http(status: StatusCode, headers: &HeaderMap) -> Option<CallError> {
    let content_type = headers.get(CONTENT_TYPE).map(|it| String::from_utf8_lossy(excerpt_of(it.as_bytes(), 100)));
    let is_grpc = content_type.as_deref().is_some_and(|it| it.starts_with("application/grpc"));
    if status == StatusCode::OK && is_grpc {
        return None;
    }
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    let what = content_type.map_or("of no type".to_owned(), |it| format!("of type {it:?}"));
    Some(CallError::new(code, format!("the answer is not gRPC, but HTTP {status} with content {what}")))
}

/// The error if the peer has reset the call's stream with this code.
pub(super) fn of_reset(reason: Reason, late: bool) -> CallError {
    let code = match reason {
        Reason::REFUSED_STREAM => Code::Unavailable,
        Reason::CANCEL if late => Code::DeadlineExceeded,
        Reason::CANCEL => Code::Cancelled,
        Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    };
    CallError::new(code, format!("it reset the stream of the call: {reason}"))
}

/// The subsystem can't be called.
pub(super) fn unavailable(message: impl Into<String>) -> CallError {
    CallError::new(Code::Unavailable, message)
}

/// The connection was lost while the call was open.
pub(super) fn lost(error: &h2::Error) -> CallError {
    let message = format!("the connection was lost during the call: {}", of_connection(error));
    CallError { fault: Some(ConnectionFault::Lost), ..unavailable(message) }
}

/// The answer is complete except for its status.
pub(super) fn without_status() -> CallError {
    CallError::new(Code::Unknown, "its answer ended without a grpc-status")
}

/// The answer violates the protocol.
pub(super) fn broken(message: impl Into<String>) -> CallError {
    CallError::new(Code::Internal, message)
}

/// The answer is over its limit, or the memory for answers is full.
pub(super) fn too_large(message: impl Into<String>) -> CallError {
    CallError::new(Code::ResourceExhausted, message)
}

/// Why a connection has ended, for people.
pub(super) fn of_connection(error: &h2::Error) -> String {
    match error.get_io() {
        // Errors that the HTTP/2 library makes when the peer has closed the connection.
        Some(io) if io.raw_os_error().is_none() && io.get_ref().is_none_or(|inner| inner.source().is_none()) => {
            match io.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => "it closed the connection".into(),
                _ => chain(io),
            }
        }
        Some(io) => chain(io),
        None if error.is_go_away() && error.is_remote() => format!("it closed the connection: {error}"),
        None => error.to_string(),
    }
}

/// An error and its causes, in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    tls_in_words(text)
}

/// The text in a `grpc-message`. As the protocol requires, invalid percent-encoding is kept as it is, and bytes that
/// are not UTF-8 are replaced: a status must not be lost because of its message.
fn percent_decoded(encoded: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let [first, after @ ..] = rest {
        let digit = |at: usize| after.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        if let (b'%', Some(high), Some(low)) = (first, digit(0), digit(1)) {
            #[allow(clippy::cast_possible_truncation, reason = "two hexadecimal digits make a byte")]
            bytes.push((high << 4 | low) as u8);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn excerpt_of(bytes: &[u8], max: usize) -> &[u8] {
    &bytes[..bytes.len().min(max)]
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn status(status: &[u8], message: &[u8], late: bool) -> Result<(), CallError> {
        let value = |bytes| HeaderValue::from_bytes(bytes).unwrap();
        let headers = [("grpc-status", value(status)), ("grpc-message", value(message))];
        of_status(&headers.into_iter().map(|(name, value)| (name.parse().unwrap(), value)).collect(), late).unwrap()
    }

    #[test]
    fn the_status_of_the_peer_counts_except_after_the_deadline() {
        let code = |number, late| status(number, b"m", late).unwrap_err().code;
        assert_eq!(code(b"1", false), Code::Cancelled);
        assert_eq!(code(b"1", true), Code::DeadlineExceeded);
        assert_eq!(code(b"2", false), Code::Unknown);
        assert_eq!(code(b"14", false), Code::Unavailable);
        assert_eq!(status(b"0", b"", false), Ok(()));
    }

    #[test]
    fn a_status_is_not_lost_over_its_text() {
        for (encoded, text) in [
            (&b"50%25 %C3%BC"[..], "50% ü"),
            (b"%FF|\xff", "\u{fffd}|\u{fffd}"),
            (b"100%", "100%"),
            (b"%zz%4", "%zz%4"),
        ] {
            let error = status(b"14", encoded, false).unwrap_err();
            assert_eq!((error.code, error.message.as_str()), (Code::Unavailable, text));
        }
        for number in [&b"99"[..], b"-1", b"abc", b"\xff", b"99999999999999999999999"] {
            let error = status(number, b"why", false).unwrap_err();
            assert_eq!(error.code, Code::Unknown);
            assert!(error.message.ends_with("is not a gRPC status code: why"), "{}", error.message);
            let silent = status(number, b"", false).unwrap_err();
            assert!(silent.message.ends_with("is not a gRPC status code"), "{}", silent.message);
        }
    }

    #[test]
    fn without_a_grpc_status_the_http_status_counts() {
        let of = |status: u16, content_type: &'static str| {
            let headers = [(CONTENT_TYPE, HeaderValue::from_static(content_type))].into_iter().collect();
            of_http(StatusCode::from_u16(status).unwrap(), &headers).map(|error| error.code)
        };
        assert_eq!(of(200, "application/grpc"), None);
        assert_eq!(of(200, "application/grpc+proto"), None);
        assert_eq!(of(200, "text/html"), Some(Code::Unknown));
        assert_eq!(of(503, "application/grpc"), Some(Code::Unavailable));
        for (status, code) in [
            (400, Code::Internal),
            (401, Code::Unauthenticated),
            (403, Code::PermissionDenied),
            (404, Code::Unimplemented),
            (429, Code::Unavailable),
            (500, Code::Unknown),
            (502, Code::Unavailable),
            (503, Code::Unavailable),
            (504, Code::Unavailable),
        ] {
            assert_eq!(of(status, "text/html"), Some(code), "{status}");
        }
    }

    #[test]
    fn the_end_of_a_connection_is_explained() {
        let reset = io::Error::new(io::ErrorKind::ConnectionReset, "reset by peer");
        assert_eq!(chain(&reset), "reset by peer");
    }
}
