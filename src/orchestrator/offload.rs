//! Work whose time grows with the registry.

use crate::{offload, tasks::joined};

/// Runs work over a list of this length, a long one on a blocking thread. A panic continues here.
pub(super) async fn offload<T: Send + 'static>(length: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    /// Its work takes less than a millisecond.
    const SHORT: usize = 256;
    match joined(offload::offload(length > SHORT, work).await) {
        Some(done) => done,
        // The runtime is shutting down, and this task with it.
        None => std::future::pending().await,
    }
}
