//! Pins: files with a checkpoint that was verified, and what a service is held to by them.

use std::{
    fmt::Display,
    fs::File,
    future::Future,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tonic::{Response, Status};

use super::{
    Exit, Failure,
    output::{clean, count, telemetry},
    remote::{Health, Ledger, Remote, is_passing},
};
use crate::{
    file::{self, FileError},
    ledger::{Checkpoint, Consistency, Entry, Hash, Inclusion, Pin, VerifyingKey},
    proto::orchestrator::v1::{self as pb, cycle_event::Event},
};

/// The text of a checkpoint in a file: the checkpoint itself, or the first line of a pin or of a bundle.
///
/// # Errors
/// The file can't be read, or contains something else.
pub(super) fn checkpoint_in(path: &Path) -> Result<String, String> {
    /// Most bytes of a checkpoint, or of a first line.
    const MAX: u64 = 64 << 10;
    let refused = |error: &dyn Display| format!("{}: {error}", path.display());
    let mut reader = BufReader::new(File::open(path).map_err(|error| refused(&error))?.take(MAX));
    let mut text = String::new();
    reader.read_line(&mut text).map_err(|error| refused(&error))?;
    if text.starts_with('{') {
        return Ok(Pin::from_json(&text).map_err(|error| refused(&error))?.checkpoint);
    }
    reader.read_to_string(&mut text).map_err(|error| refused(&error))?;
    Ok(text)
}

/// Holds a service to the newest checkpoint that was verified, and keeps that in a file.
pub(super) struct Witness {
    remote: Remote,
    client: Ledger,
    health: Health,
    path: PathBuf,
    /// What the file contains.
    kept: Pin,
    pin: Pin,
    pinned: Checkpoint,
}

/// The outcome of opening a pin.
pub(super) enum Opened {
    /// The file was there.
    Known,
    /// It was not, and the present log of the service is trusted from now on.
    Trusted,
}

impl Witness {
    /// Reads a pin. If the file does not exist, trusts the service with its present log and its keys, or this key. If
    /// it exists, this key takes the place of its keys.
    ///
    /// # Errors
    /// The pin can't be read or written, the service can't be reached, or this key has not signed its checkpoint.
    pub(super) async fn open(
        remote: &Remote,
        path: PathBuf,
        key: Option<VerifyingKey>,
    ) -> Result<(Self, Opened), Failure> {
        let (mut client, health) = remote.connect_to_ledger().await?;
        let refused = |error: &dyn Display| Failure::new(Exit::Refused, format!("{}: {error}", path.display()));
        let (kept, pin, pinned, opened) = match file::read(&path) {
            Ok(text) => {
                let kept = Pin::from_json(&String::from_utf8_lossy(&text)).map_err(|error| refused(&error))?;
                let (pinned, _) = kept.open().map_err(|error| refused(&error))?;
                let keys = key.map_or_else(|| kept.keys.clone(), |key| vec![key.to_string()]);
                (kept.clone(), Pin { keys, ..kept }, pinned, Opened::Known)
            }
            Err(FileError::Unreadable(error)) if error.kind() == io::ErrorKind::NotFound => {
                let answer = newest(remote, &mut client).await?;
                let keys = key.map_or(answer.keys, |key| vec![key.to_string()]);
                let pin = Pin { checkpoint: answer.checkpoint, keys };
                let (pinned, _) = pin.open().map_err(|error| unproved(format!("the newest checkpoint: {error}")))?;
                (Pin::default(), pin, pinned, Opened::Trusted)
            }
            Err(error) => return Err(refused(&error)),
        };
        let mut witness = Self { remote: remote.clone(), client, health, path, kept, pin, pinned };
        if matches!(opened, Opened::Trusted) {
            witness.keep()?;
        }
        Ok((witness, opened))
    }

    /// The newest checkpoint that was verified.
    pub(super) fn pinned(&self) -> &Checkpoint {
        &self.pinned
    }

    /// What to do after a pin was created on trust.
    pub(super) fn trusted(&self) -> String {
        let keys = self.pin.keys.iter().map(|key| format!("\n  {}", clean(key)));
        format!(
            "{} is created, and trusts the service as it is now. Compare the public key with the one that the service \
             logs at its start:{}",
            clean(&self.path.display().to_string()),
            keys.collect::<String>()
        )
    }

    /// Verifies that the newest checkpoint of the service has all pinned entries, unchanged; pins it, and returns it
    /// with the keys of the service.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub(super) async fn hold_newest(&mut self) -> Result<pb::GetCheckpointResponse, Failure> {
        let newest = newest(&self.remote, &mut self.client).await?;
        let shown = self.opened(&newest.checkpoint)?;
        if shown.size < self.pinned.size {
            return Err(unproved(format!(
                "the log of the service has {}, and the pinned one {}: the last entries are missing",
                count(shown.size, "entry"),
                self.pinned.size
            )));
        }
        self.compare(shown, &newest.checkpoint).await?;
        Ok(newest)
    }

    /// Verifies that this checkpoint is of the same log as the pinned one: that the longer log extends the shorter one.
    /// Pins the longer one, and returns this one.
    ///
    /// # Errors
    /// It does not verify, the pin can't be written, or the service can't be reached.
    async fn hold(&mut self, checkpoint: &str) -> Result<Checkpoint, Failure> {
        let shown = self.opened(checkpoint)?;
        if shown.size < self.pinned.size {
            // It may only have come late.
            self.hold_newest().await?;
        }
        self.compare(shown, checkpoint).await
    }

    /// Opens a checkpoint of the pinned log with the keys of the pin.
    fn opened(&self, checkpoint: &str) -> Result<Checkpoint, Failure> {
        let pin = Pin { checkpoint: checkpoint.to_owned(), keys: self.pin.keys.clone() };
        let (shown, _) = pin.open().map_err(|error| unproved(format!("a checkpoint of the service: {error}")))?;
        if shown.origin != self.pinned.origin {
            let (shown, pinned) = (&shown.origin, &self.pinned.origin);
            return Err(unproved(format!("the service has the log {shown}, and the pin is of {pinned}")));
        }
        Ok(shown)
    }

    /// Verifies that the longer one of this log and the pinned one extends the other one, and pins it.
    async fn compare(&mut self, shown: Checkpoint, checkpoint: &str) -> Result<Checkpoint, Failure> {
        let pinned = self.pinned.clone();
        let is_newer = shown.size > pinned.size;
        let (earlier, later) = if is_newer { (&pinned, &shown) } else { (&shown, &pinned) };
        let proof = if earlier.size == later.size || earlier.size == 0 {
            Vec::new()
        } else {
            let request = pb::GetConsistencyProofRequest { from_size: earlier.size, size: later.size };
            let proof = self.prove(|mut client| async move { client.get_consistency_proof(request).await }).await;
            proof.map_err(|failure| self.not_proved(earlier.size, later.size, &failure))?.hashes
        };
        let extends = Consistency(hashes(&proof)?).verify((earlier.size, earlier.root), (later.size, later.root));
        extends.map_err(|error| {
            unproved(format!(
                "the log of {} does not extend that of {}, one of which is pinned: {error}. The history was changed, \
                 and signed anew",
                count(later.size, "entry"),
                count(earlier.size, "entry")
            ))
        })?;
        // Of the same size, it may have the signatures of other keys.
        if shown.size >= pinned.size {
            checkpoint.clone_into(&mut self.pin.checkpoint);
            self.pinned = shown.clone();
        }
        self.keep()?;
        Ok(shown)
    }

    /// Connects again, after a failure.
    ///
    /// # Errors
    /// The service can't be reached.
    pub(super) async fn reconnect(&mut self) -> Result<(), Failure> {
        (self.client, self.health) = self.remote.connect_to_ledger().await?;
        Ok(())
    }

    /// Verifies what an event contains: a record, or a checkpoint.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub(super) async fn see(&mut self, event: &pb::CycleEvent) -> Result<(), Failure> {
        match &event.event {
            Some(Event::Recorded(record)) => self.hold_to_record(telemetry(record)?.cycle_id, record).await,
            Some(Event::Bookmark(pb::Bookmark { checkpoint })) if !checkpoint.is_empty() => {
                self.hold(checkpoint).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Verifies that the log contains this record of a cycle, and that the log extends the pinned one. Waits for a
    /// checkpoint that covers the record, which takes about a second.
    ///
    /// # Errors
    /// As [`Self::hold`].
    async fn hold_to_record(&mut self, cycle_id: u64, record: &Bytes) -> Result<(), Failure> {
        let request = pb::GetInclusionProofRequest { cycle_id, omit_entry: true, ..Default::default() };
        let proved = self.prove(|mut client| async move { client.get_inclusion_proof(request).await }).await;
        let cycle = |problem: &str| unproved(format!("the record of cycle {cycle_id} is not proved: {problem}"));
        let pb::GetInclusionProofResponse { leaf, size, hashes: proof, checkpoint, .. } =
            proved.map_err(|failure| if failure.exit == Exit::Unproved { cycle(&failure.message) } else { failure })?;
        let signed = self.hold(&checkpoint).await?;
        if signed.size != size {
            return Err(cycle("its proof is of another checkpoint"));
        }
        let proof = Inclusion(hashes(&proof)?);
        let verified = proof.verify(leaf, Entry::Cycle(record).leaf(), signed.size, signed.root);
        verified.map_err(|error| cycle(&error.to_string()))
    }

    /// Writes the pin to its file, if that contains another one.
    fn keep(&mut self) -> Result<(), Failure> {
        if self.pin == self.kept {
            return Ok(());
        }
        let refused = |error: &dyn Display| {
            Failure::new(Exit::Refused, format!("can't write the pin {}: {error}", self.path.display()))
        };
        let text = self.pin.to_json().map_err(|error| refused(&error))?;
        file::replace(&self.path, &(text + "\n")).map_err(|error| refused(&error))?;
        self.kept = self.pin.clone();
        Ok(())
    }

    fn not_proved(&self, earlier: u64, later: u64, failure: &Failure) -> Failure {
        if failure.exit != Exit::Unproved {
            return Failure::new(failure.exit, failure.message.clone());
        }
        unproved(format!(
            "the service can't prove that its log of {} extends that of {}: {}\nIf retention has removed them since, \
             remove {} and pin the log anew.",
            count(later, "entry"),
            count(earlier, "entry"),
            failure.message,
            self.path.display()
        ))
    }

    /// Asks for a proof. If the service is away, or ends, another attempt may help, and it counts as unreachable. If it
    /// refuses, nothing is proved, whatever the reason.
    async fn prove<T, F>(&self, call: impl FnOnce(Ledger) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let asked = self.remote.while_there(&self.health, call(self.client.clone())).await?;
        asked.map(Response::into_inner).map_err(|status| {
            let exit = if is_passing(&status) { Exit::Unreachable } else { Exit::Unproved };
            Failure { exit, ..self.remote.failure(&status) }
        })
    }
}

/// The newest checkpoint of the service, and its keys.
///
/// # Errors
/// The service can't be reached, or refuses.
pub(super) async fn newest(remote: &Remote, client: &mut Ledger) -> Result<pb::GetCheckpointResponse, Failure> {
    Ok(remote.quickly(client.get_checkpoint(pb::GetCheckpointRequest {})).await?.into_inner())
}

/// Something that the service has said does not verify.
pub(super) fn unproved(problem: String) -> Failure {
    Failure::new(Exit::Unproved, problem)
}

fn hashes(hashes: &[Bytes]) -> Result<Vec<Hash>, Failure> {
    let hash = |hash: &Bytes| hash[..].try_into().map(Hash).map_err(|_| unproved("a proof is malformed".to_owned()));
    hashes.iter().map(hash).collect()
}
