//! `orchestrator checkpoint`: the newest signed checkpoint of the log.

use std::path::PathBuf;

use super::{
    Exit, Failure,
    output::{clean, clean_lines, count, note},
    pin::{Opened, Witness, newest, unproved},
    remote::Remote,
};
use crate::ledger::{Checkpoint, Pin, VerifyingKey};

/// Show the newest signed checkpoint of the log of the history
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A checkpoint is the size and the root of the log, signed by the service. With --pin, it is compared with the one in \
FILE: the service has to prove that nothing in its log was changed since, and FILE then gets the newer checkpoint. \
Without FILE, the present log is trusted, and FILE is created. Keep it where those who can write to the database of \
the service can't.

A pin has the form of --output json: the checkpoint, and the public keys.

Exit codes:
  0    shown; with --pin: nothing that was pinned was changed
  1    the service refused, or the pin can't be used
  2    wrong usage
  3    something does not verify: a changed history, or another log
  4    the service can't be reached, or did not answer

Examples:
  orchestrator checkpoint
  orchestrator checkpoint --pin orchestrator.pin
  orchestrator checkpoint --pin orchestrator.pin \\
    --key 'core/8d0f…+5b1c22f7+AX3…'")]
pub(super) struct CheckpointCommand {
    /// File with the checkpoint that was verified last; it is created if it does not exist
    #[arg(long, value_name = "FILE")]
    pin: Option<PathBuf>,
    /// The public key of the log, from another source than the service. Takes the place of the keys in FILE
    #[arg(long, value_name = "KEY")]
    key: Option<VerifyingKey>,
    #[command(flatten)]
    remote: Remote,
}

impl CheckpointCommand {
    /// Asks, verifies, and prints the checkpoint.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let Self { pin, key, remote } = self;
        let Some(path) = pin else {
            let (mut client, _) = remote.connect_to_ledger().await?;
            let answer = newest(&remote, &mut client).await?;
            let keys = key.map_or_else(|| answer.keys.clone(), |key| vec![key.to_string()]);
            let opened = Pin { checkpoint: answer.checkpoint.clone(), keys }.open();
            opened.map_err(|error| unproved(format!("the newest checkpoint: {error}")))?;
            remote.format.show("GetCheckpointResponse", &answer, |answer| clean_lines(&answer.checkpoint) + "\n")?;
            return Ok(Exit::Done);
        };
        let by_hand = key.is_some();
        let (mut witness, opened) = Witness::open(&remote, path, key).await?;
        let before = witness.pinned().size;
        let answer = witness.hold_newest().await?;
        if let (Opened::Trusted, false) = (&opened, by_hand) {
            note(&witness.trusted());
        }
        remote.format.show("GetCheckpointResponse", &answer, |_| {
            let Checkpoint { origin, size, .. } = witness.pinned();
            clean(&match opened {
                Opened::Known => {
                    format!(
                        "the log {origin} has {}, and is unchanged up to {before}, the size of the pin",
                        count(*size, "entry")
                    )
                }
                Opened::Trusted => format!("the log {origin} of {} is pinned", count(*size, "entry")),
            }) + "\n"
        })?;
        Ok(Exit::Done)
    }
}
