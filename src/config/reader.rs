//! Reads settings one key at a time, and remembers where each was written, so that every error can say so.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::{self, Display},
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use jiff::SignedDuration;
use serde_json::Map;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{ConfigError, Problem, Source};
use crate::model::{Malformed, Name, Payload, Violations, nearest};

/// The prefix of every environment variable.
pub(super) const PREFIX: &str = "ORCHESTRATOR_";

/// The written value of a key, and its place.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) origin: Source,
    value: Value,
}

pub(super) type Table = BTreeMap<String, Node>;

#[derive(Debug)]
enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    List(Vec<Node>),
    Table(Table),
    /// From the environment or a flag, without quotes: parsed as the type of the key.
    Word(String),
    /// A value that is valid for no key: a date, or a number beyond 64 bits.
    Other(String),
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 80;
        match self {
            Self::Text(text) | Self::Word(text) if text.chars().count() > SHOWN => {
                write!(f, "{:?}…", text.chars().take(SHOWN).collect::<String>())
            }
            Self::Text(text) | Self::Word(text) => write!(f, "{text:?}"),
            Self::Integer(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
            Self::Bool(truth) => truth.fmt(f),
            Self::List(_) => f.write_str("a list"),
            Self::Table(_) => f.write_str("a table"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl Value {
    fn text(self) -> Result<String, Self> {
        match self {
            Self::Text(text) | Self::Word(text) => Ok(text),
            other => Err(other),
        }
    }

    fn integer<T: TryFrom<i64>>(&self) -> Option<T> {
        let number = match self {
            Self::Integer(number) => *number,
            Self::Word(word) => word.parse().ok()?,
            _ => return None,
        };
        number.try_into().ok()
    }
}

impl Node {
    fn new(value: Spanned<DeValue<'_>>, at: usize, origin: &impl Fn(usize) -> Source) -> Self {
        let value = match value.into_inner() {
            DeValue::String(text) => Value::Text(text.into_owned()),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Value::Integer(number),
                Err(_) => Value::Other(number.to_string()),
            },
            DeValue::Float(number) => match number.as_str().parse() {
                Ok(number) => Value::Float(number),
                Err(_) => Value::Other(number.to_string()),
            },
            DeValue::Boolean(truth) => Value::Bool(truth),
            DeValue::Datetime(time) => Value::Other(time.to_string()),
            DeValue::Array(items) => Value::List(
                items
                    .into_iter()
                    .map(|item| {
                        let at = item.span().start;
                        Self::new(item, at, origin)
                    })
                    .collect(),
            ),
            DeValue::Table(entries) => Value::Table(table(entries, origin)),
        };
        Self { origin: origin(at), value }
    }

    /// Reads the value of an environment variable or a flag: a list, a table or a quoted string as in TOML, or a word.
    pub(super) fn from_word(raw: &str, origin: Source) -> Self {
        match DeValue::parse(raw) {
            Ok(value) if raw.starts_with(['[', '{', '"', '\'']) => Self::new(value, 0, &|_| origin.clone()),
            _ => Self { value: Value::Word(raw.to_owned()), origin },
        }
    }

    /// As JSON.
    fn json(self) -> Result<serde_json::Value, (Source, String)> {
        Ok(match self.value {
            Value::Text(text) | Value::Word(text) => text.into(),
            Value::Integer(number) if number.unsigned_abs() > Payload::MAX_WHOLE => {
                return Err((self.origin, Payload::changes(number).0));
            }
            Value::Integer(number) => number.into(),
            Value::Float(number) if number.is_finite() => number.into(),
            Value::Bool(truth) => truth.into(),
            Value::List(nodes) => nodes.into_iter().map(Self::json).collect::<Result<_, _>>()?,
            Value::Table(table) => json_object(table)?.into(),
            value @ (Value::Float(_) | Value::Other(_)) => {
                return Err((self.origin, format!("contains {value}, which JSON can't represent; write it in quotes")));
            }
        })
    }
}

fn json_object(table: Table) -> Result<Map<String, serde_json::Value>, (Source, String)> {
    table.into_iter().map(|(key, node)| Ok((key, node.json()?))).collect()
}

fn table(entries: DeTable<'_>, origin: &impl Fn(usize) -> Source) -> Table {
    entries
        .into_iter()
        .map(|(key, value)| {
            let at = key.span().start;
            (key.into_inner().into_owned(), Node::new(value, at, origin))
        })
        .collect()
}

/// The problems, in the order in which they are found. Beyond the number that a person reads, further problems cost
/// only counting them.
#[derive(Default)]
pub(super) struct Problems {
    found: Vec<Problem>,
    left_out: usize,
}

impl Problems {
    pub(super) fn push(&mut self, problem: Problem) {
        if self.is_full() {
            self.left_out += 1;
        } else {
            self.found.push(problem);
        }
    }

    /// True if no further problem is kept, so that looking for more is of no use.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() >= ConfigError::MAX_PROBLEMS
    }

    /// `value`, if nothing is wrong.
    ///
    /// # Errors
    /// The problems, otherwise.
    pub(super) fn into_result<T>(mut self, value: T) -> Result<T, ConfigError> {
        if self.found.is_empty() {
            return Ok(value);
        }
        self.found.sort_by(|a, b| a.origin.cmp(&b.origin));
        Err(ConfigError { problems: self.found, left_out: self.left_out })
    }
}

/// Reads a file.
pub(super) fn parse(name: &str, text: &str) -> Result<Table, ConfigError> {
    /// Largest file in bytes in which all errors are found: each takes a hundred times the memory of the byte that is
    /// wrong.
    const ALL_ERRORS: usize = 64 << 10;
    /// The parser's message for a duplicate key, which it reports at the key's place.
    const DUPLICATE: &str = "duplicate key";
    let name: Arc<str> = name.into();
    let line_ends: Vec<_> = text.match_indices('\n').map(|(at, _)| at).collect();
    let origin = |at: usize| Source::File(name.clone(), line_ends.partition_point(|end| *end < at) + 1);
    let first = match DeTable::parse(text) {
        Ok(entries) => return Ok(table(entries.into_inner(), &origin)),
        Err(first) => first,
    };
    let (errors, hint) = if text.len() <= ALL_ERRORS {
        (DeTable::parse_recoverable(text).1, "")
    } else {
        (vec![first], "; in a file of this size, only the first such place is told")
    };
    let mut problems = Problems::default();
    for error in &errors {
        let at = error.span().map_or(0, |span| span.start);
        let what = match error.span().and_then(|span| text.get(span)) {
            Some(key) if error.message() == DUPLICATE => format!("{key} is defined twice; remove one"),
            _ => error.message().to_owned(),
        };
        problems.push(Problem::new(origin(at), "", format!("is not TOML: {what}{hint}")));
    }
    // The contents of a file that is not TOML are not checked.
    problems.into_result(Table::new())
}

/// Puts `node` at the dotted `path`.
pub(super) fn put(table: &mut Table, path: &str, node: Node) -> Result<(), String> {
    /// More than any key has. Each is a call of this function.
    const MAX_NAMES: usize = 16;
    match path.split_once('.') {
        _ if path.split('.').nth(MAX_NAMES).is_some() => Err("is not a key: it has too many names".into()),
        _ if path.is_empty() => {
            Err("needs KEY=VALUE with names joined by dots, such as server.listen=127.0.0.1:7700".into())
        }
        None => {
            merge(table, path.to_owned(), node);
            Ok(())
        }
        Some((key, rest)) => {
            let empty = || Node { origin: node.origin.clone(), value: Value::Table(Table::new()) };
            match &mut table.entry(key.to_owned()).or_insert_with(empty).value {
                Value::Table(table) => put(table, rest, node),
                Value::List(_) => Err(format!("goes into {key}, which is a list; set the list as a whole")),
                value => Err(format!("goes into {key}, which is {value} and no table")),
            }
        }
    }
}

/// Puts `node` at `key`. A table goes into the table that is there; anything else replaces.
fn merge(table: &mut Table, key: String, node: Node) {
    match (table.get_mut(&key), node) {
        (Some(Node { value: Value::Table(there), .. }), Node { value: Value::Table(over), .. }) => {
            for (key, node) in over {
                merge(there, key, node);
            }
        }
        (_, node) => {
            table.insert(key, node);
        }
    }
}

/// Adds the items of a list to those at `key` in the table `of`. A value of another type stays, and is refused later.
pub(super) fn append(table: &mut Table, of: &str, key: &str, list: Node) {
    let origin = || list.origin.clone();
    let empty = || Node { origin: origin(), value: Value::Table(Table::new()) };
    let Value::Table(table) = &mut table.entry(of.to_owned()).or_insert_with(empty).value else { return };
    let empty = || Node { origin: origin(), value: Value::List(Vec::new()) };
    if let (Value::List(there), Value::List(more)) =
        (&mut table.entry(key.to_owned()).or_insert_with(empty).value, list.value)
    {
        there.extend(more);
    }
}

/// Takes the value at the dotted `path` out.
fn take(table: &mut Table, path: &str) -> Option<Node> {
    match path.split_once('.') {
        None => table.remove(path),
        Some((key, rest)) => match &mut table.get_mut(key)?.value {
            Value::Table(table) => take(table, rest),
            _ => None,
        },
    }
}

/// Reads a table of settings. Each key that is read is removed; keys that are left at the end are unknown.
pub(super) struct Reader<'a> {
    table: Table,
    /// Environment variables by name, for the settings of the whole process.
    environment: BTreeMap<String, Node>,
    /// The subject of the table; empty for the settings of the whole process.
    subject: String,
    /// Where the table is; `None` for the settings of the whole process.
    origin: Option<Source>,
    /// Every key that was asked for.
    pub(super) known: Vec<String>,
    /// Where each value was written that was taken out.
    origins: HashMap<String, Source>,
    /// And where each item of a list was.
    items: HashMap<String, Vec<Source>>,
    /// Keys with a problem.
    refused: Vec<String>,
    problems: &'a mut Problems,
}

