//! One commit: one statement, which writes only if no other process has written since the commit before.

use std::collections::{BTreeMap, BTreeSet};

use tokio::{select, time::sleep};

use super::{
    connect::{ANSWER, Connection, Connector, Server},
    error::{ends_connection, explain, is_ambiguous, is_worth_repeating},
    leader::{LOCK_TIMEOUT, LastClaim, end_stalled, epoch_of_leader},
    parameter::Parameter,
};
use crate::{
    model::{Epoch, Name, Output},
    ports::{Removal, StoreError, Write},
    store::{
        chain::{Answer, Barrier, Database, Stored, Token},
        copying::NotServed,
        frontier::Appended,
        pruning::needless_hashes,
        row::{
            Value, integer, integer_of, kind_number, nanoseconds, number, optional_text, stage_columns, state_number,
            trigger_number,
        },
        seal::{LOOPS, OPEN_CYCLES, OUTPUTS, SUBSYSTEMS, meta_columns},
        term::{Next, Term},
    },
};

/// The start of a statement that raises the durability of its transaction, with further settings of that.
macro_rules! durable {
    ($further:literal) => {
        concat!(
            "durable AS (
    SELECT set_config('synchronous_commit',
                      CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
                      true)",
            $further,
            ")"
        )
    };
}

/// Raises the durability of the transaction to what the server is set up for, and never lowers it.
pub(super) const DURABLE: &str = durable!("");
/// The same outside of a term. A session that locks a row so has the name of one that writes until the statement ends:
/// if it stops meanwhile, a candidate ends it.
pub(super) const DURABLE_BESIDE: &str = durable!(", set_config('application_name', 'orchestrator/beside', true)");
/// A token that no other process has: the first bits of a random id.
pub(super) const RANDOM_TOKEN: &str = "('x' || left(replace(gen_random_uuid()::text, '-', ''), 15))::bit(60)::bigint";
/// Most times that a statement is executed that another transaction has met.
const ATTEMPTS: usize = 3;
/// The parameters that the chain gives: the token before, and the own one.
const OF_CHAIN: usize = 2;

/// A commit as a statement, whose first two parameters are the token before it and its own.
pub(super) struct Statement<'w> {
    text: String,
    parameters: Vec<Box<dyn Parameter + 'w>>,
}

/// Rows of one table that are sealed anew: their keys and their seals.
#[derive(Default)]
pub(super) struct Renewed {
    pub(super) numbers: Vec<i64>,
    pub(super) names: Vec<String>,
    pub(super) seals: Vec<Vec<u8>>,
}

/// The rows that are read before a commit that removes entries, renames subsystems, or seals rows anew.
#[derive(Default)]
pub(super) struct Before {
    /// The leaves of the control entries that go with what is removed.
    pub(super) controls: Vec<u64>,
    /// The outputs that are stored under the former names, except those that another program has changed.
    pub(super) outputs: BTreeMap<Name, Output>,
    pub(super) renewed: BTreeMap<&'static str, Renewed>,
}

/// Each output that a write changes, as it is afterwards; `None` if it is removed. `stored` has those under the former
/// names. One statement writes each row once, so this has one state for each name. An output that another program has
/// changed stays as it is: the next start finds that its seal is wrong.
fn outputs_after(write: &Write, mut stored: BTreeMap<Name, Output>) -> BTreeMap<&Name, Option<Output>> {
    let mut after: BTreeMap<_, _> = write.outputs.iter().map(|(name, output)| (name, Some(output.clone()))).collect();
    for (former, name) in &write.renamed {
        let moved = after.get(former).cloned().unwrap_or_else(|| stored.remove(former));
        if moved.is_some() {
            after.extend([(name, moved), (former, None)]);
        }
    }
    after.extend(write.subsystems.iter().filter(|(_, stored)| stored.is_none()).map(|(name, _)| (name, None)));
    after
}

/// Puts a statement together.
struct Builder<'w, 's> {
    schema: &'s str,
    parameters: Vec<Box<dyn Parameter + 'w>>,
    parts: Vec<String>,
    /// Conditions without which the whole statement fails.
    checks: Vec<String>,
}

