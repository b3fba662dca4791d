//! Figures of connections to subsystems.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// The step of a connection, or of a call on it, that has failed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// No address that may be connected to was reached.
    Connect,
    /// The TLS handshake.
    Tls,
    /// The start of HTTP/2.
    Http2,
    /// The check of the server, before a call: another one answers, or a revoked one.
    Identity,
}

impl Step {
    const ALL: [(&str, Self); 4] =
        [("connect", Self::Connect), ("tls", Self::Tls), ("http2", Self::Http2), ("identity", Self::Identity)];
}

/// How many connections to subsystems are open, and how many have failed.
#[derive(Debug, Default)]
pub struct Counts {
    open: AtomicUsize,
    failures: [AtomicU64; Step::ALL.len()],
}

impl Counts {
    /// Open connections.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Failures so far, by the name of the step that has failed.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Step::ALL.map(|(name, step)| (name, self.failures[step as usize].load(Ordering::Relaxed))).into_iter()
    }

    pub(super) fn failed(&self, step: Step) {
        self.failures[step as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection as open until the result is dropped.
    pub(super) fn opened(self: Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(self)
    }
}

/// An open connection.
pub(super) struct Open(Arc<Counts>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
