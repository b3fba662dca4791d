//! `orchestrator backup` and `orchestrator restore`.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use super::{
    Exit, Failure,
    output::{clean, print},
    store::{LogArgs, entries, told},
    verify::{differences, findings, open_with_any},
};
use crate::{
    ledger::{Checkpoint, SigningKey},
    store::{self, BackedUp, BackupError, StoreUrl},
};

/// Back up a store, also while a service runs on it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The backup is a database that only its owner can read, as of one moment, and beside it, with the suffix .checkpoint, \
the signed checkpoint of its log. It does not contain the key of the log, which a restored store needs as well: keep \
that elsewhere. It is not encrypted; encrypt it where it leaves the machine.

Before it gets its name, it is verified as `orchestrator verify` does: its log is computed anew from its bytes, and \
compared with the checkpoint. With the key of the log, which is read beside the store if it is there, so are the \
signature and the seals. If anything is wrong, each problem is one line, and there is no backup.

Exit codes:
  0    the backup is on the disk, and verified unless it says otherwise
  1    the store can't be read, the copy is not what was recorded, or the file
       exists or can't be written
  2    wrong usage

Examples:
  orchestrator backup --to backup.db
  orchestrator backup sqlite:/var/lib/orchestrator.db --to backup.db")]
pub(super) struct Backup {
    /// The store, as in store.url
    #[arg(value_name = "URL", value_parser = StoreUrl::parse, default_value = "sqlite:orchestrator.db")]
    url: StoreUrl,
    /// The new file
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// A key of the log, if it is not beside the store; repeat it for several keys
    #[arg(long, value_name = "FILE")]
    key_file: Vec<PathBuf>,
    /// Leave the backup unverified: it takes too long, or the store is damaged and all that is left is wanted
    #[arg(long, conflicts_with = "key_file")]
    unverified: bool,
}

/// Restore a backup of a store that no service has open
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Verifies the backup, as `orchestrator verify --key-file` does, with the key of the log and the checkpoint beside the \
backup. Then it puts a copy in the place of the store, and accepts it there, as `orchestrator store accept` does: so \
`orchestrator serve` starts, and a new log begins, which does not extend what was written after the backup.

A store that exists is kept with --replace, in a file with the suffix .replaced.

Exit codes:
  0    the store may be served
  1    the backup was changed, the store is open or exists, or a file can't be
       used
  2    wrong usage

Examples:
  orchestrator restore backup.db
  orchestrator restore backup.db sqlite:/var/lib/orchestrator.db --replace")]
pub(super) struct Restore {
    /// The backup
    #[arg(value_name = "FILE")]
    backup: PathBuf,
    /// The store, as in store.url
    #[arg(value_name = "URL", value_parser = StoreUrl::parse, default_value = "sqlite:orchestrator.db")]
    url: StoreUrl,
    /// Replace the store that exists, and keep it
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    log: LogArgs,
    /// Restore the backup without verifying it: its key or its checkpoint is lost
    #[arg(long)]
    unverified: bool,
}

impl Backup {
    /// Makes the backup.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Self { url, to, key_file, unverified } = self;
        let keys = if key_file.is_empty() && !unverified {
            store::key_beside(&url).map(Vec::from_iter)
        } else {
            key_file.iter().map(|path| store::signing_key(path)).collect()
        };
        let keys = keys.map_err(|error| refused(&error))?;
        let mut found = String::new();
        let verify = |copy: &Path, checkpoint: Option<&str>| {
            let Some(checkpoint) = checkpoint.filter(|_| !unverified) else { return Ok::<_, Failure>(()) };
            found = verified(&url, &to, copy, checkpoint, &keys).map_err(|failure| {
                failure.and(
                    "no backup was made: see `orchestrator verify --db FILE --key-file FILE`; --unverified copies the \
                     store as it is",
                )
            })?;
            Ok(())
        };
        let BackedUp { last_cycle_id, has_checkpoint } = store::backup(&url, &to, verify)?;
        let mut said = format!("{} is a backup of {url}; its last cycle is {last_cycle_id}", to.display());
        if !has_checkpoint {
            said += ". The store has no checkpoint, so nothing shows whether the backup is what was recorded";
        } else if unverified {
            said += ". It was not verified";
        }
        print(&(clean(&said) + "\n" + &found))?;
        Ok(Exit::Done)
    }
}

/// Verifies the copy of a store that is to become the backup `to`. Returns what it contains, in lines for people.
fn verified(url: &StoreUrl, to: &Path, copy: &Path, checkpoint: &str, keys: &[SigningKey]) -> Result<String, Failure> {
    let opened = if keys.is_empty() { Checkpoint::unverified(checkpoint) } else { open_with_any(keys, checkpoint) };
    let checkpoint = opened.map_err(|error| {
        let problem = format!("the checkpoint of {url}: {error}; give the key of the log by --key-file");
        Failure::new(Exit::Refused, clean(&problem))
    })?;
    let verified = differences(&format!("the copy of {url}"), copy, &checkpoint, keys)?;
    let mut found = findings(to, &checkpoint, &verified);
    if keys.is_empty() {
        found += "nor was the signature of the checkpoint\n";
    }
    Ok(found)
}

impl Restore {
    /// Restores the backup.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Self { backup, url, replace, log, unverified } = self;
        // Before its keys and its checkpoint, which are missing then as well.
        if !backup.exists() {
            return Err(Failure::new(Exit::Refused, clean(&format!("{} does not exist", backup.display()))));
        }
        let keys = log.keys(&url).map_err(|error| refused(&error))?;
        let checkpoint = if unverified {
            None
        } else {
            if keys.are_new() {
                let problem = "the key of the log is missing, so the backup can't be verified: put the key beside the \
                               store, or see --key-file and --unverified";
                return Err(Failure::new(Exit::Refused, problem));
            }
            let path = store::checkpoint_of(&backup);
            let unusable = |error: &dyn Error| {
                let problem = format!("{}: {error}; see --unverified", path.display());
                Failure::new(Exit::Refused, clean(&problem))
            };
            let text = fs::read_to_string(&path).map_err(|error| unusable(&error))?;
            Some(open_with_any(&keys.keys, &text).map_err(|error| unusable(&error))?)
        };
        let verify = |copy: &Path, keys: &[SigningKey]| match checkpoint {
            Some(checkpoint) => differences(&backup.display(), copy, &checkpoint, keys).map(drop),
            None => Ok(()),
        };
        let restored = store::restore(&backup, &url, (keys, log.origin), entries("restore"), replace, verify)?;
        print(&told(&restored))?;
        Ok(Exit::Done)
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        refused(&error)
    }
}

fn refused(error: &dyn Error) -> Failure {
    Failure::new(Exit::Refused, clean(&error.to_string()))
}
