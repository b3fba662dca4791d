//! `WatchCycles`: every recorded cycle once, in order and without a gap, and the progress of running cycles.

use std::collections::{BTreeMap, HashSet};

use crate::common::{
    Stage,
    fleet::{Run, Script},
    patiently,
    service::{Client, Home, because, decode, invalid, ms, next_event, next_recorded, part, reason},
};
use bytes::Bytes;
use futures_util::future::join_all;
use orchestrator_core::proto::orchestrator::v1::{
    self as pb, CycleState, SubsystemState, Trigger, WatchCyclesRequest, cycle_event::Event,
};
use prost::Message;
use tonic::{Code, Status, Streaming, transport::Endpoint};

type Stream = Streaming<pb::WatchCyclesResponse>;

async fn watch(client: &mut Client, request: WatchCyclesRequest) -> Result<Stream, Status> {
    Ok(client.watch_cycles(request).await?.into_inner())
}

async fn bookmark(stream: &mut Stream) -> u64 {
    let event = next_event(stream).await.unwrap();
    assert!(matches!(event.event, Some(Event::Bookmark(_))), "{event:?}");
    event.revision
}

async fn recorded(stream: &mut Stream) -> pb::CycleTelemetry {
    let event = next_event(stream).await.unwrap();
    let Some(Event::Recorded(record)) = event.event else { panic!("{event:?} is not a record") };
    let cycle = decode(record);
    assert_eq!(cycle.revision, event.revision);
    cycle
}

/// Runs cycles, and returns the bytes that their callers received.
async fn run(client: &mut Client, cycles: usize) -> Vec<Bytes> {
    let mut records = Vec::new();
    for _ in 0..cycles {
        records.push(client.run_cycle(pb::RunCycleRequest::default()).await.unwrap().into_inner().telemetry);
    }
    records
}

#[tokio::test]
async fn a_watcher_begins_now_after_a_revision_or_with_the_oldest_record() {
    let mut stage = Stage::new().await;
    let mut empty = watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap();
    assert_eq!(bookmark(&mut empty).await, 0);
    stage.register("a", |_| {}).await;
    let records = run(&mut stage.client, 3).await;
    let mut now = watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap();
    assert_eq!(bookmark(&mut now).await, 3);
    let from_oldest = WatchCyclesRequest { from_oldest: true, ..Default::default() };
    let mut oldest = watch(&mut stage.client, from_oldest.clone()).await.unwrap();
    let mut after = stage.client.watch_after(2).await.unwrap();
    for record in &records {
        assert_eq!(next_recorded(&mut oldest).await, record);
        // This watcher was connected all the time.
        assert_eq!(next_recorded(&mut empty).await, record);
    }
    assert_eq!(next_recorded(&mut after).await, records[2]);
    assert_eq!((bookmark(&mut oldest).await, bookmark(&mut after).await), (3, 3));
    let more = run(&mut stage.client, 2).await;
    for stream in [&mut now, &mut oldest, &mut after] {
        for record in &more {
            assert_eq!(next_recorded(stream).await, record);
        }
    }
    assert_eq!(stage.client.status().await.unwrap().watchers, 4);
    let both = WatchCyclesRequest { after_revision: Some(1), ..from_oldest };
    assert_eq!(reason(&watch(&mut stage.client, both).await.unwrap_err()), invalid(["from_oldest"]));
}

#[tokio::test]
async fn every_reader_gets_the_same_bytes_of_a_record() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    stage.fleet.run("b", Run::fail(Code::Internal));
    stage.register("b", |_| {}).await;
    let mut stream = stage.client.watch_after(0).await.unwrap();
    let records = run(&mut stage.client, 1).await;
    assert_eq!(next_recorded(&mut stream).await, records[0]);
    for restart in 0..3 {
        let cycle = stage.client.get_cycle(pb::GetCycleRequest { cycle_id: 1 }).await.unwrap().into_inner().telemetry;
        assert_eq!(cycle, records[0]);
        assert_eq!(stage.client.history().await.unwrap(), records);
        assert_eq!(stage.client.status().await.unwrap().last_cycle, records[0]);
        let mut stream = stage.client.watch_after(0).await.unwrap();
        assert_eq!(next_recorded(&mut stream).await, records[0]);
        stage = match restart {
            0 => stage.restarted().await,
            _ => stage.killed().await,
        };
    }
}

