//! The test kit itself: a fake subsystem follows its script, and logs its calls.

use crate::common::fleet::{End, Fleet, Initialize, Method, Run, from_struct};
use orchestrator_core::{
    model::Payload,
    proto::subsystem::v1::{self as pb, subsystem_client::SubsystemClient},
};
use serde_json::json;
use tonic::{Code, transport::Channel};

fn request(name: &str, cycle_id: u64, epoch: u64) -> pb::RunCycleRequest {
    pb::RunCycleRequest { subsystem: name.into(), cycle_id, epoch, attempt: 1, ..pb::RunCycleRequest::default() }
}

async fn client(fleet: &Fleet) -> SubsystemClient<Channel> {
    SubsystemClient::connect(fleet.endpoint().to_owned()).await.unwrap()
}

#[tokio::test]
async fn a_fake_follows_its_script() {
    let fleet = Fleet::start().await;
    let mut client = client(&fleet).await;
    let mut code = async |run: Run| {
        fleet.run("a", run);
        client.run_cycle(request("a", 1, 1)).await.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    assert_eq!(code(Run::Echo).await, Code::Ok);
    assert_eq!(code(Run::fail(Code::Unavailable)).await, Code::Unavailable);
    assert_eq!(code(Run::large_output(5 << 20)).await, Code::OutOfRange);
    assert_eq!(code(Run::Raw(b"\xff".as_slice().into())).await, Code::Internal);
    assert_eq!(code(Run::Raw(b"".as_slice().into())).await, Code::Ok);
    assert_eq!(code(Run::Truncated).await, Code::Internal);
    assert_ne!(code(Run::Disconnect).await, Code::Ok);
    // The channel dials again.
    assert_eq!(code(Run::metrics(100)).await, Code::Ok);

    fleet.run("a", Run::malformed_output());
    let answer = client.run_cycle(request("a", 1, 1)).await.unwrap().into_inner();
    assert!(Payload::check(answer.output).is_err());
}

#[tokio::test]
async fn a_fake_asks_for_initialization_and_refuses_a_superseded_caller() {
    let fleet = Fleet::start().await;
    let mut client = client(&fleet).await;
    fleet.script("a", |script| script.needs_initialize = true);
    let initialize = |epoch| pb::InitializeRequest { subsystem: "a".into(), epoch, ..pb::InitializeRequest::default() };

    assert_eq!(client.run_cycle(request("a", 1, 2)).await.unwrap_err().code(), Code::FailedPrecondition);
    client.initialize(initialize(2)).await.unwrap();
    client.run_cycle(request("a", 1, 2)).await.unwrap();
    assert_eq!(client.run_cycle(request("a", 2, 1)).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(client.initialize(initialize(1)).await.unwrap_err().code(), Code::Aborted);
    fleet.forget_initialization("a");
    assert_eq!(client.run_cycle(request("a", 1, 2)).await.unwrap_err().code(), Code::FailedPrecondition);
    fleet.script("a", |script| script.initialize = Initialize::Unimplemented);
    assert_eq!(client.initialize(initialize(2)).await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(fleet.now(|state| state.stale_calls), 2);
}

#[tokio::test]
async fn a_held_call_ends_when_its_script_changes_and_a_dropped_one_is_logged() {
    let fleet = Fleet::start().await;
    fleet.run("held", Run::Hold);
    fleet.run("hung", Run::Hang);
    let mut client = client(&fleet).await;
    let call = |name| {
        let mut client = client.clone();
        tokio::spawn(async move { client.run_cycle(request(name, 7, 1)).await })
    };
    let (held, hung) = (call("held"), call("hung"));
    fleet.until_run("held", 1).await;
    fleet.until_run("hung", 1).await;
    client.run_cycle(request("quick", 7, 1)).await.unwrap();
    fleet.run("held", Run::output(&json!({ "n": 1 })));
    let answer = held.await.unwrap().unwrap().into_inner();
    assert_eq!(from_struct(&answer.output), json!({ "n": 1 }));

    hung.abort();
    let dropped = |state: &crate::common::fleet::State| state.runs("hung").all(|call| call.ended.is_some());
    fleet.until("the hung call to be dropped", dropped).await;
    let calls = fleet.calls();
    let ended = |name| calls.iter().find(|call| call.subsystem == name).unwrap().ended.unwrap();
    assert_eq!(ended("hung").1, End::Dropped);
    assert_eq!(ended("held").1, End::Answered(Code::Ok));
    assert!(ended("quick").0 < ended("held").0);
    assert!(calls.iter().all(|call| call.method == Method::RunCycle && call.cycle_id == 7));
}

#[tokio::test]
async fn a_fleet_is_served_at_a_socket_too() {
    let dir = tempfile::tempdir().unwrap();
    let fleet = Fleet::at_socket(&dir.path().join("fleet.sock"));
    let mut client = client(&fleet).await;
    client.get_status(pb::GetStatusRequest { subsystem: "a".into() }).await.unwrap();
    assert_eq!(fleet.now(|state| state.connections), 1);
    drop(client);
    fleet.until("the connection to close", |state| state.connections == 0).await;
}
