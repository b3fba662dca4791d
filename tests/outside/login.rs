//! Browsers that log in with a token, and their sessions.

use std::{collections::BTreeMap, fs};

use crate::common::{
    command::run_with,
    fleet::to_struct,
    http::{Answer, get, send, send_form, send_json, send_with_body},
    patiently,
    pki::Authority,
    service::{Home, Service, registration},
    tokens::{write_private, write_tokens},
};
use futures_util::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use orchestrator_core::{access::Token, config::tokens_text, model::Name, proto::orchestrator::v1 as pb};
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream};

const GRANTS: &str = r#"
[[access.grants]]
who = ["token:viewer", "cert:spiffe://fleet/*"]
role = "viewer"
subsystems = ["*"]
[[access.grants]]
who = ["token:monitor"]
role = "monitor"
[[access.grants]]
who = ["token:auditor"]
role = "auditor"
subsystems = ["*"]
[[access.grants]]
who = ["token:admin"]
role = "admin"
"#;

/// A service whose callers need tokens.
struct Stage {
    home: Home,
    service: Service,
    texts: BTreeMap<String, String>,
}

impl Stage {
    async fn new() -> Self {
        Self::with("[access]\nmode = \"enforce\"", |_| String::new()).await
    }

    /// In this mode, with a token for each name, and these further settings.
    async fn with(mode: &str, settings: impl FnOnce(&Home) -> String) -> Self {
        let home = Home::new().in_memory();
        let tokens = home.path("tokens.toml");
        let created = write_tokens(&tokens, &["viewer", "monitor", "auditor", "admin"]);
        let texts = created.into_iter().map(|(name, (_, text))| (name, text)).collect();
        let config = format!("{mode}\ntokens_file = '{}'\n{GRANTS}{}", tokens.display(), settings(&home));
        let home = home.with_config(&config);
        let service = home.serve().await;
        Self { home, service, texts }
    }

    /// Replaces the file of tokens, and waits until it was read for this number of times.
    async fn write(&self, tokens: &str, times: usize) {
        let new = self.home.path("new.toml");
        write_private(&new, tokens);
        fs::rename(new, self.home.path("tokens.toml")).unwrap();
        self.home.logged("reloaded", times).await;
    }

    fn tokens(&self) -> String {
        fs::read_to_string(self.home.path("tokens.toml")).unwrap()
    }

    /// The name and the port of the admin address, as browsers say it.
    fn host(&self) -> String {
        format!("localhost:{}", self.service.admin().port())
    }

    /// Sends a form from a page of this address, or of another one, with this cookie.
    async fn post(&self, path: &str, origin: &str, cookie: &str, form: &str) -> Answer {
        let headers = [format!("Host: {}", self.host()), format!("Origin: {origin}"), format!("Cookie: {cookie}")];
        let headers: Vec<_> = headers.iter().map(String::as_str).collect();
        send_form(self.service.admin(), path, &headers, form).await
    }

    /// Registers the subsystem `a` in this phase, with the token of this name.
    async fn register_as(&self, name: &str, phase: i32) -> Result<(), tonic::Status> {
        let mut registered = registration("a", "http://127.0.0.1:1");
        registered.phase = phase;
        registered.parameters = to_struct(&json!({ "key": "x" }));
        let request = pb::RegisterSubsystemRequest { registration: Some(registered), lease: None };
        let mut request = tonic::Request::new(request);
        let bearer = format!("Bearer {}", self.texts[name]);
        request.metadata_mut().insert("authorization", bearer.parse().unwrap());
        self.service.client().await.register_subsystem(request).await.map(|_| ())
    }

    async fn log_in(&self, form: &str) -> Answer {
        self.post("/login", &format!("http://{}", self.host()), "", form).await
    }

    /// The cookie of a session of this token.
    async fn session(&self, token: &str) -> String {
        let answer = self.log_in(&format!("token={token}")).await;
        assert_eq!((answer.status, answer.header("location")), (303, Some("/")), "{}", answer.head);
        let cookie = answer.header("set-cookie").unwrap();
        cookie.split(';').next().unwrap().to_owned()
    }

    /// Requests a path as a script of a browser with this cookie.
    async fn get(&self, path: &str, cookie: &str) -> Answer {
        let headers = ["Host: localhost", "Accept: */*", &format!("Cookie: {cookie}")];
        send(self.service.admin(), &format!("GET {path}"), &headers).await
    }

