//! Long work runs on threads that no other task waits for.

use std::panic::resume_unwind;

use tokio::task::spawn_blocking;

/// Runs work whose time grows with the registry: if it may take longer than a millisecond, on a thread that no other
/// task waits for.
pub(super) async fn aside<T: Send + 'static>(size: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    const SHORT: usize = 256;
    if size <= SHORT {
        return work();
    }
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime is shutting down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
