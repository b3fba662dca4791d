//! The beginning of a process.

/// How a process begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Begin {
    /// Where an earlier process ended.
    #[default]
    Again,
    /// With all loops paused, until an operator resumes them.
    Paused,
    /// To look at a store, which is only read: nothing is taken over, no cycle runs, and no subsystem is called.
    ReadOnly,
}
