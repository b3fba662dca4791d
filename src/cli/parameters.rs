//! Parameters on the command line: JSON, as a `google.protobuf.Struct`.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Exit, Failure};
use crate::{model::Payload, proto::json::check_keys};

/// Parameters for subsystems.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Parameters {
    /// One parameter, its value as JSON, such as --param limit=5 or --param 'name="x"'; may be repeated
    #[arg(long = "param", value_name = "KEY=JSON", value_parser = parameter)]
    one: Vec<(String, Value)>,
    /// All parameters as one JSON object; --param takes precedence
    #[arg(long = "params-json", value_name = "OBJECT", value_parser = object)]
    all: Option<Map<String, Value>>,
}

impl Parameters {
    /// The paths of the given parameters: all of them, or each one.
    pub(super) fn paths(&self) -> Vec<String> {
        match self.all {
            Some(_) => vec!["parameters".to_owned()],
            None => self.one.iter().map(|(key, _)| format!("parameters.{key}")).collect(),
        }
    }

    /// The parameters as a message of the contract.
    ///
    /// # Errors
    /// They nest too deep, or contain a whole number that would change.
    pub(super) fn encode(self) -> Result<Bytes, Failure> {
        let mut object = self.all.unwrap_or_default();
        object.extend(self.one);
        let payload = Payload::from_json(&object);
        payload
            .map(|payload| payload.as_bytes().clone())
            .map_err(|malformed| Failure::new(Exit::Usage, format!("the object of parameters {malformed}")))
    }
}

/// Reads KEY=JSON.
///
/// # Errors
/// The text is invalid; the message says which form is valid.
pub(super) fn parameter(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("give KEY=JSON, such as limit=5")?;
    let value = unchanged(value).map_err(|error| {
        format!("the value of {key} is not JSON: {error}; quote a string for JSON and for your shell: '{key}=\"…\"'")
    })??;
    Ok((key.to_owned(), value))
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    unchanged(text).map_err(|error| format!("it is not a JSON object: {error}"))?
}

/// Reads JSON. The library silently turns whole numbers beyond 64 bits into doubles, so they are refused here; smaller
/// ones are checked later.
fn unchanged<T: DeserializeOwned>(json: &str) -> Result<Result<T, String>, serde_json::Error> {
    check_keys(json.as_bytes())?;
    let value = serde_json::from_str(json)?;
    let mut outside_of_texts = String::with_capacity(json.len());
    let (mut in_text, mut is_escaped) = (false, false);
    for c in json.chars() {
        match c {
            '"' if !is_escaped => in_text = !in_text,
            _ if !in_text => outside_of_texts.push(c),
            _ => {}
        }
        is_escaped = in_text && c == '\\' && !is_escaped;
    }
    let words = outside_of_texts.split(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c));
    let is_whole = |word: &&str| word.trim_start_matches('-').bytes().all(|byte| byte.is_ascii_digit());
    let mut whole = words.filter(|word| !word.is_empty()).filter(is_whole);
    let changes = whole.find(|word| word.parse::<i64>().is_err() && word.parse::<u64>().is_err());
    Ok(changes.map_or(Ok(value), |number| Err(format!("it {}", Payload::changes(number)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_number_of_more_than_64_bits_is_refused() {
        for json in ["18446744073709551616", "[{\"a\\\"\": -99999999999999999999}]"] {
            let refused = parameter(&format!("id={json}")).unwrap_err();
            assert!(refused.contains("which would change"), "{refused}");
        }
        for json in ["1e30", "1.5", "18446744073709551615", "\"99999999999999999999\"", "\"\\\"99999999999999999999\""]
        {
            assert!(parameter(&format!("id={json}")).is_ok(), "{json}");
        }
        assert!(object("{\"id\": 99999999999999999999}").is_err());
    }

    #[test]
    fn a_key_that_is_given_twice_is_refused() {
        for refused in [object(r#"{"a": 1, "a": 2}"#).map(drop), parameter(r#"x={"a": 1, "a": 2}"#).map(drop)] {
            let refused = refused.unwrap_err();
            assert!(refused.contains("the key \"a\" is given more than once"), "{refused}");
        }
        assert!(object(r#"{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}"#).is_ok());
    }
}
