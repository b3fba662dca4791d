//! The bodies of requests: bounded in their size, their time and their memory.

use std::time::Duration;

use axum::body::{Body, Bytes};
use bytes::BytesMut;
use futures_util::StreamExt;
use tokio::time::timeout;

use super::PATIENCE;

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unread<E> {
    #[error("the body is longer than {0} bytes, which is the most that are allowed")]
    TooLong(usize),
    #[error("the body did not arrive within {PATIENCE:?}")]
    Late,
    #[error("the body did not arrive: {0}")]
    Broken(axum::Error),
    /// There is no room for it.
    #[error("{0}")]
    NoRoom(E),
}

/// Reads a body of at most `max` bytes. `hold` makes room for a number of bytes before they are kept.
///
/// Of a longer one, four times as many bytes are read: a connection that is closed with unread bytes is reset, and then
/// the client may not read the answer.
pub(super) async fn read<E>(
    body: Body,
    max: usize,
    mut hold: impl FnMut(usize) -> Result<(), E>,
) -> Result<Bytes, Unread<E>> {
    let read = async {
        let (mut pieces, mut kept, mut length) = (body.into_data_stream(), BytesMut::new(), 0);
        while length < 4 * max
            && let Some(piece) = pieces.next().await
        {
            let piece = piece.map_err(Unread::Broken)?;
            length += piece.len();
            if length <= max {
                hold(length).map_err(Unread::NoRoom)?;
                kept.extend_from_slice(&piece);
            }
        }
        if length > max { Err(Unread::TooLong(max)) } else { Ok(kept.freeze()) }
    };
    timeout(PATIENCE, read).await.unwrap_or(Err(Unread::Late))
}

/// Reads the rest of a request that was answered before, for the same reason, within bounds that allow any stranger.
pub(super) async fn forget(body: Body) {
    const MAX: usize = 256 << 10;
    const PATIENCE: Duration = Duration::from_secs(1);
    let mut pieces = body.into_data_stream();
    let rest = async {
        let mut length = 0;
        while length < MAX
            && let Some(Ok(piece)) = pieces.next().await
        {
            length += piece.len();
        }
    };
    // The client may be slow, and then it may not read the answer.
    let _ = timeout(PATIENCE, rest).await;
}
