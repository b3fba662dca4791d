//! Rows of tables, and the values that they contain.

use bytes::Bytes;
use jiff::Timestamp;
use rusqlite::{Connection, Row, RowIndex, types::ValueRef};

use super::log;
use crate::{
    ledger::Entry,
    model::{CycleId, CycleState, Epoch, EventKind, Identity, Name, ParentCycle, Revision, TraceId, Trigger},
    ports::{AuditEntry, Check, Found, OpenCycle, Record, Stage, TriggerKind, Unreadable},
};

/// In this order, so that a row can be examined without reading the record, which is last and may be large.
pub(super) const COLUMNS: &str =
    "revision, cycle_id, epoch, state, trigger, loop, request_id, triggered_by, finished_at, leaf, record";

/// Condition that a row has a place in the history: the revision of an earlier version may have been unreadable. Reads
/// by revision don't find such a row.
pub(super) const HAS_REVISION: &str = "revision > 0";

/// The entry in the table `control`; `NULL` if it is larger than any that this software writes: about 60 KiB. Another
/// program may have put one there that takes as much memory as the machine has.
pub(super) const CONTROL_ENTRY: &str = "CASE WHEN length(entry) <= 1048576 THEN entry END";

/// Most bytes of a record that is read: the largest `cycle.max_record_bytes`.
pub(super) const MAX_RECORD: usize = 64 << 20;

/// The epoch of a database.
pub(super) fn epoch(connection: &Connection) -> rusqlite::Result<Epoch> {
    connection.query_row("SELECT epoch FROM meta", [], |row| number(row, 0)).map(Epoch)
}

/// How a record is read.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    pub(super) check: Check,
    /// The highest revision of the records that are older than the log: by the process that has the store open, since
    /// another program can change that number in the table `meta` meanwhile.
    pub(super) unlogged_to: Revision,
}

/// A row with its record, if both can be read, and the record has the bytes that were written.
pub(super) fn read(connection: &Connection, row: &Row<'_>, Reading { check, unlogged_to }: Reading) -> Found {
    let unreadable = |problem| Unreadable {
        cycle_id: CycleId(number(row, "cycle_id").unwrap_or_default()),
        revision: Revision(number(row, "revision").unwrap_or_default()),
        problem,
    };
    if let Ok(ValueRef::Blob(bytes)) = row.get_ref("record")
        && bytes.len() > MAX_RECORD
    {
        return Err(unreadable(format!("it is {} bytes long", bytes.len())));
    }
    let record = record(row).map_err(|error| unreadable(error.to_string()))?;
    match leaf(row).map_err(|error| unreadable(error.to_string()))? {
        Some(leaf) => log::check(connection, leaf, Entry::Cycle(&record.bytes)).map_err(unreadable)?,
        None if record.revision <= unlogged_to => {}
        None => return Err(unreadable("it is not in the log, although it was written since the log began".into())),
    }
    check(&record).map_err(unreadable)?;
    Ok(record)
}

/// A row with its record.
pub(super) fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let bytes: Vec<u8> = row.get("record")?;
    Ok(Record { bytes: bytes.into(), ..found(row)? })
}

/// A row without its record.
pub(super) fn found(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record {
        cycle_id: CycleId(number(row, "cycle_id")?),
        revision: Revision(number(row, "revision")?),
        epoch: Epoch(number(row, "epoch")?),
        state: state(row)?,
        trigger: trigger(row)?,
        request_id: row.get("request_id")?,
        triggered_by: identity(row, "triggered_by")?,
        finished_at: time(row, "finished_at")?,
        bytes: Bytes::new(),
    })
}

/// The leaf of a record; `None` if it is older than the log.
pub(super) fn leaf(row: &Row<'_>) -> rusqlite::Result<Option<u64>> {
    match row.get_ref("leaf")? {
        ValueRef::Null => Ok(None),
        _ => number(row, "leaf").map(Some),
    }
}

/// An audit event.
pub(super) fn event(row: &Row<'_>) -> rusqlite::Result<AuditEntry> {
    let bytes: Vec<u8> = row.get("event")?;
    let kind = row.get("kind")?;
    Ok(AuditEntry {
        kind: EventKind::ALL
            .into_iter()
            .find(|known| kind_number(*known) == kind)
            .ok_or_else(|| wrong(row, "kind", Unknown(kind)))?,
        time: time(row, "time")?,
        caller: row.get("caller")?,
        rpc: row.get("rpc")?,
        denied: row.get("denied")?,
        bytes: bytes.into(),
    })
}

