//! Candidates over a row in memory, on paused time.

use std::sync::{Mutex, MutexGuard};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use tokio::time::{Instant, advance, timeout};

use super::*;
use crate::{
    clock::Clock,
    cluster::keep,
    model::{Leader, Replica},
};

const TTL: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(250);

/// A row in memory. All clones are the same.
#[derive(Clone)]
struct Row(Arc<Mutex<State>>);

struct State {
    row: Observed,
    clock: Clock,
    /// While nothing can be read or written.
    trouble: Option<StoreError>,
    /// What happens to the next claim.
    next_claim: NextClaim,
}

#[derive(Clone, Copy, PartialEq)]
enum NextClaim {
    Answered,
    /// It is executed, and its answer takes a second.
    Late,
    /// It is executed, and its answer is lost.
    AnswerLost,
    /// It is not executed, and there is no answer.
    Lost,
}

impl Row {
    fn new(clock: Clock) -> Self {
        let row = Observed {
            epoch: Epoch(0),
            beat: 0,
            claim: ClaimId(0),
            leader: None,
            lease_ttl: Duration::ZERO,
            orchestrator_id: None,
            time: clock.now(),
            behind: None,
        };
        Self(Arc::new(Mutex::new(State { row, clock, trouble: None, next_claim: NextClaim::Answered })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn set_away(&self, is_away: bool) {
        self.state().trouble = is_away.then(away);
    }

    /// Does this, unless the row is away.
    fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut State) -> Result<T, StoreError>,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let mut state = self.state();
        let answer = match &state.trouble {
            Some(error) => Err(error.clone()),
            None => ask(&mut state),
        };
        Box::pin(async { answer })
    }
}

fn away() -> StoreError {
    StoreError::Unavailable { store: "s".into(), problem: "away".into() }
}

impl Leadership for Row {
    fn observe(&self) -> BoxFuture<'_, Result<Observed, StoreError>> {
        self.ask(|state| Ok(Observed { time: state.clock.now(), ..state.row.clone() }))
    }

    fn claim<'a>(&'a self, seen: &'a Observed, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        let takes = if self.state().next_claim == NextClaim::Late { Duration::from_secs(1) } else { Duration::ZERO };
        let claimed = self.ask(|state| {
            let next = mem::replace(&mut state.next_claim, NextClaim::Answered);
            if next == NextClaim::Lost {
                return Err(away());
            }
            if (seen.epoch, seen.beat) != (state.row.epoch, state.row.beat) {
                return Ok(Claimed::Lost);
            }
            let epoch = state.row.epoch.next().max(claim.at_least);
            state.row = Observed {
                epoch,
                beat: state.row.beat + 1,
                claim: claim.id,
                leader: Some(Leader { replica: claim.replica.clone(), epoch }),
                lease_ttl: claim.lease_ttl,
                orchestrator_id: Some(claim.orchestrator_id.clone()),
                time: state.row.time,
                behind: None,
            };
            if next == NextClaim::AnswerLost { Err(away()) } else { Ok(Claimed::Won(epoch)) }
        });
        Box::pin(async move {
            sleep(takes).await;
            claimed.await
        })
    }

    fn renew(&self, epoch: Epoch) -> BoxFuture<'_, Result<Renewed, StoreError>> {
        self.ask(|state| {
            if state.row.epoch != epoch || state.row.leader.is_none() {
                return Ok(Renewed::Superseded);
            }
            state.row.beat += 1;
            Ok(Renewed::Acknowledged)
        })
    }

    fn release(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        self.ask(|state| {
            if state.row.epoch == epoch {
                (state.row.leader, state.row.beat) = (None, state.row.beat + 1);
            }
            Ok(())
        })
    }
}

fn replica(name: &str) -> Replica {
    Replica { name: name.into(), address: None }
}

fn candidate(row: &Row, name: &str, clock: Clock) -> (Candidate, Membership) {
    let membership = Membership::of(replica(name));
    let random = Host::simulated(Timestamp::UNIX_EPOCH, name.bytes().map(u64::from).sum()).random;
    let of = ("o".into(), TTL);
    (Candidate::new(Arc::new(row.clone()), membership.clone(), of, Host::of(clock, random)), membership)
}

async fn wins(candidate: &mut Candidate) -> Won {
    candidate.wins(&CancellationToken::new()).await.unwrap()
}

