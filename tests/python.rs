//! The example in Python, made from the contract alone, against the real service.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{env, path::Path, process::Stdio};

use common::{
    fleet::{Fleet, Run, from_struct, to_struct},
    patiently,
    service::{Home, decode, registration},
};
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState, SubsystemState};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// The example as a process. It is killed when it is dropped.
struct Example {
    process: Child,
    address: String,
}

fn python() -> Command {
    let mut command = Command::new(env::var_os("ORCHESTRATOR_TEST_PYTHON").unwrap_or_else(|| "python3".into()));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn generate(into: &Path) {
    let flag = |name: &str| format!("--{name}={}", into.display());
    let mut protoc = python();
    protoc.args(["-m", "grpc_tools.protoc", "-Iproto", &flag("python_out"), &flag("grpc_python_out")]);
    let status = protoc.arg("dreamnet/subsystem/v1/subsystem.proto").status().await.unwrap();
    assert!(status.success(), "grpcio-tools could not generate code; name an interpreter that has them");
}

impl Example {
    async fn start(generated: &Path, listen: &str) -> Self {
        let mut process = python()
            .args(["examples/python/subsystem.py", "--listen", listen])
            .env("PYTHONPATH", generated)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let line = patiently("the example to listen", lines.next_line()).await.unwrap().unwrap();
        let address = line.strip_prefix("listening on ").unwrap().to_owned();
        Self { process, address }
    }
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools; .ci/run runs it"]
async fn a_subsystem_in_python_takes_part() {
    let generated = tempfile::tempdir().unwrap();
    generate(generated.path()).await;
    let mut example = Example::start(generated.path(), "127.0.0.1:0").await;
    let fleet = Fleet::start().await;
    let home = Home::new();
    let service = home.serve().await;
    let mut client = service.client().await;

    client.register(registration("sensor", fleet.endpoint())).await.unwrap();
    let average = pb::Registration {
        requires: vec!["sensor".into()],
        reads: vec!["nobody".into()],
        parameters: to_struct(&json!({ "window": 2 })),
        record_output: true,
        ..registration("average", &format!("http://{}", example.address))
    };
    client.register(average).await.unwrap();

    // The parameters of `Initialize`, the FRESH input, the ABSENT one, output, metrics and issues.
    for (value, average, values) in [(10, 10, 1), (20, 15, 2), (30, 25, 2)] {
        fleet.run("sensor", Run::output(&json!({ "value": value })));
        let cycle = client.run().await.unwrap();
        assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
        let part = cycle.subsystems.iter().find(|part| part.name == "average").unwrap();
        assert_eq!(from_struct(&part.output), json!({ "average": average, "values": values }));
        assert_eq!(part.metrics, [("values".to_owned(), f64::from(values))].into());
        let issues: Vec<_> = part.issues.iter().map(|issue| (issue.code.as_str(), issue.message.as_str())).collect();
        assert_eq!(issues, [("NO_VALUE", "nobody gave no value")]);
        assert_eq!(part.attempts, 1);
    }

    let request = pb::GetSubsystemRequest { name: "average".into(), include_output: true, include_snapshot: true };
    let status = client.get_subsystem(request).await.unwrap().into_inner().subsystem.unwrap();
    assert!(status.initialized);
    assert_eq!(from_struct(&status.snapshot), json!({ "values": [20, 30] }));
    assert_eq!(from_struct(&status.output), json!({ "average": 25, "values": 2 }));

    // It dies, and its part fails; it comes back without its memory, and asks for initialization in the middle of
    // the cycle.
    let address = example.address.clone();
    example.process.kill().await.unwrap();
    let cycle = client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Degraded, "{cycle:?}");
    let example = Example::start(generated.path(), &address).await;
    assert_eq!(example.address, address);
    let cycle = client.run().await.unwrap();
    let part = cycle.subsystems.iter().find(|part| part.name == "average").unwrap();
    assert_eq!(part.state(), SubsystemState::Succeeded, "{part:?}");
    assert_eq!((part.attempts, from_struct(&part.output)), (2, json!({ "average": 30, "values": 1 })));
    let last = client.history().await.unwrap().pop().unwrap();
    assert_eq!(decode(last), cycle);
}
