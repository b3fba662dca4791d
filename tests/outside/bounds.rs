//! Bounds of one request and of one answer.

use std::fmt::Write as _;

use crate::common::{
    Stage,
    fleet::Fleet,
    http::get,
    raw::Raw,
    service::{Home, Service, because, invalid, reason, registration},
};
use bytes::Bytes;
use orchestrator_core::{
    proto::{
        orchestrator::v1::{self as pb, CycleState},
        subsystem::v1 as pbs,
    },
    subsystem::{Answer, Cycle, Failure, Object, Server, Subsystem},
};
use prost::Message;
use tokio::process::Command;
use tonic::{Code, Status, codegen::http::uri::PathAndQuery, transport::Channel};

/// The most bytes of an answer.
const MAX_ANSWER: usize = 3 << 20;

/// Calls a method with these bytes as its request.
async fn call(endpoint: &str, path: &'static str, request: impl Into<Bytes>) -> Result<Bytes, Status> {
    let channel = Channel::from_shared(endpoint.to_owned()).unwrap().connect().await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let request = tonic::Request::new(request.into());
    Ok(client.unary(request, PathAndQuery::from_static(path), Raw).await?.into_inner())
}

fn endpoint(service: &Service) -> String {
    format!("http://{}", service.address())
}

// ---------------------------------------------------------------------------------------------------------------
// Requests

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("n{i}")).collect()
}

#[tokio::test]
async fn a_list_longer_than_its_bound_is_refused_by_name() {
    let mut stage = Stage::new().await;
    let Stage { client, .. } = &mut stage;
    let run = pb::RunCycleRequest { subsystems: names(20_001), ..Default::default() };
    assert_eq!(reason(&client.run_with(run).await.unwrap_err()), invalid(["subsystems"]));
    let plan = pb::PlanCycleRequest { subsystems: names(20_001), ..Default::default() };
    assert_eq!(reason(&client.plan_cycle(plan).await.unwrap_err()), invalid(["subsystems"]));
    let settings = pb::IntervalLoop { subsystems: names(20_001), ..Default::default() };
    let start = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
    assert_eq!(reason(&client.start_interval_loop(start).await.unwrap_err()), invalid(["loop.subsystems"]));
    let watch = pb::WatchCyclesRequest { subsystems: names(1001), ..Default::default() };
    assert_eq!(reason(&client.watch_cycles(watch).await.unwrap_err()), invalid(["subsystems"]));
    let watch = pb::WatchCyclesRequest { loops: names(1001), ..Default::default() };
    assert_eq!(reason(&client.watch_cycles(watch).await.unwrap_err()), invalid(["loops"]));
    let failed = CycleState::Failed as i32;
    let watch = pb::WatchCyclesRequest { states: vec![failed; 17], ..Default::default() };
    assert_eq!(reason(&client.watch_cycles(watch).await.unwrap_err()), invalid(["states"]));
    let list = pb::ListCyclesRequest { states: vec![failed; 17], ..Default::default() };
    assert_eq!(reason(&client.list_cycles(list).await.unwrap_err()), invalid(["states"]));
    let list = pb::ListCyclesRequest { subsystem: "a".into(), subsystem_states: vec![1; 17], ..Default::default() };
    assert_eq!(reason(&client.list_cycles(list).await.unwrap_err()), invalid(["subsystem_states"]));
    let codes = pb::RetryPolicy { retryable_status_codes: vec!["UNAVAILABLE".into(); 17], ..Default::default() };
    let mut registration = stage.registration("a");
    registration.retry = Some(codes);
    let refused = stage.client.register(registration).await.unwrap_err();
    assert_eq!(reason(&refused), invalid(["registration.retry.retryable_status_codes"]));
    for list in ["requires", "after", "reads"] {
        let mut registration = stage.registration("a");
        *match list {
            "requires" => &mut registration.requires,
            "after" => &mut registration.after,
            _ => &mut registration.reads,
        } = names(1025);
        let refused = stage.client.register(registration).await.unwrap_err();
        assert_eq!(
            refused.message(),
            format!("registration.{list} has more than 1024 entries, which is the most that are allowed")
        );
    }
    // Requests within their bounds are read.
    let list = pb::ListCyclesRequest { states: vec![failed; 16], ..Default::default() };
    assert!(stage.client.list_cycles(list).await.unwrap().into_inner().cycles.is_empty());
}