fn clock() -> Clock {
    Clock::simulated(Timestamp::UNIX_EPOCH)
}

/// A leader whose lease is renewed, until this is aborted.
async fn leading(row: &Row, name: &str, clock: Clock) -> (Epoch, tokio::task::JoinHandle<Epoch>) {
    let (mut candidate, _) = candidate(row, name, clock);
    let Won { epoch, lease } = wins(&mut candidate).await;
    let row = row.clone();
    (epoch, tokio::spawn(async move { keep(&row, epoch, &lease).await }))
}

#[tokio::test(start_paused = true)]
async fn of_several_candidates_one_leads_and_the_others_know_it() {
    let clock = clock();
    let row = Row::new(clock);
    let (mut one, _) = candidate(&row, "one", clock);
    let won = one.look().await.unwrap().unwrap();
    let (mut other, followed) = candidate(&row, "other", clock);
    assert!(other.look().await.unwrap().is_none());
    let leader = Leader { replica: replica("one"), epoch: won.epoch };
    assert_eq!(followed.role(), Role::Follower { leader: Some(leader) });
    assert_eq!(followed.changes(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_gone_is_waited_for_during_its_ttl() {
    let clock = clock();
    let row = Row::new(clock);
    let (first, renewing) = leading(&row, "one", clock).await;
    let (mut other, followed) = candidate(&row, "other", clock);
    assert!(timeout(TTL * 3, wins(&mut other)).await.is_err());
    renewing.abort();
    let gone = Instant::now();
    let won = wins(&mut other).await;
    assert!(won.epoch > first);
    // The last renewal came up to a quarter before, and was seen up to a pause later.
    let waited = gone.elapsed();
    assert!(waited + PAUSE > TTL * 3 / 4 && waited <= TTL + PAUSE * 2, "{waited:?}");
    assert_eq!(followed.role(), Role::Follower { leader: None });
}

#[tokio::test(start_paused = true)]
async fn a_leader_with_a_longer_lease_is_waited_for_as_long() {
    let clock = clock();
    let row = Row::new(clock);
    let (_, renewing) = leading(&row, "one", clock).await;
    renewing.abort();
    row.state().row.lease_ttl = TTL * 5;
    let (mut other, _) = candidate(&row, "other", clock);
    assert!(timeout(TTL * 49 / 10, wins(&mut other)).await.is_err());
    assert!(timeout(PAUSE * 4, wins(&mut other)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_failed_read_restarts_the_wait() {
    let clock = clock();
    let row = Row::new(clock);
    let (_, renewing) = leading(&row, "one", clock).await;
    renewing.abort();
    let (mut other, _) = candidate(&row, "other", clock);
    assert!(timeout(TTL * 9 / 10, wins(&mut other)).await.is_err());
    row.set_away(true);
    assert!(other.look().await.is_err());
    row.set_away(false);
    assert!(timeout(TTL * 9 / 10, wins(&mut other)).await.is_err());
    assert!(timeout(TTL / 2, wins(&mut other)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_was_stopped_looks_again_before_it_claims() {
    let clock = clock();
    let row = Row::new(clock);
    let (_, renewing) = leading(&row, "one", clock).await;
    let (mut other, _) = candidate(&row, "other", clock);
    assert!(other.look().await.unwrap().is_none());
    // The leader goes on meanwhile.
    tokio::time::sleep(TTL * 3).await;
    assert!(other.look().await.unwrap().is_none());
    renewing.abort();
}

#[tokio::test(start_paused = true)]
async fn a_released_term_is_claimed_at_once() {
    let clock = clock();
    let row = Row::new(clock);
    let (epoch, renewing) = leading(&row, "one", clock).await;
    row.release(epoch).await.unwrap();
    renewing.await.unwrap();
    let (mut other, _) = candidate(&row, "other", clock);
    assert!(other.look().await.unwrap().unwrap().epoch > epoch);
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_was_lost_holds_once_a_renewal_is_acknowledged() {
    let clock = clock();
    let row = Row::new(clock);
    let (mut one, _) = candidate(&row, "one", clock);
    row.state().next_claim = NextClaim::AnswerLost;
    one.look().await.unwrap_err();
    let (mut other, _) = candidate(&row, "other", clock);
    assert!(other.look().await.unwrap().is_none());
    let won = one.look().await.unwrap().unwrap();
    assert_eq!(won.epoch, row.state().row.epoch);
    assert_eq!(won.lease.remaining(), TTL * 9 / 10);
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_lost_is_no_term() {
    let clock = clock();
    let row = Row::new(clock);
    let (mut one, _) = candidate(&row, "one", clock);
    row.state().next_claim = NextClaim::Lost;
    one.look().await.unwrap_err();
    let (epoch, renewing) = leading(&row, "other", clock).await;
    assert!(one.look().await.unwrap().is_none());
    assert_eq!(row.state().row.epoch, epoch);
    renewing.abort();
}

#[tokio::test(start_paused = true)]
async fn a_replica_whose_clock_is_wrong_does_not_lead() {
    for (offset, leads) in [(29, true), (-29, true), (31, false), (-31, false)] {
        let of_database = Clock::simulated(Timestamp::from_second(1000).unwrap());
        let row = Row::new(of_database);
        let off = Clock::simulated(Timestamp::from_second(1000 + offset).unwrap());
        let (mut one, membership) = candidate(&row, "one", off);
        assert_eq!(one.look().await.unwrap().is_some(), leads, "{offset}");
        assert_eq!(membership.clock_offset(), Some(SignedDuration::from_secs(-offset)));
    }
}

#[tokio::test(start_paused = true)]
async fn no_lease_is_valid_any_more_when_another_replica_leads() {
    let clock = clock();
    let row = Row::new(clock);
    let (mut one, _) = candidate(&row, "one", clock);
    let Won { epoch, lease } = wins(&mut one).await;
    // Its last renewal, whose answer takes a while.
    advance(Duration::from_secs(2)).await;
    let sent = clock.moment();
    row.renew(epoch).await.unwrap();
    let (mut other, _) = candidate(&row, "other", clock);
    let takes_over = tokio::spawn(async move { wins(&mut other).await.epoch });
    tokio::time::sleep(Duration::from_secs(1)).await;
    lease.renewed(sent);
    lease.lapsed().await;
    assert!(!takes_over.is_finished());
    takes_over.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_is_cancelled_awaits_the_claim_that_is_under_way_and_makes_no_further_one() {
    let clock = clock();
    let row = Row::new(clock);
    row.state().next_claim = NextClaim::Late;
    let (mut one, _) = candidate(&row, "one", clock);
    let cancelled = CancellationToken::new();
    let mut wins = Box::pin(one.wins(&cancelled));
    assert!(timeout(Duration::from_millis(500), &mut wins).await.is_err());
    cancelled.cancel();
    let won = wins.as_mut().await.unwrap();
    drop(wins);
    assert_eq!(won.epoch, row.state().row.epoch);
    row.release(won.epoch).await.unwrap();
    assert!(one.wins(&cancelled).await.is_none());
    assert_eq!(row.state().row.epoch, won.epoch);
}

#[tokio::test(start_paused = true)]
async fn a_follower_keeps_the_leader_that_it_knows_for_a_ttl_while_the_row_is_away() {
    let clock = clock();
    let row = Row::new(clock);
    let (epoch, renewing) = leading(&row, "one", clock).await;
    let (mut other, followed) = candidate(&row, "other", clock);
    assert!(timeout(TTL, wins(&mut other)).await.is_err());
    row.set_away(true);
    assert!(timeout(TTL * 19 / 20, wins(&mut other)).await.is_err());
    let leader = Leader { replica: replica("one"), epoch };
    assert_eq!(followed.role(), Role::Follower { leader: Some(leader) });
    assert!(matches!(*followed.sight().borrow(), Sight::Blind(_)));
    assert!(timeout(PAUSE * 4, wins(&mut other)).await.is_err());
    assert_eq!(followed.role(), Role::Follower { leader: None });
    renewing.abort();
}

#[tokio::test(start_paused = true)]
async fn a_follower_keeps_the_leader_that_it_knows_while_the_row_is_that_of_no_replica() {
    let clock = clock();
    let row = Row::new(clock);
    let (epoch, renewing) = leading(&row, "one", clock).await;
    let (mut other, followed) = candidate(&row, "other", clock);
    assert!(other.look().await.unwrap().is_none());
    let (store, url) = ("s".to_owned(), "s".to_owned());
    row.state().trouble = Some(StoreError::Tampered { store, url, problem: "an epoch that no clock gives".into() });
    assert!(timeout(TTL * 3, wins(&mut other)).await.is_err());
    let leader = Leader { replica: replica("one"), epoch };
    assert_eq!(followed.role(), Role::Follower { leader: Some(leader) });
    assert!(matches!(*followed.sight().borrow(), Sight::Damaged(_)), "it can be read");
    renewing.abort();
}

#[tokio::test(start_paused = true)]
async fn the_row_of_an_earlier_term_gives_no_leader_and_is_not_claimed() {
    let clock = clock();
    let row = Row::new(clock);
    let (first, renewing) = leading(&row, "one", clock).await;
    // As an earlier primary has it.
    let earlier = row.state().row.clone();
    row.release(first).await.unwrap();
    renewing.await.unwrap();
    let (second, renewing) = leading(&row, "two", clock).await;
    let (mut other, followed) = candidate(&row, "other", clock);
    assert!(other.look().await.unwrap().is_none());
    let later = mem::replace(&mut row.state().row, earlier);
    assert_eq!(other.look().await.unwrap_err(), StoreError::Outdated { found: first, known: second });
    let leader = Leader { replica: replica("two"), epoch: second };
    assert_eq!(followed.role(), Role::Follower { leader: Some(leader.clone()) });
    assert!(timeout(TTL * 3, wins(&mut other)).await.is_err());
    assert_eq!((followed.role(), row.state().row.epoch), (Role::Follower { leader: None }, first));
    row.state().row = later;
    assert!(other.look().await.unwrap().is_none());
    assert_eq!(followed.role(), Role::Follower { leader: Some(leader) });
    renewing.abort();
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_has_led_does_not_claim_the_row_of_an_earlier_term() {
    let clock = clock();
    let row = Row::new(clock);
    let (mut one, _) = candidate(&row, "one", clock);
    let first = wins(&mut one).await.epoch;
    let earlier = row.state().row.clone();
    row.release(first).await.unwrap();
    let second = wins(&mut one).await.epoch;
    row.state().row = earlier;
    assert_eq!(one.look().await.unwrap_err(), StoreError::Outdated { found: first, known: second });
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_found_unable_to_lead_claims_nothing_until_it_is_able() {
    let clock = clock();
    let row = Row::new(clock);
    let (mut one, membership) = candidate(&row, "one", clock);
    assert!(membership.set_unable(Some("it has no key")));
    assert!(timeout(TTL * 3, wins(&mut one)).await.is_err());
    assert_eq!(row.state().row.epoch, Epoch(0));
    assert!(membership.set_unable(None));
    assert!(one.look().await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_replica_claims_nothing_in_the_store_of_another_orchestrator_or_with_a_clock_that_is_far_off() {
    let clock = clock();
    let row = Row::new(clock);
    row.state().row.orchestrator_id = Some("other".into());
    let (mut one, membership) = candidate(&row, "one", clock);
    assert!(timeout(TTL * 3, wins(&mut one)).await.is_err());
    let why = membership.unable().unwrap();
    assert!(why.contains("\"o\"") && why.contains("\"other\"") && why.contains("store rename"), "{why}");
    row.state().row.orchestrator_id = Some("o".into());
    row.state().clock = Clock::simulated(clock.now() + Duration::from_secs(31));
    assert!(timeout(TTL * 3, wins(&mut one)).await.is_err());
    let why = membership.unable().unwrap();
    assert!(why.contains("its clock differs"), "{why}");
    assert_eq!(row.state().row.epoch, Epoch(0));
    row.state().clock = clock;
    assert!(one.look().await.unwrap().is_some());
    assert_eq!(membership.unable(), None);
    assert_eq!(row.state().row.orchestrator_id.as_deref(), Some("o"));
}

#[tokio::test(start_paused = true)]
async fn a_term_is_over_once_the_row_shows_by_which_one() {
    let clock = clock();
    let row = Row::new(clock);
    let (first, renewing) = leading(&row, "one", clock).await;
    tokio::task::yield_now().await;
    let (mut other, _) = candidate(&row, "other", clock);
    let seen = row.observe().await.unwrap();
    let second = other.claim(&seen).await.unwrap().unwrap().epoch;
    assert_eq!((second > first, renewing.await.unwrap()), (true, second));
}
