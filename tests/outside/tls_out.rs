//! TLS to subsystems: the certificate that the service shows, whom it accepts as a server, and where it connects.

use std::{fs, future::pending, os::unix::fs::symlink, path::Path, process::Stdio, sync::Arc};

use crate::common::{
    Stage,
    fleet::{Fleet, Run},
    patiently,
    pki::{Authority, Issued},
    service::{Client, Home, Service, part, registration},
};
use orchestrator_core::{
    access::key_of,
    config::Config,
    host::Host,
    model::Begin,
    proto::orchestrator::v1::{CycleState, CycleTelemetry, Registration, RunCycleRequest, SubsystemState, Tls},
    serve,
    transport::Sockets,
};
use rcgen::{CertificateParams, CustomExtension, SanType, date_time_ymd};
use rustix::process::Signal;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{net::TcpListener, process::Command};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Code,
    transport::{Certificate, Endpoint, ServerTlsConfig},
};
use tonic_types::StatusExt;

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
    stage.home.logged(READ_AGAIN, 1).await;
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
    stage.home.logged(KEPT, kept + 1).await;
    stage.home.logged("is not the key of the certificate in dial.cert_file", 1).await;
    second.write(&stage.home.path(""), "own");
    stage.service.signal(Signal::HUP);
    stage.home.logged("reloaded", 1).await;
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
    stage.home.logged(KEPT, 1).await;
    new.write(ca_file);
    stage.home.logged(READ_AGAIN, 1).await;
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn a_server_is_not_called_on_an_open_connection_once_its_authority_is_not_trusted_any_more() {
    let (home, old, new) = (Home::new(), Authority::new("old"), Authority::new("new"));
    let fleet = Fleet::behind_tls(old.service().identity()).await;
    let ca_file = old.write(home.path("ca.pem"));
    let mut stage = Stage::at(home.with_args(settings(&[("dial.ca_file", &ca_file)]))).await;
    stage.client.register(registration("a", fleet.endpoint())).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    new.write(ca_file);
    stage.home.logged(READ_AGAIN, 1).await;
    fleet.clear_calls();
    let cycle = stage.client.run().await.unwrap();
    let a = part(&cycle, "a");
    assert!(a.state() == SubsystemState::Failed && a.error_message.contains("UnknownIssuer"), "{a:?}");
    assert!(fleet.calls().is_empty());
}

#[tokio::test]
async fn a_server_is_not_called_on_an_open_connection_once_a_certificate_of_it_has_expired() {
    let (home, root) = (Home::new(), Authority::new("root"));
    let ca_file = root.write(home.path("ca.pem"));
    let (one, two) = (date_time_ymd(2026, 2, 1), date_time_ymd(2026, 3, 1));
    // Its own expires first, or else that of the authority between both.
    let between = root.below("between", |it| it.not_after = one);
    let own = root.service_with(|it| it.not_after = one);
    let mut below = between.service_with(|it| it.not_after = two);
    below.certificate += &between.certificate;
    for issued in [own, below] {
        let fleet = Fleet::behind_tls(issued.identity()).await;
        let config = format!(
            "server.listen = \"127.0.0.1:0\"\nadmin.listen = \"off\"\nstore.url = \"memory:\"\n[dial]\nca_file = \
             {ca_file:?}\n[[subsystems]]\nname = \"a\"\nendpoint = {:?}\n",
            fleet.endpoint()
        );
        let config = Config::from_toml_str("orchestrator.toml", &config).unwrap();
        let host = Host::simulated("2026-01-31T00:00:00Z".parse().unwrap(), 7);
        let clock = host.clock;
        let service = serve::Service::start(&config, Begin::Again, host, Arc::new(Sockets::default())).await;
        let service = service.unwrap();
        let address = format!("http://{}", service.address());
        let _running = AbortOnDropHandle::new(tokio::spawn(service.run(pending(), async || pending().await)));
        let mut client = Client::new(Endpoint::from_shared(address).unwrap().connect().await.unwrap());

        assert_eq!(client.run().await.unwrap().state(), CycleState::Succeeded);
        assert_eq!(fleet.runs("a").len(), 1);
        clock.set("2026-02-02T00:00:00Z".parse().unwrap());
        let cycle = client.run().await.unwrap();
        let a = part(&cycle, "a");
        assert!(a.state() == SubsystemState::Failed && a.error_message.contains("certificate expired"), "{a:?}");
        assert_eq!(fleet.runs("a").len(), 1);
        // A server that is valid again is called again.
        clock.set("2026-01-31T00:00:00Z".parse().unwrap());
        assert_eq!(client.run().await.unwrap().state(), CycleState::Succeeded);
    }
}