/// A column of inserted rows.
struct Column<'w> {
    name: &'static str,
    values: Box<dyn Parameter + 'w>,
}

fn column<'w, T>(name: &'static str, values: impl Iterator<Item = T>) -> Column<'w>
where
    Vec<T>: Parameter + 'w,
{
    Column { name, values: Box::new(values.collect::<Vec<_>>()) }
}

impl<'w> Builder<'w, '_> {
    fn bind(&mut self, value: impl Parameter + 'w) -> String {
        self.bind_boxed(Box::new(value))
    }

    fn bind_boxed(&mut self, value: Box<dyn Parameter + 'w>) -> String {
        self.parameters.push(value);
        format!("${}", OF_CHAIN + self.parameters.len())
    }

    /// Rows of arrays, one array for each column.
    fn rows(&mut self, columns: Vec<Column<'w>>) -> String {
        let names = columns.iter().map(|column| column.name).collect::<Vec<_>>().join(", ");
        let arrays: Vec<_> = columns.into_iter().map(|column| self.bind_boxed(column.values)).collect();
        format!("unnest({}) AS u ({names})", arrays.join(", "))
    }

    /// Inserts rows into a table. With `key`, they replace those with the same one.
    fn insert(&mut self, table: &str, columns: Vec<Column<'w>>, key: Option<&str>) {
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        let conflict = key.map_or_else(String::new, |key| {
            let set: Vec<_> = names.iter().map(|name| format!("{name} = EXCLUDED.{name}")).collect();
            format!(" ON CONFLICT ({key}) DO UPDATE SET {}", set.join(", "))
        });
        let rows = self.rows(columns);
        let (schema, names) = (self.schema, names.join(", "));
        self.parts.push(format!(
            "put_{table} AS (INSERT INTO {schema}.{table} ({names}) SELECT u.* FROM {rows}, fence{conflict})"
        ));
    }

    /// Deletes rows of a table: those that this condition joins with `u`. If `expected` is given, as many must be
    /// there.
    fn delete(&mut self, table: &str, columns: Vec<Column<'w>>, condition: &str, expected: Option<usize>) {
        let rows = self.rows(columns);
        let schema = self.schema;
        self.parts.push(format!(
            "gone_{table} AS (DELETE FROM {schema}.{table} t USING {rows}, fence WHERE {condition} RETURNING 1)"
        ));
        if let Some(expected) = expected {
            let expected = self.bind(i64::try_from(expected).unwrap_or(i64::MAX));
            self.checks.push(format!("(SELECT count(*) FROM gone_{table}) = {expected}"));
        }
    }

    /// Deletes the rows of a table that have these names, if any.
    fn delete_names(&mut self, table: &str, names: Vec<&'w str>) {
        if !names.is_empty() {
            self.delete(table, vec![column("name", names.into_iter())], "t.name = u.name", None);
        }
    }
}

/// A number as the smallest ones are stored.
fn small(number: i64) -> i16 {
    i16::try_from(number).unwrap_or(i16::MAX)
}

fn text(value: Option<&str>) -> Value<'_> {
    value.map_or(Value::Null, |text| Value::Text(text.as_bytes()))
}

fn blob(value: Option<&[u8]>) -> Value<'_> {
    value.map_or(Value::Null, Value::Blob)
}

fn number_or_null(value: Option<i64>) -> Value<'static> {
    value.map_or(Value::Null, Value::Integer)
}

