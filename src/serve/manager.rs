//! Tells the service manager about the service, in the protocol of systemd: sd_notify(3). Without a manager, which is
//! without `NOTIFY_SOCKET` in the environment, this does nothing.

use std::{io, time::Duration};

use sd_notify::NotifyState::{ExtendTimeoutUsec, Ready, Reloading, Status, Stopping};
use tokio::{task::spawn_blocking, time::timeout};

/// The service starts, which takes long if its store has to be migrated.
pub(super) async fn starting() {
    tell(|| sd_notify::notify(&[Status("starting: opening the store")])).await;
}

/// Requests are answered. `status` is one line for people.
pub(super) async fn ready(status: String) {
    tell(move || sd_notify::notify(&[Ready, Status(&status)])).await;
}

/// The configuration is read again. [`ready`] must follow.
pub(super) async fn reloading(why: &'static str) {
    tell(move || {
        let since = sd_notify::NotifyState::monotonic_usec_now()?;
        sd_notify::notify(&[Reloading, since, Status(&format!("reloading: {why}"))])
    })
    .await;
}

/// The service shuts down, which takes at most this long. The manager waits for it, whatever its own limit is.
pub(super) async fn stopping(within: Duration) {
    let microseconds = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
    let status = format!("shutting down: running cycles may finish; this takes at most {} s", within.as_secs());
    tell(move || sd_notify::notify(&[Stopping, ExtendTimeoutUsec(microseconds), Status(&status)])).await;
}

/// Each message is sent before the next one is made.
async fn tell(send: impl FnOnce() -> io::Result<()> + Send + 'static) {
    /// Sending waits while the socket of the manager is full.
    const PATIENCE: Duration = Duration::from_secs(1);
    match timeout(PATIENCE, spawn_blocking(send)).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => tracing::warn!(%error, "the service manager can't be told (NOTIFY_SOCKET)"),
        Ok(Err(defect)) => tracing::error!(%defect, "the service manager can't be told (NOTIFY_SOCKET)"),
        Err(_) => tracing::warn!("the service manager does not read its socket (NOTIFY_SOCKET)"),
    }
}
