//! The entry point of all callers. Every RPC passes [`Gate::enter`], over gRPC and at the admin address: only this
//! makes an [`Entered`], which is required to reach the orchestrator. So callers are refused here, by the rules of
//! `rules`, and calls are counted here.

use std::{borrow::Borrow, collections::BTreeMap, future::pending, sync::Arc, task::Poll};

use futures_util::{
    FutureExt, Stream, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use jiff::Timestamp;
use tonic::{Extensions, Request, Response, Status, codegen::http::HeaderMap};

use super::{
    caller::{Caller, Own},
    calls::{Audited, CallCounts, CountedCall},
    error::status,
    forwarded,
    judge::{Authority, Denied, Judge},
    leading::Leading,
    rpc::{Asks, Rpc},
    rules::{REFLECTION, REGISTRARS},
    usage::{LimitReached, Load, Usage, Used},
};
use crate::{
    access::Targets,
    cluster::Membership,
    memory::{Held, Memory},
    model::{AuditTargets, Cause, Decision, Identity, Name, OwnEvent},
    orchestrator::{History, Orchestrator, Refusal, Sum},
    record,
};

/// Lets callers in. All clones share their counts.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) leading: Leading,
    /// Memory for decoded requests until they are answered.
    requests: Memory,
    calls: Arc<CallCounts>,
    usage: Arc<Usage>,
    pub(super) judge: Judge,
}

/// A call whose headers have arrived, in the extensions of its request. It counts under the limits of its caller while
/// the policy is enforced.
#[derive(Clone, Default)]
pub struct Begun(Option<Used>);

/// A call that was let in. It reaches the orchestrator, for as long as it lives: a stream keeps it to its end. Of calls
/// that followers answer as well, `O` is what these reach.
pub struct Entered<Q, O = Arc<Orchestrator>> {
    orchestrator: O,
    membership: Membership,
    pub(super) caller: Caller,
    pub(super) authority: Authority,
    identity: Identity,
    would_be_denied: bool,
    begun_at: Timestamp,
    own_event: OwnEvent,
    judge: Judge,
    rpc: Rpc,
    request: Q,
    room: Option<Held>,
    /// Counts it under the limits of its caller.
    begun: Begun,
}

impl<Q> Entered<Q> {
    /// The orchestrator, which handlers reach only here, and only while the call lives: they can't clone it.
    pub(super) fn orchestrator(&self) -> &Orchestrator {
        &self.orchestrator
    }

    /// The status of this call when the orchestrator refuses it.
    pub(super) fn refused(&self, refusal: impl Into<Refusal>) -> Status {
        let (identity, call) = (self.identity.clone(), self.rpc.name());
        let (name, denied) = match refusal.into() {
            Refusal::NotOwner(refusal) => (refusal.name.clone(), Denied::NotOwner { identity, call, refusal }),
            Refusal::NotCovered { name, target } => {
                (name, Denied::NotAllowed { identity, call, target, roles: REGISTRARS })
            }
            refusal => return status(refusal),
        };
        // It is summed up as a denied call.
        self.own_event.set();
        self.judge.denied_later(&self.caller, call, &denied, &name)
    }
}

/// A call that followers answer as well, from what they know of themselves.
pub type EnteredHere<Q> = Entered<Q, Option<Arc<Orchestrator>>>;

/// A call that followers answer as well, from the history.
pub(super) type Reading<Q> = Entered<Q, History>;

impl<Q> Reading<Q> {
    /// The history.
    pub(super) fn history(&self) -> &History {
        &self.orchestrator
    }

    /// The request.
    pub(super) fn request(&self) -> &Q {
        &self.request
    }

    /// What counts it under the limits of its caller.
    pub(super) fn begun(&self) -> Begun {
        self.begun.clone()
    }

    /// Another replica has it in the audit.
    pub(super) fn is_audited_elsewhere(&self) {
        self.own_event.set();
    }
}

/// For the metrics, which are read from an orchestrator.
impl<Q> Borrow<Option<Arc<Orchestrator>>> for EnteredHere<Q> {
    fn borrow(&self) -> &Option<Arc<Orchestrator>> {
        &self.orchestrator
    }
}

impl<Q: Default, O> Entered<Q, O> {
    /// The request.
    pub(super) fn take_request(&mut self) -> Q {
        std::mem::take(&mut self.request)
    }

