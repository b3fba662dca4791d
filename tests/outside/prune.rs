//! `orchestrator cycles prune` and `orchestrator store compact`.

use std::fs;

use crate::common::{
    Stage,
    command::orchestrator,
    fleet::Run,
    service::{decode, invalid, reason},
};
use orchestrator_core::proto::orchestrator::v1::{self as pb, AuditEvent, ledger_client::LedgerClient};
use prost::Message;
use tonic::Code;

/// The revisions that are retained, the oldest first.
async fn retained(stage: &mut Stage) -> Vec<u64> {
    let history = stage.client.history().await.unwrap();
    history.into_iter().map(|record| decode(record).revision).collect()
}

async fn prune(stage: &mut Stage, request: pb::PruneCyclesRequest) -> pb::PruneCyclesResponse {
    stage.client.prune_cycles(request).await.unwrap().into_inner()
}

/// The audit events of this RPC.
async fn events_of(stage: &Stage, rpc: &str) -> Vec<AuditEvent> {
    let mut ledger = LedgerClient::connect(format!("http://{}", stage.service.address())).await.unwrap();
    let request = pb::ListAuditEventsRequest::default();
    let events = ledger.list_audit_events(request).await.unwrap().into_inner().events;
    let events = events.into_iter().map(|event| AuditEvent::decode(event.event).unwrap());
    events.filter(|event| event.rpc == rpc).collect()
}

#[tokio::test]
async fn the_oldest_records_are_removed_with_an_event_and_the_log_is_still_verified() {
    /// More records than one step removes.
    const CYCLES: u64 = 300;
    let mut stage = Stage::new().await;
    for _ in 0..CYCLES {
        stage.client.run().await.unwrap();
    }
    let keep = |keep_newest, dry_run| pb::PruneCyclesRequest { keep_newest, dry_run, ..Default::default() };
    let counted = prune(&mut stage, keep(10, true)).await;
    assert_eq!((counted.removed, counted.oldest_revision), (CYCLES - 10, 1));
    assert_eq!(retained(&mut stage).await.len() as u64, CYCLES);
    let pruned = prune(&mut stage, keep(10, false)).await;
    assert_eq!((pruned.removed, pruned.oldest_revision, pruned.kept.as_str()), (CYCLES - 10, CYCLES - 9, ""));
    assert_eq!(retained(&mut stage).await, (CYCLES - 9..=CYCLES).collect::<Vec<_>>());
    assert_eq!(prune(&mut stage, keep(10, false)).await.removed, 0);
    let events = events_of(&stage, "PruneCycles").await;
    assert_eq!(events.len(), 1, "neither a count nor a call that removes nothing has one: {events:?}");
    assert_eq!((events[0].code.as_str(), &events[0].targets[..]), ("OK", &["*".to_owned()][..]));

    // By time: up to the first record that is not older.
    let middle = decode(stage.client.history().await.unwrap()[4].clone());
    let before = |dry_run| pb::PruneCyclesRequest { finished_before: middle.finished_at, dry_run, keep_newest: 0 };
    assert_eq!(prune(&mut stage, before(true)).await.removed, 4);
    assert_eq!(prune(&mut stage, before(false)).await.removed, 4);
    assert_eq!(retained(&mut stage).await, (CYCLES - 5..=CYCLES).collect::<Vec<_>>());
    // The newest one stays.
    assert_eq!(prune(&mut stage, keep(1, false)).await.removed, 5);
    assert_eq!(stage.client.run().await.unwrap().cycle_id, CYCLES + 1, "ids go on");

    let stage = stage.restarted().await;
    let (database, key) = (stage.home.path("o.db"), stage.home.path("o.db.key"));
    let (database, key) = (database.to_str().unwrap(), key.to_str().unwrap());
    let (code, said) = orchestrator(None, &["verify", "--db", database, "--key-file", key]).await;
    assert!(code == 0 && said.contains("2 records"), "{said}");
}

#[tokio::test]
async fn a_limit_that_is_missing_doubled_or_in_the_future_is_refused() {
    let mut stage = Stage::new().await;
    let future = Some(prost_types::Timestamp { seconds: 10_000_000_000, nanos: 0 });
    for (keep_newest, finished_before, field) in
        [(0, None, "keep_newest"), (1, future, "finished_before"), (0, future, "finished_before")]
    {
        let request = pb::PruneCyclesRequest { keep_newest, finished_before, dry_run: false };
        let refused = stage.client.prune_cycles(request).await.unwrap_err();
        assert_eq!(reason(&refused), invalid([field]), "{refused:?}");
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    let empty = prune(&mut stage, pb::PruneCyclesRequest { keep_newest: 1, ..Default::default() }).await;
    assert_eq!((empty.removed, empty.oldest_revision), (0, 1));
}

#[tokio::test]
async fn the_file_gets_smaller_once_no_service_has_it_open_and_everything_else_stays() {
    let mut stage = Stage::new().await;
    stage.register("large", |it| it.record_output = true).await;
    stage.fleet.run("large", Run::large_output(100 << 10));
    for _ in 0..40 {
        stage.client.run().await.unwrap();
    }
    let url = format!("sqlite:{}", stage.home.path("o.db").display());
    let address = stage.service.address().to_string();
    let (code, said) =
        orchestrator(None, &["cycles", "prune", "--keep-newest", "2", "--dry-run", "--address", &address]).await;
    assert_eq!((code, said.as_str()), (0, "would remove 38 records; the oldest revision is 1\n"));
    let (code, said) = orchestrator(None, &["cycles", "prune", "--keep-newest", "2", "--address", &address]).await;
    assert_eq!((code, said.as_str()), (0, "removed 38 records; the oldest revision is 39\n"));
    let (code, said) = orchestrator(None, &["store", "compact", &url]).await;
    assert!(code == 1 && said.contains("is in use by another process"), "{said}");

    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let size = || fs::metadata(home.path("o.db")).unwrap().len();
    let before = size();
    let (code, said) = orchestrator(None, &["store", "compact", &url]).await;
    assert!(code == 0 && said.contains("bytes now"), "{said}");
    assert!(before > 3 << 20 && size() < before / 4, "{before} {}", size());
    let mut stage = Stage::again(fleet, home).await;
    assert!(!stage.home.log().contains("a new log begins"), "{}", stage.home.log());
    assert_eq!(retained(&mut stage).await, [39, 40]);
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 41);
    let (code, said) = orchestrator(None, &["store", "compact", "sqlite:/no/such.db"]).await;
    assert!(code == 1 && said.contains("does not exist"), "{said}");
}
