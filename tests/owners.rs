//! The owners of registrations: callers with tokens and with certificates that register the same names.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
};

use common::{
    patiently,
    pki::Authority,
    service::{Client, Home, Service, reason, registration},
};
use orchestrator_core::{access::Token, config::tokens_text, model::Name, proto::orchestrator::v1 as pb};
use tonic::{Code, Request, Status};

const ENDPOINT: &str = "http://127.0.0.1:1";

/// Registrars `a` and `b` by each kind of credential, which have the names `shared-…` in common; an operator, a viewer,
/// and an administrator.
const GRANTS: &str = r#"
[[access.grants]]
who = ["token:a", "token:b", "cert:spiffe://fleet/*"]
role = "registrar"
subsystems = ["a", "shared-*"]
reads = ["shared-*"]
phases = [0, 9]
endpoints = ["http://127.0.0.1:*"]
[[access.grants]]
who = ["token:viewer"]
role = "viewer"
subsystems = ["*"]
[[access.grants]]
who = ["token:admin"]
role = "admin"
"#;

/// A service with TLS over a database, and the credentials of its callers.
struct Stage {
    home: Home,
    fleet: Authority,
    service: Option<Service>,
    tokens: BTreeMap<&'static str, String>,
}

/// The kinds of credentials, as identities begin.
const KINDS: [&str; 2] = ["token:", "cert:spiffe://fleet/"];

impl Stage {
    async fn new(mode: &str) -> Self {
        let (home, fleet) = (Home::new(), Authority::new("fleet"));
        fleet.service().write(&home.path(""), "service");
        fleet.write(home.path("clients.pem"));
        let (mut tokens, mut texts) = (Vec::new(), BTreeMap::new());
        for name in ["a", "b", "viewer", "admin"] {
            let (token, text) = Token::create(Name::parse(name).unwrap(), None).unwrap();
            tokens.push(token);
            texts.insert(name, text);
        }
        let file = home.path("tokens.toml");
        fs::write(&file, tokens_text(&tokens)).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        let path = home.path("orchestrator.toml").display().to_string();
        let home = home.with_args(["--config".to_owned(), path]);
        let mut stage = Self { home, fleet, service: None, tokens: texts };
        stage.restart(mode).await;
        stage
    }

    /// Ends the service, and starts it in this mode.
    async fn restart(&mut self, mode: &str) {
        if let Some(service) = self.service.take() {
            assert!(service.stop().await.success());
        }
        self.configure(mode, "");
        self.service = Some(self.home.serve().await);
    }

    /// Replaces the configuration, which the service notices by itself.
    fn configure(&self, mode: &str, access: &str) {
        let [certificate, key, clients, tokens] = ["service.pem", "service.key", "clients.pem", "tokens.toml"]
            .map(|name| format!("'{}'", self.home.path(name).display()));
        let text = format!(
            "[server.tls]\ncert_file = {certificate}\nkey_file = {key}\nclient_ca_file = {clients}\n\
             [access]\nmode = \"{mode}\"\ntokens_file = {tokens}\n{access}\n{GRANTS}"
        );
        let new = self.home.path("new.toml");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.home.path("orchestrator.toml")).unwrap();
    }

    /// The caller with this identity, on a connection of its own.
    async fn caller(&self, identity: &str) -> Caller {
        let trusted = self.fleet.trusted();
        let (tls, token) = match identity.split_once(':').unwrap() {
            ("token", name) => (trusted, Some(format!("Bearer {}", self.tokens[name]))),
            (_, uri) => (trusted.identity(self.fleet.client(uri).identity()), None),
        };
        let client = self.service.as_ref().unwrap().client_with(tls).await.unwrap();
        Caller { client, token }
    }

    /// The registrars `a` and `b` with this kind of credential.
    async fn registrars(&self, kind: &str) -> [Caller; 2] {
        [self.caller(&format!("{kind}a")).await, self.caller(&format!("{kind}b")).await]
    }
}

struct Caller {
    client: Client,
    token: Option<String>,
}

