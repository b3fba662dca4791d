//! Log lines that a flood would repeat endlessly.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// An event that may be very frequent: logged at its first occurrence, and then periodically with its count.
#[derive(Debug, Default)]
pub(crate) struct Repeated(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    said: Option<Instant>,
    times: u64,
}

impl Repeated {
    /// Shortest time between two lines.
    const INTERVAL: Duration = Duration::from_secs(10);

    /// Counts an occurrence. Returns the number since the last line, if a line is due.
    pub(crate) fn note(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.times += 1;
        let now = Instant::now();
        if state.said.is_some_and(|said| now < said + Self::INTERVAL) {
            return None;
        }
        state.said = Some(now);
        Some(std::mem::take(&mut state.times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_repeated_event_is_logged_at_intervals_with_its_count() {
        let repeated = Repeated::default();
        let said = || (0..1000).filter_map(|_| repeated.note()).collect::<Vec<_>>();
        assert_eq!(said(), [1]);
        tokio::time::advance(Repeated::INTERVAL).await;
        assert_eq!(said(), [1000]);
    }
}
