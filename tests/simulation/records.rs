//! The service over a network without faults: its clock and its seed decide each byte of a record.

use std::{future::pending, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use orchestrator_core::{
    config::Config,
    host::Host,
    model::Begin,
    proto::orchestrator::v1::{CycleState, CycleTelemetry, RunCycleRequest, orchestrator_client::OrchestratorClient},
    serve::{Exit, Service},
    subsystem::{Answer, Code, Cycle, Failure, Server},
};
use prost::Message;
use tokio::{sync::oneshot, time::sleep};
use tonic::transport::Endpoint;
use tower::service_fn;

use crate::{chance::Chance, network::Network};

/// Fails twice in each cycle, so that the record holds the jitter of two retries.
async fn flaky(cycle: Cycle) -> Result<Answer, Failure> {
    sleep(Duration::from_millis(20)).await;
    if cycle.attempt < 3 {
        return Err(Failure::new(Code::Unavailable, "not yet"));
    }
    let mut answer = Answer::default();
    answer.output("attempt", cycle.attempt);
    Ok(answer)
}

/// The records of two cycles, as a client of the service receives them.
async fn records(seed: u64) -> [Bytes; 2] {
    let network = Network::new(Chance::new(0));
    let fleet = Server::new().subsystem("flaky", flaky).subsystem("calm", |_| async { Ok(Answer::default()) });
    let fleet = fleet.listen_over(&network.host("fleet"), ([127, 0, 0, 1], 2).into()).await.unwrap();
    let config = r#"
        server.listen = "127.0.0.1:1"
        admin.listen = "off"
        store.url = "memory:"
        memory.max_bytes = 268435456

        [[subsystems]]
        name = "flaky"
        endpoint = "http://fleet:2"
        retry = { max_attempts = 3, initial_backoff = "100ms", max_backoff = "1s" }

        [[subsystems]]
        name = "calm"
        endpoint = "http://fleet:2"
        after = ["flaky"]
    "#;
    let config = Config::from_toml_str("simulated.toml", config).unwrap();
    let host = Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), seed);
    let transport = Arc::new(network.host("orchestrator"));
    let service = Service::start(&config, Begin::Again, host, transport).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(service.run(async { drop(stopped.await) }, async || pending().await));

    // Listeners are reached a moment later.
    sleep(Duration::from_millis(1)).await;
    let client = network.host("client");
    let connect = service_fn(move |_| {
        let client = client.clone();
        async move { client.connect_to("orchestrator", 1).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://orchestrator:1").connect_with_connector(connect).await.unwrap();
    let mut client = OrchestratorClient::new(channel);
    let mut records = Vec::new();
    for _ in 0..2 {
        records.push(client.run_cycle(RunCycleRequest::default()).await.unwrap().into_inner().telemetry);
    }
    drop(client);
    drop(stop);
    assert_eq!(running.await.unwrap(), Exit::Drained);
    fleet.stop(Duration::from_secs(1)).await;
    records.try_into().unwrap()
}

#[tokio::test(start_paused = true)]
async fn records_are_the_same_bytes_for_the_same_clock_and_seed() {
    let first = records(7).await;
    for record in &first {
        let record = CycleTelemetry::decode(record.clone()).unwrap();
        assert_eq!(record.state(), CycleState::Succeeded, "{record:?}");
        assert_eq!(record.subsystems[0].attempts, 3);
    }
    assert_eq!(records(7).await, first);
    // The seed reaches the record.
    assert_ne!(records(8).await, first);
}
