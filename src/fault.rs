//! Faults that a simulation plants, to show that it finds them: each breaks one rule, where the rule is kept. Compiled
//! only with the feature `simulation`. A simulation runs on one thread, and so does its fault.

use std::cell::Cell;

/// A broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A commit does not check that no other process has written since the one before.
    SkippedFence,
    /// A durable commit is acknowledged before it is executed.
    EarlyAcknowledgement,
    /// Watchers are not notified of some records.
    LostNotification,
    /// A barrier is executed whatever token the row has.
    UnconditionalBarrier,
    /// Ids are given out before they are noted.
    LateNote,
    /// A record ends all open cycles with lower ids.
    WideDelete,
    /// The store forgets that a cycle has begun.
    BegunTwice,
    /// A cycle overtakes one that waits for all subsystems.
    Overtaking,
    /// Replicas that do not lead answer with records that no leader has acknowledged.
    UncappedReads,
    /// A renewal of a lease is acknowledged although the standby does not have it.
    LocalRenewal,
    /// A lease is counted from the arrival of the answer to its renewal.
    ArrivalValidity,
}

thread_local! {
    static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 11] = [
        Self::SkippedFence,
        Self::EarlyAcknowledgement,
        Self::LostNotification,
        Self::UnconditionalBarrier,
        Self::LateNote,
        Self::WideDelete,
        Self::BegunTwice,
        Self::Overtaking,
        Self::UncappedReads,
        Self::LocalRenewal,
        Self::ArrivalValidity,
    ];

    /// Plants this fault on this thread, or none, in place of the earlier one.
    pub fn plant(fault: Option<Self>) {
        PLANTED.set(fault);
    }

    /// True if it is planted on this thread.
    pub(crate) fn is_planted(self) -> bool {
        PLANTED.get() == Some(self)
    }
}
