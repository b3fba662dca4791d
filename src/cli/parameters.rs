//! Parameters on the command line: JSON, as a `google.protobuf.Struct`.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{Exit, Failure};
use crate::model::Payload;

/// What is handed to subsystems.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Parameters {
    /// One parameter, its value as JSON, such as --param limit=5 or --param 'name="x"'; may be repeated
    #[arg(long = "param", value_name = "KEY=JSON", value_parser = parameter)]
    one: Vec<(String, Value)>,
    /// All parameters as one JSON object; those of --param go over it
    #[arg(long = "params-json", value_name = "OBJECT", value_parser = object)]
    all: Option<Map<String, Value>>,
}

impl Parameters {
    /// As the contract carries them.
    ///
    /// # Errors
    /// They nest too deep.
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
/// What to give instead.
pub(super) fn parameter(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("give KEY=JSON, such as limit=5")?;
    let value = serde_json::from_str(value).map_err(|error| {
        format!("what follows {key}= is not JSON: {error}; a text needs quotes that your shell leaves: '{key}=\"…\"'")
    })?;
    Ok((key.to_owned(), value))
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("it is not a JSON object: {error}"))
}
