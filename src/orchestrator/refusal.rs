//! Reasons why a request is refused. [`Refusal`] has all of them, with their messages. Use cases with few reasons have
//! a type of exactly these.

use crate::{
    engine::Ring,
    memory::Full,
    model::{CycleId, Epoch, Identity, Name, Revision, Subsystem, Violations, text::count},
    ports::{StoreError, Unreadable, UnreadableEvent},
};

/// Why a request is refused. Each message contains the problem and the remedy.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    /// Fields of the request are malformed.
    #[error("{0}")]
    Invalid(Violations),
    /// The subsystem is not registered.
    #[error("subsystem {0} is not registered; register it, or see ListSubsystems")]
    SubsystemNotFound(Name),
    /// The subsystem is not registered: it has another name now.
    #[error("subsystem {former} is not registered: it has been renamed to {name}; use that name")]
    SubsystemRenamed {
        /// The former name.
        former: Name,
        /// The name that it has now.
        name: Name,
    },
    /// The name to register, or to rename to, is a former name of another subsystem.
    #[error(
        "subsystem {former} has been renamed to {name}, which keeps its former name; register {name}, by a component that \
         expects this name, or unregister {name} first if {former} is to be another subsystem"
    )]
    NameReserved {
        /// The former name.
        former: Name,
        /// The name of the subsystem that had it.
        name: Name,
    },
    /// The new name of a subsystem is that of another one.
    #[error("subsystem {0} is registered; choose a name that no other subsystem has, or unregister {0} first")]
    NameTaken(Name),
    /// The subsystem has as many former names as it may have.
    #[error(
        "subsystem {0} has {max} former names, which is the limit; rename it to one of them, or unregister it and \
         register it by its new name, which has no history then",
        max = Subsystem::MAX_FORMER_NAMES
    )]
    TooManyFormerNames(Name),
    /// Its overlap policy does not let it wait.
    #[error(
        "cycle {0} has a subsystem in common with it and has not ended; wait for cycle {0}, cancel it, or choose an \
         overlap policy that waits"
    )]
    CycleRunning(CycleId),
    /// Its overlap policy lets one cycle wait, and one already waits.
    #[error(
        "cycle {0} has a subsystem in common with it and already waits; wait for cycle {0}, or choose overlap policy \
         BUFFER_ALL"
    )]
    CycleWaiting(CycleId),
    /// The limit of waiting cycles is reached.
    #[error("the limit of {} is reached (cycle.max_queued); try again later", count(*.0 as u64, "waiting cycle"))]
    QueueFull(usize),
    /// The store can't be written or read now. If a cycle was admitted, it still runs and is recorded once writing
    /// works again.
    #[error("the store is not available now: {1}")]
    StoreUnavailable(Option<CycleId>, StoreError),
    /// The commit of the change is late: whether it is made is not known yet.
    #[error("the change is being written, and may still be made: {0}; repeat it later")]
    ChangeIsLate(StoreError),
    /// A record is damaged.
    #[error("{0}; restore the store from a backup to recover it")]
    Unreadable(Unreadable),
    /// It is not known here, and this replica may not be the one that leads any more.
    #[error(
        "this replica could not confirm in time that it leads, so another one may have what it does not know; try again"
    )]
    Unconfirmed,
    /// The cycle does not exist.
    #[error("cycle {0} is not in the history: its id was never given, or its record is no longer retained")]
    CycleNotFound(CycleId),
    /// It has already finished.
    #[error("cycle {0} has already finished; see GetCycle for its record")]
    CycleFinished(CycleId),
    /// It has no record yet.
    #[error("cycle {0} is still waiting or running; wait for it with WatchCycles, or try again later")]
    CycleNotFinished(CycleId),
    /// The records that a watcher requests are not retained.
    #[error("{}", not_retained(*.after, *.oldest, *.newest))]
    RevisionNotRetained {
        /// The revision after which records were requested.
        after: Revision,
        /// The oldest revision above which none is missing.
        oldest: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// The history is another one than that which a watcher has seen.
    #[error(
        "the record with revision {after} was of epoch {epoch} and is of epoch {now}: the store was replaced by an \
         earlier copy, from which the history has gone on. Find out with ListCycles from which revision on records \
         differ, and watch from there"
    )]
    HistoryRewritten {
        /// The revision after which records were requested.
        after: Revision,
        /// The epoch of its record, as the watcher has seen it.
        epoch: Epoch,
        /// Its epoch now.
        now: Epoch,
    },
    /// Its record is older than the log.
    #[error("the record of cycle {0} is not in the log: an earlier version of this software recorded it")]
    CycleNotLogged(CycleId),
    /// Of two sizes, or a leaf and a size, the first is not within the second, or the second not within the log of this
    /// size.
    #[error(
        "the log has {}; give sizes up to that, the smaller one first, and a size above that of the leaf",
        count(*.0, "entry")
    )]
    NotInLog(u64),
    /// The proof needs hashes that are gone.
    #[error(
        "retention has removed the last entries of this log of {}, and the hashes that a proof needs; give the size of a \
         later checkpoint",
        count(*.0, "entry")
    )]
    HashesRemoved(u64),
    /// No audit event has this leaf.
    #[error("no audit event is leaf {0} of the log; see ListAuditEvents for those that are retained")]
    EventNotFound(u64),
    /// An audit event is damaged.
    #[error("{0}; restore the store from a backup to recover it")]
    EventUnreadable(UnreadableEvent),
    /// No checkpoint was published.
    #[error(
        "no checkpoint of the log covers it yet: the file beside the store can't be written, or, of a copy, is older or \
         missing; see the log of the service"
    )]
    NoCheckpoint,
    /// The limit of watchers is reached.
    #[error(
        "the limit of {} is reached (server.max_watchers); disconnect one, or raise the limit",
        count(*.0 as u64, "watcher")
    )]
    TooManyWatchers(usize),
    /// The registration would make a circular dependency.
    #[error("{0}")]
    OrderRing(Ring),
    /// The subsystems of the configuration file, together with those registered by RPC, would make a circular
    /// dependency.
    #[error(
        "{ring}; of these, {} registered by RPC: change the configuration file, or unregister them while \
         the service runs with the file as it was",
        were(.by_rpc)
    )]
    DeclaredRing {
        /// The ring.
        ring: Ring,
        /// The subsystems in it that the file does not declare.
        by_rpc: Vec<Name>,
    },
    /// The configuration file takes precedence.
    #[error("{0} is declared in the configuration file; change it there")]
    DeclaredInConfig(Name),
    /// The registration was changed since its etag was read.
    #[error(
        "the registration of {name} has etag {etag}, so it was changed since yours was read; read it again by \
         GetSubsystem, and repeat the call if the change still makes sense"
    )]
    EtagMismatch {
        /// The subsystem.
        name: Name,
        /// The etag of its registration now.
        etag: String,
    },
    /// The caller may change the subsystem, but not to this registration.
    #[error("no grant of the caller covers {target}")]
    NotCovered {
        /// The subsystem.
        name: Name,
        /// The part of the registration that is not covered.
        target: String,
    },
    /// Another caller owns it.
    #[error("{} owns subsystem {}; only its owner and administrators may change it", .0.owner, .0.name)]
    NotOwner(NotOwner),
    /// The limit of registered subsystems is reached.
    #[error(
        "the limit of {} is reached (registry.max_subsystems): {registered} registered, and {new} more asked for; \
         unregister those that are gone, or give those that come and go a lease",
        count(*max as u64, "subsystem")
    )]
    RegistryFull {
        /// Number of registered subsystems.
        registered: usize,
        /// Number of new subsystems.
        new: usize,
        /// The limit.
        max: usize,
    },
    /// The memory for registrations and loops is used up.
    #[error(
        "{0}; unregister subsystems or stop loops, or raise memory.max_bytes, of which registrations and loops have a \
         sixteenth"
    )]
    RegistryMemoryFull(Full),
    /// It has no lease.
    #[error(
        "{0} has no lease to renew: a declared subsystem needs no lease, and any other one \
         can be registered again with one"
    )]
    NoLease(Name),
    /// The limit of loops is reached.
    #[error("the limit of {} is reached (registry.max_loops); stop one, or raise the limit", count(*.0 as u64, "loop"))]
    TooManyLoops(usize),
    /// The loop does not exist.
    #[error("loop {0} does not exist; see ListIntervalLoops")]
    LoopNotFound(Name),
    /// The memory for unread responses is full.
    #[error("cycle {0} is recorded, but its record can't be returned now: {1}; use GetCycle later")]
    RecordHasNoRoom(CycleId, Full),
    /// The memory for data of clients is used up.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    MemoryFull(#[from] Full),
    /// The store is only looked at.
    #[error(
        "this orchestrator only looks at a copy (serve --read-only): nothing can be run or changed here; ask the service \
         that serves the fleet"
    )]
    ReadOnly,
    /// This replica follows no leader, so it does not know which records are acknowledged by now.
    #[error("this replica has not heard from a leader for some time, and does not know the newest records; try again")]
    NotFollowing,
    /// The process is shutting down.
    #[error("this orchestrator is shutting down; try again later")]
    Draining,
}