    /// Releases the memory of the request, which is no longer needed.
    pub(super) fn forget_request(&mut self) {
        self.room = None;
    }
}

impl<Q: Default> Entered<Q> {
    /// The request, and this call as the cause of the change that it asks for, for the audit.
    pub(super) fn take_change(&mut self) -> (Q, Cause)
    where
        Q: Asks,
    {
        let request_digest = Some(self.orchestrator.digests().digest(&self.request.encode_to_vec()));
        let cause = Cause { request_digest, ..self.cause(self.caller.peer.origin.to_string()) };
        (self.take_request(), cause)
    }
}

impl<Q, O> Entered<Q, O> {
    /// This replica, and its role.
    pub(super) fn membership(&self) -> &Membership {
        &self.membership
    }

    /// This call from `peer`, for the audit.
    fn cause(&self, peer: String) -> Cause
    where
        Q: Asks,
    {
        Cause {
            rpc: Q::RPC.name().into(),
            caller: Some(self.identity.clone()),
            peer,
            via: self.caller.via(),
            decision: if self.would_be_denied { Decision::WouldBeDenied } else { Decision::Allowed },
            targets: named(&self.request.targets()),
            request_digest: None,
            begun_at: Some(self.begun_at),
            own_event: self.own_event.clone(),
        }
    }
}

impl Gate {
    pub(super) fn new(leading: Leading, judge: Judge, requests: Memory) -> Self {
        Self { leading, requests, calls: Arc::default(), usage: Arc::default(), judge }
    }

    /// The counts of calls.
    pub(super) fn calls(&self) -> Arc<CallCounts> {
        self.calls.clone()
    }

    /// Begins a call of an RPC, `None` if its method is unknown, once its headers are there and before its request is
    /// read: strangers have nothing decoded, and a caller that does not end its requests reaches its limits.
    /// [`Gate::enter`] expects the returned value in the extensions of the request.
    ///
    /// # Errors
    /// The identity of the caller is not known, or has reached one of its limits.
    pub(super) fn begin(&self, caller: &Caller, rpc: Option<Rpc>) -> Result<Begun, Status> {
        let Some(rpc) = rpc else { return self.judge.identify(caller, "an unknown method").map(|_| Begun(None)) };
        self.begin_rpc(caller, rpc).inspect_err(|status| self.count_refused(caller, rpc, status))
    }

