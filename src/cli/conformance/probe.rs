//! The calls that checks make.

use std::{
    collections::BTreeMap,
    io,
    marker::PhantomData,
    net::Shutdown,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut as _, Bytes};
use futures_util::{FutureExt as _, future::BoxFuture};
use hyper_util::{
    client::legacy::{Client, connect::Connect},
    rt::{TokioExecutor, TokioIo},
};
use jiff::Timestamp;
use prost::Message;
use serde_json::Value;
use tokio::{
    net::{TcpStream, UnixStream},
    time::Instant,
};
use tonic::{
    Request, Response, Status,
    body::Body,
    client::Grpc,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::{self, Channel, ClientTlsConfig, Uri},
};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use tonic_prost::{ProstCodec, ProstDecoder};
use tower::{Service, service_fn};

use super::super::{Exit, Failure};
use crate::{
    model::{Endpoint, Payload},
    proto::{
        subsystem::v1::{self as pb, subsystem_client::SubsystemClient},
        timestamp,
    },
};

/// What is used when the user names no subsystem.
const MADE_UP_NAME: &str = "conformance";
/// The most that is read in one answer: as much as any registration can allow.
const MAX_ANSWER: usize = 64 << 20;
const CONNECT: Duration = Duration::from_secs(5);
/// The authority that a socket has none of.
const LOCAL: &str = "http://localhost";

/// The caller of one subsystem, with an epoch of its own and cycle ids that grow with every request.
pub(super) struct Probe {
    endpoint: Endpoint,
    /// The one that is checked, and others that are served beside it. None when the user has named none.
    names: Vec<String>,
    parameters: Bytes,
    inputs: BTreeMap<String, pb::Input>,
    timeout: Duration,
    epoch: u64,
    next_cycle: AtomicU64,
    channel: Channel,
}

