//! The writer, over a scripted store and on paused time: waiting changes are committed together, and no change is
//! visible or lost before its commit returns.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use orchestrator_core::{
    model::{CycleId, CycleRequest, CycleState, Name, OverlapPolicy, Revision},
    orchestrator::{
        Change, Declared, From, NotRecorded, Orchestrator, OrchestratorTasks, Refusal, Registrar, Settings, Stopped,
        Ticket, WatchFilter,
    },
    ports::{self, Durability, Retention, RetentionRule, Store, StoreError, Write},
    record, store,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{advance, sleep, timeout},
};

use crate::kit::{Around, Fleet, by_test, errors, host, of, of_all, seals, settings, start, subsystem, text, warnings};

/// Decides the result of a commit.
type Verdict = Box<dyn Fn(&Write) -> Result<(), StoreError> + Send>;

/// The behaviour of commits: they wait until they are released, and fail as scripted.
struct Script {
    /// Permits to commit; each commit takes one.
    permits: Semaphore,
    verdicts: Mutex<VecDeque<Verdict>>,
    /// The cycles of the records of each attempted commit, in order.
    tried: Mutex<Vec<Vec<u64>>>,
    /// The commits that succeeded, in order.
    written: Mutex<Vec<Arc<Write>>>,
    /// True while commits that start a cycle fail.
    fails_starts: AtomicBool,
    /// True while commits that change the registry fail.
    fails_changes: AtomicBool,
}

impl Script {
    /// From now on no commit waits.
    fn let_go(&self) {
        self.permits.add_permits(1000);
    }

    /// These verdicts are for the next commits with records.
    fn judge(&self, verdicts: impl IntoIterator<Item = Verdict>) {
        self.verdicts.lock().unwrap().extend(verdicts);
    }

    async fn verdict(&self, write: &Write) -> Result<(), StoreError> {
        self.permits.acquire().await.unwrap().forget();
        if write.records.is_empty() {
            let starts = write.open.iter().any(|open| matches!(open.stage, ports::Stage::Begun(_)));
            let fails = (!write.subsystems.is_empty() && self.fails_changes.load(Ordering::Relaxed))
                || (starts && self.fails_starts.load(Ordering::Relaxed));
            return if fails { full(write) } else { Ok(()) };
        }
        let records = write.records.iter().map(|record| record.cycle_id.0).collect();
        self.tried.lock().unwrap().push(records);
        let verdict = self.verdicts.lock().unwrap().pop_front();
        verdict.map_or(Ok(()), |verdict| verdict(write))
    }
}

/// An orchestrator over the subsystems `a`, `b` and `c`, with room for two waiting cycles.
struct Stage {
    script: Arc<Script>,
    trouble: watch::Sender<Option<StoreError>>,
    store: Arc<dyn Store>,
    fleet: Arc<Fleet>,
    orchestrator: Arc<Orchestrator>,
    tasks: OrchestratorTasks,
}

impl Stage {
    async fn new() -> Self {
        let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
        // Each registration, and the start, is a commit: from there on they wait.
        let script = Arc::new(Script {
            permits: Semaphore::new(4),
            verdicts: Mutex::default(),
            tried: Mutex::default(),
            written: Mutex::default(),
            fails_starts: AtomicBool::new(false),
            fails_changes: AtomicBool::new(false),
        });
        let judge = script.clone();
        let commit = Box::new(move |store: Arc<dyn Store>, write: Arc<Write>| {
            let judge = judge.clone();
            Box::pin(async move {
                judge.verdict(&write).await?;
                judge.written.lock().unwrap().push(write.clone());
                store.commit(write).await
            }) as _
        });
        let trouble = watch::Sender::new(None);
        let around = Arc::new(Around { commit, trouble: trouble.clone(), ..Around::over(store.clone()) });
        let fleet = Arc::new(Fleet::default());
        let (orchestrator, tasks) = start(Self::settings(), fleet.clone(), around).await;
        for name in ["a", "b", "c"] {
            orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await.unwrap();
        }
        Self { script, trouble, store, fleet, orchestrator: Arc::new(orchestrator), tasks }
    }

    fn settings() -> Settings {
        Settings {
            max_queued: 2,
            max_concurrent_calls: 2000,
            max_subsystems: 2000,
            max_outputs_bytes: None,
            ..settings()
        }
    }

    async fn run(&self, name: &str) -> Ticket {
        self.orchestrator.run_cycle(of(&[name]), false).await.unwrap()
    }

