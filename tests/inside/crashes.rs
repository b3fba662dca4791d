//! The process dies at each of its commits in turn, before and after the store has kept it, with cycles side by side
//! and others that wait. The next process must find a consistent state: each id once, and no visible change lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::kit::{
    Fleet, Received, around, by_test, errors, host, in_memory, of, of_all, seals, settings, start, start_with,
    subsystem, text,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use orchestrator_core::{
    model::{Answer, CycleId, CycleRequest, CycleState, Name, Revision, Subsystem},
    orchestrator::{Orchestrator, OrchestratorTasks, Registrar},
    ports::{Contents, Filter, Lost, Stage, Store, StoreError, UnreadableRow, Write},
    record::{self, PartFilter},
    store::{self, OpenError},
};
use tempfile::TempDir;
use tokio::{
    runtime::Builder,
    select,
    sync::Notify,
    task::{JoinSet, yield_now},
    time::sleep,
};

/// A commit at which the process dies: after this number of others.
#[derive(Clone, Copy, Debug)]
struct Death {
    after: usize,
    /// The store keeps it, and the result is lost.
    is_kept: bool,
}

/// Results that callers and readers received before the process died.
#[derive(Default)]
struct Seen {
    /// Cycles whose asynchronous start was acknowledged.
    promised: Mutex<BTreeSet<CycleId>>,
    /// Waiting cycles that the status showed.
    shown: Mutex<BTreeSet<CycleId>>,
    /// Records that callers received.
    answered: Mutex<BTreeMap<CycleId, Bytes>>,
    /// The records that each walk through the history found, newest first.
    walks: Mutex<Vec<Vec<(Revision, CycleId)>>>,
}

/// The place where the processes keep their record, one process after the other.
enum Place {
    Memory(Arc<dyn Store>),
    Sqlite(TempDir),
}

impl Place {
    async fn memory() -> Self {
        Self::Memory(in_memory().await)
    }

    fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    /// Opens the store, once the previous process has released it.
    async fn open(&self) -> Arc<dyn Store> {
        let home = match self {
            Self::Memory(store) => return store.clone(),
            Self::Sqlite(home) => home,
        };
        let url = store::StoreUrl::Sqlite(home.path().join("orchestrator.db"));
        let inner = loop {
            match store::open(&url, record::CHECKS, host().clock).await {
                Err(OpenError::InUse { .. }) => yield_now().await,
                opened => break opened.unwrap(),
            }
        };
        // On the paused clock a real disk is always late, so late commits are not reported.
        around(inner, Box::new(|inner, write| Box::pin(async move { inner.commit(write).await })))
    }
}

/// A store whose process dies as scripted: neither that commit nor a later one returns.
fn dying(inner: Arc<dyn Store>, death: Death, died: Arc<Notify>) -> Arc<dyn Store> {
    let commits = AtomicUsize::new(0);
    let commit = move |inner: Arc<dyn Store>, write: Arc<Write>| {
        let (nth, died) = (commits.fetch_add(1, Ordering::Relaxed), died.clone());
        let commit: BoxFuture<'static, Result<(), StoreError>> = Box::pin(async move {
            if nth < death.after {
                return inner.commit(write).await;
            }
            if nth == death.after && death.is_kept {
                inner.commit(write).await.unwrap();
            }
            died.notify_one();
            std::future::pending().await
        });
        commit
    };
    around(inner, Box::new(commit))
}

/// Runs a cycle for a caller that waits for its record, or only for the acknowledgement.
async fn ask(orchestrator: Arc<Orchestrator>, seen: Arc<Seen>, request: CycleRequest, is_async: bool) {
    let Ok(ticket) = orchestrator.run_cycle(request, is_async).await else { return };
    if is_async {
        seen.promised.lock().unwrap().insert(ticket.cycle_id);
    }
    if let Ok(record) = ticket.recorded().await {
        seen.answered.lock().unwrap().insert(record.cycle_id, record.bytes.clone());
    }
}

/// Goes through the whole history, two records a page.
async fn walk(orchestrator: &Orchestrator) -> Vec<(Revision, CycleId)> {
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = orchestrator.history().cycles(before, Filter::default(), PartFilter::default(), 2).await.unwrap();
        found.extend(page.records.iter().map(|record| record.as_ref().unwrap()).map(|it| (it.revision, it.cycle_id)));
        before = page.next;
        if before.is_none() {
            return found;
        }
    }
}