impl Probe {
    /// Connects.
    ///
    /// # Errors
    /// It can't be reached, or an input is not an object or nests too deep.
    pub(super) async fn connect(
        endpoint: Endpoint,
        names: Vec<String>,
        parameters: Bytes,
        inputs: Vec<(String, Value)>,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let inputs = inputs.into_iter().map(|(name, output)| {
            let wrong = |what: String| Failure::new(Exit::Usage, format!("the input {name} {what}"));
            let object = output.as_object().ok_or_else(|| wrong("is not a JSON object".into()))?;
            let payload = Payload::from_json(object).map_err(|malformed| wrong(malformed.to_string()))?;
            let output = payload.as_bytes().clone();
            Ok((name, pb::Input { output, freshness: pb::Freshness::Fresh.into(), cycle_id: 0 }))
        });
        let inputs = inputs.collect::<Result<_, Failure>>()?;
        let unreachable = |why: String| {
            Failure::new(Exit::Unreachable, format!("can't reach a subsystem at {endpoint}: {}", super::clean(&why)))
        };
        let channel = match tokio::time::timeout(CONNECT, dial(&endpoint, &Handle::default())).await {
            Ok(channel) => channel.map_err(|error| unreachable(chain(&error)))?,
            Err(_) => return Err(unreachable("no connection within 5s".into())),
        };
        // Both grow from run to run, so that a subsystem can be checked again. A run makes fewer cycles than it takes
        // milliseconds, times 100, and the ids stay exact in languages whose numbers are doubles.
        let now = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
        let next_cycle = AtomicU64::new(now * 100);
        Ok(Self { endpoint, names, parameters, inputs, timeout, epoch: now, next_cycle, channel })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The subsystem that is checked.
    pub(super) fn name(&self) -> &str {
        self.names.first().map_or(MADE_UP_NAME, String::as_str)
    }

    /// What the user has named: the subsystem that is checked, and others that are served beside it.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    fn client(&self) -> SubsystemClient<Channel> {
        SubsystemClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    fn within<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// A request for a cycle that was never asked for before.
    pub(super) fn next_cycle(&self) -> pb::RunCycleRequest {
        let cycle_id = self.next_cycle.fetch_add(1, Ordering::Relaxed);
        let mut inputs = self.inputs.clone();
        for input in inputs.values_mut() {
            input.cycle_id = cycle_id;
        }
        pb::RunCycleRequest {
            subsystem: self.name().to_owned(),
            cycle_id,
            epoch: self.epoch,
            attempt: 1,
            scheduled_at: Some(timestamp(Timestamp::now())),
            parameters: self.parameters.clone(),
            inputs,
        }
    }

    /// What `Initialize` is called with.
    pub(super) fn initialization(&self) -> pb::InitializeRequest {
        pb::InitializeRequest {
            subsystem: self.name().to_owned(),
            orchestrator_id: "conformance".into(),
            epoch: self.epoch,
            parameters: self.parameters.clone(),
        }
    }

    /// Waits for an answer. The library calls a late one cancelled, as if somebody had cancelled it, and waits without
    /// end for the rest of one that has begun.
    async fn answer<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        let begun = Instant::now();
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) if begun.elapsed() < self.timeout => Err(status),
            Ok(Err(_)) | Err(_) => Err(self.no_answer()),
        }
    }

    fn no_answer(&self) -> Status {
        Status::deadline_exceeded(format!("no answer within {:?}", self.timeout))
    }

    pub(super) async fn initialize(&self, request: &pb::InitializeRequest) -> Result<(), Status> {
        self.answer(self.client().initialize(self.within(request.clone()))).await.map(|_| ())
    }

    pub(super) async fn run(&self, request: &pb::RunCycleRequest) -> Result<pb::RunCycleResponse, Status> {
        self.answer(self.client().run_cycle(self.within(request.clone()))).await
    }

    /// `RunCycle` with a deadline that only the server keeps: the client of the library would end the call itself. Also
    /// tells how long it took. `None` where the server is dialed by https, which only that client can.
    pub(super) async fn run_late(
        &self,
        request: &pb::RunCycleRequest,
        deadline: Duration,
    ) -> Option<(Result<pb::RunCycleResponse, Status>, Duration)> {
        let handle = Handle::default();
        match &self.endpoint {
            Endpoint::Http(uri) => Some(self.run_patiently(tcp(&handle), uri, request, deadline).await),
            Endpoint::Unix(path) => Some(self.run_patiently(unix(path, &handle), LOCAL, request, deadline).await),
            Endpoint::Https(_) => None,
        }
    }

    async fn run_patiently(
        &self,
        connector: impl Connect + Clone + Send + Sync + 'static,
        origin: &str,
        request: &pb::RunCycleRequest,
        deadline: Duration,
    ) -> (Result<pb::RunCycleResponse, Status>, Duration) {
        let origin = origin.parse().unwrap_or_default();
        let client = Client::builder(TokioExecutor::new()).http2_only(true).build::<_, Body>(connector);
        let mut client = SubsystemClient::with_origin(client, origin).max_decoding_message_size(MAX_ANSWER);
        // The time to connect is none of the call's.
        let _ = tokio::time::timeout(self.timeout, client.get_status(self.asking_for_status())).await;
        let mut request = Request::new(request.clone());
        request.set_timeout(deadline);
        let begun = Instant::now();
        let answer = match tokio::time::timeout(self.timeout, client.run_cycle(request)).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(self.no_answer()),
        };
        (answer, begun.elapsed())
    }

    /// `RunCycle` with these bytes as the request, whatever they are.
    pub(super) async fn run_raw(&self, request: Bytes) -> Result<pb::RunCycleResponse, Status> {
        let mut client = Grpc::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER);
        let path = PathAndQuery::from_static("/dreamnet.subsystem.v1.Subsystem/RunCycle");
        self.answer(async {
            client.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
            client.unary(self.within(request), path, RawRequest(PhantomData)).await
        })
        .await
    }

    pub(super) async fn status(&self) -> Result<pb::GetStatusResponse, Status> {
        self.answer(self.client().get_status(self.asking_for_status())).await
    }

    fn asking_for_status(&self) -> Request<pb::GetStatusRequest> {
        self.within(pb::GetStatusRequest { subsystem: self.name().to_owned() })
    }

    pub(super) async fn health(&self, service: &str) -> Result<HealthCheckResponse, Status> {
        let request = HealthCheckRequest { service: service.to_owned() };
        self.answer(HealthClient::new(self.channel.clone()).check(self.within(request))).await
    }

    /// Begins a call on a connection of its own, and cuts that after a while. Tells how long the call took, if it was
    /// answered before that.
    ///
    /// # Errors
    /// There is no second connection to be had, or it could not be cut.
    pub(super) async fn cut_off(
        &self,
        request: &pb::RunCycleRequest,
        after: Duration,
    ) -> Result<Option<Duration>, String> {
        let handle = Handle::default();
        let channel = dial(&self.endpoint, &handle).await.map_err(|error| chain(&error))?;
        let mut client = SubsystemClient::new(channel);
        let begun = Instant::now();
        let call = client.run_cycle(self.within(request.clone()));
        // Dropped only after the cut: dropping the call cancels it.
        tokio::pin!(call);
        let took = tokio::time::timeout(after, &mut call).await.ok().map(|_| begun.elapsed());
        handle.cut().map_err(|error| error.to_string())?;
        Ok(took)
    }
}

