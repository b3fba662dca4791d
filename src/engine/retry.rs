//! All calls of one subsystem in one cycle: initialization, attempts, and the waits between them.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::{Instant, sleep};

use super::{
    Member,
    refusals::{Refusal, Refusals},
    trace::CallSpans,
};
use crate::{
    model::{Code, Method, Subsystem},
    ports::{CallError, ConnectionFault, InitializeCall, Reply, RunCall, Subsystems},
    random::Random,
};

/// The common data of all calls of one subsystem in one cycle.
pub(super) struct Calls<'a> {
    pub(super) subsystems: &'a dyn Subsystems,
    pub(super) random: &'a Random,
    pub(super) member: &'a Member,
    /// The call without `attempt`, `timeout` and `trace`.
    pub(super) run: RunCall,
    pub(super) orchestrator_id: &'a std::sync::Arc<str>,
    /// The earlier one of the deadlines of the subsystem and of the cycle.
    pub(super) deadline: Instant,
    /// Source of the spans of the calls.
    pub(super) spans: CallSpans<'a>,
    /// True if its breaker is half open: one attempt, whatever the retry policy.
    pub(super) is_probe: bool,
    /// The endpoints that refuse connections in this cycle.
    pub(super) refusals: &'a Refusals,
    /// Receives the number of attempts.
    pub(super) attempts: &'a AtomicU32,
}

impl Calls<'_> {
    /// Makes the calls. The caller has to enforce the deadline.
    ///
    /// The error is that of the last attempt. If the connection was lost during an earlier one, its message begins with
    /// that: the subsystem was being called when its process died. It ends with the reason for which a further attempt
    /// was not made.
    pub(super) async fn make(self, on_attempt: impl Fn(u32)) -> Result<Reply, CallError> {
        let subsystem = &*self.member.subsystem;
        let max_attempts = if self.is_probe { 1 } else { subsystem.retry.max_attempts };
        let refusal = self.refusals.at(subsystem);
        let mut failed = 0;
        let mut lost = None;
        let mut reinitialized = false;
        loop {
            let attempted = self.attempt(subsystem, &on_attempt).await;
            let fault = attempted.as_ref().err().and_then(|error| error.fault);
            if fault != Some(ConnectionFault::Refused) {
                self.refusals.took(subsystem);
            }
            let Err(error) = attempted else { return attempted };
            // It lost its initialization, probably by a restart: the first time that is not a failure.
            if error.code == Code::FailedPrecondition && !reinitialized && self.attempts.load(Ordering::Relaxed) > 0 {
                reinitialized = true;
                self.member.set_initialized(false);
                continue;
            }
            // Each attempt but the first came after a wait.
            let mut waits = failed;
            failed += 1;
            let mut refused_others = None;
            if fault == Some(ConnectionFault::Refused) {
                refused_others = refusal.as_ref();
                waits += refused_others.map_or(0, |refusal| refusal.waits);
                self.refusals.refused(subsystem, waits);
            }
            let backoff = subsystem.retry.backoff(waits + 1, self.random.fraction());
            let why_no_more = if failed >= max_attempts || !subsystem.retry.retryable.contains(&error.code) {
                None
            } else if let Some(Refusal { of, .. }) = refused_others.filter(|_| waits + 1 >= max_attempts) {
                Some(format!("no further attempt, since the endpoint refused {of} in this cycle as well"))
            } else if Instant::now() + backoff >= self.deadline {
                Some("no time is left to retry".to_owned())
            } else {
                if fault == Some(ConnectionFault::Lost) {
                    lost = Some(error.message);
                }
                sleep(backoff).await;
                continue;
            };
            return Err(CallError { message: in_order([lost, Some(error.message), why_no_more]), ..error });
        }
    }

    async fn attempt(&self, subsystem: &Subsystem, on_attempt: &impl Fn(u32)) -> Result<Reply, CallError> {
        if !self.member.is_initialized() {
            let span = self.spans.begin(Method::Initialize, self.attempts.load(Ordering::Relaxed) + 1);
            let call = InitializeCall {
                orchestrator_id: self.orchestrator_id.clone(),
                epoch: self.run.epoch,
                timeout: self.deadline - Instant::now(),
                trace: span.context(),
                path: self.run.path.clone(),
            };
            let initialized = self.subsystems.initialize(self.member.callee(), call).await;
            span.end(&initialized);
            match initialized {
                Ok(()) => {}
                // In the contract, this means that it needs no initialization.
                Err(error) if error.code == Code::Unimplemented => {}
                Err(error) => return Err(CallError { message: format!("Initialize: {}", error.message), ..error }),
            }
            self.member.set_initialized(true);
        }
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed) + 1;
        on_attempt(attempt);
        let span = self.spans.begin(Method::RunCycle, attempt);
        let timeout = self.deadline - Instant::now();
        let call = RunCall { attempt, timeout, trace: span.context(), ..self.run.clone() };
        let answered = self.subsystems.run_cycle(self.member.callee(), call).await;
        let result = answered.and_then(|reply| match subsystem.limits.check(&reply.answer) {
            Ok(()) => Ok(reply),
            Err(over) => {
                Err(CallError::new(Code::ResourceExhausted, format!("its answer goes over its limits: {over}")))
            }
        });
        span.end(&result);
        result
    }
}

/// These texts in one line. The peer may have said nothing.
fn in_order(texts: [Option<String>; 3]) -> String {
    texts.into_iter().flatten().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
}
