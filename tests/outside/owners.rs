//! What belongs to a caller: its registrations, its cycles, the ids of its requests. Callers have tokens and
//! certificates.

use std::{collections::BTreeMap, fs};

use crate::common::{
    fleet::{Fleet, Run, to_struct},
    patiently,
    pki::Authority,
    service::{Client, Home, Service, decode, reason, registration},
    tokens::write_tokens,
};
use bytes::Bytes;
use orchestrator_core::{access::TokenId, proto::orchestrator::v1 as pb};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;
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
who = ["token:auditor"]
role = "auditor"
subsystems = ["*"]
[[access.grants]]
who = ["token:monitor"]
role = "monitor"
[[access.grants]]
who = ["token:operator"]
role = "operator"
subsystems = ["*"]
loops = ["*"]
[[access.grants]]
who = ["token:shared"]
role = "operator"
subsystems = ["shared-*"]
loops = ["*"]
[[access.grants]]
who = ["token:admin"]
role = "admin"
"#;

/// A service with TLS over a database, and the credentials of its callers.
struct Stage {
    home: Home,
    fleet: Authority,
    service: Option<Service>,
    tokens: BTreeMap<String, (TokenId, String)>,
}

/// The kinds of credentials, as identities begin.
const KINDS: [&str; 2] = ["token:", "cert:spiffe://fleet/"];

impl Stage {
    async fn new(mode: &str) -> Self {
        Self::at(Home::new(), mode).await
    }

    async fn at(home: Home, mode: &str) -> Self {
        let fleet = Authority::new("fleet");
        fleet.service().write(&home.path(""), "service");
        fleet.write(home.path("clients.pem"));
        let names = ["a", "b", "monitor", "viewer", "auditor", "operator", "shared", "admin"];
        let tokens = write_tokens(&home.path("tokens.toml"), &names);
        let path = home.path("orchestrator.toml").display().to_string();
        let home = home.with_args(["--config".to_owned(), path]);
        let mut stage = Self { home, fleet, service: None, tokens };
        stage.restart(mode).await;
        stage
    }

    /// Ends the service, and starts it in this mode.
    async fn restart(&mut self, mode: &str) {
        self.restart_with(mode, "").await;
    }

