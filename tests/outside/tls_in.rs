//! TLS of the service's own addresses: `server.tls` and `admin.tls`, with the clients that people use.

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::common::{
    command::{orchestrator, run_with},
    fleet::Fleet,
    patiently,
    pki::{Authority, Issued},
    service::{Home, Service, decode, next_recorded, registration},
};
use rcgen::date_time_ymd;
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    task::JoinSet,
};

// ---------------------------------------------------------------------------------------------------------------
// The kit

/// A home with an authority, and a service there with TLS.
struct Secure {
    home: Home,
    authority: Authority,
    issued: Issued,
}

impl Secure {
    /// With these further settings of `server.tls`.
    fn with(settings: &[&str]) -> Self {
        let (home, authority) = (Home::new(), Authority::new("fleet"));
        let issued = authority.service();
        let (certificate, key) = issued.write(&home.path(""), "service");
        let ca = authority.write(home.path("ca.pem"));
        let mut args = vec![];
        for (key, path) in [("cert_file", certificate), ("key_file", key), ("client_ca_file", ca)] {
            args.extend(["--set".to_owned(), format!("server.tls.{key}={}", path.display())]);
        }
        args.extend(settings.iter().flat_map(|it| ["--set".to_owned(), (*it).to_owned()]));
        Self { home: home.with_args(args), authority, issued }
    }

    fn directory(&self) -> PathBuf {
        self.home.path("")
    }

    /// Waits until clients see this certificate.
    async fn shown(&self, service: &Service, certificate: &str) {
        let shown = async { while openssl::shown(service.address()).await != certificate {} };
        patiently("the service to show another certificate", shown).await;
    }
}

/// `openssl s_client`.
mod openssl {
    use super::{AsyncReadExt, Command, SocketAddr, Stdio, patiently};

