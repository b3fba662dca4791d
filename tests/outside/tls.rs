//! Subsystems behind TLS: `https` endpoints and `dial.ca_file`.

use std::fs;

use crate::common::{
    Stage,
    fleet::Fleet,
    service::{Home, part, registration},
};
use orchestrator_core::proto::orchestrator::v1::{CycleState, SubsystemState};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tonic::transport::Identity;

/// A fleet that shows a certificate for this host, and the certificate.
async fn fleet_for(host: &str) -> (Fleet, String) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([host.to_owned()]).unwrap();
    let fleet = Fleet::behind_tls(Identity::from_pem(cert.pem(), signing_key.serialize_pem())).await;
    (fleet, cert.pem())
}

#[tokio::test]
async fn a_peer_with_a_trusted_certificate_for_its_host_is_called() {
    let (trusted, certificate) = fleet_for("127.0.0.1").await;
    let (elsewhere, for_another_host) = fleet_for("elsewhere.example").await;
    let (stranger, _) = fleet_for("127.0.0.1").await;
    let home = Home::new();
    let ca = home.path("ca.pem");
    fs::write(&ca, certificate + &for_another_host).unwrap();
    let mut stage = Stage::at(home.with_args(["--set".to_owned(), format!("dial.ca_file={}", ca.display())])).await;
    let plain = trusted.endpoint().replace("https", "http");
    let without_tls = Fleet::start().await;
    let no_tls = without_tls.endpoint().replace("http", "https");
    for (name, endpoint) in [
        ("trusted", trusted.endpoint()),
        ("elsewhere", elsewhere.endpoint()),
        ("stranger", stranger.endpoint()),
        ("plain", &plain),
        ("no_tls", &no_tls),
    ] {
        stage.client.register(registration(name, endpoint)).await.unwrap();
    }
    stage.register_all(&["without"]).await;

    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Degraded);
    for name in ["trusted", "without"] {
        assert_eq!(part(&cycle, name).state(), SubsystemState::Succeeded, "{cycle:?}");
    }
    assert_eq!(part(&cycle, "plain").state(), SubsystemState::Failed);
    for (name, why) in [
        ("elsewhere", "not valid for name"),
        ("stranger", "invalid peer certificate"),
        ("no_tls", "it does not speak TLS, so give http://"),
    ] {
        let part = part(&cycle, name);
        assert_eq!((part.state(), part.error_code.as_str()), (SubsystemState::Failed, "UNAVAILABLE"), "{part:?}");
        assert!(part.error_message.contains(why), "{part:?}");
    }
    assert!(elsewhere.calls().is_empty() && stranger.calls().is_empty());
}

#[tokio::test]
async fn invalid_certificate_files_prevent_the_start() {
    let home = Home::new();
    let ca = home.path("ca.pem");
    let home = home.with_args(["--set".to_owned(), format!("dial.ca_file={}", ca.display())]);
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    assert!(home.log().contains("ca.pem can't be read: No such file"), "{}", home.log());
    let pem = |what| format!("-----BEGIN CERTIFICATE-----\n{what}\n-----END CERTIFICATE-----\n");
    for none in ["", "no certificate", &pem("?"), &pem("bm8gY2VydGlmaWNhdGU=")] {
        fs::write(&ca, none).unwrap();
        assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2), "{none}");
        assert!(home.log().contains("ca.pem contains no certificate; give PEM"), "{}", home.log());
    }
}

#[tokio::test]
async fn a_certificate_file_with_the_format_of_windows_editors_is_accepted() {
    let (fleet, certificate) = fleet_for("127.0.0.1").await;
    let home = Home::new();
    let ca = home.path("ca.pem");
    fs::write(&ca, format!("\u{feff}{}", certificate.replace('\n', "\r\n"))).unwrap();
    let mut stage = Stage::at(home.with_args(["--set".to_owned(), format!("dial.ca_file={}", ca.display())])).await;
    stage.client.register(registration("a", fleet.endpoint())).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn without_system_certificates_the_file_is_enough() {
    let (fleet, certificate) = fleet_for("127.0.0.1").await;
    let home = Home::new();
    let (ca, nothing) = (home.path("ca.pem"), home.path("nothing"));
    fs::write(&ca, certificate).unwrap();
    fs::create_dir(&nothing).unwrap();
    let nothing = nothing.display();
    let home = home
        .with_wrapper(["env".to_owned(), format!("SSL_CERT_DIR={nothing}"), format!("SSL_CERT_FILE={nothing}/none")])
        .with_args(["--set".to_owned(), format!("dial.ca_file={}", ca.display())]);
    let mut stage = Stage::at(home).await;
    stage.client.register(registration("a", fleet.endpoint())).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}
