//! Routes calls to services.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{self, BoxFuture},
};
use http_body::Frame;
use tonic::{
    Status,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    server::NamedService,
};

/// The services of a server, by full name.
///
/// tonic also has a router, but it contains a whole web framework, which every subsystem in Rust would compile.
#[derive(Clone, Default)]
pub(crate) struct Services(BTreeMap<&'static str, Arc<Answer>>);

type Answer = dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync;

impl Services {
    /// Adds a service.
    #[must_use]
    pub(crate) fn and<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
        S: Clone + Send + Sync + 'static,
        S::Future: Send,
    {
        let answer = move |request| {
            let mut service = service.clone();
            let answered = async move {
                let Ok(()) = poll_fn(|cx| service.poll_ready(cx)).await;
                let Ok(response) = service.call(request).await;
                response
            };
            answered.boxed()
        };
        self.0.insert(S::NAME, Arc::new(answer));
        self
    }

    /// The same services; a call reaches them only if `begin` lets it, and keeps the returned value until its answer is
    /// complete.
    #[must_use]
    pub(crate) fn behind<T: Send + Unpin + 'static>(
        self,
        begin: impl Fn(&Request<Body>) -> Result<T, Status> + Send + Sync + 'static,
    ) -> Self {
        let begin = Arc::new(begin);
        let behind = |answer: Arc<Answer>| -> Arc<Answer> {
            let begin = begin.clone();
            Arc::new(move |request| match begin(&request) {
                Ok(kept) => answer(request)
                    .map(|response| response.map(|body| Body::new(Keeping { body, _kept: kept })))
                    .boxed(),
                Err(status) => future::ready(status.into_http()).boxed(),
            })
        };
        Self(self.0.into_iter().map(|(name, answer)| (name, behind(answer))).collect())
    }

    /// Passes a call to the service in its path: `/SERVICE/METHOD`.
    pub(super) fn call(&self, request: Request<Body>) -> BoxFuture<'static, Response<Body>> {
        let name = request.uri().path().split('/').nth(1).unwrap_or_default();
        if let Some(answer) = self.0.get(name) {
            answer(request)
        } else {
            let status = Status::unimplemented("this service is not served here; reflection lists the services");
            future::ready(status.into_http()).boxed()
        }
    }
}

/// The body of an answer, with a value that it keeps to its end.
struct Keeping<T> {
    body: Body,
    _kept: T,
}

impl<T: Unpin> http_body::Body for Keeping<T> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
