//! `orchestrator verify`: proves that a database has the signed contents.

use std::{fs, path::PathBuf};

use super::{
    Exit, Failure,
    output::{clean, print},
};
use crate::{
    ledger::VerifyingKey,
    record,
    store::{self, Rules, Verified},
};

/// Verify that nothing in a database was changed
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Computes the log of the history anew from the stored bytes, and compares it with all stored hashes, with the columns \
that the service reads, and with the signed checkpoint. A process may have the database open. Each thing that is \
wrong is one line.

It detects changes by programs that do not have the key. Entries after the checkpoint, which is at most about a second \
older, and records that are older than the log are compared with nothing that is signed.

Exit codes:
  0    nothing is wrong
  1    something is wrong, or the database or the checkpoint can't be used
  2    wrong usage

Examples:
  orchestrator verify --db orchestrator.db --key 'core/8d0f…+5b1c22f7+AX3…'")]
pub(super) struct Verify {
    /// The database
    #[arg(long, value_name = "FILE")]
    db: PathBuf,
    /// The public key of the log, which the service logs at its start
    #[arg(long, value_name = "KEY")]
    key: VerifyingKey,
    /// A checkpoint that the key has signed; without it, the one beside the database
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
}

impl Verify {
    /// Verifies, and prints the problems.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Self { db, key, checkpoint } = self;
        let refused = |problem: String| Failure::new(Exit::Refused, clean(&problem));
        let path = checkpoint.unwrap_or_else(|| store::checkpoint_of(&db));
        let text = fs::read_to_string(&path).map_err(|error| refused(format!("{}: {error}", path.display())))?;
        let checkpoint = key.open(&text).map_err(|error| refused(format!("{}: {error}", path.display())))?;
        let mut printed = Ok(());
        let mut count = 0_u64;
        let mut wrong = |problem: String| {
            count += 1;
            if printed.is_ok() {
                printed = print(&format!("wrong: {}\n", clean(&problem)));
            }
        };
        let rules = Rules { record: record::check_columns, event: record::check_event, pruned: record::decode_pruned };
        let verified = store::verify(&db, &checkpoint, rules, &mut wrong);
        let verified = verified.map_err(|error| refused(error.to_string()))?;
        printed?;
        let Verified { entries, first_kept, removed, records, events, unlogged } = verified;
        if count > 0 {
            return Err(refused(format!("{} differs from what was recorded in {count} ways", db.display())));
        }
        let mut lines = vec![format!(
            "{} has the log {} of {entries} entries, {} of which are signed; {records} records and {events} audit events \
             are as they were written",
            db.display(),
            checkpoint.origin,
            checkpoint.size
        )];
        if first_kept > 0 {
            lines.push(format!("entries 0 to {} were removed by retention", first_kept - 1));
        }
        if let others @ 1.. = removed.saturating_sub(first_kept) {
            lines.push(format!("retention removed {others} of the later entries as well"));
        }
        if unlogged > 0 {
            lines.push(format!("{unlogged} records are older than the log, and not proved"));
        }
        print(&lines.iter().map(|line| clean(line) + "\n").collect::<String>())?;
        Ok(Exit::Done)
    }
}
