//! Callers that are known by a certificate, or by the user of their process.

use std::{
    cell::OnceCell,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::common::{
    command::run,
    patiently,
    pki::{Authority, Issued},
    postgres::shared,
    replicas::Replicas,
    service::{Client, Home, Service, reason as reason_of},
    tokens::{write_private, write_tokens},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use orchestrator_core::{
    access::Token,
    config::tokens_text,
    model::Name,
    proto::orchestrator::v1::{self as pb, cycle_event::Event},
};
use prost::Message;
use rcgen::{CertificateParams, SanType, date_time_ymd};
use rustix::process::{Signal, geteuid};
use tokio::process::Command;
use tonic::{Code, Status, Streaming};
use tonic_types::pb::ErrorInfo;

const MAIN: &str = "spiffe://fleet/process/main";

/// A service that enforces these grants, with TLS for clients of the authority `fleet`.
struct Stage {
    home: Home,
    fleet: Authority,
    service: Service,
}

impl Stage {
    async fn with(grants: &str, access: &str) -> Self {
        let (home, fleet) = (Home::new().in_memory(), Authority::new("fleet"));
        fleet.service().write(&home.path(""), "service");
        fleet.write(home.path("clients.pem"));
        write_config(&home, access, grants);
        let path = home.path("orchestrator.toml").display().to_string();
        let home = home.with_args(["--config".to_owned(), path]);
        let service = home.serve().await;
        Self { home, fleet, service }
    }

    /// Replaces the configuration, which the service notices by itself.
    fn configure(&self, access: &str, grants: &str) {
        write_config(&self.home, access, grants);
    }

    async fn client(&self, issued: &Issued) -> Client {
        let tls = self.fleet.trusted().identity(issued.identity());
        self.service.client_with(tls).await.unwrap()
    }

    async fn watch(&self, issued: &Issued) -> Streaming<pb::WatchCyclesResponse> {
        let mut client = self.client(issued).await;
        let mut events = client.watch_cycles(pb::WatchCyclesRequest::default()).await.unwrap().into_inner();
        let first = patiently("the beginning of the stream", events.message()).await.unwrap().unwrap();
        assert!(matches!(first.event.unwrap().event, Some(Event::Bookmark(_))));
        events
    }

    /// `orchestrator whoami` with a certificate, and with the token in a file, if any.
    async fn whoami(&self, issued: &Issued, token: Option<&Path>) -> (i32, String) {
        let (certificate, key) = issued.write(&self.home.path(""), "caller");
        let ca = self.fleet.write(self.home.path("fleet.pem"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
        command.args(["whoami", "--address", &format!("https://{}", self.service.address())]);
        command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key).arg("--ca-file").arg(ca);
        if let Some(token) = token {
            command.arg("--credentials").arg(token);
        }
        run(command).await
    }
}

fn write_config(home: &Home, access: &str, grants: &str) {
    let [certificate, key, clients] =
        ["service.pem", "service.key", "clients.pem"].map(|name| quoted(&home.path(name)));
    let text = format!(
        "[server.tls]\ncert_file = {certificate}\nkey_file = {key}\nclient_ca_file = {clients}\n\
         [access]\nmode = \"enforce\"\n{access}\n{grants}"
    );
    let new = home.path("new.toml");
    fs::write(&new, text).unwrap();
    fs::rename(new, home.path("orchestrator.toml")).unwrap();
}

/// A path in TOML.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

fn grant(who: &str, role: &str) -> String {
    format!("[[access.grants]]\nwho = [\"{who}\"]\nrole = \"{role}\"\nsubsystems = [\"*\"]\n")
}

/// The status with which a stream ends.
async fn end(events: &mut Streaming<pb::WatchCyclesResponse>) -> Status {
    let ended = async {
        loop {
            match events.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended without a status"),
                Err(status) => return status,
            }
        }
    };
    patiently("the end of the stream", ended).await
}

fn reason(status: &Status) -> (Code, String) {
    (status.code(), reason_of(status).why)
}

// ---------------------------------------------------------------------------------------------------------------
// Certificates

#[tokio::test]
async fn a_certificate_is_an_identity_that_grants_name() {
    let stage = Stage::with(&grant("cert:spiffe://fleet/process/*", "viewer"), "").await;
    let main = stage.fleet.client(MAIN);
    let (exit, text) = stage.whoami(&main, None).await;
    assert!(exit == 0 && text.contains(&format!("cert:{MAIN}")) && text.contains("VIEWER"), "{text}");
    let mut client = stage.client(&main).await;
    client.get_status(pb::GetStatusRequest::default()).await.unwrap();
    let denied = client.run().await.unwrap_err();
    assert_eq!(reason(&denied), (Code::PermissionDenied, "NOT_ALLOWED".into()));
    assert!(denied.message().contains(MAIN), "{}", denied.message());

    let mut other = stage.client(&stage.fleet.client("spiffe://elsewhere/main")).await;
    let denied = other.get_status(pb::GetStatusRequest::default()).await.unwrap_err();
    assert_eq!(reason(&denied), (Code::PermissionDenied, "NOT_ALLOWED".into()));
    // Nobody has no certificate, and no token.
    let mut nobody = stage.service.client_with(stage.fleet.trusted()).await.unwrap();
    let denied = nobody.get_status(pb::GetStatusRequest::default()).await.unwrap_err();
    assert_eq!(reason(&denied), (Code::Unauthenticated, "CREDENTIAL_MISSING".into()));
}

#[tokio::test]
async fn a_certificate_without_one_name_is_no_identity() {
    let stage = Stage::with(&grant("cert:*", "viewer"), "").await;
    let named = |uris: &[&str], dns: &[&str]| {
        let mut params = CertificateParams::new(dns.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>()).unwrap();
        params.subject_alt_names.extend(uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())));
        stage.fleet.issue(&params)
    };
    for (uris, dns, counts) in [
        (&[][..], &[][..], "0 URI names and 0 DNS names"),
        (&["a://b", "a://c"], &["main"], "2 URI names and 1 DNS names"),
        (&[], &["main", "other"], "0 URI names and 2 DNS names"),
    ] {
        let denied = stage.client(&named(uris, dns)).await.run().await.unwrap_err();
        assert_eq!(reason(&denied), (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
        assert!(denied.message().contains(counts), "{}", denied.message());
    }
    let mut main = stage.client(&named(&[], &["main"])).await;
    main.get_status(pb::GetStatusRequest::default()).await.unwrap();
}

#[tokio::test]
async fn a_bad_token_never_gives_way_to_the_certificate() {
    let stage = Stage::with(&grant(&format!("cert:{MAIN}"), "viewer"), "").await;
    let main = stage.fleet.client(MAIN);
    let (_, text) = Token::create(Name::parse("unknown").unwrap(), None).unwrap();
    let file = stage.home.path("token");
    write_private(&file, &text);
    let (exit, text) = stage.whoami(&main, Some(&file)).await;
    assert!(exit == 1 && text.contains("CREDENTIAL_INVALID"), "{text}");
    let (exit, text) = stage.whoami(&main, None).await;
    assert_eq!(exit, 0, "{text}");
}

#[tokio::test]
async fn a_good_token_takes_precedence_over_the_certificate() {
    let grants = grant(&format!("cert:{MAIN}"), "viewer") + &grant("token:ops", "operator");
    let (token, text) = Token::create(Name::parse("ops").unwrap(), None).unwrap();
    let home = tempfile::tempdir().unwrap();
    let [tokens, file] = ["tokens.toml", "token"].map(|name| home.path().join(name));
    write_private(&tokens, &tokens_text(&[token]));
    write_private(&file, &text);
    let stage = Stage::with(&grants, &format!("tokens_file = {}", quoted(&tokens))).await;
    let (exit, text) = stage.whoami(&stage.fleet.client(MAIN), Some(&file)).await;
    assert!(exit == 0 && text.contains("token:ops") && text.contains("OPERATOR"), "{text}");
}

#[tokio::test]
async fn a_watch_ends_when_its_identity_or_its_certificate_is_revoked() {
    let grants = grant("cert:spiffe://fleet/*/*", "viewer");
    let stage = Stage::with(&grants, "").await;
    let (main, other) = (stage.fleet.client(MAIN), stage.fleet.client("spiffe://fleet/process/other"));
    let (mut of_main, mut of_other) = (stage.watch(&main).await, stage.watch(&other).await);
    stage.configure(&format!("revoked = [\"cert:{MAIN}\"]"), &grants);
    assert_eq!(reason(&end(&mut of_main).await), (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    // By its public key, as openssl shows it.
    let (certificate, _) = other.write(&stage.home.path(""), "other");
    let mut shell = Command::new("sh");
    let script = "openssl x509 -in \"$0\" -noout -pubkey | openssl pkey -pubin -outform der | sha256sum";
    shell.args(["-c", script]).arg(certificate);
    let (_, text) = run(shell).await;
    let key = text.split_whitespace().next().unwrap();
    stage.configure(&format!("revoked = [\"{key}\"]"), &grants);
    assert_eq!(reason(&end(&mut of_other).await), (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    // The other is not revoked any more.
    drop(stage.watch(&main).await);
}

#[tokio::test]
async fn a_watch_ends_when_the_authority_of_its_certificate_is_not_trusted_any_more() {
    let stage = Stage::with(&grant("cert:*://*/*/*", "viewer"), "").await;
    let mut events = stage.watch(&stage.fleet.client(MAIN)).await;
    Authority::new("another").write(stage.home.path("clients.pem"));
    let status = end(&mut events).await;
    assert_eq!(reason(&status), (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    assert!(status.message().contains("not trusted any more"), "{}", status.message());
}

#[tokio::test]
async fn a_watch_outlives_the_renewal_of_the_authorities_that_trust_its_certificate() {
    let stage = Stage::with(&grant("cert:*://*/*/*", "viewer"), "").await;
    let mut events = stage.watch(&stage.fleet.client(MAIN)).await;
    let both = stage.fleet.certificate.clone() + &Authority::new("another").certificate;
    fs::write(stage.home.path("clients.pem"), both).unwrap();
    stage.home.logged("the files of TLS were read again", 1).await;
    let mut admin = stage.client(&stage.fleet.client("spiffe://fleet/process/other")).await;
    admin.get_status(pb::GetStatusRequest::default()).await.unwrap();
    assert!(futures_util::FutureExt::now_or_never(events.message()).is_none(), "it is still open");
}

#[tokio::test]
async fn a_watch_ends_when_its_certificate_expires() {
    /// Long enough to begin the watch.
    const VALID: Duration = Duration::from_secs(5);
    let stage = Stage::with(&grant("cert:*://*/*/*", "viewer"), "").await;
    let mut params = CertificateParams::default();
    params.subject_alt_names.push(SanType::URI(MAIN.try_into().unwrap()));
    params.not_after = date_time_ymd(1970, 1, 1) + SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + VALID;
    let mut events = stage.watch(&stage.fleet.issue(&params)).await;
    assert_eq!(reason(&end(&mut events).await), (Code::Unauthenticated, "CREDENTIAL_EXPIRED".into()));
}

// ---------------------------------------------------------------------------------------------------------------
// Users of this machine

/// `orchestrator whoami` at a socket, by another user than root.
fn whoami_of_another(home: &Home, socket: &Path) -> Command {
    // Other users may not come to where the binary was built.
    let binary = home.path("orchestrator");
    fs::copy(env!("CARGO_BIN_EXE_orchestrator"), &binary).unwrap();
    let mut whoami = whoami_at(&binary, socket);
    whoami.uid(65534).gid(65534).current_dir("/");
    whoami
}

fn whoami_at(binary: &Path, socket: &Path) -> Command {
    let mut whoami = Command::new(binary);
    whoami.args(["whoami", "--address", &format!("unix:{}", socket.display())]);
    whoami
}

/// A service that enforces these grants, and also listens at a socket, with these settings.
async fn at_socket(settings: &str, grants: &str) -> (Home, Service, PathBuf) {
    let home = Home::new().in_memory();
    // Other users may come to the socket, as far as its own mode lets them.
    fs::set_permissions(home.path(""), Permissions::from_mode(0o755)).unwrap();
    let socket = home.path("o.sock");
    let path = quoted(&socket);
    let config = format!("[server]\nlisten_unix = {path}\n{settings}\n[access]\nmode = \"enforce\"\n{grants}");
    let home = home.with_config(&config);
    let service = home.serve().await;
    (home, service, socket)
}

fn uid() -> u32 {
    geteuid().as_raw()
}

#[tokio::test]
async fn the_user_of_the_service_is_an_administrator_at_its_socket() {
    let (home, service, socket) = at_socket("", "").await;
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    let (exit, text) = run(whoami_at(Path::new(env!("CARGO_BIN_EXE_orchestrator")), &socket)).await;
    assert!(exit == 0 && text.contains(&format!("uid:{}", uid())) && text.contains("ADMIN"), "{text}");
    // Over TCP, the same user is nobody.
    let denied = service.client().await.run().await.unwrap_err();
    assert_eq!(reason(&denied), (Code::Unauthenticated, "CREDENTIAL_MISSING".into()));
    if uid() == 0 {
        let (exit, text) = run(whoami_of_another(&home, &socket)).await;
        assert!(exit == 4 && text.contains("Permission denied"), "{text}");
    }
    assert!(service.stop().await.success());
    assert!(!socket.exists(), "its file is removed");
}

#[tokio::test]
async fn another_user_at_the_socket_has_the_rights_of_its_grants() {
    let (home, _service, socket) = at_socket("unix_mode = \"0666\"", &grant("uid:65534", "viewer")).await;
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o666);
    // Only root can be another user.
    if uid() == 0 {
        let (exit, text) = run(whoami_of_another(&home, &socket)).await;
        assert!(exit == 0 && text.contains("uid:65534") && text.contains("VIEWER"), "{text}");
        assert!(!text.contains("ADMIN"), "{text}");
    }
}

#[tokio::test]
async fn a_socket_that_was_left_over_is_replaced_and_any_other_file_is_not() {
    let (home, service, socket) = at_socket("", "").await;
    service.signal(Signal::KILL);
    drop(service);
    assert!(socket.exists(), "nobody removed it");
    let service = home.serve().await;
    let second = Home::new().in_memory();
    let second = second.with_config(&format!("server.listen_unix = {}", quoted(&socket)));
    assert_eq!(second.try_serve().await.err().unwrap().code(), Some(1), "the first one listens there");
    assert!(second.log().contains("server.listen_unix"), "{}", second.log());
    drop(service);

    let file = home.path("file");
    fs::write(&file, "precious").unwrap();
    let third = Home::new().in_memory();
    let third = third.with_config(&format!("server.listen_unix = {}", quoted(&file)));
    assert_eq!(third.try_serve().await.err().unwrap().code(), Some(1));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[tokio::test]
#[ignore = "needs grpcurl"]
async fn grpcurl_is_known_by_its_user_and_by_its_certificate() {
    let (_home, _service, socket) = at_socket("", "").await;
    let mut grpcurl = Command::new("grpcurl");
    grpcurl.args(["-plaintext", "-unix"]).arg(&socket).arg("dreamnet.orchestrator.v1.Access/WhoAmI");
    let (exit, text) = run(grpcurl).await;
    assert!(exit == 0 && text.contains(&format!("\"uid:{}\"", uid())), "{text}");

    let stage = Stage::with(&grant("cert:*://*/*/*", "viewer"), "").await;
    let (certificate, key) = stage.fleet.client(MAIN).write(&stage.home.path(""), "caller");
    let mut grpcurl = Command::new("grpcurl");
    grpcurl.arg("-cacert").arg(stage.fleet.write(stage.home.path("fleet.pem")));
    grpcurl.arg("-cert").arg(certificate).arg("-key").arg(key).arg(stage.service.address().to_string());
    grpcurl.arg("dreamnet.orchestrator.v1.Access/WhoAmI");
    let (exit, text) = run(grpcurl).await;
    assert!(exit == 0 && text.contains(&format!("\"cert:{MAIN}\"")), "{text}");
}

#[tokio::test]
#[ignore = "needs grpcurl"]
async fn grpcurl_uses_a_follower_as_it_uses_the_leader() {
    let Some(server) = shared() else { return };
    let token = OnceCell::new();
    let config = |shared: &Path, _: &Home| {
        let tokens = shared.join("tokens.toml");
        token.get_or_init(|| write_tokens(&tokens, &["admin"])["admin"].1.clone());
        let grant = "[[access.grants]]\nwho = [\"token:admin\"]\nrole = \"admin\"\n";
        format!("[access]\nmode = \"enforce\"\ntokens_file = {}\n{grant}", quoted(&tokens))
    };
    let mut replicas = Replicas::start_with(server, &["a", "b"], "60s", "http", config).await;
    let follower = replicas.service("b").address().to_string();
    let authorization = format!("authorization: Bearer {}", token.get().unwrap());
    let call = |rpc: &str, header: &str, data: &str| {
        let mut grpcurl = Command::new("grpcurl");
        // The answer comes sooner.
        grpcurl.args(["-plaintext", "-max-time", "1", "-import-path", "proto", "-proto", ORCHESTRATOR_PROTO]);
        grpcurl.args(["-H", header, "-d", data, &follower, &format!("dreamnet.orchestrator.v1.Orchestrator/{rpc}")]);
        grpcurl
    };
    let call_it = async |rpc, data: &str| run(call(rpc, &authorization, data)).await;

    let registration = format!(r#"{{"registration": {{"name": "s", "endpoint": "{}"}}}}"#, replicas.fleet.endpoint());
    let (exit, text) = call_it("RegisterSubsystem", &registration).await;
    assert_eq!(exit, 0, "{text}");
    let (exit, text) = call_it("RunCycle", r#"{"request_id": "first"}"#).await;
    assert!(exit == 0 && text.contains(r#""cycleId": "1""#) && text.contains("CYCLE_STATE_SUCCEEDED"), "{text}");
    // Its deadline ends the stream.
    let (exit, text) = call_it("WatchCycles", r#"{"from_oldest": true}"#).await;
    assert!(text.contains(r#""requestId": "first""#) && exit == grpcurl_exit(Code::DeadlineExceeded), "{text}");

    let forged = "orchestrator-caller-bin: CgFi";
    let (exit, text) = run(call("RunCycle", forged, "{}")).await;
    assert_eq!((exit, grpcurl_reason(&text)), (grpcurl_exit(Code::Unauthenticated), "CREDENTIAL_INVALID".into()));

    replicas.kill("a").await;
    let (exit, text) = call_it("RunCycle", "{}").await;
    assert_eq!((exit, grpcurl_reason(&text)), (grpcurl_exit(Code::Unavailable), "NO_LEADER".into()));
}

const ORCHESTRATOR_PROTO: &str = "dreamnet/orchestrator/v1/orchestrator.proto";

/// The exit code of grpcurl for a status.
fn grpcurl_exit(code: Code) -> i32 {
    64 + code as i32
}

/// The reason of an error that grpcurl shows. It has not the descriptions of details, so it shows their bytes.
fn grpcurl_reason(text: &str) -> String {
    let details = text.lines().filter_map(|line| line.trim().strip_prefix("\"@value\": \"")?.strip_suffix('"'));
    let mut infos = details.filter_map(|detail| ErrorInfo::decode(&BASE64_STANDARD.decode(detail).unwrap()[..]).ok());
    let info = infos.find(|info| info.domain == "orchestrator.dreamnet");
    info.unwrap_or_else(|| panic!("{text}")).reason
}
