use std::{
    convert::Infallible,
    io,
    sync::atomic::AtomicUsize,
    task::{Context, Poll},
};

use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use tokio::{
    io::{AsyncWriteExt, DuplexStream, duplex},
    sync::{Mutex, mpsc},
    time::{Instant, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code as GrpcCode, codegen::Service, server::NamedService};
use tonic_types::StatusExt;

use super::*;
use crate::{
    api::Way,
    clock::Clock,
    config::Config,
    listen::{self, Entrance, Limits, Peer, Services},
    model::{Endpoint, Epoch, Replica, Revision},
    orchestrator::{From, Position, WatchFilter},
    proto::orchestrator::v1 as pb,
    record, serve,
    store::{self, Fate, SimulatedDatabase, StoreUrl},
    transport::{Connected, Listener, Origin, Stream},
};

const PATIENCE: Duration = Duration::from_mins(1);
/// For a connection.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A leader, and how many connections were made to it.
struct FakeLeader {
    connect: Connect,
    connections: Arc<AtomicUsize>,
    /// Ends the connections so far.
    cut_off: Arc<std::sync::Mutex<CancellationToken>>,
    /// A message for each call that was dropped before its end.
    dropped: mpsc::UnboundedReceiver<()>,
    /// How it answers `WatchCycles` from now on.
    watch: Arc<std::sync::Mutex<Watch>>,
}

impl FakeLeader {
    fn start() -> Self {
        let (connections, cut_off) =
            (Arc::<AtomicUsize>::default(), Arc::<std::sync::Mutex<CancellationToken>>::default());
        let ((tell, dropped), watch) = (mpsc::unbounded_channel(), Arc::default());
        let memory = Memory::whole(64 << 20);
        let limits = Limits {
            max_concurrent_streams: 2,
            max_streams: 1000,
            max_request_bytes: 4 << 20,
            windows: (64 << 10, 128 << 10),
            requests: memory.clone(),
            answers: memory,
            large_streams: &[],
        };
        let services = Services::default().and(Echo { tell, watch: Arc::clone(&watch) });
        let server = listen::Server::new(services, limits);
        let (counted, of_connections) = (connections.clone(), cut_off.clone());
        let connect: Connect = Arc::new(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            let (server, cut_off) = (server.clone(), of_connections.lock().unwrap().clone());
            async move {
                let (ours, theirs) = duplex(64 << 10);
                let (send, streams) = mpsc::unbounded_channel();
                send.send(theirs).unwrap();
                let entrance = Entrance::plain(Box::new(Pipes(Mutex::new(streams))));
                let stop = CancellationToken::new();
                let connections = listen::Connections::of(10, false);
                tokio::spawn(async move { server.serve(entrance, connections, stop, cut_off).await });
                Ok(Box::new(ours) as Box<dyn Stream>)
            }
            .boxed()
        });
        Self { connect, connections, cut_off, dropped, watch }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn watch(&self, watch: Watch) {
        *self.watch.lock().unwrap() = watch;
    }

    /// Ends the connections so far.
    fn cut(&self) {
        std::mem::take(&mut *self.cut_off.lock().unwrap()).cancel();
    }
}

/// Accepts the streams that are sent to it.
struct Pipes(Mutex<mpsc::UnboundedReceiver<DuplexStream>>);

impl Listener for Pipes {
    fn accept(&self) -> BoxFuture<'_, io::Result<Connected>> {
        async {
            let stream = self.0.lock().await.recv().await;
            // There is one for each server.
            let Some(stream) = stream else { return pending().await };
            Ok((Box::new(stream) as Box<dyn Stream>, Origin::Unknown))
        }
        .boxed()
    }
}

/// How `WatchCycles` is answered. Without an end.
#[derive(Clone, Default)]
enum Watch {
    /// With its message.
    #[default]
    Echo,
    /// With this event.
    Event(pb::CycleEvent),
    /// Not even by a beginning.
    Never,
}

/// Answers `RunCycle` with its message and its headers, `WatchCycles` as it was told to, and `CancelCycle` never. To a
/// call with the header `as-another-server` it answers as a server without gRPC, with this status.
#[derive(Clone)]
struct Echo {
    tell: mpsc::UnboundedSender<()>,
    watch: Arc<std::sync::Mutex<Watch>>,
}