#[tokio::test]
async fn an_unusual_certificate_of_a_server_fails_its_subsystem_with_the_reason() {
    let (home, root) = (Home::new(), Authority::new("root"));
    let ca_file = root.write(home.path("ca.pem"));
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        change(&mut params);
        root.issue(&params)
    };
    let uri = |uri: &str| SanType::URI(uri.try_into().unwrap());
    let several = with(&|it| it.subject_alt_names = vec![uri("spiffe://fleet/a"), uri("spiffe://fleet/b")]);
    let none = with(&|_| {});
    let mut large = with(&|it| {
        it.subject_alt_names = vec![uri("spiffe://fleet/a")];
        it.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 1], vec![0; 60 << 10])];
    });
    // With a further one, the message of the handshake has more than 64 KiB. The server here reads no certificate that
    // has more by itself.
    large.certificate = large.certificate.repeat(2);
    let below = |authorities: &[&Authority]| {
        let mut issued = authorities[0].client("spiffe://fleet/a");
        issued.certificate.extend(authorities.iter().map(|it| it.certificate.as_str()));
        issued
    };
    let expired = below(&[&root.below("expired", |it| it.not_after = date_time_ymd(2020, 1, 1))]);
    let chain = (0..10).fold(vec![root.below("0", |_| {})], |mut chain, n| {
        chain.insert(0, chain[0].below(&format!("{}", n + 1), |_| {}));
        chain
    });
    let long = below(&chain.iter().collect::<Vec<_>>());
    let mut stage = Stage::at(home.with_args(settings(&[("dial.ca_file", &ca_file)]))).await;
    let mut fleets = Vec::new();
    for (name, issued, why) in [
        ("several", several, "a certificate that has 2 URI names and 0 DNS names as alternative names"),
        ("none", none, "a certificate that has 0 URI names and 0 DNS names as alternative names"),
        ("expired", expired, "certificate expired"),
        ("long", long, "MaximumPathDepthExceeded"),
        ("large", large, "HandshakePayloadTooLarge"),
    ] {
        let fleet = Fleet::behind_tls(issued.identity()).await;
        stage.client.register(answered_by(name, fleet.endpoint(), "cert:spiffe://fleet/a")).await.unwrap();
        fleets.push((name, fleet, why));
    }
    let cycle = patiently("the cycle", stage.client.run()).await.unwrap();
    for (name, fleet, why) in &fleets {
        let part = part(&cycle, name);
        assert_eq!((part.state(), part.error_code.as_str()), (SubsystemState::Failed, "UNAVAILABLE"), "{part:?}");
        assert!(part.error_message.contains(why), "{part:?}");
        assert!(fleet.calls().is_empty(), "{name}");
    }
}

#[tokio::test]
async fn a_certificate_without_its_key_prevents_the_start() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let (cert_file, _) = authority.client("spiffe://fleet/orchestrator").write(&home.path(""), "own");
    let home = home.with_args(settings(&[("dial.cert_file", &cert_file)]));
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    assert!(home.log().contains("dial.cert_file needs dial.key_file as well"), "{}", home.log());
}

#[tokio::test]
async fn a_server_that_leaves_after_the_handshake_may_have_refused_the_certificate() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let ca_file = authority.write(home.path("ca.pem"));
    let Issued { certificate, key } = authority.service();
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let _server = AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            drop(acceptor.accept(stream).await);
        }
    }));
    let mut stage = Stage::at(home.with_args(settings(&[("dial.ca_file", &ca_file)]))).await;
    stage.client.register(registration("a", &endpoint)).await.unwrap();
    let cycle = stage.client.run().await.unwrap();
    let a = part(&cycle, "a");
    assert_eq!((a.state(), a.error_code.as_str()), (SubsystemState::Failed, "UNAVAILABLE"), "{a:?}");
    assert!(a.error_message.contains("it may accept only another certificate"), "{a:?}");
}

// ---------------------------------------------------------------------------------------------------------------
// Who must answer

/// A registration whose server must have this identity.
fn answered_by(name: &str, endpoint: &str, peer: &str) -> Registration {
    Registration { tls: Some(Tls { peer: peer.to_owned() }), ..registration(name, endpoint) }
}

