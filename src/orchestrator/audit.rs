//! Calls that have no event of their own, such as reads and denied ones: they are summed up for a while, and each sum
//! is written as one event. No call waits for that, or fails because of it: what is not written yet is lost with the
//! process.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    future::pending,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    select,
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{Orchestrator, Refusal, Shared, State};
use crate::{
    clock::Clock,
    model::{AuditEvent, Cause, Code, Decision, EventKind, Identity},
    ports::{AuditEntry, Write},
    record,
};

/// Most events of one write, so that cycles hardly wait for it.
const BATCH: usize = 256;

/// The action of events about calls that are in no sum.
const LOSS: &str = "audit_loss";

/// How calls are summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// Calls that have ended and changed nothing: for a minute.
    Calls,
    /// Beginnings and ends of streams: for a second, so that each has an event of its own unless there are many.
    Streams,
    /// Denied calls: for 10 seconds.
    Denials,
}

impl Sum {
    const ALL: [Self; 3] = [Self::Calls, Self::Streams, Self::Denials];

    /// How long calls are summed up, from the first one on.
    fn time(self) -> Duration {
        Duration::from_secs(match self {
            Self::Calls => 60,
            Self::Streams => 1,
            Self::Denials => 10,
        })
    }

    /// Most sums of this kind, of at most 1 KiB each: many times as many as a fleet has callers with different calls.
    fn max(self) -> usize {
        match self {
            Self::Calls => 2048,
            Self::Streams | Self::Denials => 1024,
        }
    }
}

/// Sums up calls. All clones share the sums.
#[derive(Clone)]
pub struct Sums(Arc<Inner>);

struct Inner {
    clock: Clock,
    /// False if calls that are not denied have no events.
    reads: AtomicBool,
    waiting: Mutex<Waiting>,
    /// Notified when there is a first sum of a kind.
    begun: Notify,
}

#[derive(Default)]
struct Waiting {
    /// By [`Sum`].
    sums: [BTreeMap<Key, AuditEvent>; Sum::ALL.len()],
    /// When they are to be written.
    due: [Option<Instant>; Sum::ALL.len()],
    /// Number of calls that are in no sum, since there was no room for another one or it could not be written.
    lost: u64,
}

/// What calls in one sum have in common.
type Key = (Option<Identity>, String, Option<Arc<str>>, Cow<'static, str>, Decision, Option<Code>, &'static str);

impl Sums {
    /// No calls so far. With `reads`, also calls that are not denied are summed up.
    pub fn new(clock: Clock, reads: bool) -> Self {
        let (waiting, begun) = (Mutex::default(), Notify::new());
        Self(Arc::new(Inner { clock, reads: AtomicBool::new(reads), waiting, begun }))
    }

    /// Adds a call that has ended now with this code, a stream that has begun (`None`), or a denied call with the
    /// reason of its status.
    pub fn add(&self, sum: Sum, cause: &Cause, code: Option<Code>, reason: &'static str) {
        if sum != Sum::Denials && !self.0.reads.load(Ordering::Relaxed) {
            return;
        }
        let time = self.0.clock.now();
        let kind = if sum == Sum::Denials { EventKind::Denials } else { EventKind::Calls };
        self.insert(sum, AuditEvent { kind, code, reason, ..cause.event(time) });
    }

    /// Adds the calls of this event.
    fn insert(&self, sum: Sum, added: AuditEvent) {
        let AuditEvent { code, reason, cause: Cause { caller, peer, via, rpc, decision, .. }, .. } = &added;
        let key = (caller.clone(), peer.clone(), via.clone(), rpc.clone(), *decision, *code, *reason);
        let mut waiting = self.waiting();
        let Waiting { sums, due, lost } = &mut *waiting;
        let (sums, due) = (&mut sums[sum as usize], &mut due[sum as usize]);
        if let Some(event) = sums.get_mut(&key) {
            event.time = event.time.max(added.time);
            event.count += added.count;
            event.cause.targets.add(added.cause.targets);
        } else if sums.len() == sum.max() {
            *lost += added.count;
        } else {
            sums.insert(key, added);
            if due.is_none() {
                *due = Some(Instant::now() + sum.time());
                self.0.begun.notify_one();
            }
        }
    }