impl Caller {
    fn asks<Q>(&self, request: Q) -> Request<Q> {
        let mut request = Request::new(request);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.parse().unwrap());
        }
        request
    }

    async fn register(&self, name: &str) -> Result<pb::RegisterSubsystemResponse, Status> {
        self.register_with(name, |_| {}).await
    }

    /// Registers a subsystem with a lease.
    async fn register_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut pb::RegisterSubsystemRequest),
    ) -> Result<pb::RegisterSubsystemResponse, Status> {
        let lease = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
        let mut request = pb::RegisterSubsystemRequest { registration: Some(registration(name, ENDPOINT)), lease };
        change(&mut request);
        Ok(self.client.clone().register_subsystem(self.asks(request)).await?.into_inner())
    }

    async fn register_all(&self, names: &[&str]) -> Result<pb::RegisterSubsystemsResponse, Status> {
        let registrations = names.iter().map(|name| registration(name, ENDPOINT)).collect();
        let request = pb::RegisterSubsystemsRequest { registrations, lease: None };
        Ok(self.client.clone().register_subsystems(self.asks(request)).await?.into_inner())
    }

    async fn unregister(&self, name: &str) -> Result<(), Status> {
        let request = pb::UnregisterSubsystemRequest { name: name.into() };
        self.client.clone().unregister_subsystem(self.asks(request)).await.map(drop)
    }

    async fn renew(&self, name: &str) -> Result<(), Status> {
        let request = pb::RenewLeaseRequest { name: name.into() };
        self.client.clone().renew_lease(self.asks(request)).await.map(drop)
    }

    async fn get(&self, name: &str) -> Result<pb::SubsystemStatus, Status> {
        let request = pb::GetSubsystemRequest { name: name.into(), ..Default::default() };
        Ok(self.client.clone().get_subsystem(self.asks(request)).await?.into_inner().subsystem.unwrap())
    }

    async fn owner(&self, name: &str) -> String {
        self.get(name).await.unwrap().owner
    }
}

/// The RPC and the target of a denied call.
fn denied<A: std::fmt::Debug>(answer: Result<A, Status>) -> (String, String) {
    let status = answer.unwrap_err();
    let reason = reason(&status);
    assert_eq!((status.code(), reason.why.as_str()), (Code::PermissionDenied, "NOT_ALLOWED"), "{status:?}");
    (reason.metadata["rpc"].clone(), reason.metadata["target"].clone())
}

/// Checks that this caller can't change `name` by any call.
async fn may_not_change(caller: &Caller, name: &str) {
    let of = |rpc: &str| (rpc.to_owned(), format!("subsystem {name}"));
    assert_eq!(denied(caller.register(name).await), of("RegisterSubsystem"));
    assert_eq!(denied(caller.register_all(&["shared-new", name]).await), of("RegisterSubsystems"));
    assert_eq!(denied(caller.renew(name).await), of("RenewLease"));
    assert_eq!(denied(caller.unregister(name).await), of("UnregisterSubsystem"));
    assert_eq!(caller.get("shared-new").await.unwrap_err().code(), Code::NotFound, "all or none");
}

#[tokio::test]
async fn a_registration_is_its_callers_own_also_after_a_restart() {
    let mut stage = Stage::new("enforce").await;
    for kind in KINDS {
        let [a, b] = stage.registrars(kind).await;
        let name = format!("shared-{}", kind.len());
        let registered = a.register(&name).await.unwrap();
        assert!(registered.created);
        assert_eq!(registered.subsystem.unwrap().owner, format!("{kind}a"));
        may_not_change(&b, &name).await;
        let message = b.register(&name).await.unwrap_err().message().to_owned();
        let expected = format!("{kind}a owns subsystem {name}; only its owner and administrators may change it");
        assert_eq!(message, expected);

        // Its grant covers neither of these.
        let of_a = |what: &str| ("RegisterSubsystem".to_owned(), what.to_owned());
        assert_eq!(denied(a.register("b").await), of_a("subsystem b"));
        let change = async |change: fn(&mut pb::Registration)| {
            denied(a.register_with("a", |it| change(it.registration.as_mut().unwrap())).await)
        };
        assert_eq!(change(|it| it.reads = vec!["x".into()]).await, of_a("input x of subsystem a"));
        assert_eq!(change(|it| it.critical = true).await, of_a("critical of subsystem a"));
        let endpoint = change(|it| it.endpoint = "http://10.0.0.1:1".into()).await;
        assert_eq!(endpoint, of_a("endpoint http://10.0.0.1:1 of subsystem a"));
    }
    stage.restart("enforce").await;
    for kind in KINDS {
        let [a, b] = stage.registrars(kind).await;
        let name = format!("shared-{}", kind.len());
        may_not_change(&b, &name).await;
        a.renew(&name).await.unwrap();
        assert!(!a.register(&name).await.unwrap().created);
        // Once it is removed, nobody owns it.
        a.unregister(&name).await.unwrap();
        assert!(b.register(&name).await.unwrap().created);
        assert_eq!(a.owner(&name).await, format!("{kind}b"));
        may_not_change(&a, &name).await;
    }
}