impl<'w> Statement<'w> {
    /// The commit of a write that appends and changes this.
    ///
    /// # Errors
    /// Settings have no JSON.
    pub(super) fn of(
        schema: &str,
        term: &Term,
        write: &'w Write,
        (appended, next): (&Appended, &Next),
        (removed, before): (&[u64], Before),
    ) -> Result<Self, serde_json::Error> {
        let mut builder = Builder { schema, parameters: Vec::new(), parts: Vec::new(), checks: Vec::new() };
        builder.fence(term, appended, next);
        builder.put_cycles(term, write, appended);
        builder.append(write, appended);
        if !write.removal.is_empty() {
            builder.remove(term, &write.removal, (appended, next), removed, &before.controls);
        }
        let outputs = outputs_after(write, before.outputs);
        builder.put_outputs(term, &outputs);
        builder.put_subsystems(term, write)?;
        builder.put_loops(term, write)?;
        builder.renew(write, &outputs, before.renewed);
        let Builder { parameters, parts, checks, .. } = builder;
        let result = if checks.is_empty() {
            "1".to_owned()
        } else {
            // Otherwise the statement fails as a whole.
            format!("1 / (CASE WHEN {} THEN 1 ELSE 0 END)", checks.join(" AND "))
        };
        Ok(Self { text: format!("WITH {DURABLE},\n{}\nSELECT {result} FROM fence", parts.join(",\n")), parameters })
    }
}