struct Tell(mpsc::UnboundedSender<()>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

impl NamedService for Echo {
    const NAME: &'static str = "dreamnet.orchestrator.v1.Orchestrator";
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (tell, watch) = (Tell(self.tell.clone()), self.watch.lock().unwrap().clone());
        async move {
            let (head, body) = request.into_parts();
            if let Some(status) = head.headers.get("as-another-server") {
                let response = http::Response::builder().status(status.to_str().unwrap());
                return Ok(response.header(CONTENT_TYPE, "text/html").body(Body::empty()).unwrap());
            }
            let mut response = http::Response::new(());
            for (name, value) in &head.headers {
                response.headers_mut().append(name, value.clone());
            }
            let message = body.collect().await.unwrap().to_bytes();
            let body: BoxBody<Bytes, Status> = match (head.uri.path().rsplit('/').next().unwrap(), watch) {
                ("RunCycle", _) => {
                    let trailers = [("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))];
                    let trailers = async move { Some(Ok(trailers.into_iter().collect())) };
                    Full::from(message).map_err(|never| match never {}).with_trailers(trailers).boxed()
                }
                ("WatchCycles", watch @ (Watch::Echo | Watch::Event(_))) => {
                    let message = match watch {
                        Watch::Event(event) => framing::framed(&pb::WatchCyclesResponse { event: Some(event) }),
                        _ => message,
                    };
                    let forever = stream::pending().inspect(move |_: &Result<Frame<Bytes>, Status>| _ = &tell);
                    BodyExt::boxed(StreamBody::new(stream::iter([Ok(Frame::data(message))]).chain(forever)))
                }
                _ => {
                    pending::<()>().await;
                    drop(tell);
                    unreachable!()
                }
            };
            Ok(response.map(|()| Body::new(body)))
        }
        .boxed()
    }
}

fn leader(name: &str) -> Leader {
    let address = Some(Endpoint::parse("http://leader:7700").unwrap());
    Leader { replica: Replica { name: name.into(), address }, epoch: Epoch(1) }
}

/// An event of a leader whose history ends with the record of this revision and epoch.
fn event(revision: u64, epoch: u64) -> Watch {
    let bookmark = pb::cycle_event::Event::Bookmark(pb::Bookmark::default());
    Watch::Event(pb::CycleEvent { revision, epoch, event: Some(bookmark) })
}

fn at(revision: u64, epoch: u64) -> Position {
    Position { revision: Revision(revision), epoch: Some(Epoch(epoch)) }
}

/// A follower of this leader, with what changes its role.
fn follower(connect: Connect, of: Option<Leader>, answers: Memory) -> (Forwarder, Membership) {
    let membership = member(of);
    (Forwarder::new(membership.clone(), history(), (connect, TIMEOUT), 2, answers), membership)
}

/// A replica that follows this leader.
fn member(of: Option<Leader>) -> Membership {
    let membership = Membership::of(Replica { name: "follower".into(), address: None });
    membership.set(Role::Follower { leader: of });
    membership
}

fn memory() -> Memory {
    Memory::whole(64 << 20)
}

/// A history without records.
fn history() -> History {
    let store = store::open(&StoreUrl::Memory, record::CHECKS, Clock::system()).now_or_never().unwrap().unwrap();
    History::new(store, &memory(), &serve::settings(&Config::default()))
}

fn call(rpc: Rpc, headers: &[(&'static str, &'static str)], message: &[u8]) -> Outgoing {
    let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
    let grpc = [(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))];
    let headers: HeaderMap = grpc.into_iter().chain(headers).collect();
    let caller = Caller::of(Way::Grpc, Peer::default(), &headers);
    let counted = Some(CountedCall::begin(Arc::default(), rpc, Some(&caller)));
    let message = vec![framing::framed_bytes(message)];
    Outgoing { rpc, caller, begun: Begun::default(), counted, headers, message, lapse: None }
}

/// The status of a call that has no answer.
async fn refused(forwarder: &Forwarder, call: Outgoing) -> (GrpcCode, String, String) {
    let status = timeout(PATIENCE, forwarder.send(call)).await.unwrap().unwrap_err();
    assert!(status.get_details_retry_info().is_some());
    let info = status.get_details_error_info().unwrap();
    (status.code(), info.reason, info.metadata.get("leader").cloned().unwrap_or_default())
}

fn counts(forwarder: &Forwarder) -> Vec<(Code, u64)> {
    forwarder.counts().iter().collect()
}

#[tokio::test]
async fn a_call_goes_on_as_it_came_and_so_does_its_answer() {
    let fake = FakeLeader::start();
    let (forwarder, _) = follower(fake.connect, Some(leader("a")), memory());
    let message = vec![7; 1 << 20];
    let headers = [
        ("grpc-timeout", "10S"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("orchestrator-path", "parent"),
        ("authorization", "Bearer secret"),
        ("host", "follower"),
    ];
    let answer = forwarder.send(call(Rpc::RunCycle, &headers, &message)).await.unwrap();
    let got = answer.headers().clone();
    for name in ["traceparent", "orchestrator-path", "authorization"] {
        let sent = headers.iter().find(|(it, _)| *it == name).unwrap().1;
        assert_eq!(got[name], sent);
    }
    let left = crate::proto::timeout::read(&got).unwrap();
    assert!(left < Duration::from_secs(10) && left > Duration::from_secs(5), "{left:?}");
    let described = super::super::forwarded::Forwarded::find(&got).unwrap();
    assert_eq!((described.replica.as_str(), described.origin()), ("follower", Origin::Unknown));
    assert_eq!(got["orchestrator-leader-epoch"], "1");
    assert!(got.get("host").is_none());
    let body = answer.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(body.to_bytes(), framing::framed_bytes(&message));
    assert_eq!(counts(&forwarder), [(Code::Ok, 1)]);
}

#[tokio::test(start_paused = true)]
async fn without_a_leader_that_can_be_reached_nothing_is_sent_and_the_caller_knows_at_once() {
    let fake = FakeLeader::start();
    let begun = Instant::now();
    let (forwarder, change) = follower(fake.connect.clone(), None, memory());
    let run = || call(Rpc::RunCycle, &[], b"");
    let unavailable = |reason: &str, leader: &str| (GrpcCode::Unavailable, reason.to_owned(), leader.to_owned());
    assert_eq!(refused(&forwarder, run()).await, unavailable("NO_LEADER", ""));
    // It became the leader meanwhile.
    change.set(Role::Leader { epoch: Epoch(2) });
    assert!(!forwarder.follows());
    assert_eq!(refused(&forwarder, run()).await, unavailable("NO_LEADER", ""));
    let unknown = Leader { replica: Replica { address: None, ..leader("a").replica }, epoch: Epoch(3) };
    change.set(Role::Follower { leader: Some(unknown) });
    assert_eq!(refused(&forwarder, run()).await, unavailable("NO_LEADER", "a"));
    // One hop only.
    change.set(Role::Follower { leader: Some(leader("b")) });
    let forwarded = call(Rpc::RunCycle, &[("orchestrator-caller-bin", "")], b"");
    assert_eq!(refused(&forwarder, forwarded).await, unavailable("NOT_LEADER", "b"));
    assert_eq!(fake.connections(), 0);
    let refuse: Connect = Arc::new(|_| async { Err("Connection refused".to_owned()) }.boxed());
    let (forwarder, _) = follower(refuse, Some(leader("c")), memory());
    assert_eq!(refused(&forwarder, run()).await, unavailable("NO_LEADER", "c"));
    assert_eq!((counts(&forwarder), begun.elapsed()), (vec![(Code::Unavailable, 1)], Duration::ZERO));
}

#[tokio::test]
async fn a_call_that_was_not_sent_is_sent_over_another_connection() {
    let mut fake = FakeLeader::start();
    let (forwarder, _) = follower(fake.connect.clone(), Some(leader("a")), memory());
    let run = async || forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap().into_body().collect().await;
    run().await.unwrap();
    run().await.unwrap();
    assert_eq!(fake.connections(), 1);
    let watch = forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await.unwrap();
    fake.cut();
    // From now on, this side knows that the connection has ended.
    assert_eq!(end_of(watch).await, (GrpcCode::Unavailable, "LEADER_LOST".to_owned()));
    timeout(PATIENCE, fake.dropped.recv()).await.unwrap().unwrap();
    run().await.unwrap();
    assert_eq!(fake.connections(), 2);
    assert_eq!(counts(&forwarder), [(Code::Ok, 3), (Code::Unavailable, 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_has_failed_leaves_the_connection_to_others() {
    let mut fake = FakeLeader::start();
    let (forwarder, _) = follower(fake.connect.clone(), Some(leader("a")), memory());
    let watch = forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await.unwrap();
    for _ in 0..2 * connections::Connections::MAX {
        let late = forwarder.send(call(Rpc::CancelCycle, &[("grpc-timeout", "50m")], b"x")).await.unwrap_err();
        assert_eq!(late.code(), GrpcCode::DeadlineExceeded);
        timeout(PATIENCE, fake.dropped.recv()).await.unwrap().unwrap();
    }
    assert_eq!(fake.connections(), 1);
    drop(watch);
}

#[tokio::test(start_paused = true)]
async fn connections_that_take_no_more_calls_count_until_they_have_ended() {
    let fake = FakeLeader::start();
    let large = Memory::whole(256 * WINDOW as usize);
    let (forwarder, _) = follower(fake.connect.clone(), Some(leader("a")), large);
    let watch = async || forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await;
    let mut open = Vec::new();
    for _ in 0..2 * connections::Connections::MAX {
        open.push(watch().await.unwrap());
    }
    let full = refused(&forwarder, call(Rpc::WatchCycles, &[], b"x")).await;
    assert_eq!((full.0, full.1.as_str()), (GrpcCode::Unavailable, "NO_LEADER"));
    assert_eq!(fake.connections(), connections::Connections::MAX);
    fake.cut();
    for watch in open {
        assert_eq!(end_of(watch).await, (GrpcCode::Unavailable, "LEADER_LOST".to_owned()));
    }
    // All have ended, and none of them is tried.
    forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap();
    assert_eq!(fake.connections(), connections::Connections::MAX + 1);
}

/// Connects to a server that says this, and then nothing.
fn to_server_that_says(said: &'static [u8]) -> Connect {
    Arc::new(move |_| {
        async move {
            let (ours, mut theirs) = duplex(64 << 10);
            theirs.write_all(said).await.unwrap();
            tokio::spawn(async move {
                let _open = theirs;
                pending::<()>().await;
            });
            Ok(Box::new(ours) as Box<dyn Stream>)
        }
        .boxed()
    })
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_to_a_server_that_is_silent_or_speaks_something_else() {
    for (said, why, after) in [
        (&b""[..], "sent nothing within 5s", TIMEOUT),
        (b"\0\0\0", "sent nothing within 5s", TIMEOUT),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak HTTP/2", Duration::ZERO),
    ] {
        let (forwarder, _) = follower(to_server_that_says(said), Some(leader("a")), memory());
        let begun = Instant::now();
        let status = forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap_err();
        assert_eq!(status.get_details_error_info().unwrap().reason, "NO_LEADER");
        assert!(status.message().contains(why), "{status:?}");
        assert_eq!(begun.elapsed(), after);
    }
}

#[tokio::test]
async fn the_answer_of_another_kind_of_server_is_none_of_the_leader() {
    let fake = FakeLeader::start();
    let (forwarder, _) = follower(fake.connect.clone(), Some(leader("a")), memory());
    // A proxy may have passed the call on.
    for (status, reason) in [("404", "NO_LEADER"), ("302", "NO_LEADER"), ("504", "LEADER_LOST"), ("200", "LEADER_LOST")]
    {
        let refused = forwarder.send(call(Rpc::RunCycle, &[("as-another-server", status)], b"x")).await.unwrap_err();
        let info = refused.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.metadata["leader"].as_str()), (reason, "a"));
        let message = refused.message();
        assert!(message.contains(status) && message.contains("check its cluster.advertise"), "{message}");
    }
}

/// The code and the reason at the end of an answer.
async fn end_of(answer: http::Response<Body>) -> (GrpcCode, String) {
    let trailers = timeout(PATIENCE, answer.into_body().collect()).await.unwrap().unwrap().trailers().cloned();
    let status = Status::from_header_map(&trailers.unwrap()).unwrap();
    (status.code(), status.get_details_error_info().unwrap().reason)
}

#[tokio::test]
async fn a_call_that_was_not_sent_goes_to_the_replica_that_leads_meanwhile() {
    let fake = FakeLeader::start();
    let change = member(Some(leader("a")));
    let membership = change.clone();
    let connect_to_b = fake.connect.clone();
    let connect: Connect = Arc::new(move |to| {
        let is_b = matches!(change.role(), Role::Follower { leader: Some(it) } if it.replica.name == "b");
        if is_b {
            return connect_to_b(to);
        }
        change.set(Role::Follower { leader: Some(leader("b")) });
        async { Err("Connection refused".to_owned()) }.boxed()
    });
    let forwarder = Forwarder::new(membership, history(), (connect, TIMEOUT), 2, memory());
    forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(counts(&forwarder), [(Code::Ok, 1)]);
}

#[tokio::test]
async fn what_the_leader_acknowledges_is_noted_before_its_answer_is_passed_on() {
    let fake = FakeLeader::start();
    let history = history();
    let forwarder =
        Forwarder::new(member(Some(leader("a"))), history.clone(), (fake.connect.clone(), TIMEOUT), 2, memory());
    assert_eq!(history.known(), None);
    // The leader of this test answers with the headers that it gets.
    let answer = forwarder.send(call(Rpc::RunCycle, &[("orchestrator-acknowledged", "5 3")], b"x")).await.unwrap();
    assert_eq!(history.known(), Some(Position { revision: Revision(5), epoch: Some(Epoch(3)) }));
    assert!(!answer.headers().contains_key("orchestrator-acknowledged"));
}

#[tokio::test]
async fn an_answer_of_a_leader_without_an_acknowledged_record_is_no_later_end_of_the_history() {
    let fake = FakeLeader::start();
    let history = history();
    let forwarder =
        Forwarder::new(member(Some(leader("a"))), history.clone(), (fake.connect.clone(), TIMEOUT), 2, memory());
    let run = async |acknowledged| {
        let answer = forwarder.send(call(Rpc::RunCycle, &[("orchestrator-acknowledged", acknowledged)], b"x")).await;
        answer.unwrap();
    };
    run("5 1").await;
    run("4 1").await;
    assert_eq!((history.known(), history.missing()), (Some(at(5, 1)), None));
    // It has recorded others in its own term, and not even as many.
    run("4 2").await;
    assert_eq!((history.known(), history.missing()), (Some(at(4, 2)), Some(at(5, 1))));
    run("6 2").await;
    assert_eq!(history.known(), Some(at(6, 2)));
    // A late answer of the earlier leader.
    run("7 1").await;
    assert_eq!(history.known(), Some(at(6, 2)));
}

#[tokio::test(start_paused = true)]
async fn a_leader_whose_stream_does_not_begin_is_asked_again() {
    let mut fake = FakeLeader::start();
    fake.watch(Watch::Never);
    let (forwarder, _change) = follower(fake.connect.clone(), Some(leader("a")), memory());
    let following = AbortOnDropHandle::new(tokio::spawn(async move { forwarder.follow().await }));
    for _ in 0..3 {
        timeout(PATIENCE, fake.dropped.recv()).await.unwrap().unwrap();
    }
    assert!(!following.is_finished());
}

#[tokio::test(start_paused = true)]
async fn an_event_that_the_store_keeps_a_follower_from_taking_is_asked_for_again() {
    let mut fake = FakeLeader::start();
    // The record that is known has to be compared with that of the later term.
    fake.watch(event(6, 2));
    let slow = |_| Fate { travels: Duration::from_hours(1), ..Fate::default() };
    let store = SimulatedDatabase::new(false).share(Clock::system(), Clock::system(), Box::new(slow));
    let history = History::new(store, &memory(), &serve::settings(&Config::default()));
    history.raise(at(5, 1));
    let forwarder =
        Forwarder::new(member(Some(leader("a"))), history.clone(), (fake.connect.clone(), TIMEOUT), 2, memory());
    let of_stream = forwarder.clone();
    let _following = AbortOnDropHandle::new(tokio::spawn(async move { of_stream.follow().await }));
    for _ in 0..3 {
        timeout(PATIENCE, fake.dropped.recv()).await.unwrap().unwrap();
    }
    assert!(!forwarder.is_current());
    // The answer to a call does not wait for that.
    let begun = Instant::now();
    forwarder.send(call(Rpc::RunCycle, &[("orchestrator-acknowledged", "7 2")], b"x")).await.unwrap();
    assert!(begun.elapsed() < TIMEOUT);
    assert_eq!(history.known(), Some(at(5, 1)));
}

#[tokio::test(start_paused = true)]
async fn watches_end_when_there_is_no_leader_for_a_minute_or_one_without_a_lease() {
    let fake = FakeLeader::start();
    let membership = member(None);
    membership.set(Role::Leader { epoch: Epoch(1) });
    let history = history();
    history.raise(Position::default());
    let forwarder = Forwarder::new(membership.clone(), history.clone(), (fake.connect.clone(), TIMEOUT), 2, memory());
    let _ends = AbortOnDropHandle::new(tokio::spawn(async move { forwarder.keep_contact(None).await }));
    let watched = || history.watch(From::Now, WatchFilter::default(), false);
    // How long a watch goes on, up to some minutes.
    let goes_on = async || {
        let (begun, mut watcher) = (Instant::now(), watched().unwrap());
        while begun.elapsed() < 3 * PATIENCE {
            if let Err(refusal) = watcher.next().await {
                assert!(matches!(refusal, Refusal::NotFollowing), "{refusal:?}");
                return Some(begun.elapsed());
            }
        }
        None
    };
    assert_eq!(goes_on().await, None);
    history.set_unconfirmed(true);
    assert_eq!(goes_on().await, Some(PATIENCE));
    assert!(matches!(watched(), Err(Refusal::NotFollowing)));
    history.set_unconfirmed(false);
    while watched().is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(goes_on().await, None);
    membership.set(Role::Follower { leader: None });
    assert_eq!(goes_on().await, Some(PATIENCE));
}

#[tokio::test(start_paused = true)]
async fn a_follower_reaches_a_leader_once_it_follows_it_and_until_it_has_not_for_too_long() {
    let fake = FakeLeader::start();
    let (forwarder, membership) = follower(fake.connect.clone(), Some(leader("a")), memory());
    let keeps = forwarder.clone();
    let _keeps = AbortOnDropHandle::new(tokio::spawn(async move { keeps.keep_contact(Some(PATIENCE)).await }));
    let reaches_after = async |time| {
        time::sleep(time).await;
        forwarder.reaches_leader()
    };
    let follows = |follows| forwarder.0.is_current.send_replace(follows);
    let moment = Duration::from_millis(1);
    assert!(!reaches_after(moment).await);
    membership.set(Role::Follower { leader: None });
    assert!(!reaches_after(3 * PATIENCE).await, "it has reached none yet");
    membership.set(Role::Follower { leader: Some(leader("a")) });
    assert!(!reaches_after(moment).await);
    follows(true);
    assert!(reaches_after(3 * PATIENCE).await);
    follows(false);
    assert!(reaches_after(PATIENCE.saturating_sub(moment)).await);
    assert!(!reaches_after(2 * moment).await);
    follows(true);
    assert!(reaches_after(moment).await);
    follows(false);
    membership.set(Role::Follower { leader: None });
    assert!(reaches_after(3 * PATIENCE).await, "no leader is known that it could reach");
    membership.set(Role::Follower { leader: Some(leader("b")) });
    assert!(reaches_after(PATIENCE.saturating_sub(moment)).await);
    assert!(!reaches_after(2 * moment).await);
    membership.set(Role::Leader { epoch: Epoch(9) });
    assert!(reaches_after(moment).await);
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_when_another_replica_has_led_for_a_while_or_when_the_process_ends() {
    let fake = FakeLeader::start();
    let (forwarder, change) = follower(fake.connect.clone(), Some(leader("a")), memory());
    let watch = forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await.unwrap();
    // It may lead again, or still.
    change.set(Role::Follower { leader: None });
    let mut body = watch.into_body();
    assert!(body.frame().await.unwrap().unwrap().is_data());
    assert!(timeout(Duration::from_hours(1), body.frame()).await.is_err());
    let begun = Instant::now();
    change.set(Role::Follower { leader: Some(leader("b")) });
    let end = end_of(http::Response::new(body)).await;
    assert_eq!(end, (GrpcCode::Unavailable, "LEADER_LOST".to_owned()));
    assert_eq!(begun.elapsed(), Forwarder::LAST_ANSWERS);
    let watch = forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await.unwrap();
    forwarder.end_streams();
    assert_eq!(end_of(watch).await, (GrpcCode::Unavailable, "DRAINING".to_owned()));
    let lapse = Some(async { Status::unauthenticated("it has expired") }.boxed());
    let watch = forwarder.send(Outgoing { lapse, ..call(Rpc::WatchCycles, &[], b"x") }).await.unwrap();
    let trailers = watch.into_body().collect().await.unwrap().trailers().cloned().unwrap();
    assert_eq!(trailers["grpc-status"], "16");
}

#[tokio::test]
async fn further_calls_have_further_connections_and_their_memory_is_bounded() {
    let fake = FakeLeader::start();
    let memory = Memory::whole(6 * WINDOW as usize);
    let (forwarder, _) = follower(fake.connect.clone(), Some(leader("a")), memory.clone());
    let mut open = Vec::new();
    for calls in 1..=6 {
        open.push(forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await.unwrap());
        assert_eq!(fake.connections(), usize::div_ceil(calls, 2));
    }
    let status = forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap_err();
    assert_eq!(status.code(), GrpcCode::ResourceExhausted);
    drop(open);
    assert_eq!(memory.held(), 0);
    forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap();
    assert_eq!(fake.connections(), 3);
    forwarder.connect_anew();
    forwarder.send(call(Rpc::RunCycle, &[], b"x")).await.unwrap();
    assert_eq!(fake.connections(), 4);
}

#[tokio::test]
async fn the_messages_of_an_answer_have_memory_and_its_status_is_their_end() {
    let memory = Memory::whole(100 << 10);
    let of = |pieces: Vec<Bytes>, status: &'static str| {
        let data = stream::iter(pieces).map(|piece| Ok::<_, Status>(Frame::data(piece)));
        let trailers: HeaderMap =
            [("grpc-status".parse().unwrap(), HeaderValue::from_static(status))].into_iter().collect();
        let frames = data.chain(stream::iter([Ok(Frame::trailers(trailers))]));
        Messages::<prost_types::Any>::of(http::Response::new(Body::new(StreamBody::new(frames))), memory.clone())
            .unwrap()
    };
    let any = |bytes: usize| prost_types::Any { type_url: String::new(), value: vec![7; bytes] };
    let (small, large) = (any(10), any(50 << 10));
    // In pieces of any size, also several messages in one.
    let all = [framing::framed(&small), framing::framed(&large), framing::framed(&small)].concat();
    for piece in [1, 1000, all.len()] {
        let mut messages = of(all.chunks(piece).map(Bytes::copy_from_slice).collect(), "0");
        for expected in [&small, &large, &small] {
            assert_eq!(messages.next().await.unwrap().as_ref(), Some(expected));
        }
        assert_eq!(messages.next().await.unwrap(), None);
        drop(messages);
        assert_eq!(memory.held(), 0);
    }
    let mut failed = of(vec![framing::framed(&small)], "5");
    assert_eq!(failed.next().await.unwrap(), Some(small));
    assert_eq!(failed.next().await.unwrap_err().code(), GrpcCode::NotFound);
    let too_large = of(vec![framing::framed(&any(200 << 10))], "0").next().await.unwrap_err();
    assert_eq!(too_large.code(), GrpcCode::ResourceExhausted);
}

#[tokio::test]
async fn a_call_that_its_caller_ends_is_ended_at_the_leader() {
    let mut fake = FakeLeader::start();
    let (forwarder, _) = follower(fake.connect, Some(leader("a")), memory());
    let watch = forwarder.send(call(Rpc::WatchCycles, &[], b"x")).await.unwrap();
    let mut body = watch.into_body();
    assert!(body.frame().await.unwrap().unwrap().is_data());
    drop(body);
    timeout(PATIENCE, fake.dropped.recv()).await.unwrap().unwrap();
    let cancel = call(Rpc::CancelCycle, &[], b"x");
    assert!(timeout(Duration::from_millis(50), forwarder.send(cancel)).await.is_err());
    timeout(PATIENCE, fake.dropped.recv()).await.unwrap().unwrap();
    assert_eq!(counts(&forwarder), [(Code::Cancelled, 2)]);
}
