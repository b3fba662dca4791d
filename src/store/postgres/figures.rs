//! What is counted of a server.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::ports::ServerFigures;

/// Figures since the process has opened the store.
#[derive(Debug, Default)]
pub(super) struct Figures(Mutex<ServerFigures>);

impl Figures {
    /// Without the state of the server.
    pub(super) fn get(&self) -> ServerFigures {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts the time of a statement that only begins a read.
    pub(super) fn went_and_came(&self, took: Duration) {
        self.with(|figures| figures.round_trips.observe(took));
    }

    /// Counts a commit whose answer was lost.
    pub(super) fn found_out(&self, was_kept: bool) {
        self.with(|figures| {
            let number = if was_kept { &mut figures.lost_and_kept } else { &mut figures.lost_and_not_kept };
            *number += 1;
        });
    }

    fn with(&self, change: impl FnOnce(&mut ServerFigures)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