    /// Lets this number of commits pass, and waits for their effects.
    async fn after_commits(&self, commits: usize) {
        self.script.permits.add_permits(commits);
        sleep(Duration::from_secs(2)).await;
    }

    /// Runs three cycles that share nothing, until the writer holds, or waits for, the records of all of them.
    async fn three_ended(&self) -> [Ticket; 3] {
        let tickets = [self.run("a").await, self.run("b").await, self.run("c").await];
        while self.orchestrator.status().running.len() < 3 {
            self.script.permits.add_permits(1);
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_secs(2)).await;
        assert!(self.script.tried.lock().unwrap().is_empty());
        tickets
    }

    fn output_of(&self, name: &str) -> Option<CycleId> {
        let registered = self.orchestrator.subsystem(&Name::parse(name).unwrap()).unwrap();
        registered.member.standing.latest().map(|output| output.cycle_id)
    }
}

fn full(_: &Write) -> Result<(), StoreError> {
    Err(StoreError::Full { store: "memory:".into(), problem: "as scripted".into() })
}

fn late() -> StoreError {
    StoreError::Late { store: "memory:".into(), waited: Duration::from_secs(5), problem: "as scripted".into() }
}

/// The refusal of a call that waits for the store.
async fn refusal_of<T: std::fmt::Debug, R: Into<Refusal>>(
    call: impl Future<Output = Result<T, R>>,
) -> (Option<u64>, StoreError) {
    match timeout(Duration::from_millis(10), call).await.map(|answer| answer.map_err(Into::into)) {
        Ok(Err(Refusal::StoreUnavailable(cycle_id, error))) => (cycle_id.map(|id| id.0), error),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn no_change_is_visible_before_its_commit_has_returned() {
    let stage = Stage::new().await;
    let mut watcher = stage.orchestrator.history().watch(From::Now, WatchFilter::default(), false).unwrap();
    // The watcher is up to date.
    watcher.next().await.unwrap();
    let ticket = stage.run("a").await;
    // It begins, runs, and waits for its record.
    stage.after_commits(1).await;
    assert!(ticket.record_now().is_none());
    assert_eq!((stage.output_of("a"), stage.orchestrator.status().total_cycles), (None, 0));
    assert!(stage.orchestrator.status().last.is_none());
    assert!(timeout(Duration::from_secs(1), watcher.next()).await.is_err());
    stage.after_commits(1).await;
    assert_eq!(ticket.record_now().unwrap().state, CycleState::Succeeded);
    assert_eq!((stage.output_of("a"), stage.orchestrator.status().total_cycles), (Some(CycleId(1)), 1));
    watcher.next().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn cycles_that_end_together_share_a_commit() {
    let stage = Stage::new().await;
    let tickets = stage.three_ended().await;
    // One commit is in flight, with the cycles that had ended before it was made. The next commit has the others.
    stage.after_commits(2).await;
    assert!(tickets.iter().all(|ticket| ticket.record_now().is_some()));
    let tried = stage.script.tried.lock().unwrap();
    let mut recorded = tried.concat();
    recorded.sort_unstable();
    assert_eq!(recorded, [1, 2, 3]);
    assert!(tried.len() <= 2, "{tried:?}");
}

#[tokio::test(start_paused = true)]
async fn writes_of_cycles_are_retried_and_other_changes_fail_with_the_first_error() {
    let stage = Stage::new().await;
    let ticket = stage.run("a").await;
    stage.after_commits(1).await;
    stage.script.judge([Box::new(full) as Verdict, Box::new(full)]);
    let orchestrator = stage.orchestrator.clone();
    let registering =
        tokio::spawn(async move { orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await });
    // The record waits for this commit, and the registration behind it.
    sleep(Duration::from_millis(10)).await;
    stage.script.let_go();
    let refused = ticket.recorded().await;
    assert!(matches!(refused, Err(NotRecorded::StoreUnavailable(Some(CycleId(1)), _))), "{refused:?}");
    let refused = registering.await.unwrap();
    assert!(matches!(refused, Err(Refusal::StoreUnavailable(None, _))), "{refused:?}");
    assert!(stage.orchestrator.status().store_error.is_some());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.orchestrator.cycle(CycleId(1)).await.unwrap().revision, Revision(1));
    assert!(stage.orchestrator.status().store_error.is_none());
    assert_eq!(*stage.script.tried.lock().unwrap(), [[1], [1], [1]]);
    stage.orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_change_whose_caller_leaves_before_its_turn_is_not_made() {
    let stage = Stage::new().await;
    let register = |name| {
        let orchestrator = stage.orchestrator.clone();
        timeout(Duration::from_secs(1), async move {
            orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await
        })
    };
    // No commit returns. The first registration is already being written, so it is completed although its caller has
    // left.
    let (first, second) = tokio::join!(register("d"), register("e"));
    assert!(first.is_err() && second.is_err());
    stage.script.let_go();
    sleep(Duration::from_secs(1)).await;
    let registered = |name: &str| stage.orchestrator.subsystem(&Name::parse(name).unwrap()).is_ok();
    assert_eq!((registered("d"), registered("e")), (true, false));
}

#[tokio::test(start_paused = true)]
async fn a_cycle_that_waits_is_listed_once_its_id_is_noted() {
    let stage = Stage::new().await;
    stage.run("a").await;
    // It begins, and the other one waits for it.
    stage.script.permits.add_permits(1);
    sleep(Duration::from_millis(1)).await;
    stage.run("a").await;
    let listed = || stage.orchestrator.status().waiting.iter().map(|it| it.cycle_id.0).collect::<Vec<_>>();
    sleep(Duration::from_millis(1)).await;
    assert_eq!((stage.orchestrator.status().queued, listed()), (1, vec![]));
    stage.script.permits.add_permits(1);
    sleep(Duration::from_millis(1)).await;
    assert_eq!((stage.orchestrator.status().queued, listed()), (1, vec![2]));
}

#[tokio::test(start_paused = true)]
async fn the_number_of_logged_errors_of_a_failing_write_does_not_depend_on_callers() {
    const CALLS: usize = 50;
    let stage = Stage::new().await;
    let ticket = stage.run("a").await;
    stage.script.judge((0..=CALLS).map(|_| Box::new(full) as Verdict));
    stage.script.let_go();
    let refused = ticket.recorded().await;
    assert!(matches!(refused, Err(NotRecorded::StoreUnavailable(Some(CycleId(1)), _))), "{refused:?}");
    errors();
    for _ in 0..CALLS {
        // Each registration is tried together with the record.
        let refused = stage.orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await.err();
        assert!(matches!(refused, Some(Refusal::StoreUnavailable(None, _))), "{refused:?}");
    }
    assert_eq!((stage.script.tried.lock().unwrap().len(), errors().as_str()), (CALLS + 1, ""));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.orchestrator.cycle(CycleId(1)).await.unwrap().revision, Revision(1));
}

#[tokio::test(start_paused = true)]
async fn when_changes_can_not_be_written_together_only_the_faulty_one_fails() {
    let mut stage = Stage::new().await;
    let tickets = stage.three_ended().await;
    let judge = |write: &Write| {
        let is_to_blame = write.records.iter().any(|record| record.cycle_id == CycleId(2));
        let unusable = || StoreError::Unusable { store: "memory:".into(), problem: "as scripted".into() };
        if is_to_blame { Err(unusable()) } else { Ok(()) }
    };
    stage.script.judge((0..10).map(|_| Box::new(judge) as Verdict));
    stage.script.let_go();
    let ended = timeout(Duration::from_secs(10), stage.tasks.finished()).await.unwrap();
    assert!(matches!(ended, Err(Stopped::Store(StoreError::Unusable { .. }))), "{ended:?}");
    for ticket in tickets {
        let recorded = stage.store.cycle(ticket.cycle_id).await.unwrap();
        assert_eq!(recorded.is_some(), ticket.cycle_id != CycleId(2), "{}", ticket.cycle_id);
    }
}

#[tokio::test(start_paused = true)]
async fn when_changes_can_not_be_written_together_one_that_fails_for_a_passing_reason_is_retried() {
    let mut stage = Stage::new().await;
    let tickets = stage.three_ended().await;
    let was_refused_together = AtomicBool::new(false);
    let judge = move |write: &Write| {
        if write.records.len() > 1 {
            was_refused_together.store(true, Ordering::Relaxed);
            return Err(StoreError::Unusable { store: "memory:".into(), problem: "as scripted".into() });
        }
        if was_refused_together.swap(false, Ordering::Relaxed) { full(write) } else { Ok(()) }
    };
    let judge = Arc::new(judge);
    stage.script.judge((0..10).map(|_| {
        let judge = judge.clone();
        Box::new(move |write: &Write| judge(write)) as Verdict
    }));
    stage.script.let_go();
    sleep(Duration::from_secs(10)).await;
    for ticket in tickets {
        assert_eq!(stage.orchestrator.cycle(ticket.cycle_id).await.unwrap().state, CycleState::Succeeded);
    }
    // Each of the last two was tried together with the other one, and alone, and one of them again.
    let tried = stage.script.tried.lock().unwrap().clone();
    assert!(tried.iter().filter(|records| records.len() == 1).count() >= 3, "{tried:?}");
    assert!(timeout(Duration::from_secs(1), stage.tasks.finished()).await.is_err(), "it goes on");
}

#[tokio::test(start_paused = true)]
async fn a_cycle_that_does_not_succeed_is_logged_with_its_duration_to_the_microsecond() {
    let stage = Stage::new().await;
    stage.script.let_go();
    warnings();
    let ticket = stage.run("a").await;
    sleep(Duration::from_millis(1)).await;
    advance(Duration::from_nanos(1_234_567)).await;
    stage.orchestrator.cancel_cycle(ticket.cycle_id, by_test()).await.unwrap();
    let said = warnings();
    assert!(said.lines().count() == 1 && said.contains("duration_ms=2.235\n"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn a_cycle_that_is_cancelled_while_its_start_is_written_makes_no_calls() {
    let stage = Stage::new().await;
    let ticket = stage.run("a").await;
    sleep(Duration::from_millis(10)).await;
    let orchestrator = stage.orchestrator.clone();
    let cancelling = tokio::spawn(async move { orchestrator.cancel_cycle(CycleId(1), by_test()).await });
    sleep(Duration::from_millis(10)).await;
    stage.script.let_go();
    let record = cancelling.await.unwrap().unwrap();
    assert_eq!((record.state, record.revision), (CycleState::Cancelled, Revision(1)));
    assert_eq!(ticket.recorded().await.unwrap().revision, Revision(1));
    assert!(stage.output_of("a").is_none());
}

#[tokio::test(start_paused = true)]
async fn cancelled_cycles_count_as_waiting_until_they_are_recorded() {
    let stage = Stage::new().await;
    let _running = stage.run("a").await;
    stage.after_commits(1).await;
    // No commit returns any more. Two may wait.
    for cycle_id in [2, 3] {
        let ticket = stage.run("a").await;
        assert_eq!(ticket.cycle_id, CycleId(cycle_id));
        let cancelled =
            timeout(Duration::from_millis(10), stage.orchestrator.cancel_cycle(ticket.cycle_id, by_test())).await;
        assert!(cancelled.is_err(), "it is not recorded");
    }
    let refused = stage.orchestrator.run_cycle(of_all(), false).await;
    assert!(matches!(refused, Err(Refusal::QueueFull(2))), "{refused:?}");
    stage.script.let_go();
    sleep(Duration::from_secs(1)).await;
    let record = stage.orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    assert_eq!((record.cycle_id, record.state), (CycleId(4), CycleState::Succeeded));
}

#[tokio::test(start_paused = true)]
async fn while_a_commit_is_late_nothing_is_admitted_and_it_is_applied_when_it_returns() {
    let stage = Stage::new().await;
    let ticket = stage.run("a").await;
    // The cycle begins, runs, and its record is being written.
    stage.after_commits(1).await;
    stage.trouble.send_replace(Some(late()));
    let answer = ticket.recorded().await;
    assert!(
        matches!(&answer, Err(NotRecorded::StoreUnavailable(Some(CycleId(1)), error)) if *error == late()),
        "{answer:?}"
    );
    assert_eq!(stage.orchestrator.status().store_error, Some(late()));
    let refused = [
        stage.orchestrator.run_cycle(of(&["b"]), false).await.map(|ticket| ticket.cycle_id),
        stage.orchestrator.run_cycle(of(&["b"]), true).await.map(|ticket| ticket.cycle_id),
        stage.orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await.map(|_| CycleId(0)),
    ];
    for refused in refused {
        assert!(matches!(refused, Err(Refusal::StoreUnavailable(None, StoreError::Late { .. }))), "{refused:?}");
    }
    // Readers are not affected.
    let unfinished = stage.orchestrator.cycle(CycleId(1)).await;
    assert!(matches!(unfinished, Err(Refusal::CycleNotFinished(_))), "{unfinished:?}");

    stage.after_commits(1).await;
    let status = stage.orchestrator.status();
    assert_eq!((status.store_error, status.total_cycles), (None, 1));
    assert_eq!(stage.orchestrator.cycle(CycleId(1)).await.unwrap().revision, Revision(1));
    assert_eq!(stage.output_of("a"), Some(CycleId(1)));
    assert_eq!(*stage.script.tried.lock().unwrap(), [[1]], "it was not written again");
    stage.trouble.send_replace(None);
    stage.script.let_go();
    stage.run("b").await.recorded().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn cycles_are_refused_while_a_commit_is_late_and_admitted_afterwards() {
    let stage = Stage::new().await;
    let orchestrator = stage.orchestrator.clone();
    let registering =
        tokio::spawn(async move { orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await });
    sleep(Duration::from_millis(10)).await;
    stage.trouble.send_replace(Some(late()));
    sleep(Duration::from_millis(10)).await;
    assert!(stage.orchestrator.run_cycle(of(&["a"]), false).await.is_err());
    // The commit goes on, and its database answers again.
    stage.trouble.send_replace(None);
    sleep(Duration::from_millis(10)).await;
    assert_eq!(stage.orchestrator.status().store_error, None);
    stage.trouble.send_replace(Some(late()));
    sleep(Duration::from_millis(10)).await;
    assert!(stage.orchestrator.run_cycle(of(&["a"]), false).await.is_err());
    stage.script.fails_changes.store(true, Ordering::Relaxed);
    stage.after_commits(1).await;
    assert!(registering.await.unwrap().is_err());
    assert!(stage.orchestrator.subsystem(&Name::parse("d").unwrap()).is_err());
    assert_eq!(stage.orchestrator.status().store_error, None);
    stage.script.let_go();
    stage.run("a").await.recorded().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reload_waits_for_its_late_commit() {
    let stage = Stage::new().await;
    let (orchestrator, declared) =
        (stage.orchestrator.clone(), Declared { subsystems: vec![subsystem("d")], ..Declared::default() });
    let reloading = tokio::spawn(async move { orchestrator.reload(settings(), declared).await });
    sleep(Duration::from_millis(10)).await;
    stage.trouble.send_replace(Some(late()));
    sleep(Duration::from_millis(10)).await;
    assert!(!reloading.is_finished());
    stage.script.let_go();
    reloading.await.unwrap().unwrap();
    assert!(stage.orchestrator.subsystem(&Name::parse("d").unwrap()).is_ok());
}

#[tokio::test(start_paused = true)]
async fn callers_of_cycles_behind_a_late_commit_are_refused_and_the_cycles_recorded_afterwards() {
    let stage = Stage::new().await;
    let commits = |number| stage.script.permits.add_permits(number);
    let recorded = stage.run("a").await;
    commits(1);
    sleep(Duration::from_millis(500)).await;
    let runs = tokio::spawn(stage.run("b").await.recorded());
    commits(1);
    sleep(Duration::from_millis(10)).await;
    let waits = stage.run("a").await;
    commits(1);
    // The first one ends, and its record does not return.
    sleep(Duration::from_millis(600)).await;
    let begins = stage.run("c").await;
    sleep(Duration::from_millis(100)).await;
    stage.trouble.send_replace(Some(late()));
    for (ticket, noted) in [(recorded, Some(1)), (waits, Some(3)), (begins, None)] {
        assert_eq!(refusal_of(ticket.recorded()).await, (noted, late()));
    }
    sleep(Duration::from_millis(200)).await;
    assert!(!runs.is_finished());
    // It ends.
    sleep(Duration::from_millis(200)).await;
    assert_eq!(refusal_of(async { runs.await.unwrap() }).await, (Some(2), late()));
    // Its record waits as well.
    assert_eq!(refusal_of(stage.orchestrator.cancel_cycle(CycleId(3), by_test())).await, (Some(3), late()));
    assert_eq!(stage.orchestrator.status().total_cycles, 0);

    stage.script.let_go();
    sleep(Duration::from_secs(2)).await;
    for cycle_id in 1..=4 {
        let expected = if cycle_id == 3 { CycleState::Cancelled } else { CycleState::Succeeded };
        assert_eq!(stage.orchestrator.cycle(CycleId(cycle_id)).await.unwrap().state, expected, "{cycle_id}");
    }
}

#[tokio::test(start_paused = true)]
async fn callers_of_cycles_in_line_are_refused_while_the_store_can_not_be_written() {
    let stage = Stage::new().await;
    stage.run("a").await;
    stage.script.permits.add_permits(1);
    sleep(Duration::from_millis(10)).await;
    let waits = stage.run("a").await;
    stage.script.judge([Box::new(full) as Verdict, Box::new(full)]);
    stage.script.let_go();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(refusal_of(waits.recorded()).await, (Some(2), full(&Write::default()).unwrap_err()));
    sleep(Duration::from_secs(3)).await;
    assert_eq!(stage.orchestrator.cycle(CycleId(2)).await.unwrap().state, CycleState::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_request_waits_for_its_cycle_again_once_no_commit_is_late() {
    let stage = Stage::new().await;
    stage.run("a").await;
    stage.after_commits(1).await;
    let ask = || async {
        let request = CycleRequest { request_id: Some("again".into()), ..of(&["a"]) };
        stage.orchestrator.run_cycle(request, false).await?.recorded().await.map_err(Refusal::from)
    };
    // It waits in line.
    assert!(timeout(Duration::from_millis(10), ask()).await.is_err());
    for _ in 0..2 {
        stage.trouble.send_replace(Some(late()));
        sleep(Duration::from_millis(10)).await;
        assert_eq!(refusal_of(ask()).await, (None, late()));
        stage.trouble.send_replace(None);
        sleep(Duration::from_millis(10)).await;
        assert!(timeout(Duration::from_millis(10), ask()).await.is_err());
    }
    stage.script.let_go();
    assert_eq!(ask().await.unwrap().cycle_id, CycleId(2));
}

#[tokio::test(start_paused = true)]
async fn no_lease_ends_while_nothing_can_be_written_and_all_begin_anew_afterwards() {
    let stage = Stage::new().await;
    stage.script.let_go();
    let (lease, moment) = (Duration::from_secs(15), Duration::from_millis(10));
    let almost = lease.saturating_sub(moment);
    let by = Registrar::Anyone;
    for name in ["d", "e"] {
        stage.orchestrator.register(subsystem(name), Some(lease), &by, by_test()).await.unwrap();
        stage.orchestrator.suspend(&Name::parse(name).unwrap(), true, by_test()).await.unwrap();
    }
    let left = || ["d", "e"].map(|name| stage.orchestrator.subsystem(&Name::parse(name).unwrap()).is_ok());
    let renewed = |name: &str| stage.orchestrator.renew_lease(&Name::parse(name).unwrap(), &by);

    // A commit waits.
    stage.script.permits.forget_permits(1000);
    stage.run("a").await;
    sleep(moment).await;
    stage.trouble.send_replace(Some(late()));
    sleep(2 * lease).await;
    renewed("d").unwrap();
    stage.trouble.send_replace(None);
    stage.script.let_go();
    sleep(almost).await;
    assert_eq!(left(), [true, true]);
    assert!(stage.orchestrator.subsystem(&Name::parse("e").unwrap()).unwrap().member.suspended);

    // Another replica may lead.
    stage.orchestrator.lapse();
    sleep(2 * lease).await;
    stage.orchestrator.confirm();
    sleep(almost).await;
    assert_eq!(left(), [true, true]);
    renewed("e").unwrap();
    sleep(2 * moment).await;
    assert_eq!(left(), [false, true]);
    sleep(lease).await;
    assert_eq!(left(), [false, false]);
}

#[tokio::test(start_paused = true)]
async fn a_change_that_waits_for_its_turn_is_refused_once_a_commit_is_late_and_not_made() {
    let stage = Stage::new().await;
    let register = |name| {
        let orchestrator = stage.orchestrator.clone();
        tokio::spawn(async move { orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await })
    };
    let (first, second) = (register("d"), register("e"));
    sleep(Duration::from_millis(10)).await;
    stage.trouble.send_replace(Some(late()));
    assert_eq!(refusal_of(async { second.await.unwrap() }).await, (None, late()));
    assert_eq!(refusal_of(async { register("f").await.unwrap() }).await, (None, late()));
    let refused = first.await.unwrap();
    assert!(matches!(&refused, Err(Refusal::ChangeIsLate(error)) if *error == late()), "{refused:?}");
    // The commit returns.
    stage.script.let_go();
    sleep(Duration::from_secs(1)).await;
    let registered = ["d", "e", "f"].map(|name| stage.orchestrator.subsystem(&Name::parse(name).unwrap()).is_ok());
    assert_eq!(registered, [true, false, false]);
}

#[tokio::test(start_paused = true)]
async fn a_queued_change_is_refused_once_a_commit_is_late_and_not_made() {
    let stage = Stage::new().await;
    stage.run("a").await;
    // Its record does not return.
    stage.after_commits(1).await;
    let orchestrator = stage.orchestrator.clone();
    let registering =
        tokio::spawn(async move { orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await });
    sleep(Duration::from_millis(10)).await;
    stage.trouble.send_replace(Some(late()));
    assert_eq!(refusal_of(async { registering.await.unwrap() }).await, (None, late()));
    stage.script.let_go();
    sleep(Duration::from_secs(1)).await;
    assert!(stage.orchestrator.subsystem(&Name::parse("d").unwrap()).is_err());
    let outcome = stage.orchestrator.register(subsystem("d"), None, &Registrar::Anyone, by_test()).await.unwrap();
    assert_eq!(outcome.change, Change::Created);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_does_not_wait_for_its_cycle_is_refused_once_a_commit_is_late() {
    let stage = Stage::new().await;
    let admit = |name| {
        let orchestrator = stage.orchestrator.clone();
        tokio::spawn(async move { orchestrator.run_cycle(of(&[name]), true).await.map(|ticket| ticket.cycle_id) })
    };
    // The first one is noted by the late commit, the second one behind it.
    let first = admit("a");
    sleep(Duration::from_millis(10)).await;
    let second = admit("b");
    sleep(Duration::from_millis(10)).await;
    stage.trouble.send_replace(Some(late()));
    for admitting in [first, second] {
        assert_eq!(refusal_of(async { admitting.await.unwrap() }).await, (None, late()));
    }
    stage.script.let_go();
    sleep(Duration::from_secs(2)).await;
    assert_eq!(stage.orchestrator.status().total_cycles, 2);
}

#[tokio::test(start_paused = true)]
async fn the_last_write_waits_for_a_late_commit() {
    let mut stage = Stage::new().await;
    stage.script.permits.add_permits(1);
    stage
        .orchestrator
        .register(subsystem("d"), Some(Duration::from_secs(1)), &Registrar::Anyone, by_test())
        .await
        .unwrap();
    // The end of its lease is being written.
    sleep(Duration::from_secs(2)).await;
    stage.trouble.send_replace(Some(late()));
    stage.orchestrator.drain();
    assert!(timeout(Duration::from_mins(1), stage.tasks.finished()).await.is_err());
    stage.script.let_go();
    stage.tasks.finished().await.unwrap();
    assert!(stage.store.take_over(seals()).await.unwrap().subsystems.iter().all(|stored| stored.name.as_str() != "d"));
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_power_can_take_back_one_known_id_at_most() {
    let stage = Stage::new().await;
    stage.script.let_go();
    // The first one runs, the next two wait for it, and the last one runs beside it.
    for name in ["a", "a", "a", "b"] {
        stage.run(name).await;
        sleep(Duration::from_millis(10)).await;
    }
    let written = stage.script.written.lock().unwrap();
    let mut noted = CycleId(0);
    let mut durabilities = Vec::new();
    for write in written.iter().filter(|write| write.last_cycle_id > CycleId(0)) {
        if write.last_cycle_id > noted {
            durabilities.push((write.last_cycle_id.0, write.durability));
        }
        noted = write.last_cycle_id;
    }
    let (durable, buffered) = (Durability::Durable, Durability::Buffered);
    assert_eq!(durabilities, [(1, buffered), (2, durable), (3, buffered), (4, durable)]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_names_a_cycle_only_once_its_id_is_noted() {
    let stage = Stage::new().await;
    stage.run("a").await;
    let skipped = || {
        let request = CycleRequest { overlap: OverlapPolicy::Skip, ..of(&["a"]) };
        timeout(Duration::from_millis(10), stage.orchestrator.run_cycle(request, false))
    };
    assert!(skipped().await.is_err(), "its start is being written");
    stage.script.permits.add_permits(1);
    sleep(Duration::from_millis(10)).await;
    // It is noted, and no further commit returns.
    let refused = skipped().await.unwrap();
    assert!(matches!(refused, Err(Refusal::CycleRunning(CycleId(1)))), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn the_start_of_a_cycle_is_retried_until_it_is_written() {
    let stage = Stage::new().await;
    stage.script.fails_starts.store(true, Ordering::Relaxed);
    stage.script.let_go();
    let ticket = stage.run("a").await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(refusal_of(ticket.recorded()).await, (None, full(&Write::default()).unwrap_err()));
    assert!(stage.orchestrator.status().running.is_empty());
    stage.script.fails_starts.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(stage.orchestrator.cycle(CycleId(1)).await.unwrap().state, CycleState::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn of_the_outputs_of_a_cycle_only_those_of_subsystems_that_left_meanwhile_are_dropped() {
    let stage = Stage::new().await;
    stage.script.let_go();
    let ticket = stage.orchestrator.run_cycle(of_all(), false).await.unwrap();
    sleep(Duration::from_millis(500)).await;
    let names = ["b", "c"].map(|name| Name::parse(name).unwrap());
    for name in &names {
        stage.orchestrator.unregister(name, &Registrar::Anyone, by_test()).await.unwrap();
    }
    // The new one has not run.
    stage.orchestrator.register(subsystem("c"), None, &Registrar::Anyone, by_test()).await.unwrap();
    ticket.recorded().await.unwrap();
    assert_eq!((stage.output_of("a"), stage.output_of("c")), (Some(CycleId(1)), None));
    let outputs = stage.store.take_over(seals()).await.unwrap().outputs;
    assert_eq!(outputs.iter().map(|stored| stored.name.as_str()).collect::<Vec<_>>(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn the_last_write_and_only_that_one_closes_the_store() {
    let mut stage = Stage::new().await;
    stage.script.let_go();
    stage.run("a").await;
    sleep(Duration::from_millis(10)).await;
    stage.orchestrator.drain();
    stage.tasks.finished().await.unwrap();
    let written = stage.script.written.lock().unwrap();
    let closes: Vec<_> = written.iter().map(|write| write.close).collect();
    assert_eq!(closes.iter().position(|close| *close), Some(closes.len() - 1));
    assert_eq!(written.last().unwrap().durability, Durability::Durable);
}

#[tokio::test(start_paused = true)]
async fn records_that_are_large_together_are_committed_one_by_one() {
    // The parts of two cycles, and the bytes of their outputs. With many parts, the first one alone is larger than a
    // commit.
    for (parts, output, expected) in
        [((1100, 20), 0, &[&[1][..], &[2]][..]), ((5, 5), 1_000_000, &[&[1], &[2]]), ((5, 5), 10_000, &[&[1, 2]])]
    {
        let stage = Stage::new().await;
        stage.fleet.answer.lock().unwrap().output = text(&"x".repeat(output));
        let names: Vec<_> = (0..parts.0 + parts.1).map(|i| format!("s{i}")).collect();
        stage.script.permits.add_permits(1);
        let many = names.iter().map(|name| subsystem(name)).collect();
        stage.orchestrator.register_all(many, None, &Registrar::Anyone, by_test()).await.unwrap();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let (first, second) = names.split_at(parts.0);
        stage.orchestrator.run_cycle(of(first), false).await.unwrap();
        stage.orchestrator.run_cycle(of(second), false).await.unwrap();
        while stage.orchestrator.status().running.len() < 2 {
            stage.script.permits.add_permits(1);
            sleep(Duration::from_millis(10)).await;
        }
        // Both records wait behind this start.
        stage.script.permits.forget_permits(1000);
        stage.run("a").await;
        sleep(Duration::from_secs(2)).await;
        assert!(stage.script.tried.lock().unwrap().is_empty());
        stage.script.let_go();
        sleep(Duration::from_millis(10)).await;
        let mut tried = stage.script.tried.lock().unwrap().clone();
        for records in &mut tried {
            records.sort_unstable();
        }
        tried.sort_unstable();
        assert_eq!(tried, expected, "{parts:?} of {output} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn the_removal_of_many_records_is_not_committed_together_with_a_large_record() {
    let stage = Stage::new().await;
    stage.script.permits.add_permits(10_000);
    let names: Vec<_> = (0..900).map(|i| format!("s{i}")).collect();
    stage
        .orchestrator
        .register_all(names.iter().map(|name| subsystem(name)).collect(), None, &Registrar::Anyone, by_test())
        .await
        .unwrap();
    for _ in 0..300 {
        stage.run("a").await.recorded().await.unwrap();
    }
    let few = RetentionRule { max_cycles: Some(10), max_age: None };
    let retention = Retention { default: few, ..Retention::default() };
    let settings = Settings { retention, ..Stage::settings() };
    stage.orchestrator.reload(settings, Declared::default()).await.unwrap();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let ticket = stage.orchestrator.run_cycle(of(&names), false).await.unwrap();
    sleep(Duration::from_millis(10)).await;
    // The record and then the removal wait behind this start.
    stage.script.permits.forget_permits(10_000);
    stage.run("a").await;
    sleep(Duration::from_secs(61)).await;
    assert!(ticket.record_now().is_none());
    stage.script.written.lock().unwrap().clear();
    stage.script.let_go();
    ticket.recorded().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let written = stage.script.written.lock().unwrap();
    let sizes: Vec<_> = written.iter().map(|write| (write.records.len(), write.removal.records.len())).collect();
    assert!(sizes.contains(&(1, 0)) && sizes.contains(&(0, 256)), "{sizes:?}");
}
