//! Registrations: their limit, the results of repeating them, endpoints that are left, and the next process.

use std::{mem, sync::Arc, time::Duration};

use orchestrator_core::{
    model::{Name, Subsystem, SubsystemSpec},
    orchestrator::{Change, Declared, Orchestrator, OrchestratorTasks, Refusal, Settings},
    ports::Store,
    record, store,
};
use tokio::time::sleep;

use crate::kit::{Fleet, host, of, settings, start, subsystem};

const LEASE: Duration = Duration::from_secs(10);

async fn stage(fleet: Arc<Fleet>, max_subsystems: usize) -> (Orchestrator, OrchestratorTasks, Arc<dyn Store>) {
    let store = store::open(&store::StoreUrl::Memory, record::check, host().clock).await.unwrap();
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
    orchestrator.register(subsystem, lease).await.unwrap().1
}

#[tokio::test(start_paused = true)]
async fn a_repeated_registration_replaces_what_differs_and_otherwise_renews_the_lease() {
    let (orchestrator, _tasks, _) = stage(Arc::default(), 10).await;
    assert_eq!(change(&orchestrator, subsystem("a"), Some(LEASE)).await, Change::Created);
    sleep(LEASE / 2).await;
    assert_eq!(change(&orchestrator, subsystem("a"), Some(LEASE)).await, Change::Renewed);
    sleep(LEASE * 9 / 10).await;
    orchestrator.renew_lease(&name("a")).unwrap();
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
    let register = |names: &[&str]| orchestrator.register_all(names.iter().map(|name| subsystem(name)).collect(), None);
    register(&["a", "b"]).await.unwrap();
    let refused = register(&["b", "c", "d"]).await;
    assert!(matches!(refused, Err(Refusal::RegistryFull { registered: 2, new: 2, max: 3 })), "{refused:?}");
    register(&["b", "c"]).await.unwrap();
    assert!(matches!(register(&["d"]).await, Err(Refusal::RegistryFull { registered: 3, new: 1, max: 3 })));
    // A lower limit ends no registration.
    let settings = Settings { max_subsystems: 2, ..settings() };
    orchestrator.reload(settings, Declared::default()).await.unwrap();
    assert_eq!(change(&orchestrator, moved("a"), None).await, Change::Replaced);
    orchestrator.unregister(&name("b")).await.unwrap();
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
    orchestrator.suspend(&name("a"), true).await.unwrap();
    assert_eq!(left(), []);
    change(&orchestrator, moved("a"), None).await;
    assert_eq!(left(), [("a".to_owned(), false)]);
    orchestrator.unregister(&name("b")).await.unwrap();
    assert_eq!(left(), [("b".to_owned(), false)]);
    change(&orchestrator, moved("c"), None).await;
    assert_eq!(left(), [("c".to_owned(), true)]);
    orchestrator.unregister(&name("a")).await.unwrap();
    orchestrator.unregister(&name("c")).await.unwrap();
    assert_eq!(left(), [("a".to_owned(), false), ("c".to_owned(), true)]);
}

#[tokio::test(start_paused = true)]
async fn registrations_outlive_the_process_with_their_leases_and_suspensions() {
    let (orchestrator, mut tasks, store) = stage(Arc::default(), 10).await;
    change(&orchestrator, subsystem("leased"), Some(LEASE)).await;
    for name in ["suspended", "resumed", "gone"] {
        change(&orchestrator, subsystem(name), None).await;
    }
    for suspended in ["leased", "suspended", "resumed"] {
        orchestrator.suspend(&name(suspended), true).await.unwrap();
    }
    let resumed = orchestrator.suspend(&name("resumed"), false).await.unwrap();
    assert!(!resumed.member.suspended);
    orchestrator.unregister(&name("gone")).await.unwrap();
    sleep(LEASE / 2).await;
    orchestrator.drain();
    tasks.finished().await.unwrap();

    let fleet = Arc::new(Fleet::default());
    let (orchestrator, _tasks) = start(settings(), fleet.clone(), store).await;
    let found = || -> Vec<_> {
        let found = orchestrator.subsystems(None, 10).into_iter();
        found.map(|it| (it.member.subsystem.name.to_string(), it.member.suspended, it.lease().is_some())).collect()
    };
    let [leased, resumed, suspended] = [("leased", true, true), ("resumed", false, false), ("suspended", true, false)]
        .map(|it| (it.0.to_owned(), it.1, it.2));
    assert_eq!(found(), [leased, resumed.clone(), suspended.clone()]);
    orchestrator.run_cycle(of(&["resumed", "suspended"]), false).await.unwrap().recorded().await.unwrap();
    let called: Vec<_> = fleet.received.lock().unwrap().iter().map(|it| it.name.clone()).collect();
    assert_eq!(called, ["resumed"]);
    // The lease begins again with the process.
    sleep(LEASE * 8 / 10).await;
    assert_eq!(found().len(), 3);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(found(), [resumed, suspended]);
}
