//! Which service a call is for.

use std::{collections::BTreeMap, convert::Infallible, future::poll_fn, sync::Arc};

use futures_util::{
    FutureExt,
    future::{self, BoxFuture},
};
use tonic::{
    Status,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    server::NamedService,
};

/// The services of a server, each under its full name.
///
/// tonic has a router too, but that one is made of a whole web framework, which every subsystem in Rust would compile.
#[derive(Clone, Default)]
pub(crate) struct Services(BTreeMap<&'static str, Arc<Answer>>);

type Answer = dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync;

impl Services {
    /// These, and one more.
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

    /// Hands a call over to the service that its path names: `/SERVICE/METHOD`.
    pub(super) fn call(&self, request: Request<Body>) -> BoxFuture<'static, Response<Body>> {
        let name = request.uri().path().split('/').nth(1).unwrap_or_default();
        if let Some(answer) = self.0.get(name) {
            answer(request)
        } else {
            let status = Status::unimplemented("this service is not served here; reflection lists those that are");
            future::ready(status.into_http()).boxed()
        }
    }
}