    /// Connects, waits for the first frame that the service sends, if it comes that far, and leaves.
    pub(super) async fn s_client(address: SocketAddr, args: &[&str]) -> String {
        /// The head of a frame with settings, behind its length.
        const SETTINGS: [u8; 6] = [4, 0, 0, 0, 0, 0];
        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &address.to_string()])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (mut printed, mut errors) = (Vec::new(), Vec::new());
        let to_the_frame = async {
            while !printed.windows(SETTINGS.len()).any(|it| it == SETTINGS) {
                if stdout.read_buf(&mut printed).await.unwrap() == 0 {
                    break;
                }
            }
        };
        patiently("openssl", to_the_frame).await;
        drop(child.stdin.take());
        patiently("openssl", stdout.read_to_end(&mut printed)).await.unwrap();
        patiently("openssl", stderr.read_to_end(&mut errors)).await.unwrap();
        printed.extend(errors);
        String::from_utf8_lossy(&printed).into_owned()
    }

    /// The certificate of a service, in PEM.
    pub(super) async fn shown(address: SocketAddr) -> String {
        const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
        const END: &str = "-----END CERTIFICATE-----\n";
        let printed = s_client(address, &["-alpn", "h2"]).await;
        let begin = printed.find(BEGIN).unwrap_or_else(|| panic!("no certificate: {printed}"));
        printed[begin..printed.find(END).unwrap() + END.len()].to_owned()
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Versions, protocols, sessions

#[tokio::test]
async fn openssl_speaks_h2_over_tls_1_3_only() {
    let secure = Secure::with(&[]);
    let service = secure.home.serve().await;
    let ca = secure.home.path("ca.pem");
    let with_ca = ["-alpn", "h2", "-verify_return_error", "-CAfile", ca.to_str().unwrap()];
    let printed = openssl::s_client(service.address(), &[&with_ca[..], &["-tls1_3"]].concat()).await;
    assert!(printed.contains("ALPN protocol: h2") && printed.contains("Verify return code: 0 (ok)"), "{printed}");
    let printed = openssl::s_client(service.address(), &[&with_ca[..], &["-tls1_2"]].concat()).await;
    assert!(printed.contains("alert protocol version") && printed.contains("Cipher is (NONE)"), "{printed}");
    let printed = openssl::s_client(service.address(), &["-alpn", "http/1.1"]).await;
    assert!(printed.contains("alert no application protocol"), "{printed}");
    let log = secure.home.logged("a TLS handshake failed", 1).await;
    assert!(log.contains("peer=127.0.0.1"), "{log}");
}

#[tokio::test]
async fn no_session_is_resumed() {
    let secure = Secure::with(&["server.tls.min_version=1.2"]);
    let service = secure.home.serve().await;
    let session = secure.home.path("session");
    let session = session.to_str().unwrap();
    for version in ["-tls1_3", "-tls1_2"] {
        let printed = openssl::s_client(service.address(), &["-alpn", "h2", version, "-sess_out", session]).await;
        assert!(printed.contains("ALPN protocol: h2") && printed.contains("New, TLSv1."), "{printed}");
        // Without a ticket, there is nothing to resume.
        if Path::new(session).exists() {
            let printed = openssl::s_client(service.address(), &["-alpn", "h2", version, "-sess_in", session]).await;
            assert!(printed.contains("New, TLSv1.") && !printed.contains("Reused"), "{printed}");
            fs::remove_file(session).unwrap();
        }
    }
}

#[tokio::test]
async fn curl_reads_the_admin_address_over_https() {
    let secure = Secure::with(&[]);
    let service = secure.home.serve().await;
    let (ca, url) = (secure.home.path("ca.pem"), format!("https://{}", service.admin()));
    let curl =
        async |args: &[&str]| run_with("curl", &[&["--silent", "--show-error", "--include"], args].concat()).await;
    let with_ca = ["--cacert", ca.to_str().unwrap()];
    let (code, answer) = curl(&[&with_ca[..], &[&format!("{url}/api/status")]].concat()).await;
    assert_eq!(code, 0, "{answer}");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("orchestratorId"), "{answer}");
    let (_, metrics) = curl(&[&with_ca[..], &[&format!("{url}/metrics")]].concat()).await;
    for file in ["service.pem", "ca.pem"] {
        // In the year 4096.
        let file = secure.home.path(file);
        let expiry =
            format!("orchestrator_tls_certificate_expiry_timestamp_seconds{{file=\"{}\"}} 67090118400", file.display());
        assert!(metrics.contains(&expiry), "{metrics}");
    }
    let (code, answer) = curl(&[&with_ca[..], &["--tls-max", "1.2", &url]].concat()).await;
    assert_eq!(code, 35, "{answer}");
    // Without TLS, it is told what is missing.
    let (code, answer) = curl(&[&url.replace("https", "http")]).await;
    assert_eq!(code, 0, "{answer}");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.ends_with("use https://\n"), "{answer}");
    secure.home.logged("a client speaks without TLS to an address with TLS", 1).await;
}

#[tokio::test]
async fn the_admin_address_can_have_its_own_certificate_and_ask_clients_for_theirs() {
    let secure = Secure::with(&[]);
    let own = Authority::new("admin");
    let (certificate, key) = own.service().write(&secure.directory(), "admin");
    let mut args = vec!["admin.tls.client_auth=required".to_owned()];
    args.push(format!("admin.tls.cert_file={}", certificate.display()));
    args.push(format!("admin.tls.key_file={}", key.display()));
    let secure = Secure { home: secure.home.with_args(args.iter().flat_map(|it| ["--set", it])), ..secure };
    let service = secure.home.serve().await;
    let url = format!("https://{}/api/status", service.admin());
    let ca = own.write(secure.home.path("admin-ca.pem"));
    let curl = ["--silent", "--show-error", "--cacert", ca.to_str().unwrap(), &url];
    let (code, answer) = run_with("curl", &curl).await;
    assert_ne!(code, 0, "{answer}");
    assert!(answer.contains("certificate required"), "{answer}");
    let (certificate, key) = secure.authority.client("spiffe://fleet/person").write(&secure.directory(), "person");
    let shown = ["--cert", certificate.to_str().unwrap(), "--key", key.to_str().unwrap()];
    let (code, answer) = run_with("curl", &[&curl[..], &shown].concat()).await;
    assert_eq!(code, 0, "{answer}");
    assert!(answer.contains("orchestratorId"), "{answer}");
}

// ---------------------------------------------------------------------------------------------------------------
// Clients

