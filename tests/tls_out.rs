//! TLS to subsystems: the certificate that the service shows, whom it accepts as a server, and where it connects.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{fs, path::Path};

use common::{
    Stage,
    fleet::{Fleet, Run},
    patiently,
    pki::{Authority, Issued},
    service::{Client, Home, part, registration},
};
use orchestrator_core::proto::orchestrator::v1::{CycleState, CycleTelemetry, RunCycleRequest, SubsystemState};
use rustix::process::Signal;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tonic::transport::{Certificate, ServerTlsConfig};

// ---------------------------------------------------------------------------------------------------------------
// The kit

/// These settings, as arguments of the service.
fn settings(settings: &[(&str, &Path)]) -> Vec<String> {
    settings.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={}", value.display())]).collect()
}

/// A fleet whose clients must show a certificate of this authority.
async fn demanding(authority: &Authority) -> Fleet {
    let ca = Certificate::from_pem(&authority.certificate);
    Fleet::behind_tls_with(ServerTlsConfig::new().identity(authority.service().identity()).client_ca_root(ca)).await
}

fn der(issued: &Issued) -> Vec<u8> {
    CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap().to_vec()
}

/// The certificate that the service showed in the last run of a subsystem.
fn last_shown(fleet: &Fleet, name: &str) -> Option<Vec<u8>> {
    fleet.runs(name).last().unwrap().certificate.clone()
}

/// Runs a cycle of one subsystem.
async fn run_of(client: &mut Client, name: &str) -> CycleTelemetry {
    let request = RunCycleRequest { subsystems: vec![name.to_owned()], ..RunCycleRequest::default() };
    client.run_with(request).await.unwrap()
}

/// How often the log of a service has this text.
fn times(home: &Home, text: &str) -> usize {
    fs::read_to_string(home.path("log")).unwrap().matches(text).count()
}

/// Waits until the log of a service has this text this number of times.
async fn logged(home: &Home, text: &str, count: usize) {
    let logged = async {
        while times(home, text) < count {
            tokio::task::yield_now().await;
        }
    };
    patiently(text, logged).await;
}

const READ_AGAIN: &str = "the files of TLS to subsystems were read again";
const KEPT: &str = "the files of TLS can't be used: the earlier ones stay in use";

// ---------------------------------------------------------------------------------------------------------------
// The certificate of the service

#[tokio::test]
async fn a_subsystem_that_demands_a_certificate_sees_the_new_one_in_the_cycle_after_its_renewal() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let fleet = demanding(&authority).await;
    let first = authority.client("spiffe://fleet/orchestrator");
    let (cert_file, key_file) = first.write(&home.path(""), "own");
    let ca_file = authority.write(home.path("ca.pem"));
    let args = settings(&[("dial.ca_file", &ca_file), ("dial.cert_file", &cert_file), ("dial.key_file", &key_file)]);
    let mut stage = Stage::at(home.with_args(args)).await;
    stage.client.register(registration("held", fleet.endpoint())).await.unwrap();
    stage.client.register(registration("other", fleet.endpoint())).await.unwrap();
    fleet.run("held", Run::Hold);
    let mut client = stage.client.clone();
    let running = tokio::spawn(async move { run_of(&mut client, "held").await });
    fleet.until_run("held", 1).await;
    assert_eq!(last_shown(&fleet, "held"), Some(der(&first)));

    let second = authority.client("spiffe://fleet/orchestrator");
    second.write(&stage.home.path(""), "own");
    logged(&stage.home, READ_AGAIN, 1).await;
    let cycle = run_of(&mut stage.client, "other").await;
    assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
    assert_eq!(last_shown(&fleet, "other"), Some(der(&second)));

    // The call on the earlier connection was not cut off.
    fleet.run("held", Run::Echo);
    assert_eq!(running.await.unwrap().state(), CycleState::Succeeded);
    fleet.until("the earlier connection to end", |state| state.connections == 1).await;

    // A key of another certificate changes nothing, nor do files that have not changed.
    let third = authority.client("spiffe://fleet/orchestrator");
    let kept = times(&stage.home, KEPT);
    fs::write(&key_file, &third.key).unwrap();
    logged(&stage.home, KEPT, kept + 1).await;
    logged(&stage.home, "is not the key of the certificate in dial.cert_file", 1).await;
    second.write(&stage.home.path(""), "own");
    stage.service.signal(Signal::HUP);
    logged(&stage.home, "reloaded", 1).await;
    run_of(&mut stage.client, "other").await;
    assert_eq!(last_shown(&fleet, "other"), Some(der(&second)));
    assert_eq!(fleet.now(|state| state.connections), 1);
}

#[tokio::test]
async fn the_certificate_of_the_server_is_shown_to_subsystems_that_ask_for_one() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let fleet = demanding(&authority).await;
    let own = authority.service();
    let (cert_file, key_file) = own.write(&home.path(""), "own");
    let ca_file = authority.write(home.path("ca.pem"));
    let args = settings(&[
        ("dial.ca_file", &ca_file),
        ("server.tls.cert_file", &cert_file),
        ("server.tls.key_file", &key_file),
    ]);
    let home = home.with_args(args);
    let service = home.serve().await;
    let mut client = service.client_with(authority.trusted()).await.unwrap();
    client.register(registration("a", fleet.endpoint())).await.unwrap();
    let cycle = client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
    assert_eq!(last_shown(&fleet, "a"), Some(der(&own)));
}

#[tokio::test]
async fn authorities_of_subsystems_are_read_again_when_their_file_changes() {
    let (home, old, new) = (Home::new(), Authority::new("old"), Authority::new("new"));
    let fleet = Fleet::behind_tls(new.service().identity()).await;
    let ca_file = old.write(home.path("ca.pem"));
    let mut stage = Stage::at(home.with_args(settings(&[("dial.ca_file", &ca_file)]))).await;
    stage.client.register(registration("a", fleet.endpoint())).await.unwrap();
    let cycle = stage.client.run().await.unwrap();
    let a = part(&cycle, "a");
    assert_eq!(a.state(), SubsystemState::Failed);
    assert!(a.error_message.contains("invalid peer certificate"), "{a:?}");

    fs::write(&ca_file, "nonsense").unwrap();
    logged(&stage.home, KEPT, 1).await;
    new.write(ca_file);
    logged(&stage.home, READ_AGAIN, 1).await;
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn a_certificate_without_its_key_prevents_the_start() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let (cert_file, _) = authority.client("spiffe://fleet/orchestrator").write(&home.path(""), "own");
    let home = home.with_args(settings(&[("dial.cert_file", &cert_file)]));
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    assert!(home.log().contains("dial.cert_file needs dial.key_file as well"), "{}", home.log());
}