#[tokio::test]
async fn watchers_choose_loops_states_and_subsystems() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    let filters = [
        WatchCyclesRequest { loops: vec!["l".into()], ..Default::default() },
        WatchCyclesRequest {
            states: vec![CycleState::Degraded.into(), CycleState::Failed.into()],
            ..Default::default()
        },
        WatchCyclesRequest { subsystems: vec!["b".into(), "x".into()], ..Default::default() },
    ];
    let mut streams = Vec::new();
    for filter in &filters {
        let mut stream = watch(&mut stage.client, filter.clone()).await.unwrap();
        bookmark(&mut stream).await;
        streams.push(stream);
    }
    let [by_loop, by_state, by_subsystem] = &mut streams[..] else { unreachable!() };
    let subset = |name: &str| pb::RunCycleRequest { subsystems: vec![name.into()], ..Default::default() };
    stage.client.run_with(subset("a")).await.unwrap();
    let of_b = stage.client.run_with(subset("b")).await.unwrap();
    assert_eq!(recorded(by_subsystem).await, of_b);
    stage.fleet.run("a", Run::fail(Code::Internal));
    let failed = stage.client.run_with(subset("a")).await.unwrap();
    assert_eq!(recorded(by_state).await, failed);
    let degraded = stage.client.run().await.unwrap();
    assert_eq!(recorded(by_state).await, degraded);
    assert_eq!(recorded(by_subsystem).await, degraded);
    let settings = pb::IntervalLoop { name: "l".into(), interval: ms(20), ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap();
    let of_loop = recorded(by_loop).await;
    assert_eq!((of_loop.cycle_id, of_loop.trigger(), of_loop.r#loop.as_str()), (5, Trigger::Loop, "l"));
    stage.client.stop_interval_loop(pb::StopIntervalLoopRequest { name: "l".into() }).await.unwrap();

    // Records that the filter rejects are passed over, also in the history; a bookmark reports the position.
    let mut resumed =
        watch(&mut stage.client, WatchCyclesRequest { after_revision: Some(0), ..filters[0].clone() }).await.unwrap();
    assert_eq!(recorded(&mut resumed).await, of_loop);
    let none = WatchCyclesRequest {
        after_revision: Some(0),
        states: vec![CycleState::Cancelled.into()],
        ..Default::default()
    };
    let mut none = watch(&mut stage.client, none).await.unwrap();
    assert!(bookmark(&mut none).await >= 5);
    let bad = WatchCyclesRequest {
        loops: vec!["9".into()],
        states: vec![0, 99],
        subsystems: vec!["a".into(), "a".into()],
        ..Default::default()
    };
    let refused = watch(&mut stage.client, bad).await.unwrap_err();
    assert_eq!(reason(&refused), invalid(["loops[0]", "states[0]", "states[1]", "subsystems[1]"]));
}

async fn started(stream: &mut Stream) {
    let event = next_event(stream).await.unwrap();
    let Some(Event::Started(started)) = event.event else { panic!("{event:?} is not a start") };
    assert_eq!((started.cycle_id, started.trigger(), event.revision), (1, Trigger::Manual, 0));
    assert!(started.started_at.is_some() && started.scheduled_at.is_some());
    assert_eq!(started.subsystems, ["a", "b"]);
}

#[tokio::test]
async fn progress_reports_the_start_every_step_and_the_end() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.register("b", |it| it.requires = vec!["a".into()]).await;
    stage.fleet.run("a", Run::Hold);
    let progress = WatchCyclesRequest { progress: true, ..Default::default() };
    let mut early = watch(&mut stage.client, progress.clone()).await.unwrap();
    let mut plain = watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap();
    assert_eq!((bookmark(&mut early).await, bookmark(&mut plain).await), (0, 0));
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 1).await;

    started(&mut early).await;
    // A later watcher receives its current state.
    let mut late = watch(&mut stage.client, progress).await.unwrap();
    bookmark(&mut late).await;
    started(&mut late).await;
    let event = next_event(&mut late).await.unwrap();
    let Some(Event::Progress(stands)) = event.event else { panic!("{event:?} is not progress") };
    let stands: Vec<_> = stands.updates.iter().map(|it| (it.name.as_str(), it.state(), it.attempts)).collect();
    assert_eq!(stands, [("a", SubsystemState::Running, 1)]);

    stage.fleet.run("a", Run::fail(Code::Internal));
    let steps = async |stream: &mut Stream| {
        let mut steps = Vec::new();
        loop {
            match next_event(stream).await.unwrap().event.unwrap() {
                Event::Progress(progress) => {
                    assert_eq!((progress.cycle_id, progress.dropped), (1, 0));
                    steps.extend(progress.updates.into_iter().map(|it| (it.name.clone(), it.state(), it.error_code)));
                }
                Event::Recorded(record) => return (steps, decode(record)),
                other => panic!("{other:?}"),
            }
        }
    };
    let failed = |name: &str| (name.to_owned(), SubsystemState::Failed, "INTERNAL".to_owned());
    let step = |name: &str, state| (name.to_owned(), state, String::new());
    let (seen, cycle) = steps(&mut early).await;
    assert_eq!(seen, [step("a", SubsystemState::Running), failed("a"), step("b", SubsystemState::Skipped)]);
    assert_eq!(cycle.state(), CycleState::Failed);
    let (seen, cycle) = steps(&mut late).await;
    assert_eq!(seen, [failed("a"), step("b", SubsystemState::Skipped)]);
    // A watcher without progress receives only the record.
    assert_eq!(recorded(&mut plain).await, cycle);
}

