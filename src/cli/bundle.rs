//! Verifies a bundle, the file that `orchestrator export` writes: every entry by its bytes.

use std::{
    fmt::{self, Display},
    fs::File,
    io::{BufRead, BufReader, Read},
    ops::Range,
    path::Path,
};

use prost::Message;

use super::{
    Exit, Failure,
    output::{clean, count, print},
    pin::checkpoint_in,
};
use crate::{
    ledger::{Content, Control, Head, Leaves, LogVerifier, Part, VerifyingKey},
    proto::orchestrator::v1::{LogEntry, log_entry::Entry},
    record,
};

/// Verifies a bundle by its checkpoint, which the key has signed, and by an earlier one, and prints the result.
///
/// # Errors
/// Something is wrong, or a file can't be read.
pub(super) fn verify(path: &Path, key: &VerifyingKey, since: Option<&Path>) -> Result<Exit, Failure> {
    let refused = |problem: String| Failure::new(Exit::Refused, clean(&problem));
    let wrong = |problem: &dyn Display| refused(format!("{}: {problem}", path.display()));
    let earlier = since.map(|since| {
        let text = checkpoint_in(since).map_err(refused)?;
        key.open(&text).map_err(|error| refused(format!("{}: {error}", since.display())))
    });
    let earlier = earlier.transpose()?;
    let since = earlier.as_ref().map(|earlier| earlier.size);

    let mut lines = Lines(BufReader::new(File::open(path).map_err(|error| wrong(&error))?));
    let head = lines.next().map_err(|problem| wrong(&problem))?.unwrap_or_default();
    let Head { pin, from_leaf } = Head::from_json(&head).map_err(|error| wrong(&error))?;
    let signed = key.open(&pin.checkpoint).map_err(|error| wrong(&error))?;
    let (origin, size) = (signed.origin.clone(), signed.size);
    let mut verifier = LogVerifier::new(signed, earlier).map_err(|error| wrong(&error))?;
    let mut contents = Contents::from(from_leaf);
    while let Some(line) = lines.next().map_err(|problem| wrong(&problem))? {
        let part = Part::from_json(&line).map_err(|error| wrong(&error))?;
        verifier.add(&part).map_err(|error| wrong(&error))?;
        contents.add(part).map_err(|problem| wrong(&problem))?;
    }
    verifier.end().map_err(|error| wrong(&error))?;
    let missing: Vec<_> = contents.missing().collect();
    for missing in &missing {
        print(&format!("wrong: {missing}\n"))?;
    }
    if !missing.is_empty() {
        return Err(wrong(&"entries are missing"));
    }
    let missing = contents.accepted_gone();
    let Contents { records, events, controls, gone, .. } = contents;
    let mut said = vec![format!(
        "{} has the log {origin} of {}, as the key has signed it: {}, {} and {} about removals are as they were written",
        path.display(),
        count(size, "entry"),
        count(records, "record"),
        count(events, "audit event"),
        count(controls, "entry")
    )];
    if from_leaf > 0 {
        said.push(format!("hashes take the place of the entries before leaf {from_leaf}"));
    }
    let gone: u64 = gone.iter().map(|leaves| leaves.end - leaves.start).sum();
    if let removed @ 1.. = gone.saturating_sub(missing) {
        said.push(format!("retention has removed {}", count(removed, "entry")));
    }
    if missing > 0 {
        said.push(format!("missing when a new log began: {}", count(missing, "entry")));
    }
    said.extend(since.map(|since| format!("it extends the earlier log of {}", count(since, "entry"))));
    print(&said.iter().map(|line| clean(line) + "\n").collect::<String>())?;
    Ok(Exit::Done)
}

/// What a bundle contains.
#[derive(Default)]
pub(super) struct Contents {
    /// The first leaf whose entry is wanted.
    from_leaf: u64,
    records: u64,
    events: u64,
    controls: u64,
    /// The leaves that are replaced by hashes, lowest first. No two ranges meet.
    gone: Vec<Range<u64>>,
    /// The leaves that retention has removed, as entries say.
    removed: Leaves,
    /// The leaves that were missing when a new log began, as entries say.
    accepted: Leaves,
}

/// Leaves that are gone although no entry says that retention has removed them.
pub(super) struct Missing(Range<u64>);

impl Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.start, self.0.end - 1) {
            (first, last) if first == last => write!(f, "leaf {first} is missing"),
            (first, last) => write!(f, "leaves {first} to {last} are missing"),
        }?;
        f.write_str(", and no entry says that retention has removed them")
    }
}

impl Contents {
    /// Nothing yet of a log, of which entries from this leaf on are wanted.
    pub(super) fn from(from_leaf: u64) -> Self {
        Self { from_leaf, ..Self::default() }
    }

    /// Number of entries.
    pub(super) fn entries(&self) -> u64 {
        self.records + self.events + self.controls
    }

    /// Adds the next part of the log.
    ///
    /// # Errors
    /// It is an entry that can't be read.
    pub(super) fn add(&mut self, part: Part) -> Result<(), String> {
        let from_leaf = self.from_leaf;
        let leaves = part.subtree.leaves();
        let entry = match part.content {
            Content::Entry(entry) => entry,
            Content::Hash(_) => {
                let Range { start, end } = leaves;
                match self.gone.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ if end <= from_leaf => {}
                    _ => self.gone.push(start.max(from_leaf)..end),
                }
                return Ok(());
            }
        };
        let unreadable = |error: &dyn Display| format!("leaf {} can't be read: {error}", leaves.start);
        match LogEntry::decode(entry).map_err(|error| unreadable(&error))?.entry {
            Some(Entry::Cycle(_)) => self.records += 1,
            Some(Entry::Audit(_)) => self.events += 1,
            Some(Entry::Control(control)) => {
                self.controls += 1;
                let control = record::decode_control(&control.encode_to_vec()).map_err(|error| unreadable(&error))?;
                match control.at(leaves.start) {
                    Control::Pruned(pruned) => pruned.all().for_each(|leaves| self.removed.add(leaves)),
                    Control::Began { counts_anew: true, missing } => {
                        self.accepted = missing.into_iter().collect();
                    }
                    Control::Began { counts_anew: false, .. } | Control::Unknown => {}
                }
            }
            None => return Err(unreadable(&"it is of no kind that this version knows")),
        }
        Ok(())
    }

    /// Number of entries that are gone since a new log began without them.
    fn accepted_gone(&self) -> u64 {
        let not_removed: Leaves = self.gone.iter().cloned().flat_map(|gone| self.removed.missing(gone)).collect();
        let missing: Leaves = self.missing().map(|Missing(leaves)| leaves).collect();
        not_removed.count() - missing.count()
    }

    /// The leaves that are gone although no entry says that retention has removed them.
    pub(super) fn missing(&self) -> impl Iterator<Item = Missing> {
        let unsaid = self.gone.iter().cloned().flat_map(|gone| self.removed.missing(gone));
        unsaid.flat_map(|gone| self.accepted.missing(gone)).map(Missing)
    }
}

/// The lines of a file, with a limit on their length.
struct Lines(BufReader<File>);

impl Lines {
    /// Most bytes of a line: twice the largest record that a service can be configured for.
    const MAX: u64 = 128 << 20;

    fn next(&mut self) -> Result<Option<String>, String> {
        let mut line = String::new();
        let read = self.0.by_ref().take(Self::MAX).read_line(&mut line).map_err(|error| error.to_string())?;
        match read as u64 {
            0 => Ok(None),
            Self::MAX => Err("it has a line that is too long".to_owned()),
            _ => Ok(Some(line)),
        }
    }
}
