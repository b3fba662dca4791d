//! The task that writes: it takes the database over, commits, and finds what retention removes.

use std::{collections::BTreeMap, mem, sync::Arc};

use jiff::Timestamp;
use tokio::{select, sync::mpsc};

use super::{
    commit::{Attempt, Before, Line, RANDOM_TOKEN, Renewed, Statement},
    connect::{APPLICATION, Connector, application_of},
    error::{explain, is_worth_repeating},
    leader::LastClaim,
    rows::{Access, Failed, Snapshot, at_once, sealed_columns},
    schema::TooNew,
};
use crate::{
    clock::Clock,
    model::Epoch,
    ports::{Checks, Contents, Excess, Retention, Seals, StoreError, Write},
    store::{
        chain::{Chain, Database as _, Stored, Token},
        contents::{Refused, Tables, check_unsealed_epoch, read_contents},
        copying::NotServed,
        excess::Searches,
        frontier::Appended,
        jobs::Job,
        not_taken_over,
        row::{Value, Wrong, integer, integer_of, key, name, number, optional_text, output},
        seal::{OUTPUTS, Seal, TABLES},
        term::{SharedLog, Term},
    },
};

/// Most times that the state is read while other transactions write it.
const ATTEMPTS: usize = 5;

/// The state that a process would take over, and from which its commits go on.
pub(super) struct Taken {
    pub(super) contents: Contents,
    pub(super) term: Term,
    /// The last epoch for which a replica has claimed to lead.
    claimed: Epoch,
    /// The token of the row `meta`.
    last: Token,
    /// The token before those that this process gives.
    given: Token,
}

pub(super) struct Writer {
    connector: Arc<Connector>,
    checks: Checks,
    clock: Clock,
    line: Line,
    /// It is accepted, whatever it was moved to.
    even_moved: bool,
    /// `None` until the store is taken over.
    term: Option<(Term, Chain)>,
    /// The last epoch that was fixed.
    fixed: Option<Epoch>,
    /// The term that this replica has claimed last.
    claim: LastClaim,
    /// For what retention removes.
    searches: Searches,
    /// The log as of the last commit.
    log: SharedLog,
}

impl Writer {
    pub(super) fn new(
        connector: Arc<Connector>,
        claim: LastClaim,
        log: SharedLog,
        (checks, clock): (Checks, Clock),
        even_moved: bool,
    ) -> Self {
        let (line, searches) = (Line::new(APPLICATION), Searches::default());
        Self { connector, checks, clock, line, even_moved, term: None, fixed: None, claim, searches, log }
    }

