//! Limits on the contents of requests, checked in their encoded form, before anything is built.
//!
//! A list of empty strings takes 2 bytes an entry on the wire and a dozen times as much in memory, so a limit on the
//! bytes of a message does not bound its memory.

use std::{collections::HashMap, ops::Range, sync::OnceLock};

use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};

use super::descriptors;
use crate::model::{self, CycleRequest, Fields, Malformed, Subsystem, Wire};

/// Most fields in one request, at all depths together. Each entry of a list counts as one, and unknown fields count as
/// well: the remaining work takes less than a millisecond.
pub const MAX_FIELDS: usize = 100_000;

/// Most names in a filter of a watcher.
pub const MAX_FILTER: usize = 1000;
/// Most subsystems that are registered by one call: a commit of this size hardly delays the start of a cycle.
pub const MAX_REGISTRATIONS: usize = 1000;
/// Most states in a filter: more than exist.
const MAX_STATES: usize = 16;
/// Most codes that are retried: nearly all that exist.
const MAX_CODES: usize = 16;

/// Most fields that one change of a registration names: all that exist, and some keys of its parameters.
const MAX_PATHS: usize = 128;

/// Most entries of each list and map in a request. The contract documents them at the fields.
const MAX_ENTRIES: &[(&str, usize)] = &[
    ("dreamnet.orchestrator.v1.IntervalLoop.subsystems", CycleRequest::MAX_SUBSET),
    ("dreamnet.orchestrator.v1.ListCyclesRequest.states", MAX_STATES),
    ("dreamnet.orchestrator.v1.ListCyclesRequest.subsystem_states", MAX_STATES),
    ("dreamnet.orchestrator.v1.PlanCycleRequest.subsystems", CycleRequest::MAX_SUBSET),
    ("dreamnet.orchestrator.v1.RegisterSubsystemsRequest.registrations", MAX_REGISTRATIONS),
    ("dreamnet.orchestrator.v1.Registration.after", Subsystem::MAX_INPUTS),
    ("dreamnet.orchestrator.v1.Registration.reads", Subsystem::MAX_INPUTS),
    ("dreamnet.orchestrator.v1.Registration.requires", Subsystem::MAX_INPUTS),
    ("dreamnet.orchestrator.v1.RetryPolicy.retryable_status_codes", MAX_CODES),
    ("dreamnet.orchestrator.v1.RunCycleRequest.subsystems", CycleRequest::MAX_SUBSET),
    ("dreamnet.orchestrator.v1.WatchCyclesRequest.loops", MAX_FILTER),
    ("dreamnet.orchestrator.v1.WatchCyclesRequest.states", MAX_STATES),
    ("dreamnet.orchestrator.v1.WatchCyclesRequest.subsystems", MAX_FILTER),
    ("dreamnet.subsystem.v1.RunCycleRequest.inputs", Subsystem::MAX_INPUTS),
    // In `UpdateSubsystemRequest.update_mask`.
    ("google.protobuf.FieldMask.paths", MAX_PATHS),
];

/// Most entries of the list or map with this full name. One without a limit accepts none: a test checks that all have a
/// limit.
pub(super) fn max_entries(full_name: &str) -> usize {
    MAX_ENTRIES.iter().find(|(name, _)| *name == full_name).map_or(0, |(_, max)| *max)
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unreadable {
    /// A list or map is too long.
    #[error("{field} has more than {max} entries, which is the most that are allowed")]
    TooManyEntries {
        /// Its path, such as `registration.requires`.
        field: String,
        /// Its limit.
        max: usize,
    },
    /// The request has too many fields.
    #[error("the request has more than {MAX_FIELDS} fields and entries of lists, which is the most that are allowed")]
    TooManyFields,
    /// The bytes are not a message of this type.
    #[error("the request is no {message}: {error}; encode it by the contract that reflection describes")]
    Malformed {
        /// Its full name.
        message: String,
        /// The error of the library.
        error: String,
    },
}

impl Unreadable {
    fn inside(self, outer: &str) -> Self {
        match self {
            Self::TooManyEntries { field, max } => Self::TooManyEntries { field: format!("{outer}.{field}"), max },
            other => other,
        }
    }

    /// The error of a message with this name that can't be decoded.
    pub(super) fn malformed(message: &str, error: impl ToString) -> Self {
        Self::Malformed { message: message.to_owned(), error: error.to_string() }
    }
}

/// Checks an encoded message if it is a request of the contract; stops at the first violation.
///
/// # Errors
/// A list is too long, there are too many fields, or the bytes are not the fields of a message. The values of fields
/// are checked by decoding.
pub fn check(full_name: &str, bytes: &[u8]) -> Result<(), Unreadable> {
    match requests().get(full_name) {
        Some(request) => {
            let mut scan = Scan { counts: vec![0; request.slots.end], fields: 0 };
            scan.message(bytes, request).map_err(|excess| match excess {
                Excess::Unreadable(unreadable) => unreadable,
                Excess::Malformed(error) => Unreadable::malformed(full_name, error),
            })
        }
        None => Ok(()),
    }
}

/// True if this message is a request of the contract.
pub(super) fn is_request(full_name: &str) -> bool {
    requests().contains_key(full_name)
}

/// The request type of each method of the contract, by full name.
fn requests() -> &'static HashMap<String, Shape> {
    static REQUESTS: OnceLock<HashMap<String, Shape>> = OnceLock::new();
    REQUESTS.get_or_init(|| {
        let methods = descriptors().into_iter().flat_map(|pool| {
            pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect::<Vec<_>>()
        });
        methods.map(|method| method.input()).map(|of| (of.full_name().to_owned(), Shape::of(&of, 0))).collect()
    })
}