#[tokio::test]
async fn a_client_may_show_a_certificate_from_the_authority() {
    let secure = Secure::with(&["log.filter=info,orchestrator_core::api=debug"]);
    let service = secure.home.serve().await;
    let trusted = || secure.authority.trusted();
    let mut without = service.client_with(trusted()).await.unwrap();
    without.status().await.unwrap();
    let log = secure.home.logged("rpc=\"GetStatus\"", 1).await;
    assert!(log.contains("certified=false") && !log.contains("certified=true"), "{log}");

    let own = secure.authority.client("spiffe://fleet/process/main");
    let mut with = service.client_with(trusted().identity(own.identity())).await.unwrap();
    with.status().await.unwrap();
    secure.home.logged("certified=true", 1).await;

    let other = Authority::new("other").client("spiffe://fleet/process/main");
    let mut stranger = service.client_with(trusted().identity(other.identity())).await.unwrap();
    assert!(stranger.status().await.is_err());
    secure.home.logged("UnknownIssuer", 1).await;
    without.status().await.unwrap();
}

#[tokio::test]
async fn the_command_line_says_what_is_wrong_with_tls() {
    let secure = Secure::with(&["server.tls.client_auth=required"]);
    let plain = Home::new();
    let (service, plain_service) = tokio::join!(secure.home.serve(), plain.serve());
    let (https, http) = (format!("https://{}", service.address()), format!("http://{}", service.address()));
    let (certificate, key) = secure.authority.client("spiffe://fleet/cli").write(&secure.directory(), "cli");
    let other = Authority::new("other");
    let (stranger, of_stranger) = other.client("spiffe://fleet/cli").write(&secure.directory(), "stranger");
    let (ca, other) = (secure.home.path("ca.pem"), other.write(secure.home.path("other.pem")));
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let [certificate, key, stranger, of_stranger, ca, other] =
        [certificate, key, stranger, of_stranger, ca, other].map(|path| text(&path));
    let status = async |args: &[&str]| orchestrator(None, &[&["status"], args].concat()).await;

    let own = ["--address", &https, "--cert-file", &certificate, "--key-file", &key];
    let (code, printed) = status(&[&own[..], &["--ca-file", &ca]].concat()).await;
    assert_eq!(code, 0, "{printed}");
    let mut by_environment = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    by_environment.arg("status").stdin(Stdio::null());
    for (name, value) in [("ADDRESS", &https), ("CA_FILE", &ca), ("CERT_FILE", &certificate), ("KEY_FILE", &key)] {
        by_environment.env(format!("ORCHESTRATOR_{name}"), value);
    }
    let ended = patiently("status", by_environment.output()).await.unwrap();
    assert!(ended.status.success(), "{ended:?}");

    let to_plain = format!("https://{}", plain_service.address());
    let elsewhere = https.replace("127.0.0.1", "127.0.0.2");
    for (args, expected, remedy) in [
        (&["--address", &http][..], 4, "with https://"),
        (&["--address", &https, "--ca-file", &ca], 4, "--cert-file"),
        (&own, 4, "give the certificate of that authority with --ca-file"),
        (&[&own[..], &["--ca-file", &other]].concat(), 4, "UnknownIssuer"),
        (
            &["--address", &https, "--ca-file", &ca, "--cert-file", &stranger, "--key-file", &of_stranger],
            4,
            "certificate in --cert-file",
        ),
        (&["--address", &to_plain, "--ca-file", &ca], 4, "Give the address with http://."),
        (&["--address", &https, "--cert-file", &certificate], 2, "--cert-file needs --key-file"),
        (&["--address", &https, "--key-file", &key], 2, "--key-file needs --cert-file"),
        (&["--address", &https, "--ca-file", "none.pem"], 2, "--ca-file none.pem can't be read"),
        (&["--address", &https, "--ca-file", &key], 2, "contains no certificate; give PEM"),
        (&["--address", &https, "--cert-file", &certificate, "--key-file", &of_stranger], 2, "is not the key of"),
    ] {
        let (code, printed) = status(args).await;
        assert_eq!(code, expected, "{args:?}: {printed}");
        assert!(printed.contains(remedy), "{args:?}: {printed}");
    }
    // The machine listens on it as well, and the certificate is for another name.
    if TcpStream::connect(elsewhere.trim_start_matches("https://")).await.is_ok() {
        let (_, printed) = status(&["--address", &elsewhere, "--ca-file", &ca]).await;
        assert!(printed.contains("not valid for name"), "{printed}");
    }
    let log = fs::read_to_string(plain.path("log")).unwrap();
    assert!(log.contains("a client speaks TLS to an address without TLS"), "{log}");
}

