//! Counts calls: each once, at its end, by its RPC and by the code of its answer.

use std::{
    array,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::time::Instant;
use tonic::Status;

use super::{
    caller::{Caller, Way},
    rpc::Rpc,
};
use crate::{
    listen::Peer,
    model::{Cause, Code},
    orchestrator::{Sum, Sums},
};

/// Number of ended calls.
#[derive(Debug)]
pub struct CallCounts {
    ended: [OfWay; Way::ALL.len()],
    would_be_denied: [OfWay; Way::ALL.len()],
}

type OfWay = [[AtomicU64; CODES]; Rpc::ALL.len()];

/// From OK to UNAUTHENTICATED.
pub(super) const CODES: usize = 17;

impl Default for CallCounts {
    /// None yet.
    fn default() -> Self {
        let of_way = |_| array::from_fn(|_| array::from_fn(|_| AtomicU64::new(0)));
        Self { ended: array::from_fn(of_way), would_be_denied: array::from_fn(of_way) }
    }
}

impl CallCounts {
    fn count(&self, way: Way, rpc: Rpc, code: Code) {
        self.ended[way as usize][rpc as usize][code as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call that would be refused with this code if the policy was enforced.
    pub(super) fn would_be_denied(&self, way: Way, rpc: Rpc, code: tonic::Code) {
        let code = Code::from_number(code as i32);
        self.would_be_denied[way as usize][rpc as usize][code as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// All that are not 0: by which way they came ("grpc" or "admin"), the name of their RPC, and the code of their
    /// answer.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &'static str, Code, u64)> {
        counted(&self.ended)
    }

    /// Those that would be refused if the policy was enforced, as [`CallCounts::iter`], by the code of the refusal.
    pub fn iter_would_be_denied(&self) -> impl Iterator<Item = (&'static str, &'static str, Code, u64)> {
        counted(&self.would_be_denied)
    }
}

fn counted(counts: &[OfWay; Way::ALL.len()]) -> impl Iterator<Item = (&'static str, &'static str, Code, u64)> {
    let each = Way::ALL.into_iter().zip(counts).flat_map(|(way, of_way)| {
        Rpc::ALL.iter().zip(of_way).map(move |(rpc, by_code)| (way.name(), rpc.name(), by_code))
    });
    each.flat_map(|(way, rpc, by_code)| {
        let counted = (0..).zip(by_code).map(|(code, calls)| (Code::from_number(code), calls.load(Ordering::Relaxed)));
        counted.filter(|(_, calls)| *calls > 0).map(move |(code, calls)| (way, rpc, code, calls))
    })
}

/// A call that is being answered. It is counted when it is dropped, and summed up for the audit unless it has an event
/// of its own. A call that its caller ended counts as CANCELLED.
pub(super) struct CountedCall {
    calls: Arc<CallCounts>,
    audit: Option<Audited>,
    rpc: Rpc,
    way: Way,
    peer: Peer,
    begun: Instant,
    code: Code,
}

impl CountedCall {
    pub(super) fn begin(calls: Arc<CallCounts>, rpc: Rpc, caller: Option<&Caller>) -> Self {
        let (way, peer) = caller.map_or((Way::Grpc, Peer::default()), |caller| (caller.way, caller.peer.clone()));
        Self { calls, audit: None, rpc, way, peer, begun: Instant::now(), code: Code::Cancelled }
    }

    /// Has it summed up for the audit, since it was let in.
    pub(super) fn audit(&mut self, audited: Option<Audited>) {
        self.audit = audited;
    }

    /// Records that the answer is a stream, which has begun.
    pub(super) fn streams(&mut self) {
        if let Some(Audited { sums, sum, cause }) = &mut self.audit {
            *sum = Sum::Streams;
            sums.add(Sum::Streams, cause, None, "");
        }
    }

    /// Records the status of the answer.
    pub(super) fn answered(&mut self, failed: Option<&Status>) {
        self.code = failed.map_or(Code::Ok, |status| Code::from_number(status.code() as i32));
    }
}

/// A call as the audit sums it up.
pub(super) struct Audited {
    pub(super) sums: Sums,
    pub(super) sum: Sum,
    pub(super) cause: Cause,
}

impl Drop for CountedCall {
    fn drop(&mut self) {
        let Self { calls, audit, rpc, way, peer, begun, code } = self;
        calls.count(*way, *rpc, *code);
        if let Some(Audited { sums, sum, cause }) = audit.take().filter(|audited| !audited.cause.own_event.is_set()) {
            sums.add(sum, &cause, Some(*code), "");
        }
        tracing::debug!(
            rpc = rpc.name(),
            way = way.name(),
            peer = %peer.origin,
            certified = peer.certificates.is_some(),
            code = code.name(),
            duration_ms = begun.elapsed().as_secs_f64() * 1e3,
            "a call has ended"
        );
    }
}