    /// Whether calls that are not denied are summed up from now on.
    pub fn set_reads(&self, reads: bool) {
        self.0.reads.store(reads, Ordering::Relaxed);
    }

    /// Waits until some sums are to be written, and takes them. Nothing is taken if this is dropped before.
    pub async fn next_due(&self) -> Vec<AuditEvent> {
        self.until_due().await;
        self.take(Some(Instant::now()))
    }

    /// Takes all sums.
    pub fn take_all(&self) -> Vec<AuditEvent> {
        self.take(None)
    }

    /// Puts sums back that were taken, and could not be written.
    pub fn put_back(&self, events: Vec<AuditEvent>) {
        for event in events {
            let sum = if event.kind == EventKind::Denials { Sum::Denials } else { Sum::Calls };
            if event.cause.rpc == LOSS {
                self.waiting().lost += event.count;
            } else {
                self.insert(sum, event);
            }
        }
    }

    /// Waits until some sums are to be written.
    async fn until_due(&self) {
        loop {
            let due = async {
                match self.due() {
                    Some(due) => sleep_until(due).await,
                    None => pending().await,
                }
            };
            select! {
                biased;
                () = due => return,
                () = self.0.begun.notified() => {}
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next sums are to be written.
    fn due(&self) -> Option<Instant> {
        self.waiting().due.iter().flatten().min().copied()
    }

    /// Takes the sums that are to be written by this time, `None` means all, with an event about lost calls.
    fn take(&self, by: Option<Instant>) -> Vec<AuditEvent> {
        let mut waiting = self.waiting();
        let Waiting { sums, due, lost } = &mut *waiting;
        let mut taken = Vec::new();
        for (sums, due) in sums.iter_mut().zip(due) {
            if due.is_some_and(|due| by.is_none_or(|by| due <= by)) {
                *due = None;
                taken.extend(mem::take(sums).into_values());
            }
        }
        if !taken.is_empty() && *lost > 0 {
            let event = Cause::of_service(LOSS).event(self.0.clock.now());
            taken.push(AuditEvent { kind: EventKind::Calls, code: None, count: mem::take(lost), ..event });
        }
        taken
    }
}

impl Orchestrator {
    /// The sums of calls that have no event of their own.
    pub fn sums(&self) -> Sums {
        self.0.sums.clone()
    }

    /// Writes the events of calls that another replica has answered or denied.
    ///
    /// # Errors
    /// The process shuts down, or the store can't be written.
    pub async fn write_events(&self, events: Vec<AuditEntry>) -> Result<(), Refusal> {
        let _open = self.open_change();
        if self.0.state().draining {
            return Err(Refusal::Draining);
        }
        let write = move |_: &State| Write { audit: events.clone(), ..Write::default() };
        Ok(self.0.edit(write, |_| ()).await?)
    }
}

impl Shared {
    /// Writes the sums when they are due.
    pub(super) async fn write_sums(self: Arc<Self>) {
        loop {
            self.sums.until_due().await;
            // Counted before the check, so that the last write waits for it.
            let token = self.changes.token();
            if self.state().draining {
                break;
            }
            self.write_taken(self.sums.take(Some(Instant::now()))).await;
            drop(token);
        }
        // From now on, the conductor takes them.
        pending::<()>().await;
    }

    /// Writes all sums. Called before the last write, which nothing may follow.
    pub(super) async fn write_last_sums(&self) {
        self.write_taken(self.sums.take(None)).await;
    }

    async fn write_taken(&self, events: Vec<AuditEvent>) {
        for batch in events.chunks(BATCH) {
            let entries: Vec<AuditEntry> = batch.iter().map(record::encode_event).collect();
            let write = move |_: &_| Write { audit: entries.clone(), ..Write::default() };
            if let Err(error) = self.edit(write, |_| ()).await {
                let calls = batch.iter().map(|event| event.count).sum::<u64>();
                tracing::warn!(%error, calls, "can't write audit events of calls that changed nothing");
                let mut waiting = self.sums.waiting();
                waiting.lost = waiting.lost.saturating_add(calls);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(caller: u32, targets: &[&str]) -> Cause {
        let targets = targets.iter().copied().collect();
        Cause { caller: Some(Identity::Uid(caller)), targets, ..Cause::of_service("GetStatus") }
    }

    /// The caller, the number of its calls, and its targets.
    fn brief(events: &[AuditEvent]) -> Vec<(Option<Identity>, u64, Vec<&str>)> {
        events.iter().map(|event| (event.cause.caller.clone(), event.count, named(&event.cause))).collect()
    }

    fn named(cause: &Cause) -> Vec<&str> {
        cause.targets.named.iter().map(String::as_str).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn equal_calls_are_one_sum_until_it_is_due() {
        let sums = Sums::new(Clock::system(), true);
        assert_eq!(sums.due(), None);
        let begin = Instant::now();
        for (caller, target) in [(1, "a"), (2, "a"), (1, "b"), (1, "a")] {
            sums.add(Sum::Calls, &cause(caller, &[target]), Some(Code::Ok), "");
        }
        assert_eq!(sums.due(), Some(begin + Duration::from_mins(1)));
        sums.add(Sum::Denials, &cause(1, &[]), Some(Code::Unauthenticated), "CREDENTIAL_MISSING");
        sums.add(Sum::Denials, &cause(1, &[]), Some(Code::Unauthenticated), "CREDENTIAL_EXPIRED");
        assert_eq!(sums.due(), Some(begin + Duration::from_secs(10)));
        assert_eq!(sums.take(Some(begin + Duration::from_secs(9))), []);
        let denials = sums.take(Some(begin + Duration::from_secs(10)));
        assert_eq!(
            denials.iter().map(|event| (event.reason, event.count)).collect::<Vec<_>>(),
            [("CREDENTIAL_EXPIRED", 1), ("CREDENTIAL_MISSING", 1)]
        );
        let calls = sums.take(None);
        let uid = |uid| Some(Identity::Uid(uid));
        assert_eq!(brief(&calls), [(uid(1), 3, vec!["a", "b"]), (uid(2), 1, vec!["a"])]);
        assert_eq!((sums.due(), sums.take(None).len()), (None, 0));
    }

    #[test]
    fn calls_beyond_the_limit_are_counted_as_lost_and_those_of_other_kinds_are_not() {
        let sums = Sums::new(Clock::system(), true);
        for caller in 0..2000 {
            for _ in 0..2 {
                sums.add(Sum::Denials, &cause(caller, &[]), Some(Code::Unauthenticated), "CREDENTIAL_INVALID");
            }
        }
        sums.add(Sum::Calls, &cause(1, &[]), Some(Code::Ok), "");
        let events = sums.take(None);
        assert_eq!(events.len(), 1 + 1024 + 1);
        let loss = events.last().unwrap();
        assert_eq!((&*loss.cause.rpc, loss.count), ("audit_loss", 2 * (2000 - 1024)));
        assert_eq!(events.iter().map(|event| event.count).sum::<u64>(), 1 + 2 * 2000);
    }

    #[test]
    fn sums_that_were_not_written_are_put_back() {
        let sums = Sums::new(Clock::system(), true);
        let add = || {
            sums.add(Sum::Calls, &cause(1, &["a"]), Some(Code::Ok), "");
            sums.add(Sum::Denials, &cause(1, &[]), Some(Code::Unauthenticated), "CREDENTIAL_INVALID");
        };
        add();
        let taken = sums.take_all();
        add();
        sums.put_back(taken);
        assert!(sums.due().is_some());
        let (uid, again) = (Some(Identity::Uid(1)), sums.take_all());
        assert_eq!(brief(&again), [(uid.clone(), 2, vec!["a"]), (uid, 2, vec![])]);
        // A loss stays one.
        let loss = AuditEvent { kind: EventKind::Calls, count: 5, ..Cause::of_service(LOSS).event(again[0].time) };
        sums.put_back(vec![loss]);
        add();
        assert_eq!(sums.take_all().last().map(|event| (event.cause.rpc.clone(), event.count)), Some((LOSS.into(), 5)));
    }

    #[test]
    fn only_denials_are_summed_up_if_reads_are_not() {
        let sums = Sums::new(Clock::system(), false);
        for sum in Sum::ALL {
            sums.add(sum, &cause(1, &[]), None, "");
        }
        assert_eq!(sums.take(None).len(), 1);
    }
}