impl<'w> Builder<'w, '_> {
    /// Writes the row of the table `meta`, if nothing else has.
    fn fence(&mut self, term: &Term, appended: &Appended, next: &Next) {
        let log = &appended.log.frontier;
        let values = next.meta.into_iter().chain(next.counts.columns());
        let seal = term.sealer.end(log, values.clone().map(Value::Integer)).to_vec();
        let mut set: Vec<_> = meta_columns()
            .zip(values)
            .map(|(column, value)| {
                let value = if column == "is_closed" { self.bind(value != 0) } else { self.bind(value) };
                format!("{column} = {value}")
            })
            .collect();
        let (size, seal) = (self.bind(integer(log.size())), self.bind(seal));
        set.extend(["token = $2".to_owned(), format!("log_size = {size}"), format!("seal = {seal}")]);
        let current = self.bind(integer(term.current.0));
        let schema = self.schema;
        self.parts.push(format!(
            "fence AS (UPDATE {schema}.meta SET {} FROM durable WHERE id = 0 AND token = $1 AND epoch = {current}
                       RETURNING 1)",
            set.join(", ")
        ));
    }

    fn put_cycles(&mut self, term: &Term, write: &'w Write, appended: &Appended) {
        if !write.open.is_empty() {
            let open = || write.open.iter();
            let stages: Vec<_> = open().map(stage_columns).collect();
            let callers: Vec<_> = open().map(|open| open.triggered_by.as_ref().map(ToString::to_string)).collect();
            let traces: Vec<_> = open().map(|open| open.trace_id.map(|id| id.0.to_be_bytes().to_vec())).collect();
            let seals: Vec<_> = open()
                .zip(&stages)
                .zip(callers.iter().zip(&traces))
                .map(|((open, (trigger, started_at, request)), (caller, trace))| {
                    let values = [
                        Value::Integer(integer(open.cycle_id.0)),
                        Value::Integer(*trigger),
                        text(open.trigger.loop_name().map(Name::as_str)),
                        Value::Integer(nanoseconds(open.scheduled_at)),
                        number_or_null(*started_at),
                        text(open.request_id.as_deref()),
                        text(caller.as_deref()),
                        blob(trace.as_deref()),
                        blob(*request),
                        blob(open.audit.as_deref()),
                    ];
                    term.sealer.row(&OPEN_CYCLES, values).to_vec()
                })
                .collect();
            let columns = vec![
                column("cycle_id", open().map(|open| integer(open.cycle_id.0))),
                column("trigger", stages.iter().map(|(trigger, ..)| small(*trigger))),
                column("loop", open().map(|open| open.trigger.loop_name().map(Name::as_str))),
                column("scheduled_at", open().map(|open| nanoseconds(open.scheduled_at))),
                column("started_at", stages.iter().map(|(_, started_at, _)| *started_at)),
                column("request_id", open().map(|open| open.request_id.as_deref().map(str::as_bytes))),
                column("triggered_by", callers.into_iter()),
                column("trace_id", traces.into_iter()),
                column("request", stages.iter().map(|(.., request)| *request)),
                column("audit", open().map(|open| open.audit.as_deref())),
                column("seal", seals.into_iter()),
            ];
            self.insert("open_cycles", columns, Some("cycle_id"));
        }
        if write.records.is_empty() {
            return;
        }
        let records = || write.records.iter();
        // Those that are noted with this write have no row.
        let noted = term.frontier.last_cycle_id;
        let open: Vec<_> = records().map(|record| record.cycle_id).filter(|id| *id <= noted).collect();
        if !open.is_empty() {
            let ids = column("cycle_id", open.iter().map(|id| integer(id.0)));
            self.delete("open_cycles", vec![ids], "t.cycle_id = u.cycle_id", Some(open.len()));
        }
        let leaves: Vec<_> = appended.records(write).map(|(leaf, _)| integer(leaf)).collect();
        let columns = vec![
            column("revision", records().map(|record| integer(record.revision.0))),
            column("cycle_id", records().map(|record| integer(record.cycle_id.0))),
            column("epoch", records().map(|record| integer(record.epoch.0))),
            column("state", records().map(|record| small(state_number(record.state)))),
            column("trigger", records().map(|record| small(trigger_number(&record.trigger)))),
            column("loop", records().map(|record| record.trigger.loop_name().map(Name::as_str))),
            column("request_id", records().map(|record| record.request_id.as_deref().map(str::as_bytes))),
            column("triggered_by", records().map(|it| it.triggered_by.as_ref().map(ToString::to_string))),
            column("finished_at", records().map(|record| nanoseconds(record.finished_at))),
            column("leaf", leaves.into_iter()),
            column("record", records().map(|record| &record.bytes[..])),
        ];
        self.insert("cycles", columns, None);
    }

    /// Appends to the log.
    fn append(&mut self, write: &'w Write, appended: &Appended) {
        if !appended.nodes.is_empty() {
            let ids = (appended.first_node..).zip(&appended.nodes).map(|(id, _)| integer(id));
            let hashes = appended.nodes.iter().map(|hash| hash.0.to_vec());
            self.insert("hashes", vec![column("id", ids), column("hash", hashes)], None);
        }
        if !write.audit.is_empty() {
            let events = || write.audit.iter();
            let leaves: Vec<_> = appended.events(write).map(|(leaf, _)| integer(leaf)).collect();
            let columns = vec![
                column("leaf", leaves.into_iter()),
                column("kind", events().map(|event| small(kind_number(event.kind)))),
                column("time", events().map(|event| nanoseconds(event.time))),
                column("caller", events().map(|event| event.caller.as_str())),
                column("rpc", events().map(|event| event.rpc.as_str())),
                column("denied", events().map(|event| event.denied)),
                column("event", events().map(|event| &event.bytes[..])),
            ];
            self.insert("audit", columns, None);
        }
        let controls: Vec<_> = appended.control(write).collect();
        if !controls.is_empty() {
            let leaves = column("leaf", controls.iter().map(|(leaf, _)| integer(*leaf)));
            let entries = column("entry", controls.iter().map(|(_, entry)| &entry[..]));
            self.insert("control", vec![leaves, entries], None);
        }
    }

    fn remove(
        &mut self,
        term: &Term,
        Removal { records, events, .. }: &'w Removal,
        (appended, next): (&Appended, &Next),
        removed: &[u64],
        controls: &[u64],
    ) {
        if !records.is_empty() {
            let columns = vec![
                column("revision", records.iter().map(|record| integer(record.revision.0))),
                column("leaf", records.iter().map(|record| record.leaf.map(integer))),
                column("state", records.iter().map(|record| small(state_number(record.state)))),
            ];
            let condition = "t.revision = u.revision AND t.leaf IS NOT DISTINCT FROM u.leaf AND t.state = u.state";
            self.delete("cycles", columns, condition, Some(records.len()));
        }
        if !events.is_empty() {
            let columns = vec![
                column("leaf", events.iter().map(|event| integer(event.leaf))),
                column("kind", events.iter().map(|event| small(kind_number(event.kind)))),
            ];
            self.delete("audit", columns, "t.leaf = u.leaf AND t.kind = u.kind", Some(events.len()));
        }
        if !controls.is_empty() {
            let leaves = column("leaf", controls.iter().map(|leaf| integer(*leaf)));
            self.delete("control", vec![leaves], "t.leaf = u.leaf", Some(controls.len()));
        }
        let gone = |leaves| term.removed.contain_with(&next.gone, leaves);
        let needless = needless_hashes(removed, appended.log.frontier.size(), gone);
        if !needless.is_empty() {
            let columns = vec![
                column("first", needless.iter().map(|numbers| integer(numbers.start))),
                column("after", needless.iter().map(|numbers| integer(numbers.end))),
            ];
            self.delete("hashes", columns, "t.id >= u.first AND t.id < u.after", None);
        }
    }

    /// Writes the outputs that a write leaves, and removes those that it takes away.
    fn put_outputs(&mut self, term: &Term, outputs: &BTreeMap<&'w Name, Option<Output>>) {
        let stored: Vec<_> = outputs.iter().filter_map(|(name, output)| Some((name, output.as_ref()?))).collect();
        if !stored.is_empty() {
            let seals = stored.iter().map(|(name, Output { cycle_id, payload })| {
                let id = Value::Integer(integer(cycle_id.0));
                term.sealer.row(&OUTPUTS, [text(Some(name.as_str())), id, Value::Blob(payload.as_bytes())]).to_vec()
            });
            let columns = vec![
                column("name", stored.iter().map(|(name, _)| name.as_str())),
                column("cycle_id", stored.iter().map(|(_, output)| integer(output.cycle_id.0))),
                column("payload", stored.iter().map(|(_, output)| output.payload.as_bytes().to_vec())),
                column("seal", seals),
            ];
            self.insert("outputs", columns, Some("name"));
        }
        let removed = outputs.iter().filter(|(_, output)| output.is_none()).map(|(name, _)| name.as_str());
        self.delete_names("outputs", removed.collect());
    }

    fn put_subsystems(&mut self, term: &Term, write: &'w Write) -> Result<(), serde_json::Error> {
        let stored: Vec<_> = write.subsystems.iter().filter_map(|(name, it)| Some((name, it.as_ref()?))).collect();
        if !stored.is_empty() {
            let specs = stored.iter().map(|(_, it)| it.spec.as_ref().map(serde_json::to_string).transpose());
            let specs = specs.collect::<Result<Vec<_>, _>>()?;
            let leases: Vec<_> = stored
                .iter()
                .map(|(_, it)| it.lease.map(|lease| i64::try_from(lease.as_millis()).unwrap_or(i64::MAX)))
                .collect();
            let owners: Vec<_> = stored.iter().map(|(_, it)| it.owner.as_ref().map(ToString::to_string)).collect();
            let former_names = stored.iter().map(|(_, it)| {
                (!it.former_names.is_empty()).then(|| serde_json::to_string(&it.former_names)).transpose()
            });
            let former_names = former_names.collect::<Result<Vec<_>, _>>()?;
            let seals: Vec<_> = stored
                .iter()
                .zip(specs.iter().zip(&leases))
                .zip(owners.iter().zip(&former_names))
                .map(|(((name, it), (spec, lease)), (owner, former_names))| {
                    let values = [
                        text(Some(name.as_str())),
                        text(spec.as_deref()),
                        number_or_null(*lease),
                        Value::Integer(it.suspended.into()),
                        text(owner.as_deref()),
                        text(former_names.as_deref()),
                    ];
                    term.sealer.row(&SUBSYSTEMS, values).to_vec()
                })
                .collect();
            let columns = vec![
                column("name", stored.iter().map(|(name, _)| name.as_str())),
                column("spec", specs.into_iter()),
                column("lease_ms", leases.into_iter()),
                column("suspended", stored.iter().map(|(_, it)| it.suspended)),
                column("owner", owners.into_iter()),
                column("former_names", former_names.into_iter()),
                column("seal", seals.into_iter()),
            ];
            self.insert("subsystems", columns, Some("name"));
        }
        let removed = write.subsystems.iter().filter(|(_, it)| it.is_none()).map(|(name, _)| name);
        let former = write.renamed.keys().filter(|name| !write.subsystems.contains_key(*name));
        self.delete_names("subsystems", removed.chain(former).map(Name::as_str).collect());
        Ok(())
    }

    fn put_loops(&mut self, term: &Term, write: &'w Write) -> Result<(), serde_json::Error> {
        let stored: Vec<_> = write.loops.iter().filter_map(|(name, it)| Some((name, it.as_ref()?))).collect();
        if !stored.is_empty() {
            let specs = stored.iter().map(|(_, it)| it.spec.as_ref().map(serde_json::to_string).transpose());
            let specs = specs.collect::<Result<Vec<_>, _>>()?;
            let states =
                stored.iter().map(|(_, it)| serde_json::to_string(&it.state)).collect::<Result<Vec<_>, _>>()?;
            let seals: Vec<_> = stored
                .iter()
                .zip(specs.iter().zip(&states))
                .map(|((name, _), (spec, state))| {
                    let values = [text(Some(name.as_str())), text(spec.as_deref()), text(Some(state))];
                    term.sealer.row(&LOOPS, values).to_vec()
                })
                .collect();
            let columns = vec![
                column("name", stored.iter().map(|(name, _)| name.as_str())),
                column("spec", specs.into_iter()),
                column("state", states.into_iter()),
                column("seal", seals.into_iter()),
            ];
            self.insert("loops", columns, Some("name"));
        }
        let removed = write.loops.iter().filter(|(_, it)| it.is_none()).map(|(name, _)| name.as_str());
        self.delete_names("loops", removed.collect());
        Ok(())
    }

    /// Seals rows anew that the write leaves as they are.
    fn renew(
        &mut self,
        write: &Write,
        outputs: &BTreeMap<&Name, Option<Output>>,
        renewed: BTreeMap<&'static str, Renewed>,
    ) {
        let records = write.records.iter().map(|record| record.cycle_id);
        let cycles: BTreeSet<_> =
            write.open.iter().map(|open| open.cycle_id).chain(records).map(|id| integer(id.0)).collect();
        for (table, Renewed { numbers, names, seals }) in renewed {
            let is_written = |name: &str| {
                let has = |known: &Name| known.as_str() == name;
                match table {
                    "loops" => write.loops.keys().any(has),
                    "subsystems" => write.subsystems.keys().chain(write.renamed.keys()).any(has),
                    _ => outputs.keys().any(|known| has(known)),
                }
            };
            let (key, keys, seals): (_, Column<'w>, Vec<_>) = if table == OPEN_CYCLES.name {
                let kept: Vec<_> = numbers.into_iter().zip(seals).filter(|(id, _)| !cycles.contains(id)).collect();
                let (numbers, seals): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
                ("cycle_id", column("key", numbers.into_iter()), seals)
            } else {
                let kept: Vec<_> = names.into_iter().zip(seals).filter(|(name, _)| !is_written(name)).collect();
                let (names, seals): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
                ("name", column("key", names.into_iter()), seals)
            };
            if seals.is_empty() {
                continue;
            }
            let rows = self.rows(vec![keys, column("new", seals.into_iter())]);
            let schema = self.schema;
            self.parts.push(format!(
                "renewed_{table} AS (UPDATE {schema}.{table} t SET seal = u.new FROM {rows}, fence
                                     WHERE t.{key} = u.key)"
            ));
        }
    }
}