#[tokio::test]
async fn a_server_with_the_certificate_of_another_sees_no_call() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let fleet = Fleet::behind_tls(authority.client("spiffe://fleet/b").identity()).await;
    let ca_file = authority.write(home.path("ca.pem"));
    let mut stage = Stage::at(home.with_args(settings(&[("dial.ca_file", &ca_file)]))).await;
    let endpoint = fleet.endpoint();
    for registration in [
        answered_by("a", endpoint, "cert:spiffe://fleet/a"),
        answered_by("b", endpoint, "cert:spiffe://fleet/b"),
        answered_by("c", endpoint, "cert:b.example"),
        // It must have a certificate for its host.
        registration("d", endpoint),
    ] {
        stage.client.register(registration).await.unwrap();
    }
    let cycle = stage.client.run().await.unwrap();
    for (name, why) in [
        ("a", "a server with the certificate of cert:spiffe://fleet/b answers, but cert:spiffe://fleet/a must"),
        ("c", "a server with the certificate of cert:spiffe://fleet/b answers, but cert:b.example must"),
        ("d", "not valid for name"),
    ] {
        let part = part(&cycle, name);
        assert_eq!((part.state(), part.error_code.as_str()), (SubsystemState::Failed, "UNAVAILABLE"), "{part:?}");
        assert!(part.error_message.contains(why), "{part:?}");
    }
    // The name of its host does not count.
    assert_eq!(part(&cycle, "b").state(), SubsystemState::Succeeded, "{cycle:?}");
    assert!(fleet.calls().iter().all(|call| call.subsystem == "b"), "{:?}", fleet.calls());
    assert_eq!(fleet.now(|state| state.connections), 1);
    let shown = stage.client.subsystem("b").await.unwrap();
    assert_eq!(shown.registration.unwrap().tls.unwrap().peer, "cert:spiffe://fleet/b");
}

#[tokio::test]
async fn a_server_may_be_expected_by_one_of_its_dns_names() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let names = ["a.example".to_owned(), "b.example".to_owned()];
    let issued = authority.issue(&CertificateParams::new(names).unwrap());
    let fleet = Fleet::behind_tls(issued.identity()).await;
    let ca_file = authority.write(home.path("ca.pem"));
    let mut stage = Stage::at(home.with_args(settings(&[("dial.ca_file", &ca_file)]))).await;
    for name in ["a", "b", "c"] {
        let registration = answered_by(name, fleet.endpoint(), &format!("cert:{name}.example"));
        stage.client.register(registration).await.unwrap();
    }
    let cycle = stage.client.run().await.unwrap();
    let states = ["a", "b", "c"].map(|name| part(&cycle, name).state());
    assert_eq!(states, [SubsystemState::Succeeded, SubsystemState::Succeeded, SubsystemState::Failed], "{cycle:?}");
}

#[tokio::test]
async fn a_revoked_server_is_not_called_any_more_even_on_an_open_connection() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let issued = authority.client("spiffe://fleet/a");
    let fleet = Fleet::behind_tls(issued.identity()).await;
    let ca_file = authority.write(home.path("ca.pem"));
    let config = |revoked: &str| format!("[dial]\nca_file = {ca_file:?}\n[access]\nrevoked = [{revoked}]\n");
    let mut stage = Stage::at(home.with_config(&config(""))).await;
    stage.client.register(answered_by("a", fleet.endpoint(), "cert:spiffe://fleet/a")).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);

    let key = key_of(&der(&issued)).unwrap().to_string();
    for (reloads, revoked) in [(1, "cert:spiffe://fleet/a"), (2, key.as_str())] {
        fs::write(stage.home.path("orchestrator.toml"), config(&format!("{revoked:?}"))).unwrap();
        stage.home.logged("reloaded", reloads).await;
        fleet.clear_calls();
        let cycle = stage.client.run().await.unwrap();
        let a = part(&cycle, "a");
        assert!(a.state() == SubsystemState::Failed && a.error_message.contains("access.revoked has"), "{a:?}");
        assert!(fleet.calls().is_empty());
    }
}

