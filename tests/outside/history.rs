//! The history: `GetCycle`, `ListCycles` with its pages and filters, and retention.

use crate::common::{
    Stage,
    command::orchestrator,
    fleet::Run,
    patiently,
    service::{Client, Home, because, decode, invalid, ms, reason},
};
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState, ListCyclesRequest, SubsystemState, Trigger};
use tonic::Code;

async fn ids(client: &mut Client, request: ListCyclesRequest) -> Vec<u64> {
    let page = client.list_cycles(request).await.unwrap().into_inner();
    assert_eq!(page.next_page_token, "");
    page.cycles.into_iter().map(|record| decode(record).cycle_id).collect()
}

/// Waits until the records below a revision are gone.
async fn pruned_to(client: &mut Client, oldest_revision: u64) {
    let pruned = async { while client.status().await.unwrap().oldest_revision < oldest_revision {} };
    patiently("old records to be removed", pruned).await;
}

#[tokio::test]
async fn a_page_is_newest_first_and_leads_to_the_next() {
    let mut stage = Stage::new().await;
    assert!(ids(&mut stage.client, ListCyclesRequest::default()).await.is_empty());
    for _ in 0..5 {
        stage.client.run().await.unwrap();
    }
    assert_eq!(ids(&mut stage.client, ListCyclesRequest::default()).await, [5, 4, 3, 2, 1]);
    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListCyclesRequest { page_size: 2, page_token, ..Default::default() };
        let page = stage.client.list_cycles(request).await.unwrap().into_inner();
        pages.push(page.cycles.into_iter().map(|record| decode(record).cycle_id).collect::<Vec<_>>());
        // Newer records do not move the pages.
        stage.client.run().await.unwrap();
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, [vec![5, 4], vec![3, 2], vec![1]]);

    assert_eq!(stage.client.cycle(3).await.unwrap().cycle_id, 3);
    let unknown = stage.client.cycle(99).await.unwrap_err();
    assert_eq!(reason(&unknown), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "99")]));
    assert_eq!(reason(&stage.client.cycle(0).await.unwrap_err()), invalid(["cycle_id"]));
}

#[tokio::test]
async fn a_page_of_a_selective_filter_does_not_read_the_whole_history() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    // Repeating one record is faster than running many cycles.
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    let many = "WITH RECURSIVE more(id) AS (SELECT 2 UNION ALL SELECT id + 1 FROM more WHERE id < 10100)
        INSERT INTO cycles (cycle_id, revision, epoch, state, trigger, loop, request_id, finished_at, record)
            SELECT id, id, epoch, state, trigger, loop, request_id, finished_at, record FROM cycles, more;
        UPDATE meta SET last_cycle_id = 10100, last_revision = 10100, unlogged_to = 10100";
    database.execute_batch(many).unwrap();
    drop(database);
    let store = format!("sqlite:{}", home.path("o.db").display());
    let (exit, said) = orchestrator(None, &["store", "accept", &store]).await;
    assert_eq!(exit, 0, "{said}");
    let service = home.serve().await;
    let client = service.client().await;
    let mut stage = Stage { fleet, home, service, client };
    let none_passes = ListCyclesRequest { trigger: Trigger::Loop.into(), ..Default::default() };
    let page = stage.client.list_cycles(none_passes.clone()).await.unwrap().into_inner();
    assert_eq!((page.cycles.len(), page.next_page_token.as_str()), (0, "101"));
    let rest = ListCyclesRequest { page_token: page.next_page_token, ..none_passes };
    let page = stage.client.list_cycles(rest).await.unwrap().into_inner();
    assert_eq!((page.cycles.len(), page.next_page_token.as_str()), (0, ""));
}

