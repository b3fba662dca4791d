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

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use futures_util::stream;
    use tokio::time::Instant;

    use super::*;

    /// A body of this number of pieces of 100 bytes each, and the number of those that were read.
    fn pieces(count: usize) -> (Body, Arc<AtomicUsize>) {
        let read = Arc::new(AtomicUsize::new(0));
        let counted = read.clone();
        let pieces = stream::iter(0..count).map(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(Bytes::from_static(&[0; 100]))
        });
        (Body::from_stream(pieces), read)
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_its_limit_and_kept_no_further() {
        for (count, max, expected) in [(3, 300, Some(300)), (0, 300, Some(0)), (4, 300, None), (100, 300, None)] {
            let (body, pieces_read) = pieces(count);
            let mut most = 0;
            let kept = read(body, max, |bytes| {
                most = most.max(bytes);
                Ok::<_, Infallible>(())
            });
            let kept = kept.await;
            assert_eq!(kept.as_ref().ok().map(Bytes::len), expected, "{count}");
            assert!(expected.is_some() || matches!(kept, Err(Unread::TooLong(300))), "{kept:?}");
            assert!(most <= max, "{most}");
            assert_eq!(pieces_read.load(Ordering::Relaxed), count.min(12), "the rest is not read");
        }
    }

    #[tokio::test]
    async fn a_body_without_room_is_not_kept() {
        let refused = read(pieces(3).0, 300, |bytes| if bytes > 200 { Err("full") } else { Ok(()) }).await;
        assert!(matches!(refused, Err(Unread::NoRoom("full"))), "{refused:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_end_is_given_up() {
        let endless = || Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let begun = Instant::now();
        let late = read(endless(), 300, |_| Ok::<_, Infallible>(())).await;
        assert!(matches!(late, Err(Unread::Late)), "{late:?}");
        assert_eq!(begun.elapsed(), PATIENCE);
        forget(endless()).await;
        assert_eq!(begun.elapsed(), PATIENCE + Duration::from_secs(1));
        let (many, pieces_read) = pieces(10_000);
        forget(many).await;
        assert_eq!(pieces_read.load(Ordering::Relaxed), (256 << 10) / 100 + 1);
    }
}
