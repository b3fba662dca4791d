//! All calls of one subsystem in one cycle: initialization, attempts, and the waits between them.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::{Instant, sleep};

use super::{Member, trace::CallSpans};
use crate::{
    model::{Code, Method, Subsystem},
    ports::{CallError, InitializeCall, Reply, RunCall, Subsystems},
    random::Random,
};

/// What is the same in all calls of one subsystem in one cycle.
pub(super) struct Calls<'a> {
    pub(super) subsystems: &'a dyn Subsystems,
    pub(super) random: &'a Random,
    pub(super) member: &'a Member,
    /// The call that is made, but for `attempt`, `timeout` and `trace`.
    pub(super) run: RunCall,
    pub(super) orchestrator_id: &'a std::sync::Arc<str>,
    /// When the subsystem's deadline, or that of the cycle if it is earlier, has passed.
    pub(super) deadline: Instant,
    /// Where the spans of the calls come from.
    pub(super) spans: CallSpans<'a>,
    /// Its breaker is half open: one attempt, whatever the retry policy says.
    pub(super) is_probe: bool,
    /// Where the number of attempts made is written.
    pub(super) attempts: &'a AtomicU32,
}

impl Calls<'_> {
    /// Makes the calls. Does not end by itself at the deadline: who awaits it sees to that.
    pub(super) async fn make(self, on_attempt: impl Fn(u32)) -> Result<Reply, CallError> {
        let subsystem = &*self.member.subsystem;
        let max_attempts = if self.is_probe { 1 } else { subsystem.retry.max_attempts };
        let mut failed = 0;
        let mut reinitialized = false;
        loop {
            let attempted = self.attempt(subsystem, &on_attempt).await;
            let Err(error) = attempted else { return attempted };
            // It lost its initialization, most likely by a restart: that is no failure yet, but only once.
            if error.code == Code::FailedPrecondition && !reinitialized && self.attempts.load(Ordering::Relaxed) > 0 {
                reinitialized = true;
                self.member.set_initialized(false);
                continue;
            }
            failed += 1;
            if failed >= max_attempts || !subsystem.retry.retryable.contains(&error.code) {
                return Err(error);
            }
            let backoff = subsystem.retry.backoff(failed, self.random.fraction());
            if Instant::now() + backoff >= self.deadline {
                // The peer may have said nothing.
                let separator = if error.message.is_empty() { "" } else { "; " };
                let message = format!("{}{separator}no time is left to retry", error.message);
                return Err(CallError { message, ..error });
            }
            sleep(backoff).await;
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
            };
            let initialized = self.subsystems.initialize(subsystem, call).await;
            span.end(&initialized);
            match initialized {
                Ok(()) => {}
                // The contract's way to say that it needs none.
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
        let answered = self.subsystems.run_cycle(subsystem, call).await;
        let result = answered.and_then(|reply| match subsystem.limits.check(&reply.answer) {
            Ok(()) => Ok(reply),
            Err(over) => Err(CallError {
                code: Code::ResourceExhausted,
                message: format!("its answer goes over its limits: {over}"),
            }),
        });
        span.end(&result);
        result
    }
}