impl Refusal {
    /// The refusal of a request for one of its fields.
    pub(super) fn invalid(field: &str, problem: impl Into<String>) -> Self {
        let mut bad = Violations::default();
        bad.add(field, problem);
        Self::Invalid(bad)
    }
}

/// Why a cycle is not admitted to the line. The variants are those of [`Refusal`].
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub(super) enum NotAdmitted {
    CycleRunning(CycleId),
    CycleWaiting(CycleId),
    QueueFull(usize),
    StoreUnavailable(StoreError),
    Draining,
}

impl From<NotAdmitted> for Refusal {
    fn from(refusal: NotAdmitted) -> Self {
        match refusal {
            NotAdmitted::CycleRunning(id) => Self::CycleRunning(id),
            NotAdmitted::CycleWaiting(id) => Self::CycleWaiting(id),
            NotAdmitted::QueueFull(waiting) => Self::QueueFull(waiting),
            NotAdmitted::StoreUnavailable(error) => error.into(),
            NotAdmitted::Draining => Self::Draining,
        }
    }
}

/// Why an admitted cycle has no record yet.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub enum NotRecorded {
    /// The store can't be written now: as [`Refusal::StoreUnavailable`].
    StoreUnavailable(Option<CycleId>, StoreError),
    /// This process ends before the cycle.
    Draining,
}