#[tokio::test]
async fn revisions_that_are_not_retained_or_in_the_future_are_out_of_range() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "store.retention.max_cycles=2"])).await;
    let records = run(&mut stage.client, 5).await;
    let refused = |oldest, newest| {
        let metadata = [("newest_revision", newest), ("oldest_revision", oldest)];
        because(Code::OutOfRange, "REVISION_NOT_RETAINED", metadata)
    };
    let future = stage.client.watch_after(6).await.unwrap_err();
    assert_eq!(reason(&future), refused("1", "5"));
    assert!(future.message().starts_with("revision 6 is in the future: 5 is the newest. Is this another database"));
    // A start removes the records beyond the limit.
    let mut stage = stage.restarted().await;
    let pruned = async { while stage.client.status().await.unwrap().oldest_revision != 4 {} };
    patiently("old records to be removed", pruned).await;
    for after in [0, 2] {
        assert_eq!(reason(&stage.client.watch_after(after).await.unwrap_err()), refused("4", "5"));
    }
    let mut after = stage.client.watch_after(3).await.unwrap();
    let from_oldest = WatchCyclesRequest { from_oldest: true, ..Default::default() };
    let mut oldest = watch(&mut stage.client, from_oldest).await.unwrap();
    for stream in [&mut after, &mut oldest] {
        assert_eq!(next_recorded(stream).await, records[3]);
        assert_eq!(next_recorded(stream).await, records[4]);
        assert_eq!(bookmark(stream).await, 5);
    }
    assert_eq!(stage.client.status().await.unwrap().newest_revision, 5);
}

#[tokio::test]
async fn watchers_are_counted_and_bounded() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "server.max_watchers=2"])).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        streams.push(watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap());
    }
    let refused = watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::ResourceExhausted, "TOO_MANY_WATCHERS", []));
    streams.pop();
    let left = async { while stage.client.status().await.unwrap().watchers != 1 {} };
    patiently("the watcher to be gone", left).await;
    let mut stream = watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap();
    bookmark(&mut stream).await;
}

#[tokio::test]
async fn a_stalled_watcher_receives_the_missing_records_from_the_history() {
    let mut stage = Stage::new().await;
    let mut stream = watch(&mut stage.client, WatchCyclesRequest::default()).await.unwrap();
    bookmark(&mut stream).await;
    // More than the cache holds, and more than fits between it and the service.
    stage.fleet.run("a", Run::large_output(20_000));
    stage.register("a", |it| it.record_output = true).await;
    let records = run(&mut stage.client, 300).await;
    for record in &records {
        assert_eq!(next_recorded(&mut stream).await, record);
    }
}

