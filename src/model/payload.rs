//! The payload type: a `google.protobuf.Struct`, carried as received bytes.
//!
//! The messages are those of `google/protobuf/struct.proto`. Decoding them here, not with a general decoder, lets the
//! hot path check an output without building a tree.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Number, Value};

use super::wire::{Field, Fields, Malformed, Wire, malformed};

/// A `google.protobuf.Struct` as its encoded bytes, known to be well-formed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload(Bytes);

impl Payload {
    /// Deepest nesting of messages in a payload. Decoders in C++, Java and Python stop at 100, and a payload is itself
    /// nested in a request. An object inside an object is three messages deeper.
    pub const MAX_DEPTH: usize = 90;

    /// Checks that received bytes are a well-formed `Struct`.
    ///
    /// # Errors
    /// The bytes are not the encoding of a `Struct`, it nests deeper than [`Payload::MAX_DEPTH`], or it contains a
    /// value that JSON can't represent: a number that is not finite, or a value without a kind.
    pub fn check(bytes: Bytes) -> Result<Self, Malformed> {
        check(&bytes, Message::Struct, 1)?;
        Ok(Self(bytes))
    }

    /// Largest absolute value of a whole number that JSON and a `Struct` both represent exactly. Numbers of a `Struct`
    /// are doubles: above 2^53 some are missing, and an identifier would change. I-JSON has the same limit, less one:
    /// <https://www.rfc-editor.org/rfc/rfc7493#section-2.2>.
    pub const MAX_WHOLE: u64 = 1 << 53;

    /// Converts a JSON object to a payload.
    ///
    /// # Errors
    /// The object nests deeper than [`Payload::MAX_DEPTH`], or contains a whole number beyond [`Payload::MAX_WHOLE`].
    pub fn from_json(object: &Map<String, Value>) -> Result<Self, Malformed> {
        if let Some(number) = object.values().find_map(beyond_whole) {
            return Err(Self::changes(number));
        }
        let mut bytes = BytesMut::new();
        put_struct(&mut bytes, object);
        Self::check(bytes.freeze())
    }

    /// The problem of a whole number that would change.
    pub(crate) fn changes(number: impl std::fmt::Display) -> Malformed {
        Malformed(format!(
            "contains the whole number {number}, which would change: numbers are doubles, exact up to {} (2^53); write \
             it in quotes",
            Self::MAX_WHOLE
        ))
    }

    /// Converts the payload to a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Map<String, Value> {
        read_struct(&self.0)
    }

    /// The canonical encoding, which is the same for equal payloads: each key once, in order, without unknown fields.
    /// On the wire the entries of a map have any order, which changes each time in some languages.
    #[must_use]
    pub fn canonical(&self) -> Self {
        let mut bytes = BytesMut::new();
        put_struct(&mut bytes, &read_struct(&self.0));
        Self(bytes.freeze())
    }

    /// This payload, with its top-level keys overridden by those of `over`.
    ///
    /// In protobuf, the last of two map entries with the same key counts, and concatenated messages merge; so this is a
    /// concatenation.
    #[must_use]
    pub fn overlaid(&self, over: &Self) -> Self {
        match (self.is_empty(), over.is_empty()) {
            (_, true) => self.clone(),
            (true, _) => over.clone(),
            _ => Self([&self.0[..], &over.0[..]].concat().into()),
        }
    }

    /// This payload with these top-level keys as in `other`: those that `other` does not have are removed. Canonical.
    #[must_use]
    pub fn with_keys_of<'a>(&self, other: &Self, keys: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut object, other) = (read_struct(&self.0), read_struct(&other.0));
        for key in keys {
            match other.get(key) {
                Some(value) => object.insert(key.to_owned(), value.clone()),
                None => object.remove(key),
            };
        }
        let mut bytes = BytesMut::new();
        put_struct(&mut bytes, &object);
        Self(bytes.freeze())
    }

    /// The encoded bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// Length of the encoding in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if it has no fields.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// As a JSON object, as in the store.
