//! `orchestrator certs`, and a service and its callers with the certificates that it issues.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::common::{
    command::{orchestrator, run, run_with},
    fleet::Fleet,
    patiently,
    service::{Home, Service},
};
use tokio::process::Command;

async fn openssl(args: &[&str]) -> (i32, String) {
    run_with("openssl", args).await
}

/// A home with the directory of an authority.
struct Pki {
    home: Home,
    dir: PathBuf,
}

impl Pki {
    fn new() -> Self {
        let home = Home::new();
        let dir = home.path("pki");
        Self { home, dir }
    }

    async fn init() -> Self {
        let pki = Self::new();
        let (exit, text) = pki.certs(&["init"]).await;
        assert_eq!(exit, 0, "{text}");
        pki
    }

    async fn certs(&self, args: &[&str]) -> (i32, String) {
        let dir = self.dir.display().to_string();
        orchestrator(None, &[&["certs", "--dir", &dir], args].concat()).await
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    async fn serve(self) -> (Self, Service) {
        let Self { home, dir } = self;
        let home = home.in_memory().with_args(["--secure".to_owned(), dir.display().to_string()]);
        let service = home.serve().await;
        (Self { home, dir }, service)
    }

    /// A command for a service, with the credentials of this name.
    async fn call(&self, service: &Service, name: &str, args: &[&str]) -> (i32, String) {
        let address = format!("https://localhost:{}", service.address().port());
        let args = [args, &["--address", &address]].concat();
        orchestrator(Some(&self.dir.join(name)), &args).await
    }
}

#[tokio::test]
async fn an_authority_signs_certificates_that_others_can_verify() {
    let pki = Pki::init().await;
    let (exit, text) =
        pki.certs(&["issue", "subsystem", "prices", "--host", "prices.example", "--host", "10.0.0.7"]).await;
    assert_eq!(exit, 0, "{text}");
    let ca = pki.path("ca.pem");
    for (name, usage, names) in [
        ("core", "sslserver", &["DNS:localhost", "IP Address:127.0.0.1", "URI:spiffe://fleet/core"][..]),
        ("admin", "sslclient", &["URI:spiffe://fleet/admin/admin"]),
        ("prices", "sslserver", &["DNS:prices.example", "IP Address:10.0.0.7", "URI:spiffe://fleet/subsystem/prices"]),
        ("prices", "sslclient", &[]),
    ] {
        let certificate = pki.path(&format!("{name}/cert.pem"));
        let (exit, text) = openssl(&["verify", "-x509_strict", "-purpose", usage, "-CAfile", &ca, &certificate]).await;
        assert_eq!(exit, 0, "{text}");
        let (_, text) = openssl(&["x509", "-noout", "-ext", "subjectAltName", "-in", &certificate]).await;
        assert!(names.iter().all(|name| text.contains(name)), "{text}");
        // For a year, not for ever.
        for (seconds, is_valid) in [(364 * 24 * 3600, true), (366 * 24 * 3600, false)] {
            let (exit, _) = openssl(&["x509", "-noout", "-checkend", &format!("{seconds}"), "-in", &certificate]).await;
            assert_eq!(exit == 0, is_valid, "{name} after {seconds} s");
        }
    }
    let (_, text) = openssl(&["verify", "-purpose", "sslserver", "-CAfile", &ca, &pki.path("admin/cert.pem")]).await;
    assert!(text.contains("unsuitable certificate purpose"), "a person is no server: {text}");
    let (_, text) = pki.certs(&["list"]).await;
    for part in ["cert:spiffe://fleet/core", "cert:spiffe://fleet/subsystem/prices", "prices.example 10.0.0.7"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn private_keys_belong_to_their_owner_only() {
    let pki = Pki::init().await;
    let mode = |name: &str| fs::metadata(pki.path(name)).unwrap().mode() & 0o777;
    for directory in ["", "ca", "core", "admin"] {
        assert_eq!(mode(directory), 0o700, "{directory}");
    }
    for file in ["ca/ca.key", "core/key.pem", "admin/key.pem"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
}

/// A line with single spaces.
fn squeezed(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn the_commands_of_the_readme_secure_a_fleet_and_show_what_it_says() {
    const SERVE: &str = "orchestrator serve --secure pki/ --listen 0.0.0.0:7700 --admin-listen 0.0.0.0:7780 &\n";
    let readme = include_str!("../../README.md");
    let (_, section) = readme.split_once("## Five more minutes, with TLS and rights").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let blocks = section.split("```").skip(1).step_by(2);
    let steps: Vec<_> = blocks.flat_map(|block| block.split("\n$ ").skip(1)).collect();
    assert_eq!(steps.len(), 10, "{steps:?}");

    let home = Home::new();
    let (pki, database) = (home.path("pki"), home.path("orchestrator.db"));
    let home = home.with_args(["--secure".to_owned(), pki.display().to_string()]);
    let home = home.with_store(&format!("sqlite:{}", database.display()));
    let fleet = Fleet::start().await;
    let program = Path::new(env!("CARGO_BIN_EXE_orchestrator")).parent().unwrap().display();
    let path = format!("{program}:{}", std::env::var("PATH").unwrap());
    let (mut service, mut exports) = (None, String::new());
    for step in steps {
        if step.starts_with(SERVE) {
            service = Some(home.serve().await);
            continue;
        }
        let (line, shown) = step.split_once('\n').unwrap_or((step, ""));
        let port = service.as_ref().map_or(0, |service| service.address().port());
        let line = line.replace("localhost:7700", &format!("localhost:{port}"));
        let line = line.replace("http://127.0.0.1:50051", fleet.endpoint());
        if line.starts_with("export ") {
            exports = format!("{line}; ");
            continue;
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{exports}{line}")]).current_dir(home.path("")).env("PATH", &path);
        shell.env_remove("ORCHESTRATOR_ADDRESS").env_remove("ORCHESTRATOR_CREDENTIALS");
        let (_, text) = run(shell).await;
        let printed: Vec<_> = text.lines().map(squeezed).collect();
        for line in shown.lines().map(squeezed) {
            // In place of an ellipsis, there may be any text.
            let parts: Vec<_> = line.split('…').map(str::trim).collect();
            let is_printed = printed.iter().any(|printed| parts.iter().all(|part| printed.contains(part)));
            assert!(is_printed, "`{step}` does not print {line:?}, but\n{text}");
        }
    }
}

#[tokio::test]
async fn a_secure_service_lets_callers_do_what_their_certificates_are_for() {
    let pki = Pki::init().await;
    for (role, name) in [("subsystem", "average"), ("viewer", "wall"), ("operator", "ops")] {
        assert_eq!(pki.certs(&["issue", role, name]).await.0, 0);
    }
    let (pki, service) = pki.serve().await;
    let (exit, text) = pki.call(&service, "admin", &["whoami"]).await;
    assert!(exit == 0 && text.contains("cert:spiffe://fleet/admin/admin") && text.contains("ADMIN"), "{text}");

    let register = |name: &'static str| ["subsystems", "register", name, "--endpoint", "http://127.0.0.1:1"];
    let (exit, text) = pki.call(&service, "average", &register("average")).await;
    assert_eq!(exit, 0, "{text}");
    let (exit, text) = pki.call(&service, "average", &register("alarm")).await;
    assert!(exit == 1 && text.contains("NOT_ALLOWED") && text.contains("alarm"), "{text}");
    for (name, may_read, may_run) in [("wall", true, false), ("ops", true, true), ("average", false, false)] {
        assert_eq!(pki.call(&service, name, &["subsystems", "list"]).await.0 == 0, may_read, "{name}");
        let (exit, text) = pki.call(&service, name, &["run"]).await;
        assert_eq!(!text.contains("NOT_ALLOWED"), may_run, "{name}: {exit} {text}");
    }
}

#[tokio::test]
async fn a_server_with_another_certificate_of_the_fleet_can_not_stand_in_for_the_service() {
    let pki = Pki::init().await;
    assert_eq!(pki.certs(&["issue", "subsystem", "sensor", "--host", "localhost"]).await.0, 0);
    let files = [("cert_file", "sensor/cert.pem"), ("key_file", "sensor/key.pem")];
    let args = files.map(|(key, name)| format!("--set=server.tls.{key}={}", pki.path(name)));
    let other = Home::new().in_memory().with_args(args);
    let other = other.serve().await;
    let token = pki.home.path("token");
    fs::write(&token, "orc_0123_secret").unwrap();
    fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    let address = format!("https://localhost:{}", other.address().port());
    let whoami = async |credentials: PathBuf, further: &[&str]| {
        let args = ["whoami", "--address", &address, "--ca-file", &pki.path("ca.pem")];
        orchestrator(Some(&credentials), &[&args, further].concat()).await
    };
    for credentials in [pki.dir.join("admin"), token] {
        let (exit, text) = whoami(credentials, &[]).await;
        let why = "a server with the certificate of cert:spiffe://fleet/subsystem/sensor answers, but \
                   cert:spiffe://fleet/core must";
        assert!(exit == 4 && text.contains(why) && text.contains("--server-identity"), "{exit} {text}");
    }
    // Unless it is the one that is meant.
    let sensor = ["--server-identity", "cert:spiffe://fleet/subsystem/sensor"];
    let (exit, text) = whoami(pki.dir.join("admin"), &sensor).await;
    assert_eq!(exit, 0, "{text}");
    for (address, identity, problem) in [
        (address.as_str(), "token:sensor", "give cert:NAME"),
        ("http://127.0.0.1:1", "cert:spiffe://fleet/core", "can't be verified without TLS"),
    ] {
        let (exit, text) = orchestrator(None, &["whoami", "--address", address, "--server-identity", identity]).await;
        assert!(exit == 2 && text.contains(problem), "{exit} {text}");
    }
}

#[tokio::test]
async fn the_service_of_a_fleet_is_known_by_its_identity_whatever_its_host() {
    let pki = Pki::new();
    assert_eq!(pki.certs(&["init", "--host", "core.example"]).await.0, 0);
    let (pki, service) = pki.serve().await;
    let (exit, text) = pki.call(&service, "admin", &["whoami"]).await;
    assert_eq!(exit, 0, "{text}");
}

#[tokio::test]
async fn a_secure_service_speaks_tls_1_3_only() {
    let (_pki, service) = Pki::init().await.serve().await;
    let address = service.address().to_string();
    let s_client = async |version| openssl(&["s_client", "-connect", &address, "-alpn", "h2", version]).await.1;
    let text = s_client("-tls1_3").await;
    assert!(text.contains("ALPN protocol: h2") && text.contains("TLSv1.3"), "{text}");
    let text = s_client("-tls1_2").await;
    assert!(text.contains("alert protocol version"), "{text}");
}

#[tokio::test]
async fn a_renewed_certificate_has_the_same_names_and_is_used_without_a_restart() {
    let (pki, service) = Pki::init().await.serve().await;
    let certificate = pki.path("core/cert.pem");
    let facts = async || {
        let (_, names) =
            openssl(&["x509", "-noout", "-ext", "subjectAltName,keyUsage,extendedKeyUsage", "-in", &certificate]).await;
        (names, openssl(&["x509", "-noout", "-serial", "-in", &certificate]).await.1)
    };
    let (names, serial) = facts().await;
    let (_, text) = pki.certs(&["renew"]).await;
    assert!(text.contains("no certificate expires soon"), "{text}");
    assert_eq!(facts().await.1, serial);
    let (exit, text) = pki.certs(&["renew", "core"]).await;
    assert_eq!(exit, 0, "{text}");
    let (new_names, new_serial) = facts().await;
    assert_eq!(new_names, names);
    assert_ne!(new_serial, serial);
    let address = service.address().to_string();
    let shown = async {
        loop {
            let (_, text) = openssl(&["s_client", "-connect", &address, "-showcerts"]).await;
            let shown = pki.home.path("shown.pem");
            fs::write(&shown, text).unwrap();
            let (_, serial) = openssl(&["x509", "-noout", "-serial", "-in", &shown.display().to_string()]).await;
            if serial == new_serial {
                break;
            }
        }
    };
    patiently("the service to show the new certificate", shown).await;
    assert_eq!(pki.call(&service, "admin", &["whoami"]).await.0, 0);
}

#[tokio::test]
async fn certificates_that_expire_soon_are_renewed_for_as_long_as_before() {
    let pki = Pki::init().await;
    assert_eq!(pki.certs(&["issue", "viewer", "wall", "--valid-for", "30d"]).await.0, 0);
    let (exit, text) = pki.certs(&["renew"]).await;
    assert!(exit == 0 && text.contains("viewer/wall") && !text.contains("admin"), "{text}");
    let wall = pki.path("wall/cert.pem");
    for (days, is_valid) in [(29, true), (31, false)] {
        let end = format!("{}", days * 24 * 3600);
        assert_eq!(openssl(&["x509", "-noout", "-checkend", &end, "-in", &wall]).await.0 == 0, is_valid, "{days}");
    }
}

#[tokio::test]
async fn only_certificates_of_the_authority_are_renewed() {
    let (pki, others) = (Pki::init().await, Pki::init().await);
    // Whoever can write here names an administrator, and waits for the next renewal.
    assert_eq!(others.certs(&["issue", "admin", "mallory", "--valid-for", "1h"]).await.0, 0);
    fs::create_dir(pki.path("mallory")).unwrap();
    fs::copy(others.path("mallory/cert.pem"), pki.path("mallory/cert.pem")).unwrap();
    let planted = fs::read(pki.path("mallory/cert.pem")).unwrap();
    let (exit, text) = pki.certs(&["renew"]).await;
    assert!(exit == 1 && text.contains("mallory") && text.contains("not from this authority"), "{text}");
    assert_eq!(fs::read(pki.path("mallory/cert.pem")).unwrap(), planted);
}

#[tokio::test]
async fn the_certificate_of_a_caller_is_no_certificate_of_a_server() {
    let pki = Pki::init().await;
    assert_eq!(pki.certs(&["issue", "subsystem", "average"]).await.0, 0);
    let (ca, certificate) = (pki.path("ca.pem"), pki.path("average/cert.pem"));
    let (_, text) = openssl(&["verify", "-purpose", "sslserver", "-CAfile", &ca, &certificate]).await;
    assert!(text.contains("unsuitable certificate purpose"), "{text}");
}

#[tokio::test]
async fn a_certificate_is_not_silently_left_out_without_tls() {
    let pki = Pki::init().await;
    for address in ["http://127.0.0.1:1", "unix:/none"] {
        let admin = pki.dir.join("admin");
        let (exit, text) = orchestrator(Some(&admin), &["whoami", "--address", address]).await;
        assert!(exit == 2 && text.contains("give an address with https://"), "{text}");
    }
}

#[tokio::test]
async fn mistakes_are_named_and_change_nothing() {
    let pki = Pki::new();
    let (exit, text) = pki.certs(&["issue", "viewer", "wall"]).await;
    assert!(exit == 2 && text.contains("certs init"), "{text}");
    assert_eq!(pki.certs(&["init"]).await.0, 0);
    let authority = fs::read(pki.path("ca.pem")).unwrap();
    let (exit, text) = pki.certs(&["init"]).await;
    assert!(exit == 1 && text.contains("exists"), "{text}");
    assert_eq!(fs::read(pki.path("ca.pem")).unwrap(), authority);
    for (args, named) in [
        (&["issue", "viewer", "ca"][..], "directory of the authority"),
        (&["issue", "boss", "a"], "boss"),
        (&["issue", "subsystem", "a", "--host", "a:1"], "without a port"),
        (&["issue", "viewer", "a", "--host", "a"], "only for a subsystem"),
        (&["issue", "viewer", "a", "--valid-for", "11y"], "10 years"),
        (&["init", "--fleet", "A/b"], "small letters"),
        (&["renew", "nobody"], "nobody"),
        (&["renew", "admni"], "Did you mean admin?"),
    ] {
        let (exit, text) = pki.certs(args).await;
        assert!((exit == 2 || exit == 1) && text.contains(named), "{args:?}: {exit} {text}");
    }
    // The directory belongs to the administrator; a viewer of that name would take it over.
    let admin = fs::read(pki.path("admin/cert.pem")).unwrap();
    let (exit, text) = pki.certs(&["issue", "viewer", "admin"]).await;
    assert!(exit == 1 && text.contains("renew"), "{text}");
    assert_eq!(fs::read(pki.path("admin/cert.pem")).unwrap(), admin);
    fs::copy(pki.path("admin/key.pem"), pki.path("ca/ca.key")).unwrap();
    let (exit, text) = pki.certs(&["issue", "viewer", "wall"]).await;
    assert!(exit == 2 && text.contains("is not the key of"), "{text}");
    fs::remove_file(pki.path("ca/ca.key")).unwrap();
    let (exit, text) = pki.certs(&["issue", "viewer", "wall"]).await;
    assert!(exit == 2 && text.contains("ca.key"), "{text}");
}