#[tokio::test]
async fn a_watcher_follows_through_restarts_and_is_notified_of_the_shutdown() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    let mut stream = stage.client.watch_after(0).await.unwrap();
    bookmark(&mut stream).await;
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("held", 1).await;
    stage.service.signal(rustix::process::Signal::TERM);
    // It still receives the end of the running cycle.
    let same = stage.registration("held");
    let draining = async { while stage.client.register(same.clone()).await.is_ok() {} };
    patiently("the service to drain", draining).await;
    stage.fleet.run("held", Run::Echo);
    assert_eq!(recorded(&mut stream).await.state(), CycleState::Succeeded);
    let error = next_event(&mut stream).await.unwrap_err();
    assert_eq!(reason(&error), because(Code::Unavailable, "DRAINING", []));
    assert!(stage.service.ended().await.success());

    let Stage { fleet, home, .. } = stage;
    let service = home.serve().await;
    let mut stage = Stage { client: service.client().await, fleet, home, service };
    let mut stream = stage.client.watch_after(1).await.unwrap();
    assert_eq!(bookmark(&mut stream).await, 1);
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(recorded(&mut stream).await, cycle);
    // After a kill, the stream ends with an error.
    let mut stage = stage.killed().await;
    assert_eq!(next_event(&mut stream).await.unwrap_err().code(), Code::Unknown);
    let mut stream = stage.client.watch_after(1).await.unwrap();
    let again = recorded(&mut stream).await;
    assert_eq!((again.cycle_id, part(&again, "held").state()), (2, SubsystemState::Succeeded));
    assert_eq!(again, cycle);
}

#[tokio::test]
async fn all_steps_of_a_cycle_come_before_its_record() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.register("b", |it| it.requires = vec!["a".into()]).await;
    let progress = WatchCyclesRequest { progress: true, ..Default::default() };
    let mut stream = watch(&mut stage.client, progress).await.unwrap();
    bookmark(&mut stream).await;
    for _ in 0..50 {
        stage.client.admit().await.unwrap();
        let mut last = BTreeMap::new();
        loop {
            match next_event(&mut stream).await.unwrap().event.unwrap() {
                Event::Progress(progress) => {
                    last.extend(progress.updates.into_iter().map(|it| (it.name.clone(), it.state())));
                }
                Event::Recorded(_) => break,
                _ => {}
            }
        }
        let succeeded = |name: &str| (name.to_owned(), SubsystemState::Succeeded);
        assert_eq!(last, [succeeded("a"), succeeded("b")].into());
    }
}

#[tokio::test]
async fn progress_shows_a_subsystem_that_hangs_in_initialize() {
    // The kernel accepts the connection, but no answer comes.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut stage = Stage::new().await;
    stage
        .register("a", |it| {
            it.endpoint = endpoint;
            it.timeout = ms(200);
        })
        .await;
    let progress = WatchCyclesRequest { progress: true, ..Default::default() };
    let mut stream = watch(&mut stage.client, progress).await.unwrap();
    bookmark(&mut stream).await;
    stage.client.admit().await.unwrap();
    let Some(Event::Started(_)) = next_event(&mut stream).await.unwrap().event else { panic!("it has not started") };
    let event = next_event(&mut stream).await.unwrap();
    let Some(Event::Progress(progress)) = event.event else { panic!("{event:?} is not progress") };
    assert_eq!((progress.updates[0].name.as_str(), progress.updates[0].state()), ("a", SubsystemState::Running));
    let timed_out = loop {
        if let Event::Recorded(record) = next_event(&mut stream).await.unwrap().event.unwrap() {
            break decode(record).subsystems.remove(0);
        }
    };
    assert_eq!((timed_out.state(), timed_out.attempts), (SubsystemState::TimedOut, 0));
    assert!(timed_out.error_message.contains("no answer to Initialize"), "{timed_out:?}");
}

