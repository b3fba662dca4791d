//! `orchestrator verify`: proves that an exported log, or a database, has the signed contents.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
};

use super::{
    Exit, Failure, bundle,
    output::{clean, count, print},
};
use crate::{
    ledger::{Checkpoint, NoteError, SealKeys, SigningKey, VerifyingKey},
    record,
    store::{self, Rules, Verified},
};

/// Verify that nothing in an exported log, or in a database, was changed
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Of a bundle, which `orchestrator export` has written: computes the root of the log anew from the bytes of each entry, \
and compares it with the checkpoint, which the key has signed. With --since, also shows that nothing was changed since \
that checkpoint, even by a program that has the key.

Of a database: computes the log of the history anew from the stored bytes, and compares it with all stored hashes, with the columns \
that the service reads, and with the signed checkpoint. A process may have the database open. Each thing that is \
wrong is one line.

With the private key (--key-file), also checks the seals: those of the registrations, loops, latest outputs and waiting \
cycles, and that of the end of the log, which may have entries after the checkpoint. Without it, these are compared \
with nothing that only a process with the key can make. Records that are older than the log never are.

Exit codes:
  0    nothing is wrong
  1    something is wrong, or the database or the checkpoint can't be used
  2    wrong usage

Examples:
  orchestrator verify history.jsonl --key 'core/8d0f…+5b1c22f7+AX3…'
  orchestrator verify history.jsonl --since orchestrator.pin \\
    --key 'core/8d0f…+5b1c22f7+AX3…'
  orchestrator verify --db orchestrator.db --key 'core/8d0f…+5b1c22f7+AX3…'
  orchestrator verify --db orchestrator.db --key-file orchestrator.db.key")]
pub(super) struct Verify {
    /// The bundle
    #[arg(value_name = "BUNDLE", required_unless_present = "db", conflicts_with = "db")]
    bundle: Option<PathBuf>,
    /// Verify this database instead
    #[arg(long, value_name = "FILE")]
    db: Option<PathBuf>,
    /// The public key of the log, which the service logs at its start
    #[arg(long, value_name = "KEY", required_unless_present = "key_file")]
    key: Option<VerifyingKey>,
    /// With --db, the private key of the log, to check the seals as well; repeat it for several keys
    #[arg(long, value_name = "FILE", requires = "db")]
    key_file: Vec<PathBuf>,
    /// An earlier checkpoint, pin or bundle of the same log, from another place
    #[arg(long, value_name = "FILE", conflicts_with = "db")]
    since: Option<PathBuf>,
    /// With --db, a checkpoint that the key has signed; without it, the one beside the database
    #[arg(long, value_name = "FILE", requires = "db")]
    checkpoint: Option<PathBuf>,
}

impl Verify {
    /// Verifies, and prints the problems.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Self { bundle, db, key, key_file, since, checkpoint } = self;
        if let (Some(bundle), Some(key)) = (bundle, &key) {
            return bundle::verify(&bundle, key, since.as_deref());
        }
        let db = db.unwrap_or_default();
        let refused = |problem: String| Failure::new(Exit::Refused, clean(&problem));
        let keys = key_file.iter().map(|path| store::signing_key(path)).collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|error| refused(error.to_string()))?;
        let path = checkpoint.unwrap_or_else(|| store::checkpoint_of(&db));
        let text = fs::read_to_string(&path).map_err(|error| refused(format!("{}: {error}", path.display())))?;
        let checkpoint = match &key {
            Some(key) => key.open(&text),
            None => open_with_any(&keys, &text),
        };
        let checkpoint = checkpoint.map_err(|error| refused(format!("{}: {error}", path.display())))?;
        let verified = differences(&db.display(), &db, &checkpoint, &keys)?;
        print(&findings(&db, &checkpoint, &verified))?;
        Ok(Exit::Done)
    }
}

/// What a database without differences contains, in lines for people.
pub(super) fn findings(db: &Path, checkpoint: &Checkpoint, verified: &Verified) -> String {
    let Verified { entries, first_kept, removed, missing, records, events, unlogged, sealed } = *verified;
    let mut lines = vec![format!(
        "{} has the log {} of {}, signed up to {}; {} and {} are as they were written",
        db.display(),
        checkpoint.origin,
        count(entries, "entry"),
        checkpoint.size,
        count(records, "record"),
        count(events, "audit event")
    )];
    match sealed {
        Some(rows) => lines.push(format!("the seals of the log and of {} are valid", count(rows, "other row"))),
        None => lines.push("the seals were not checked: that needs the private key, --key-file".into()),
    }
    if first_kept > 0 {
        lines.push(format!("entries 0 to {} were removed by retention", first_kept - 1));
    }
    if let others @ 1.. = removed.saturating_sub(first_kept) {
        lines.push(format!("retention removed {others} of the later entries as well"));
    }
    if missing > 0 {
        lines.push(format!("missing when a new log began: {}", count(missing, "entry")));
    }
    if unlogged > 0 {
        lines.push(format!("older than the log, and not proved: {}", count(unlogged, "record")));
    }
    lines.iter().map(|line| clean(line) + "\n").collect()
}

/// Opens a checkpoint that one of these keys has signed.
pub(super) fn open_with_any(keys: &[SigningKey], text: &str) -> Result<Checkpoint, NoteError> {
    let mut opened = Err(NoteError::NotSigned(String::new()));
    for key in keys {
        opened = opened.or_else(|_| key.verifying().open(text));
    }
    opened
}

/// Verifies a database, which is called `what`, against a checkpoint, and its seals if there are keys. Prints the
/// problems.
///
/// # Errors
/// There are some, or the database can't be read.
pub(super) fn differences(
    what: &dyn Display,
    db: &Path,
    checkpoint: &Checkpoint,
    keys: &[SigningKey],
) -> Result<Verified, Failure> {
    let refused = |problem: String| Failure::new(Exit::Refused, clean(&problem));
    let seals = (!keys.is_empty()).then(|| SealKeys::new(&checkpoint.origin, keys));
    let mut printed = Ok(());
    let mut differences = 0_u64;
    let mut wrong = |problem: String| {
        differences += 1;
        if printed.is_ok() {
            printed = print(&format!("wrong: {}\n", clean(&problem)));
        }
    };
    let rules = Rules { checks: record::CHECKS, output: record::output_sha256 };
    let verified = store::verify(db, checkpoint, seals, rules, &mut wrong);
    let verified = verified.map_err(|error| refused(error.to_string()))?;
    printed?;
    if differences > 0 {
        let ways = count(differences, "way");
        return Err(refused(format!("{what} differs from what was recorded in {ways}")));
    }
    Ok(verified)
}
