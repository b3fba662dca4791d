//! The start of the log: its keys, and whether the store goes on from what an earlier process has signed.

use std::{ops::Range, sync::Arc};

use super::StartError;
use crate::{
    access::Mode,
    config::{Config, LedgerSettings},
    host::Host,
    ledger::{Checkpoint, Frontier, LogBegan, LogBeganReason, SealKeys, Signer, SigningKey},
    model::Begin,
    offload::offload,
    orchestrator::{Published, TakenOver},
    ports::{Contents, Seals, Store, StoreError, UnreadableRow},
    record,
    store::{self, KeyFileError, LogKeys, StoreUrl},
};

/// Why a store is not what was signed last.
#[derive(Debug, thiserror::Error)]
pub enum LogBreak {
    /// Its key is missing.
    #[error("the key that sealed it is missing (see ledger.key_files)")]
    KeyMissing,
    /// Its checkpoint is missing, or is by another key.
    #[error("beside it is no checkpoint that its key has signed")]
    CheckpointMissing,
    /// It lacks entries.
    #[error(
        "its log has size {size}, and its checkpoint {signed}: an older copy replaced it, its end was damaged, or it \
         was removed"
    )]
    Behind {
        /// Number of its entries.
        size: u64,
        /// Number of entries in the checkpoint.
        signed: u64,
    },
    /// It has other entries.
    #[error(
        "its log is not that of its checkpoint, up to the size {signed} of that: another database replaced it, or \
         hashes were removed"
    )]
    Other {
        /// Number of entries in the checkpoint.
        signed: u64,
    },
    /// A row can't be read, and doesn't have its seal. With `enforce` only: otherwise it is skipped.
    #[error(
        "the row of its {what} {key:?} can't be read ({problem}), and doesn't have the seal that belongs to it: \
         another program may have written it"
    )]
    Unreadable {
        /// What the row is.
        what: &'static str,
        /// Its name or number.
        key: String,
        /// The problem.
        problem: String,
    },
    /// It has no seals. With `enforce` only: otherwise its log begins, and nothing precedes that.
    #[error("it has no seals: an earlier version of this software wrote it, or another program removed them")]
    Unsealed,
}

/// Takes a store over, with the keys of its log. If it is not what was signed last, a new log begins; with
/// `access.mode = "enforce"`, or if replicas share the store, that is refused.
///
/// # Errors
/// The store or a key can't be used, or the store is not what was signed last.
pub(super) async fn take_over(
    config: &Config,
    begin: Begin,
    host: &Host,
    store: Arc<dyn Store>,
) -> Result<TakenOver, StartError> {
    let url = &config.store.url;
    let keys = read_keys(config, host).await?;
    let are_new = keys.are_new();
    let LogKeys { keys, new } = keys;
    let signer = signer(config, keys);
    let contents = store.take_over(seals(&signer, are_new)).await?;
    let (epoch, last_cycle) = (contents.epoch.0, contents.last_cycle_id.0);
    tracing::info!(store = %url, epoch, last_cycle, "store opened");
    let previous = contents.checkpoint.clone();
    let began = match compare(config, &*store, &contents, &signer, are_new).await? {
        Some(found) if is_refused(config) => {
            return Err(StartError::NotContinued { url: url.clone(), found });
        }
        Some(found) => {
            tracing::warn!(store = %url, "a new log begins: {found}");
            Some(found.began(previous.as_deref(), &contents.missing))
        }
        None => None,
    };
    // A sealed store always has a checkpoint: otherwise a crash would make it look as if that had been removed. An
    // earlier checkpoint is replaced by the first one after the write in which the new log begins.
    let of = url.clone();
    let is_first = previous.is_none() && began.is_none();
    // The entry of the new log has it as well.
    let lost = previous.filter(|_| began.is_some());
    let kept = offload(takes_time(host) && (!new.is_empty() || lost.is_some()), move || {
        new.save()?;
        let kept = lost.map(|lost| store::keep_published(&of, &lost)).transpose();
        Ok(kept.unwrap_or_else(|error| {
            tracing::warn!(%error, "the earlier checkpoint can't be kept");
            None
        }))
    });
    let kept = kept.await.unwrap_or_else(|error| Err(KeyFileError::NotRead(error.to_string())))?;
    if let Some(kept) = kept {
        tracing::warn!(path = %kept.display(), "the earlier checkpoint is kept here");
    }
    if is_first {
        let log = store.log().frontier;
        store.publish_checkpoint(signer.sign(log.size(), log.root())).await?;
    }
    if !contents.is_sealed && began.is_none() {
        tracing::warn!(
            store = %url,
            "an earlier version of this software wrote the store, without seals: whether other programs have changed \
             it can't be seen. It is sealed from now on"
        );
    }
    let began = began.as_ref().map(record::encode_began);
    Ok(TakenOver { began, begin, ..TakenOver::new(store, contents, signer) })
}

/// Reads a store that is only looked at, and the checkpoint beside it. Its seals are not checked, since a copy has no
/// key beside it: `orchestrator verify` checks them.
///
/// # Errors
/// The store can't be read.
pub(super) async fn look(config: &Config, store: Arc<dyn Store>) -> Result<TakenOver, StartError> {
    // It signs nothing.
    let signer = Signer::of(None, Vec::new());
    let contents = store.take_over(Seals::Renewed(SealKeys::of(&signer))).await?;
    let url = &config.store.url;
    let (epoch, last_cycle) = (contents.epoch.0, contents.last_cycle_id.0);
    tracing::info!(store = %url, epoch, last_cycle, "looking at a copy: nothing is run, changed or written");
    let note = contents.checkpoint.clone().unwrap_or_default();
    let published = match Checkpoint::unverified(&note) {
        Ok(Checkpoint { size, .. }) if size <= store.log().frontier.size() => Published { size, note: note.into() },
        _ => {
            tracing::warn!("beside it is no checkpoint of its log, so nothing can be proved by one");
            Published::default()
        }
    };
    Ok(TakenOver { published, begin: Begin::ReadOnly, ..TakenOver::new(store, contents, signer) })
}