    /// Requests a path as a browser that shows it.
    async fn visit(&self, path: &str, cookie: &str) -> Answer {
        let accept = "Accept: text/html,application/xhtml+xml,*/*;q=0.8";
        let headers = ["Host: localhost", accept, &format!("Cookie: {cookie}")];
        send(self.service.admin(), &format!("GET {path}"), &headers).await
    }
}

/// The reason for which a stream of events ends.
async fn refused(mut events: Answer) -> String {
    while events.line().await != "event: refused" {}
    let data = events.line().await;
    let error: serde_json::Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    error["error"]["reason"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_browser_without_a_credential_is_led_to_the_login() {
    let stage = Stage::new().await;
    for path in ["/", "/app.js", "/no/such/path"] {
        let answer = stage.visit(path, "").await;
        assert_eq!((answer.status, answer.header("location")), (303, Some("/login")), "{path}");
        assert_eq!(stage.get(path, "").await.status, 401, "a script of a page at {path}");
    }
    for path in ["/api/status", "/api/events", "/api/audit", "/api/whoami", "/metrics"] {
        assert_eq!(stage.visit(path, "").await.status, 401, "{path}");
    }
    let page = stage.visit("/login", "").await;
    assert_eq!(page.status, 200);
    let policy = page.header("content-security-policy").unwrap().to_owned();
    assert!(policy.contains("form-action 'self'") && policy.contains("default-src 'none'"), "{policy}");
    // With another policy, browsers send no origin.
    assert_eq!(page.header("referrer-policy"), Some("same-origin"));
    let page = page.text().await;
    assert!(page.contains("<form method=\"post\">") && !page.contains("<script"), "{page}");
    let assets = page.split('"').filter(|text| text.starts_with('/') && *text != "/");
    for path in assets {
        assert_eq!(stage.get(path, "").await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn a_session_is_its_token_until_it_is_logged_out() {
    let stage = Stage::new().await;
    let port = stage.service.admin().port();
    let answer = stage.log_in(&format!("token=+{}%0A", stage.texts["viewer"])).await;
    let cookie = answer.header("set-cookie").unwrap_or_else(|| panic!("{}", answer.head)).to_owned();
    let (pair, flags) = cookie.split_once("; ").unwrap();
    assert_eq!((answer.status, flags), (303, "Path=/; HttpOnly; SameSite=Strict"));
    let secret = pair.strip_prefix(&format!("orc-{port}=")).unwrap();
    assert_eq!(secret.len(), 64);

    assert_eq!(stage.visit("/", pair).await.status, 200);
    let who = stage.get("/api/whoami", pair).await.json().await;
    assert_eq!((&who["identity"], &who["mode"]), (&"token:viewer".into(), &"ACCESS_MODE_ENFORCE".into()));
    let expires_at: Timestamp = who["expiresAt"].as_str().unwrap().parse().unwrap();
    let lasts = expires_at.duration_since(Timestamp::now());
    assert!(SignedDuration::from_hours(11) < lasts && lasts <= SignedDuration::from_hours(12), "{lasts}");
    // It has the rights of the token, and no other ones.
    assert_eq!(stage.get("/metrics", pair).await.status, 403);
    assert_eq!(stage.get("/api/status?includeSnapshots=true", pair).await.status, 403);
    let bad = ["Host: localhost", "Authorization: Bearer orc_x", &format!("Cookie: {pair}")];
    let bad = send(stage.service.admin(), "GET /api/status", &bad).await;
    assert_eq!(bad.status, 401, "a bad token gives way to the session");

    let own = format!("http://{}", stage.host());
    let (another, events) = (stage.session(&stage.texts["admin"]).await, stage.get("/api/events", pair).await);
    assert_eq!(events.status, 200);
    let answer = stage.post("/logout", &own, pair, "").await;
    assert_eq!((answer.status, answer.header("location")), (303, Some("/login")));
    assert!(answer.header("set-cookie").unwrap().contains("Max-Age=0"), "{}", answer.head);
    assert_eq!(refused(events).await, "CREDENTIAL_INVALID");
    assert_eq!(stage.get("/api/status", pair).await.json().await["error"]["reason"], "CREDENTIAL_INVALID");
    let led = stage.visit("/", pair).await;
    assert!(led.status == 303 && led.header("set-cookie").unwrap().contains("Max-Age=0"), "{}", led.head);
    assert_eq!(stage.get("/api/status", &another).await.status, 200, "another session has ended");

    // A further login of the same browser ends its session.
    let again = stage.post("/login", &own, &another, &format!("token={}", stage.texts["viewer"])).await;
    assert_eq!(again.status, 303);
    assert_eq!(stage.get("/api/status", &another).await.status, 401);
    let log = fs::read_to_string(stage.home.path("log")).unwrap();
    assert!(!log.contains(secret) && stage.texts.values().all(|text| !log.contains(&text[21..])), "{log}");
}

#[tokio::test]
async fn parameters_are_shown_to_sessions_that_may_see_them() {
    let stage = Stage::new().await;
    stage.register_as("admin", 0).await.unwrap();
    for (name, sees) in [("viewer", false), ("admin", true)] {
        let cookie = stage.session(&stage.texts[name]).await;
        let subsystem = stage.get("/api/subsystems/a", &cookie).await.json().await["subsystem"].clone();
        assert_eq!(subsystem["registration"]["parameters"]["key"] == "x", sees, "{name}: {subsystem}");
        assert_eq!(subsystem["redacted"] == true, !sees, "{name}: {subsystem}");
    }
}

#[tokio::test]
async fn audit_events_are_shown_to_sessions_that_may_list_them() {
    let stage = Stage::new().await;
    stage.register_as("admin", 0).await.unwrap();
    stage.register_as("viewer", 1).await.unwrap_err();
    let refused = stage.get("/api/audit", &stage.session(&stage.texts["viewer"]).await).await;
    assert_eq!(refused.status, 403);
    let error = refused.json().await["error"].clone();
    assert_eq!((&error["reason"], &error["metadata"]["rpc"]), (&"NOT_ALLOWED".into(), &"ListAuditEvents".into()));
    for name in ["auditor", "admin"] {
        let cookie = stage.session(&stage.texts[name]).await;
        let page = stage.get("/api/audit?kind=AUDIT_KIND_CHANGE&caller=token:admin", &cookie).await.json().await;
        let events = page["events"].as_array().unwrap();
        assert_eq!(events.len(), 1, "{name}: {page}");
        let event = &events[0]["event"];
        assert_eq!(
            (&event["rpc"], &event["targets"], &event["decision"], &event["code"], &event["count"]),
            (&"RegisterSubsystem".into(), &json!(["a"]), &"DECISION_ALLOWED".into(), &"OK".into(), &"1".into()),
            "{name}: {page}"
        );
        assert_eq!(stage.get("/api/audit?since=yesterday", &cookie).await.status, 400, "{name}");
    }
}

#[tokio::test]
async fn audit_events_are_filtered_and_read_page_by_page() {
    let stage = Stage::with("[access]\nmode = \"dry_run\"", |_| String::new()).await;
    for (name, phase) in [("admin", 0), ("viewer", 1), ("admin", 2)] {
        stage.register_as(name, phase).await.unwrap();
    }
    let list = async |query: &str| get(stage.service.admin(), &format!("/api/audit?{query}")).await.json().await;
    let callers = |page: &serde_json::Value| -> Vec<String> {
        let events = page["events"].as_array().cloned().unwrap_or_default();
        events.iter().map(|event| event["event"]["caller"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(callers(&list("").await), ["token:admin", "token:viewer", "token:admin"]);
    let denied = list("denied=true").await;
    assert_eq!(callers(&denied), ["token:viewer"]);
    assert_eq!(denied["events"][0]["event"]["decision"], "DECISION_WOULD_BE_DENIED");
    assert_eq!(callers(&list("caller=token:admin").await).len(), 2);
    assert!(callers(&list("since=2999-01-01T00:00:00Z").await).is_empty());
    let first = list("pageSize=2").await;
    assert_eq!(callers(&first), ["token:admin", "token:viewer"]);
    let second = list(&format!("pageSize=2&pageToken={}", first["nextPageToken"].as_str().unwrap())).await;
    assert_eq!((callers(&second), &second["nextPageToken"]), (vec!["token:admin".to_owned()], &json!(null)));
}

#[tokio::test]
async fn a_login_that_fails_says_why() {
    let stage = Stage::new().await;
    let past = Timestamp::now() - SignedDuration::from_secs(1);
    let (expired, of_expired) = Token::create(Name::parse("viewer").unwrap(), Some(past)).unwrap();
    stage.write(&(stage.tokens() + &tokens_text(&[expired])), 1).await;
    // The right id with another secret, and a token that nobody has, look the same.
    let forged = format!("{}{}", &stage.texts["viewer"][..21], "0".repeat(64));
    let (_, unknown) = Token::create(Name::parse("viewer").unwrap(), None).unwrap();
    for (form, status, why) in [
        (String::new(), 401, "Enter a token."),
        ("token=++".into(), 401, "Enter a token."),
        (format!("other={}", stage.texts["viewer"]), 401, "Enter a token."),
        (format!("token={forged}"), 401, "is not valid: it is unknown, or it was removed or revoked."),
        (format!("token={unknown}"), 401, "is not valid: it is unknown, or it was removed or revoked."),
        ("token=<b>&".into(), 401, "is not valid"),
        (format!("token={of_expired}"), 401, "This token has expired."),
        (format!("token={}", stage.texts["monitor"]), 403, "token:monitor may not call Login; it needs a grant"),
        (format!("token={}", "0".repeat(20_000)), 413, "The form is longer than 16384 bytes."),
    ] {
        let answer = stage.log_in(&form).await;
        assert_eq!((answer.status, answer.header("set-cookie")), (status, None), "{form}");
        let page = answer.text().await;
        assert!(page.contains("role=\"alert\"") && page.contains(why), "{form}: {page}");
        assert!(!page.contains("<b>"), "{page}");
    }
    let bearer = format!("Authorization: Bearer {}", stage.texts["admin"]);
    let metrics = send(stage.service.admin(), "GET /metrics", &["Host: localhost", &bearer]).await.text().await;
    for (code, count) in [("UNAUTHENTICATED", 7), ("PERMISSION_DENIED", 1)] {
        let line = format!("orchestrator_calls_total{{server=\"admin\",rpc=\"Login\",code=\"{code}\"}} {count}");
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
    let log = stage.home.logged("a call was denied", 1).await;
    assert!(!log.contains(&of_expired[21..]), "{log}");
}

/// A cookie is sent by the browser whatever page has caused a request: a page of another port of this host, too.
#[tokio::test]
async fn a_cookie_authorizes_nothing_that_another_page_asks_for() {
    let stage = Stage::new().await;
    let cookie = stage.session(&stage.texts["admin"]).await;
    let (host, form) = (stage.host(), format!("token={}", stage.texts["admin"]));
    let other_port = format!("http://localhost:{}", stage.service.address().port());
    let longer = format!("http://{host}.evil.example");
    for origin in ["http://evil.example", "null", "", &other_port, &longer] {
        for path in ["/login", "/logout", "/api/cycles"] {
            let answer = stage.post(path, origin, &cookie, &form).await;
            assert_eq!((answer.status, answer.header("set-cookie")), (403, None), "{path} from {origin:?}");
        }
    }
    let with_cookie = format!("Cookie: {cookie}");
    let bare = send_form(stage.service.admin(), "/logout", &["Host: localhost", &with_cookie], "").await;
    assert_eq!(bare.status, 403, "a form of no origin");
    let bare = send_json(stage.service.admin(), "POST /api/cycles", &[&with_cookie], "{}").await;
    assert_eq!(bare.status, 403, "a change of no origin");
    assert_eq!(stage.visit("/logout", &cookie).await.status, 405);
    let status = stage.get("/api/status", &cookie).await;
    assert_eq!(status.status, 200, "the session has ended");
    assert_eq!(status.json().await["status"]["totalCycles"], serde_json::Value::Null);
}

#[tokio::test]
async fn a_session_changes_what_its_token_may_from_a_page_of_this_address() {
    let stage = Stage::new().await;
    stage.register_as("admin", 0).await.unwrap();
    let suspend = async |cookie: &str| {
        let headers = [format!("Host: {}", stage.host()), format!("Origin: http://{}", stage.host())];
        let cookie = format!("Cookie: {cookie}");
        let headers = [&headers[0], &headers[1], &cookie, "Content-Type: application/json", "Content-Length: 2"];
        send_with_body(stage.service.admin(), "POST /api/subsystems/a/suspend", &headers, "{}").await
    };
    let refused = suspend(&stage.session(&stage.texts["viewer"]).await).await;
    assert_eq!((refused.status, &refused.json().await["error"]["reason"]), (403, &"NOT_ALLOWED".into()));
    let cookie = stage.session(&stage.texts["admin"]).await;
    assert_eq!(suspend(&cookie).await.json().await["subsystem"]["suspended"], true);
    // It is in the audit, by its caller.
    let page = stage.get("/api/audit?kind=AUDIT_KIND_CHANGE&rpc=SuspendSubsystem", &cookie).await.json().await;
    let event = &page["events"][0]["event"];
    assert_eq!((&event["caller"], &event["targets"]), (&"token:admin".into(), &json!(["a"])), "{page}");
    let log_out = stage.post("/logout", &format!("http://{}", stage.host()), &cookie, "").await;
    assert_eq!((log_out.status, suspend(&cookie).await.status), (303, 401));
}

#[tokio::test]
async fn a_session_ends_with_its_token() {
    let stage = Stage::new().await;
    let expires_at = Timestamp::now() + SignedDuration::from_secs(5);
    let (token, text) = Token::create(Name::parse("viewer").unwrap(), Some(expires_at)).unwrap();
    stage.write(&(stage.tokens() + &tokens_text(&[token])), 1).await;
    let expiring = stage.session(&text).await;
    let removed = stage.session(&stage.texts["admin"]).await;
    let (of_expiring, of_removed) =
        (stage.get("/api/events", &expiring).await, stage.get("/api/events", &removed).await);
    assert_eq!(refused(of_expiring).await, "CREDENTIAL_EXPIRED");
    assert!(Timestamp::now() >= expires_at);
    assert_eq!(stage.get("/api/status", &expiring).await.status, 401);

    let others = stage.tokens();
    stage.write("", 2).await;
    assert_eq!(refused(of_removed).await, "CREDENTIAL_INVALID");
    // The session does not come back with its token.
    stage.write(&others, 3).await;
    assert_eq!(stage.get("/api/status", &removed).await.status, 401);
    stage.session(&stage.texts["admin"]).await;
}

#[tokio::test]
async fn with_tls_the_cookie_is_sent_over_tls_only_and_certificates_still_work() {
    let fleet = Authority::new("fleet");
    let stage = Stage::with("[access]\nmode = \"enforce\"", |home| {
        fleet.service().write(&home.path(""), "service");
        fleet.client("spiffe://fleet/me").write(&home.path(""), "me");
        fleet.write(home.path("ca.pem"));
        let path = |name| home.path(name).display().to_string();
        let (certificate, key, ca) = (path("service.pem"), path("service.key"), path("ca.pem"));
        format!(
            "[admin.tls]\ncert_file = '{certificate}'\nkey_file = '{key}'\nclient_ca_file = '{ca}'\n\
             client_auth = \"optional\"\n"
        )
    })
    .await;
    let (port, ca) = (stage.service.admin().port(), stage.home.path("ca.pem"));
    let curl = async |path: &str, args: &[&str]| {
        let url = format!("https://localhost:{port}{path}");
        let common = ["--silent", "--show-error", "--include", "--max-time", "30", "--cacert", ca.to_str().unwrap()];
        let resolve = format!("localhost:{port}:127.0.0.1");
        let (exit, text) = run_with("curl", &[&common[..], &["--resolve", &resolve, &url], args].concat()).await;
        assert_eq!(exit, 0, "{text}");
        text
    };
    let form = format!("token={}", stage.texts["viewer"]);
    let log_in = async |scheme: &str| {
        let origin = format!("Origin: {scheme}://localhost:{port}");
        curl("/login", &["--data", &form, "--header", &origin]).await
    };
    assert!(log_in("http").await.starts_with("HTTP/1.1 403"), "a page that came in clear may send forms");
    let answer = log_in("https").await;
    let cookie =
        answer.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap_or_else(|| panic!("{answer}"));
    let (pair, flags) = cookie.trim().split_once("; ").unwrap();
    assert!(pair.starts_with(&format!("__Host-orc-{port}=")), "{cookie}");
    assert_eq!(flags, "Path=/; HttpOnly; SameSite=Strict; Secure");
    let who = curl("/api/whoami", &["--cookie", pair]).await;
    assert!(who.contains("\"token:viewer\""), "{who}");
    let path = |name| stage.home.path(name).display().to_string();
    let (certificate, key) = (path("me.pem"), path("me.key"));
    let certified = ["--cert", &certificate, "--key", &key];
    let who = curl("/api/whoami", &certified).await;
    assert!(who.contains("\"cert:spiffe://fleet/me\""), "{who}");
    assert!(
        curl("/", &[&certified[..], &["--header", "Accept: text/html"]].concat()).await.starts_with("HTTP/1.1 200")
    );
    let empty = curl(
        "/login",
        &[&certified[..], &["--data", "token="], &["--header", &format!("Origin: https://localhost:{port}")]].concat(),
    )
    .await;
    assert!(empty.starts_with("HTTP/1.1 401"), "a login without a token: {empty}");
}

#[tokio::test]
async fn forms_that_never_end_keep_nobody_out() {
    /// The most connections of the admin address.
    const MAX: usize = 256;
    let stage = Stage::new().await;
    let host = stage.host();
    let mut held = Vec::new();
    for _ in 0..MAX {
        let mut connection = TcpStream::connect(stage.service.admin()).await.unwrap();
        let head = format!(
            "POST /login HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Length: 9\r\n\
             Content-Type: application/x-www-form-urlencoded\r\n\r\ntoken"
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        held.push(connection);
    }
    assert_eq!(patiently("an answer", stage.visit("/login", "")).await.status, 200);
    // Not because these forms took too long.
    let mut said = [0; 1024];
    assert!(!held.iter().any(|connection| connection.try_read(&mut said).is_ok_and(|bytes| bytes > 0)));
}

#[tokio::test]
async fn a_login_never_ends_a_session_of_somebody_else() {
    const OF_ONE: usize = 100;
    const AT_ONCE: usize = 16;
    const ALL: usize = 1024;
    let names: Vec<_> = (0..ALL / OF_ONE).map(|number| format!("n{number}")).collect();
    let mut texts = BTreeMap::new();
    let stage = Stage::with("[access]\nmode = \"enforce\"", |home| {
        let names = names.iter().map(String::as_str).chain(["viewer", "admin", "late"]).collect::<Vec<_>>();
        texts = write_tokens(&home.path("tokens.toml"), &names);
        "[[access.grants]]\nwho = [\"token:n*\", \"token:late\"]\nrole = \"admin\"\n".to_owned()
    })
    .await;
    let session = async |name: &str| stage.session(&texts[name].1).await;
    let is_open = async |cookie: &str| stage.get("/api/whoami", cookie).await.status == 200;
    let (admin, viewer) = (session("admin").await, session("viewer").await);
    let others: Vec<String> = stream::iter(names.iter().flat_map(|name| std::iter::repeat_n(name, OF_ONE)))
        .map(|name| session(name))
        .buffered(AT_ONCE)
        .collect()
        .await;
    let more = session("n0").await;
    // One of the first ones is the oldest.
    let mut open = 0;
    for cookie in &others[..AT_ONCE] {
        open += usize::from(is_open(cookie).await);
    }
    assert!(open == AT_ONCE - 1 && is_open(&more).await, "{open}");
    for _ in others.len() + 2..ALL {
        session("viewer").await;
    }
    // All are taken: nobody's session ends but one's own.
    let late = stage.log_in(&format!("token={}", texts["late"].1)).await;
    assert_eq!((late.status, late.header("set-cookie")), (429, None));
    let page = late.text().await;
    assert!(page.contains("all 1024 sessions are taken by others; try again when somebody has logged out"), "{page}");
    assert!(is_open(&admin).await && is_open(&viewer).await);
    let again = session("viewer").await;
    assert!(
        is_open(&again).await && !is_open(&viewer).await && is_open(&admin).await && is_open(&others[OF_ONE]).await
    );
}

#[tokio::test]
async fn nobody_needs_to_log_in_where_rights_are_not_enforced() {
    let stage = Stage::with("[access]\nmode = \"off\"", |_| String::new()).await;
    assert_eq!(stage.visit("/", "").await.status, 200);
    for answer in [stage.visit("/login", "").await, stage.log_in("token=x").await] {
        assert_eq!((answer.status, answer.header("location"), answer.header("set-cookie")), (303, Some("/"), None));
    }
    let who = get(stage.service.admin(), "/api/whoami").await.json().await;
    assert_eq!((&who["identity"], &who["mode"]), (&"nobody".into(), &"ACCESS_MODE_OFF".into()));

    let stage = Stage::with("[access]\nmode = \"dry_run\"", |_| String::new()).await;
    assert_eq!(stage.visit("/", "").await.status, 200);
    let cookie = stage.session(&stage.texts["viewer"]).await;
    assert_eq!(stage.get("/api/whoami", &cookie).await.json().await["identity"], "token:viewer");
    assert_eq!(stage.log_in("token=x").await.status, 401, "a session of no token");
    patiently("the end of the service", stage.service.stop()).await;
}
