//! The replicas of one orchestrator over one store, one of which leads.
//!
//! [`Membership`] is what a replica knows of itself and of the leader; its [`Role`] changes during the life of the
//! process. A store that one process has for itself makes that process its leader for good.
//!
//! How it goes, with the row that [`Leadership`](crate::ports::Leadership) stands for:
//!
//! - A leader renews its [`Lease`], and makes calls only while that is valid. Its records need no lease: a claim of
//!   another replica fences its commits.
//! - A [`Candidate`] observes the row, and claims it once its beat has stood still for the whole TTL by its own clock.
//!   The lease of the leader is over by then, since it counts a shorter time from an earlier moment.

mod candidate;
mod lease;
mod leased;

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicI64, AtomicU64, Ordering},
};

use jiff::SignedDuration;
use tokio::sync::watch;

pub use self::{
    candidate::{Candidate, Won},
    lease::{Lease, keep},
    leased::Leased,
};
use crate::model::{CommonSettings, Epoch, Leader, Replica, Role};

/// A replica and its role. All clones are of the same replica.
#[derive(Clone, Debug)]
pub struct Membership(Arc<Member>);

#[derive(Debug)]
struct Member {
    replica: Replica,
    /// False if the store admits only one process, so that there are no other replicas.
    has_peers: bool,
    role: watch::Sender<Role>,
    lease: watch::Sender<Option<Lease>>,
    sight: watch::Sender<Sight>,
    unable: Mutex<Unable>,
    settings: Mutex<Settings>,
    /// Number of terms that this replica has seen begin, its own among them, and the epoch of the last one.
    changes: AtomicU64,
    last_epoch: AtomicU64,
    /// By how many milliseconds the clock of the database is ahead; `i64::MIN` before it is known.
    clock_offset: AtomicI64,
}

/// What the database says of which replica leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Its row names the leader, or says that no replica leads.
    Clear,
    /// The database can be read, but no replica has written its row as it is. This is the problem.
    Damaged(Arc<str>),
    /// The database does not answer, or its answer may be outdated. This is the problem.
    Blind(Arc<str>),
}

impl Sight {
    /// Why it is not known which replica leads; `None` if it is.
    pub fn problem(&self) -> Option<&str> {
        match self {
            Self::Clear => None,
            Self::Damaged(problem) | Self::Blind(problem) => Some(problem),
        }
    }
}

/// Why a replica does not claim to lead, if so.
#[derive(Debug, Default)]
struct Unable {
    /// By its configuration and the contents of the store.
    rehearsed: Option<Arc<str>>,
    /// By the row that says which replica leads, and its time.
    unfit: Option<Arc<str>>,
}

/// The settings that replicas should have in common.
#[derive(Debug, Default)]
struct Settings {
    own: CommonSettings,
    /// Those of the leader, once they were compared with these.
    compared_with: Option<CommonSettings>,
}

impl Membership {
    /// A replica that shares its store with others: a follower, to which no leader is known yet.
    pub fn of(replica: Replica) -> Self {
        Self::new(replica, true, Role::Follower { leader: None })
    }

    /// The only process of an orchestrator, which leads for this term; `None` if it only looks at its store.
    pub fn alone(replica: Replica, epoch: Option<Epoch>) -> Self {
        let role = epoch.map_or(Role::Follower { leader: None }, |epoch| Role::Leader { epoch });
        Self::new(replica, false, role)
    }

    fn new(replica: Replica, has_peers: bool, role: Role) -> Self {
        Self(Arc::new(Member {
            replica,
            has_peers,
            role: watch::Sender::new(role),
            lease: watch::Sender::new(None),
            sight: watch::Sender::new(Sight::Clear),
            unable: Mutex::default(),
            settings: Mutex::default(),
            changes: AtomicU64::new(0),
            last_epoch: AtomicU64::new(0),
            clock_offset: AtomicI64::new(i64::MIN),
        }))
    }

    /// This replica.
    pub fn replica(&self) -> &Replica {
        &self.0.replica
    }

    /// True if other processes may share the store.
    pub fn has_peers(&self) -> bool {
        self.0.has_peers
    }

    /// Its role now.
    pub fn role(&self) -> Role {
        self.0.role.borrow().clone()
    }

    /// True if it leads, and its lease is valid if it has one.
    pub fn is_leading(&self) -> bool {
        self.role().epoch().is_some() && self.lease().is_none_or(|lease| !lease.remaining().is_zero())
    }

