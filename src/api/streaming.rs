//! `WatchCycles` over gRPC, with our own encoder. That of the library keeps the buffer of the last message until the
//! next one: a record of 3 MiB for each of 2,000 waiting watchers.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures_util::{
    FutureExt,
    future::{BoxFuture, ready},
};
use http_body::Frame;
use tokio::select;
use tonic::{
    Request, Status, Streaming,
    body::Body,
    codec::Codec as _,
    codegen::{
        Service,
        http::{self, HeaderValue, header},
    },
    metadata::MetadataMap,
    server::NamedService,
};

use super::{Api, Events, rpc::Rpc};
use crate::{
    listen::Peer,
    proto::{
        codec::Codec,
        framing,
        orchestrator::v1::{self as pb, orchestrator_server::Orchestrator as _},
    },
};

const WATCH: &str = "/dreamnet.orchestrator.v1.Orchestrator/WatchCycles";

/// A service whose callers are identified and limited, if the policy demands it, and whose calls have their [`Caller`]
/// in their extensions.
#[derive(Clone)]
pub(super) struct Called<S> {
    pub(super) service: S,
    pub(super) api: Api,
}

impl<S: NamedService> NamedService for Called<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Called<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions_mut().remove::<Peer>().unwrap_or_default();
        let caller = self.api.gate.judge.caller(peer, request.headers());
        let gate = self.api.gate.clone();
        let rpc = Rpc::of_path(request.uri().path());
        if let Some(report) = caller.own.clone().filter(|own| !own.events.is_empty()) {
            if let Err(status) = gate.check_meant(&caller, rpc, request.headers()) {
                return ready(Ok(status.into_http())).boxed();
            }
            let taken =
                async move { Ok(gate.take_report(&report).await.err().unwrap_or_else(|| Status::ok("")).into_http()) };
            return taken.boxed();
        }
        let is_of = |rpc: &Rpc| rpc.path().is_some_and(|path| path == request.uri().path());
        let forwards = rpc.filter(is_of).and_then(|rpc| Some((rpc, self.api.forwards(rpc)?.clone())));
        let begun = match gate.begin(&caller, rpc) {
            Ok(begun) => begun,
            Err(status) => return ready(Ok(status.into_http())).boxed(),
        };
        if let Err(status) = gate.check_meant(&caller, rpc, request.headers()) {
            return ready(Ok(status.into_http())).boxed();
        }
        let call = if let Some((rpc, forwarder)) = forwards {
            let call = self.api.clone().forward(forwarder, rpc, caller.clone(), begun.clone(), request);
            call.map(|answer| Ok(answer.unwrap_or_else(Status::into_http))).boxed()
        } else {
            request.extensions_mut().insert(begun.clone());
            request.extensions_mut().insert(caller.clone());
            self.service.call(request).boxed()
        };
        let call = async move {
            let mut answer = select! {
                biased;
                answer = call => answer,
                status = gate.gives_way(begun, &caller, rpc) => Ok(status.into_http()),
            };
            if caller.was_forwarded
                && let Ok(answer) = &mut answer
            {
                gate.leading.said().put(answer.headers_mut());
            }
            answer
        };
        call.boxed()
    }
}

/// The generated service, except for `WatchCycles`.
#[derive(Clone)]
pub(super) struct Watching<S> {
    pub(super) others: S,
    pub(super) api: Api,
    pub(super) max_request_bytes: usize,
}

impl<S: NamedService> NamedService for Watching<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Watching<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.others.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != WATCH {
            return Box::pin(self.others.call(request));
        }
        let (api, max_request_bytes) = (self.api.clone(), self.max_request_bytes);
        Box::pin(async move {
            Ok(match watch(api, request, max_request_bytes).await {
                Ok(body) => {
                    let mut answer = http::Response::new(Body::new(body));
                    let grpc = HeaderValue::from_static("application/grpc");
                    answer.headers_mut().insert(header::CONTENT_TYPE, grpc);
                    answer
                }
                Err(status) => status.into_http(),
            })
        })
    }
}

async fn watch(api: Api, request: http::Request<Body>, max_request_bytes: usize) -> Result<Encoded, Status> {
    type WatchCodec = Codec<pb::WatchCyclesResponse, pb::WatchCyclesRequest>;
    let (head, body) = request.into_parts();
    let mut messages = Streaming::new_request(WatchCodec::default().decoder(), body, None, Some(max_request_bytes));
    let message = messages.message().await?.ok_or_else(|| Status::invalid_argument("the request has no message"))?;
    let request = Request::from_parts(MetadataMap::from_headers(head.headers), head.extensions, message);
    Ok(Encoded { events: api.watch_cycles(request).await?.into_inner(), ended: None, is_over: false })
}

/// Events as frames of an answer: available events are sent together, since clients close connections with many small
/// unread frames (CVE-2019-9517), and no sent data is kept.
struct Encoded {
    events: Events,
    /// The end of the stream, which is sent after the collected events.
    ended: Option<Status>,
    is_over: bool,
}

impl Encoded {
    /// Bytes of events that are collected into a frame, unless the first event alone is larger.
    const ENOUGH: usize = 16 << 10;
}

impl http_body::Body for Encoded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut gathered = BytesMut::new();
        while self.ended.is_none() && !self.is_over && gathered.len() < Self::ENOUGH {
            match self.events.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(event))) => framing::put(&mut gathered, &event),
                Poll::Ready(Some(Err(status))) => self.ended = Some(status),
                Poll::Ready(None) => self.ended = Some(Status::ok("")),
                Poll::Pending if gathered.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        if !gathered.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(gathered.freeze()))));
        }
        let Some(status) = self.ended.take() else { return Poll::Ready(None) };
        self.is_over = true;
        Poll::Ready(Some(framing::trailers(&status)))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::BodyExt;
    use prost::Message;

    use super::*;

    #[tokio::test]
    async fn sent_events_are_not_kept_and_available_ones_are_sent_together() {
        let bookmark =
            || pb::WatchCyclesResponse { event: Some(pb::CycleEvent { revision: 1, ..pb::CycleEvent::default() }) };
        let events = stream::iter([Ok(bookmark()), Ok(bookmark()), Err(Status::unavailable("the end"))]);
        let mut body = Encoded { events: Box::pin(events), ended: None, is_over: false };
        let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
        let one = bookmark().encode_to_vec();
        assert_eq!(data.len(), 2 * (5 + one.len()));
        assert_eq!(data[..5], [0, 0, 0, 0, u8::try_from(one.len()).unwrap()]);
        // No other value holds the buffer of a sent event.
        assert!(data.is_unique());
        let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "14");
        assert!(body.frame().await.is_none());
    }
}