/// How long the answer to a statement is awaited. A server, or a session of it, can stop for good without an end of the
/// connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience<'a> {
    /// For [`ANSWER`]: nothing depends on whether it is executed.
    Short,
    /// For as long as it takes, such as for a standby, unless it is certain that nothing of this term can be executed
    /// any more where it was sent: see [`Connector::has_passed`].
    UpTo(Epoch),
    /// As [`Patience::UpTo`] the epoch of the term of this claim, and unless the lease of that goes on to be renewed
    /// over another connection: see [`LastClaim::goes_on_without`].
    WithClaim(Epoch, &'a LastClaim),
}

/// The connection of the writer, which is made anew after it was lost.
pub(super) struct Line {
    /// The name of its session.
    application: String,
    connection: Option<Connection>,
}

impl Line {
    pub(super) fn new(application: impl Into<String>) -> Self {
        Self { application: application.into(), connection: None }
    }

    /// Takes the connection for other use; it is given back by [`Line::give`].
    pub(super) async fn take(&mut self, connector: &Connector) -> Result<Connection, StoreError> {
        if let Some(connection) = self.connection.take().filter(|connection| connector.has_use_for(connection)) {
            return Ok(connection);
        }
        connector.connect(&self.application).await
    }

    /// The server that has answered the last statement; `None` once its connection is lost.
    pub(super) fn server(&self) -> Option<&Server> {
        self.connection.as_ref().map(Connection::server)
    }

