//! Malformed bytes: in requests to the service, in answers from subsystems, in a configuration, and from strangers
//! before they are known. All are answered or refused, without an effect on others.
//!
//! Every case is made from a seed and its number. Some hundred cases of each kind run, or
//! `ORCHESTRATOR_TEST_FUZZ_CASES`; with `ORCHESTRATOR_TEST_FUZZ_SECONDS`, cases run for that time instead. A failure
//! names the seed of its case; `ORCHESTRATOR_TEST_FUZZ_SEED` begins with that one.

use std::{
    convert::Infallible,
    env,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::common::{
    fleet::Fleet,
    patiently,
    pki::{Authority, Issued},
    service::{Home, Service, ms, part, registration},
    tokens::write_tokens,
};
use bytes::{BufMut, Bytes, BytesMut};
use fastrand::Rng;
use futures_util::FutureExt;
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, jwk::Jwk};
use orchestrator_core::{
    config::Config,
    model::Payload,
    proto::{DESCRIPTORS, orchestrator::v1 as pb},
};
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, MethodDescriptor, Value,
};
use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, ClientConnection, RootCertStore,
        crypto::aws_lc_rs::sign::any_supported_type,
        sign::{CertifiedKey, SingleCertAndKey},
    },
};
use tonic::{
    body::Body,
    codegen::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response},
    transport::{Channel, Endpoint},
};
use tower::ServiceExt;

// ---------------------------------------------------------------------------------------------------------------
// Cases

/// The seeds of a run, one for each case.
struct Cases {
    first: u64,
    taken: AtomicU64,
    enough: u64,
    ends: Option<Instant>,
}

impl Cases {
    /// A run with at least `enough` cases, or as many as the set time allows.
    fn of(enough: u64) -> Arc<Self> {
        let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
        let first = number("ORCHESTRATOR_TEST_FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..1 << 48));
        let enough = number("ORCHESTRATOR_TEST_FUZZ_CASES").unwrap_or(enough);
        let seconds = number("ORCHESTRATOR_TEST_FUZZ_SECONDS");
        let ends = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        Arc::new(Self { first, taken: AtomicU64::new(0), enough, ends })
    }

    /// The seed of the next case.
    fn next(&self) -> Option<u64> {
        let n = self.taken.fetch_add(1, Ordering::Relaxed);
        let goes_on = self.ends.map_or(n < self.enough, |ends| Instant::now() < ends);
        goes_on.then_some(self.first + n)
    }

    fn report(&self, what: &str) {
        println!("{} {what}, seeds from {} on", self.taken.load(Ordering::Relaxed), self.first);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Messages

fn pool() -> DescriptorPool {
    DescriptorPool::decode(DESCRIPTORS).unwrap()
}

/// Words with a meaning somewhere in the contract. Endpoints lead only to this machine, however they are mangled.
const WORDS: &[&str] = &[
    "a",
    "b",
    "s1",
    "loop",
    "",
    "0",
    "1",
    "99",
    "unix:/none",
    "unix:",
    "UNAVAILABLE",
    "OK",
    "..",
    "\u{202e}x\u{9b}1m",
    "constructor",
    "a-name-of-sixty-four-letters-is-one-more-than-there-may-be-------",
];

/// A message of this kind with some of its fields, some of them with values at their bounds.
fn message(rng: &mut Rng, of: &MessageDescriptor, depth: u32) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        if !rng.bool() || (depth > 6 && matches!(field.kind(), Kind::Message(_))) {
            continue;
        }
        let value = if field.is_map() {
            let Kind::Message(entry) = field.kind() else { unreachable!("the entries of a map are messages") };
            let value = entry.map_entry_value_field();
            let keys = (0..rng.u8(..4)).map(|_| MapKey::String(word(rng))).collect::<Vec<_>>();
            Value::Map(keys.into_iter().map(|key| (key, scalar(rng, &value, depth))).collect())
        } else if field.is_list() {
            Value::List((0..rng.u8(..4)).map(|_| scalar(rng, &field, depth)).collect())
        } else {
            scalar(rng, &field, depth)
        };
        message.set_field(&field, value);
    }
    message
}

fn word(rng: &mut Rng) -> String {
    rng.choice(WORDS).map(|word| (*word).to_owned()).unwrap()
}

fn scalar(rng: &mut Rng, field: &FieldDescriptor, depth: u32) -> Value {
    let number = *rng.choice(&[0, 1, 2, 5, 1000, i64::from(u32::MAX), i64::MAX, i64::MIN, -1]).unwrap();
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "any will do"
    )]
    match field.kind() {
        Kind::Double => {
            Value::F64(*rng.choice(&[0.0, -1.5, f64::NAN, f64::INFINITY, f64::MAX, number as f64]).unwrap())
        }
        Kind::Float => Value::F32(number as f32),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(number as i32),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(number),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(number as u32),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(number as u64),
        Kind::Bool => Value::Bool(rng.bool()),
        Kind::String => Value::String(word(rng)),
        Kind::Bytes => Value::Bytes(word(rng).into()),
        Kind::Message(of) => Value::Message(message(rng, &of, depth + 1)),
        Kind::Enum(_) => Value::EnumNumber(rng.i32(-1..10)),
    }
}

