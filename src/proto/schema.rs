//! The contract in the terms of JSON Schema, for OpenAPI: what its messages look like as canonical proto JSON, with the
//! comments of the contract.

use std::collections::{BTreeMap, HashMap};

use prost_reflect::{
    DescriptorPool, EnumDescriptor, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor, MethodDescriptor,
};
use serde_json::{Value, json};

use super::{bounds, descriptors};
use crate::model::Code;

/// The schemas of the contract.
pub struct Schemas {
    pool: &'static DescriptorPool,
    comments: HashMap<(String, Vec<i32>), String>,
    /// Those of messages and enums that were asked for, and of those in them, by name.
    named: BTreeMap<String, Value>,
}

/// An RPC of the contract.
pub struct Rpc {
    /// The name of its service.
    pub service: String,
    /// Its comment.
    pub comment: String,
    method: MethodDescriptor,
}

/// A field of a request, as a parameter of a URL.
pub struct Parameter {
    /// Its name in JSON.
    pub name: String,
    /// Its comment.
    pub comment: String,
    /// The schema of its value. A list takes several parameters.
    pub schema: Value,
}

impl Schemas {
    /// No schemas yet. `None` if the contract can't be read, which is a defect of the build.
    pub fn new() -> Option<Self> {
        let pool = descriptors()?;
        let comments = pool.files().flat_map(|file| comments_of(&file)).collect();
        Some(Self { pool, comments, named: BTreeMap::new() })
    }

    /// The services of the orchestrator by name, with their comments.
    pub fn services(&self) -> BTreeMap<String, String> {
        self.methods()
            .map(|method| method.parent_service().clone())
            .map(|it| (it.name().to_owned(), self.comment(&it.parent_file(), it.path())))
            .collect()
    }

    /// The names of all RPCs of the orchestrator.
    pub fn rpcs(&self) -> Vec<String> {
        self.methods().map(|method| method.name().to_owned()).collect()
    }

    /// The RPC of the orchestrator with this name.
    pub fn rpc(&self, name: &str) -> Option<Rpc> {
        let method = self.methods().find(|method| method.name() == name)?;
        let service = method.parent_service();
        let comment = self.comment(&service.parent_file(), method.path());
        Some(Rpc { service: service.name().to_owned(), comment, method })
    }

    fn methods(&self) -> impl Iterator<Item = MethodDescriptor> {
        let ours = self.pool.services().filter(|service| service.package_name() == "dreamnet.orchestrator.v1");
        ours.flat_map(|service| service.methods().collect::<Vec<_>>())
    }

    /// The fields of a request as parameters.
    pub fn parameters(&mut self, rpc: &Rpc) -> Vec<Parameter> {
        let fields = rpc.method.input().fields().collect::<Vec<_>>();
        fields.into_iter().map(|field| self.parameter(&field)).collect()
    }

    /// The field at this path in a request, such as `registration.name`, as a parameter.
    pub fn parameter_at(&mut self, rpc: &Rpc, path: &str) -> Option<Parameter> {
        let (outer, name) = path.rsplit_once('.').map_or(("", path), |(outer, name)| (outer, name));
        let outer = outer.split('.').filter(|name| !name.is_empty());
        let message = outer.into_iter().try_fold(rpc.method.input(), |message, name| {
            let kind = message.get_field_by_json_name(name)?.kind();
            kind.as_message().cloned()
        });
        let field = message?.get_field_by_json_name(name)?;
        Some(self.parameter(&field))
    }

    fn parameter(&mut self, field: &FieldDescriptor) -> Parameter {
        let comment = self.comment(&field.parent_message().parent_file(), field.path());
        Parameter { name: field.json_name().to_owned(), comment, schema: self.of_field(field) }
    }