    /// Does the jobs in their order, until no more can come.
    pub(super) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.recv().await {
            // The caller may have gone; the write is done anyway.
            match job {
                Job::TakeOver(seals, reply) => drop(reply.send(self.take_over(seals).await)),
                Job::Commit(write, reply) => drop(reply.send(self.commit(&write).await)),
                Job::Excess(retention, now, limit, reply) => {
                    drop(reply.send(self.excess(retention, now, limit).await));
                }
            }
        }
    }

    async fn take_over(&mut self, seals: Seals) -> Result<Contents, StoreError> {
        self.term = None;
        let claim = self.claim.get();
        if let Some(epoch) = claim {
            self.line = Line::new(application_of(epoch));
        }
        let how = (self.checks, self.clock);
        let taken = read(&self.connector, &mut self.line, how, seals, (true, self.even_moved), claim).await?;
        let Taken { mut contents, mut term, claimed, last, given } = taken;
        contents.epoch = match claim {
            Some(epoch) if epoch != claimed || epoch <= term.current => {
                return Err(StoreError::Fenced { by: claimed.max(term.current) });
            }
            Some(epoch) => epoch,
            // A claim that no clock can have given is not one: who accepts the store has the row mended.
            None => {
                let claimed = if check_unsealed_epoch(claimed).is_ok() { claimed.next() } else { Epoch::default() };
                contents.epoch.max(claimed).max(self.fixed.map(Epoch::next).unwrap_or_default())
            }
        };
        (term.epoch, self.fixed) = (contents.epoch, Some(contents.epoch));
        let stored = Stored { epoch: term.current, commits: term.commits, claimed, token: last };
        let chain = Chain::new(self.connector.url().to_string(), term.epoch, stored, given);
        self.log.begins_after(term.unlogged_to);
        self.log.set(&term.frontier.log);
        self.searches = Searches::default();
        self.term = Some((term, chain));
        Ok(contents)
    }

    async fn commit(&mut self, write: &Write) -> Result<(), StoreError> {
        let (term, _) = self.term.as_mut().ok_or_else(not_taken_over)?;
        if write.epoch != term.epoch {
            return Err(StoreError::Fenced { by: term.epoch });
        }
        term.frontier.check(write).map_err(|problem| StoreError::Defect { problem })?;
        let appended = Appended::to(&term.frontier.log, write);
        let before = if write.removal.is_empty() && write.renamed.is_empty() && term.renews().is_none() {
            Before::default()
        } else {
            let former_names = write.renamed.keys().map(ToString::to_string).collect();
            self.read_before(write.removal.first_kept, former_names).await?
        };
        let (term, chain) = self.term.as_mut().ok_or_else(not_taken_over)?;
        let records = write.removal.records.iter().filter_map(|record| record.leaf);
        let events = write.removal.events.iter().map(|event| event.leaf);
        let mut removed: Vec<_> = records.chain(events).chain(before.controls.iter().copied()).collect();
        removed.sort_unstable();
        let next = term.next(write, &appended, &removed);
        let schema = self.connector.url().schema();
        let statement = Statement::of(schema, term, write, (&appended, &next), (&removed, before));
        let statement = statement.map_err(|error| StoreError::Defect { problem: error.to_string() })?;
        let (connector, line, epoch, claim) = (&*self.connector, &mut self.line, term.epoch, &self.claim);
        let mut attempt = Attempt { connector, line, epoch, claim, statement: &statement, is_lost: false };
        let committed = chain.commit(&mut attempt).await;
        if attempt.is_lost {
            connector.figures().found_out(committed.is_ok());
        }
        if let Err(StoreError::Corrupt { problem, .. }) = &committed
            && let Ok(now) = attempt.read().await
            && chain.is_replaced_by(&now)
        {
            let why = NotServed::Lacks(problem.clone());
            attempt.refuse(&now, &why).await;
            return Err(why.refusal(connector.url().to_string()));
        }
        committed?;
        drop(statement);
        term.advance(write, appended, next);
        self.log.set(&term.frontier.log);
        Ok(())
    }

    /// Reads what a commit needs that removes all entries before this leaf, takes these names from subsystems, or seals
    /// rows anew.
    async fn read_before(&mut self, first_kept: u64, former_names: Vec<String>) -> Result<Before, StoreError> {
        self.read_in_term(move |snapshot, term, _| before(snapshot, term, first_kept, &former_names)).await
    }

    /// The records and events that exceed these limits.
    async fn excess(&mut self, retention: Retention, now: Timestamp, limit: usize) -> Result<Excess, StoreError> {
        let checks = self.checks;
        let found = self.read_in_term(move |snapshot, term, searches| {
            let mut epoch = Epoch::default();
            snapshot.meta(&mut |row| {
                epoch = Epoch(number(row, "epoch")?);
                Ok(())
            })?;
            if epoch != term.current {
                return Ok(Err(StoreError::Fenced { by: epoch }));
            }
            searches.excess(snapshot, term, checks, &retention, now, limit).map(Ok)
        });
        let (excess, problem) = found.await??;
        let damaged = problem.map(|problem| {
            let problem = format!("retention keeps more than its limits allow: {problem}");
            StoreError::Corrupt { store: self.connector.url().to_string(), problem }
        });
        Ok(Excess { damaged, ..excess })
    }

    /// Reads as of one moment what the term needs.
    async fn read_in_term<T: Send + 'static>(
        &mut self,
        read: impl FnOnce(&mut Snapshot<'_>, &Term, &mut Searches) -> Result<T, Failed> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = self.line.take(&self.connector).await?;
        let (term, chain) = self.term.take().ok_or_else(not_taken_over)?;
        let (used, epoch) = (connection.used(), Some(term.epoch));
        let given = (term, mem::take(&mut self.searches));
        let read =
            at_once(connection, self.connector.url().schema(), Access::Patient, given, move |snapshot, given| {
                let (term, searches) = given;
                read(snapshot, term, searches)
            });
        let (back, read) = select! {
            biased;
            read = read => read,
            never = self.connector.end_once_passed(used, epoch) => match never {},
        };
        if let Some((connection, (term, searches))) = back {
            self.line.give(connection);
            (self.term, self.searches) = (Some((term, chain)), searches);
        }
        read.map_err(|failed| failure(&self.connector, &failed))
    }
}

/// Why a database is not taken over, although it can be read.
enum NotTaken {
    NotServed(NotServed),
    TooNew(TooNew),
}

