use std::time::Duration;

/// The limits of each caller, while rights are enforced: so that one of those that may call can't use up what the
/// others need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerLimits {
    /// Most calls that begin in a second; `None` means any number. A caller that was silent for a second may make them
    /// all at once.
    pub calls_per_second: Option<u32>,
    /// Most changes of registrations, loops, suspensions and cancellations in a second, on average: a caller that
    /// changed nothing for [`CallerLimits::SAVED_CHANGES`] may make those of this time at once. Calls that change
    /// nothing don't count.
    pub changes_per_second: u32,
    /// Most renewals of leases in a second.
    pub renewals_per_second: u32,
    /// Most calls that are open at a time, without watches, and as many renewals of leases, and streams of reflection.
    pub concurrent_calls: usize,
    /// Most watches that are open at a time.
    pub watchers: usize,
    /// Most calls that read records of the history, and are open at a time.
    pub history_reads: usize,
}

impl CallerLimits {
    /// The time whose changes a caller may make at once. By default these are 20,000, as many as there may be
    /// subsystems: one process may register all of them at its start.
    pub const SAVED_CHANGES: Duration = Duration::from_secs(2000);
}

impl Default for CallerLimits {
    /// A caller that registers as often as it may, with leases that end at once, takes 14 hours to fill the audit with
    /// its 1,000,000 events. 20,000 leases of 30 s, each renewed after a third of it, are 2,000 renewals in a second.
    fn default() -> Self {
        Self {
            calls_per_second: None,
            changes_per_second: 10,
            renewals_per_second: 2000,
            concurrent_calls: 256,
            watchers: 100,
            history_reads: 4,
        }
    }
}