    pub(super) fn give(&mut self, connection: Connection) {
        self.connection = Some(connection);
    }

    /// Executes a statement, and returns its row, if any.
    pub(super) async fn execute(
        &mut self,
        connector: &Connector,
        text: &str,
        parameters: &[&dyn Parameter],
        patience: Patience<'_>,
    ) -> Answer<tokio_postgres::Row> {
        let store = connector.url().to_string();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let connection = match self.take(connector).await {
                Ok(connection) => connection,
                Err(error) => return Answer::Refused(error),
            };
            let _ = connection.take_warning();
            let server = connection.server();
            let given_up = async {
                match patience {
                    Patience::Short => {
                        sleep(ANSWER).await;
                        format!("{} has not answered within {ANSWER:?}", server.name)
                    }
                    Patience::UpTo(epoch) => connector.has_passed(server, Some(epoch)).await,
                    Patience::WithClaim(epoch, claim) => select! {
                        biased;
                        problem = connector.has_passed(server, Some(epoch)) => problem,
                        problem = claim.goes_on_without(epoch) => problem,
                    },
                }
            };
            let executed = select! {
                biased;
                executed = connection.query(text, parameters) => executed,
                problem = given_up => return Answer::Lost(StoreError::Unavailable { store, problem }),
            };
            let warning = connection.take_warning();
            match executed {
                Ok(_) if warning.is_some() => {
                    let problem =
                        format!("{} has warned of a commit: {}", connection.server().name, warning.unwrap_or_default());
                    return Answer::Lost(StoreError::Unavailable { store, problem });
                }
                // A standby was promoted meanwhile, which may not have it.
                Ok(_) if let Some(problem) = connector.outdated(connection.server()) => {
                    return Answer::Lost(StoreError::Unavailable { store, problem });
                }
                Ok(mut rows) => {
                    self.connection = Some(connection);
                    return rows.pop().map_or(Answer::Superseded, Answer::Executed);
                }
                Err(error) if is_ambiguous(&error) => return Answer::Lost(explain(&store, &error)),
                Err(error) if is_worth_repeating(&error) && attempts < ATTEMPTS => {
                    self.connection = Some(connection);
                }
                Err(error) => {
                    if !ends_connection(&error) {
                        self.connection = Some(connection);
                    }
                    return Answer::Refused(refusal(store, &error));
                }
            }
        }
    }
}