/// Reads the state that a process would take over. With `lock`, after commits that are under way. One that was moved is
/// read only if `even_moved` is true. For a term of this `epoch`, it fails once nothing can come of that.
pub(super) async fn read(
    connector: &Connector,
    line: &mut Line,
    (checks, clock): (Checks, Clock),
    seals: Seals,
    (lock, even_moved): (bool, bool),
    epoch: Option<Epoch>,
) -> Result<Taken, StoreError> {
    let store = connector.url().to_string();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let connection = line.take(connector).await?;
        let seals = seals.clone();
        let passed = connector.end_once_passed(connection.used(), epoch);
        let access = if lock { Access::Locked } else { Access::Patient };
        let migrations = connector.migrations().clone();
        let read = at_once(connection, connector.url().schema(), access, (), move |snapshot, ()| {
            // Another version may have migrated it since it was opened.
            let row = snapshot.one("SELECT version, usable_from FROM SCHEMA.store_schema", &[])?;
            let version = |column| row.try_get(column).map_err(Failed::from);
            if let Err(too_new) = migrations.check(version("version")?, version("usable_from")?) {
                return Ok(Err(NotTaken::TooNew(too_new)));
            }
            let row = snapshot.one("SELECT not_served FROM SCHEMA.meta", &[])?;
            match optional_text(&row, "not_served").map_err(Failed::from)?.map(|text| NotServed::parse(&text)) {
                Some(not_served) if even_moved && not_served.is_acceptable() => {}
                Some(not_served) => return Ok(Err(NotTaken::NotServed(not_served))),
                None => {}
            }
            let (mut contents, term) = read_contents(snapshot, checks, clock, seals)?;
            let beside = format!(
                "SELECT token, {RANDOM_TOKEN} AS given, (SELECT note FROM SCHEMA.checkpoint) AS note,
                 (SELECT epoch FROM SCHEMA.leader) AS claimed FROM SCHEMA.meta"
            );
            let row = snapshot.one(&beside, &[])?;
            let claimed = Epoch(number(&row, "claimed").map_err(Failed::from)?);
            if !even_moved {
                let named = |problem| Refused::Tampered(format!("the epoch in its table leader {problem}"));
                check_unsealed_epoch(claimed).map_err(named)?;
            }
            contents.checkpoint = optional_text(&row, "note").map_err(Failed::from)?;
            let token = |column| Ok::<_, Failed>(Token(integer_of(&row, column)?));
            Ok(Ok((contents, term, claimed, token("token")?, token("given")?)))
        });
        let (back, read) = select! {
            biased;
            read = read => read,
            never = passed => match never {},
        };
        if let Some((connection, ())) = back {
            line.give(connection);
        }
        match read {
            Ok(Err(NotTaken::NotServed(not_served))) => return Err(not_served.refusal(store)),
            Ok(Err(NotTaken::TooNew(too_new))) => return Err(too_new.later(store)),
            Ok(Ok((contents, term, claimed, last, given))) => {
                return Ok(Taken { contents, term, claimed, last, given });
            }
            Err(Refused::Unreadable(Failed::Statement(error))) if is_worth_repeating(&error) && attempts < ATTEMPTS => {
            }
            Err(Refused::Unreadable(failed)) => return Err(failure(connector, &failed)),
            Err(Refused::Corrupt(problem)) => return Err(StoreError::Corrupt { store, problem }),
            Err(Refused::Tampered(problem)) => return Err(StoreError::Tampered { url: store.clone(), store, problem }),
        }
    }
}

/// What a commit needs that removes all entries before this leaf, takes these names from subsystems, or seals rows
/// anew.
fn before(
    snapshot: &mut Snapshot<'_>,
    term: &Term,
    first_kept: u64,
    former_names: &[String],
) -> Result<Before, Failed> {
    let first_kept = integer(first_kept);
    let controls = snapshot.query("SELECT leaf FROM SCHEMA.control WHERE leaf < $1 ORDER BY leaf", &[&first_kept])?;
    let controls = controls.iter().map(|row| number(row, "leaf")).collect::<Result<_, _>>()?;
    let mut outputs = BTreeMap::new();
    let query = format!("SELECT {} FROM SCHEMA.outputs t WHERE name = ANY($1)", sealed_columns(&OUTPUTS));
    for row in snapshot.query(&query, &[&former_names])? {
        let is_valid = matches!(term.sealer.check_row(&row, &OUTPUTS)?, Seal::Valid(_));
        let gets_seal = |renewal| Ok::<_, Wrong>(term.sealer.renewed(&row, &OUTPUTS, renewal)?.is_some());
        if is_valid || term.renews().map(gets_seal).transpose()?.unwrap_or_default() {
            outputs.insert(name(&row, "name")?, output(&row)?);
        }
    }
    let mut renewed = BTreeMap::new();
    if let Some(renewal) = term.renews() {
        for table in TABLES {
            let mut of_table = Renewed::default();
            snapshot.sealed(table, &mut |row| {
                if let Some(seal) = term.sealer.renewed(row, table, renewal)? {
                    match row.value(table.columns[0])? {
                        Value::Integer(number) => of_table.numbers.push(number),
                        name => of_table.names.push(key(name)),
                    }
                    of_table.seals.push(seal.to_vec());
                }
                Ok(())
            })?;
            renewed.insert(table.name, of_table);
        }
    }
    Ok(Before { controls, outputs, renewed })
}

/// The error for a read that has failed.
pub(super) fn failure(connector: &Connector, failed: &Failed) -> StoreError {
    let store = connector.url().to_string();
    match failed {
        Failed::Statement(error) => explain(&store, error),
        Failed::Late(_) => {
            StoreError::Unavailable { store, problem: format!("{failed}; see whether the server and the network work") }
        }
        Failed::Wrong(wrong) => StoreError::Corrupt { store, problem: wrong.to_string() },
        Failed::Behind(lacking) => lacking.clone().of(store),
    }
}