    /// Its role, and each change of it.
    pub fn roles(&self) -> watch::Receiver<Role> {
        self.0.role.subscribe()
    }

    /// The lease of its term, if it leads and shares its store.
    pub fn lease(&self) -> Option<Lease> {
        self.0.lease.borrow().clone()
    }

    /// Number of terms that this replica has seen begin, its own among them.
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Relaxed)
    }

    /// By how much the clock of the database is ahead of that of this machine, by the last answer of the database.
    pub fn clock_offset(&self) -> Option<SignedDuration> {
        let offset = self.0.clock_offset.load(Ordering::Relaxed);
        (offset != i64::MIN).then(|| SignedDuration::from_millis(offset))
    }

    /// What the database has said when it was asked last which replica leads, and each change of that.
    pub fn sight(&self) -> watch::Receiver<Sight> {
        self.0.sight.subscribe()
    }

    /// Why it does not claim to lead, whether another replica leads or not; `None` if it would.
    pub fn unable(&self) -> Option<Arc<str>> {
        let Unable { rehearsed, unfit } = &*self.reasons();
        unfit.as_ref().or(rehearsed.as_ref()).cloned()
    }

    /// Whether it can lead with its configuration over the contents of the store: why not, or that it can. Returns
    /// whether that is new.
    pub fn set_unable(&self, why: Option<&str>) -> bool {
        replace(&mut self.reasons().rehearsed, why.map(Arc::from))
    }

    /// The same for what the row says by which the replicas agree on the leader.
    fn set_unfit(&self, why: Option<&str>) -> bool {
        replace(&mut self.reasons().unfit, why.map(Arc::from))
    }

    fn reasons(&self) -> MutexGuard<'_, Unable> {
        self.0.unable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings that it should have in common with other replicas.
    pub fn settings(&self) -> CommonSettings {
        self.shared_settings().own.clone()
    }

    /// It has these settings from now on.
    pub fn set_settings(&self, settings: CommonSettings) {
        *self.shared_settings() = Settings { own: settings, compared_with: None };
    }

    /// Warns, once, if the leader has other settings than this replica: they would not apply any more if this one took
    /// over.
    pub fn compare_settings(&self, of_leader: &CommonSettings) {
        let keys = {
            let mut settings = self.shared_settings();
            if settings.compared_with.as_ref() == Some(of_leader) {
                return;
            }
            settings.compared_with = Some(of_leader.clone());
            settings.own.differing(of_leader).collect::<Vec<_>>().join(", ")
        };
        if !keys.is_empty() {
            tracing::warn!(
                keys,
                "the leader has another configuration than this replica, which would apply its own if it took over, \
                 and would unregister what only that of the leader declares: give all replicas the same one"
            );
        }
    }

    fn shared_settings(&self) -> MutexGuard<'_, Settings> {
        self.0.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It leads from now on, under this lease.
    pub fn leads(&self, epoch: Epoch, lease: Lease) {
        self.0.lease.send_replace(Some(lease));
        self.set(Role::Leader { epoch });
    }

    /// It does not lead any more, if it did.
    pub fn follows(&self) {
        // Before its lease is gone, without which a leader would seem to need none.
        if self.role().epoch().is_some() {
            self.set(Role::Follower { leader: None });
        }
        self.0.lease.send_replace(None);
    }

    /// Sets the role, and counts a term that has begun.
    pub fn set(&self, role: Role) {
        let epoch = match &role {
            Role::Leader { epoch } | Role::Follower { leader: Some(Leader { epoch, .. }) } => epoch.0,
            Role::Follower { leader: None } => 0,
        };
        if self.0.last_epoch.fetch_max(epoch, Ordering::Relaxed) < epoch {
            self.0.changes.fetch_add(1, Ordering::Relaxed);
        }
        self.0.role.send_if_modified(|now| replace(now, role));
    }

    fn set_sight(&self, sight: Sight) {
        self.0.sight.send_if_modified(|now| replace(now, sight));
    }

    fn set_clock_offset(&self, offset: SignedDuration) {
        let millis = i64::try_from(offset.as_millis()).unwrap_or(i64::MAX);
        self.0.clock_offset.store(millis, Ordering::Relaxed);
    }
}

/// Replaces a value. Returns true if it was another one.
fn replace<T: PartialEq>(now: &mut T, new: T) -> bool {
    let is_new = *now != new;
    *now = new;
    is_new
}
