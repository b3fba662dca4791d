//! A follower that takes over once no replica leads.

use std::{mem, sync::Arc, time::Duration};

use jiff::SignedDuration;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Membership, Sight, lease::Lease};
use crate::{
    host::Host,
    model::{Epoch, Leader, Role},
    ports::{Claim, ClaimId, Claimed, Leadership, Observed, Renewed, StoreError},
};

/// The row is observed ten times in each TTL, and at least at this interval: a released term is taken over in less than
/// a second.
const LOOKS: u32 = 10;
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// Largest difference between the clock of a leader and that of the database. Each leader dates ticks by its own clock,
/// and a loop waits for a clock that was set back by up to a minute: so far may the clocks of two leaders be apart.
const MAX_OFFSET: SignedDuration = SignedDuration::from_secs(30);

/// Observes the row, and claims it once no replica leads.
pub struct Candidate {
    leadership: Arc<dyn Leadership>,
    membership: Membership,
    orchestrator_id: Arc<str>,
    lease_ttl: Duration,
    host: Host,
    /// The row, and when the first answer arrived that showed it so.
    seen: Option<(Observed, Instant)>,
    /// The latest epoch that the row ever had, as far as this replica knows.
    latest: Epoch,
    /// Until when the leader that was seen last counts as the leader while the row can't be read.
    known_until: Instant,
    /// The last claim of this replica, and whether its outcome is known.
    claimed: Option<(ClaimId, Outcome)>,
    /// True while the row can't be read, which is logged once.
    is_blind: bool,
}

/// Whether it is known that a claim was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Known,
    Unknown,
}

/// A term that this replica has begun.
#[derive(Debug)]
pub struct Won {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its lease.
    pub lease: Lease,
}

impl Candidate {
    /// A candidate for terms of the orchestrator with this id, with leases of this TTL.
    pub fn new(
        leadership: Arc<dyn Leadership>,
        membership: Membership,
        (orchestrator_id, lease_ttl): (Arc<str>, Duration),
        host: Host,
    ) -> Self {
        Self {
            leadership,
            membership,
            orchestrator_id,
            lease_ttl,
            host,
            seen: None,
            latest: Epoch::default(),
            known_until: Instant::now(),
            claimed: None,
            is_blind: false,
        }
    }

    /// Waits until this replica leads, which has to be a follower, or until this is cancelled, which returns `None`. A
    /// claim that is under way then is awaited: its lease would run out otherwise, without a leader.
    pub async fn wins(&mut self, cancelled: &CancellationToken) -> Option<Won> {
        while !cancelled.is_cancelled() {
            match self.look().await {
                Ok(Some(won)) => return Some(won),
                Ok(None) => {
                    if mem::take(&mut self.is_blind) {
                        tracing::info!("it is known again which replica leads");
                    }
                }
                Err(error) => {
                    if !mem::replace(&mut self.is_blind, true) {
                        tracing::warn!(%error, "it is not known which replica leads");
                    }
                }
            }
            let _ = cancelled.run_until_cancelled(self.pause()).await;
        }
        None
    }

    async fn pause(&self) {
        sleep((self.lease_ttl / LOOKS).min(LONGEST_PAUSE)).await;
    }