#[tokio::test]
async fn a_socket_may_be_expected_to_be_that_of_a_user() {
    let home = Home::new();
    let fleet = Fleet::at_socket(&home.path("fleet.sock"));
    let mut stage = Stage::at(home).await;
    let own = rustix::process::geteuid().as_raw();
    for (name, uid) in [("own", own), ("other", own + 1)] {
        stage.client.register(answered_by(name, fleet.endpoint(), &format!("uid:{uid}"))).await.unwrap();
    }
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(part(&cycle, "own").state(), SubsystemState::Succeeded, "{cycle:?}");
    let other = part(&cycle, "other");
    let why = format!("a server of uid:{own} answers, but uid:{} must", own + 1);
    assert!(other.state() == SubsystemState::Failed && other.error_message.contains(&why), "{other:?}");
    assert!(fleet.runs("other").is_empty());
}

#[tokio::test]
async fn an_expected_server_is_refused_where_the_endpoint_can_not_prove_it() {
    let mut stage = Stage::new().await;
    for (endpoint, peer) in [("http://127.0.0.1:1", "cert:a"), ("https://a:1", "uid:1"), ("https://a:1", "a")] {
        let refused = stage.client.register(answered_by("a", endpoint, peer)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let fields = refused.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields[0].field, "registration.tls.peer", "{refused:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Where the service connects

/// The orchestrator's own command line at the socket of a service, where its user is an administrator.
struct Own(String);

impl Own {
    /// Returns its exit code and all that it printed.
    async fn run(&self, args: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
        command.args(args).args(["--address", &self.0]).stdin(Stdio::null()).kill_on_drop(true);
        let output = patiently("the command", command.output()).await.unwrap();
        let text = [output.stdout, output.stderr].map(|it| String::from_utf8_lossy(&it).into_owned()).concat();
        (output.status.code().unwrap_or(-1), text)
    }

    async fn register(&self, name: &str, endpoint: &str) -> (i32, String) {
        self.run(&["subsystems", "register", name, "--endpoint", endpoint]).await
    }
}

/// A service that enforces access, with these further settings.
async fn enforcing(home: Home, further: &[&str]) -> (Home, Service, Own) {
    let socket = home.path("own.sock");
    let mut args = settings(&[("server.listen_unix", &socket), ("access.mode", Path::new("enforce"))]);
    args.extend(further.iter().flat_map(|it| ["--set".to_owned(), (*it).to_owned()]));
    let home = home.with_args(args);
    let service = home.serve().await;
    (home, service, Own(format!("unix:{}", socket.display())))
}

#[tokio::test]
async fn link_local_addresses_are_refused_when_they_are_registered_and_when_a_name_has_them() {
    let (_home, _service, own) = enforcing(Home::new(), &[]).await;
    for host in ["169.254.169.254", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "0.0.0.0", "[fe80::1]"] {
        let (code, text) = own.register("metadata", &format!("https://{host}:80")).await;
        assert!(code == 2 && text.contains("registration.endpoint"), "{host}: {code} {text}");
        assert!(text.contains("link-local or unspecified, which access.mode = \"enforce\" refuses"), "{text}");
    }
    // The system's resolver knows this name: it is the address as one number.
    let (code, text) = own.register("metadata", "https://2852039166:80").await;
    assert_eq!(code, 0, "{text}");
    let (_, text) = own.run(&["run"]).await;
    assert!(text.contains("can't connect to 2852039166, where 169.254.169.254 is link-local"), "{text}");
}

#[tokio::test]
async fn enforced_access_needs_tls_to_other_machines_and_a_directory_of_sockets() {
    let (home, outside) = (Home::new(), Home::new());
    let sockets = home.path("sockets");
    fs::create_dir(&sockets).unwrap();
    let (inside, other) = (Fleet::at_socket(&sockets.join("a.sock")), Fleet::at_socket(&outside.path("b.sock")));
    symlink(outside.path("b.sock"), sockets.join("link.sock")).unwrap();
    let unix_dir = format!("dial.unix_dir={}", sockets.display());
    let (_home, _service, own) = enforcing(home, &[&unix_dir]).await;
    for (endpoint, why) in [
        ("http://192.0.2.1:80", "access.mode = \"enforce\" needs https://, or dial.allow_http = true"),
        (other.endpoint(), "not in dial.unix_dir"),
    ] {
        let (code, text) = own.register("a", endpoint).await;
        assert!(code == 2 && text.contains("registration.endpoint") && text.contains(why), "{code} {text}");
    }
    assert_eq!(own.register("inside", inside.endpoint()).await.0, 0);
    let link = format!("unix:{}", sockets.join("link.sock").display());
    assert_eq!(own.register("link", &link).await.0, 0);
    let (_, text) = own.run(&["run"]).await;
    assert!(text.contains("is a link that leads out of"), "{text}");
    assert_eq!((inside.runs("inside").len(), other.calls().len()), (1, 0), "{text}");

    let (_home, _service, own) = enforcing(Home::new(), &["dial.allow_http=true"]).await;
    assert_eq!(own.register("a", "http://192.0.2.1:80").await.0, 0);
    let (code, text) = own.register("a", inside.endpoint()).await;
    assert!(code == 2 && text.contains("refuses without dial.unix_dir"), "{code} {text}");
}

#[tokio::test]
async fn only_allowed_hosts_are_connected_to() {
    let home = Home::new().with_config("[dial]\nallow = [\"10.0.0.0/8\", \"*.example.org\"]\n");
    let mut stage = Stage::at(home).await;
    let refused = stage.client.register(stage.registration("literal")).await.unwrap_err();
    let fields = refused.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "registration.endpoint");
    assert!(fields[0].description.ends_with("where 127.0.0.1 is not in dial.allow"), "{fields:?}");
    // The address of a name is known when it is dialed.
    let by_name = stage.fleet.endpoint().replace("127.0.0.1", "localhost");
    stage.client.register(registration("named", &by_name)).await.unwrap();
    let cycle = stage.client.run().await.unwrap();
    let named = part(&cycle, "named");
    assert!(named.error_message.contains("can't connect to localhost, where"), "{named:?}");
    assert_eq!(stage.fleet.now(|state| (state.connections, state.calls.len())), (0, 0));

    let mut stage = Stage::at(Home::new().with_config("[dial]\nallow = [\"localhost\"]\n")).await;
    let by_name = stage.fleet.endpoint().replace("127.0.0.1", "localhost");
    stage.client.register(registration("named", &by_name)).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn declared_subsystems_and_collectors_out_of_reach_prevent_the_start() {
    let home = Home::new().with_config(
        "[access]\nmode = \"enforce\"\n[tracing]\notlp_endpoint = \"http://collector:4317\"\n\
         [[subsystems]]\nname = \"a\"\nendpoint = \"https://169.254.169.254:80\"\n",
    );
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    let log = home.log();
    assert!(log.contains("tracing.otlp_endpoint is http://collector:4317"), "{log}");
    let home = Home::new().with_config(
        "[access]\nmode = \"enforce\"\n[[subsystems]]\nname = \"a\"\nendpoint = \"https://169.254.169.254:80\"\n",
    );
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    assert!(home.log().contains("where 169.254.169.254 is link-local"), "{}", home.log());
}

#[tokio::test]
async fn the_server_of_a_subsystem_must_have_the_certificate_of_its_owner() {
    let (home, authority) = (Home::new(), Authority::new("fleet"));
    let [a, b] = ["a", "b"].map(|name| authority.client(&format!("spiffe://fleet/{name}")));
    let fleet = Fleet::behind_tls(a.identity()).await;
    let (cert_file, key_file) = authority.service().write(&home.path(""), "service");
    let ca_file = authority.write(home.path("ca.pem"));
    let config = format!(
        "[server.tls]\ncert_file = {cert_file:?}\nkey_file = {key_file:?}\nclient_ca_file = {ca_file:?}\n\
         [dial]\nca_file = {ca_file:?}\n\
         [[access.grants]]\nwho = [\"cert:spiffe://fleet/*\"]\nrole = \"registrar\"\nsubsystems = [\"{{1}}\"]\n\
         phases = [0, 0]\nendpoints = [\"https://127.0.0.1:*\"]\n"
    );
    let (_home, service, own) = enforcing(home.with_config(&config), &[]).await;
    for (name, issued) in [("a", &a), ("b", &b)] {
        let mut client = service.client_with(authority.trusted().identity(issued.identity())).await.unwrap();
        let named = answered_by(name, fleet.endpoint(), "cert:spiffe://fleet/a");
        assert_eq!(client.register(named).await.unwrap_err().code(), Code::PermissionDenied);
        client.register(registration(name, fleet.endpoint())).await.unwrap();
    }
    let (_, text) = own.run(&["run"]).await;
    let why = "a server with the certificate of cert:spiffe://fleet/a answers, but cert:spiffe://fleet/b must";
    assert!(text.contains(why), "{text}");
    assert_eq!(fleet.runs("a").len(), 1, "{text}");
    assert!(fleet.calls().iter().all(|call| call.subsystem == "a"), "{:?}", fleet.calls());
}