/// Runs four cycles that share no subsystem, and three asynchronous ones that wait for these, until all are recorded or
/// the process dies.
async fn live(orchestrator: &Arc<Orchestrator>, seen: &Arc<Seen>) {
    let mut asked = JoinSet::new();
    for name in ["a", "b", "c", "d"] {
        asked.spawn(ask(orchestrator.clone(), seen.clone(), of(&[name]), false));
        // Keeps the order of the requests.
        yield_now().await;
    }
    for (i, names) in [&["a", "b"][..], &["c"], &["a", "b", "c", "d"]].into_iter().enumerate() {
        let request = CycleRequest { request_id: Some(format!("request-{i}")), ..of(names) };
        asked.spawn(ask(orchestrator.clone(), seen.clone(), request, true));
    }
    let walking = async {
        loop {
            let found = walk(orchestrator).await;
            seen.walks.lock().unwrap().push(found);
            let shown = orchestrator.status().waiting.into_iter().map(|waiting| waiting.cycle_id);
            seen.shown.lock().unwrap().extend(shown);
            sleep(Duration::from_millis(100)).await;
        }
    };
    select! {
        all = asked.join_all() => drop(all),
        () = walking => {}
    }
}

async fn end(orchestrator: &Orchestrator, mut tasks: OrchestratorTasks) {
    orchestrator.drain();
    tasks.finished().await.unwrap();
}

/// Runs a process. All of its tasks end with it, wherever they are.
fn process<T>(life: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(life)
}

/// Lets a process die there, and checks the state that the next one finds. True if the process reached that commit.
fn dies_at(death: Death, place: &Place) -> bool {
    let (fleet, seen) = (Arc::new(Fleet::default()), Arc::new(Seen::default()));
    process(async {
        let (orchestrator, tasks) = start(settings(), fleet.clone(), place.open().await).await;
        for name in ["a", "b", "c", "d"] {
            orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await.unwrap();
        }
        end(&orchestrator, tasks).await;
    });
    let came_to_it = process(async {
        let died = Arc::new(Notify::new());
        let store = dying(place.open().await, death, died.clone());
        let life = async {
            let (orchestrator, tasks) = start(settings(), fleet.clone(), store).await;
            let orchestrator = Arc::new(orchestrator);
            live(&orchestrator, &seen).await;
            end(&orchestrator, tasks).await;
        };
        select! {
            () = life => false,
            () = died.notified() => true,
        }
    });
    process(holds_after(death, place, &fleet, &seen));
    came_to_it
}

/// Starts the next process, and compares the history with earlier results.
async fn holds_after(death: Death, place: &Place, fleet: &Arc<Fleet>, seen: &Seen) {
    let store = place.open().await;
    let contents = store.take_over(seals()).await.unwrap();
    let called: BTreeSet<_> = fleet.received.lock().unwrap().iter().map(|received| received.cycle_id).collect();
    let promised = mem::take(&mut *seen.promised.lock().unwrap());
    // No id was visible before it was noted.
    let noted = contents.last_cycle_id;
    let shown = mem::take(&mut *seen.shown.lock().unwrap());
    assert!(called.iter().chain(&promised).chain(&shown).all(|seen| *seen <= noted), "{death:?}");
    let open: BTreeMap<_, _> = contents.open.iter().map(|open| (open.cycle_id, open.stage.clone())).collect();
    let (orchestrator, tasks) = start(settings(), fleet.clone(), store).await;
    // Its turn is after all waiting cycles.
    let last = orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    assert_eq!(last.cycle_id, noted.next(), "{death:?}");

    // Each id and each revision occurs once.
    let history = walk(&orchestrator).await;
    let revisions: Vec<_> = history.iter().rev().map(|(revision, _)| revision.0).collect();
    assert_eq!(revisions, (1..=last.cycle_id.0).collect::<Vec<_>>(), "{death:?}");
    let ids: BTreeSet<_> = history.iter().map(|(_, cycle_id)| cycle_id.0).collect();
    assert_eq!(ids, (1..=last.cycle_id.0).collect(), "{death:?}");
    // Each walk found all records of its time, and they are unchanged.
    for found in &*seen.walks.lock().unwrap() {
        assert_eq!(history[history.len() - found.len()..], found[..], "{death:?}");
    }
    let answered = mem::take(&mut *seen.answered.lock().unwrap());
    for (cycle_id, bytes) in answered {
        assert_eq!(orchestrator.cycle(cycle_id).await.unwrap().bytes, bytes, "{death:?}");
    }
    // Started cycles are interrupted. Waiting cycles ran in this process.
    for cycle_id in promised.iter().chain(open.keys()) {
        let state = orchestrator.cycle(*cycle_id).await.unwrap().state;
        let expected = match open.get(cycle_id) {
            Some(Stage::Begun(_)) => CycleState::Interrupted,
            _ => CycleState::Succeeded,
        };
        assert_eq!(state, expected, "{death:?} {cycle_id}");
    }
    // No cycle ran in two processes, nor a subsystem twice in one.
    let mut calls = BTreeSet::new();
    for Received { name, cycle_id, .. } in &*fleet.received.lock().unwrap() {
        assert!(calls.insert((name.clone(), *cycle_id)), "{death:?}: {name} was called twice for cycle {cycle_id}");
    }
    end(&orchestrator, tasks).await;
}