#[tokio::test]
async fn large_records_make_small_pages() {
    let mut stage = Stage::new().await;
    stage.fleet.run("a", Run::large_output(1_000_000));
    stage.register("a", |it| it.record_output = true).await;
    for _ in 0..5 {
        stage.client.run().await.unwrap();
    }
    let page = stage.client.list_cycles(ListCyclesRequest::default()).await.unwrap().into_inner();
    assert!(prost::Message::encoded_len(&page) < 4 << 20);
    assert!(!page.next_page_token.is_empty());
    let history = stage.client.history().await.unwrap();
    assert_eq!(history.into_iter().map(|it| decode(it).cycle_id).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn each_filter_returns_the_matching_records() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    let subset = |name: &str| pb::RunCycleRequest { subsystems: vec![name.into()], ..Default::default() };
    // 1: a, b succeed. 2: only b. 3: a fails. 4: a fails, b succeeds. 5: cancelled. 6: a loop's.
    stage.client.run().await.unwrap();
    stage.client.run_with(subset("b")).await.unwrap();
    stage.fleet.run("a", Run::fail(Code::Internal));
    stage.client.run_with(subset("a")).await.unwrap();
    let fourth = stage.client.run().await.unwrap();
    stage.fleet.run("a", Run::Hold);
    let fifth = stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 4).await;
    stage.client.cancel(fifth).await.unwrap();
    stage.fleet.run("a", Run::Echo);
    let settings = pb::IntervalLoop { name: "l".into(), interval: ms(3_600_000), ..Default::default() };
    // Its first tick is an hour away at most. The tick that was due when the loop got a shorter interval is fired at
    // once.
    let quick = pb::IntervalLoop { interval: ms(10), ..settings.clone() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(quick) }).await.unwrap();
    stage.client.recorded(6).await;
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap();
    let last = stage.client.run().await.unwrap().cycle_id;
    let of_loop: Vec<_> = (6..last).rev().collect();

    let all = ListCyclesRequest::default;
    let a = || ListCyclesRequest { subsystem: "a".into(), ..all() };
    let from = |state: &[CycleState]| state.iter().map(|&state| state.into()).collect::<Vec<i32>>();
    let cases = [
        (ListCyclesRequest { states: from(&[CycleState::Failed]), ..all() }, vec![3]),
        (ListCyclesRequest { states: from(&[CycleState::Degraded, CycleState::Cancelled]), ..all() }, vec![5, 4]),
        (ListCyclesRequest { states: from(&[CycleState::Interrupted]), ..all() }, vec![]),
        (ListCyclesRequest { trigger: Trigger::Manual.into(), ..all() }, vec![last, 5, 4, 3, 2, 1]),
        (ListCyclesRequest { trigger: Trigger::Loop.into(), ..all() }, of_loop.clone()),
        (ListCyclesRequest { r#loop: "l".into(), ..all() }, of_loop.clone()),
        (ListCyclesRequest { r#loop: "other".into(), ..all() }, vec![]),
        (a(), [vec![last], of_loop.clone(), vec![5, 4, 3, 1]].concat()),
        (ListCyclesRequest { subsystem: "other".into(), ..all() }, vec![]),
        (ListCyclesRequest { subsystem_states: vec![SubsystemState::Failed.into()], ..a() }, vec![4, 3]),
        (
            ListCyclesRequest {
                subsystem_states: vec![SubsystemState::Failed.into(), SubsystemState::Cancelled.into()],
                states: from(&[CycleState::Cancelled]),
                ..a()
            },
            vec![5],
        ),
        (ListCyclesRequest { finished_before: fourth.finished_at, ..all() }, vec![3, 2, 1]),
        (ListCyclesRequest { finished_from: fourth.finished_at, ..all() }, [vec![last], of_loop, vec![5, 4]].concat()),
    ];
    for (request, expected) in cases {
        assert_eq!(ids(&mut stage.client, request.clone()).await, expected, "{request:?}");
    }
    // Pages of the filtered records.
    let request = ListCyclesRequest { page_size: 1, ..a() };
    let page = stage.client.list_cycles(request.clone()).await.unwrap().into_inner();
    let next = ListCyclesRequest { page_token: page.next_page_token, ..request };
    let next = stage.client.list_cycles(next).await.unwrap().into_inner();
    assert_eq!(decode(next.cycles[0].clone()).cycle_id, last - 1);

    let bad_time = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 });
    let bad = ListCyclesRequest {
        page_size: 1001,
        page_token: "x".into(),
        states: vec![99],
        trigger: 99,
        r#loop: "9".into(),
        subsystem_states: vec![99],
        finished_from: bad_time,
        finished_before: bad_time,
        ..all()
    };
    let mut fields = reason(&stage.client.list_cycles(bad).await.unwrap_err()).fields;
    fields.sort();
    let expected = [
        "finished_before",
        "finished_from",
        "loop",
        "page_size",
        "page_token",
        "states[0]",
        "subsystem_states",
        "subsystem_states[0]",
        "trigger",
    ];
    assert_eq!(fields, expected);
    // These are numbers, but this service gives no such token.
    for page_token in ["+5", "05", "0"] {
        let foreign = ListCyclesRequest { page_token: page_token.into(), ..all() };
        let refused = stage.client.list_cycles(foreign).await.unwrap_err();
        assert_eq!(reason(&refused).fields, ["page_token"], "{page_token}");
    }
}

#[tokio::test]
async fn retention_keeps_the_newest_records_and_a_set_number_of_each_state() {
    let config = "[store.retention]\nmax_cycles = 2\n[store.retention.failed]\nmax_cycles = 3\n";
    let mut stage = Stage::at(Home::new().with_config(config)).await;
    stage.register("a", |_| {}).await;
    // Cycles with odd ids fail.
    for i in 1..=10 {
        stage.fleet.run("a", if i % 2 == 0 { Run::Echo } else { Run::fail(Code::Internal) });
        stage.client.run().await.unwrap();
    }
    let mut stage = stage.restarted().await;
    pruned_to(&mut stage.client, 7).await;
    assert_eq!(ids(&mut stage.client, ListCyclesRequest::default()).await, [10, 9, 8, 7, 5]);
    let gone = stage.client.cycle(6).await.unwrap_err();
    assert_eq!(reason(&gone), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "6")]));
    // The stream has no gap, so it begins above the highest removed record.
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.oldest_revision, status.newest_revision, status.total_cycles), (7, 10, 10));
}

