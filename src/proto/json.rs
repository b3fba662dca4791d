//! Messages of the contract as canonical proto JSON, and back.
//!
//! <https://protobuf.dev/programming-guides/json/>

use std::collections::HashMap;

use prost::Message;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, SerializeOptions};
use serde_json::Value;

use super::{bounds, descriptors};
use crate::model::{Field, Fields, Wire};

/// Why a message, or its JSON, is invalid.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The message type does not exist.
    #[error("{0} is no message of dreamnet.orchestrator.v1")]
    NoMessage(String),
    /// The bytes are not a message of this type.
    #[error("no {0}: {1}")]
    Bytes(&'static str, String),
    /// It contains more messages than the limit.
    #[error("it holds more than {MAX_MESSAGES} values, which is too much for JSON; ask by gRPC")]
    TooLarge,
    /// It can't be encoded.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A value is invalid for its field.
    #[error("{field} is {value:?}; give {allowed}")]
    Value {
        /// The field.
        field: String,
        /// The given value.
        value: String,
        /// The valid values.
        allowed: String,
    },
    /// The field takes one value, and several were given.
    #[error("{0} is given more than once; give it once")]
    Twice(String),
    /// The field takes a list, and too many entries were given.
    #[error("{0} is given more than {1} times, which is the most that are allowed")]
    TooMany(String, usize),
    /// The field does not exist.
    #[error("there is no {field}; {allowed}")]
    NoField {
        /// The given value.
        field: String,
        /// The valid values.
        allowed: String,
    },
}

impl JsonError {
    fn bytes(kind: &'static str, error: impl ToString) -> Self {
        Self::Bytes(kind, error.to_string())
    }
}

/// Most messages in one that is converted to JSON, including itself and the values of each `Struct`. Each takes almost
/// 1 KiB meanwhile, together at most 128 MiB.
pub const MAX_MESSAGES: usize = 140_000;