    /// Observes the row once, and claims it if no replica leads and this one can.
    ///
    /// # Errors
    /// The row can't be read, or is not the latest one, or the outcome of a claim is not known.
    pub async fn look(&mut self) -> Result<Option<Won>, StoreError> {
        let asked = Instant::now();
        let observed = match self.observe().await {
            Ok(observed) => observed,
            Err(error) => {
                // The row may have changed since it was seen.
                self.seen = None;
                let problem = error.to_string().into();
                let sight = match error {
                    StoreError::Corrupt { .. } | StoreError::Tampered { .. } => Sight::Damaged(problem),
                    _ => Sight::Blind(problem),
                };
                // A damaged row says nothing of the leader, so the one that was known stays.
                if matches!(sight, Sight::Blind(_)) && Instant::now() >= self.known_until {
                    self.membership.set(Role::Follower { leader: None });
                }
                self.membership.set_sight(sight);
                return Err(error);
            }
        };
        let arrived = Instant::now();
        self.membership.set_sight(Sight::Clear);
        // Half of the time that the answer took.
        let read_at = self.host.clock.now().saturating_sub(asked.elapsed() / 2).unwrap_or_default();
        let offset = observed.time.duration_since(read_at);
        self.membership.set_clock_offset(offset);
        let own = self.claimed.filter(|(id, _)| *id == observed.claim).map(|(_, outcome)| outcome);
        if own == Some(Outcome::Unknown) {
            return self.confirm(observed.epoch).await;
        }
        let place = |observed: &Observed| (observed.epoch, observed.beat);
        let since = match &self.seen {
            Some((seen, since)) if place(seen) == place(&observed) => *since,
            _ => arrived,
        };
        let waits_for = observed.lease_ttl.max(self.lease_ttl);
        // A term of its own is over: otherwise it would not look.
        let is_free = observed.leader.is_none() || own.is_some() || since.elapsed() >= waits_for;
        self.seen = Some((observed.clone(), since));
        // An earlier process of this replica leads no more.
        let is_other = |leader: &Leader| leader.replica != *self.membership.replica();
        let leader = observed.leader.clone().filter(|leader| !is_free && is_other(leader));
        self.membership.set(Role::Follower { leader });
        if !is_free {
            self.known_until = arrived + waits_for;
        }
        self.judge(&observed, offset);
        if !is_free || self.membership.unable().is_some() {
            return Ok(None);
        }
        self.claim(&observed).await
    }

    /// Reads the row. One of an earlier term than another one that it had is that of an earlier primary, where nothing
    /// that follows from it holds.
    async fn observe(&mut self) -> Result<Observed, StoreError> {
        let observed = self.leadership.observe().await?;
        let (found, known) = (observed.epoch, self.latest);
        if found < known {
            return Err(StoreError::Outdated { found, known });
        }
        self.latest = found;
        Ok(observed)
    }

    async fn claim(&mut self, seen: &Observed) -> Result<Option<Won>, StoreError> {
        let Host { clock, random, .. } = &self.host;
        let id = ClaimId::of(random.id64());
        let claim = Claim {
            id,
            replica: self.membership.replica().clone(),
            orchestrator_id: self.orchestrator_id.clone(),
            lease_ttl: self.lease_ttl,
            at_least: Epoch::by_clock(clock.now()),
        };
        self.claimed = Some((id, Outcome::Unknown));
        let sent = clock.moment();
        let claimed = self.leadership.claim(seen, &claim).await?;
        self.claimed = Some((id, Outcome::Known));
        Ok(match claimed {
            Claimed::Won(epoch) => Some(self.won(epoch, Lease::new(self.lease_ttl, self.host.clock, sent))),
            Claimed::Lost => None,
        })
    }

    /// Finds out whether a claim holds that was executed, although its answer was lost: it may be lost in a failover.
    async fn confirm(&mut self, epoch: Epoch) -> Result<Option<Won>, StoreError> {
        let sent = self.host.clock.moment();
        let renewed = self.leadership.renew(epoch).await?;
        self.claimed = self.claimed.map(|(id, _)| (id, Outcome::Known));
        Ok(match renewed {
            Renewed::Acknowledged => Some(self.won(epoch, Lease::new(self.lease_ttl, self.host.clock, sent))),
            Renewed::Superseded => None,
        })
    }

    fn won(&mut self, epoch: Epoch, lease: Lease) -> Won {
        self.seen = None;
        self.latest = self.latest.max(epoch);
        tracing::info!(epoch = epoch.0, replica = self.membership.replica().name, "this replica has claimed to lead");
        Won { epoch, lease }
    }

    /// Finds out whether the row and its time keep this replica from leading, which is logged once.
    fn judge(&self, observed: &Observed, offset: SignedDuration) {
        let why = match observed.check_orchestrator(&self.orchestrator_id) {
            Err(other) => Some(other.to_string()),
            Ok(()) if let Some(behind) = &observed.behind => Some(behind.to_string()),
            Ok(()) if offset.abs() > MAX_OFFSET => Some(format!(
                "its clock differs from that of the database by more than {MAX_OFFSET:#}; set both by NTP"
            )),
            Ok(()) => None,
        };
        let is_new = self.membership.set_unfit(why.as_deref());
        if let Some(why) = why.filter(|_| is_new) {
            tracing::error!(?offset, "this replica does not lead: {why}");
        }
    }
}

#[cfg(test)]
mod tests;
