//! The connections to other replicas.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    access::{Mode, Reach, Revoked},
    api::{Connect, Forwarder},
    cluster::Membership,
    config::Config,
    dial,
    memory::Memory,
    model::Identity,
    orchestrator::{History, Sums},
    transport::Transport,
};

/// Longest time, beside the TTL of its lease, in which a leader may be out of reach of a replica that stays ready: it
/// may have ended, or begin its term over a large store, and then all followers would be out of service at once.
const UNREACHED: Duration = Duration::from_mins(1);

/// The other replicas, as this one reaches them.
pub(super) struct Replicas {
    connector: Arc<Connector>,
    forwarder: Forwarder,
    sums: Sums,
    /// Follow the leader, and report calls to it. `None` if it would not take the word of this replica.
    following: Option<[AbortOnDropHandle<()>; 2]>,
    /// Notes whether the leader can be reached, and ends the watches while no replica leads.
    _contact: AbortOnDropHandle<()>,
}

/// Connects to other replicas as to subsystems: with the same certificate, and trusting the same authorities.
struct Connector {
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
    fn by(config: &Config) -> Arc<Self> {
        let peers = config.cluster.peers.iter().cloned().collect();
        Arc::new(Self { peers, revoked: config.access.revoked.clone() })
    }
}

impl Replicas {
    /// Those of this replica. What the leader acknowledges is shown in `history`, and what it sends ahead takes memory
    /// from `answers`. The leader gets the `sums` of calls.
    pub(super) fn new(
        config: &Config,
        membership: &Membership,
        (history, sums): (History, Sums),
        transport: Arc<dyn Transport>,
        tls: Arc<dial::Tls>,
        answers: Memory,
    ) -> Self {
        if let (Some(advertise), Some(why)) = (&config.cluster.advertise, config.contradicts_advertise()) {
            tracing::warn!(%advertise, "other replicas may not reach this one at cluster.advertise: {why}");
        }
        // `dial.allow` is for what callers register. The addresses of replicas come from their configurations.
        let reach = Reach { mode: config.access.mode, ..Reach::default() };
        let (timeout, trusted) = (config.dial.connect_timeout, Mutex::new(Trusted::by(config)));
        let connector = Arc::new(Connector { transport, tls, timeout, reach, trusted });
        let max_calls = config.server.max_concurrent_streams;
        let connect = (connector.clone().connect(), timeout);
        let forwarder = Forwarder::new(membership.clone(), history, connect, max_calls, answers);
        let follow = || {
            let (follows, reports, sums) = (forwarder.clone(), forwarder.clone(), sums.clone());
            let follows = tokio::spawn(async move { follows.follow().await });
            let reports = tokio::spawn(async move { reports.report(&sums).await });
            [follows, reports].map(AbortOnDropHandle::new)
        };
        let is_trusted = config.access.mode == Mode::Off || !config.cluster.peers.is_empty();
        let following = is_trusted.then(follow);
        let patience = is_trusted.then(|| UNREACHED.saturating_add(config.cluster.lease_ttl));
        let keeps = forwarder.clone();
        let contact = AbortOnDropHandle::new(tokio::spawn(async move { keeps.keep_contact(patience).await }));
        Self { connector, forwarder, sums, following, _contact: contact }
    }

    /// Has the leader answer calls.
    pub(super) fn forwarder(&self) -> Forwarder {
        self.forwarder.clone()
    }

    /// Trusts the replicas of another configuration from now on.
    pub(super) fn apply(&self, config: &Config) {
        *self.connector.trusted.lock().unwrap_or_else(PoisonError::into_inner) = Trusted::by(config);
        self.forwarder.connect_anew();
    }

    /// Ends the streams of the leader, since the process ends.
    pub(super) fn end(&self) {
        self.forwarder.end_streams();
    }

    /// Reports the last calls to the leader, if another replica leads.
    pub(super) async fn report_last(&self) {
        if self.following.is_some() {
            self.forwarder.report_last(&self.sums).await;
        }
    }
}

impl Connector {
    fn connect(self: Arc<Self>) -> Connect {
        Arc::new(move |to| {
            let this = self.clone();
            let connected = async move {
                let trusted = this.trusted.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let tls = (this.tls.clone(), this.reach.clone());
                let expected = (&trusted.peers[..], &trusted.revoked);
                dial::connect(this.transport.clone(), &to, tls, expected, this.timeout).await
            };
            connected.boxed()
        })
    }
}