impl<'a> Reader<'a> {
    /// For the settings of the whole process.
    pub(super) fn new(table: Table, environment: BTreeMap<String, Node>, problems: &'a mut Problems) -> Self {
        Self {
            table,
            environment,
            subject: String::new(),
            origin: None,
            known: Vec::new(),
            origins: HashMap::new(),
            items: HashMap::new(),
            refused: Vec::new(),
            problems,
        }
    }

    /// For one entry of a list of tables, such as the `number`-th of `[[subsystems]]`, each of which is a `kind`.
    pub(super) fn entry(&mut self, kind: &str, list: &str, number: usize, node: Node) -> Reader<'_> {
        let subject = format!("{list}[{number}]");
        let table = match node.value {
            Value::Table(table) => table,
            value => {
                let problem = format!("is {value}; write a table, [[{list}]]");
                self.problems.push(Problem::new(node.origin.clone(), subject.clone(), problem));
                Table::new()
            }
        };
        let subject = match table.get("name").map(|node| &node.value) {
            Some(Value::Text(name)) if Name::parse(name).is_ok() => format!("{kind} {name}: "),
            _ => format!("{subject}: "),
        };
        Reader { subject, origin: Some(node.origin), ..Reader::new(table, BTreeMap::new(), self.problems) }
    }

    fn take(&mut self, key: &str) -> Option<Node> {
        self.known.push(key.to_owned());
        let written = take(&mut self.table, key);
        let variable = if self.environment.is_empty() { None } else { self.environment.remove(&variable_name(key)) };
        let node = match written {
            Some(Node { origin: Source::Flag(_), .. }) => written,
            _ => variable.or(written),
        }?;
        self.origins.insert(key.to_owned(), node.origin.clone());
        Some(node)
    }

    /// The place of `key`, or of its table. `None` if it was not written.
    pub(super) fn origin(&self, key: &str) -> Option<&Source> {
        let item = || {
            let (list, number) = key.strip_suffix(']')?.rsplit_once('[')?;
            self.items.get(list)?.get(number.parse::<usize>().ok()?)
        };
        let shorter = || key.rfind(['.', '[']).and_then(|at| self.origin(&key[..at]));
        self.origins.get(key).or_else(item).or_else(shorter)
    }

    /// `key` was written, and nothing is wrong with it so far.
    pub(super) fn is_written(&self, key: &str) -> bool {
        self.origins.contains_key(key) && !self.refused.iter().any(|refused| refused == key)
    }

    /// Nothing has been refused yet.
    pub(super) fn is_content(&self) -> bool {
        self.problems.found.is_empty()
    }

    /// There are enough problems to stop reading; `further` values are not checked.
    pub(super) fn gives_up(&mut self, further: usize) -> bool {
        let is_full = self.problems.is_full();
        self.problems.left_out += if is_full { further } else { 0 };
        is_full
    }

    /// Notes that `key`, which was asked for, has a problem. Further ones of the same key follow from the first.
    pub(super) fn refuse(&mut self, key: &str, problem: impl Into<String>) {
        if self.refused.iter().any(|refused| refused == key) {
            return;
        }
        // A default can be refused as well, if it does not fit to another setting.
        let origin = self.origin(key).or(self.origin.as_ref()).cloned().unwrap_or(Source::Default);
        self.refused.push(key.to_owned());
        self.problems.push(Problem::new(origin, format!("{}{key}", self.subject), problem));
    }

    /// Adds the violations of validation.
    pub(super) fn refuse_all(&mut self, violations: Violations) {
        for violation in violations.0 {
            self.refuse(&violation.field, violation.problem);
        }
    }

    /// The value of `key`: `read` converts the written value, or returns it if it is invalid.
    fn read<T>(&mut self, key: &str, allowed: &str, read: impl FnOnce(Value) -> Result<T, Value>) -> Option<T> {
        match read(self.take(key)?.value) {
            Ok(value) => Some(value),
            Err(value) => {
                self.refuse(key, format!("is {value}; give {allowed}"));
                None
            }
        }
    }

    /// A table of keys, which `read` reads.
    #[allow(clippy::unnecessary_wraps, reason = "as whatever else is read")]
    pub(super) fn group<T>(&mut self, key: &str, read: impl FnOnce(&mut Self, &str) -> T) -> Option<T> {
        Some(read(self, key))
    }

    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        self.read(key, "a text in quotes", Value::text)
    }

    /// A string that `parse` parses, or refuses with the allowed values.
    pub(super) fn parsed<T>(&mut self, key: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text(key)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(allowed) => {
                self.refuse(key, format!("is {}; {allowed}", Value::Text(without_password(text))));
                None
            }
        }
    }

    /// One of these words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Option<T> {
        self.parsed(key, |text| {
            let words = || choices.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(" or ");
            choices
                .iter()
                .find(|(word, _)| *word == text)
                .map(|(_, choice)| *choice)
                .ok_or_else(|| format!("give {}", words()))
        })
    }

    pub(super) fn flag(&mut self, key: &str) -> Option<bool> {
        self.read(key, "true or false", |value| match value {
            Value::Bool(truth) => Ok(truth),
            Value::Word(word) => word.parse().map_err(|_| Value::Word(word)),
            other => Err(other),
        })
    }

    /// A whole number.
    pub(super) fn number<T>(&mut self, key: &str, allowed: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + Display,
    {
        let words = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        self.read(key, &words, |value| value.integer().filter(|number| allowed.contains(number)).ok_or(value))
    }

    pub(super) fn float(&mut self, key: &str) -> Option<f64> {
        #[allow(clippy::cast_precision_loss, reason = "a number so large is out of every bound")]
        self.read(key, "a number", |value| match value {
            Value::Float(number) => Ok(number),
            Value::Integer(number) => Ok(number as f64),
            Value::Word(word) => word.parse().map_err(|_| Value::Word(word)),
            other => Err(other),
        })
    }

    /// A number from 0 to 1.
    pub(super) fn ratio(&mut self, key: &str) -> Option<f64> {
        let ratio = self.float(key)?;
        if (0.0..=1.0).contains(&ratio) {
            return Some(ratio);
        }
        self.refuse(key, format!("is {ratio}; give a number from 0 to 1"));
        None
    }

    /// A duration whose bounds are checked later: here they are only named in messages.
    pub(super) fn signed_duration(&mut self, key: &str, allowed: RangeInclusive<Duration>) -> Option<SignedDuration> {
        self.read(key, &a_duration(&allowed), |value| duration(&value).ok_or(value))
    }

    pub(super) fn duration(&mut self, key: &str, allowed: RangeInclusive<Duration>) -> Option<Duration> {
        self.read(key, &a_duration(&allowed), |value| {
            let duration = duration(&value).and_then(|duration| Duration::try_from(duration).ok());
            duration.filter(|duration| allowed.contains(duration)).ok_or(value)
        })
    }

    /// A list; where each item was written is remembered.
    pub(super) fn list(&mut self, key: &str) -> Vec<Node> {
        let list = self.read(key, "a list", |value| match value {
            Value::List(items) => Ok(items),
            other => Err(other),
        });
        let list = list.unwrap_or_default();
        self.items.insert(key.to_owned(), list.iter().map(|node| node.origin.clone()).collect());
        list
    }

    pub(super) fn texts(&mut self, key: &str) -> Vec<String> {
        self.items(key, "a quoted string", Value::text)
    }

    /// A list of whole numbers.
    pub(super) fn numbers<T>(&mut self, key: &str, allowed: RangeInclusive<T>) -> Vec<T>
    where
        T: TryFrom<i64> + PartialOrd + Display + Default,
    {
        let words = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        self.items(key, &words, |value| value.integer().filter(|number| allowed.contains(number)).ok_or(value))
    }

    /// The items of a list, with a placeholder for each invalid one.
    fn items<T: Default>(&mut self, key: &str, allowed: &str, read: impl Fn(Value) -> Result<T, Value>) -> Vec<T> {
        let mut items = Vec::new();
        let list = self.list(key);
        let length = list.len();
        for (number, node) in list.into_iter().enumerate() {
            if self.gives_up(length - number) {
                break;
            }
            items.push(read(node.value).unwrap_or_else(|value| {
                self.refuse(&format!("{key}[{number}]"), format!("is {value}; give {allowed}"));
                T::default()
            }));
        }
        items
    }

    /// A table of any shape, as a payload.
    pub(super) fn payload(&mut self, key: &str) -> Payload {
        let table = self.read(key, "a table", |value| match value {
            Value::Table(table) => Ok(table),
            other => Err(other),
        });
        let object = json_object(table.unwrap_or_default()).map_err(|(origin, problem)| (Some(origin), problem));
        let payload = object.and_then(|object| Payload::from_json(&object).map_err(|Malformed(why)| (None, why)));
        payload.unwrap_or_else(|(origin, problem)| {
            self.origins.extend(origin.map(|origin| (key.to_owned(), origin)));
            self.refuse(key, problem);
            Payload::default()
        })
    }

    /// Refuses every key that was not read. Returns the keys that were read.
    pub(super) fn finish(mut self) -> Vec<String> {
        let rest = std::mem::take(&mut self.table);
        self.refuse_rest("", rest);
        for (name, node) in std::mem::take(&mut self.environment) {
            if self.gives_up(1) {
                continue;
            }
            let variables: Vec<_> = self.known.iter().map(|key| variable_name(key)).collect();
            let hint = match nearest(&name, variables.iter().map(String::as_str)) {
                Some(variable) => format!("; did you mean {variable}?"),
                None => format!("; a setting's variable is {PREFIX} and its key, such as {PREFIX}SERVER_LISTEN"),
            };
            self.problems.push(Problem::new(node.origin, "", format!("sets nothing{hint}")));
        }
        self.known
    }

    fn refuse_rest(&mut self, prefix: &str, rest: Table) {
        for (name, node) in rest {
            if self.gives_up(1) {
                continue;
            }
            let key = format!("{prefix}{name}");
            let below = format!("{key}.");
            let is_table = self.known.iter().any(|known| known.starts_with(&below));
            let problem = match node.value {
                Value::Table(table) if is_table => {
                    self.refuse_rest(&below, table);
                    continue;
                }
                value if is_table => format!("is {value}; it is a table, so write [{key}]"),
                _ => self.unknown(prefix, &name),
            };
            self.problems.push(Problem::new(node.origin, format!("{}{key}", self.subject), problem));
        }
    }

    fn unknown(&self, prefix: &str, name: &str) -> String {
        let mut siblings: Vec<_> = self
            .known
            .iter()
            .filter_map(|known| known.strip_prefix(prefix))
            .map(|known| known.split_once('.').map_or(known, |(name, _)| name))
            .collect();
        siblings.sort_unstable();
        siblings.dedup();
        let elsewhere = self.known.iter().find(|known| known.rsplit_once('.').is_some_and(|(_, last)| last == name));
        match (nearest(name, siblings.iter().copied()), elsewhere) {
            (Some(sibling), _) => format!("is unknown; did you mean {prefix}{sibling}?"),
            (None, Some(elsewhere)) => format!("is unknown; did you mean {elsewhere}?"),
            (None, None) => format!("is unknown; known here are {}", siblings.join(", ")),
        }
    }
}

/// The name of the environment variable for `key`.
pub(super) fn variable_name(key: &str) -> String {
    // ORCHESTRATOR_ORCHESTRATOR_ID would say it twice.
    let key = key.strip_prefix("orchestrator_").unwrap_or(key);
    format!("{PREFIX}{}", key.replace('.', "_").to_uppercase())
}

/// A text without the password of a URL in it.
fn without_password(text: String) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text };
    match rest.split_once('@').and_then(|(user, host)| Some((user.split_once(':')?.0, host))) {
        Some((user, host)) => format!("{scheme}://{user}@{host}"),
        None => text,
    }
}

fn duration(value: &Value) -> Option<SignedDuration> {
    match value {
        Value::Text(text) | Value::Word(text) => text.parse().ok(),
        _ => None,
    }
}

fn a_duration(allowed: &RangeInclusive<Duration>) -> String {
    let [low, high] = [*allowed.start(), *allowed.end()].map(short);
    format!("a duration with its unit, such as \"5s\", \"1m 30s\" or \"48h\", from {low} to {high}")
}

fn short(duration: Duration) -> String {
    SignedDuration::try_from(duration).map_or_else(|_| format!("{duration:?}"), |duration| format!("{duration:#}"))
}