impl Serialize for Payload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(&Map::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[derive(Clone, Copy)]
enum Message {
    Struct,
    Entry,
    Value,
    List,
}

fn check(bytes: &[u8], message: Message, depth: usize) -> Result<(), Malformed> {
    if depth > Payload::MAX_DEPTH {
        return Err(Malformed(format!("nests more than {} messages deep", Payload::MAX_DEPTH)));
    }
    let mut fields = Fields(bytes);
    // A value without a kind is an error by the definition of `Value`, and JSON converters fail on it.
    let mut lacks_a_kind = matches!(message, Message::Entry | Message::Value);
    while let Some(field) = fields.next()? {
        match (message, &field) {
            (Message::Entry, Field { number: 2, .. }) | (Message::Value, Field { number: 1..=6, .. }) => {
                lacks_a_kind = false;
            }
            _ => {}
        }
        match (message, field) {
            (Message::Struct, Field { number: 1, wire: Wire::Bytes(entry) }) => {
                check(entry, Message::Entry, depth + 1)?;
            }
            (Message::Entry, Field { number: 1, wire: Wire::Bytes(text) })
            | (Message::Value, Field { number: 3, wire: Wire::Bytes(text) }) => {
                std::str::from_utf8(text).map_err(|_| malformed("contains a string that is not UTF-8"))?;
            }
            (Message::Entry, Field { number: 2, wire: Wire::Bytes(value) })
            | (Message::List, Field { number: 1, wire: Wire::Bytes(value) }) => {
                check(value, Message::Value, depth + 1)?;
            }
            (Message::Value, Field { number: 5, wire: Wire::Bytes(fields) }) => {
                check(fields, Message::Struct, depth + 1)?;
            }
            (Message::Value, Field { number: 6, wire: Wire::Bytes(list) }) => {
                check(list, Message::List, depth + 1)?;
            }
            (Message::Value, Field { number: 2, wire: Wire::Fixed64(bits) }) if !f64::from_bits(bits).is_finite() => {
                return Err(malformed("contains a number that is not finite, which JSON can't represent"));
            }
            (Message::Value, Field { number: 1 | 4, wire: Wire::Varint(_) })
            | (Message::Value, Field { number: 2, wire: Wire::Fixed64(_) }) => {}
            (Message::Struct | Message::List, Field { number: 1, .. })
            | (Message::Entry, Field { number: 1..=2, .. })
            | (Message::Value, Field { number: 1..=6, .. }) => {
                return Err(malformed("is not the encoding of a google.protobuf.Struct"));
            }
            _unknown_field => {}
        }
    }
    if lacks_a_kind {
        return Err(malformed("contains a value without a kind"));
    }
    Ok(())
}

// The decoders below see only checked bytes: malformed bytes were refused before, and would end the decoding.

fn read_struct(bytes: &[u8]) -> Map<String, Value> {
    let mut object = Map::new();
    for field in Fields(bytes) {
        if let Field { number: 1, wire: Wire::Bytes(entry) } = field {
            let mut key = String::new();
            let mut value = Value::Null;
            for field in Fields(entry) {
                match field {
                    Field { number: 1, wire: Wire::Bytes(text) } => key = text_of(text),
                    Field { number: 2, wire: Wire::Bytes(bytes) } => value = read_value(bytes),
                    _ => {}
                }
            }
            object.insert(key, value);
        }
    }
    object
}

fn read_value(bytes: &[u8]) -> Value {
    let mut value = Value::Null;
    for field in Fields(bytes) {
        value = match field {
            Field { number: 1, .. } => Value::Null,
            Field { number: 2, wire: Wire::Fixed64(bits) } => number(f64::from_bits(bits)),
            Field { number: 3, wire: Wire::Bytes(text) } => Value::String(text_of(text)),
            Field { number: 4, wire: Wire::Varint(truth) } => Value::Bool(truth != 0),
            Field { number: 5, wire: Wire::Bytes(fields) } => Value::Object(read_struct(fields)),
            Field { number: 6, wire: Wire::Bytes(list) } => Fields(list)
                .filter_map(|field| match field {
                    Field { number: 1, wire: Wire::Bytes(value) } => Some(read_value(value)),
                    _ => None,
                })
                .collect(),
            _ => value,
        };
    }
    value
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whole numbers in the range where `f64` is exact are shown without a fraction, as in other JSON encoders.
fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let is_negative_zero = value == 0.0 && value.is_sign_negative();
    if value.fract() == 0.0 && value.abs() <= EXACT && !is_negative_zero {
        #[allow(clippy::cast_possible_truncation, reason = "whole and in range, as checked above")]
        return Value::Number((value as i64).into());
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// The first whole number that a double does not represent exactly.
fn beyond_whole(value: &Value) -> Option<&Number> {
    match value {
        Value::Number(number) => {
            let size = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
            (size > Some(Payload::MAX_WHOLE)).then_some(number)
        }
        Value::Array(values) => values.iter().find_map(beyond_whole),
        Value::Object(object) => object.values().find_map(beyond_whole),
        _ => None,
    }
}

fn put_struct(out: &mut BytesMut, object: &Map<String, Value>) {
    for (key, value) in object {
        put_message(out, 1, |entry| {
            put_bytes(entry, 1, key.as_bytes());
            put_message(entry, 2, |out| put_value(out, value));
        });
    }
}

fn put_value(out: &mut BytesMut, value: &Value) {
    match value {
        Value::Null => out.put_slice(&[1 << 3, 0]),
        Value::Number(number) => {
            out.put_u8(2 << 3 | 1);
            out.put_f64_le(number.as_f64().unwrap_or(f64::NAN));
        }
        Value::String(text) => put_bytes(out, 3, text.as_bytes()),
        Value::Bool(truth) => out.put_slice(&[4 << 3, u8::from(*truth)]),
        Value::Object(object) => put_message(out, 5, |out| put_struct(out, object)),
        Value::Array(values) => put_message(out, 6, |list| {
            for value in values {
                put_message(list, 1, |out| put_value(out, value));
            }
        }),
    }
}

fn put_message(out: &mut BytesMut, number: u8, write: impl FnOnce(&mut BytesMut)) {
    let mut message = BytesMut::new();
    write(&mut message);
    put_bytes(out, number, &message);
}

fn put_bytes(out: &mut BytesMut, number: u8, bytes: &[u8]) {
    out.put_u8(number << 3 | 2);
    let mut len = bytes.len();
    while len >= 0x80 {
        #[allow(clippy::cast_possible_truncation, reason = "the low seven bits are intended")]
        out.put_u8(len as u8 | 0x80);
        len >>= 7;
    }
    #[allow(clippy::cast_possible_truncation, reason = "below 0x80")]
    out.put_u8(len as u8);
    out.put_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(object) => object,
            other => panic!("{other} is not an object"),
        }
    }

    #[test]
    fn json_survives_a_round_trip() {
        let given = object(json!({
            "null": null, "yes": true, "no": false, "int": -3, "fraction": 0.25, "text": "Grüße", "empty": "",
            "list": [1, [2], {"three": 3}, null], "object": {"": {"deep": [{}]}},
        }));
        assert_eq!(Payload::from_json(&given).unwrap().to_json(), given);
    }

    #[test]
    fn an_overlay_takes_precedence_key_by_key() {
        let under = Payload::from_json(&object(json!({"a": 1, "b": {"x": 1}}))).unwrap();
        let over = Payload::from_json(&object(json!({"b": {"y": 2}, "c": 3}))).unwrap();
        let expected = object(json!({"a": 1, "b": {"y": 2}, "c": 3}));
        assert_eq!(under.overlaid(&over).to_json(), expected);
        let peer = prost_types::Struct::decode(under.overlaid(&over).as_bytes().clone()).unwrap();
        assert_eq!(peer.fields.len(), 3);
        assert!(Payload::check(under.overlaid(&over).as_bytes().clone()).is_ok());
    }

    #[test]
    fn equal_payloads_have_one_canonical_encoding() {
        let json = object(json!({"a": [1.5, {"x": null, "y": -0.0}], "b": 1e300}));
        let canonical = Payload::from_json(&json).unwrap();
        assert_eq!(canonical.canonical(), canonical);
        let one = |json: Value| Payload::from_json(&object(json)).unwrap().as_bytes().clone();
        let [outdated, b, a] = [json!({"a": "outdated"}), json!({"b": json["b"]}), json!({"a": json["a"]})].map(one);
        let unknown_field = b"\xfa\x7f\x01x";
        let other_order = Payload::check([&outdated[..], &b, unknown_field, &a].concat().into()).unwrap();
        assert_ne!(other_order, canonical);
        assert_eq!(other_order.canonical(), canonical);
    }

    #[test]
    fn values_that_json_can_not_represent_are_refused() {
        let holding = |kind| {
            let fields = [("x".to_owned(), prost_types::Value { kind })].into();
            Payload::check(prost_types::Struct { fields }.encode_to_vec().into())
        };
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(holding(Some(prost_types::value::Kind::NumberValue(number))).is_err(), "{number}");
        }
        assert!(holding(Some(prost_types::value::Kind::NumberValue(f64::MIN))).is_ok());
        assert!(holding(None).is_err());
        // An entry without a value.
        assert!(Payload::check(Bytes::from_static(b"\x0a\x03\x0a\x01x")).is_err());
    }

    #[test]
    fn a_whole_number_that_would_change_is_refused() {
        let holding = |number: Value| Payload::from_json(&object(json!({"deep": [{"number": number}]})));
        for whole in [json!(1_u64 << 53), json!(-(1_i64 << 53)), json!(1e300), json!(0.1)] {
            assert!(holding(whole.clone()).is_ok(), "{whole}");
        }
        for whole in [json!((1_u64 << 53) + 1), json!(-(1_i64 << 53) - 1), json!(u64::MAX), json!(i64::MIN)] {
            let refused = holding(whole.clone()).unwrap_err().to_string();
            assert!(refused.contains(&format!("contains the whole number {whole}, which would change")), "{refused}");
        }
    }

    #[test]
    fn messages_nest_to_the_limit_and_no_deeper() {
        let objects = |levels, innermost| object((0..levels).fold(innermost, |inner, _| json!({ "in": inner })));
        // An object inside an object is three messages deeper, and a list inside a list two. The innermost number is
        // message 90, and the innermost list would be message 91.
        assert!(Payload::from_json(&objects(29, json!({ "x": 1 }))).is_ok());
        assert!(Payload::from_json(&objects(29, json!({ "x": [] }))).is_err());
        let lists = |levels| object(json!({ "x": (0..levels).fold(json!(1), |inner, _| json!([inner])) }));
        assert!(Payload::from_json(&lists(43)).is_ok());
        assert!(Payload::from_json(&lists(44)).is_err());
    }

    #[test]
    fn the_last_of_several_kinds_of_a_value_counts() {
        // A struct with one entry "x", whose value is true and then null.
        let payload = Payload::check(Bytes::from_static(b"\x0a\x09\x0a\x01x\x12\x04\x20\x01\x08\x00")).unwrap();
        assert_eq!(payload.to_json(), object(json!({ "x": null })));
    }

    #[test]
    fn an_overlay_of_nothing_copies_nothing() {
        let payload = Payload::from_json(&object(json!({ "a": 1 }))).unwrap();
        for same in [payload.overlaid(&Payload::default()), Payload::default().overlaid(&payload)] {
            assert_eq!(same.as_bytes().as_ptr(), payload.as_bytes().as_ptr());
        }
    }

    #[test]
    fn a_stored_payload_is_read_as_it_was() {
        let payload = Payload::from_json(&object(json!({ "a": [1, { "b": null }] }))).unwrap();
        let stored = serde_json::to_string(&payload).unwrap();
        assert_eq!(serde_json::from_str::<Payload>(&stored).unwrap(), payload);
        assert!(serde_json::from_str::<Payload>("{\"a\": 9007199254740993}").is_err());
    }

    proptest! {
        /// Bytes that prost can't decode are refused, and accepted bytes are decoded by prost to the same value.
        #[test]
        fn agrees_with_prost(bytes in proptest::collection::vec(0_u8..48, 0..24)) {
            let bytes = Bytes::from(bytes);
            if Payload::check(bytes.clone()).is_ok() {
                prop_assert!(prost_types::Struct::decode(bytes).is_ok());
            }
        }

        #[test]
        fn every_message_of_prost_is_accepted(keys in proptest::collection::btree_map(".*", ".*", 0..6)) {
            let fields = keys.iter().map(|(key, text)| {
                let kind = Some(prost_types::value::Kind::StringValue(text.clone()));
                (key.clone(), prost_types::Value { kind })
            });
            let message = prost_types::Struct { fields: fields.collect() };
            let payload = Payload::check(message.encode_to_vec().into()).unwrap();
            let expected: Map<_, _> = keys.into_iter().map(|(key, text)| (key, Value::String(text))).collect();
            prop_assert_eq!(payload.to_json(), expected);
        }
    }
}