/// Changes some bytes, usually few, so that most of the message keeps its meaning.
fn mangled(rng: &mut Rng, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..rng.u32(..6).saturating_sub(2) {
        let at = rng.usize(..=bytes.len());
        let to = rng.usize(at..=bytes.len().min(at + 64));
        match rng.u8(..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(..8),
            1 if at < bytes.len() => bytes[at] = *rng.choice(&[0, 0x7f, 0x80, 0xff]).unwrap(),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..to)),
            4 => {
                // The message is repeated up to some thousand times: a bound must hold for any number.
                let piece = bytes[at..to].to_vec().repeat(1 << rng.u32(..12));
                bytes.splice(at..at, piece.into_iter().take(1 << 20));
            }
            _ => drop(bytes.splice(at..at, (0..rng.usize(..16)).map(|_| rng.u8(..)).collect::<Vec<_>>())),
        }
    }
    bytes
}

/// A message as gRPC frames it. The frame is sometimes mangled, too.
fn framed(rng: &mut Rng, message: &[u8]) -> Vec<u8> {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(message.len().try_into().unwrap());
    framed.put_slice(message);
    if rng.u8(..16) == 0 { mangled(rng, framed.to_vec()) } else { framed.to_vec() }
}

// ---------------------------------------------------------------------------------------------------------------
// Requests

#[tokio::test(flavor = "multi_thread")]
async fn every_request_is_answered_or_refused() {
    const CALLERS: usize = 8;
    let cases = Cases::of(1_500);
    let home = Home::new().with_args(["--set", "cycle.deadline=1s", "--set", "registry.max_subsystems=200"]);
    let mut service = home.serve().await;
    let methods: Arc<Vec<_>> =
        Arc::new(pool().services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect());
    assert!(methods.len() > 15);
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let address = service.address();
        let (cases, methods) = (cases.clone(), methods.clone());
        callers.spawn(async move {
            let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
            while let Some(seed) = cases.next() {
                let called = AssertUnwindSafe(request(&channel, &methods, seed)).catch_unwind().await;
                assert!(called.is_ok(), "seed {seed}");
            }
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
    cases.report("requests");
    unharmed(&home, &mut service).await;
}

async fn request(channel: &Channel, methods: &[MethodDescriptor], seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let method = rng.choice(methods).unwrap();
    let request = message(&mut rng, &method.input(), 0).encode_to_vec();
    let request = mangled(&mut rng, request);
    let body = framed(&mut rng, &request);
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(Bytes::from(body))))
        .unwrap();
    let (code, text) = patiently("an answer", status(channel.clone(), request, method.is_server_streaming())).await;
    let method = method.name();
    // UNIMPLEMENTED is allowed: the other contract is not served here.
    assert!(!["2", "13", "15"].contains(&code.as_str()), "{method} answers {code}, which is a defect: {text}");
}