/// The error of a commit that the server has refused.
fn refusal(store: String, error: &tokio_postgres::Error) -> StoreError {
    if error.code() == Some(&tokio_postgres::error::SqlState::DIVISION_BY_ZERO) {
        let problem = "rows that the commit removes are not what was found any more: another program has changed them, \
                       so nothing was written";
        return StoreError::Corrupt { store, problem: problem.into() };
    }
    explain(&store, error)
}

/// One commit, for the chain.
pub(super) struct Attempt<'a, 'w> {
    pub(super) connector: &'a Connector,
    pub(super) line: &'a mut Line,
    /// The epoch of the term that commits.
    pub(super) epoch: Epoch,
    /// The claim by which it has begun, if it was claimed.
    pub(super) claim: &'a LastClaim,
    pub(super) statement: &'a Statement<'w>,
    /// Set once the answer was lost.
    pub(super) is_lost: bool,
}

impl Attempt<'_, '_> {
    /// Marks a database in this state, so that no process serves it: also none that does not know what it lacks. If it
    /// does not answer, the process ends without that.
    pub(super) async fn refuse(&mut self, now: &Stored, why: &NotServed) {
        let schema = self.connector.url().schema();
        let text = format!(
            "WITH {DURABLE}
             UPDATE {schema}.meta SET not_served = $1 FROM durable
             WHERE id = 0 AND epoch = $2 AND commits = $3 AND not_served IS NULL RETURNING 1"
        );
        let (why, epoch, commits) = (why.text(), integer(now.epoch.0), integer(now.commits));
        let parameters: [&dyn Parameter; 3] = [&why, &epoch, &commits];
        let marked = self.line.execute(self.connector, &text, &parameters, Patience::Short).await;
        if !matches!(marked, Answer::Executed(_)) {
            tracing::warn!("the store was not marked: another process may serve it, without what it lacks");
        }
    }
}