pub(super) fn open_cycle(row: &Row<'_>) -> rusqlite::Result<OpenCycle> {
    let cycle_id = CycleId(number(row, "cycle_id")?);
    let trigger = trigger(row)?;
    if trigger == Trigger::Unknown {
        return Ok(unknown_cycle(cycle_id, Stage::Unknown));
    }
    let (started_at, request): (Option<i64>, Option<Vec<u8>>) = (row.get("started_at")?, row.get("request")?);
    let trace_id: Option<[u8; 16]> = row.get("trace_id")?;
    Ok(OpenCycle {
        cycle_id,
        trigger,
        scheduled_at: time(row, "scheduled_at")?,
        request_id: row.get("request_id")?,
        triggered_by: identity(row, "triggered_by")?,
        trace_id: trace_id.map(|bytes| TraceId(u128::from_be_bytes(bytes))),
        audit: row.get::<_, Option<Vec<u8>>>("audit")?.map(Into::into),
        stage: match started_at {
            Some(_) => Stage::Begun(time(row, "started_at")?),
            None => Stage::Waiting(request.map(Into::into)),
        },
    })
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

/// The numbers in the schema, which are those of the contract.
const STATES: [CycleState; 5] = CycleState::ALL;

pub(super) fn state_number(state: CycleState) -> i64 {
    (1..).zip(STATES).find(|(_, known)| *known == state).map_or(0, |(number, _)| number)
}

fn state(row: &Row<'_>) -> rusqlite::Result<CycleState> {
    let number: i64 = row.get("state")?;
    let state = (1..).zip(STATES).find(|(known, _)| *known == number);
    state.map(|(_, state)| state).ok_or_else(|| wrong(row, "state", Unknown(number)))
}

pub(super) fn trigger_number(trigger: &Trigger) -> i64 {
    match TriggerKind::of(trigger) {
        TriggerKind::Unknown => 0,
        TriggerKind::Manual => 1,
        TriggerKind::Loop => 2,
        TriggerKind::Parent => 3,
    }
}

fn trigger(row: &Row<'_>) -> rusqlite::Result<Trigger> {
    match row.get("trigger")? {
        0 => Ok(Trigger::Unknown),
        1 => Ok(Trigger::Manual),
        2 => Ok(Trigger::Loop(name(row, "loop")?)),
        3 => parent(row).map(Trigger::Parent),
        number => Err(wrong(row, "trigger", Unknown(number))),
    }
}

/// The cycle of a parent, which is the `request_id` of the cycle that it started.
fn parent(row: &Row<'_>) -> rusqlite::Result<ParentCycle> {
    let request_id: String = row.get("request_id")?;
    ParentCycle::parse(&request_id).ok_or_else(|| wrong(row, "request_id", NotOfAParent))
}

/// A number that is not negative, as all are that this software writes.
pub(super) fn number(row: &Row<'_>, column: impl RowIndex) -> rusqlite::Result<u64> {
    let number: i64 = row.get(column)?;
    let index = column.idx(row.as_ref())?;
    u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(index, number))
}

/// Ids and counts stay far below the 63 bits of SQLite's integers.
pub(super) fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// In 64 bits, which reach to the year 2262.
pub(super) fn kind_number(kind: EventKind) -> i64 {
    match kind {
        EventKind::Change => 1,
        EventKind::Calls => 2,
        EventKind::Denials => 3,
    }
}

pub(super) fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

pub(super) fn time(row: &Row<'_>, column: &str) -> rusqlite::Result<Timestamp> {
    let nanoseconds: i64 = row.get(column)?;
    Timestamp::from_nanosecond(nanoseconds.into()).map_err(|error| wrong(row, column, error))
}

pub(super) fn name(row: &Row<'_>, column: &str) -> rusqlite::Result<Name> {
    let name: String = row.get(column)?;
    Name::parse(&name).map_err(|error| wrong(row, column, error))
}

pub(super) fn identity(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<Identity>> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| Identity::parse(&text)).transpose().map_err(|error| wrong(row, column, error))
}

pub(super) fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<T>> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| wrong(row, column, error))
}

pub(super) fn to_json<T: serde::Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// A primary key as text, if possible.
pub(super) fn key(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        ValueRef::Null | ValueRef::Real(_) | ValueRef::Blob(_) => String::new(),
    }
}

/// A value that no version of this software has written.
pub(super) fn wrong(
    row: &Row<'_>,
    column: &str,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    let index = row.as_ref().column_index(column).unwrap_or(0);
    rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Null, Box::new(error))
}

#[derive(Debug, thiserror::Error)]
#[error("{0} has no meaning")]
struct Unknown(i64);

#[derive(Debug, thiserror::Error)]
#[error("it is not that of a parent's cycle")]
struct NotOfAParent;