/// The configuration of a step of a fleet that moves to TLS.
fn step(home: &Home, mode: &str, has_tls: bool, insecure: bool) -> String {
    let path = |name| home.path(name).display().to_string();
    let (certificate, key, ca) = (path("service.pem"), path("service.key"), path("ca.pem"));
    let tls = format!("[server.tls]\ncert_file = '{certificate}'\nkey_file = '{key}'\nclient_ca_file = '{ca}'\n");
    format!(
        "[server]\ninsecure_listen_beyond_loopback = {insecure}\n\
         [access]\nmode = \"{mode}\"\n\
         [[access.grants]]\nwho = [\"cert:spiffe://fleet/*\"]\nrole = \"admin\"\n{}",
        if has_tls { &tls } else { "" }
    )
}

#[tokio::test]
async fn a_fleet_moves_to_tls_client_by_client() {
    let (home, authority, fleet) = (Home::new(), Authority::new("fleet"), Fleet::start().await);
    authority.service().write(&home.path(""), "service");
    authority.write(home.path("ca.pem"));
    let me = authority.client("spiffe://fleet/me");
    let tls = || authority.trusted().identity(me.identity());
    let args = ["--config".to_owned(), home.path("orchestrator.toml").display().to_string()];
    let home = home.with_args(args);
    let configure = |mode, has_tls, insecure| {
        fs::write(home.path("orchestrator.toml"), step(&home, mode, has_tls, insecure)).unwrap();
    };
    configure("off", false, false);
    let service = home.serve().await;
    let mut plain = service.client().await;
    plain.register(registration("a", fleet.endpoint())).await.unwrap();
    assert_eq!((plain.run().await.unwrap().cycle_id, plain.status().await.unwrap().insecure), (1, false));
    assert!(service.stop().await.success());

    // Without the flag, an address with TLS takes no other clients.
    configure("dry_run", true, false);
    let service = home.serve().await;
    assert!(service.client().await.status().await.is_err());
    assert!(service.stop().await.success());

    configure("dry_run", true, true);
    let service = home.serve().await;
    let (mut plain, mut moved) = (service.client().await, service.client_with(tls()).await.unwrap());
    assert_eq!(plain.run().await.unwrap().cycle_id, 2);
    assert_eq!(moved.run().await.unwrap().cycle_id, 3);
    assert!(plain.status().await.unwrap().insecure && moved.status().await.unwrap().insecure);
    let (code, printed) = orchestrator(None, &["status", "--address", &format!("http://{}", service.address())]).await;
    assert!(code == 0 && printed.contains("INSECURE"), "{printed}");
    let log = home.logged("a client speaks without TLS, which access.mode = \"enforce\" will refuse", 1).await;
    assert!(log.contains("other machines may be able to use this service without any right"), "{log}");
    let ca = home.path("ca.pem").display().to_string();
    for scheme in ["http", "https"] {
        let url = format!("{scheme}://127.0.0.1:{}/api/status", service.admin().port());
        let (code, printed) = run_with("curl", &["--silent", "--show-error", "--cacert", &ca, &url]).await;
        assert!(code == 0 && printed.contains("\"insecure\":true"), "{scheme}: {printed}");
    }
    drop(moved);
    assert!(service.stop().await.success());

    configure("enforce", true, false);
    let service = home.serve().await;
    assert!(service.client().await.status().await.is_err(), "a client without TLS");
    let mut moved = service.client_with(tls()).await.unwrap();
    assert_eq!(moved.run().await.unwrap().cycle_id, 4);
    let cycles: Vec<_> = moved.history().await.unwrap().into_iter().map(|it| decode(it).cycle_id).collect();
    assert_eq!((cycles, moved.status().await.unwrap().insecure), (vec![1, 2, 3, 4], false));
    assert_eq!(fleet.runs("a").len(), 4);
}

// ---------------------------------------------------------------------------------------------------------------
// Silence

