//! Long work runs on threads that no other task waits for.

use tokio::task::spawn_blocking;

use crate::tasks::joined;

/// Runs work whose time grows with the registry: if it may take longer than a millisecond, on a thread that no other
/// task waits for.
pub(super) async fn aside<T: Send + 'static>(size: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    const SHORT: usize = 256;
    if size <= SHORT {
        return work();
    }
    match joined(spawn_blocking(work).await) {
        Some(done) => done,
        // The runtime is shutting down, and this task with it.
        None => std::future::pending().await,
    }
}
