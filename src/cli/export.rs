//! `orchestrator export`: the log of the history in a file that anyone can verify.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use tokio::task::block_in_place;
use tonic::Streaming;

use super::{
    Exit, Failure,
    bundle::Contents,
    output::{clean, count, print},
    pin::unproved,
    remote::{Health, Remote},
};
use crate::{
    ledger::{Content, Hash, Head, LogVerifier, Node, Part, Pin, VerifyingKey},
    proto::orchestrator::v1::{self as pb, log_part, read_entries_response::Response},
};

/// Write the log of the history to a file that anyone can verify
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The file has a line of JSON for the newest checkpoint, and one for each entry of the log: the exact bytes that are \
stored. Entries that retention has removed are replaced by hashes. `orchestrator verify FILE` verifies it, without the \
service; docs/security.md describes the format for other software. Needs the role auditor or admin.

What is written is verified by the checkpoint meanwhile. The file is private to you; if the export fails, it is \
removed. If the log lacks entries that retention has not removed, it is kept, and the exit code is 3.

Exit codes:
  0    written
  1    the service refused, or the file exists or can't be written
  2    wrong usage
  3    what the service has sent does not verify
  4    the service can't be reached, or did not answer

Examples:
  orchestrator export --to history.jsonl
  orchestrator export --to second.jsonl --from-leaf 120000")]
pub(super) struct Export {
    /// The file, which must not exist
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Replace the entries before this leaf by hashes: an earlier export has them
    #[arg(long, value_name = "LEAF", default_value_t = 0)]
    from_leaf: u64,
    /// The public key of the log, from another source than the service
    #[arg(long, value_name = "KEY")]
    key: Option<VerifyingKey>,
    #[command(flatten)]
    remote: Remote,
}

impl Export {
    /// Reads the log, and writes it.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let Self { to, from_leaf, key, remote } = self;
        let mut attempts = 1..=ATTEMPTS;
        loop {
            let is_last = attempts.next() == Some(ATTEMPTS);
            match export(&remote, &to, from_leaf, key.as_ref()).await? {
                Exported::Whole { entries, size, origin } => {
                    let said =
                        format!("{} has {} of the log {origin} of {size}", to.display(), count(entries, "entry"));
                    print(&(clean(&said) + "\n"))?;
                    return Ok(Exit::Done);
                }
                Exported::Lacks(bundle, missing) if is_last => {
                    bundle.keep();
                    return Err(unproved(format!("{} is written, but {missing}", to.display())));
                }
                // The next attempt covers the entry that says so, if retention has removed them meanwhile.
                Exported::Lacks(..) => {}
            }
        }
    }
}

/// Attempts until a log is read of which retention removes nothing meanwhile. It removes something once a minute, or
/// after 64 cycles, and most of it from the beginning of the log, which is read first.
const ATTEMPTS: usize = 3;

/// The outcome of an attempt.
enum Exported {
    /// The file is written.
    Whole { entries: u64, size: u64, origin: String },
    /// The file lacks entries, and no entry in it says why.
    Lacks(Bundle, String),
}

async fn export(remote: &Remote, to: &Path, from_leaf: u64, key: Option<&VerifyingKey>) -> Result<Exported, Failure> {
    let (mut client, health) = remote.connect_to_ledger().await?;
    let request = pb::ReadEntriesRequest { from_leaf, size: 0 };
    let stream = remote.patiently(&health, client.read_entries(request)).await?.into_inner();
    let mut log = Incoming { remote: remote.clone(), health, stream };
    let Some(Response::Extent(pb::LogExtent { checkpoint, keys, .. })) = log.next().await? else {
        return Err(unproved("the service has sent a log without its extent".to_owned()));
    };
    let pin = Pin { checkpoint, keys };
    let signed = match key {
        Some(key) => key.open(&pin.checkpoint),
        None => pin.open().map(|(signed, _)| signed),
    };
    let signed = signed.map_err(|error| unproved(format!("the newest checkpoint: {error}")))?;
    let (origin, size) = (signed.origin.clone(), signed.size);
    let verifier = LogVerifier::new(signed, None).map_err(|error| unproved(error.to_string()))?;
    let mut bundle = Bundle::create(to)?;
    let contents = bundle.fill(Head { pin, from_leaf }, log, verifier).await?;
    if let Some(missing) = contents.missing().next() {
        return Ok(Exported::Lacks(bundle, missing.to_string()));
    }
    bundle.keep();
    Ok(Exported::Whole { entries: contents.entries(), size, origin })
}