    /// Checks that this process is the leader for which a call with these headers is meant, if another replica has
    /// forwarded it.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn check_meant(&self, caller: &Caller, rpc: Option<Rpc>, headers: &HeaderMap) -> Result<(), Status> {
        if !caller.was_forwarded {
            return Ok(());
        }
        let checked = self.leading.check_meant(forwarded::meant_for(headers));
        checked.inspect_err(|status| rpc.into_iter().for_each(|rpc| self.count_refused(caller, rpc, status)))
    }

    /// Waits until a call has to give way to another one of its caller, since its request has not arrived. Returns its
    /// status.
    pub(super) async fn gives_way(&self, begun: Begun, caller: &Caller, rpc: Option<Rpc>) -> Status {
        let (Begun(Some(used)), Some(rpc)) = (begun, rpc) else { return pending().await };
        let status = self.limit_reached(caller, rpc.name(), &used.gives_way().await);
        self.count_refused(caller, rpc, &status);
        status
    }

    /// Begins a stream of reflection, which counts until the returned value is dropped.
    ///
    /// # Errors
    /// As of [`Gate::begin`].
    pub(super) fn begin_reflection(&self, caller: &Caller) -> Result<Begun, Status> {
        const NAME: &str = "ServerReflectionInfo";
        self.judge.check_beside(caller, NAME, REFLECTION)?;
        let begun = self.used_by(caller, NAME, Load::Reflection)?;
        // It may be silent before its first message.
        self.has_arrived(&begun, caller, NAME).map(|()| begun)
    }

    fn begin_rpc(&self, caller: &Caller, rpc: Rpc) -> Result<Begun, Status> {
        self.used_by(caller, rpc.name(), rpc.load())
    }

    /// Counts a call under the limits of its caller, if the policy is enforced.
    fn used_by(&self, caller: &Caller, call: &'static str, load: Load) -> Result<Begun, Status> {
        let Some(identity) = self.judge.identify(caller, call)? else { return Ok(Begun(None)) };
        let used = self.usage.begin(&identity, load, &self.judge.limits());
        used.map(|used| Begun(Some(used))).map_err(|reached| self.limit_reached(caller, call, &reached))
    }

    /// Records that the request of a call has arrived.
    pub(super) fn has_arrived(&self, Begun(used): &Begun, caller: &Caller, call: &'static str) -> Result<(), Status> {
        let arrived = used.as_ref().map_or(Ok(()), Used::has_arrived);
        arrived.map_err(|reached| self.limit_reached(caller, call, &reached))
    }

    /// The status of a call whose caller has reached one of its limits.
    fn limit_reached(&self, caller: &Caller, call: &'static str, reached: &LimitReached) -> Status {
        self.usage.log(call, reached);
        self.judge.limit_reached(caller, call, reached)
    }

    /// Counts a call that was refused before its request was read.
    fn count_refused(&self, caller: &Caller, rpc: Rpc, status: &Status) {
        CountedCall::begin(self.calls.clone(), rpc, Some(caller)).answered(Some(status));
    }

    /// Admits a call, or refuses it.
    ///
    /// # Errors
    /// The identity of its caller is not known, has no right to this call, or has reached one of its limits. This
    /// process does not lead. It would change something, and the store is only looked at. Or there is no memory for the
    /// decoded request, or it has no caller, which is a defect.
    pub(super) fn enter<Q: Asks>(&self, request: Request<Q>) -> Result<Entered<Q>, Status> {
        let entered = self.enter_to(request, || {
            let orchestrator = self.leading.orchestrator()?;
            let renamed = if Q::RPC.takes_former_names() { orchestrator.renamed() } else { Arc::default() };
            Ok((orchestrator, renamed))
        })?;
        if Q::RPC.changes() && entered.orchestrator.is_read_only() {
            return Err(status(Refusal::ReadOnly));
        }
        Ok(entered)
    }

    /// Admits a call to what `reach` returns, with the names of renamed subsystems.
    fn enter_to<Q: Asks, O>(
        &self,
        request: Request<Q>,
        reach: impl FnOnce() -> Result<(O, Arc<BTreeMap<Name, Name>>), Status>,
    ) -> Result<Entered<Q, O>, Status> {
        let (_, mut extensions, request) = request.into_parts();
        let (caller, begun) = self.arrive(Q::RPC, &mut extensions)?;
        let (orchestrator, renamed) = reach()?;
        let targets = || request.targets().by_present_names(&renamed);
        let judged = self.judge.check(&caller, Q::RPC, &self.calls, targets)?;
        let room = self.room_of(&request)?;
        Ok(Entered {
            orchestrator,
            membership: self.leading.membership().clone(),
            caller,
            authority: judged.authority,
            identity: judged.identity,
            would_be_denied: judged.would_be_denied.is_some(),
            begun_at: self.judge.now(),
            own_event: begun.0.as_ref().map_or_else(OwnEvent::default, Used::own_event),
            judge: self.judge.clone(),
            rpc: Q::RPC,
            request,
            room,
            begun,
        })
    }

    /// Takes the caller of a request that has arrived from its extensions, and what counts its call.
    ///
    /// # Errors
    /// The identity of the caller is not known, or has reached one of its limits. Or there is no caller, which is a
    /// defect.
    pub(super) fn arrive(&self, rpc: Rpc, extensions: &mut Extensions) -> Result<(Caller, Begun), Status> {
        let caller = extensions.remove::<Caller>().ok_or_else(|| Status::internal("the caller is not known"))?;
        let begun = match extensions.remove::<Begun>() {
            Some(begun) => begun,
            // At the admin address, the request of a call that only reads is in its headers.
            None => self.begin_rpc(&caller, rpc)?,
        };
        self.has_arrived(&begun, &caller, rpc.name())?;
        Ok((caller, begun))
    }

    /// Memory for a request that is passed on, with a copy of it.
    pub(super) fn room(&self, bytes: usize) -> Result<Held, Status> {
        let room = self.requests.try_hold((2 * bytes).min(self.requests.max()));
        room.map_err(|full| status(Refusal::MemoryFull(full)))
    }

    /// Memory for a decoded request until it is answered. At most all of it: any request that could be received is
    /// admitted while no others are.
    fn room_of<Q: Asks>(&self, request: &Q) -> Result<Option<Held>, Status> {
        /// Most bytes of a request that needs no reservation, so that small requests work even when the limit is
        /// reached.
        const SMALL: usize = 512;
        let bytes = request.encoded_len();
        match self.requests.try_hold(decoded(bytes, Q::RPC.max_names()).min(self.requests.max())) {
            Err(full) if bytes > SMALL => Err(status(Refusal::MemoryFull(full))),
            held => Ok(held.ok()),
        }
    }

    /// Writes the events of calls that another replica has answered or denied.
    ///
    /// # Errors
    /// They are malformed, this process does not lead, or they can't be written.
    pub(super) async fn take_report(&self, Own { replica, events }: &Own) -> Result<(), Status> {
        let orchestrator = self.leading.orchestrator()?;
        let events = events.iter().map(|event| record::read_event(event, replica)).collect::<Result<_, _>>();
        let events =
            events.map_err(|problem| Status::invalid_argument(format!("an event of this report: {problem}")))?;
        orchestrator.write_events(events).await.map_err(status)
    }

    /// Lets a call in, and has it answered.
    pub(super) async fn answer<Q: Asks, A, F>(
        &self,
        request: Request<Q>,
        handle: impl FnOnce(Entered<Q>) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let call = self.call(&request);
        self.answer_to(call, self.enter(request), handle).await
    }

    /// The same for a call that is answered from the history.
    pub(super) async fn answer_reading<Q: Asks, A, F>(
        &self,
        request: Request<Q>,
        handle: impl FnOnce(Reading<Q>) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let call = self.call(&request);
        self.answer_to(call, self.enter_reading(request), handle).await
    }

    fn enter_reading<Q: Asks>(&self, request: Request<Q>) -> Result<Reading<Q>, Status> {
        self.enter_to(request, || Ok((self.leading.history().clone(), Arc::default())))
    }

    /// The same for a call that followers answer as well.
    pub(super) async fn answer_here<Q: Asks, A, F>(
        &self,
        request: Request<Q>,
        handle: impl FnOnce(EnteredHere<Q>) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let call = self.call(&request);
        let entered = self.enter_to(request, || Ok((self.leading.get(), Arc::default())));
        self.answer_to(call, entered, handle).await
    }

    async fn answer_to<Q: Asks, O, A, F>(
        &self,
        mut call: CountedCall,
        entered: Result<Entered<Q, O>, Status>,
        handle: impl FnOnce(Entered<Q, O>) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let answered = match entered {
            Ok(entered) => {
                call.audit(self.audited(&entered));
                handle(entered).await
            }
            Err(refused) => Err(refused),
        };
        call.answered(answered.as_ref().err());
        answered.map(Response::new)
    }

    /// Lets a call in whose answer is a stream over all subsystems. It ends by its last answer, by its caller, or when
    /// its caller loses the right to it.
    pub(super) fn stream<Q: Asks, A, S>(
        &self,
        request: Request<Q>,
        handle: fn(Entered<Q>) -> Result<S, Status>,
    ) -> Result<impl Stream<Item = Result<A, Status>> + use<Q, A, S>, Status>
    where
        S: Stream<Item = Result<A, Status>>,
    {
        let (mut call, lapse) = self.begun_stream(&request);
        let handled = self.enter(request).and_then(|entered| {
            call.audit(self.audited(&entered));
            handle(entered)
        });
        streamed(call, lapse, handled)
    }

    /// The same for a call that is answered from the history.
    pub(super) async fn stream_reading<Q: Asks, A, S, F>(
        &self,
        request: Request<Q>,
        handle: impl FnOnce(Reading<Q>) -> F,
    ) -> Result<BoxStream<'static, Result<A, Status>>, Status>
    where
        A: 'static,
        S: Stream<Item = Result<A, Status>> + Send + 'static,
        F: Future<Output = Result<S, Status>>,
    {
        let (mut call, lapse) = self.begun_stream(&request);
        let handled = match self.enter_reading(request) {
            Ok(entered) => {
                call.audit(self.audited(&entered));
                handle(entered).await
            }
            Err(refused) => Err(refused),
        };
        streamed(call, lapse, handled).map(StreamExt::boxed)
    }

    /// What counts a call whose answer is a stream, and what ends it before its end.
    fn begun_stream<Q: Asks>(&self, request: &Request<Q>) -> (CountedCall, Option<BoxFuture<'static, Status>>) {
        let lapse = request.extensions().get().and_then(|caller| self.judge.lapse(caller, Q::RPC));
        (self.call(request), lapse)
    }

    /// What the audit sums up of a call that was let in. Nothing if callers are not told apart: then the sums would say
    /// little, and be written each minute while a dashboard is open.
    fn audited<Q: Asks, O>(&self, entered: &Entered<Q, O>) -> Option<Audited> {
        self.judge.reads_credentials().then(|| {
            let cause = entered.cause(entered.caller.peer.network());
            Audited { sums: self.judge.sums(), sum: Sum::Calls, cause }
        })
    }

    fn call<Q: Asks>(&self, request: &Request<Q>) -> CountedCall {
        self.counted(Q::RPC, request.extensions().get())
    }

    /// Counts a call once it has ended.
    pub(super) fn counted(&self, rpc: Rpc, caller: Option<&Caller>) -> CountedCall {
        CountedCall::begin(self.calls.clone(), rpc, caller)
    }
}

