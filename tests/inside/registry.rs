//! Registrations: their limit, the results of repeating them, endpoints that are left, and the next process.

use std::{mem, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use orchestrator_core::{
    engine::BreakerState,
    model::{BreakerSpec, Code, Name, Subsystem, SubsystemSpec},
    orchestrator::{Change, Declared, NotRegistered, Orchestrator, OrchestratorTasks, Refusal, Registrar, Settings},
    ports::Store,
};
use tokio::time::{Instant, sleep};

use crate::kit::{Fleet, Process, around, by_test, host, in_memory, of, of_all, settings, start, subsystem, text};

const LEASE: Duration = Duration::from_secs(10);

async fn stage(fleet: Arc<Fleet>, max_subsystems: usize) -> (Orchestrator, OrchestratorTasks, Arc<dyn Store>) {
    let store = in_memory().await;
    let (orchestrator, tasks) = start(Settings { max_subsystems, ..settings() }, fleet, store.clone()).await;
    (orchestrator, tasks, store)
}

fn name(name: &str) -> Name {
    Name::parse(name).unwrap()
}

/// The subsystem of this name at another endpoint than that of [`subsystem`].
fn moved(name: &str) -> Subsystem {
    let spec = SubsystemSpec { name: name.into(), endpoint: "http://127.0.0.1:2".into(), ..SubsystemSpec::default() };
    Subsystem::from_spec(&spec).unwrap()
}

async fn change(orchestrator: &Orchestrator, subsystem: Subsystem, lease: Option<Duration>) -> Change {
    orchestrator.register(subsystem, lease, &Registrar::Anyone, by_test()).await.unwrap().change
}

#[tokio::test(start_paused = true)]
async fn a_repeated_registration_replaces_what_differs_and_otherwise_renews_the_lease() {
    let (orchestrator, _tasks, _) = stage(Arc::default(), 10).await;
    assert_eq!(change(&orchestrator, subsystem("a"), Some(LEASE)).await, Change::Created);
    sleep(LEASE / 2).await;
    assert_eq!(change(&orchestrator, subsystem("a"), Some(LEASE)).await, Change::Renewed);
    sleep(LEASE * 9 / 10).await;
    orchestrator.renew_lease(&name("a"), &Registrar::Anyone).unwrap();
    sleep(LEASE * 9 / 10).await;
    assert_eq!(change(&orchestrator, moved("a"), Some(LEASE)).await, Change::Replaced);
    sleep(LEASE * 9 / 10).await;
    assert_eq!(change(&orchestrator, moved("a"), Some(2 * LEASE)).await, Change::Replaced);
    sleep(LEASE * 19 / 10).await;
    assert_eq!(orchestrator.figures().leases, 1);
    sleep(Duration::from_secs(2)).await;
    assert_eq!((orchestrator.figures().leases, orchestrator.figures().registered), (0, 0));
    assert_eq!(change(&orchestrator, moved("a"), None).await, Change::Created);
    assert_eq!(change(&orchestrator, moved("a"), None).await, Change::Renewed);
    sleep(10 * LEASE).await;
    assert_eq!((orchestrator.figures().leases, orchestrator.figures().registered), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_full_registry_takes_repeated_registrations_only() {
    let (orchestrator, _tasks, _) = stage(Arc::default(), 3).await;
    let register = |names: &[&str]| {
        orchestrator.register_all(
            names.iter().map(|name| subsystem(name)).collect(),
            None,
            &Registrar::Anyone,
            by_test(),
        )
    };
    register(&["a", "b"]).await.unwrap();
    let refused = register(&["b", "c", "d"]).await;
    assert!(matches!(refused, Err(Refusal::RegistryFull { registered: 2, new: 2, max: 3 })), "{refused:?}");
    register(&["b", "c"]).await.unwrap();
    assert!(matches!(register(&["d"]).await, Err(Refusal::RegistryFull { registered: 3, new: 1, max: 3 })));
    // A lower limit ends no registration.
    let settings = Settings { max_subsystems: 2, ..settings() };
    orchestrator.reload(settings, Declared::default()).await.unwrap();
    assert_eq!(change(&orchestrator, moved("a"), None).await, Change::Replaced);
    orchestrator.unregister(&name("b"), &Registrar::Anyone, by_test()).await.unwrap();
    assert!(matches!(register(&["b"]).await, Err(Refusal::RegistryFull { registered: 2, new: 1, max: 2 })));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_left_for_good_by_its_last_subsystem() {
    let fleet = Arc::new(Fleet::default());
    let (orchestrator, _tasks, _) = stage(fleet.clone(), 10).await;
    let left = || mem::take(&mut *fleet.left.lock().unwrap());
    let left = || -> Vec<_> { left().into_iter().map(|left| (left.name.to_string(), left.was_last)).collect() };
    for name in ["a", "b", "c"] {
        change(&orchestrator, subsystem(name), None).await;
    }
    orchestrator.suspend(&name("a"), true, by_test()).await.unwrap();
    assert_eq!(left(), []);
    change(&orchestrator, moved("a"), None).await;
    assert_eq!(left(), [("a".to_owned(), false)]);
    orchestrator.unregister(&name("b"), &Registrar::Anyone, by_test()).await.unwrap();
    assert_eq!(left(), [("b".to_owned(), false)]);
    change(&orchestrator, moved("c"), None).await;
    assert_eq!(left(), [("c".to_owned(), true)]);
    orchestrator.unregister(&name("a"), &Registrar::Anyone, by_test()).await.unwrap();
    orchestrator.unregister(&name("c"), &Registrar::Anyone, by_test()).await.unwrap();
    assert_eq!(left(), [("a".to_owned(), false), ("c".to_owned(), true)]);
}

#[tokio::test(start_paused = true)]
async fn registrations_outlive_the_process_with_their_leases_and_suspensions() {
    let (orchestrator, mut tasks, store) = stage(Arc::default(), 10).await;
    for name in ["leased", "leased_and_suspended", "longer"] {
        change(&orchestrator, subsystem(name), Some(LEASE)).await;
    }
    assert_eq!(change(&orchestrator, subsystem("longer"), Some(2 * LEASE)).await, Change::Replaced);
    for name in ["suspended", "resumed", "gone"] {
        change(&orchestrator, subsystem(name), None).await;
    }
    for suspended in ["leased_and_suspended", "suspended", "resumed"] {
        orchestrator.suspend(&name(suspended), true, by_test()).await.unwrap();
    }
    let resumed = orchestrator.suspend(&name("resumed"), false, by_test()).await.unwrap();
    assert!(!resumed.member.suspended);
    orchestrator.unregister(&name("gone"), &Registrar::Anyone, by_test()).await.unwrap();
    sleep(LEASE / 2).await;
    orchestrator.drain();
    tasks.finished().await.unwrap();

    let fleet = Arc::new(Fleet::default());
    let (orchestrator, _tasks) = start(settings(), fleet.clone(), store).await;
    let found = || -> Vec<_> {
        let found = orchestrator.subsystems(None, 10).into_iter();
        found.map(|it| (it.member.subsystem.name.to_string(), it.member.suspended, it.lease().is_some())).collect()
    };
    let expected = [
        ("leased", false, true),
        ("leased_and_suspended", true, true),
        ("longer", false, true),
        ("resumed", false, false),
        ("suspended", true, false),
    ]
    .map(|(name, suspended, leased)| (name.to_owned(), suspended, leased));
    assert_eq!(found(), expected);
    orchestrator.run_cycle(of(&["resumed", "suspended"]), false).await.unwrap().recorded().await.unwrap();
    let called: Vec<_> = fleet.received.lock().unwrap().iter().map(|it| it.name.clone()).collect();
    assert_eq!(called, ["resumed"]);
    // The lease begins again with the process.
    sleep(LEASE * 8 / 10).await;
    assert_eq!(found().len(), 5);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(found(), expected[2..]);
    sleep(LEASE).await;
    assert_eq!(found(), expected[3..]);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_is_for_the_full_length_and_not_undone_by_a_change_that_is_being_written() {
    let inner = in_memory().await;
    // Each commit takes a second.
    let commit = |inner: Arc<dyn Store>, write| -> BoxFuture<'static, _> {
        Box::pin(async move {
            sleep(Duration::from_secs(1)).await;
            inner.commit(write).await
        })
    };
    let host = host();
    let clock = host.clock;
    let process = Process { host, ..Process::default() };
    let (orchestrator, _tasks) = process.over(around(inner, Box::new(commit))).await.unwrap();
    let orchestrator = Arc::new(orchestrator);
    change(&orchestrator, subsystem("a"), Some(LEASE)).await;
    let orchestrator = Arc::new(orchestrator);
    let suspending = tokio::spawn({
        let orchestrator = orchestrator.clone();
        async move { orchestrator.suspend(&name("a"), true, by_test()).await.unwrap() }
    });
    sleep(Duration::from_millis(500)).await;
    let ends_at = orchestrator.renew_lease(&name("a"), &Registrar::Anyone).unwrap();
    assert_eq!(ends_at, clock.now() + LEASE);
    let shown = suspending.await.unwrap();
    assert!(shown.member.suspended);
    for entry in [shown, orchestrator.subsystem(&name("a")).unwrap()] {
        assert_eq!(orchestrator.lease_ends_at(&entry.lease().unwrap()), ends_at);
    }
}

#[tokio::test(start_paused = true)]
async fn a_breaker_is_closed_when_its_subsystem_is_resumed_or_moves_and_by_no_other_change() {
    let fleet = Arc::new(Fleet { call_fails: true, ..Fleet::default() });
    let (orchestrator, _tasks, _) = stage(fleet, 10).await;
    let breaker = BreakerSpec { failure_threshold: Some(1), ..BreakerSpec::default() };
    let of = |spec| Subsystem::from_spec(&SubsystemSpec { breaker: breaker.clone(), ..spec }).unwrap();
    let is_open = || {
        let entry = orchestrator.subsystem(&name("a")).unwrap();
        matches!(entry.member.breaker(Instant::now()), BreakerState::Open(_))
    };
    let fails = async || {
        orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
        assert!(is_open());
    };
    change(&orchestrator, of(subsystem("a").to_spec()), None).await;
    fails().await;
    orchestrator.suspend(&name("a"), true, by_test()).await.unwrap();
    assert!(is_open());
    orchestrator.suspend(&name("a"), false, by_test()).await.unwrap();
    assert!(!is_open());
    fails().await;
    change(&orchestrator, of(SubsystemSpec { critical: true, ..subsystem("a").to_spec() }), None).await;
    assert!(is_open());
    change(&orchestrator, of(moved("a").to_spec()), None).await;
    assert!(!is_open());
    assert_eq!(orchestrator.subsystem(&name("a")).unwrap().counts().failed, 2);
}

/// Registers subsystems, each of which waits for all before it, and asks for a cycle over each. Returns the number of
/// cycles that run.
async fn running(subsystems: usize) -> usize {
    let store = in_memory().await;
    let settings = Settings { max_subsystems: subsystems, max_queued: subsystems, ..settings() };
    let (orchestrator, _tasks) = start(settings, Arc::default(), store).await;
    let names: Vec<_> = (0..subsystems).map(|i| format!("s{i}")).collect();
    let after_all = |i| {
        let spec = SubsystemSpec { after: names[..i].to_vec(), ..subsystem(&names[i]).to_spec() };
        Subsystem::from_spec(&spec).unwrap()
    };
    orchestrator
        .register_all((0..subsystems).map(after_all).collect(), None, &Registrar::Anyone, by_test())
        .await
        .unwrap();
    for name in &names {
        orchestrator.run_cycle(of(&[name]), true).await.unwrap();
    }
    sleep(Duration::from_millis(10)).await;
    orchestrator.figures().running
}

#[tokio::test(start_paused = true)]
async fn fewer_cycles_run_side_by_side_in_a_fleet_with_very_many_dependencies() {
    // 50 and 316,410 dependencies: the running cycles together may leave out 8,388,608.
    assert_eq!(running(50).await, 50);
    assert_eq!(running(796).await, 26);
}

#[tokio::test(start_paused = true)]
async fn names_are_returned_as_registered_or_the_missing_one_is_named() {
    let (orchestrator, _tasks, _) = stage(Arc::default(), 10).await;
    for name in ["a", "b"] {
        change(&orchestrator, subsystem(name), None).await;
    }
    let registered = async |names: &[&str]| {
        let names = names.iter().map(|it| name(it)).collect();
        orchestrator.registered_names(Some(names)).await.map(|names| names.unwrap().to_vec())
    };
    assert_eq!(registered(&["b", "a"]).await.unwrap(), ["b", "a"].map(name));
    assert_eq!(registered(&["b"]).await.unwrap(), ["b"].map(name));
    let missing = registered(&["a", "c"]).await;
    assert!(matches!(&missing, Err(NotRegistered { name: missing, .. }) if *missing == name("c")), "{missing:?}");
    assert!(orchestrator.registered_names(None).await.unwrap().is_none(), "all of them");
}

#[tokio::test(start_paused = true)]
async fn snapshots_are_requested_together_and_come_in_order_within_five_seconds_each() {
    let snapshots =
        [("slow", 4), ("quick", 1), ("hangs", 3600)].map(|(name, takes)| (name, Duration::from_secs(takes)));
    let fleet = Fleet { snapshots: snapshots.into(), ..Fleet::default() };
    let (orchestrator, _tasks, _) = stage(Arc::new(fleet), 10).await;
    let names = ["slow", "quick", "hangs", "none"];
    for name in names {
        change(&orchestrator, subsystem(name), None).await;
    }
    let of: Vec<_> = names.iter().map(|it| Arc::new(orchestrator.subsystem(&name(it)).unwrap())).collect();
    let start = Instant::now();
    let found = orchestrator.snapshots(&of).await;
    assert_eq!(start.elapsed(), Duration::from_secs(5));
    let found: Vec<_> =
        found.into_iter().map(|found| found.map(|found| found.status).map_err(|error| error.code)).collect();
    let expected = [Ok(text("slow")), Ok(text("quick")), Err(Code::DeadlineExceeded), Err(Code::Unimplemented)];
    assert_eq!(found, expected);
}

#[tokio::test(start_paused = true)]
async fn declared_and_registered_subsystems_are_counted_apart() {
    let declared = Declared { subsystems: vec![subsystem("a"), subsystem("b")], ..Declared::default() };
    let process = Process { declared, ..Process::default() };
    let (orchestrator, _tasks) = process.over(in_memory().await).await.unwrap();
    change(&orchestrator, subsystem("c"), None).await;
    let figures = orchestrator.figures();
    assert_eq!((figures.declared, figures.registered), (2, 1));
}