#[tokio::test]
async fn five_hundred_silent_sockets_are_gone_after_ten_seconds_and_keep_nobody_out() {
    /// The beginning of a handshake: a record of 512 bytes, of which nothing follows.
    const BEGUN: [u8; 6] = [22, 3, 1, 2, 0, 1];
    let secure = Secure::with(&[]);
    let service = secure.home.serve().await;
    let mut silent = JoinSet::new();
    for number in 0..500 {
        let mut socket = TcpStream::connect(service.address()).await.unwrap();
        silent.spawn(async move {
            if number % 2 == 0 {
                socket.write_all(&BEGUN).await.unwrap();
            }
            // It is closed or reset.
            let _ = socket.read_to_end(&mut Vec::new()).await;
        });
    }
    let mut healthy = service.client_with(secure.authority.trusted()).await.unwrap();
    healthy.status().await.unwrap();
    assert_eq!(silent.len(), 500);
    assert!(silent.try_join_next().is_none(), "they had their time");
    patiently("silent connections to end", silent.join_all()).await;
    healthy.status().await.unwrap();
}

// ---------------------------------------------------------------------------------------------------------------
// The files

#[tokio::test]
async fn renewed_files_are_used_and_open_connections_live_on() {
    let secure = Secure::with(&[]);
    let service = secure.home.serve().await;
    let mut client = service.client_with(secure.authority.trusted()).await.unwrap();
    let mut watch = client.watch_after(0).await.unwrap();
    secure.shown(&service, &secure.issued.certificate).await;

    let renewed = secure.authority.service();
    renewed.write(&secure.directory(), "service");
    secure.shown(&service, &renewed.certificate).await;

    // A certificate whose key is another one.
    let other = secure.authority.service();
    fs::write(secure.home.path("service.pem"), &other.certificate).unwrap();
    let log = secure.home.logged("the earlier ones stay in use", 1).await;
    assert!(log.contains("service.key is not the key of the certificate in server.tls.cert_file"), "{log}");
    assert_eq!(openssl::shown(service.address()).await, renewed.certificate);

    // One that has expired.
    let expired = secure.authority.service_with(|it| it.not_after = date_time_ymd(2020, 1, 1));
    expired.write(&secure.directory(), "service");
    secure.home.logged("service.pem has expired at 2020-01-01T00:00:00Z", 1).await;
    assert_eq!(openssl::shown(service.address()).await, renewed.certificate);

    other.write(&secure.directory(), "service");
    secure.shown(&service, &other.certificate).await;
    client.run().await.unwrap();
    next_recorded(&mut watch).await;
}

#[tokio::test]
async fn files_behind_links_as_kubernetes_makes_them_are_used_when_the_link_moves() {
    let secure = Secure::with(&[]);
    let directory = secure.directory();
    let put = |version: &str, issued: &Issued| {
        fs::create_dir(directory.join(version)).unwrap();
        issued.write(&directory.join(version), "service");
        symlink(version, directory.join("..new")).unwrap();
        fs::rename(directory.join("..new"), directory.join("..data")).unwrap();
    };
    put("..1", &secure.issued);
    for name in ["service.pem", "service.key"] {
        fs::remove_file(directory.join(name)).unwrap();
        symlink(format!("..data/{name}"), directory.join(name)).unwrap();
    }
    let service = secure.home.serve().await;
    secure.shown(&service, &secure.issued.certificate).await;
    let renewed = secure.authority.service();
    put("..2", &renewed);
    secure.shown(&service, &renewed.certificate).await;
}

#[tokio::test]
async fn sighup_reads_the_files_again_even_if_the_configuration_is_wrong() {
    let secure = Secure::with(&[]);
    let secure = Secure { home: secure.home.with_config(""), ..secure };
    let service = secure.home.serve().await;
    fs::write(secure.home.path("orchestrator.toml"), "wrong = 1").unwrap();
    service.signal(Signal::HUP);
    secure.home.logged("the configuration is invalid", 1).await;
    secure.home.logged("the files of TLS were read again", 1).await;
}