    /// A reference to the schema of the request of an RPC, in which no other fields are allowed, nor those at the paths
    /// `given`, such as `registration.name`. True if the request needs further fields.
    pub fn request(&mut self, rpc: &Rpc, given: &[&str]) -> (Value, bool) {
        let message = rpc.method.input();
        let reference = self.of_message(&message);
        let is_given = |name: &String| given.iter().any(|path| path.split('.').next() == Some(name));
        let required: Vec<_> = self.required(&message).into_iter().filter(|name| !is_given(name)).collect();
        let needs_more = !required.is_empty();
        // A mask says which fields are read.
        let is_masked = message.fields().any(|field| is_mask(&field.kind()));
        let inner: Vec<_> = message
            .fields()
            .filter(|field| !is_masked && !field.is_map())
            .filter_map(|field| Some((field.clone(), self.required(field.kind().as_message()?))))
            .filter(|(_, required)| !required.is_empty())
            .collect();
        if let Some(schema) = self.named.get_mut(&name_of(message.full_name())) {
            schema["additionalProperties"] = false.into();
            if needs_more {
                schema["required"] = required.into();
            }
            for (field, required) in inner {
                let value = &mut schema["properties"][field.json_name()];
                let value = if field.is_list() { &mut value["items"] } else { value };
                value["required"] = required.into();
            }
            if let Some(properties) = schema["properties"].as_object_mut() {
                properties.retain(|name, _| !given.contains(&name.as_str()));
            }
        }
        (reference, needs_more)
    }

    /// The fields of a message without which a request is refused, as their comments say.
    fn required(&self, message: &MessageDescriptor) -> Vec<String> {
        let file = message.parent_file();
        let fields = message.fields().filter(|field| self.comment(&file, field.path()).contains("Required."));
        fields.map(|field| field.json_name().to_owned()).collect()
    }

    /// A reference to the schema of the response of an RPC.
    pub fn response(&mut self, rpc: &Rpc) -> Value {
        self.of_message(&rpc.method.output())
    }

    /// All schemas that there are references to.
    pub fn into_named(self) -> BTreeMap<String, Value> {
        self.named
    }

    fn comment(&self, file: &FileDescriptor, path: &[i32]) -> String {
        self.comments.get(&(file.name().to_owned(), path.to_vec())).cloned().unwrap_or_default()
    }

    fn of_field(&mut self, field: &FieldDescriptor) -> Value {
        if field.is_map()
            && let Kind::Message(entry) = field.kind()
        {
            let value = self.of_value(&entry.map_entry_value_field().kind());
            return json!({ "type": "object", "additionalProperties": value });
        }
        let value = self.of_value(&field.kind());
        if !field.is_list() {
            return value;
        }
        let mut list = json!({ "type": "array", "items": value });
        let max = bounds::max_entries(field.full_name());
        if max > 0 {
            list["maxItems"] = max.into();
        }
        list
    }

    fn of_value(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Double | Kind::Float => json!({ "type": "number", "format": "double" }),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => json!({ "type": "integer", "format": "int32" }),
            Kind::Uint32 | Kind::Fixed32 => {
                json!({ "type": "integer", "format": "uint32", "minimum": 0, "maximum": u32::MAX })
            }
            // JavaScript's numbers would round them.
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({ "type": "string", "format": "int64", "pattern": "^-?[0-9]+$" })
            }
            Kind::Uint64 | Kind::Fixed64 => json!({ "type": "string", "format": "uint64", "pattern": "^[0-9]+$" }),
            Kind::Bool => json!({ "type": "boolean" }),
            Kind::String => json!({ "type": "string" }),
            Kind::Bytes => json!({ "type": "string", "contentEncoding": "base64" }),
            Kind::Enum(of) => self.of_enum(of),
            Kind::Message(of) => self.of_message(of),
        }
    }

    fn of_message(&mut self, message: &MessageDescriptor) -> Value {
        // <https://protobuf.dev/programming-guides/json/>
        match message.full_name() {
            "google.protobuf.Timestamp" => return json!({ "type": "string", "format": "date-time" }),
            "google.protobuf.Duration" => {
                return json!({ "type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$", "examples": ["1.5s"] });
            }
            "google.protobuf.FieldMask" => {
                return json!({ "type": "string", "examples": ["timeout,retry.maxAttempts"] });
            }
            "google.protobuf.Struct" => return json!({ "type": "object" }),
            _ => {}
        }
        let name = name_of(message.full_name());
        if !self.named.contains_key(&name) {
            // Before its fields, which may contain it.
            self.named.insert(name.clone(), Value::Null);
            let file = message.parent_file();
            let properties: serde_json::Map<_, _> = message
                .fields()
                .map(|field| {
                    let mut schema = self.of_field(&field);
                    describe(&mut schema, self.comment(&file, field.path()));
                    (field.json_name().to_owned(), schema)
                })
                .collect();
            let mut schema = json!({ "type": "object", "properties": properties });
            describe(&mut schema, self.comment(&file, message.path()));
            self.named.insert(name.clone(), schema);
        }
        reference(&name)
    }

    fn of_enum(&mut self, of: &EnumDescriptor) -> Value {
        let name = name_of(of.full_name());
        if !self.named.contains_key(&name) {
            let file = of.parent_file();
            let names: Vec<_> = of.values().map(|value| value.name().to_owned()).collect();
            let values = of.values().map(|it| format!("* `{}`: {}", it.name(), self.comment(&file, it.path())));
            let comment = format!("{}\n\n{}", self.comment(&file, of.path()), values.collect::<Vec<_>>().join("\n"));
            let mut schema = json!({ "type": "string", "enum": names });
            describe(&mut schema, comment);
            self.named.insert(name.clone(), schema);
        }
        reference(&name)
    }
}

