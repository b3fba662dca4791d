//! Checkpoints of the log, proofs, its entries, and the audit.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use tonic::{Request, Response, Status};

use super::{Answer, Answers, Api, error::status, gate::Entered, handlers::invalid, request};
use crate::{
    ledger::{Content, Hash, Part},
    orchestrator::Published,
    ports::{EventPage, LoggedEvent, UnreadableEvent},
    proto::orchestrator::v1::{self as pb, ledger_server::Ledger},
};

#[tonic::async_trait]
impl Ledger for Api {
    async fn get_checkpoint(&self, request: Request<pb::GetCheckpointRequest>) -> Answer<pb::GetCheckpointResponse> {
        self.gate.answer(request, get_checkpoint).await
    }

    async fn get_inclusion_proof(
        &self,
        request: Request<pb::GetInclusionProofRequest>,
    ) -> Answer<pb::GetInclusionProofResponse> {
        self.gate.answer(request, get_inclusion_proof).await
    }

    async fn get_consistency_proof(
        &self,
        request: Request<pb::GetConsistencyProofRequest>,
    ) -> Answer<pb::GetConsistencyProofResponse> {
        self.gate.answer(request, get_consistency_proof).await
    }

    type ReadEntriesStream = Answers<pb::ReadEntriesResponse>;

    async fn read_entries(&self, request: Request<pb::ReadEntriesRequest>) -> Answer<Answers<pb::ReadEntriesResponse>> {
        let parts = self.gate.stream(request, |call| Ok(stream::once(log_of(call)).try_flatten()))?;
        Ok(Response::new(Box::pin(parts)))
    }

    async fn list_audit_events(
        &self,
        request: Request<pb::ListAuditEventsRequest>,
    ) -> Answer<pb::ListAuditEventsResponse> {
        self.gate.answer(request, list_audit_events).await
    }
}

async fn get_checkpoint(call: Entered<pb::GetCheckpointRequest>) -> Result<pb::GetCheckpointResponse, Status> {
    let Published { note, .. } = call.orchestrator().checkpoint().await.map_err(status)?;
    Ok(pb::GetCheckpointResponse { checkpoint: note.to_string(), keys: call.orchestrator().log_keys() })
}

async fn get_inclusion_proof(
    mut call: Entered<pb::GetInclusionProofRequest>,
) -> Result<pb::GetInclusionProofResponse, Status> {
    let pb::GetInclusionProofRequest { cycle_id, size, event_leaf, omit_entry } = call.take_request();
    let logged = request::logged(cycle_id, event_leaf).map_err(invalid)?;
    let (Published { size, note }, proved) = match size {
        0 => call.orchestrator().prove_now(logged).await.map_err(status)?,
        size => {
            let proved = call.orchestrator().prove(logged, size).await.map_err(status)?;
            (Published { size, ..Published::default() }, proved)
        }
    };
    Ok(pb::GetInclusionProofResponse {
        leaf: proved.leaf,
        size,
        hashes: bytes_of(&proved.proof.0),
        entry: if omit_entry { Bytes::new() } else { proved.entry },
        checkpoint: note.to_string(),
    })
}

async fn get_consistency_proof(
    mut call: Entered<pb::GetConsistencyProofRequest>,
) -> Result<pb::GetConsistencyProofResponse, Status> {
    let pb::GetConsistencyProofRequest { from_size, size } = call.take_request();
    let (Published { size, note }, proof) = match size {
        0 => call.orchestrator().prove_extension_now(from_size).await.map_err(status)?,
        size => {
            let proof = call.orchestrator().prove_extension(from_size, size).await.map_err(status)?;
            (Published { size, ..Published::default() }, proof)
        }
    };
    Ok(pb::GetConsistencyProofResponse { size, hashes: bytes_of(&proof.0), checkpoint: note.to_string() })
}

async fn list_audit_events(
    mut call: Entered<pb::ListAuditEventsRequest>,
) -> Result<pb::ListAuditEventsResponse, Status> {
    let request::Events { before, filter, page_size } = request::events(call.take_request()).map_err(invalid)?;
    let EventPage { events, next } = call.orchestrator().events(before, filter, page_size).await.map_err(status)?;
    let next_page_token = next.map(|next| next.to_string()).unwrap_or_default();
    let mut answer = pb::ListAuditEventsResponse { next_page_token, ..Default::default() };
    for found in events {
        match found {
            Ok(LoggedEvent { leaf, entry }) => {
                answer.events.push(pb::LoggedAuditEvent { leaf, event: entry.bytes });
            }
            Err(UnreadableEvent { leaf, problem }) => {
                answer.unreadable.push(pb::UnreadableAuditEvent { leaf, problem });
            }
        }
    }
    Ok(answer)
}

type ReadEntries = Result<pb::ReadEntriesResponse, Status>;

/// The log that is requested: its extent, then its parts. Pages of it are read as the client takes them. The stream
/// keeps the call until it ends.
async fn log_of(mut call: Entered<pb::ReadEntriesRequest>) -> Result<impl Stream<Item = ReadEntries>, Status> {
    use pb::read_entries_response::Response as Said;
    let pb::ReadEntriesRequest { from_leaf, size } = call.take_request();
    let Published { size, note } = match size {
        0 => call.orchestrator().whole_log().await.map_err(status)?,
        size => Published { size, ..Published::default() },
    };
    let before = call.orchestrator().log_before(from_leaf, size).await.map_err(status)?;
    let extent = pb::LogExtent { size, checkpoint: note.to_string(), keys: call.orchestrator().log_keys() };
    let pages = stream::try_unfold((call, from_leaf), move |(call, next)| async move {
        if next == size {
            return Ok::<_, Status>(None);
        }
        let parts = call.orchestrator().log_parts(next..size).await.map_err(status)?;
        let next = parts.last().map_or(next, |part| part.subtree.leaves().end);
        Ok(Some((parts, (call, next))))
    });
    let pages = stream::iter([Ok(before)]).chain(pages);
    let parts = pages.map_ok(|page| stream::iter(page.into_iter().map(|part| Ok(log_part(part))))).try_flatten();
    let responses = stream::iter([Ok(Said::Extent(extent))]).chain(parts.map_ok(Said::Part));
    Ok(responses.map_ok(|response| pb::ReadEntriesResponse { response: Some(response) }))
}

fn log_part(Part { subtree, content }: Part) -> pb::LogPart {
    let leaves = subtree.leaves();
    let content = match content {
        Content::Entry(entry) => pb::log_part::Content::Entry(entry),
        Content::Hash(Hash(hash)) => pb::log_part::Content::Hash(Bytes::copy_from_slice(&hash)),
    };
    pb::LogPart { first: leaves.start, count: leaves.end - leaves.start, content: Some(content) }
}

fn bytes_of(hashes: &[Hash]) -> Vec<Bytes> {
    hashes.iter().map(|hash| Bytes::copy_from_slice(&hash.0)).collect()
}
