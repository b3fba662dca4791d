//! Compressed messages: requests of clients, and answers of subsystems.

use crate::common::{
    Stage,
    fleet::{Fleet, Run, to_struct},
    patiently,
    process::Running,
    raw::Raw,
    service::{Home, ms, registration},
};
use bytes::Bytes;
use orchestrator_core::{
    proto::{
        orchestrator::v1::{self as pb, orchestrator_client::OrchestratorClient},
        subsystem::v1::{self as subsystem, subsystem_client::SubsystemClient},
    },
    subsystem::{Answer, Cycle, Failure, Server},
};
use serde_json::json;
use tonic::{
    Code,
    codec::CompressionEncoding,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

/// Many times as many bytes as a message may have. Compressed, they are few; until then, for seconds, one thread of the
/// test does nothing else.
const BOMB: usize = 64 << 20;
/// Less than a whole bomb takes. A message of 4 MiB, which is the limit, grows by doubling, so it takes more than that.
const LITTLE: u64 = 48 << 20;

async fn connect(stage: &Stage) -> Channel {
    Endpoint::from_shared(format!("http://{}", stage.service.address())).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn a_compressed_request_is_as_its_uncompressed_one() {
    let stage = Stage::new().await;
    let mut client = OrchestratorClient::new(connect(&stage).await)
        .send_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Gzip);
    for (name, bytes) in [("small", 10), ("large", 60 << 10)] {
        let text = "x".repeat(bytes);
        let parameters = to_struct(&json!({ "text": text }));
        let registration = pb::Registration { parameters, ..stage.registration(name) };
        let request = pb::RegisterSubsystemRequest { registration: Some(registration.clone()), lease: None };
        assert!(client.register_subsystem(request).await.unwrap().into_inner().created, "{name}");
        let get = pb::GetSubsystemRequest { name: name.into(), ..Default::default() };
        let kept = client.get_subsystem(get).await.unwrap().into_inner().subsystem.unwrap().registration.unwrap();
        assert_eq!(kept.parameters, registration.parameters);
    }
    let mut events = client.watch_cycles(pb::WatchCyclesRequest::default()).await.unwrap().into_inner();
    assert!(patiently("an event", events.message()).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_request_has_the_limit_of_its_uncompressed_one() {
    let stage = Stage::new().await;
    let mut client = tonic::client::Grpc::new(connect(&stage).await).send_compressed(CompressionEncoding::Gzip);
    let (_, before) = stage.service.memory();
    for _ in 0..2 {
        client.ready().await.unwrap();
        let path = PathAndQuery::from_static("/dreamnet.orchestrator.v1.Orchestrator/RunCycle");
        let bomb = tonic::Request::new(Bytes::from(vec![0; BOMB]));
        let refused = client.unary(bomb, path, Raw).await.unwrap_err();
        assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
        assert!(refused.message().contains("more than 4194304 bytes when decompressed"), "{refused:?}");
    }
    let (_, most) = stage.service.memory();
    assert!(most - before < LITTLE, "{} MiB more", (most - before) >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_answer_is_as_its_uncompressed_one_and_has_its_limit() {
    let (home, fleet) = (Home::new(), Fleet::that_compresses().await);
    let mut stage = Stage::again(fleet, home).await;
    let output = json!({ "text": "x".repeat(900 << 10) });
    stage.fleet.run("large", Run::output(&output));
    stage.fleet.run("bomb", Run::large_output(BOMB));
    stage.register_all(&["small", "large"]).await;
    stage.register("bomb", |it| it.timeout = ms(60_000)).await;
    let (_, before) = stage.service.memory();
    let cycle = stage.client.run().await.unwrap();
    let part = |name: &str| cycle.subsystems.iter().find(|part| part.name == name).unwrap();
    assert_eq!([part("small").state(), part("large").state()], [pb::SubsystemState::Succeeded; 2], "{}", cycle.error);
    assert_eq!(part("bomb").error_code, "RESOURCE_EXHAUSTED");
    let message = &part("bomb").error_message;
    assert!(message.contains("more than 4194304 bytes when decompressed"), "{message}");
    let (_, most) = stage.service.memory();
    assert!(most - before < LITTLE, "{} MiB more", (most - before) >> 20);
    let get = pb::GetSubsystemRequest { name: "large".into(), include_output: true, ..Default::default() };
    let large = stage.client.get_subsystem(get).await.unwrap().into_inner().subsystem.unwrap();
    assert_eq!(large.output, to_struct(&output));
}

#[tokio::test]
async fn a_subsystem_in_rust_accepts_compressed_requests() {
    let echo = |cycle: Cycle| async move {
        let mut answer = Answer::default();
        answer.output("inputs", cycle.inputs.len());
        Ok::<_, Failure>(answer)
    };
    let serving = Server::new().subsystem("a", echo).listen("127.0.0.1:0").await.unwrap();
    let channel = Endpoint::from_shared(serving.endpoint().to_owned()).unwrap().connect().await.unwrap();
    let mut client = SubsystemClient::new(channel).send_compressed(CompressionEncoding::Gzip);
    let inputs = [("b".to_owned(), subsystem::Input::default())].into();
    let request = subsystem::RunCycleRequest { subsystem: "a".into(), cycle_id: 1, inputs, ..Default::default() };
    let answer = client.run_cycle(request).await.unwrap().into_inner();
    assert_eq!(answer.output, to_struct(&json!({ "inputs": 1 })));
}

/// Needs the packages of `tests/python/requirements.txt`.
#[tokio::test]
#[ignore = "needs Python packages; .ci/run installs them"]
async fn grpc_for_python_compresses_in_both_directions() {
    let mut stage = Stage::new().await;
    let python = Running::python("compressed.py", stage.service.address()).await;
    let endpoint = python.endpoint();
    // It has registered itself by a compressed request.
    assert_eq!(stage.client.subsystem("python").await.unwrap().registration.unwrap().endpoint, endpoint);
    stage.client.register(registration("again", &endpoint)).await.unwrap();
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), pb::CycleState::Succeeded, "{}", cycle.error);
    python.kill().await;
}
