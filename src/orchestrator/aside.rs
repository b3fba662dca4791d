//! Work that takes the longer the more there is of it: no task waits on a thread that does it.

use std::panic::resume_unwind;

use tokio::task::spawn_blocking;

/// Does what takes the longer the larger the registry is: where that may take longer than a millisecond, on a thread that
/// no other task waits for.
pub(super) async fn aside<T: Send + 'static>(size: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    const SHORT: usize = 256;
    if size <= SHORT {
        return work();
    }
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime is shut down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