/// Lets processes die at each of their commits in turn, before and after it is kept.
fn die_at_each_commit(place: impl Fn() -> Place) {
    // The commits are the takeover, the starts, the acknowledgements and the records. The number of changes in one
    // commit depends on the machine.
    let mut commits = 0;
    while [false, true]
        .into_iter()
        .filter(|is_kept| dies_at(Death { after: commits, is_kept: *is_kept }, &place()))
        .count()
        > 0
    {
        commits += 1;
    }
    assert!(commits > 3, "{commits}");
}

#[test]
fn a_process_that_dies_at_any_commit_leaves_each_id_once_and_loses_no_visible_change() {
    die_at_each_commit(|| process(Place::memory()));
}

#[test]
fn a_process_that_dies_at_any_commit_of_sqlite_leaves_each_id_once_and_loses_no_visible_change() {
    die_at_each_commit(Place::sqlite);
}

/// Lets a process die at a commit around a new name, while a cycle runs with the former one. True if the process
/// reached that commit.
fn dies_renaming(death: Death, place: &Place) -> bool {
    let fleet = Arc::new(Fleet::default());
    *fleet.answer.lock().unwrap() = Answer { output: text("made"), ..Answer::default() };
    let name = |name: &str| Name::parse(name).unwrap();
    process(async {
        let (orchestrator, tasks) = start(settings(), fleet.clone(), place.open().await).await;
        let reader = Subsystem { reads: vec![name("old")], ..subsystem("reader") };
        let both = vec![subsystem("old"), reader];
        orchestrator.register_all(both, None, &Registrar::Anyone, by_test()).await.unwrap();
        end(&orchestrator, tasks).await;
    });
    let (came_to_it, is_renamed) = process(async {
        let died = Arc::new(Notify::new());
        let store = dying(place.open().await, death, died.clone());
        let is_renamed = AtomicBool::new(false);
        let life = async {
            let (orchestrator, tasks) = start(settings(), fleet.clone(), store).await;
            let running = orchestrator.run_cycle(of(&["old"]), false).await.unwrap();
            sleep(Duration::from_millis(500)).await;
            let (old, new) = (name("old"), name("new"));
            orchestrator.rename(&old, new, |_, _| Ok(()), &Registrar::Anyone, by_test()).await.unwrap();
            is_renamed.store(true, Ordering::Relaxed);
            running.recorded().await.unwrap();
            end(&orchestrator, tasks).await;
        };
        let came_to_it = select! {
            () = life => false,
            () = died.notified() => true,
        };
        (came_to_it, is_renamed.into_inner())
    });
    process(async {
        let (orchestrator, tasks) = start(settings(), fleet.clone(), place.open().await).await;
        let subsystems = orchestrator.subsystems(None, 10);
        let names: Vec<_> = subsystems.iter().map(|it| it.member.subsystem.name.as_str()).collect();
        let present = if names.contains(&"new") { "new" } else { "old" };
        assert_eq!(names, [present, "reader"], "{death:?}");
        assert!(present == "new" || !is_renamed, "{death:?}: an acknowledged name is lost");
        let [subsystem, reader] = [present, "reader"].map(|it| orchestrator.subsystem(&name(it)).unwrap());
        assert_eq!(reader.member.subsystem.reads, [name(present)], "{death:?}");
        assert_eq!(subsystem.former_names.len(), usize::from(present == "new"), "{death:?}");
        // Its output is there exactly if its record is.
        let recorded = orchestrator.cycle(CycleId(1)).await.ok().filter(|it| it.state == CycleState::Succeeded);
        let output = subsystem.member.standing.latest();
        assert_eq!(output.map(|output| output.cycle_id), recorded.map(|it| it.cycle_id), "{death:?}");
        end(&orchestrator, tasks).await;
    });
    came_to_it
}