#[tokio::test]
async fn retention_runs_with_the_service_and_removed_records_stay_removed() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "store.retention.max_cycles=5"])).await;
    let request = |id: &str| pb::RunCycleRequest { request_id: id.into(), ..Default::default() };
    assert_eq!(stage.client.run_with(request("first")).await.unwrap().cycle_id, 1);
    for _ in 0..70 {
        stage.client.run().await.unwrap();
    }
    pruned_to(&mut stage.client, 2).await;
    let gone = stage.client.cycle(1).await.unwrap_err();
    assert_eq!(reason(&gone), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "1")]));
    assert!(!ids(&mut stage.client, ListCyclesRequest { page_size: 1000, ..Default::default() }).await.contains(&1));
    // Its request id is forgotten with its record.
    assert_eq!(stage.client.run_with(request("first")).await.unwrap().cycle_id, 72);
}

/// A service with a retention of an hour, after these of its four cycles became an hour older while it was down.
async fn grown_older(which: &str) -> Stage {
    let mut stage = Stage::at(Home::new().with_args(["--set", "store.retention.max_age=1h"])).await;
    for _ in 0..4 {
        stage.client.run().await.unwrap();
    }
    older(stage, which).await
}

/// The same stage after these of its cycles became an hour older while it was down. They are then older than the log,
/// which has the hashes of other bytes.
async fn older(Stage { fleet, home, service, .. }: Stage, which: &str) -> Stage {
    assert!(service.stop().await.success());
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    let mut query = database.prepare(&format!("SELECT cycle_id, record FROM cycles WHERE {which}")).unwrap();
    let records = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let records: Vec<(i64, Vec<u8>)> = records.collect::<Result<_, _>>().unwrap();
    for (cycle_id, record) in records {
        let mut record = decode(record.into());
        record.finished_at.as_mut().unwrap().seconds -= 3600;
        let older = "UPDATE cycles SET finished_at = finished_at - 3600 * 1000000000, record = ?2, leaf = NULL
                     WHERE cycle_id = ?1";
        assert_eq!(database.execute(older, (cycle_id, prost::Message::encode_to_vec(&record))).unwrap(), 1);
    }
    database.execute("UPDATE meta SET unlogged_to = last_revision", []).unwrap();
    drop(query);
    drop(database);
    let store = format!("sqlite:{}", home.path("o.db").display());
    let (exit, said) = orchestrator(None, &["store", "accept", &store]).await;
    assert_eq!(exit, 0, "{said}");
    let service = home.serve().await;
    Stage { client: service.client().await, fleet, home, service }
}

#[tokio::test]
async fn retention_by_age_removes_old_records() {
    let mut stage = grown_older("cycle_id < 3").await;
    pruned_to(&mut stage.client, 3).await;
    assert_eq!(ids(&mut stage.client, ListCyclesRequest::default()).await, [4, 3]);
}

#[tokio::test]
async fn a_record_that_is_not_what_its_columns_say_stays_and_others_are_removed() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "store.retention.max_cycles=5"])).await;
    for _ in 0..4 {
        stage.client.run().await.unwrap();
    }
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    database.execute("UPDATE cycles SET finished_at = 'once' WHERE cycle_id = 2", []).unwrap();
    let service = home.serve().await;
    let mut client = service.client().await;
    for _ in 0..70 {
        client.run().await.unwrap();
    }
    home.logged("retention keeps more than its limits allow: the record of cycle 2, revision 2,", 1).await;
    let mut query = database.prepare("SELECT revision FROM cycles WHERE revision < 60").unwrap();
    let kept: Vec<i64> = query.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(kept, [2]);
}

#[tokio::test]
async fn a_clock_that_is_far_ahead_of_the_last_cycle_removes_nothing_at_once() {
    let mut stage = grown_older("true").await;
    let doubted = "the clock is ahead of the last cycle";
    patiently(doubted, async { while !stage.home.log().contains(doubted) {} }).await;
    assert_eq!(ids(&mut stage.client, ListCyclesRequest::default()).await, [4, 3, 2, 1]);
    assert_eq!(stage.service.stop().await.code(), Some(0));
}

#[tokio::test]
async fn at_most_a_batch_of_old_records_is_removed_at_once() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "store.retention.max_age=1h"])).await;
    for _ in 0..300 {
        stage.client.run().await.unwrap();
    }
    // The last cycle is as young as the clock says, even if the clock is wrong.
    let mut stage = older(stage, "cycle_id < 300").await;
    let line = "many records are too old at once";
    patiently(line, async { while !stage.home.log().contains(line) {} }).await;
    assert_eq!(stage.client.status().await.unwrap().oldest_revision, 257);
}