/// A file that is being written. It is removed unless it is finished.
struct Bundle {
    path: PathBuf,
    writer: BufWriter<File>,
    is_finished: bool,
}

impl Bundle {
    const BUFFER: usize = 1 << 20;

    fn create(path: &Path) -> Result<Self, Failure> {
        let file = File::options().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|error| unwritable(path, &error))?;
        Ok(Self { path: path.to_owned(), writer: BufWriter::with_capacity(Self::BUFFER, file), is_finished: false })
    }

    /// Writes and verifies the log.
    async fn fill(&mut self, head: Head, mut log: Incoming, mut verifier: LogVerifier) -> Result<Contents, Failure> {
        let mut contents = Contents::from(head.from_leaf);
        self.write_line(&head.to_json().map_err(|error| unproved(error.to_string()))?)?;
        while let Some(response) = log.next().await? {
            let part = part(response)?;
            verifier.add(&part).map_err(|error| unproved(format!("the log of the service: {error}")))?;
            self.write_line(&part.to_json().map_err(|error| unproved(error.to_string()))?)?;
            contents.add(part).map_err(|problem| unproved(format!("the log of the service: {problem}")))?;
        }
        verifier.end().map_err(|error| unproved(format!("the log of the service: {error}")))?;
        let written = block_in_place(|| self.writer.flush().and_then(|()| self.writer.get_ref().sync_all()));
        written.map_err(|error| unwritable(&self.path, &error))?;
        Ok(contents)
    }

    /// Leaves the file where it is.
    fn keep(mut self) {
        self.is_finished = true;
    }

    fn write_line(&mut self, line: &str) -> Result<(), Failure> {
        let written = block_in_place(|| writeln!(self.writer, "{line}"));
        written.map_err(|error| unwritable(&self.path, &error))
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if !self.is_finished {
            drop(fs::remove_file(&self.path));
        }
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    let what = if error.kind() == io::ErrorKind::AlreadyExists {
        format!("{} exists; give another file", path.display())
    } else {
        format!("can't write {}: {error}", path.display())
    };
    Failure::new(Exit::Refused, clean(&what))
}

/// The log as it arrives.
struct Incoming {
    remote: Remote,
    health: Health,
    stream: Streaming<pb::ReadEntriesResponse>,
}

impl Incoming {
    async fn next(&mut self) -> Result<Option<Response>, Failure> {
        let message = self.remote.while_there(&self.health, self.stream.message()).await?;
        let message = message.map_err(|status| self.remote.failure(&status))?;
        Ok(message.and_then(|message| message.response))
    }
}

/// A part of the log, as the service has sent it.
fn part(response: Response) -> Result<Part, Failure> {
    let Response::Part(pb::LogPart { first, count, content: Some(content) }) = response else {
        return Err(unproved("the service has sent no part of the log".to_owned()));
    };
    let malformed = || unproved(format!("the service has sent a malformed part of the log, from leaf {first} on"));
    let subtree = Node::of_leaves(first, count).ok_or_else(malformed)?;
    let content = match content {
        log_part::Content::Entry(entry) if count == 1 => Content::Entry(entry),
        log_part::Content::Entry(_) => return Err(malformed()),
        log_part::Content::Hash(hash) => Content::Hash(Hash(hash[..].try_into().map_err(|_| malformed())?)),
    };
    Ok(Part { subtree, content })
}