impl Database for Attempt<'_, '_> {
    async fn commit(&mut self, after: Token, token: Token) -> Answer<()> {
        let of_chain: [&dyn Parameter; OF_CHAIN] = [&after.0, &token.0];
        let others = self.statement.parameters.iter().map(|parameter| &**parameter as &dyn Parameter);
        let parameters: Vec<_> = of_chain.into_iter().chain(others).collect();
        let patience = Patience::WithClaim(self.epoch, self.claim);
        let answer = self.line.execute(self.connector, &self.statement.text, &parameters, patience).await;
        self.is_lost |= matches!(answer, Answer::Lost(_));
        answer.map(drop)
    }

    async fn bar(&mut self, barrier: &Barrier) -> Answer<Token> {
        let schema = self.connector.url().schema();
        let text = format!(
            "WITH {DURABLE},
             patience AS (SELECT set_config('lock_timeout', '{}ms', true) FROM durable)
             UPDATE {schema}.meta SET token = $1, found = CASE WHEN token = ANY($2) THEN found ELSE token END
             FROM patience WHERE id = 0 AND (token = ANY($2) OR token = ANY($3)) RETURNING found",
            LOCK_TIMEOUT.as_millis()
        );
        let earlier: Vec<_> = barrier.earlier.iter().map(|token| token.0).collect();
        let outcomes: Vec<_> = barrier.before.iter().chain(&barrier.after).map(|token| token.0).collect();
        let parameters: [&dyn Parameter; 3] = [&barrier.token.0, &earlier, &outcomes];
        let patience = Patience::WithClaim(self.epoch, self.claim);
        let answer = self.line.execute(self.connector, &text, &parameters, patience).await;
        if matches!(answer, Answer::Refused(_)) {
            // The session of the commit, or of an earlier barrier, may have stopped with the row locked. If it can't be
            // ended now, the next barrier finds it again.
            let _ = end_stalled(self.connector, self.line).await;
        }
        answer.map(|row| Token(row.get(0)))
    }

    async fn read(&mut self) -> Result<Stored, StoreError> {
        let store = self.connector.url().to_string();
        let schema = self.connector.url().schema();
        let text = format!(
            "SELECT m.epoch, commits, token, not_served, l.epoch AS claimed FROM {schema}.meta m, {schema}.leader l
             WHERE m.id = 0 AND l.id = 0"
        );
        let corrupt = |problem| StoreError::Corrupt { store: store.clone(), problem };
        let row = self.line.execute(self.connector, &text, &[], Patience::Short).await.returned()?;
        let row = row.ok_or_else(|| corrupt("its table meta or leader has no row".into()))?;
        let not_served = optional_text(&row, "not_served").map_err(|wrong| corrupt(wrong.to_string()))?;
        if let Some(not_served) = not_served {
            return Err(NotServed::parse(&not_served).refusal(store.clone()));
        }
        let number = |column| number(&row, column).map_err(|wrong| corrupt(wrong.to_string()));
        Ok(Stored {
            epoch: Epoch(number("epoch")?),
            commits: number("commits")?,
            claimed: epoch_of_leader(self.connector, &row, "claimed")?,
            token: Token(integer_of(&row, "token").map_err(|wrong| corrupt(wrong.to_string()))?),
        })
    }
}