#[tokio::test]
async fn a_parameter_that_is_given_too_often_is_refused() {
    let stage = Stage::new().await;
    let times = |times| format!("/api/cycles?{}", vec!["states=CYCLE_STATE_FAILED"; times].join("&"));
    assert_eq!(get(stage.service.admin(), &times(16)).await.status, 200);
    let refused = get(stage.service.admin(), &times(17)).await;
    assert_eq!(refused.status, 400);
    let message = refused.json().await["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "states is given more than 16 times, which is the most that are allowed");
}

#[tokio::test]
async fn a_request_that_can_not_be_decoded_is_an_invalid_argument() {
    let stage = Stage::new().await;
    let path = "/dreamnet.orchestrator.v1.Orchestrator/GetCycle";
    // An unfinished number, a text in place of a number, and a text that is not UTF-8.
    for request in [&[1 << 3, 0xff][..], &[1 << 3 | 2, 1, 0]] {
        let refused = call(&endpoint(&stage.service), path, request).await.unwrap_err();
        assert_eq!(reason(&refused), because(Code::InvalidArgument, "INVALID_FIELDS", []));
        assert!(refused.message().contains("no dreamnet.orchestrator.v1.GetCycleRequest"), "{refused:?}");
    }
    let path = "/dreamnet.orchestrator.v1.Orchestrator/UnregisterSubsystem";
    let refused = call(&endpoint(&stage.service), path, &[1 << 3 | 2, 1, 0xff][..]).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::InvalidArgument, "INVALID_FIELDS", []));
}

