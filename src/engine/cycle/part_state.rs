//! The part of one subsystem while its cycle runs, from its wait for others to its end.

use std::time::Duration;

use crate::{
    memory::Held,
    model::{Answer, SubsystemState},
    ports::Reply,
};

/// The state of the part of a subsystem. A subsystem that is left out of the cycle is not in its plan.
pub(super) enum PartState {
    /// It waits for this number of others, and for its phase.
    Waiting(usize),
    /// It waits for nothing but its call.
    Ready(Release),
    /// It is being called.
    Running(Release, Duration),
    /// It has ended.
    Ended(EndedPart),
}

/// The end of a part's wait for others.
#[derive(Clone, Copy, Default)]
pub(super) struct Release {
    pub(super) at: Duration,
    /// The one that ended last before that.
    pub(super) by: Option<usize>,
}

/// A part that has ended.
pub(super) struct EndedPart {
    pub(super) release: Release,
    pub(super) started: Option<Duration>,
    pub(super) ended: Duration,
    /// True if it had its turn, see [`Turn::was_whole`].
    pub(super) turn: Option<bool>,
    pub(super) state: SubsystemState,
    pub(super) answer: Answer,
    /// The memory of the answer. The memory of the output is already in its [`Standing`].
    pub(super) held: Option<Held>,
}

impl PartState {
    pub(super) fn ended(&self) -> Option<&EndedPart> {
        match self {
            Self::Ended(part) => Some(part),
            Self::Waiting(_) | Self::Ready(_) | Self::Running(..) => None,
        }
    }

    pub(super) fn release(&self) -> Release {
        match self {
            Self::Waiting(_) => Release::default(),
            Self::Ready(release) | Self::Running(release, _) | Self::Ended(EndedPart { release, .. }) => *release,
        }
    }

    /// When its first call began.
    pub(super) fn started(&self) -> Option<Duration> {
        match self {
            Self::Waiting(_) | Self::Ready(_) => None,
            Self::Running(_, started) => Some(*started),
            Self::Ended(part) => part.started,
        }
    }

    /// Records the end of a dependency. Returns true if it was the last one.
    pub(super) fn waits_for_one_less(&mut self) -> bool {
        let Self::Waiting(others) = self else { return false };
        *others -= 1;
        *others == 0
    }

    pub(super) fn end(&mut self, state: SubsystemState, ended: Duration, turn: Option<bool>, reply: Option<Reply>) {
        let (answer, held) = reply.map_or_else(Default::default, |reply| (reply.answer, Some(reply.held)));
        let (release, started) = (self.release(), self.started());
        *self = Self::Ended(EndedPart { release, started, ended, turn, state, answer, held });
    }
}
