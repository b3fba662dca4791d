//! Signed checkpoints of the log, and the proofs that refer to them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{Mutex, Notify, watch as latest},
    time::{sleep, timeout},
};

use super::{Orchestrator, Refusal, Shared};
use crate::{
    ledger::{Consistency, DigestKey, Entry, Hash, Inclusion, Path, Signer},
    model::CycleId,
    ports::{Log, StoreError},
};

/// Shortest time between two checkpoints.
const EVERY: Duration = Duration::from_secs(1);
/// Longest wait for a checkpoint that covers an entry: a few times as long as one usually takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most attempts of a proof by the newest checkpoint: retention that keeps few records may meanwhile have removed the
/// last ones of it, and then only a newer one can be proved by.
const ATTEMPTS: usize = 3;

/// A checkpoint that was published.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// Number of leaves.
    pub size: u64,
    /// The signed text.
    pub note: Arc<str>,
}

/// A logged thing that callers name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logged {
    /// The record of this cycle.
    Cycle(CycleId),
    /// The audit event of this leaf.
    Event(u64),
}

/// A proof that the log of a checkpoint contains an entry.
#[derive(Clone, Debug)]
pub struct Proved {
    /// Its leaf.
    pub leaf: u64,
    /// The encoded `LogEntry`.
    pub entry: Bytes,
    /// The proof.
    pub proof: Inclusion,
}

/// Signs and publishes checkpoints.
pub(super) struct Checkpoints {
    signer: Signer,
    /// The newest published one; the first one of a process may not be there yet, and has no text then.
    newest: latest::Sender<Published>,
    /// Notified after each commit that has appended to the log.
    pub(super) appended: Notify,
    /// Makes digests with a key of the log.
    digests: Arc<DigestKey>,
    /// Held while one is published, so that they are published in their order.
    turn: Mutex<()>,
}

impl Checkpoints {
    /// Signs with this, and shows what is published to the receivers of `newest`.
    pub(super) fn new(signer: Signer, newest: latest::Sender<Published>) -> Self {
        let digests = Arc::new(DigestKey::of(&signer));
        Self { signer, newest, appended: Notify::new(), digests, turn: Mutex::default() }
    }
}

impl Orchestrator {
    /// The public keys of those that sign checkpoints, in their text form.
    pub fn log_keys(&self) -> Vec<String> {
        self.0.checkpoints.signer.keys.iter().map(|key| key.verifying().to_string()).collect()
    }

    /// Makes keyed digests: of requests for their audit events, and of registrations for their etags.
    pub fn digests(&self) -> &Arc<DigestKey> {
        &self.0.checkpoints.digests
    }

    /// The newest published checkpoint. The first one of a process may have to be awaited.
    ///
    /// # Errors
    /// None can be published.
    pub async fn checkpoint(&self) -> Result<Published, Refusal> {
        self.0.published(0).await
    }

    /// The newest published checkpoint that covers this entry, which may have to be awaited for about a second.
    ///
    /// # Errors
    /// There is no such entry, the record is older than the log, or no checkpoint can be published.
    pub async fn checkpoint_of(&self, logged: Logged) -> Result<Published, Refusal> {
        let leaf = match logged {
            Logged::Cycle(cycle_id) => self.leaf(cycle_id).await?,
            Logged::Event(leaf) => self.event(leaf).await?.leaf,
        };
        self.0.published(leaf + 1).await
    }

    /// A proof that the log of the newest published checkpoint contains this entry, with that checkpoint.
    ///
    /// # Errors
    /// Those of [`Orchestrator::checkpoint_of`] and [`Orchestrator::prove`].
    pub async fn prove_now(&self, logged: Logged) -> Result<(Published, Proved), Refusal> {
        let published = self.checkpoint_of(logged).await?;
        self.by_a_checkpoint(published, |size| self.prove(logged, size)).await
    }

    /// A proof that the log of the newest published checkpoint extends that of the first `earlier` entries, with that
    /// checkpoint.
    ///
    /// # Errors
    /// Those of [`Orchestrator::checkpoint`] and [`Orchestrator::prove_extension`].
    pub async fn prove_extension_now(&self, earlier: u64) -> Result<(Published, Consistency), Refusal> {
        let published = self.checkpoint().await?;
        self.by_a_checkpoint(published, |size| self.prove_extension(earlier, size)).await
    }

    /// A proof by this checkpoint, or by a newer one if retention has removed the last entries of this one.
    async fn by_a_checkpoint<T, F>(
        &self,
        mut published: Published,
        prove: impl Fn(u64) -> F,
    ) -> Result<(Published, T), Refusal>
    where
        F: Future<Output = Result<T, Refusal>>,
    {
        for _ in 1..ATTEMPTS {
            match prove(published.size).await {
                Err(Refusal::HashesRemoved(_)) => published = self.0.published_all().await?,
                proved => return Ok((published, proved?)),
            }
        }
        let proved = prove(published.size).await?;
        Ok((published, proved))
    }