/// The encoded message as it is to be sent.
struct RawRequest<U>(PhantomData<U>);

impl<U: Message + Default + Send + 'static> Codec for RawRequest<U> {
    type Encode = Bytes;
    type Decode = U;
    type Encoder = RawEncoder;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> RawEncoder {
        RawEncoder
    }

    fn decoder(&mut self) -> ProstDecoder<U> {
        ProstCodec::<(), U>::raw_decoder(BufferSettings::default())
    }
}

struct RawEncoder;

impl Encoder for RawEncoder {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

/// A second handle on the socket of a connection, to cut it under the feet of everybody who uses it.
#[derive(Clone, Default)]
struct Handle(Arc<Mutex<Option<Socket>>>);

enum Socket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Handle {
    fn keep(&self, socket: Socket) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }

    fn cut(&self) -> io::Result<()> {
        let closed = match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Socket::Tcp(socket)) => socket.shutdown(Shutdown::Both),
            Some(Socket::Unix(socket)) => socket.shutdown(Shutdown::Both),
            None => Ok(()),
        };
        match closed {
            // The other side was quicker.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            closed => closed,
        }
    }
}

/// How a connection comes about.
type Dial<S> = BoxFuture<'static, io::Result<TokioIo<S>>>;

async fn dial(to: &Endpoint, handle: &Handle) -> Result<Channel, transport::Error> {
    let configure = |uri: &str| {
        let endpoint = transport::Endpoint::from_shared(uri.to_owned())?;
        Ok(endpoint.user_agent(concat!("orchestrator/", env!("CARGO_PKG_VERSION")))?.connect_timeout(CONNECT))
    };
    match to {
        Endpoint::Http(uri) => configure(uri)?.connect_with_connector(tcp(handle)).await,
        Endpoint::Https(uri) => {
            let tls = ClientTlsConfig::new().with_native_roots();
            configure(uri)?.tls_config(tls)?.connect_with_connector(tcp(handle)).await
        }
        Endpoint::Unix(path) => configure(LOCAL)?.connect_with_connector(unix(path, handle)).await,
    }
}

fn tcp(
    handle: &Handle,
) -> impl Service<Uri, Response = TokioIo<TcpStream>, Error = io::Error, Future = Dial<TcpStream>> + Clone + use<> {
    let handle = handle.clone();
    service_fn(move |uri: Uri| {
        let handle = handle.clone();
        let dial = async move {
            let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
            // A socket has no use for the brackets of an IPv6 address in a URI.
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            let stream = stream.into_std()?;
            handle.keep(Socket::Tcp(stream.try_clone()?));
            Ok(TokioIo::new(TcpStream::from_std(stream)?))
        };
        dial.boxed()
    })
}

fn unix(
    path: &str,
    handle: &Handle,
) -> impl Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future = Dial<UnixStream>> + Clone + use<> {
    let (path, handle) = (Arc::new(PathBuf::from(path)), handle.clone());
    service_fn(move |_: Uri| {
        let (path, handle) = (path.clone(), handle.clone());
        let dial = async move {
            let stream = UnixStream::connect(&*path).await?.into_std()?;
            handle.keep(Socket::Unix(stream.try_clone()?));
            Ok(TokioIo::new(UnixStream::from_std(stream)?))
        };
        dial.boxed()
    })
}

/// An error and what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    with_causes(error.to_string(), error)
}

/// A text and what caused the error that it is of, in one line. Nothing is said twice.
pub(super) fn with_causes(mut text: String, error: &dyn std::error::Error) -> String {
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}