/// The targets of a request, as the audit names them. Texts that are no names could be anything, also a secret.
pub(super) fn named(targets: &Targets<'_>) -> AuditTargets {
    let Targets { all_subsystems, subsystems, r#loop, all_loops, details: _, audit: _, registrations } = targets;
    let shown = |name| if Name::parse(name).is_ok() { name } else { "(not a name)" };
    let all = all_subsystems.then(|| "*".to_owned());
    let names = subsystems.iter().copied().chain(registrations.iter().map(|registration| registration.name));
    let r#loop = r#loop.map(shown).or_else(|| all_loops.then_some("*")).map(|name| format!("loop:{name}"));
    all.into_iter().chain(r#loop).chain(names.map(|name| shown(name).to_owned())).collect()
}

/// The stream of a call, which is counted until its end, and ends with the status of `lapse` as soon as that is there.
fn streamed<A, S>(
    mut call: CountedCall,
    lapse: Option<BoxFuture<'static, Status>>,
    handled: Result<S, Status>,
) -> Result<impl Stream<Item = Result<A, Status>> + use<A, S>, Status>
where
    S: Stream<Item = Result<A, Status>>,
{
    match handled {
        Ok(stream) => {
            call.streams();
            Ok(until(lapse, stream).inspect(move |answer| {
                if let Err(status) = answer {
                    call.answered(Some(status));
                }
            }))
        }
        Err(refused) => {
            call.answered(Some(&refused));
            Err(refused)
        }
    }
}

/// The stream, which ends with the status of `lapse` as soon as that is there.
fn until<A, S>(
    lapse: Option<BoxFuture<'static, Status>>,
    answers: S,
) -> impl Stream<Item = Result<A, Status>> + use<A, S>
where
    S: Stream<Item = Result<A, Status>>,
{
    let mut open = Some((lapse, Box::pin(answers)));
    stream::poll_fn(move |cx| {
        let Some((lapse, answers)) = &mut open else { return Poll::Ready(None) };
        if let Some(lapse) = lapse
            && let Poll::Ready(status) = lapse.poll_unpin(cx)
        {
            open = None;
            return Poll::Ready(Some(Err(status)));
        }
        answers.poll_next_unpin(cx)
    })
}

/// Approximate bytes in memory of a request that has `bytes` on the wire and at most `max_names` names. Short names
/// grow the most; since their number is limited, a large request grows less.
fn decoded(bytes: usize, max_names: usize) -> usize {
    /// Growth of short names.
    const GROWTH: usize = 16;
    /// The message and the validated request have a copy each.
    const COPIES: usize = 2;
    /// Bytes of a name in both copies, in addition to its characters: pointers, counts, and what the allocator adds.
    const NAME: usize = 128;
    bytes.saturating_mul(GROWTH).min(bytes.saturating_mul(COPIES).saturating_add(max_names.saturating_mul(NAME)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CycleRequest;

    #[test]
    fn the_longest_list_of_names_fits_into_the_smallest_memory() {
        let requests = crate::memory::Shares::of(64 << 20).requests;
        let bytes = CycleRequest::MAX_SUBSET * (2 + Name::MAX_LEN);
        assert!(requests.try_hold(decoded(bytes, CycleRequest::MAX_SUBSET)).is_ok());
    }
}