/// The state of a large fleet, with a long error of each subsystem, is larger than clients accept in one message.
#[tokio::test]
async fn a_late_watcher_receives_the_state_of_a_large_cycle_in_pieces() {
    const FAILED: usize = 1_500;
    let mut stage = Stage::at(Home::new().in_memory()).await;
    stage.fleet.default_script(Script { run: Run::Fail(Code::Internal, "x".repeat(1 << 10)), ..Script::default() });
    stage.fleet.run("held", Run::Hold);
    let names: Vec<_> = (0..FAILED).map(|n| format!("s{n}")).collect();
    for name in names.iter().map(String::as_str).chain(["held"]) {
        stage.register(name, |_| {}).await;
    }
    stage.client.admit().await.unwrap();
    stage.fleet.until("all but one to have ended", |fleet| fleet.calls.len() > 2 * FAILED).await;

    let mut late = watch(&mut stage.client, WatchCyclesRequest { progress: true, ..Default::default() }).await.unwrap();
    bookmark(&mut late).await;
    let Some(Event::Started(started)) = next_event(&mut late).await.unwrap().event else { panic!("no start") };
    assert_eq!(started.subsystems.len(), FAILED + 1);
    let mut failed = HashSet::new();
    while failed.len() < FAILED {
        let event = next_event(&mut late).await.unwrap();
        assert!(event.encoded_len() < 1 << 20, "{} bytes", event.encoded_len());
        let Some(Event::Progress(progress)) = event.event else { panic!("{event:?} is not progress") };
        assert_eq!(progress.dropped, 0);
        let ended = progress.updates.into_iter().filter(|it| it.state() == SubsystemState::Failed);
        failed.extend(ended.map(|it| it.name));
    }
    stage.fleet.run("held", Run::default());
    let ended = loop {
        if let Some(Event::Recorded(record)) = next_event(&mut late).await.unwrap().event {
            break decode(record).state();
        }
    };
    assert_eq!(ended, CycleState::Degraded);
}

#[tokio::test]
async fn stalled_watchers_hold_no_records() {
    const ROUNDS: usize = 8;
    const LARGE: usize = 8;
    const MIB: u64 = 1 << 20;
    let mut stage = Stage::new().await;
    // More than the library collects before it sends, and less than a page.
    for (name, bytes) in [("small", 40 << 10), ("large", (1 << 20) - (64 << 10))] {
        stage.fleet.run(name, Run::large_output(bytes));
        stage.register(name, |it| it.record_output = true).await;
    }
    let mut stalled = Vec::new();
    let mut before = 0;
    for round in 0..ROUNDS {
        let revision = stage.client.status().await.unwrap().newest_revision;
        for name in ["small"].into_iter().chain(["large"; LARGE]) {
            let only = pb::RunCycleRequest { subsystems: vec![name.into()], ..Default::default() };
            assert_eq!(stage.client.run_with(only).await.unwrap().state(), CycleState::Succeeded);
        }
        // It has room for the start of the small record, and reads nothing.
        let endpoint = Endpoint::from_shared(format!("http://{}", stage.service.address())).unwrap();
        let channel = endpoint.initial_stream_window_size(1024).connect().await.unwrap();
        let mut client = Client::new(channel);
        stalled.push((client.watch_after(revision).await.unwrap(), client));
        if round == 0 {
            before = stage.service.memory().0;
        }
    }
    let grown = stage.service.memory().0.saturating_sub(before);
    // The cache for all watchers is 8 MiB; separate copies would be 56.
    assert!(grown < 32 * MIB, "{} MiB more", grown / MIB);
    // Each watcher continues at its position.
    for (i, (mut stream, _client)) in stalled.into_iter().enumerate() {
        for n in 0..=LARGE {
            let cycle = decode(next_recorded(&mut stream).await);
            assert_eq!(usize::try_from(cycle.cycle_id).unwrap(), i * (LARGE + 1) + n + 1);
        }
    }
}

#[tokio::test]
async fn waiting_watchers_hold_no_records_that_they_have_read() {
    const WATCHERS: u64 = 48;
    const MIB: u64 = 1 << 20;
    let mut stage = Stage::new().await;
    stage.fleet.run("large", Run::large_output((1 << 20) - (64 << 10)));
    stage.register("large", |it| it.record_output = true).await;
    // They share a connection of their own, whose window they fill until they are read.
    let mut client = stage.service.client().await;
    let mut streams = Vec::new();
    for _ in 0..WATCHERS {
        let mut stream = client.watch_after(0).await.unwrap();
        // From here on the watcher waits.
        assert!(matches!(next_event(&mut stream).await.unwrap().event, Some(Event::Bookmark(_))));
        streams.push(stream);
    }
    let (before, _) = stage.service.memory();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    join_all(streams.iter_mut().map(next_recorded)).await;
    // The allocator returns pages to the system after a while.
    let keeps_little = async {
        while stage.service.memory().0.saturating_sub(before) > WATCHERS * MIB / 2 {
            stage.client.status().await.unwrap();
        }
    };
    patiently("the memory of read records to be freed", keeps_little).await;
}