impl From<NotRecorded> for Refusal {
    fn from(refusal: NotRecorded) -> Self {
        match refusal {
            NotRecorded::StoreUnavailable(id, error) => Self::StoreUnavailable(id, error),
            NotRecorded::Draining => Self::Draining,
        }
    }
}

/// Why the record of a cancelled cycle is not returned.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub enum NotCancelled {
    /// The cycle does not exist.
    CycleNotFound(CycleId),
    /// It has already finished.
    CycleFinished(CycleId),
    /// It is cancelled, but not recorded yet.
    NotRecorded(NotRecorded),
}

impl From<NotRecorded> for NotCancelled {
    fn from(refusal: NotRecorded) -> Self {
        Self::NotRecorded(refusal)
    }
}

impl From<NotCancelled> for Refusal {
    fn from(refusal: NotCancelled) -> Self {
        match refusal {
            NotCancelled::CycleNotFound(id) => Self::CycleNotFound(id),
            NotCancelled::CycleFinished(id) => Self::CycleFinished(id),
            NotCancelled::NotRecorded(refusal) => refusal.into(),
        }
    }
}

/// No subsystem with this name is registered.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub struct NotRegistered {
    /// The name.
    pub name: Name,
    /// The present name of the subsystem that had it.
    pub renamed_to: Option<Name>,
}

impl From<NotRegistered> for Refusal {
    fn from(NotRegistered { name, renamed_to }: NotRegistered) -> Self {
        match renamed_to {
            Some(present) => Self::SubsystemRenamed { former: name, name: present },
            None => Self::SubsystemNotFound(name),
        }
    }
}

/// Why a lease is not renewed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub enum NotRenewed {
    /// The subsystem is not registered, or its lease has expired.
    SubsystemNotFound(NotRegistered),
    /// It has no lease.
    NoLease(Name),
    /// Another caller owns it.
    NotOwner(NotOwner),
}

impl From<NotOwner> for NotRenewed {
    fn from(refusal: NotOwner) -> Self {
        Self::NotOwner(refusal)
    }
}

impl From<NotRenewed> for Refusal {
    fn from(refusal: NotRenewed) -> Self {
        match refusal {
            NotRenewed::SubsystemNotFound(refusal) => refusal.into(),
            NotRenewed::NoLease(name) => Self::NoLease(name),
            NotRenewed::NotOwner(refusal) => refusal.into(),
        }
    }
}

/// Another caller owns the registration.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub struct NotOwner {
    /// The subsystem.
    pub name: Name,
    /// Its owner.
    pub owner: Identity,
}

impl From<NotOwner> for Refusal {
    fn from(refusal: NotOwner) -> Self {
        Self::NotOwner(refusal)
    }
}

/// The memory for unread responses has no room for the record of this cycle.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", Refusal::from(self.clone()))]
pub struct RecordHasNoRoom(pub CycleId, pub Full);

impl From<RecordHasNoRoom> for Refusal {
    fn from(RecordHasNoRoom(id, full): RecordHasNoRoom) -> Self {
        Self::RecordHasNoRoom(id, full)
    }
}

/// `a was`, `a, b were`.
fn were(names: &[Name]) -> String {
    const SHOWN: usize = 16;
    let shown: Vec<_> = names.iter().take(SHOWN).map(Name::as_str).collect();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    format!("{}{more} {}", shown.join(", "), if names.len() == 1 { "was" } else { "were" })
}

impl From<Violations> for Refusal {
    fn from(violations: Violations) -> Self {
        Self::Invalid(violations)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::StoreUnavailable(None, error)
    }
}

fn not_retained(after: Revision, oldest: Revision, newest: Revision) -> String {
    if after > newest {
        return format!(
            "revision {after} is in the future: {newest} is the newest. Is this another database, or a restored \
             backup? Start from {newest}, or with from_oldest"
        );
    }
    format!(
        "records after revision {after} are no longer all retained: {oldest} is the oldest revision, {newest} the \
         newest; start from there, or with from_oldest"
    )
}
