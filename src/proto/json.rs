//! Messages of the contract as canonical proto JSON, and back.
//!
//! <https://protobuf.dev/programming-guides/json/>

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt,
};

use prost::{Message, Name};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, SerializeOptions, Value as Content};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;

use super::{
    bounds::{self, Unreadable},
    descriptors,
};
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
    /// The text is not the JSON of this message type.
    #[error("the body is no {0} in JSON: {1}; /api/openapi.json describes it")]
    Body(&'static str, String),
    /// The text contains more values than the limit.
    #[error("the body has more than {MAX_VALUES} values, which is the most that are allowed")]
    TooManyValues,
    /// The request exceeds a limit of the contract.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
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
    /// The body has one value of the field, and the URL another one.
    #[error("{field} is {in_url:?} in the URL, and has another value in the body; leave it out of the body")]
    Differs {
        /// The field.
        field: String,
        /// Its value in the URL.
        in_url: String,
    },
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

/// Most values in the JSON of a request, at all depths together: as many as a request has fields. Each takes almost
/// 1 KiB while the text becomes a message, as in the other direction.
pub const MAX_VALUES: usize = bounds::MAX_FIELDS;

/// The request from its JSON, and from the parameters of a URL. An empty text stands for `{}`. A field may be in both
/// if the values are the same.
///
/// The names of parameters are those of fields, as in JSON or as in the contract; a list takes several parameters. A
/// field that is a message is given in its JSON form as a string, such as a time. A field of a field is given by its
/// path, such as `registration.name`.
///
/// # Errors
/// The text is not the JSON of this message, or has more than [`MAX_VALUES`]. A field is unknown, a value is invalid, a
/// field that is not a list is given more than once, or a list is too long.
pub fn from_request<M: Message + Name + Default>(
    text: &[u8],
    parameters: Vec<(String, String)>,
) -> Result<M, JsonError> {
    let descriptor = descriptor(M::NAME)?;
    let body = read::<M>(&descriptor, text)?;
    let mut bytes = body.encode_to_vec();
    let mut given: HashMap<Vec<u32>, usize> = HashMap::new();
    for (name, text) in parameters {
        let path = path(&descriptor, &name)?;
        let others = given.entry(path.iter().map(FieldDescriptor::number).collect()).or_default();
        // Concatenated encoded messages are one merged message.
        bytes.extend(parameter(&path, &body, name, text, *others)?.encode_to_vec());
        *others += 1;
    }
    bounds::check(&M::full_name(), &bytes)?;
    M::decode(bytes.as_slice()).map_err(|error| JsonError::bytes(M::NAME, error))
}

/// The message in the JSON of a request.
fn read<M: Name>(descriptor: &MessageDescriptor, text: &[u8]) -> Result<DynamicMessage, JsonError> {
    if text.is_empty() {
        return Ok(DynamicMessage::new(descriptor.clone()));
    }
    if values(text) > MAX_VALUES {
        return Err(JsonError::TooManyValues);
    }
    check_keys(text).map_err(|error| JsonError::Body(M::NAME, error.to_string()))?;
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut deserializer, &mut track);
    let read = DynamicMessage::deserialize(descriptor.clone(), tracked);
    let field = track.path().to_string();
    let of_field = |error: serde_json::Error| match field.as_str() {
        "." | "?" => error.to_string(),
        field => format!("{field}: {error}"),
    };
    let message = read.map_err(|error| JsonError::Body(M::NAME, of_field(error)))?;
    deserializer.end().map_err(|error| JsonError::Body(M::NAME, error.to_string()))?;
    Ok(message)
}

/// At least the number of values in a JSON text, before anything is built: each of them is the first of the text or of
/// a list or an object, or follows a comma.
fn values(text: &[u8]) -> usize {
    let (mut values, mut in_string, mut is_escaped) = (1, false, false);
    for byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}

