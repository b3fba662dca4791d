//! Calls of subsystems by a replica that has to lead for them.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{select, time::sleep};

use super::lease::{Lapsed, Lease};
use crate::{
    model::Code,
    ports::{CallError, Callee, InitializeCall, Left, Reply, RunCall, Snapshot, Subsystems},
};

/// Calls subsystems only while a lease is valid: a call is checked right before it is sent, and ends when the lease
/// does.
pub struct Leased {
    subsystems: Arc<dyn Subsystems>,
    lease: Lease,
}

impl Leased {
    /// Calls under this lease.
    pub fn new(subsystems: Arc<dyn Subsystems>, lease: Lease) -> Self {
        Self { subsystems, lease }
    }

    async fn under_lease<T>(&self, call: BoxFuture<'_, Result<T, CallError>>) -> Result<T, CallError> {
        /// The cycle of the call is cancelled meanwhile, which ends this. Otherwise its part would seem to have failed.
        const CANCELLED: Duration = Duration::from_secs(1);
        // A call does nothing before it is polled.
        if self.lease.check().is_ok() {
            select! {
                biased;
                () = self.lease.lapsed() => {}
                outcome = call => return outcome,
            }
        }
        sleep(CANCELLED).await;
        Err(CallError::new(Code::Cancelled, Lapsed.to_string()))
    }
}

impl Subsystems for Leased {
    fn initialize<'a>(&'a self, to: Callee<'a>, call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(self.under_lease(self.subsystems.initialize(to, call)))
    }

    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(self.under_lease(self.subsystems.run_cycle(to, call)))
    }

    fn get_status<'a>(&'a self, of: Callee<'a>, timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(self.under_lease(self.subsystems.get_status(of, timeout)))
    }

    fn forget(&self, left: &[Left]) {
        self.subsystems.forget(left);
    }
}