#[tokio::test]
async fn a_subsystem_in_rust_takes_no_more_inputs_than_a_registration_may_have() {
    let echo = |cycle: Cycle| async move {
        let mut answer = Answer::default();
        answer.output("inputs", cycle.inputs.len());
        Ok::<_, Failure>(answer)
    };
    let serving = Server::new().subsystem("a", echo).listen("127.0.0.1:0").await.unwrap();
    let path = "/dreamnet.subsystem.v1.Subsystem/RunCycle";
    let of = |cycle_id, inputs| {
        let inputs = names(inputs).into_iter().map(|name| (name, pbs::Input::default())).collect();
        pbs::RunCycleRequest { subsystem: "a".into(), cycle_id, inputs, ..Default::default() }.encode_to_vec()
    };
    assert!(call(serving.endpoint(), path, of(1, 1024)).await.is_ok());
    for request in [of(2, 1025), vec![1 << 3 | 2, 5]] {
        let refused = call(serving.endpoint(), path, request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Answers

/// A registry whose plan is larger than one answer may be: each of these waits for thirty names of full length.
async fn wide_fleet() -> (Stage, usize) {
    const FIRST: usize = 30;
    const ALL: usize = 2000;
    let fleet = Fleet::start().await;
    let name = |i| format!("{:_<63}", format!("s{i}"));
    let first: Vec<_> = (0..FIRST).map(name).collect();
    let mut config = String::new();
    for i in 0..ALL {
        let after = if i < FIRST { &[][..] } else { &first };
        let (name, endpoint) = (name(i), fleet.endpoint());
        writeln!(config, "[[subsystems]]\nname = {name:?}\nendpoint = {endpoint:?}\nafter = {after:?}").unwrap();
    }
    let home = Home::new().with_config(&config);
    let service = home.serve().await;
    let client = service.client().await;
    (Stage { fleet, home, service, client }, ALL)
}

#[tokio::test]
async fn a_plan_that_is_larger_than_an_answer_has_pages() {
    let (mut stage, all) = wide_fleet().await;
    let mut names = Vec::new();
    let (mut page_token, mut page_size, mut pages) = (String::new(), 7, 0);
    loop {
        let request = pb::PlanCycleRequest { subsystems: Vec::new(), page_size, page_token };
        let page = stage.client.plan_cycle(request).await.unwrap().into_inner();
        assert!(page.encoded_len() <= MAX_ANSWER);
        let plan = page.plan.unwrap();
        assert_eq!((plan.levels, plan.subsystem_count as usize), (2, all));
        if page_size > 0 {
            assert_eq!(plan.subsystems.len(), 7);
        }
        names.extend(plan.subsystems.into_iter().map(|planned| planned.name));
        (page_token, page_size, pages) = (page.next_page_token, 0, pages + 1);
        if page_token.is_empty() {
            break;
        }
    }
    assert!(pages > 2, "the first page has seven entries, and the rest is larger than an answer");
    let in_order = names.iter().collect::<std::collections::BTreeSet<_>>().len();
    assert_eq!((names.len(), in_order), (all, all));

    let request = pb::RunCycleRequest { validate_only: true, ..Default::default() };
    let refused = stage.client.run_cycle(request).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::ResourceExhausted, "ANSWER_TOO_LARGE", []));
    assert!(refused.message().contains("PlanCycle"), "{refused:?}");
    // The command line names the remedy in commands.
    let address = format!("http://{}", stage.service.address());
    let command = ["run", "--validate-only", "--address", &address];
    let said = Command::new(env!("CARGO_BIN_EXE_orchestrator")).args(command).output().await.unwrap();
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(said.contains("ANSWER_TOO_LARGE") && !said.contains("PlanCycle"), "{said}");
    assert!(said.ends_with(&format!("page by page: orchestrator plan --address {address}\n")), "{said}");
    let request = pb::PlanCycleRequest { page_token: "x".into(), ..Default::default() };
    assert_eq!(reason(&stage.client.plan_cycle(request).await.unwrap_err()), invalid(["page_token"]));
}

/// A subsystem with an output and a snapshot of these numbers of bytes.
struct Large(usize, usize);

impl Large {
    fn text(bytes: usize) -> Object {
        Object::from_iter([("text".into(), "x".repeat(bytes).into())])
    }
}

impl Subsystem for Large {
    async fn run_cycle(&self, _: Cycle) -> Result<Answer, Failure> {
        Ok(Answer::new(Self::text(self.0)))
    }

    async fn get_status(&self) -> Option<Object> {
        Some(Self::text(self.1))
    }
}

#[tokio::test]
async fn an_output_and_a_snapshot_that_are_too_large_together_are_answered_one_by_one() {
    const MIB: usize = 1 << 20;
    let mut stage = Stage::new().await;
    let server = Server::new().subsystem("a", Large(MIB * 19 / 10, MIB * 19 / 10)).subsystem("b", Large(MAX_ANSWER, 0));
    let serving = server.listen("127.0.0.1:0").await.unwrap();
    let limits = pb::Limits { max_message_bytes: 8 << 20, max_output_bytes: 8 << 20, ..Default::default() };
    for name in ["a", "b"] {
        let registration = pb::Registration { limits: Some(limits), ..registration(name, serving.endpoint()) };
        stage.client.register(registration).await.unwrap();
    }
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    let client = &stage.client;
    let of = |name: &str, include_output, include_snapshot| {
        let request = pb::GetSubsystemRequest { name: name.into(), include_output, include_snapshot };
        let mut client = client.clone();
        async move { client.get_subsystem(request).await.map(|answer| answer.into_inner().encoded_len()) }
    };
    for one in [of("a", true, false), of("a", false, true)] {
        assert!((MIB..MAX_ANSWER).contains(&one.await.unwrap()));
    }
    for (name, both, message) in
        [("a", of("a", true, true), "separately"), ("b", of("b", true, false), "max_output_bytes")]
    {
        let refused = both.await.unwrap_err();
        assert_eq!(reason(&refused), because(Code::ResourceExhausted, "ANSWER_TOO_LARGE", [("subsystem", name)]));
        assert!(refused.message().contains(message), "{refused:?}");
    }
    assert!(of("b", false, true).await.unwrap() < MIB);
}