fn is_mask(kind: &Kind) -> bool {
    kind.as_message().is_some_and(|message| message.full_name() == "google.protobuf.FieldMask")
}

/// The name of a schema: that of the message or enum, without its package. No name is in both packages.
fn name_of(full_name: &str) -> String {
    let packages = ["dreamnet.orchestrator.v1.", "dreamnet.subsystem.v1."];
    let name = packages.iter().find_map(|package| full_name.strip_prefix(package));
    name.unwrap_or(full_name).to_owned()
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn describe(schema: &mut Value, comment: String) {
    if !comment.is_empty() {
        schema["description"] = comment.into();
    }
}

/// The comments of a file, by its name and by their paths in it.
fn comments_of(file: &FileDescriptor) -> Vec<((String, Vec<i32>), String)> {
    let info = file.file_descriptor_proto().source_code_info.as_ref();
    let commented = info.into_iter().flat_map(|info| &info.location).filter(|it| it.leading_comments.is_some());
    commented.map(|it| ((file.name().to_owned(), it.path.clone()), markdown(it.leading_comments()))).collect()
}

/// A comment as Markdown: the lines of a paragraph are joined, except for lists, and the codes of errors are a list.
fn markdown(comment: &str) -> String {
    let mut text = String::new();
    for paragraph in comment.trim().split("\n\n") {
        text += if text.is_empty() { "" } else { "\n\n" };
        let mut lines = paragraph.lines().map(str::trim);
        let first = lines.next().unwrap_or_default();
        text += first;
        for line in lines {
            let word = line.split([' ', ':']).next().unwrap_or_default();
            let is_error = first.starts_with("Errors:") && Code::from_name(word).is_some();
            text += match line {
                _ if is_error => "\n* ",
                item if item.starts_with("* ") => "\n",
                _ => " ",
            };
            text += line;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_becomes_markdown() {
        let comment =
            " Runs one\n cycle.\n\n * a\n   and\n * b\n\n Errors:\n NOT_FOUND (X): it is\n not there.\n ABORTED: or\n";
        assert_eq!(
            markdown(comment),
            "Runs one cycle.\n\n* a and\n* b\n\nErrors:\n* NOT_FOUND (X): it is not there.\n* ABORTED: or"
        );
    }

    #[test]
    fn the_schema_of_a_message_is_that_of_its_json() {
        let mut schemas = Schemas::new().unwrap();
        let run = schemas.rpc("RunCycle").unwrap();
        assert_eq!(run.service, "Orchestrator");
        assert_eq!(schemas.request(&run, &[]).0["$ref"], "#/components/schemas/RunCycleRequest");
        schemas.response(&run);
        let named = schemas.into_named();
        let request = &named["RunCycleRequest"];
        let of = |name: &str| &request["properties"][name];
        assert_eq!(request["additionalProperties"], false);
        assert_eq!((&of("subsystems")["type"], &of("subsystems")["maxItems"]), (&"array".into(), &20_000.into()));
        assert_eq!(of("overlapPolicy")["$ref"], "#/components/schemas/OverlapPolicy");
        assert_eq!((&of("parameters")["type"], &of("async")["type"]), (&"object".into(), &"boolean".into()));
        assert!(of("deadline")["pattern"].is_string() && of("requestId")["description"].is_string());
        assert_eq!(named["CycleTelemetry"]["properties"]["cycleId"]["format"], "uint64");
        assert_eq!(named["SubsystemTelemetry"]["properties"]["metrics"]["additionalProperties"]["type"], "number");
        assert_eq!(named["OverlapPolicy"]["enum"][1], "OVERLAP_POLICY_SKIP");
    }
}
