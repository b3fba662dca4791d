//! The connections to other replicas.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;

use crate::{
    access::{Reach, Revoked},
    api::Connect,
    config::Config,
    dial,
    model::Identity,
    transport::Transport,
};

/// Connects to other replicas as to subsystems: with the same certificate, and trusting the same authorities.
pub(super) struct Replicas {
    transport: Arc<dyn Transport>,
    tls: Arc<dial::Tls>,
    timeout: Duration,
    reach: Reach,
    trusted: Mutex<Arc<Trusted>>,
}

/// Whose certificates are trusted.
struct Trusted {
    /// The identities of replicas. Without any, a certificate has to be that of the address.
    peers: Vec<Identity>,
    revoked: Revoked,
}

impl Trusted {
    fn of(config: &Config) -> Arc<Self> {
        let peers = config.cluster.peers.iter().cloned().collect();
        Arc::new(Self { peers, revoked: config.access.revoked.clone() })
    }
}

impl Replicas {
    pub(super) fn new(config: &Config, transport: Arc<dyn Transport>, tls: Arc<dial::Tls>) -> Arc<Self> {
        // `dial.allow` is for what callers register. The addresses of replicas come from their configurations.
        let reach = Reach { mode: config.access.mode, ..Reach::default() };
        let (timeout, trusted) = (config.dial.connect_timeout, Mutex::new(Trusted::of(config)));
        Arc::new(Self { transport, tls, timeout, reach, trusted })
    }

    /// Trusts the replicas of another configuration from now on.
    pub(super) fn apply(&self, config: &Config) {
        *self.trusted.lock().unwrap_or_else(PoisonError::into_inner) = Trusted::of(config);
    }

    /// Connects to one of them.
    pub(super) fn connect(self: Arc<Self>) -> Connect {
        Arc::new(move |to| {
            let this = self.clone();
            let connect = async move {
                let trusted = this.trusted.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let tls = (this.tls.clone(), this.reach.clone());
                let expected = (&trusted.peers[..], &trusted.revoked);
                dial::connect(this.transport.clone(), &to, tls, expected, this.timeout).await
            };
            connect.boxed()
        })
    }
}
