//! Reads the log from its beginning: entries, and hashes in place of those that are gone.

use std::{mem, ops::Range};

use super::{Orchestrator, Published, Refusal, history::room_of};
use crate::{
    ledger::{Content, Frontier, Part},
    ports::PageLimits,
};

impl Orchestrator {
    /// Size of a page: small, since it is held while its reader stalls.
    const LOG_PAGE: PageLimits = PageLimits { records: 1024, bytes: 256 << 10 };

    /// A checkpoint that covers all that the log has now, which may have to be awaited for about a second. So entries
    /// about removals are covered as well.
    ///
    /// # Errors
    /// None can be published.
    pub async fn whole_log(&self) -> Result<Published, Refusal> {
        self.0.published_all().await
    }

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

    /// The log from the first of these leaves on, in parts: at least one, unless there are no leaves, and at most to
    /// the last of them. The bytes of entries are counted until they are dropped.
    ///
    /// # Errors
    /// Retention has removed entries, so that these leaves begin or end among removed ones; too much is being read; or
    /// the process shuts down.
    pub async fn log_parts(&self, leaves: Range<u64>) -> Result<Vec<Part>, Refusal> {
        let shared = &self.0;
        if shared.closed.is_cancelled() {
            return Err(Refusal::Draining);
        }
        let mut room = room_of(&shared.reading_log, shared.history.max_record().max(Self::LOG_PAGE.bytes)).await?;
        let end = leaves.end;
        let mut parts = shared.store.parts(leaves, Self::LOG_PAGE).await?.ok_or(Refusal::HashesRemoved(end))?;
        for part in &mut parts {
            if let Content::Entry(entry) = &mut part.content {
                // A larger record of an earlier configuration gets all of it.
                *entry = room.split(entry.len()).around(mem::take(entry));
            }
        }
        Ok(parts)
    }
}
