/// The limits of each caller, while rights are enforced: so that one of those that may call can't use up what the
/// others need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerLimits {
    /// Most calls that begin in a second; `None` means any number. A caller that was silent for a second may make them
    /// all at once.
    pub calls_per_second: Option<u32>,
    /// Most calls that are open at a time, without watches.
    pub concurrent_calls: usize,
    /// Most watches that are open at a time.
    pub watchers: usize,
    /// Most calls that read records of the history, and are open at a time.
    pub history_reads: usize,
}

impl Default for CallerLimits {
    fn default() -> Self {
        Self { calls_per_second: None, concurrent_calls: 256, watchers: 100, history_reads: 4 }
    }
}
