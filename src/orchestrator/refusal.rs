//! Why something that was asked for is not done.

use crate::{
    engine::Ring,
    memory::Full,
    model::{CycleId, Name, Revision, Violations},
    ports::{StoreError, Unreadable},
};

/// Why something that was asked for is not done. Each message says what was wrong and what to do.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    /// Fields of the request are malformed.
    #[error("{0}")]
    Invalid(Violations),
    /// No such subsystem.
    #[error("no subsystem {0} is registered; see ListSubsystems for those that are, or register it")]
    SubsystemNotFound(Name),
    /// Its policy does not let it wait.
    #[error(
        "cycle {0} has a subsystem in common with it and has not ended; wait for that one, cancel it, or choose an overlap \
         policy that waits"
    )]
    CycleRunning(CycleId),
    /// Its policy lets one wait, and one does.
    #[error(
        "cycle {0} has a subsystem in common with it and waits already; wait for that one, or choose overlap policy BUFFER_ALL"
    )]
    CycleWaiting(CycleId),
    /// Too many wait.
    #[error("the limit of {0} waiting cycles is reached (cycle.max_queued); try again later")]
    QueueFull(usize),
    /// The record can't be written or read now. The cycle that this is about, if one was admitted, runs all the same
    /// and is recorded once writing works again.
    #[error("the record is not available now: {1}")]
    StoreUnavailable(Option<CycleId>, StoreError),
    /// A record is damaged.
    #[error("{0}; restore the store from a backup to have it back")]
    Unreadable(Unreadable),
    /// No such cycle.
    #[error("cycle {0} is not in the record: it was never assigned, or is no longer retained")]
    CycleNotFound(CycleId),
    /// It can't be cancelled any more.
    #[error("cycle {0} has already finished; see GetCycle for how")]
    CycleFinished(CycleId),
    /// There is no record yet.
    #[error("cycle {0} is still waiting or running; wait for it with WatchCycles, or try again later")]
    CycleNotFinished(CycleId),
    /// The records that a watcher wants are not there.
    #[error("{}", not_retained(*.after, *.oldest, *.newest))]
    RevisionNotRetained {
        /// After which one records were wanted.
        after: Revision,
        /// The oldest revision from which on none is missing.
        oldest: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// Too many watch.
    #[error("{0} watchers are connected, which is the most that may be (server.max_watchers)")]
    TooManyWatchers(usize),
    /// The order would bite its own tail.
    #[error("{0}")]
    OrderRing(Ring),
    /// The order of what the configuration file declares, together with what was registered by RPC, would bite its own
    /// tail.
    #[error(
        "{ring}; of these, {} registered by RPC, so change what the configuration file declares, or unregister them while \
         the service runs with the file as it was",
        were(.by_rpc)
    )]
    DeclaredRing {
        /// The ring.
        ring: Ring,
        /// Those in it that the file does not declare.
        by_rpc: Vec<Name>,
    },
    /// The configuration file has the say.
    #[error("{0} is declared in the configuration file; change it there")]
    DeclaredInConfig(Name),
    /// More would be registered than may be.
    #[error(
        "{registered} subsystems are registered, and with {new} more they would be over the {max} that may be \
         (registry.max_subsystems); unregister those that are gone, or give those that come and go a lease"
    )]
    RegistryFull {
        /// How many are registered.
        registered: usize,
        /// How many new ones there would be.
        new: usize,
        /// How many may be.
        max: usize,
    },
    /// More memory would be taken by what is registered than may be.
    #[error(
        "{0}; unregister or stop what is not needed, or raise memory.max_bytes, of which registrations and loops have a \
         sixteenth"
    )]
    RegistryMemoryFull(Full),
    /// It does not end by itself.
    #[error(
        "{0} has no lease, so there is none to renew: what the configuration file declares needs none, and anything else \
         can be registered again with one"
    )]
    NoLease(Name),
    /// Too many run.
    #[error("{0} loops are there, which is the most that may be (registry.max_loops)")]
    TooManyLoops(usize),
    /// No such loop.
    #[error("there is no loop {0}; see ListIntervalLoops for those that are")]
    LoopNotFound(Name),
    /// Too much waits in answers.
    #[error("cycle {0} is recorded, but its record can't be answered now: {1}; ask GetCycle for it later")]
    RecordHasNoRoom(CycleId, Full),
    /// What the service may hold for others is used up.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    MemoryFull(#[from] Full),
    /// The process is shutting down.
    #[error("this orchestrator is shutting down; try again with the one that takes over")]
    Draining,
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
            "revision {after} is in the future: {newest} is the newest. Is this another database, or a restored backup? \
             Start from {newest}, or with from_oldest"
        );
    }
    format!(
        "records after revision {after} are no longer all retained: {oldest} is the oldest revision, {newest} the newest; \
         start from there, or with from_oldest"
    )
}