    /// The same, with these further settings of access.
    async fn restart_with(&mut self, mode: &str, access: &str) {
        if let Some(service) = self.service.take() {
            assert!(service.stop().await.success());
        }
        self.configure(mode, access);
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
            ("token", name) => (trusted, Some(format!("Bearer {}", self.tokens[name].1))),
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

    async fn update(
        &self,
        name: &str,
        path: &str,
        set: impl FnOnce(&mut pb::Registration),
    ) -> Result<pb::UpdateSubsystemResponse, Status> {
        let mut values = registration(name, "");
        set(&mut values);
        let update_mask = Some(prost_types::FieldMask { paths: vec![path.into()] });
        let request = pb::UpdateSubsystemRequest { registration: Some(values), update_mask, etag: String::new() };
        Ok(self.client.clone().update_subsystem(self.asks(request)).await?.into_inner())
    }

    async fn rename(&self, name: &str, new_name: &str) -> Result<pb::SubsystemStatus, Status> {
        let request = pb::RenameSubsystemRequest { name: name.into(), new_name: new_name.into(), etag: String::new() };
        Ok(self.client.clone().rename_subsystem(self.asks(request)).await?.into_inner().subsystem.unwrap())
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

    /// Runs a cycle of all.
    async fn run(&self) -> Result<pb::CycleTelemetry, Status> {
        self.run_as("").await
    }

    /// Runs a cycle of all, or finds that of an earlier request with this id.
    async fn run_as(&self, request_id: &str) -> Result<pb::CycleTelemetry, Status> {
        let request = self.asks(pb::RunCycleRequest { request_id: request_id.into(), ..Default::default() });
        Ok(decode(self.client.clone().run_cycle(request).await?.into_inner().telemetry))
    }

    /// Admits a cycle of all, and returns its number.
    async fn admit_as(&self, request_id: &str) -> u64 {
        let request = pb::RunCycleRequest { request_id: request_id.into(), r#async: true, ..Default::default() };
        self.client.clone().run_cycle(self.asks(request)).await.unwrap().into_inner().cycle_id
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
    assert_eq!(denied(caller.update(name, "phase", |it| it.phase = 1).await), of("UpdateSubsystem"));
    assert_eq!(denied(caller.rename(name, "shared-new").await), of("RenameSubsystem"));
    assert_eq!(denied(caller.renew(name).await), of("RenewLease"));
    assert_eq!(denied(caller.unregister(name).await), of("UnregisterSubsystem"));
    assert_eq!(caller.get("shared-new").await.unwrap_err().code(), Code::NotFound, "all or none");
}

#[tokio::test]
async fn a_new_name_needs_a_grant_for_both_names_and_keeps_the_owner() {
    let mut stage = Stage::new("enforce").await;
    let [a, b] = stage.registrars("token:").await;
    a.register("shared-1").await.unwrap();
    let of = |target: &str| ("RenameSubsystem".to_owned(), target.to_owned());
    assert_eq!(denied(a.rename("shared-1", "b").await), of("subsystem b"));
    assert_eq!(denied(a.rename("b", "shared-2").await), of("subsystem b"));
    assert_eq!(denied(b.rename("shared-1", "shared-2").await), of("subsystem shared-1"));
    assert_eq!(a.rename("shared-1", "shared-2").await.unwrap().owner, "token:a");
    may_not_change(&b, "shared-2").await;
    assert_eq!(b.register("shared-1").await.unwrap_err().code(), Code::FailedPrecondition);
    // An administrator may, and its owner stays.
    let admin = stage.caller("token:admin").await;
    admin.rename("shared-2", "beyond").await.unwrap();
    assert_eq!(admin.owner("beyond").await, "token:a");
    stage.restart("enforce").await;
    let admin = stage.caller("token:admin").await;
    let beyond = admin.get("beyond").await.unwrap();
    assert_eq!((beyond.owner.as_str(), beyond.former_names), ("token:a", vec!["shared-2".into(), "shared-1".into()]));
    // By its grant, the owner can't give it a name that it could not have registered.
    let a = stage.caller("token:a").await;
    assert_eq!(denied(a.rename("beyond", "shared-1").await), of("subsystem beyond"));
}

#[tokio::test]
async fn a_former_name_gives_no_right_to_the_present_one() {
    let stage = Stage::new("enforce").await;
    let (a, admin) = (stage.caller("token:a").await, stage.caller("token:admin").await);
    let operator = stage.caller("token:shared").await;
    a.register("shared-1").await.unwrap();
    a.register("a").await.unwrap();
    admin.rename("shared-1", "vault").await.unwrap();
    let reading = |name: &'static str| {
        move |request: &mut pb::RegisterSubsystemRequest| {
            request.registration.as_mut().unwrap().reads = vec![name.to_owned()];
        }
    };
    for name in ["vault", "shared-1"] {
        let rpc = |rpc: &str| (rpc.to_owned(), "input vault of subsystem a".to_owned());
        assert_eq!(denied(a.register_with("a", reading(name)).await), rpc("RegisterSubsystem"), "{name}");
        let updated = a.update("a", "reads", |it| it.reads = vec![name.into()]).await;
        assert_eq!(denied(updated), rpc("UpdateSubsystem"), "{name}");
        let of = |rpc: &str| (rpc.to_owned(), "subsystem vault".to_owned());
        let subsystems = vec![name.to_owned()];
        let interval = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
        let settings =
            pb::IntervalLoop { name: "l".into(), interval, subsystems: subsystems.clone(), ..Default::default() };
        let request = operator.asks(pb::StartIntervalLoopRequest { r#loop: Some(settings) });
        assert_eq!(
            denied(operator.client.clone().start_interval_loop(request).await),
            of("StartIntervalLoop"),
            "{name}"
        );
        let request = operator.asks(pb::PlanCycleRequest { subsystems, ..Default::default() });
        assert_eq!(denied(operator.client.clone().plan_cycle(request).await), of("PlanCycle"), "{name}");
    }
    // Nor does it take one away.
    admin.rename("vault", "shared-2").await.unwrap();
    a.register_with("a", reading("vault")).await.unwrap();
    assert_eq!(a.get("a").await.unwrap().registration.unwrap().reads, ["shared-2"]);
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
    b.update("shared-1", "phase", |it| it.phase = 1).await.unwrap();
    assert_eq!(a.owner("shared-1").await, "", "to renew a lease or to change a field is not to register");
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
    let changed = admin.update("shared-1", "critical", |it| it.critical = true).await.unwrap().subsystem.unwrap();
    assert_eq!((changed.registration.unwrap().critical, changed.owner.as_str()), (true, "token:a"));
    // The whole registration must be covered, also what an administrator has set.
    let refused = denied(a.update("shared-1", "phase", |it| it.phase = 1).await);
    assert_eq!(refused, ("UpdateSubsystem".to_owned(), "critical of subsystem shared-1".to_owned()));
    a.update("shared-1", "critical", |_| {}).await.unwrap();
    a.update("shared-1", "phase", |it| it.phase = 1).await.unwrap();
    admin.renew("shared-1").await.unwrap();
    a.register("shared-1").await.unwrap();

    // What an administrator makes is not for the taking.
    assert_eq!(admin.register("shared-2").await.unwrap().subsystem.unwrap().owner, "token:admin");
    assert_eq!(denied(a.register("shared-2").await).1, "subsystem shared-2");
    admin.unregister("shared-1").await.unwrap();
    b.register("shared-1").await.unwrap();
    assert_eq!(a.owner("shared-1").await, "token:b");
}

/// Waits until the service knows whether the owner of this subsystem is revoked.
async fn until_revoked(admin: &Caller, name: &str, is_revoked: bool) {
    let revoked = async {
        while admin.get(name).await.unwrap().owner_revoked != is_revoked {
            tokio::task::yield_now().await;
        }
    };
    patiently("the reload", revoked).await;
}

#[tokio::test]
async fn the_subsystems_of_a_revoked_owner_are_not_called_until_that_is_taken_back() {
    let mut stage = Stage::new("enforce").await;
    let fleet = Fleet::start().await;
    let at_fleet = |it: &mut pb::RegisterSubsystemRequest| {
        it.registration.as_mut().unwrap().endpoint = fleet.endpoint().to_owned();
    };
    let admin = stage.caller("token:admin").await;
    for kind in KINDS {
        let ([a, b], owner) = (stage.registrars(kind).await, format!("{kind}a"));
        a.register_with("a", at_fleet).await.unwrap();
        b.register_with("shared-b", at_fleet).await.unwrap();
        assert_eq!(admin.run().await.unwrap().state(), pb::CycleState::Succeeded);
        fleet.clear_calls();

        stage.configure("enforce", &format!("revoked = [\"{owner}\"]"));
        until_revoked(&admin, "a", true).await;
        let cycle = admin.run().await.unwrap();
        let part = |name: &str| cycle.subsystems.iter().find(|part| part.name == name).unwrap();
        assert_eq!((cycle.state(), part("a").skip_reason()), (pb::CycleState::Degraded, pb::SkipReason::OwnerRevoked));
        assert_eq!(part("a").error_message, format!("its owner {owner} is revoked"));
        assert_eq!(part("shared-b").state(), pb::SubsystemState::Succeeded);
        // Nor is it asked for a snapshot.
        let request = pb::GetSubsystemRequest { name: "a".into(), include_snapshot: true, ..Default::default() };
        let snapshot = admin.client.clone().get_subsystem(admin.asks(request)).await.unwrap().into_inner();
        assert!(snapshot.subsystem.unwrap().snapshot_error.contains("is revoked"));
        assert!(fleet.calls().iter().all(|call| call.subsystem != "a"), "{:?}", fleet.calls());
        let plan = pb::PlanCycleRequest::default();
        let plan = admin.client.clone().plan_cycle(admin.asks(plan)).await.unwrap().into_inner().plan.unwrap();
        let planned = plan.subsystems.iter().find(|planned| planned.name == "a").unwrap();
        assert_eq!(planned.skip_reason(), pb::SkipReason::OwnerRevoked);

        stage.configure("enforce", "");
        until_revoked(&admin, "a", false).await;
        assert_eq!(admin.run().await.unwrap().state(), pb::CycleState::Succeeded);
        a.unregister("a").await.unwrap();
        b.unregister("shared-b").await.unwrap();
    }
    // From the first cycle of a process on, and not without enforcement.
    let [a, _] = stage.registrars("token:").await;
    a.register_with("a", at_fleet).await.unwrap();
    for (mode, reason) in [("enforce", pb::SkipReason::OwnerRevoked), ("off", pb::SkipReason::Unspecified)] {
        stage.restart_with(mode, "revoked = [\"token:a\"]").await;
        let cycle = stage.caller("token:admin").await.run().await.unwrap();
        assert_eq!(cycle.subsystems[0].skip_reason(), reason, "{mode}");
    }
}

#[tokio::test]
async fn an_owner_is_revoked_also_while_the_disk_is_full() {
    // The service gets an error if a file may not grow, instead of a signal that kills it.
    let home = Home::new().with_wrapper(["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]);
    let stage = Stage::at(home, "enforce").await;
    let fleet = Fleet::start().await;
    let [a, admin] = [stage.caller("token:a").await, stage.caller("token:admin").await];
    let at_fleet = |it: &mut pb::RegisterSubsystemRequest| {
        it.registration.as_mut().unwrap().endpoint = fleet.endpoint().to_owned();
    };
    a.register_with("a", at_fleet).await.unwrap();
    let limit = |bytes: Option<u64>| {
        let Rlimit { maximum, .. } = getrlimit(Resource::Fsize);
        let limit = Rlimit { current: bytes.or(maximum), maximum };
        prlimit(Some(stage.service.as_ref().unwrap().pid()), Resource::Fsize, limit).unwrap();
    };
    limit(Some(1));
    assert_eq!(reason(&a.unregister("a").await.unwrap_err()).why, "STORE_UNAVAILABLE");
    stage.configure("enforce", "revoked = [\"token:a\"]");
    until_revoked(&admin, "a", true).await;
    limit(None);
    let cycle = patiently("space", async {
        loop {
            if let Ok(cycle) = admin.run().await {
                return cycle;
            }
        }
    });
    assert_eq!(cycle.await.subsystems[0].skip_reason(), pb::SkipReason::OwnerRevoked);
    assert!(fleet.calls().is_empty(), "{:?}", fleet.calls());
}

/// The parameters of a subsystem or a loop, and whether they were left out.
type Shown = (Bytes, bool);

/// The parameters of the only subsystem and of the only loop, by all calls that show them to this caller.
async fn shown(caller: &Caller) -> (Vec<Shown>, Vec<Shown>) {
    let mut client = caller.client.clone();
    let of = |status: pb::SubsystemStatus| (status.registration.unwrap().parameters, status.redacted);
    let of_loop = |status: pb::IntervalLoopStatus| (status.r#loop.unwrap().parameters, status.redacted);
    let mut subsystems = vec![of(caller.get("shared-1").await.unwrap())];
    let list = client.list_subsystems(caller.asks(pb::ListSubsystemsRequest::default())).await.unwrap().into_inner();
    subsystems.extend(list.subsystems.into_iter().map(of));
    let request = pb::GetStatusRequest { include_subsystems: true, ..Default::default() };
    let status = client.get_status(caller.asks(request)).await.unwrap().into_inner().status.unwrap();
    subsystems.extend(status.subsystems.into_iter().map(of));
    let list = client.list_interval_loops(caller.asks(pb::ListIntervalLoopsRequest::default())).await.unwrap();
    let loops = list.into_inner().loops.into_iter().chain(status.loops).map(of_loop).collect();
    (subsystems, loops)
}

#[tokio::test]
async fn parameters_are_shown_to_operators_and_to_the_owner_alone() {
    let mut stage = Stage::new("enforce").await;
    let [a, b] = stage.registrars("token:").await;
    let parameters = to_struct(&json!({ "key": "value" }));
    let with_parameters = |it: &mut pb::RegisterSubsystemRequest| {
        it.registration.as_mut().unwrap().parameters = parameters.clone();
    };
    let registered = a.register_with("shared-1", with_parameters).await.unwrap().subsystem.unwrap();
    assert_eq!((registered.registration.unwrap().parameters, registered.redacted), (parameters.clone(), false));
    let operator = stage.caller("token:operator").await;
    let settings = pb::IntervalLoop {
        name: "l".into(),
        interval: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        parameters: parameters.clone(),
        ..Default::default()
    };
    let start = operator.asks(pb::StartIntervalLoopRequest { r#loop: Some(settings) });
    let started = operator.client.clone().start_interval_loop(start).await.unwrap().into_inner().r#loop.unwrap();
    assert!(!started.redacted && started.r#loop.unwrap().parameters == parameters);

    let (seen, blanked) = ((parameters.clone(), false), (Bytes::new(), true));
    for name in ["viewer", "auditor"] {
        let of_caller = shown(&stage.caller(&format!("token:{name}")).await).await;
        assert_eq!(of_caller, (vec![blanked.clone(); 3], vec![blanked.clone(); 2]), "{name}");
    }
    for caller in [&operator, &stage.caller("token:admin").await] {
        assert_eq!(shown(caller).await, (vec![seen.clone(); 3], vec![seen.clone(); 2]));
    }
    let status = a.get("shared-1").await.unwrap();
    assert_eq!((status.registration.unwrap().parameters, status.redacted), seen);
    let status = b.get("shared-1").await.unwrap();
    assert_eq!((status.registration.unwrap().parameters, status.redacted), blanked);
    // The status without records has the loops.
    let monitor = stage.caller("token:monitor").await;
    let request = monitor.asks(pb::GetStatusRequest { omit_last_cycle: true, ..Default::default() });
    let status = monitor.client.clone().get_status(request).await.unwrap().into_inner().status.unwrap();
    let status = status.loops.into_iter().next().unwrap();
    assert_eq!((status.r#loop.unwrap().parameters, status.redacted), blanked);

    stage.restart("off").await;
    let everyone = shown(&stage.caller("token:viewer").await).await;
    assert_eq!(everyone, (vec![seen.clone(); 3], vec![seen; 2]));
}

#[tokio::test]
async fn a_cycle_names_its_caller_whose_request_ids_are_its_own_also_after_a_kill() {
    let mut stage = Stage::new("enforce").await;
    let fleet = Fleet::start().await;
    let [admin, operator] = [stage.caller("token:admin").await, stage.caller("token:operator").await];
    let at_fleet = |it: &mut pb::RegisterSubsystemRequest| {
        it.registration.as_mut().unwrap().endpoint = fleet.endpoint().to_owned();
        it.lease = None;
    };
    admin.register_with("a", at_fleet).await.unwrap();
    let first = operator.run_as("r").await.unwrap();
    let second = admin.run_as("r").await.unwrap();
    assert_eq!((first.cycle_id, first.triggered_by.as_str()), (1, "token:operator"));
    assert_eq!((second.cycle_id, second.triggered_by.as_str()), (2, "token:admin"));
    assert_eq!(operator.run_as("r").await.unwrap(), first);

    // A cycle that runs, and those that wait for it.
    fleet.run("a", Run::Hold);
    assert_eq!([operator.admit_as("held").await, operator.admit_as("waits").await], [3, 4]);
    assert_eq!([admin.admit_as("waits").await, operator.admit_as("waits").await], [5, 4]);
    fleet.until_run("a", 3).await;
    stage.service.take().unwrap().kill().await;
    fleet.run("a", Run::Echo);
    stage.restart("enforce").await;
    let [admin, operator] = [stage.caller("token:admin").await, stage.caller("token:operator").await];
    let held = operator.run_as("held").await.unwrap();
    assert_eq!((held.cycle_id, held.state()), (3, pb::CycleState::Interrupted));
    assert_eq!(held.triggered_by, "token:operator");
    let [of_operator, of_admin] = [operator.run_as("waits").await.unwrap(), admin.run_as("waits").await.unwrap()];
    assert_eq!((of_operator.cycle_id, of_operator.triggered_by.as_str()), (4, "token:operator"));
    assert_eq!((of_admin.cycle_id, of_admin.triggered_by.as_str()), (5, "token:admin"));
    assert_eq!(admin.run_as("r").await.unwrap(), second);

    // Without enforcement, callers are not told apart.
    stage.restart("off").await;
    let [admin, operator] = [stage.caller("token:admin").await, stage.caller("token:operator").await];
    let sixth = admin.run_as("r").await.unwrap();
    assert_eq!((sixth.cycle_id, sixth.triggered_by.as_str()), (6, ""));
    assert_eq!(operator.run_as("r").await.unwrap(), sixth);
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
