//! Snapshots of subsystems: requested on demand, each with a time limit, and not stored.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use tokio::time::timeout;

use super::{Orchestrator, Registered};
use crate::{
    model::Code,
    ports::{CallError, Snapshot},
};

impl Orchestrator {
    /// Requests snapshots of subsystems, some at a time, each for at most five seconds. The results are in order. The
    /// subsystems of revoked owners are not asked.
    pub async fn snapshots(&self, of: &[Arc<Registered>]) -> Vec<Result<Snapshot, CallError>> {
        const AT_ONCE: usize = 64;
        const PATIENCE: Duration = Duration::from_secs(5);
        let subsystems = &self.0.engine.subsystems;
        let ask = |registered: &Arc<Registered>| {
            let member = registered.member.clone();
            async move {
                if self.0.is_read_only {
                    let message = "it was not called: this orchestrator only looks at a copy (serve --read-only)";
                    return Err(CallError::new(Code::FailedPrecondition, message));
                }
                if let Some(owner) = self.0.engine.revoked.owner_of(&member) {
                    let message = format!("it was not called: its owner {owner} is revoked");
                    return Err(CallError::new(Code::PermissionDenied, message));
                }
                let asked = timeout(PATIENCE, subsystems.get_status(member.callee(), PATIENCE)).await;
                asked.unwrap_or_else(|_| {
                    Err(CallError::new(Code::DeadlineExceeded, format!("no answer within {PATIENCE:?}")))
                })
            }
        };
        stream::iter(of.iter().map(ask).collect::<Vec<_>>()).buffered(AT_ONCE).collect().await
    }
}