    /// A proof that the log of the first `size` entries contains this entry.
    ///
    /// # Errors
    /// There is no such entry, it can't be read or is not among these, the log has fewer entries, or the hashes that
    /// prove it are no longer retained.
    pub async fn prove(&self, logged: Logged, size: u64) -> Result<Proved, Refusal> {
        let (leaf, entry) = match logged {
            Logged::Cycle(cycle_id) => {
                let record = self.cycle(cycle_id).await?;
                (self.leaf(cycle_id).await?, Entry::Cycle(&record.bytes).to_bytes())
            }
            Logged::Event(leaf) => (leaf, Entry::Audit(&self.event(leaf).await?.entry.bytes).to_bytes()),
        };
        self.0.check_sizes(leaf.saturating_add(1), size)?;
        let proof = Inclusion(self.0.hashes(&Path::of_inclusion(leaf, size), size).await?);
        let room = self.0.history.room(entry.len()).await?;
        Ok(Proved { leaf, entry: room.around(entry.into()), proof })
    }

    /// A proof that the log of the first `size` entries extends that of the first `earlier` ones.
    ///
    /// # Errors
    /// The log has fewer entries, or the hashes that prove it are no longer retained.
    pub async fn prove_extension(&self, earlier: u64, size: u64) -> Result<Consistency, Refusal> {
        self.0.check_sizes(earlier, size)?;
        Ok(Consistency(self.0.hashes(&Path::of_consistency(earlier, size), earlier).await?))
    }

    /// The leaf of the record of a cycle.
    async fn leaf(&self, cycle_id: CycleId) -> Result<u64, Refusal> {
        if let Some(leaf) = self.0.store.leaf(cycle_id).await? {
            return Ok(leaf);
        }
        self.cycle(cycle_id).await?;
        Err(Refusal::CycleNotLogged(cycle_id))
    }
}

impl Shared {
    /// Publishes a checkpoint after entries were appended: at most one a second. Commits never wait for it.
    pub(super) async fn publish_checkpoints(self: Arc<Self>) {
        let mut is_told = false;
        loop {
            let published = self.publish_checkpoint().await;
            if let Err(error) = &published
                && !is_told
            {
                tracing::warn!(%error, "can't publish a checkpoint of the log; the earlier one stays, and it is retried");
            }
            is_told = published.is_err();
            sleep(EVERY).await;
            if published.is_ok() {
                self.checkpoints.appended.notified().await;
            }
        }
    }

    /// The newest checkpoint, once there is one of this many entries.
    pub(super) async fn published(&self, entries: u64) -> Result<Published, Refusal> {
        // No newer one comes if the store is only looked at.
        let patience = if self.is_read_only { Duration::ZERO } else { PATIENCE };
        let mut newest = self.checkpoints.newest.subscribe();
        let covers = |published: &Published| published.size >= entries && !published.note.is_empty();
        match timeout(patience, newest.wait_for(covers)).await {
            Ok(Ok(published)) => Ok(published.clone()),
            _ => Err(Refusal::NoCheckpoint),
        }
    }

    /// The newest checkpoint, once there is one of all entries that are in the log now. If the store is only looked at,
    /// later entries may be in no checkpoint.
    pub(super) async fn published_all(&self) -> Result<Published, Refusal> {
        self.published(if self.is_read_only { 0 } else { self.store.log().frontier.size() }).await
    }

    /// Publishes the last checkpoint of this process, after its last write.
    pub(super) async fn publish_last_checkpoint(&self) {
        if let Err(error) = self.publish_checkpoint().await {
            tracing::warn!(%error, "can't publish the last checkpoint of the log");
        }
    }

    /// Publishes a checkpoint, unless the newest one has all entries.
    ///
    /// # Errors
    /// It can't be written.
    pub(super) async fn publish_checkpoint(&self) -> Result<(), StoreError> {
        let Checkpoints { signer, newest, turn, .. } = &self.checkpoints;
        let _turn = turn.lock().await;
        let Log { frontier, .. } = self.store.log();
        let is_new = {
            let newest = newest.borrow();
            newest.note.is_empty() || newest.size < frontier.size()
        };
        if is_new {
            let note = signer.sign(frontier.size(), frontier.root());
            self.store.publish_checkpoint(note.clone()).await?;
            newest.send_replace(Published { size: frontier.size(), note: note.into() });
        }
        Ok(())
    }

    /// The hashes of a proof about the log of the first `size` entries.
    async fn hashes(&self, path: &Path, size: u64) -> Result<Vec<Hash>, Refusal> {
        let nodes = self.store.nodes(path.nodes()).await?;
        nodes.map(|nodes| path.hashes(&nodes)).ok_or(Refusal::HashesRemoved(size))
    }

    /// Checks that there are logs of these sizes, and that the later one can extend the earlier one.
    pub(super) fn check_sizes(&self, earlier: u64, later: u64) -> Result<(), Refusal> {
        let size = self.store.log().frontier.size();
        if earlier <= later && later <= size { Ok(()) } else { Err(Refusal::NotInLog(size)) }
    }
}