/// The checked fields of a message. The contract's requests are not recursive, so that each list in a request has one
/// counter, even if a singular message field occurs several times, which protobuf merges.
struct Shape {
    /// By number. There are few.
    fields: Vec<(u32, Field)>,
    /// The indices of the counters of all lists in it.
    slots: Range<usize>,
}

struct Field {
    name: String,
    list: Option<List>,
    message: Option<Shape>,
}

struct List {
    slot: usize,
    max: usize,
    packed: Option<Packed>,
}

/// The encoding of entries of a list in one field.
enum Packed {
    Varints,
    Fixed(usize),
}

impl Shape {
    fn of(message: &MessageDescriptor, first_slot: usize) -> Self {
        let mut slots = first_slot..first_slot;
        let fields = message.fields().filter_map(|field| {
            let list = (field.is_list() || field.is_map()).then(|| {
                slots.end += 1;
                List { slot: slots.end - 1, max: max_entries(field.full_name()), packed: Packed::of(&field) }
            });
            let kind = field.kind();
            // A field that is carried as bytes is not a message here: `model::Payload` checks it.
            let inner = kind.as_message().filter(|inner| inner.full_name() != "google.protobuf.Struct");
            let message = inner.map(|inner| Self::of(inner, slots.end));
            slots.end = message.as_ref().map_or(slots.end, |message| message.slots.end);
            let is_looked_at = list.is_some() || message.is_some();
            is_looked_at.then(|| (field.number(), Field { name: field.name().to_owned(), list, message }))
        });
        let fields = fields.collect();
        Self { fields, slots }
    }
}

impl Packed {
    fn of(field: &FieldDescriptor) -> Option<Self> {
        match field.kind() {
            Kind::Message(_) | Kind::String | Kind::Bytes => None,
            Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => Some(Self::Fixed(8)),
            Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => Some(Self::Fixed(4)),
            _ => Some(Self::Varints),
        }
    }

    /// Number of entries; for a longer list, any number above `max`.
    fn count(&self, bytes: &[u8], max: usize) -> usize {
        const LONGEST: usize = 10;
        match self {
            Self::Fixed(width) => bytes.len().div_ceil(*width),
            Self::Varints if bytes.len() > max * LONGEST => max + 1,
            Self::Varints => bytes.iter().filter(|byte| **byte < 0x80).count(),
        }
    }
}

struct Scan {
    counts: Vec<usize>,
    fields: usize,
}

enum Excess {
    Unreadable(Unreadable),
    Malformed(Malformed),
}

impl From<Malformed> for Excess {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl Scan {
    fn message(&mut self, bytes: &[u8], shape: &Shape) -> Result<(), Excess> {
        let mut fields = Fields(bytes);
        while let Some(model::Field { number, wire }) = fields.next()? {
            self.count(1)?;
            let field = shape.fields.iter().find(|(of, _)| u64::from(*of) == number);
            let Some((_, field)) = field else { continue };
            let content = if let Wire::Bytes(content) = wire { Some(content) } else { None };
            if let Some(list) = &field.list {
                let packed = content.zip(list.packed.as_ref());
                let entries = packed.map_or(1, |(content, packed)| packed.count(content, list.max));
                let count = &mut self.counts[list.slot];
                *count += entries;
                if *count > list.max {
                    let (field, max) = (field.name.clone(), list.max);
                    return Err(Excess::Unreadable(Unreadable::TooManyEntries { field, max }));
                }
                self.count(entries - entries.min(1))?;
            }
            let Some((message, content)) = field.message.as_ref().zip(content) else { continue };
            if field.list.is_some() {
                self.counts[message.slots.clone()].fill(0);
            }
            self.message(content, message).map_err(|excess| match excess {
                Excess::Unreadable(unreadable) => {
                    let index = field.list.as_ref().map(|list| format!("[{}]", self.counts[list.slot] - 1));
                    Excess::Unreadable(unreadable.inside(&format!("{}{}", field.name, index.unwrap_or_default())))
                }
                malformed @ Excess::Malformed(_) => malformed,
            })?;
        }
        Ok(())
    }

