//! The lease of a leader: for how long it may make calls.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{select, sync::Notify, time::sleep};

#[cfg(feature = "simulation")]
use crate::fault::Fault;
use crate::{
    clock::{Clock, Moment},
    model::Epoch,
    ports::{Leadership, Renewed},
};

/// A lease is valid for this part of its TTL, from the moment on at which its renewal was sent. Others wait for a whole
/// TTL, from the arrival of an answer that showed the renewal on. So clocks may differ in their rates by a tenth.
const VALID: (u32, u32) = (9, 10);
/// It is renewed after this part of its TTL: three times before it ends.
const RENEWED: u32 = 4;
/// A lease that counts down is looked at this often, since its other clocks may have gone further than tokio's.
const LOOKS: u32 = 20;
/// After a failed renewal, the next one comes after this part of the TTL.
const AGAIN: u32 = 20;

/// The lease of one term. All clones are of the same term.
#[derive(Clone, Debug)]
pub struct Lease(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    ttl: Duration,
    clock: Clock,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// When its last acknowledged renewal was sent.
    sent: Moment,
    /// True from the moment on at which it was found to have ended, until [`Lease::confirmed`] has returned: so that no
    /// end is overlooked because a renewal came soon after it.
    has_lapsed: bool,
}

impl Lease {
    /// The lease of a term whose claim was sent at this moment.
    pub fn new(ttl: Duration, clock: Clock, sent: Moment) -> Self {
        let state = Mutex::new(State { sent, has_lapsed: false });
        Self(Arc::new(Shared { ttl, clock, state, changed: Notify::new() }))
    }

    /// A renewal was acknowledged that had been sent at this moment.
    pub fn renewed(&self, sent: Moment) {
        self.state().sent = sent;
        self.0.changed.notify_waiters();
    }

    /// For how long it lasts from a renewal on, to other replicas.
    pub fn ttl(&self) -> Duration {
        self.0.ttl
    }

    /// The time for which it is still valid, if it is not renewed.
    pub fn remaining(&self) -> Duration {
        let since = self.state().sent.until(&self.0.clock.moment());
        (self.0.ttl * VALID.0 / VALID.1).saturating_sub(since)
    }

    /// Checks that it is valid. Right before a call is sent.
    ///
    /// # Errors
    /// It has ended. Until [`Lease::confirmed`] has returned, it then counts as ended even if it is renewed.
    pub fn check(&self) -> Result<(), Lapsed> {
        let is_over = self.remaining().is_zero();
        let mut state = self.state();
        let is_new = is_over && !state.has_lapsed;
        state.has_lapsed |= is_over;
        let has_lapsed = state.has_lapsed;
        drop(state);
        if is_new {
            self.0.changed.notify_waiters();
        }
        if has_lapsed { Err(Lapsed) } else { Ok(()) }
    }

    /// Waits until it ends.
    pub async fn lapsed(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.check().is_err() {
                return;
            }
            let look = self.remaining().min(self.0.ttl / LOOKS);
            select! {
                biased;
                () = changed => {}
                () = sleep(look) => {}
            }
        }
    }

    /// Waits until it is valid again.
    pub async fn confirmed(&self) {
        loop {
            let changed = self.0.changed.notified();
            if !self.remaining().is_zero() {
                self.state().has_lapsed = false;
                return;
            }
            changed.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lease has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this replica could not confirm that it leads")]
pub struct Lapsed;

/// Renews the lease of a term, until that is over: another replica has claimed a later one, or this one was released.
/// Returns the epoch that the row has then. A renewal is awaited for as long as it takes. It may wait for a standby,
/// and would go on to wait in the database if it was given up here, with a session of its own.
pub async fn keep(leadership: &dyn Leadership, epoch: Epoch, lease: &Lease) -> Epoch {
    let Shared { ttl, clock, .. } = &*lease.0;
    // It is logged once that renewals fail.
    let mut has_failed = false;
    loop {
        let since = lease.state().sent.until(&clock.moment());
        sleep((*ttl / RENEWED).saturating_sub(since)).await;
        let sent = clock.moment();
        let over = match leadership.renew(epoch).await {
            Ok(Renewed::Acknowledged) => {
                #[cfg(feature = "simulation")]
                let sent = if Fault::ArrivalValidity.is_planted() { clock.moment() } else { sent };
                lease.renewed(sent);
                has_failed = false;
                continue;
            }
            Ok(Renewed::Superseded) => leadership.observe().await.map(|observed| observed.epoch),
            Err(error) => Err(error),
        };
        match over {
            Ok(by) => return by,
            Err(error) => {
                if !mem::replace(&mut has_failed, true) {
                    tracing::warn!(%error, remaining = ?lease.remaining(), "the lease was not renewed");
                }
                sleep(*ttl / AGAIN).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use jiff::Timestamp;
    use tokio::time::{Instant, advance};

    use super::*;

    const TTL: Duration = Duration::from_secs(10);
    const VALID_FOR: Duration = Duration::from_secs(9);

    fn lease() -> (Lease, Clock) {
        let clock = Clock::simulated(Timestamp::UNIX_EPOCH);
        (Lease::new(TTL, clock, clock.moment()), clock)
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_ends_nine_tenths_of_its_ttl_after_its_renewal_was_sent() {
        let (lease, clock) = lease();
        let begun = Instant::now();
        let sent = clock.moment();
        // The answer takes a while.
        advance(Duration::from_secs(3)).await;
        lease.renewed(sent);
        assert_eq!(lease.remaining() + Duration::from_secs(3), VALID_FOR);
        lease.lapsed().await;
        assert_eq!(begun.elapsed(), VALID_FOR);
        assert_eq!(lease.check(), Err(Lapsed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_ends_by_the_clock_that_went_furthest() {
        let (suspended, clock) = lease();
        clock.suspend(VALID_FOR);
        assert_eq!(suspended.check(), Err(Lapsed));
        let (set, clock) = lease();
        clock.set(Timestamp::UNIX_EPOCH + VALID_FOR);
        assert_eq!(set.check(), Err(Lapsed));
        let (set_back, clock) = lease();
        clock.set(Timestamp::UNIX_EPOCH - VALID_FOR);
        assert_eq!(set_back.remaining(), VALID_FOR);
        advance(VALID_FOR).await;
        assert_eq!(set_back.check(), Err(Lapsed));
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_a_call_has_met_is_noticed_although_a_renewal_follows() {
        let (lease, clock) = lease();
        let lapsed = lease.lapsed();
        tokio::pin!(lapsed);
        assert!(lapsed.as_mut().now_or_never().is_none());
        clock.suspend(VALID_FOR);
        assert_eq!(lease.check(), Err(Lapsed));
        lease.renewed(clock.moment());
        lapsed.await;
        assert_eq!(lease.check(), Err(Lapsed));
        lease.confirmed().await;
        assert_eq!(lease.check(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_ended_lease_is_confirmed_by_a_renewal() {
        let (lease, clock) = lease();
        advance(TTL).await;
        lease.lapsed().await;
        assert!(lease.confirmed().now_or_never().is_none());
        lease.renewed(clock.moment());
        lease.confirmed().await;
        assert_eq!((lease.check(), lease.remaining()), (Ok(()), VALID_FOR));
    }
}
