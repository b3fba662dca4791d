//! Rows of databases, and what their columns mean. All databases have the same columns.

use bytes::Bytes;
use jiff::Timestamp;

use crate::{
    model::{
        CycleId, CycleState, Epoch, EventKind, Identity, Name, Output, ParentCycle, Payload, Revision, TraceId, Trigger,
    },
    ports::{AuditEntry, OpenCycle, Record, Stage, TriggerKind},
};

/// A value of a row. Truth values are integers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Integer(i64),
    Real(f64),
    Text(&'a [u8]),
    Blob(&'a [u8]),
}

/// A row of a database.
pub(super) trait Row {
    /// The value of a column.
    ///
    /// # Errors
    /// The row does not have this column, or a value of a kind that none has.
    fn value(&self, column: &str) -> Result<Value<'_>, Wrong>;
}

/// A value that no version of this software has written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its {column} {problem}")]
pub(super) struct Wrong {
    column: String,
    problem: String,
}

impl Wrong {
    /// The problem of the value of a column, which reads well behind the name of that.
    pub(super) fn new(column: &str, problem: impl Into<String>) -> Self {
        Self { column: column.to_owned(), problem: problem.into() }
    }

    /// The problem of a value of another kind.
    pub(super) fn kind(column: &str, value: Value<'_>, expected: &str) -> Self {
        let found = match value {
            Value::Null => "missing".to_owned(),
            Value::Integer(number) => number.to_string(),
            Value::Real(number) => number.to_string(),
            Value::Text(_) => "a text".to_owned(),
            Value::Blob(_) => "bytes".to_owned(),
        };
        Self::new(column, format!("is {found}, and not {expected}"))
    }

    fn meaning(column: &str, number: i64) -> Self {
        Self::new(column, format!("is {number}, which has no meaning"))
    }
}

/// A row with its record.
pub(super) fn record(row: &dyn Row) -> Result<Record, Wrong> {
    Ok(Record { bytes: bytes(row, "record")?, ..found(row)? })
}

/// A row without its record.
pub(super) fn found(row: &dyn Row) -> Result<Record, Wrong> {
    Ok(Record {
        cycle_id: CycleId(number(row, "cycle_id")?),
        revision: Revision(number(row, "revision")?),
        epoch: Epoch(number(row, "epoch")?),
        state: state(row)?,
        trigger: trigger(row)?,
        request_id: optional_text(row, "request_id")?,
        triggered_by: identity(row, "triggered_by")?,
        finished_at: time(row, "finished_at")?,
        bytes: Bytes::new(),
    })
}

/// The leaf of a record; `None` if it is older than the log.
pub(super) fn leaf(row: &dyn Row) -> Result<Option<u64>, Wrong> {
    match row.value("leaf")? {
        Value::Null => Ok(None),
        _ => number(row, "leaf").map(Some),
    }
}

/// An audit event without its bytes.
pub(super) fn event(row: &dyn Row) -> Result<AuditEntry, Wrong> {
    let kind = integer_of(row, "kind")?;
    Ok(AuditEntry {
        kind: EventKind::ALL
            .into_iter()
            .find(|known| kind_number(*known) == kind)
            .ok_or_else(|| Wrong::meaning("kind", kind))?,
        time: time(row, "time")?,
        caller: text(row, "caller")?,
        rpc: text(row, "rpc")?,
        denied: flag(row, "denied")?,
        bytes: Bytes::new(),
    })
}

/// An open cycle.
pub(super) fn open_cycle(row: &dyn Row) -> Result<OpenCycle, Wrong> {
    let cycle_id = CycleId(number(row, "cycle_id")?);
    let trigger = trigger(row)?;
    if trigger == Trigger::Unknown {
        return Ok(unknown_cycle(cycle_id, Stage::Unknown));
    }
    let trace_id = optional_bytes(row, "trace_id")?.map(|trace_id| {
        let bytes = <[u8; 16]>::try_from(&trace_id[..]);
        bytes.map_err(|_| Wrong::new("trace_id", format!("has {} bytes, and not 16", trace_id.len())))
    });
    Ok(OpenCycle {
        cycle_id,
        trigger,
        scheduled_at: time(row, "scheduled_at")?,
        request_id: optional_text(row, "request_id")?,
        triggered_by: identity(row, "triggered_by")?,
        trace_id: trace_id.transpose()?.map(|bytes| TraceId(u128::from_be_bytes(bytes))),
        audit: optional_bytes(row, "audit")?,
        stage: match row.value("started_at")? {
            Value::Null => Stage::Waiting(optional_bytes(row, "request")?),
            _ => Stage::Begun(time(row, "started_at")?),
        },
    })
}

/// The output of a subsystem.
pub(super) fn output(row: &dyn Row) -> Result<Output, Wrong> {
    let payload = Payload::check(bytes(row, "payload")?);
    let payload = payload.map_err(|malformed| Wrong::new("payload", format!("can't be used: {malformed}")))?;
    Ok(Output { cycle_id: CycleId(number(row, "cycle_id")?), payload })
}

/// An open cycle of which only the id is known.
pub(super) fn unknown_cycle(cycle_id: CycleId, stage: Stage) -> OpenCycle {
    OpenCycle {
        cycle_id,
        trigger: Trigger::Unknown,
        scheduled_at: Timestamp::UNIX_EPOCH,
        request_id: None,
        triggered_by: None,
        trace_id: None,
        audit: None,
        stage,
    }
}

// ---------------------------------------------------------------------------------------------------------------
// What is written

/// The columns of an open cycle that depend on its stage: its trigger, when it has begun, and the request.
pub(super) fn stage_columns(open: &OpenCycle) -> (i64, Option<i64>, Option<&[u8]>) {
    match &open.stage {
        Stage::Waiting(request) => (trigger_number(&open.trigger), None, request.as_deref()),
        Stage::Begun(at) => (trigger_number(&open.trigger), Some(nanoseconds(*at)), None),
        Stage::Unknown | Stage::Unsealed => (trigger_number(&Trigger::Unknown), None, None),
    }
}

/// The numbers in the schema, which are those of the contract.
const STATES: [CycleState; 5] = CycleState::ALL;

pub(super) fn state_number(state: CycleState) -> i64 {
    (1..).zip(STATES).find(|(_, known)| *known == state).map_or(0, |(number, _)| number)
}

pub(super) fn trigger_number(trigger: &Trigger) -> i64 {
    match TriggerKind::of(trigger) {
        TriggerKind::Unknown => 0,
        TriggerKind::Manual => 1,
        TriggerKind::Loop => 2,
        TriggerKind::Parent => 3,
    }
}

pub(super) fn kind_number(kind: EventKind) -> i64 {
    match kind {
        EventKind::Change => 1,
        EventKind::Calls => 2,
        EventKind::Denials => 3,
    }
}

/// Ids and counts stay far below 63 bits.
pub(super) fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// In 64 bits, which reach to the year 2262.
pub(super) fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

// ---------------------------------------------------------------------------------------------------------------
// Columns

fn state(row: &dyn Row) -> Result<CycleState, Wrong> {
    let number = integer_of(row, "state")?;
    let state = (1..).zip(STATES).find(|(known, _)| *known == number);
    state.map(|(_, state)| state).ok_or_else(|| Wrong::meaning("state", number))
}

fn trigger(row: &dyn Row) -> Result<Trigger, Wrong> {
    match integer_of(row, "trigger")? {
        0 => Ok(Trigger::Unknown),
        1 => Ok(Trigger::Manual),
        2 => Ok(Trigger::Loop(name(row, "loop")?)),
        3 => parent(row).map(Trigger::Parent),
        number => Err(Wrong::meaning("trigger", number)),
    }
}

/// The cycle of a parent, which is the `request_id` of the cycle that it started.
fn parent(row: &dyn Row) -> Result<ParentCycle, Wrong> {
    let request_id = optional_text(row, "request_id")?;
    let parent = request_id.as_deref().and_then(ParentCycle::parse);
    parent.ok_or_else(|| Wrong::new("request_id", "is not that of a parent's cycle"))
}

pub(super) fn integer_of(row: &dyn Row, column: &str) -> Result<i64, Wrong> {
    match row.value(column)? {
        Value::Integer(number) => Ok(number),
        other => Err(Wrong::kind(column, other, "a number")),
    }
}

pub(super) fn optional_integer(row: &dyn Row, column: &str) -> Result<Option<i64>, Wrong> {
    match row.value(column)? {
        Value::Null => Ok(None),
        _ => integer_of(row, column).map(Some),
    }
}

/// A number that is not negative, as all are that this software writes.
pub(super) fn number(row: &dyn Row, column: &str) -> Result<u64, Wrong> {
    let number = integer_of(row, column)?;
    u64::try_from(number).map_err(|_| Wrong::new(column, format!("is {number}, which is negative")))
}

pub(super) fn flag(row: &dyn Row, column: &str) -> Result<bool, Wrong> {
    Ok(integer_of(row, column)? != 0)
}

pub(super) fn time(row: &dyn Row, column: &str) -> Result<Timestamp, Wrong> {
    let nanoseconds = integer_of(row, column)?;
    Timestamp::from_nanosecond(nanoseconds.into()).map_err(|error| Wrong::new(column, format!("is no time: {error}")))
}

pub(super) fn optional_text(row: &dyn Row, column: &str) -> Result<Option<String>, Wrong> {
    match row.value(column)? {
        Value::Null => Ok(None),
        Value::Text(text) => of_utf8(column, text).map(Some),
        other => Err(Wrong::kind(column, other, "a text")),
    }
}

fn text(row: &dyn Row, column: &str) -> Result<String, Wrong> {
    optional_text(row, column)?.ok_or_else(|| Wrong::kind(column, Value::Null, "a text"))
}

fn of_utf8(column: &str, text: &[u8]) -> Result<String, Wrong> {
    String::from_utf8(text.to_vec()).map_err(|error| Wrong::new(column, format!("is no text: {error}")))
}

fn optional_bytes(row: &dyn Row, column: &str) -> Result<Option<Bytes>, Wrong> {
    match row.value(column)? {
        Value::Null => Ok(None),
        Value::Blob(bytes) => Ok(Some(Bytes::copy_from_slice(bytes))),
        other => Err(Wrong::kind(column, other, "bytes")),
    }
}

pub(super) fn bytes(row: &dyn Row, column: &str) -> Result<Bytes, Wrong> {
    optional_bytes(row, column)?.ok_or_else(|| Wrong::kind(column, Value::Null, "bytes"))
}

pub(super) fn name(row: &dyn Row, column: &str) -> Result<Name, Wrong> {
    let name = text(row, column)?;
    Name::parse(&name).map_err(|error| Wrong::new(column, format!("can't be used: {error}")))
}

pub(super) fn identity(row: &dyn Row, column: &str) -> Result<Option<Identity>, Wrong> {
    let text = optional_text(row, column)?;
    let identity = text.map(|text| Identity::parse(&text)).transpose();
    identity.map_err(|error| Wrong::new(column, error.to_string()))
}

pub(super) fn json<T: serde::de::DeserializeOwned>(row: &dyn Row, column: &str) -> Result<Option<T>, Wrong> {
    let text = optional_text(row, column)?;
    let value = text.map(|text| serde_json::from_str(&text)).transpose();
    value.map_err(|error| Wrong::new(column, format!("can't be used: {error}")))
}

/// A primary key as text, if possible.
pub(super) fn key(value: Value<'_>) -> String {
    match value {
        Value::Integer(number) => number.to_string(),
        Value::Text(text) => String::from_utf8_lossy(text).into_owned(),
        Value::Null | Value::Real(_) | Value::Blob(_) => String::new(),
    }
}
