//! Reads the log from its beginning: entries, and hashes in place of those that are gone.

use std::ops::Range;

use super::{Orchestrator, Refusal};
use crate::{
    ledger::{Content, Frontier, Node, Part},
    ports::PageLimits,
};

impl Orchestrator {
    /// Size of a page: small, since it is held while its reader stalls.
    const LOG_PAGE: PageLimits = PageLimits { records: 1024, bytes: 256 << 10 };

    /// The hashes of the complete subtrees before this leaf, in a log of `size` leaves.
    ///
    /// # Errors
    /// The log has fewer entries, or the hashes are no longer retained.
    pub async fn log_before(&self, leaf: u64, size: u64) -> Result<Vec<Part>, Refusal> {
        self.0.check_sizes(leaf, size)?;
        let subtrees = Frontier::nodes(leaf);
        let hashes = self.0.store.nodes(subtrees.clone()).await?.ok_or(Refusal::HashesRemoved(leaf))?;
        let part = |(subtree, hash)| Part { subtree, content: Content::Hash(hash) };
        Ok(subtrees.into_iter().zip(hashes).map(part).collect())
    }

    /// The log from the first of these leaves on, in parts: at least one, unless there are no leaves, and at most to the
    /// last of them. The bytes of entries are counted until they are dropped.
    ///
    /// # Errors
    /// Retention has removed entries, so that these leaves begin or end among removed ones; too much is being read; or
    /// the process shuts down.
    pub async fn log_parts(&self, leaves: Range<u64>) -> Result<Vec<Part>, Refusal> {
        let shared = &self.0;
        if shared.closed.is_cancelled() {
            return Err(Refusal::Draining);
        }
        let mut room = shared.room(shared.max_record().max(Self::LOG_PAGE.bytes)).await?;
        let (first, end) = (leaves.start, leaves.end);
        let parts = shared.store.parts(leaves, Self::LOG_PAGE).await?.ok_or(Refusal::HashesRemoved(end))?;
        let mut kept = Vec::with_capacity(parts.len());
        for part in parts {
            let content = match part.content {
                // The first one has the memory that was waited for; further ones only what readers may read ahead.
                Content::Entry(entry) if part.subtree == Node::of_leaf(first) => {
                    Content::Entry(room.split(entry.len()).around(entry))
                }
                Content::Entry(entry) => match shared.watching.try_hold(entry.len()) {
                    Ok(room) => Content::Entry(room.around(entry)),
                    Err(_) => break,
                },
                hash @ Content::Hash(_) => hash,
            };
            kept.push(Part { content, ..part });
        }
        Ok(kept)
    }
}