/// The status of a call, or an empty one of a stream that has begun.
async fn status(channel: Channel, request: Request<Body>, is_stream: bool) -> (String, String) {
    try_status(channel, request, is_stream).await.unwrap()
}

/// The same, if the connection lasts until the answer.
async fn try_status(
    channel: Channel,
    request: Request<Body>,
    is_stream: bool,
) -> Result<(String, String), tonic::transport::Error> {
    let answer = channel.oneshot(request).await?;
    let status = |headers: &HeaderMap| {
        let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        text("grpc-status").map(|code| (code, text("grpc-message").unwrap_or_default()))
    };
    if let Some(status) = status(answer.headers()) {
        return Ok(status);
    }
    assert_eq!(answer.status().as_u16(), 200);
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        match frame.unwrap().into_trailers() {
            Ok(trailers) => return Ok(status(&trailers).unwrap()),
            Err(_) if is_stream => break,
            Err(_) => {}
        }
    }
    Ok(Default::default())
}

/// Asserts that the service responds, that nothing in it has panicked, and that it ends as it should.
async fn unharmed(home: &Home, service: &mut Service) {
    let mut client = service.client().await;
    patiently("the status", client.status()).await.unwrap();
    let (_, most) = service.memory();
    assert!(most < 2 << 30, "it held {most} bytes");
    let log = std::fs::read_to_string(home.path("log")).unwrap();
    let mut defects = log.lines().filter(|line| line.contains("panicked") || line.contains("defect"));
    assert_eq!(defects.next(), None);
    for _ in 0..2 {
        service.signal(rustix::process::Signal::TERM);
        assert!(service.ended().await.success(), "{}", home.log());
        // The next process can read everything that this one has acknowledged.
        *service = home.serve().await;
        patiently("the status", service.client().await.status()).await.unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Answers

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_of_a_subsystem_affects_others() {
    const HOSTILE: usize = 24;
    let cases = Cases::of(25);
    let home = Home::new();
    let mut service = home.serve().await;
    let mut client = service.client().await;
    let fleet = Fleet::start().await;
    // Time enough on a busy machine.
    let healthy = pb::Registration { timeout: ms(60_000), ..registration("healthy", fleet.endpoint()) };
    client.register(healthy).await.unwrap();
    let (_hostile, endpoint) = hostile(cases.first).await;
    let (_garbled, garbage) = garbage(cases.first).await;
    for i in 0..HOSTILE {
        let endpoint = if i % 8 == 0 { &garbage } else { &endpoint };
        let registration = pb::Registration {
            timeout: ms(300),
            breaker: Some(pb::BreakerPolicy { disabled: true, ..pb::BreakerPolicy::default() }),
            ..registration(&format!("hostile{i}"), endpoint)
        };
        client.register(registration).await.unwrap();
    }
    while let Some(seed) = cases.next() {
        let cycle = patiently("the cycle", client.run()).await.unwrap_or_else(|status| panic!("seed {seed}: {status}"));
        assert_eq!(cycle.subsystems.len(), HOSTILE + 1);
        assert_eq!(part(&cycle, "healthy").state(), pb::SubsystemState::Succeeded, "seed {seed}");
        for part in &cycle.subsystems {
            let failed = part.state() != pb::SubsystemState::Succeeded;
            assert_eq!(failed, !part.error_code.is_empty(), "seed {seed}: {part:?}");
            assert!(part.error_message.len() <= 2048, "seed {seed}: {part:?}");
        }
    }
    cases.report("cycles");
    unharmed(&home, &mut service).await;
}

/// A server that answers each call as its seed decides.
async fn hostile(first: u64) -> (JoinSet<()>, String) {
    let seeds = Arc::new(AtomicU64::new(first));
    serve(move |stream| {
        let seeds = seeds.clone();
        async move {
            let service = service_fn(move |_request| {
                let mut rng = Rng::with_seed(seeds.fetch_add(1, Ordering::Relaxed));
                async move { Ok::<_, Infallible>(answer(&mut rng)) }
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await
}

/// An answer that may be wrong in its status, headers, message and trailers.
fn answer(
    rng: &mut Rng,
) -> Response<StreamBody<impl futures_util::Stream<Item = Result<Frame<Bytes>, std::io::Error>> + use<>>> {
    let response = pool().get_message_by_name("dreamnet.subsystem.v1.RunCycleResponse").unwrap();
    let message = message(rng, &response, 0).encode_to_vec();
    let message = mangled(rng, message);
    let mut frames = Vec::new();
    for _ in 0..*rng.choice(&[1, 1, 1, 1, 1, 1, 0, 2]).unwrap() {
        frames.push(Ok(Frame::data(framed(rng, &message).into())));
    }
    let mut headers = HeaderMap::new();
    let mut put = |name: &'static str, value: Vec<u8>| {
        if let Ok(value) = HeaderValue::from_bytes(&value) {
            headers.append(HeaderName::from_static(name), value);
        }
    };
    let status = rng.choice(&["0", "0", "0", "0", "2", "9", "14", "-1", "99999999999", "x", ""]).unwrap();
    put("grpc-status", (*status).into());
    if rng.bool() {
        let text = word(rng).repeat(1 << rng.u32(..15));
        put("grpc-message", mangled(rng, text.into_bytes()));
    }
    if rng.bool() {
        let details = word(rng).into_bytes();
        put("grpc-status-details-bin", mangled(rng, details));
    }
    match rng.u8(..16) {
        0 => frames.push(Err(std::io::Error::other("the end"))),
        1 => {}
        _ => frames.push(Ok(Frame::trailers(headers.clone()))),
    }
    let content = ["application/grpc", "application/grpc+proto", "text/html", ""];
    let content = if rng.u8(..8) == 0 { *rng.choice(&content).unwrap() } else { content[0] };
    let http = if rng.u8(..8) == 0 { *rng.choice(&[200, 204, 301, 401, 429, 502, 503, 504]).unwrap() } else { 200 };
    let mut answer = Response::builder().status(http).header("content-type", content);
    if rng.u8(..8) == 0 {
        answer = answer.header("grpc-encoding", *rng.choice(&["gzip", "identity", "?"]).unwrap());
        answer.headers_mut().unwrap().extend(headers);
    }
    answer.body(StreamBody::new(futures_util::stream::iter(frames))).unwrap()
}

/// A server whose bytes are HTTP/2 only by accident.
async fn garbage(first: u64) -> (JoinSet<()>, String) {
    const BEGINNINGS: &[&[u8]] =
        &[b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"\0\0\0\x04\0\0\0\0\0", b"\x15\x03\x03"];
    let seeds = Arc::new(AtomicU64::new(first));
    serve(move |mut stream: TcpStream| {
        let mut rng = Rng::with_seed(seeds.fetch_add(1, Ordering::Relaxed));
        async move {
            let mut bytes = rng.choice(BEGINNINGS).unwrap().to_vec();
            // Frames of any kind follow well-formed settings.
            for _ in 0..rng.u8(..8) {
                let payload: Vec<u8> = (0..rng.usize(..64)).map(|_| rng.u8(..)).collect();
                bytes.extend([
                    0,
                    0,
                    u8::try_from(payload.len()).unwrap(),
                    rng.u8(..12),
                    rng.u8(..),
                    0,
                    0,
                    0,
                    rng.u8(..4),
                ]);
                bytes.extend(payload);
            }
            let _ = stream.write_all(&bytes).await;
            if rng.bool() {
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        }
    })
    .await
}

/// Serves each connection in a task of its own.
async fn serve<F>(connection: impl Fn(TcpStream) -> F + Send + 'static) -> (JoinSet<()>, String)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            connections.spawn(connection(stream));
            while connections.try_join_next().is_some() {}
        }
    });
    (tasks, endpoint)
}

// ---------------------------------------------------------------------------------------------------------------
// Strangers

/// The name of the service, which no stranger may get to know.
const SECRET: &str = "known-to-callers-only";

/// Two services that enforce the same rights, one of them with TLS, and the valid credentials that cases mangle.
struct Doors {
    plain: Service,
    secure: Service,
    token: String,
    jwt: String,
    hello: Vec<u8>,
    roots: Arc<RootCertStore>,
    client: Issued,
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stranger_gets_in_whatever_it_sends() {
    const STRANGERS: usize = 8;
    const GRANTS: &str = "[[access.grants]]\nwho = [\"token:*\", \"jwt:*\", \"cert:*\"]\nrole = \"admin\"\n";
    let cases = Cases::of(1_500);
    let (plain, secure, fleet) = (Home::new().in_memory(), Home::new().in_memory(), Authority::new("fleet"));
    let token = write_tokens(&plain.path("tokens.toml"), &["ops"]).remove("ops").unwrap().1;
    let key = EncodingKey::from_ec_der(&KeyPair::generate().unwrap().serialize_der());
    let public = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
    std::fs::write(plain.path("jwks.json"), serde_json::json!({"keys": [public]}).to_string()).unwrap();
    let exp = jiff::Timestamp::now().as_second() + 86_400;
    let claims = serde_json::json!({"iss": "i", "aud": "a", "sub": "ops", "exp": exp});
    let jwt = encode(&Header::new(Algorithm::ES256), &claims, &key).unwrap();
    fleet.service().write(&secure.path(""), "service");
    fleet.write(secure.path("ca.pem"));
    let file = |home: &Home, name: &str| home.path(name).display().to_string();
    let of_plain = format!(
        "orchestrator_id = \"{SECRET}\"\n[access]\nmode = \"enforce\"\ntokens_file = \"{}\"\n[access.jwt]\nissuer = \
         \"i\"\naudience = \"a\"\njwks_file = \"{}\"\n{GRANTS}",
        file(&plain, "tokens.toml"),
        file(&plain, "jwks.json")
    );
    let of_secure = format!(
        "[server.tls]\ncert_file = \"{}\"\nkey_file = \"{}\"\nclient_ca_file = \"{}\"\n[access]\nmode = \
         \"enforce\"\n{GRANTS}",
        file(&secure, "service.pem"),
        file(&secure, "service.key"),
        file(&secure, "ca.pem")
    );
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(fleet.certificate.as_bytes()).unwrap()).unwrap();
    let roots = Arc::new(roots);
    let (plain, secure) = (plain.with_config(&of_plain), secure.with_config(&of_secure));
    let doors = Arc::new(Doors {
        plain: plain.serve().await,
        secure: secure.serve().await,
        hello: hello(&roots),
        client: fleet.client("spiffe://fleet/ops"),
        token,
        jwt,
        roots,
    });
    let mut strangers = JoinSet::new();
    for _ in 0..STRANGERS {
        let (cases, doors) = (cases.clone(), doors.clone());
        strangers.spawn(async move {
            let endpoint = Endpoint::from_shared(format!("http://{}", doors.plain.address())).unwrap();
            let channel = endpoint.connect_lazy();
            while let Some(seed) = cases.next() {
                let knocked = AssertUnwindSafe(knock(&doors, &channel, seed)).catch_unwind().await;
                assert!(knocked.is_ok(), "seed {seed}");
            }
        });
    }
    while let Some(ended) = strangers.join_next().await {
        ended.unwrap();
    }
    cases.report("strangers");
    // Those who are known still get in.
    let bearer = |token: &str| HeaderValue::from_str(&format!("Bearer {token}")).unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{}", doors.plain.address())).unwrap().connect_lazy();
    for known in [&doors.token, &doors.jwt] {
        let (code, text) = patiently("an answer", status(endpoint.clone(), asks(&[bearer(known)]), false)).await;
        assert_eq!(code, "0", "{text}");
    }
    assert!(handshake(&doors, |chain| chain).await, "a valid certificate");
    for (home, service) in [(&plain, &doors.plain), (&secure, &doors.secure)] {
        let (_, most) = service.memory();
        assert!(most < 256 << 20, "it held {most} bytes");
        let log = home.log();
        let mut defects = log.lines().filter(|line| line.contains("panicked") || line.contains("defect"));
        assert_eq!(defects.next(), None);
        assert!(!log.contains(&doors.token) && !log.contains(&doors.jwt), "a credential is in the log");
    }
}

async fn knock(doors: &Doors, channel: &Channel, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    match rng.u8(..16) {
        0 => {
            // Records of TLS that follow a hello which may be mangled.
            let mut bytes = doors.hello.clone();
            if rng.bool() {
                bytes.extend([rng.u8(20..25), 3, 3, 0, 40]);
                bytes.extend((0..40).map(|_| rng.u8(..)));
            }
            let bytes = mangled(&mut rng, bytes);
            let answer = said(doors.secure.address(), &bytes).await;
            assert!(answer.len() < 16 << 10, "{} bytes", answer.len());
        }
        1 => {
            let mut mangled_chain = false;
            let is_let_in = handshake(doors, |chain| {
                let changed = mangled(&mut rng, chain.clone());
                mangled_chain = changed != chain;
                changed
            });
            let is_let_in = is_let_in.await;
            assert!(!(mangled_chain && is_let_in), "with a certificate that nobody has signed");
        }
        2..8 => {
            let known = if rng.bool() { &doors.token } else { &doors.jwt };
            let mut text = format!("{} {known}", rng.choice(&["Bearer", "bearer", "Basic", "Bearer ", ""]).unwrap());
            text = String::from_utf8_lossy(&mangled(&mut rng, text.into_bytes())).into_owned();
            let mut headers = vec![text.clone()];
            if rng.u8(..4) == 0 {
                headers.push(text.clone());
            }
            let is_known = headers.len() == 1 && text.split_once(' ').is_some_and(|(_, token)| token.trim() == known);
            let headers: Vec<_> = headers.iter().filter_map(|text| HeaderValue::from_str(text).ok()).collect();
            if is_known || headers.iter().map(HeaderValue::len).sum::<usize>() > 8 << 10 {
                return;
            }
            // The connection of a stranger ends after a while.
            let answer = patiently("an answer", try_status(channel.clone(), asks(&headers), false)).await;
            let (code, text) = answer.unwrap_or_else(|_| ("16".to_owned(), String::new()));
            assert_eq!(code, "16", "{text}");
        }
        _ => {
            let path = rng
                .choice(&[
                    "/api/status",
                    "/",
                    "/metrics",
                    "/api/whoami",
                    "/api/cycles",
                    "/api/loops/pause",
                    "/login",
                    "/logout",
                ])
                .unwrap();
            let method = rng.choice(&["GET", "POST", "HEAD", "OPTIONS"]).unwrap();
            // None of these is valid, whatever becomes of it.
            let (token, jwt) = (&doors.token[..doors.token.len() - 1], &doors.jwt[..doors.jwt.len() - 9]);
            let port = doors.plain.admin().port();
            let form = format!("token={token}&token={jwt}");
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nAuthorization: Bearer \
                 {jwt}\r\nCookie: orc-{port}={}; orc-{port}\r\nContent-Type: \
                 application/x-www-form-urlencoded\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{form}",
                "0".repeat(64),
                form.len()
            );
            let request = mangled(&mut rng, request.into_bytes());
            let answer = said(doors.plain.admin(), &request).await;
            let answer = String::from_utf8_lossy(&answer);
            assert!(!answer.contains(SECRET) && !answer.contains("orchestrator_cycles_total"), "{answer}");
        }
    }
}

/// The status of the service, asked for with these values of `authorization`.
fn asks(values: &[HeaderValue]) -> Request<Body> {
    let request = Request::builder()
        .method(Method::POST)
        .uri("/dreamnet.orchestrator.v1.Orchestrator/GetStatus")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let request = values.iter().fold(request, |request, value| request.header("authorization", value));
    request.body(Body::new(Full::new(Bytes::from_static(&[0; 5])))).unwrap()
}

/// The answer to these bytes, after which nothing more comes.
async fn said(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut answer = Vec::new();
    // It may close the connection before it has read all.
    if stream.write_all(bytes).await.is_ok() && stream.shutdown().await.is_ok() {
        let _ = patiently("the end of the connection", stream.read_to_end(&mut answer)).await;
    }
    answer
}

/// TLS of a client that shows these certificates.
fn client(roots: &Arc<RootCertStore>, shows: Option<CertifiedKey>) -> ClientConfig {
    let config = ClientConfig::builder().with_root_certificates(roots.clone());
    let mut config = match shows {
        None => config.with_no_client_auth(),
        Some(key) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key))),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// The first bytes of a client.
fn hello(roots: &Arc<RootCertStore>) -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::new(client(roots, None)), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

/// Shows the certificate of a client, after `change`. True if the service accepts it, and the settings of HTTP/2.
async fn handshake(doors: &Doors, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> bool {
    let certificate = CertificateDer::from_pem_slice(doors.client.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(doors.client.key.as_bytes()).unwrap();
    let key = any_supported_type(&key).unwrap();
    let chain = vec![CertificateDer::from(change(certificate.to_vec()))];
    let config = client(&doors.roots, Some(CertifiedKey::new(chain, key)));
    let stream = TcpStream::connect(doors.secure.address()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let connect = TlsConnector::from(Arc::new(config)).connect(name, stream);
    let Ok(mut stream) = patiently("the handshake", connect).await else { return false };
    // In TLS 1.3, the client learns only now whether its certificate was accepted.
    let mut first = [0; 9];
    let asked = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    asked.is_ok() && patiently("the settings", stream.read_exact(&mut first)).await.is_ok()
}

// ---------------------------------------------------------------------------------------------------------------
// In the process

#[test]
fn every_configuration_is_read_or_refused() {
    const REFERENCE: &str = include_str!("../../examples/orchestrator.toml");
    const FLEET: &str = include_str!("../../examples/dreamnet.toml");
    let cases = Cases::of(600);
    while let Some(seed) = cases.next() {
        let mut rng = Rng::with_seed(seed);
        let mut chosen = rng.fork();
        // Includes the keys that the reference shows without setting them.
        let reference = REFERENCE.lines().map(|line| match line.strip_prefix('#') {
            Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') && chosen.u8(..4) == 0 => key,
            _ => line,
        });
        let whole = if rng.bool() { reference.collect::<Vec<_>>().join("\n") } else { FLEET.to_owned() };
        let text = mangled(&mut rng, whole.into_bytes());
        let text = String::from_utf8_lossy(&text);
        let read = catch_unwind(|| Config::from_toml_str("fuzz.toml", &text).map_err(|error| error.to_string()));
        if let Err(error) = read.unwrap_or_else(|_| panic!("seed {seed}")) {
            assert!(!error.is_empty() && error.len() < 64 << 10, "seed {seed}: {} bytes of errors", error.len());
        }
    }
    cases.report("configurations");
}

#[test]
fn every_accepted_struct_is_valid() {
    let cases = Cases::of(5_000);
    let of = pool().get_message_by_name("google.protobuf.Struct").unwrap();
    while let Some(seed) = cases.next() {
        let mut rng = Rng::with_seed(seed);
        let bytes = message(&mut rng, &of, 0).encode_to_vec();
        let bytes = Bytes::from(mangled(&mut rng, bytes));
        let taken = catch_unwind(|| Payload::check(bytes.clone()));
        let Ok(payload) = taken.unwrap_or_else(|_| panic!("seed {seed}")) else { continue };
        // Readers in other languages can read every accepted value.
        prost_types::Struct::decode(bytes).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let json = payload.to_json();
        assert!(serde_json::to_string(&json).is_ok(), "seed {seed}");
    }
    cases.report("structs");
}