#[tokio::test]
async fn clients_of_a_new_authority_are_accepted_once_its_file_has_it() {
    let secure = Secure::with(&["server.tls.client_auth=required"]);
    let service = secure.home.serve().await;
    let new = Authority::new("new");
    let identity = new.client("spiffe://fleet/process/a").identity();
    let ask = async || {
        let tls = secure.authority.trusted().identity(identity.clone());
        service.client_with(tls).await.unwrap().status().await
    };
    assert!(ask().await.is_err());
    fs::write(secure.home.path("ca.pem"), new.certificate.clone() + &secure.authority.certificate).unwrap();
    let accepted = async { while ask().await.is_err() {} };
    patiently("the new authority to be trusted", accepted).await;
}

#[tokio::test]
async fn files_that_cannot_be_used_keep_it_from_starting_and_are_named() {
    let secure = Secure::with(&[]);
    let directory = secure.directory();
    let other = secure.authority.service();
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nbm9uZQ==\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let not_a_certificate = "-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n";
    let break_file = |name: &str, content: Option<&str>| match content {
        Some(content) => fs::write(directory.join(name), content).unwrap(),
        None => fs::remove_file(directory.join(name)).unwrap(),
    };
    for (key, name, content, problem) in [
        (
            "key_file",
            "service.key",
            Some(other.key.as_str()),
            "is not the key of the certificate in server.tls.cert_file",
        ),
        ("key_file", "service.key", None, "can't be read: No such file"),
        ("key_file", "service.key", Some(""), "contains no private key; give PEM"),
        ("key_file", "service.key", Some(encrypted), "is encrypted; give a key without a passphrase"),
        ("cert_file", "service.pem", None, "can't be read: No such file"),
        ("cert_file", "service.pem", Some("none"), "contains no certificate; give PEM"),
        ("cert_file", "service.pem", Some(not_a_certificate), "can't be used: "),
        ("client_ca_file", "ca.pem", None, "can't be read: No such file"),
        ("client_ca_file", "ca.pem", Some(not_a_certificate), "can't be used: "),
    ] {
        secure.issued.write(&directory, "service");
        secure.authority.write(directory.join("ca.pem"));
        break_file(name, content);
        refused(&secure, &format!("server.tls.{key} {} {problem}", directory.join(name).display())).await;
    }
    secure.authority.write(directory.join("ca.pem"));
    let (_, key) = secure.issued.write(&directory, "service");
    fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    refused(&secure, &format!("server.tls.key_file {} has mode 0644", key.display())).await;
}

/// Neither the service starts nor `check` accepts it, and both say why.
async fn refused(secure: &Secure, problem: &str) {
    assert_eq!(secure.home.try_serve().await.err().unwrap().code(), Some(2), "{problem}");
    assert!(secure.home.log().contains(problem), "{problem}: {}", secure.home.log());
    let (code, printed) = check(&secure.home.path("")).await;
    assert_eq!(code, 2, "{printed}");
    assert!(printed.contains(problem), "{problem}: {printed}");
}

/// Checks the configuration of a service with these files.
async fn check(directory: &Path) -> (i32, String) {
    let set = [("cert_file", "service.pem"), ("key_file", "service.key"), ("client_ca_file", "ca.pem")]
        .map(|(key, name)| format!("server.tls.{key}={}", directory.join(name).display()));
    orchestrator(None, &["check", "--set", &set[0], "--set", &set[1], "--set", &set[2]]).await
}

#[tokio::test]
async fn an_expired_certificate_does_not_keep_it_from_starting() {
    let secure = Secure::with(&[]);
    let expired = secure.authority.service_with(|it| it.not_after = date_time_ymd(2020, 1, 1));
    expired.write(&secure.directory(), "service");
    let service = secure.home.serve().await;
    let problem = "service.pem has expired at 2020-01-01T00:00:00Z";
    assert!(secure.home.log().contains(problem) && secure.home.log().contains("ERROR"), "{}", secure.home.log());
    let (code, printed) = check(&secure.directory()).await;
    assert_eq!(code, 0, "{printed}");
    assert!(printed.contains(problem), "{printed}");
    // Clients refuse it, and it can be replaced.
    assert!(service.client_with(secure.authority.trusted()).await.is_err());
    secure.issued.write(&secure.directory(), "service");
    secure.shown(&service, &secure.issued.certificate).await;
    service.client_with(secure.authority.trusted()).await.unwrap().status().await.unwrap();
}
