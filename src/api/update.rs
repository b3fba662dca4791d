//! Changes of registrations: the fields that a `google.protobuf.FieldMask` selects, and their new values.

use prost_types::FieldMask;

use super::{request, response};
use crate::{
    model::{Payload, Subsystem, Violations, text::shortened},
    proto::orchestrator::v1 as pb,
};

/// Defines `PATHS`, the paths of all fields, `copy`, which copies the field of a path, and `copy_set`, which copies
/// the fields that are set.
macro_rules! fields {
    ($($field:ident $({ $($inner:ident),+ })?,)+) => {
        /// The paths of the fields that can be changed.
        const PATHS: &[&str] = &[
            $(stringify!($field), $($(concat!(stringify!($field), ".", stringify!($inner)),)+)?)+
        ];

        fn copy(path: &str, from: &pb::Registration, to: &mut pb::Registration) {
            match path {
                $(
                    stringify!($field) => to.$field.clone_from(&from.$field),
                    $($(
                        concat!(stringify!($field), ".", stringify!($inner)) => {
                            to.$field.get_or_insert_default().$inner = from.$field.clone().unwrap_or_default().$inner;
                        }
                    )+)?
                )+
                _ => {}
            }
        }

        fn copy_set(from: &pb::Registration, to: &mut pb::Registration) {
            let unset = pb::Registration::default();
            $(
                if from.$field != unset.$field {
                    to.$field.clone_from(&from.$field);
                }
            )+
        }
    };
}

fields! {
    endpoint,
    phase,
    requires,
    after,
    reads,
    timeout,
    retry { max_attempts, initial_backoff, max_backoff, backoff_multiplier, retryable_status_codes },
    breaker { failure_threshold, open_for, disabled },
    critical,
    parameters,
    limits { max_message_bytes, max_output_bytes, max_metrics, max_issues },
    record_output,
    tls { peer },
}

/// Begins the path of one top-level key of the parameters.
const PARAMETER: &str = "parameters.";

/// New values of some fields of a registration.
pub(super) struct Update {
    values: pb::Registration,
    /// The parameters in `values`.
    parameters: Payload,
    fields: Selected,
}

/// The fields that are changed.
enum Selected {
    All,
    /// Those that are set.
    Set,
    /// Those of these known paths.
    Paths(Vec<String>),
}

impl Update {
    /// # Errors
    /// A path is not known, or the parameters are malformed. Other values are checked with the whole registration.
    pub(super) fn new(values: pb::Registration, mask: Option<FieldMask>) -> Result<Self, Violations> {
        let mut bad = Violations::default();
        let parameters = request::parameters(&mut bad, &values.parameters);
        let mut bad = bad.inside("registration");
        let paths = mask.unwrap_or_default().paths;
        let fields = match &paths[..] {
            [] => Selected::Set,
            [all] if all == "*" => Selected::All,
            paths => {
                let is_known = |path: &str| PATHS.contains(&path) || path.starts_with(PARAMETER);
                let unknown: Vec<_> = paths.iter().filter(|path| !is_known(path)).collect();
                if !unknown.is_empty() {
                    bad.add("update_mask", not_fields(&unknown));
                }
                Selected::Paths(paths.to_vec())
            }
        };
        bad.into_result(Self { values, parameters, fields })
    }

    /// The registration with the new values.
    pub(super) fn apply(&self, subsystem: &Subsystem) -> pb::Registration {
        let mut changed = response::registration(subsystem);
        match &self.fields {
            Selected::All => return self.values.clone(),
            Selected::Set => copy_set(&self.values, &mut changed),
            Selected::Paths(paths) => {
                let keys = paths.iter().filter_map(|path| path.strip_prefix(PARAMETER));
                changed.parameters = subsystem.parameters.with_keys_of(&self.parameters, keys).as_bytes().clone();
                for path in paths {
                    copy(path, &self.values, &mut changed);
                }
            }
        }
        changed
    }
}

/// The problem of paths that can't be changed.
fn not_fields(unknown: &[&String]) -> String {
    /// Most bytes of a path that is not known.
    const MAX: usize = 32;
    let shown = shortened(unknown[0], MAX);
    let more = if unknown.len() > 1 { format!(" and {} more", unknown.len() - 1) } else { String::new() };
    let (are, fields) = if unknown.len() > 1 { ("are", "fields") } else { ("is", "a field") };
    let known = PATHS.iter().filter(|path| !path.contains('.')).map(|field| {
        let inner = PATHS.iter().filter_map(|path| path.strip_prefix(field)?.strip_prefix('.')).collect::<Vec<_>>();
        if inner.is_empty() { (*field).to_owned() } else { format!("{field}[.{}]", inner.join(", .")) }
    });
    format!(
        "contains {shown:?}{more}, which {are} not {fields} to change; give some of {}, {PARAMETER}KEY, or * alone",
        known.collect::<Vec<_>>().join(", ")
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use prost_types::{FileDescriptorSet, field_descriptor_proto::Type};

    use super::*;
    use crate::proto;

    #[test]
    fn every_field_of_a_registration_but_the_name_can_be_changed() {
        let files = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file;
        let messages: Vec<_> = files.iter().flat_map(|file| &file.message_type).collect();
        let fields_of = |name: &str| &messages.iter().find(|it| it.name() == name).unwrap().field;
        let mut paths = BTreeSet::new();
        for field in fields_of("Registration").iter().filter(|field| field.name() != "name") {
            paths.insert(field.name().to_owned());
            let own = field.type_name().strip_prefix(".dreamnet.orchestrator.v1.");
            if let (Type::Message, Some(of)) = (field.r#type(), own) {
                paths.extend(fields_of(of).iter().map(|inner| format!("{}.{}", field.name(), inner.name())));
            }
        }
        assert_eq!(PATHS.iter().map(ToString::to_string).collect::<BTreeSet<_>>(), paths);
    }

    #[test]
    fn an_unknown_path_is_named_with_the_known_ones_within_the_limit_of_a_problem() {
        const MAX_PROBLEM: usize = 512;
        let problem = not_fields(&[&"\u{ffff}".repeat(1000), &"name".to_owned()]);
        assert!(problem.len() <= MAX_PROBLEM && problem.ends_with("or * alone"), "{}: {problem}", problem.len());
    }
}