#[test]
fn a_process_that_dies_at_any_commit_around_a_new_name_leaves_one_name_with_its_output() {
    for place in [|| process(Place::memory()), Place::sqlite] {
        let reaches = |after: usize| {
            let deaths = [false, true].map(|is_kept| dies_renaming(Death { after, is_kept }, &place()));
            deaths.contains(&true)
        };
        let commits = (0..100).take_while(|after| reaches(*after)).count();
        assert!((4..100).contains(&commits), "{commits}");
    }
}

/// Lets a process die while one cycle runs and another waits, whose start was acknowledged. Returns the orchestrator
/// that finds the store so changed.
async fn after(change: impl FnOnce(&mut Contents)) -> (Orchestrator, OrchestratorTasks) {
    let store = in_memory().await;
    let (orchestrator, _tasks) = start(settings(), Arc::default(), store.clone()).await;
    orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
    for _ in 0..2 {
        orchestrator.run_cycle(of(&["a"]), true).await.unwrap();
    }
    sleep(Duration::from_millis(10)).await;
    let mut contents = store.take_over(seals()).await.unwrap();
    change(&mut contents);
    start_with(settings(), host(), Arc::default(), (store, contents)).await
}

/// The states of all cycles, once another one has run, and whether their records were lost.
async fn outcomes(orchestrator: &Orchestrator) -> Vec<(CycleState, bool)> {
    let last = orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    let mut outcomes = Vec::new();
    for cycle_id in 1..=last.cycle_id.0 {
        let record = orchestrator.cycle(CycleId(cycle_id)).await.unwrap();
        outcomes.push((record.state, String::from_utf8_lossy(&record.bytes).contains("its record was lost")));
    }
    outcomes
}

#[tokio::test(start_paused = true)]
async fn after_the_loss_of_power_waiting_cycles_are_interrupted_and_one_more_id_is_used_up() {
    let (orchestrator, _tasks) = after(|contents| contents.may_lack_open = true).await;
    let (interrupted, succeeded) = ((CycleState::Interrupted, false), (CycleState::Succeeded, false));
    assert_eq!(outcomes(&orchestrator).await, [interrupted, interrupted, interrupted, succeeded]);
}

#[tokio::test(start_paused = true)]
async fn after_the_loss_of_the_end_of_the_store_no_cycle_runs_twice_and_lost_ids_are_used_up() {
    let lost = Lost { last_cycle_id: CycleId(4), last_revision: Revision(3), commits: 9 };
    let (orchestrator, _tasks) = after(|contents| contents.lost = Some(lost)).await;
    // The number of lost records is known, but not the cycles of which they were.
    let expected = [(CycleState::Interrupted, true); 3].into_iter().chain([(CycleState::Interrupted, false)]);
    assert_eq!(outcomes(&orchestrator).await, expected.chain([(CycleState::Succeeded, false)]).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_loss_of_records_is_reported_with_their_revisions_and_any_other_loss_as_one_of_changes() {
    errors();
    // Two ids are in the store, and no record.
    let lost = |last_cycle_id, last_revision| Lost {
        last_cycle_id: CycleId(last_cycle_id),
        last_revision: Revision(last_revision),
        commits: 5,
    };
    for (lost, expected) in [
        (lost(4, 3), "acknowledged records are missing"),
        (lost(2, 1), "acknowledged records are missing"),
        (lost(4, 0), "acknowledged changes are missing, such as starts of cycles, registrations"),
        (lost(2, 0), "acknowledged changes are missing, such as starts of cycles, registrations"),
    ] {
        let (_, _tasks) = after(|contents| contents.lost = Some(lost)).await;
        let said = errors();
        assert!(said.lines().count() == 1 && said.contains(expected) && said.contains("commits=5"), "{lost:?}: {said}");
        let revisions = format!("revisions=\"1 to {}\"", lost.last_revision);
        assert_eq!(said.contains(&revisions), lost.last_revision > Revision(0), "{lost:?}: {said}");
    }
}

#[tokio::test(start_paused = true)]
async fn up_to_64_unreadable_rows_of_the_store_are_named_and_more_are_counted() {
    errors();
    for (rows, counted) in [(2, None), (64, None), (65, Some("rows=1\n")), (1000, Some("rows=936\n"))] {
        let unreadable =
            |i| UnreadableRow { what: "loop", key: format!("l{i}"), problem: "as scripted".into(), is_sealed: true };
        let (_, _tasks) = after(|contents| contents.unreadable = (0..rows).map(unreadable).collect()).await;
        let said = errors();
        let named = said.matches("a row of the store can't be read").count();
        assert_eq!((named, said.lines().count()), (rows.min(64), rows.min(65)), "{said}");
        assert!(counted.is_none_or(|counted| said.contains(counted)), "{said}");
    }
}
