//! Declarations of the configuration file, at the start and in a reload: what they replace and what they leave alone,
//! and the refusal of a circular dependency.

use std::sync::Arc;

use orchestrator_core::{
    engine::BreakerState,
    model::{BreakerSpec, CatchUp, IntervalLoop, LoopStart, Name, Subsystem, SubsystemSpec},
    orchestrator::{Declared, Orchestrator, OrchestratorTasks, Origin, Refusal, Registrar},
    ports::Store,
    schedule::LoopOrigin,
};
use tokio::time::Instant;

use crate::kit::{Fleet, Process, by_test, hourly, in_memory, of_all, settings, subsystem};

fn name(name: &str) -> Name {
    Name::parse(name).unwrap()
}

fn of_loops(loops: Vec<IntervalLoop>) -> Declared {
    Declared { loops, ..Declared::default() }
}

fn of_subsystems(subsystems: Vec<Subsystem>) -> Declared {
    Declared { subsystems, ..Declared::default() }
}

/// A subsystem after these others.
fn after(name: &str, others: &[&str]) -> Subsystem {
    let after = others.iter().map(ToString::to_string).collect();
    let spec = SubsystemSpec { after, ..subsystem(name).to_spec() };
    Subsystem::from_spec(&spec).unwrap()
}

async fn declaring(declared: Declared, store: &Arc<dyn Store>) -> (Orchestrator, OrchestratorTasks) {
    Process { declared, ..Process::default() }.over(store.clone()).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_reload_leaves_unchanged_loops_alone_and_stopped_ones_stopped() {
    let changed = |name: &str| IntervalLoop { catch_up: CatchUp::One, ..hourly(name) };
    let before = ["changed", "gone", "same", "stopped", "stopped_and_changed"].map(hourly);
    let (orchestrator, _tasks) = declaring(of_loops(before.into()), &in_memory().await).await;
    for started in ["also_declared", "by_rpc"] {
        orchestrator.start_loop(LoopStart::Of(hourly(started)), by_test()).await.unwrap();
    }
    for stopped in ["stopped", "stopped_and_changed"] {
        orchestrator.stop_loop(&name(stopped), by_test()).await.unwrap();
    }
    // The random delay of the next tick shows whether it was planned again.
    let fires_at = |wanted: &str| {
        let found = orchestrator.loops().into_iter().find(|entry| entry.settings.name.as_str() == wanted);
        found.unwrap().next.unwrap().fires_at
    };
    let same = fires_at("same");
    let after = ["also_declared", "new", "same", "stopped"].map(hourly).into_iter();
    let after = after.chain(["changed", "stopped_and_changed"].map(changed)).collect();
    orchestrator.reload(settings(), of_loops(after)).await.unwrap();

    let loops = orchestrator.loops();
    let found: Vec<_> =
        loops.iter().map(|it| (it.settings.name.as_str(), it.origin, it.settings.catch_up, it.state.stopped)).collect();
    let (declared, by_rpc) = (LoopOrigin::Config, LoopOrigin::Rpc);
    let expected = [
        ("also_declared", declared, CatchUp::None, false),
        ("by_rpc", by_rpc, CatchUp::None, false),
        ("changed", declared, CatchUp::One, false),
        ("new", declared, CatchUp::None, false),
        ("same", declared, CatchUp::None, false),
        ("stopped", declared, CatchUp::None, true),
        ("stopped_and_changed", declared, CatchUp::One, true),
    ];
    assert_eq!(found, expected);
    assert_eq!(fires_at("same"), same);
}

#[tokio::test(start_paused = true)]
async fn a_reload_initializes_only_changed_subsystems_and_closes_breakers_only_of_moved_ones() {
    let spec = |name: &str| {
        let breaker = BreakerSpec { failure_threshold: Some(1), ..BreakerSpec::default() };
        SubsystemSpec { breaker, ..subsystem(name).to_spec() }
    };
    let as_is = |name: &str| Subsystem::from_spec(&spec(name)).unwrap();
    let moved = SubsystemSpec { endpoint: "http://127.0.0.1:2".into(), ..spec("moved") };
    let changed = SubsystemSpec { critical: true, ..spec("changed") };

    let fleet = Arc::new(Fleet { call_fails: true, ..Fleet::default() });
    let declared = of_subsystems(["changed", "gone", "moved", "same"].map(as_is).into());
    let process = Process { declared, fleet, ..Process::default() };
    let (orchestrator, _tasks) = process.over(in_memory().await).await.unwrap();
    orchestrator
        .register_all(["also_declared", "by_rpc"].map(as_is).into(), None, &Registrar::Anyone, by_test())
        .await
        .unwrap();
    let counted = || (orchestrator.figures().declared, orchestrator.figures().registered);
    assert_eq!(counted(), (4, 2));
    orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();

    let after = ["also_declared", "new", "same"].map(as_is).into_iter();
    let after = after.chain([&moved, &changed].map(|spec| Subsystem::from_spec(spec).unwrap()));
    orchestrator.reload(settings(), of_subsystems(after.collect())).await.unwrap();
    assert_eq!(counted(), (5, 1));
    let subsystems = orchestrator.subsystems(None, 10);
    let found: Vec<_> = subsystems
        .iter()
        .map(|it| {
            let is_declared = matches!(it.origin, Origin::Config);
            let is_open = matches!(it.member.breaker(Instant::now()), BreakerState::Open(_));
            (it.member.subsystem.name.as_str(), is_declared, it.member.is_initialized(), is_open)
        })
        .collect();
    let expected = [
        ("also_declared", true, true, true),
        ("by_rpc", false, true, true),
        ("changed", true, false, true),
        ("moved", true, false, false),
        ("new", true, false, false),
        ("same", true, true, true),
    ];
    assert_eq!(found, expected);
    assert!(subsystems[2].member.subsystem.critical);
}

#[tokio::test(start_paused = true)]
async fn removed_declarations_are_forgotten_though_the_process_dies_right_after_the_reload() {
    let store = in_memory().await;
    let declared = || Declared { subsystems: vec![subsystem("a")], loops: vec![hourly("l")], ..Declared::default() };
    let (orchestrator, tasks) = declaring(declared(), &store).await;
    orchestrator.suspend(&name("a"), true, by_test()).await.unwrap();
    orchestrator.stop_loop(&name("l"), by_test()).await.unwrap();
    orchestrator.reload(settings(), Declared::default()).await.unwrap();
    drop(tasks);
    let (orchestrator, _tasks) = declaring(declared(), &store).await;
    assert!(!orchestrator.subsystem(&name("a")).unwrap().member.suspended);
    assert!(!orchestrator.loops()[0].state.stopped);
}

#[tokio::test(start_paused = true)]
async fn a_registration_that_the_file_declares_after_a_reload_stays_suspended_and_ends_with_the_declaration() {
    let declared = || of_subsystems(vec![subsystem("a")]);
    for (next, is_suspended) in [(declared(), Some(true)), (Declared::default(), None)] {
        let store = in_memory().await;
        let (orchestrator, tasks) = declaring(Declared::default(), &store).await;
        orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
        orchestrator.suspend(&name("a"), true, by_test()).await.unwrap();
        orchestrator.reload(settings(), declared()).await.unwrap();
        drop(tasks);
        let (orchestrator, _tasks) = declaring(next, &store).await;
        let found = orchestrator.subsystem(&name("a")).ok();
        assert_eq!(found.map(|entry| entry.member.suspended), is_suspended);
    }
}

/// The refusals of a declaration that completes a circular dependency through this number of subsystems registered by
/// RPC: in a reload, and at the next start.
async fn refusals(by_rpc: usize) -> [String; 2] {
    let store = in_memory().await;
    let (orchestrator, mut tasks) = declaring(Declared::default(), &store).await;
    let names: Vec<_> = (0..by_rpc).map(|i| format!("s{i:02}")).collect();
    let mut last = "declared";
    for next in &names {
        orchestrator.register(after(next, &[last]), None, &Registrar::Anyone, by_test()).await.unwrap();
        last = next;
    }
    orchestrator.register(subsystem("aside"), None, &Registrar::Anyone, by_test()).await.unwrap();
    let declared = of_subsystems(vec![after("declared", &[last])]);
    let refused = |refused: Refusal| match refused {
        Refusal::DeclaredRing { .. } => refused.to_string(),
        _ => panic!("{refused:?}"),
    };
    let reload = refused(orchestrator.reload(settings(), declared.clone()).await.unwrap_err());
    orchestrator.drain();
    tasks.finished().await.unwrap();
    let start = Process { declared, ..Process::default() }.over(store).await.err();
    [reload, refused(start.unwrap())]
}

#[tokio::test(start_paused = true)]
async fn a_declared_circular_dependency_names_up_to_sixteen_subsystems_registered_by_rpc() {
    for by_rpc in [1, 2, 16, 17] {
        let mut shown: Vec<_> = (0..by_rpc).rev().take(16).map(|i| format!("s{i:02}")).collect();
        if by_rpc > 16 {
            shown.push("…".into());
        }
        let were = if by_rpc == 1 { "was" } else { "were" };
        let expected = format!("; of these, {} {were} registered by RPC: change the configuration", shown.join(", "));
        for refused in refusals(by_rpc).await {
            assert!(refused.contains(&expected), "{refused}");
        }
    }
}