/// An encoded message as canonical proto JSON, on one line. `kind` is its name in `dreamnet.orchestrator.v1`.
///
/// # Errors
/// The bytes are not such a message, or it contains more than [`MAX_MESSAGES`].
pub fn encode(kind: &'static str, bytes: &[u8]) -> Result<String, JsonError> {
    let descriptor = descriptor(kind)?;
    count(kind, &descriptor, bytes, &mut 0)?;
    let message = DynamicMessage::decode(descriptor, bytes).map_err(|error| JsonError::bytes(kind, error))?;
    let mut text = Vec::new();
    message.serialize_with_options(&mut serde_json::Serializer::new(&mut text), &SerializeOptions::new())?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Counts the messages in this one, including itself. Works on the encoded form, before anything is built.
fn count(kind: &'static str, of: &MessageDescriptor, bytes: &[u8], messages: &mut usize) -> Result<(), JsonError> {
    *messages += 1;
    if *messages > MAX_MESSAGES {
        return Err(JsonError::TooLarge);
    }
    let mut fields = Fields(bytes);
    while let Some(Field { number, wire }) = fields.next().map_err(|error| JsonError::bytes(kind, error))? {
        let field = u32::try_from(number).ok().and_then(|number| of.get_field(number));
        if let (Wire::Bytes(message), Some(Kind::Message(inner))) = (wire, field.map(|field| field.kind())) {
            count(kind, &inner, message, messages)?;
        }
    }
    Ok(())
}

/// The message from the parameters of a URL: names are those of fields, as in JSON or as in the contract; a list takes
/// several parameters. A field that is a message is given in its JSON form as a string, such as a time.
///
/// # Errors
/// A field is unknown, a value is invalid, a field that is not a list is given more than once, or a list is too long.
pub fn from_parameters<M: Message + Default>(
    kind: &'static str,
    parameters: impl IntoIterator<Item = (String, String)>,
) -> Result<M, JsonError> {
    let descriptor = descriptor(kind)?;
    let mut bytes = Vec::new();
    let mut given: HashMap<u32, usize> = HashMap::new();
    for (name, text) in parameters {
        let field = descriptor.get_field_by_json_name(&name).or_else(|| descriptor.get_field_by_name(&name));
        let Some(field) = field else {
            let names: Vec<_> = descriptor.fields().map(|field| field.json_name().to_owned()).collect();
            let allowed = if names.is_empty() { "there are none".into() } else { format!("give {}", names.join(", ")) };
            return Err(JsonError::NoField { field: name, allowed });
        };
        let count = given.entry(field.number()).or_default();
        *count += 1;
        if *count > 1 && !field.is_list() {
            return Err(JsonError::Twice(name));
        }
        if field.is_list() && *count > bounds::max_entries(field.full_name()) {
            return Err(JsonError::TooMany(name, bounds::max_entries(field.full_name())));
        }
        // JSON accepts numbers as strings, but not booleans.
        let value = match (field.kind(), text.as_str()) {
            (Kind::Bool, "true" | "") => Value::Bool(true),
            (Kind::Bool, "false") => Value::Bool(false),
            _ => Value::String(text.clone()),
        };
        let value = if field.is_list() { Value::Array(vec![value]) } else { value };
        let object = Value::Object([(field.json_name().to_owned(), value)].into_iter().collect());
        let message = DynamicMessage::deserialize(descriptor.clone(), object).map_err(|error| JsonError::Value {
            field: name,
            value: text,
            allowed: allowed(&field.kind(), &error),
        })?;
        // Concatenated encoded messages are one merged message.
        bytes.extend(message.encode_to_vec());
    }
    M::decode(bytes.as_slice()).map_err(|error| JsonError::bytes(kind, error))
}

/// The valid values of a parameter of this type, for `error`.
fn allowed(kind: &Kind, error: &serde_json::Error) -> String {
    match kind {
        Kind::Bool => "true or false".to_owned(),
        Kind::Uint32 | Kind::Uint64 => "a whole number from 0 on".to_owned(),
        // The contract's 0 stands for none of the others, and is never sent.
        Kind::Enum(of) => {
            let values = of.values().filter(|value| value.number() != 0);
            values.map(|value| value.name().to_owned()).collect::<Vec<_>>().join(", ")
        }
        Kind::Message(of) if of.full_name() == "google.protobuf.Timestamp" => {
            "a time, such as 2026-01-31T00:00:00Z".to_owned()
        }
        _ => format!("what the contract says ({error})"),
    }
}

fn descriptor(kind: &str) -> Result<MessageDescriptor, JsonError> {
    let descriptor =
        descriptors().and_then(|pool| pool.get_message_by_name(&format!("dreamnet.orchestrator.v1.{kind}")));
    descriptor.ok_or_else(|| JsonError::NoMessage(kind.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::orchestrator::v1 as pb;

    fn list(parameters: &[(&str, &str)]) -> Result<pb::ListCyclesRequest, JsonError> {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        from_parameters("ListCyclesRequest", parameters)
    }

    #[test]
    fn parameters_are_fields() {
        let request = list(&[
            ("pageSize", "5"),
            ("states", "CYCLE_STATE_FAILED"),
            ("states", "CYCLE_STATE_DEGRADED"),
            ("finished_from", "2026-01-01T00:00:00Z"),
        ]);
        let request = request.unwrap();
        assert_eq!(request.page_size, 5);
        assert_eq!(request.states, [pb::CycleState::Failed as i32, pb::CycleState::Degraded as i32]);
        assert_eq!(request.finished_from.unwrap().seconds, 1_767_225_600);
        assert!(list(&[("size", "5")]).unwrap_err().to_string().contains("give pageSize, "));
        for (parameter, message) in [
            (("pageSize", "many"), "pageSize is \"many\"; give a whole number from 0 on"),
            (("finishedFrom", "today"), "finishedFrom is \"today\"; give a time, such as 2026-01-31T00:00:00Z"),
        ] {
            assert_eq!(list(&[parameter]).unwrap_err().to_string(), message);
        }
        let state = list(&[("states", "FAILED")]).unwrap_err().to_string();
        assert!(state.starts_with("states is \"FAILED\"; give CYCLE_STATE_SUCCEEDED, "), "{state}");
        let twice = list(&[("pageSize", "5"), ("page_size", "5")]).unwrap_err();
        assert_eq!(twice.to_string(), "page_size is given more than once; give it once");
    }

    #[test]
    fn too_many_values_are_refused_before_they_are_built() {
        // A list of nulls in the output of a subsystem, each of 4 bytes.
        let with_nulls = |nulls: usize| {
            let list = serde_json::json!({ "list": vec![serde_json::Value::Null; nulls] });
            let output = crate::model::Payload::from_json(list.as_object().unwrap()).unwrap().as_bytes().clone();
            let part = pb::SubsystemTelemetry { output, ..Default::default() };
            let record = pb::CycleTelemetry { subsystems: vec![part], ..Default::default() };
            encode("CycleTelemetry", &record.encode_to_vec())
        };
        assert!(with_nulls(1000).unwrap().contains("null"));
        assert!(matches!(with_nulls(MAX_MESSAGES), Err(JsonError::TooLarge)));
    }

    #[test]
    fn a_boolean_is_text_in_a_url() {
        let parameters = [("progress".to_owned(), "true".to_owned())];
        assert!(from_parameters::<pb::WatchCyclesRequest>("WatchCyclesRequest", parameters).unwrap().progress);
    }
}