    fn count(&mut self, more: usize) -> Result<(), Excess> {
        self.fields += more;
        if self.fields > MAX_FIELDS { Err(Excess::Unreadable(Unreadable::TooManyFields)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::{Message, Name};

    use super::*;
    use crate::proto::{orchestrator::v1 as pb, subsystem::v1 as pbs};

    fn check_of<M: Message + Name>(message: &M) -> Result<(), Unreadable> {
        check(&M::full_name(), &message.encode_to_vec())
    }

    fn too_many(field: &str, max: usize) -> Unreadable {
        Unreadable::TooManyEntries { field: field.into(), max }
    }

    fn add_lists(message: &MessageDescriptor, found: &mut BTreeSet<String>) {
        for field in message.fields() {
            if field.is_list() || field.is_map() {
                found.insert(field.full_name().to_owned());
            }
            if let Some(inner) = field.kind().as_message().filter(|inner| inner.full_name() != "google.protobuf.Struct")
            {
                add_lists(inner, found);
            }
        }
    }

    #[test]
    fn exactly_the_lists_and_maps_of_requests_have_bounds() {
        let mut lists = BTreeSet::new();
        for service in descriptors().unwrap().services() {
            service.methods().for_each(|method| add_lists(&method.input(), &mut lists));
        }
        assert_eq!(lists, MAX_ENTRIES.iter().map(|(name, _)| (*name).to_owned()).collect());
    }

    #[test]
    fn the_contract_states_the_bound_of_every_list_and_map() {
        for message in descriptors().unwrap().all_messages().filter(|it| it.full_name().starts_with("dreamnet.")) {
            for field in message.fields().filter(|field| field.is_list() || field.is_map()) {
                let name = field.full_name();
                let file = field.parent_file();
                let locations = &file.file_descriptor_proto().source_code_info.as_ref().unwrap().location;
                let location = locations.iter().find(|location| location.path == field.path());
                let comment = location.unwrap_or_else(|| panic!("{name} has no comment")).leading_comments();
                let stated = ["t most ", "up to ", "One entry per ", "one entry for each ", "ne for each "];
                assert!(
                    stated.iter().any(|words| comment.contains(words)),
                    "the comment of {name} states no bound: {comment}"
                );
                if let Some((_, max)) = MAX_ENTRIES.iter().find(|(bounded, _)| *bounded == name) {
                    let text = max.to_string();
                    let (thousands, rest) = text.split_at(text.len().saturating_sub(3));
                    let separator = if thousands.is_empty() { "" } else { "," };
                    let number = format!("{thousands}{separator}{rest}");
                    assert!(
                        comment.contains(&number),
                        "the comment of {name} states another bound than {number}: {comment}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_list_may_be_as_long_as_its_bound_and_no_longer() {
        let of = |names| pb::RunCycleRequest { subsystems: vec![String::new(); names], ..Default::default() };
        assert_eq!(check_of(&of(CycleRequest::MAX_SUBSET)), Ok(()));
        assert_eq!(check_of(&of(CycleRequest::MAX_SUBSET + 1)), Err(too_many("subsystems", CycleRequest::MAX_SUBSET)));
        let packed = |states| pb::ListCyclesRequest { states: vec![1; states], ..Default::default() };
        assert_eq!(check_of(&packed(16)), Ok(()));
        assert_eq!(check_of(&packed(17)), Err(too_many("states", 16)));
        assert_eq!(check_of(&packed(1000)), Err(too_many("states", 16)));
        let inputs = |inputs| {
            let inputs = (0..inputs).map(|i| (format!("i{i}"), pbs::Input::default())).collect();
            pbs::RunCycleRequest { inputs, ..Default::default() }
        };
        assert_eq!(check_of(&inputs(1024)), Ok(()));
        assert_eq!(check_of(&inputs(1025)), Err(too_many("inputs", 1024)));
    }

    #[test]
    fn a_message_in_several_parts_is_counted_as_a_whole() {
        let part = pb::Registration { requires: vec![String::new(); 600], ..Default::default() };
        let part = pb::RegisterSubsystemRequest { registration: Some(part), lease: None }.encode_to_vec();
        let name = pb::RegisterSubsystemRequest::full_name();
        assert_eq!(check(&name, &part), Ok(()));
        assert_eq!(check(&name, &[&part[..], &part].concat()), Err(too_many("registration.requires", 1024)));
    }

    #[test]
    fn unknown_fields_count_as_well() {
        let name = pb::GetCycleRequest::full_name();
        let unknown = [15 << 3, 0];
        assert_eq!(check(&name, &unknown.repeat(MAX_FIELDS)), Ok(()));
        assert_eq!(check(&name, &unknown.repeat(MAX_FIELDS + 1)), Err(Unreadable::TooManyFields));
    }

    #[test]
    fn bytes_that_are_not_a_message_are_named_as_such() {
        let name = pb::GetCycleRequest::full_name();
        for bytes in [&[0xff][..], &[1 << 3 | 2, 5, 0], &[1 << 3 | 1, 0], &[1 << 3 | 3, 1 << 3 | 4], &[0, 0]] {
            let refused = check(&name, bytes).unwrap_err();
            assert!(matches!(&refused, Unreadable::Malformed { message, .. } if *message == name), "{refused}");
        }
    }
}