/// Looks at a store with the keys of its log, as a process would take it over.
///
/// # Errors
/// The store or a key can't be used, or the store is not what was signed last.
pub(super) async fn rehearse(config: &Config, host: &Host, store: &dyn Store) -> Result<Option<TakenOver>, StartError> {
    /// The leader may have created the key meanwhile, before it wrote the first entry; or have removed hashes that only
    /// the checkpoint needs that was read.
    const ATTEMPTS: usize = 3;
    let url = &config.store.url;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let keys = read_keys(config, host).await?;
        let are_new = keys.are_new();
        let signer = Signer::of(config.ledger.origin.clone(), keys.keys);
        let Some(store) = store.look() else { return Ok(None) };
        let contents = store.take_over(seals(&signer, are_new)).await?;
        match compare(config, &*store, &contents, &signer, are_new).await? {
            Some(found) if is_refused(config) && attempts == ATTEMPTS => {
                return Err(StartError::NotContinued { url: url.clone(), found });
            }
            Some(_) if is_refused(config) => {}
            _ => return Ok(Some(TakenOver { begin: Begin::ReadOnly, ..TakenOver::new(store, contents, signer) })),
        }
    }
}

/// Compares a store with the checkpoint that was published last.
///
/// # Errors
/// It can't be read.
async fn compare(
    config: &Config,
    store: &dyn Store,
    contents: &Contents,
    signer: &Signer,
    are_new: bool,
) -> Result<Option<LogBreak>, StoreError> {
    let (is_strict, previous) = (is_strict(config), contents.checkpoint.as_deref());
    let log = store.log().frontier;
    let size = log.size();
    // An empty log with a checkpoint has had a key as well.
    if are_new && (size > 0 || previous.is_some()) {
        return Ok(Some(LogBreak::KeyMissing));
    }
    // Whatever its checkpoint: the first one of a log has no entries either.
    if is_strict && !contents.is_sealed {
        return Ok(Some(LogBreak::Unsealed));
    }
    let unreadable = contents.unreadable.iter().find(|row| is_strict && !row.is_sealed);
    if let Some(UnreadableRow { what, key, problem, .. }) = unreadable {
        return Ok(Some(LogBreak::Unreadable { what, key: key.clone(), problem: problem.clone() }));
    }
    let opened = signer.keys.iter().find_map(|key| key.verifying().open(previous?).ok());
    let Some(signed) = opened.filter(|signed| signed.origin == signer.origin) else {
        // A store that was never sealed has none.
        return Ok((size > 0 || previous.is_some()).then_some(LogBreak::CheckpointMissing));
    };
    if signed.size > size {
        return Ok(Some(LogBreak::Behind { size, signed: signed.size }));
    }
    // Retention removes nothing that the published checkpoint lacks, so all hashes that this needs are there.
    let then = store.nodes(Frontier::nodes(signed.size)).await?.and_then(|roots| Frontier::of(signed.size, roots));
    if then.is_none_or(|then| then.root() != signed.root) {
        return Ok(Some(LogBreak::Other { signed: signed.size }));
    }
    Ok(None)
}

fn is_strict(config: &Config) -> bool {
    config.access.mode == Mode::Enforce
}

/// True if no new log begins without the command that accepts a store. A replica that has not the key of the others
/// would begin one each time that it takes over.
fn is_refused(config: &Config) -> bool {
    is_strict(config) || matches!(config.store.url, StoreUrl::Postgres(_))
}

impl LogBreak {
    /// The entry of the new log.
    fn began(&self, previous: Option<&str>, missing: &[Range<u64>]) -> LogBegan {
        let reason = match self {
            Self::KeyMissing => LogBeganReason::KeyMissing,
            Self::CheckpointMissing | Self::Unreadable { .. } | Self::Unsealed => LogBeganReason::CheckpointMissing,
            Self::Behind { .. } | Self::Other { .. } => LogBeganReason::Behind,
        };
        LogBegan { reason, previous: previous.unwrap_or_default().to_owned(), missing: missing.to_vec() }
    }
}

/// The seals of a store with these keys: new ones have sealed nothing yet.
fn seals(signer: &Signer, are_new: bool) -> Seals {
    let keys = SealKeys::of(signer);
    if are_new { Seals::Renewed(keys) } else { Seals::Checked(keys) }
}

/// False in a simulation: the time that files really take must not decide what happens there.
fn takes_time(host: &Host) -> bool {
    !host.clock.is_simulated()
}

/// The keys of the log.
async fn read_keys(config: &Config, host: &Host) -> Result<LogKeys, KeyFileError> {
    let LedgerSettings { key_files, origin } = config.ledger.clone();
    // No other log has the name of a new key.
    let (url, name) = (config.store.url.clone(), format!("{}/{:032x}", config.orchestrator_id, host.random.id128()));
    let name = origin.unwrap_or(name);
    let keys = offload(takes_time(host), move || LogKeys::read(&url, &key_files, &name)).await;
    keys.unwrap_or_else(|error| Err(KeyFileError::NotRead(error.to_string())))
}

/// What signs the checkpoints of the log.
fn signer(config: &Config, keys: Vec<SigningKey>) -> Signer {
    let signer = Signer::of(config.ledger.origin.clone(), keys);
    for key in &signer.keys {
        tracing::info!(origin = signer.origin, key = %key.verifying(), "checkpoints of the log are signed by this key");
    }
    signer
}