/// Checks that no object in a JSON text has a key twice: readers would take one of the values, and not say which.
///
/// # Errors
/// One has, and the error names the key and its place; or the text is not JSON.
pub fn check_keys(text: &[u8]) -> Result<(), serde_json::Error> {
    /// A value of which only the keys are looked at.
    struct Keys;

    impl<'de> Deserialize<'de> for Keys {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(Self)
        }
    }

    impl<'de> Visitor<'de> for Keys {
        type Value = Self;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("JSON")
        }

        fn visit_unit<E>(self) -> Result<Self, E> {
            Ok(self)
        }

        fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
            Ok(self)
        }

        fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
            Ok(self)
        }

        fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
            Ok(self)
        }

        fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
            Ok(self)
        }

        fn visit_str<E>(self, _: &str) -> Result<Self, E> {
            Ok(self)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
            while list.next_element::<Self>()?.is_some() {}
            Ok(self)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self, A::Error> {
            let mut keys = HashSet::new();
            while let Some(key) = object.next_key::<Cow<'de, str>>()? {
                if keys.contains(&key) {
                    return Err(A::Error::custom(format!("the key {key:?} is given more than once; give it once")));
                }
                keys.insert(key);
                object.next_value::<Self>()?;
            }
            Ok(self)
        }
    }

    serde_json::from_slice::<Keys>(text).map(drop)
}

/// The fields from the message to the one with this name.
fn path(of: &MessageDescriptor, name: &str) -> Result<Vec<FieldDescriptor>, JsonError> {
    let (first, rest) = name.split_once('.').map_or((name, None), |(first, rest)| (first, Some(rest)));
    let field = of.get_field_by_json_name(first).or_else(|| of.get_field_by_name(first));
    let inner = field.as_ref().map(FieldDescriptor::kind);
    match (field, rest, inner.as_ref().and_then(Kind::as_message)) {
        (Some(field), None, _) => Ok(vec![field]),
        (Some(field), Some(rest), Some(inner)) if !field.is_list() => {
            Ok(std::iter::once(field).chain(path(inner, rest)?).collect())
        }
        _ => {
            let names: Vec<_> = of.fields().map(|field| field.json_name().to_owned()).collect();
            let allowed = if names.is_empty() {
                "the message has no fields".into()
            } else {
                format!("give {}", names.join(", "))
            };
            Err(JsonError::NoField { field: name.to_owned(), allowed })
        }
    }
}

/// A message that has only this field, with the value of a parameter. The field has this number of `others` before.
fn parameter(
    path: &[FieldDescriptor],
    body: &DynamicMessage,
    name: String,
    text: String,
    others: usize,
) -> Result<DynamicMessage, JsonError> {
    let [first, rest @ ..] = path else { return Err(JsonError::NoMessage(name)) };
    let field = rest.last().unwrap_or(first);
    if others > 0 && !field.is_list() {
        return Err(JsonError::Twice(name));
    }
    if in_body(body, path).is_some_and(|value| !is_text(&value, &text)) {
        return Err(JsonError::Differs { field: name, in_url: text });
    }
    if field.is_list() && others >= bounds::max_entries(field.full_name()) {
        return Err(JsonError::TooMany(name, bounds::max_entries(field.full_name())));
    }
    // JSON accepts numbers as strings, but not booleans.
    let value = match (field.kind(), text.as_str()) {
        (Kind::Bool, "true" | "") => Value::Bool(true),
        (Kind::Bool, "false") => Value::Bool(false),
        _ => Value::String(text.clone()),
    };
    let value = if field.is_list() { Value::Array(vec![value]) } else { value };
    let object = path
        .iter()
        .rev()
        .fold(value, |value, field| Value::Object([(field.json_name().to_owned(), value)].into_iter().collect()));
    DynamicMessage::deserialize(first.parent_message().clone(), object).map_err(|error| JsonError::Value {
        field: name,
        value: text,
        allowed: allowed(&field.kind(), &error),
    })
}

/// The value of the field at this path, if the body has it.
fn in_body(body: &DynamicMessage, path: &[FieldDescriptor]) -> Option<Content> {
    let (first, rest) = path.split_first()?;
    let value = body.has_field(first).then(|| body.get_field(first))?;
    if rest.is_empty() { Some(value.into_owned()) } else { in_body(value.as_message()?, rest) }
}

