//! The calls that a follower makes to the leader itself: it follows the history there, and reports the calls of its
//! callers that it has answered or denied, for the audit.

use std::{future::pending, mem, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use prost::Message;
use tokio::{
    select,
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::Status;

use super::{Forwarder, connections::Place, headers_of_grpc, is_other, messages::Messages};
use crate::{
    api::{
        error,
        forwarded::{self, Forwarded},
        rpc::Rpc,
    },
    ledger::Checkpoint,
    memory::Held,
    model::{AuditEvent, CycleId, Epoch, Name, Revision, Role},
    orchestrator::{LiveCycle, Position, Published, Sums, Update},
    ports::TriggerKind,
    proto::{
        framing,
        orchestrator::v1::{self as pb, cycle_event::Event as Is},
        read_timestamp,
    },
    record,
};

/// Times until a leader is asked again that can't be reached, or whose stream has ended: the first one, which is
/// doubled each time, and the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest time for the leader to begin its stream, and then without an event, since it sends a bookmark at least each
/// 30 s; and for this replica to take one.
const SILENCE: Duration = Duration::from_secs(45);
/// Longest time for the leader to take a report.
const REPORT: Duration = Duration::from_secs(2);

/// Longest time without a leader, after which watches end. Their clients get a bookmark each 30 s otherwise.
const PATIENCE: Duration = Duration::from_mins(1);
/// Time after which progress is no longer asked for that no watcher wants.
const IDLE: Duration = Duration::from_secs(10);

/// The stream of the leader has to begin anew, with progress or without.
struct OtherProgress;

/// The answer to a call of this replica itself.
struct OwnAnswer<A> {
    messages: Messages<A>,
    _place: Place,
    _room: Held,
}

impl Forwarder {
    /// Follows the history of the leader, while another replica leads: each record that it acknowledges, and the
    /// progress of its cycles while a watcher wants that. Returns only if the role of this replica does not change any
    /// more.
    pub async fn follow(&self) {
        let mut roles = self.0.membership.roles();
        let (mut failing, mut told, mut pause) = (None, false, FIRST_PAUSE);
        loop {
            let follows = |role: &Role| matches!(role, Role::Follower { leader: Some(_) });
            let leader = match roles.wait_for(follows).await.as_deref() {
                Ok(Role::Follower { leader: Some(leader) }) => leader.clone(),
                _ => return,
            };
            let ended = select! {
                biased;
                _ = roles.wait_for(|role| is_other(role, &leader)) => None,
                ended = self.follow_now(leader.epoch) => Some(ended),
            };
            if let Some(Ok(OtherProgress)) = ended {
                continue;
            }
            if self.0.is_current.send_replace(false) {
                (failing, pause) = (None, FIRST_PAUSE);
            }
            let Some(Err(status)) = ended else { continue };
            // Once for each leader: it may take long until it can be reached. And not at first: a replica that has just
            // claimed to lead begins its term a moment later.
            if failing.as_ref() != Some(&leader) {
                (failing, told) = (Some(leader), false);
            } else if !mem::replace(&mut told, true) {
                let (of, why) = (&leader.replica.name, status.message());
                tracing::warn!(leader = %of, "the history of the leader is not followed, and is tried again: {why}");
            }
            select! {
                biased;
                _ = roles.changed() => pause = FIRST_PAUSE,
                () = sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// Follows the history of the leader of this epoch until its stream ends, or until progress is wanted of it, or no
    /// longer.
    async fn follow_now(&self, of: Epoch) -> Result<OtherProgress, Status> {
        let history = &self.0.history;
        let mut wanted = history.progress_wanted();
        let progress = *wanted.borrow_and_update() > 0;
        let request = pb::WatchCyclesRequest { progress, ..pb::WatchCyclesRequest::default() };
        let events = self.ask_as_replica(Rpc::WatchCycles, &request);
        let mut events: OwnAnswer<pb::WatchCyclesResponse> = in_time("it does not begin its stream", events).await?;
        history.told_anew();
        loop {
            let next = select! {
                biased;
                () = differs(&mut wanted, progress) => return Ok(OtherProgress),
                next = in_time("its stream is silent", events.messages.next()) => next?,
            };
            let event =
                next.and_then(|event| event.event).ok_or_else(|| Status::unavailable("its stream has ended"))?;
            let epoch = Some(Epoch(event.epoch)).filter(|epoch| *epoch != Epoch::default());
            let position = Position { revision: Revision(event.revision), epoch };
            in_time("the store does not answer", async {
                history.compare(position, of).await.map_err(error::status)?;
                match event.event {
                    Some(event) => self.take(event).await,
                    None => Ok(()),
                }
            })
            .await?;
            history.raise(position);
            self.0.is_current.send_if_modified(|is_current| !mem::replace(is_current, true));
        }
    }

    /// Takes what the leader has told.
    async fn take(&self, event: Is) -> Result<(), Status> {
        let history = &self.0.history;
        if matches!(event, Is::Recorded(_) | Is::Started(_)) && history.needs_names() {
            // It may have been renamed since. What happened before is in the store.
            history.read_names().await.map_err(error::status)?;
        }
        match event {
            // Its memory is that of answers, and it may stay for long.
            Is::Recorded(bytes) => match record::read(bytes.to_vec().into()) {
                Ok(record) => history.told_record(record.into()),
                Err(problem) => tracing::warn!(problem, "a record of the leader is read from the store instead"),
            },
            Is::Started(started) => {
                if let Some(cycle) = cycle(started) {
                    history.told_start(cycle);
                }
            }
            Is::Progress(pb::CycleProgress { cycle_id, updates, dropped }) => {
                let updates = updates.into_iter().filter_map(update).collect();
                history.told_progress(CycleId(cycle_id), dropped, updates);
            }
            Is::Bookmark(pb::Bookmark { checkpoint }) => {
                if let Ok(Checkpoint { size, .. }) = Checkpoint::unverified(&checkpoint) {
                    history.told_checkpoint(Published { size, note: checkpoint.into() });
                }
            }
            Is::Unreadable(_) => {}
        }
        Ok(())
    }

    /// Notes whether this replica reaches its leader, and ends the watches at it once it has neither led, under a valid
    /// lease, nor followed a leader for a while: their clients may find a replica that does.
    ///
    /// A leader that is known and that was not followed for the time `patience` counts as one that can't be reached. So
    /// does each one at first: a new replica is of no use before it has led, or followed one. The time until another
    /// replica leads does not count. `None`: nothing follows the history of the leader, and it always counts as one
    /// that can be reached.
    ///
    /// Returns only if the role of this replica does not change any more.
    pub async fn keep_contact(&self, patience: Option<Duration>) {
        let (mut roles, mut current) = (self.0.membership.roles(), self.0.is_current.subscribe());
        let mut unconfirmed = self.0.history.unconfirmed();
        let mut unfed = Lasting::up_to(PATIENCE);
        let mut unreached = Lasting::up_to(patience.unwrap_or_default());
        let mut has_reached = patience.is_none();
        loop {
            let (role, follows) = (roles.borrow_and_update().clone(), *current.borrow_and_update());
            let leads = role.epoch().is_some() && !*unconfirmed.borrow_and_update();
            self.0.history.set_fed(!unfed.is_too_long(!follows && !leads));
            has_reached |= follows || role.epoch().is_some();
            let knows_another = patience.is_some() && matches!(role, Role::Follower { leader: Some(_) });
            let reaches = has_reached && !unreached.is_too_long(knows_another && !follows);
            self.0.reaches.store(reaches, Ordering::Relaxed);
            select! {
                biased;
                changed = roles.changed() => if changed.is_err() { return },
                // The senders are in `self`.
                _ = current.changed() => {}
                _ = unconfirmed.changed() => {}
                () = unfed.is_over() => {}
                () = unreached.is_over() => {}
            }
        }
    }

    /// Learns from the leader up to which record the history is acknowledged. False if it can't be reached.
    pub(in crate::api) async fn refresh(&self) -> bool {
        let asked = self.ask_as_replica::<_, pb::WhoAmIResponse>(Rpc::WhoAmI, &pb::WhoAmIRequest {});
        timeout(REPORT, asked).await.is_ok_and(|answer| answer.is_ok())
    }

    /// Reports calls to the leader when they are due, while another replica leads. What it does not take is tried again
    /// later, or written by this replica when it leads. Returns only if the role of this replica does not change any
    /// more.
    pub async fn report(&self, sums: &Sums) {
        let mut roles = self.0.membership.roles();
        loop {
            if roles.wait_for(|role| role.epoch().is_none()).await.is_err() {
                return;
            }
            let leads = async { roles.wait_for(|role| role.epoch().is_some()).await.map(drop) };
            select! {
                biased;
                leads = leads => if leads.is_err() { return },
                events = sums.next_due() => self.report_now(sums, events).await,
            }
        }
    }

    /// Reports all calls that the leader has not taken yet.
    pub async fn report_last(&self, sums: &Sums) {
        if self.follows() {
            self.report_now(sums, sums.take_all()).await;
        }
    }

    async fn report_now(&self, sums: &Sums, mut events: Vec<AuditEvent>) {
        while !events.is_empty() {
            let (mut report, mut taken) = (Forwarded::own(self.0.membership.replica().name.clone()), 0);
            for event in &events {
                report.events.push(record::encode_event(event).bytes);
                if report.encoded_len() > Forwarded::MAX_BYTES {
                    report.events.pop();
                    break;
                }
                taken += 1;
            }
            let reported = timeout(REPORT, self.call_as_replica(report)).await;
            if !matches!(reported, Ok(Ok(()))) {
                if let Ok(Err(status)) = reported {
                    tracing::debug!(%status, "the leader has not taken a report for the audit");
                }
                sums.put_back(events);
                return;
            }
            events.drain(..taken);
        }
    }

    /// Makes a call that consists of what its headers say.
    async fn call_as_replica(&self, own: Forwarded) -> Result<(), Status> {
        // A report is no call of any RPC, but goes to the service.
        let mut answer: OwnAnswer<pb::WhoAmIResponse> = self.deliver_own(Rpc::WhoAmI, &own, Vec::new()).await?;
        answer.messages.next().await.map(drop)
    }

    async fn ask_as_replica<Q: Message, A: Message + Default>(
        &self,
        rpc: Rpc,
        request: &Q,
    ) -> Result<OwnAnswer<A>, Status> {
        let own = Forwarded::own(self.0.membership.replica().name.clone());
        self.deliver_own(rpc, &own, vec![framing::framed(request)]).await
    }

    async fn deliver_own<A: Message + Default>(
        &self,
        rpc: Rpc,
        own: &Forwarded,
        message: Vec<Bytes>,
    ) -> Result<OwnAnswer<A>, Status> {
        let mut headers = headers_of_grpc();
        let own = own.to_header().ok_or_else(|| Status::internal("a report is too large"))?;
        headers.insert(forwarded::HEADER, own);
        let sent = self.deliver(rpc, headers, message, Instant::now()).await?;
        let messages = Messages::of(sent.response, self.0.answers.clone())?;
        Ok(OwnAnswer { messages, _place: sent.place, _room: sent.room })
    }
}

/// A state that may last for some time.
struct Lasting {
    limit: Duration,
    /// When it will have lasted for that time.
    until: Option<Instant>,
}

impl Lasting {
    fn up_to(limit: Duration) -> Self {
        Self { limit, until: None }
    }

    /// Notes whether the state lasts. Returns true once it has lasted for too long.
    fn is_too_long(&mut self, lasts: bool) -> bool {
        self.until = lasts.then(|| self.until.unwrap_or_else(|| Instant::now() + self.limit));
        self.until.is_some_and(|until| until <= Instant::now())
    }

    /// Waits until the state has lasted for too long, unless it already has.
    async fn is_over(&self) {
        match self.until.filter(|until| Instant::now() < *until) {
            Some(until) => sleep_until(until).await,
            None => pending().await,
        }
    }
}

/// Waits for what is to be there within [`SILENCE`]; otherwise the status says this.
async fn in_time<T>(otherwise: &str, awaited: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(SILENCE, awaited).await.unwrap_or_else(|_| Err(Status::unavailable(otherwise)))
}

/// Waits until progress is wanted, or, with `progress`, until it has not been wanted for a while.
async fn differs(wanted: &mut watch::Receiver<usize>, progress: bool) {
    loop {
        let changed = wanted.wait_for(|watchers| (*watchers > 0) != progress).await.map(drop);
        if changed.is_err() {
            // The sender lives as long as the history.
            return pending().await;
        }
        if !progress {
            return;
        }
        sleep(IDLE).await;
        if *wanted.borrow_and_update() == 0 {
            return;
        }
    }
}

/// A cycle that the leader has told of. `None` if it has not told enough, which another version may do.
fn cycle(started: pb::CycleStarted) -> Option<LiveCycle> {
    let kind = match started.trigger() {
        pb::Trigger::Unspecified => TriggerKind::Unknown,
        pb::Trigger::Manual => TriggerKind::Manual,
        pb::Trigger::Loop => TriggerKind::Loop,
        pb::Trigger::Parent => TriggerKind::Parent,
    };
    let pb::CycleStarted { cycle_id, started_at, trigger: _, r#loop, scheduled_at, subsystems } = started;
    let of_loop = Name::parse(&r#loop).ok();
    let names = subsystems.iter().filter_map(|name| Name::parse(name).ok()).collect();
    let (scheduled_at, started_at) = (scheduled_at.and_then(read_timestamp)?, started_at.and_then(read_timestamp)?);
    Some(LiveCycle::told(CycleId(cycle_id), (kind, of_loop), scheduled_at, started_at, names))
}

/// An update that the leader has told of, likewise.
fn update(progress: pb::SubsystemProgress) -> Option<Update> {
    let (name, attempts) = (Name::parse(&progress.name).ok()?, progress.attempts);
    let elapsed = Duration::try_from_secs_f64(progress.elapsed_ms / 1e3).ok()?;
    Some(Update { name, state: record::progress(progress).ok()?, elapsed, attempts })
}
