//! Snapshots of subsystems: requested on demand, each with a time limit, and not stored.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use tokio::time::timeout;

use super::{Orchestrator, Registered};
use crate::ports::{CallError, Snapshot};

impl Orchestrator {
    /// Requests snapshots of subsystems, some at a time, each for at most five seconds. The results are in order.
    pub async fn snapshots(&self, of: &[Arc<Registered>]) -> Vec<Result<Snapshot, CallError>> {
        const AT_ONCE: usize = 64;
        const PATIENCE: Duration = Duration::from_secs(5);
        let subsystems = &self.0.engine.subsystems;
        let ask = |registered: &Arc<Registered>| {
            let member = registered.member.clone();
            async move {
                let asked = timeout(PATIENCE, subsystems.get_status(member.callee(), PATIENCE)).await;
                asked.unwrap_or_else(|_| {
                    Err(CallError {
                        code: crate::model::Code::DeadlineExceeded,
                        message: format!("no answer within {PATIENCE:?}"),
                    })
                })
            }
        };
        stream::iter(of.iter().map(ask).collect::<Vec<_>>()).buffered(AT_ONCE).collect().await
    }
}