/// True if this is the value of a parameter with this text. There are such fields in the paths of URLs.
fn is_text(value: &Content, text: &str) -> bool {
    match value {
        Content::String(value) => value == text,
        Content::U64(value) => value.to_string() == text,
        _ => false,
    }
}

/// The valid values of a parameter of this type, for `error`.
fn allowed(kind: &Kind, error: &serde_json::Error) -> String {
    match kind {
        Kind::Bool => "true or false".to_owned(),
        Kind::Uint32 => format!("a whole number from 0 to {}", u32::MAX),
        Kind::Uint64 => format!("a whole number from 0 to {}", u64::MAX),
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
        request("", parameters)
    }

    fn request<M: Message + Name + Default>(text: &str, parameters: &[(&str, &str)]) -> Result<M, JsonError> {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        from_request(text.as_bytes(), parameters)
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
            (("pageSize", "many"), "pageSize is \"many\"; give a whole number from 0 to 4294967295"),
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
        assert!(request::<pb::WatchCyclesRequest>("", &[("progress", "true")]).unwrap().progress);
    }

    #[test]
    fn a_body_and_parameters_are_one_request() {
        let run = |text: &str, parameters: &[(&str, &str)]| request::<pb::RunCycleRequest>(text, parameters);
        assert_eq!(run("", &[]).unwrap(), run(" {} ", &[]).unwrap());
        let given =
            run(r#"{"subsystems": ["a"], "overlapPolicy": "OVERLAP_POLICY_SKIP"}"#, &[("async", "true")]).unwrap();
        assert_eq!((given.subsystems, given.r#async, given.overlap_policy), (vec!["a".to_owned()], true, 1));
        let update = |text: &str| request::<pb::UpdateSubsystemRequest>(text, &[("registration.name", "a")]);
        for text in [r#"{"registration": {"phase": 2}}"#, r#"{"registration": {"phase": 2, "name": "a"}}"#] {
            let registration = update(text).unwrap().registration.unwrap();
            assert_eq!((registration.name.as_str(), registration.phase), ("a", 2));
        }
        let twice = update(r#"{"registration": {"name": "b"}}"#).unwrap_err().to_string();
        assert_eq!(
            twice,
            "registration.name is \"a\" in the URL, and has another value in the body; leave it out of the body"
        );
        let twice = run(r#"{"requestId": "x"}"#, &[("request_id", "y")]).unwrap_err().to_string();
        assert_eq!(
            twice,
            "request_id is \"y\" in the URL, and has another value in the body; leave it out of the body"
        );
        for (text, words) in [
            ("{", "no RunCycleRequest in JSON: EOF"),
            ("{} {}", "trailing characters"),
            ("[]", "expected a map"),
            ("null", "expected a map"),
            (r#"{"subsytems": []}"#, "unrecognized field name 'subsytems'"),
            (r#"{"async": "yes"}"#, "expected a boolean"),
            (r#"{"async": true, "async": false}"#, "the key \"async\" is given more than once"),
            (
                r#"{"parameters": {"a": [{"b": 1, "b": 1}]}}"#,
                "the key \"b\" is given more than once; give it once at line 1",
            ),
        ] {
            let refused = run(text, &[]).unwrap_err().to_string();
            assert!(refused.contains(words), "{text}: {refused}");
        }
    }

    #[test]
    fn a_body_with_too_many_values_is_refused_before_it_is_built() {
        let with_nulls = |nulls: usize| {
            let nulls = vec!["null"; nulls].join(",");
            let text = format!(r#"{{"parameters": {{"text": "\\\",[{{", "list": [{nulls}]}}}}"#);
            request::<pb::RunCycleRequest>(&text, &[])
        };
        assert!(with_nulls(MAX_VALUES - 4).is_ok());
        assert!(matches!(with_nulls(MAX_VALUES - 3), Err(JsonError::TooManyValues)));
    }
}
