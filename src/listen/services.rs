//! Routes calls to services.

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

    /// The same services; a call reaches them only if `check` lets it.
    #[must_use]
    pub(crate) fn behind(self, check: impl Fn(&Request<Body>) -> Result<(), Status> + Send + Sync + 'static) -> Self {
        let check = Arc::new(check);
        let behind = |answer: Arc<Answer>| -> Arc<Answer> {
            let check = check.clone();
            Arc::new(move |request| match check(&request) {
                Ok(()) => answer(request),
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