#[tokio::test]
async fn of_two_callers_that_register_a_new_name_at_once_one_owns_it() {
    let stage = Stage::new("enforce").await;
    let [a, b] = stage.registrars("token:").await;
    for i in 0..10 {
        let name = format!("shared-{i}");
        let names = [name.as_str()];
        let (by_a, by_b) = tokio::join!(a.register(&name), b.register_all(&names));
        let (owner, refused) = match (by_a.map(drop), by_b.map(drop)) {
            (Ok(()), refused) => ("token:a", refused),
            (refused, Ok(())) => ("token:b", refused),
            both => panic!("{both:?}"),
        };
        assert_eq!(denied(refused).1, format!("subsystem {name}"));
        assert_eq!(a.owner(&name).await, owner);
    }
}

#[tokio::test]
async fn a_registration_that_nobody_owns_goes_to_the_next_registrar() {
    let mut stage = Stage::new("off").await;
    let [a, b] = stage.registrars("token:").await;
    // Without enforcement, every caller may change all of it, as before.
    a.register("shared-1").await.unwrap();
    assert!(!b.register("shared-1").await.unwrap().created);
    assert_eq!(a.owner("shared-1").await, "");
    stage.restart("dry_run").await;
    let [a, b] = stage.registrars("token:").await;
    b.register("shared-1").await.unwrap();
    a.register("shared-1").await.unwrap();
    assert_eq!(a.owner("shared-1").await, "");

    stage.restart("enforce").await;
    let [a, b] = stage.registrars("token:").await;
    b.renew("shared-1").await.unwrap();
    assert_eq!(a.owner("shared-1").await, "", "to renew a lease is not to register");
    a.register_all(&["shared-1", "shared-2"]).await.unwrap();
    assert_eq!([a.owner("shared-1").await, a.owner("shared-2").await], ["token:a", "token:a"]);
    stage.restart("enforce").await;
    let [_, b] = stage.registrars("token:").await;
    assert_eq!(denied(b.register("shared-1").await).1, "subsystem shared-1");
}

#[tokio::test]
async fn an_administrator_changes_every_registration_and_its_owner_stays() {
    let stage = Stage::new("enforce").await;
    let [a, b] = stage.registrars("token:").await;
    let admin = stage.caller("token:admin").await;
    a.register("shared-1").await.unwrap();
    let changed = admin.register_with("shared-1", |it| it.registration.as_mut().unwrap().phase = 7).await.unwrap();
    let changed = changed.subsystem.unwrap();
    assert_eq!((changed.registration.unwrap().phase, changed.owner.as_str()), (7, "token:a"));
    admin.renew("shared-1").await.unwrap();
    a.register("shared-1").await.unwrap();

    // What an administrator makes is not for the taking.
    assert_eq!(admin.register("shared-2").await.unwrap().subsystem.unwrap().owner, "token:admin");
    assert_eq!(denied(a.register("shared-2").await).1, "subsystem shared-2");
    admin.unregister("shared-1").await.unwrap();
    b.register("shared-1").await.unwrap();
    assert_eq!(a.owner("shared-1").await, "token:b");
}

#[tokio::test]
async fn a_subsystem_whose_lease_has_ended_has_no_owner() {
    let stage = Stage::new("enforce").await;
    let [a, b] = stage.registrars("token:").await;
    let lease = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    a.register_with("shared-1", |it| it.lease = lease).await.unwrap();
    let expired = async {
        while b.register("shared-1").await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    patiently("the end of the lease", expired).await;
    assert_eq!(a.owner("shared-1").await, "token:b");
}
