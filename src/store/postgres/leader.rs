//! The row that says which replica leads. Its renewals are as durable as commits: otherwise a primary that has lost its
//! standby would keep its leader, while another one leads on the standby that was promoted.

use std::{future::pending, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};

use super::{
    commit::{DURABLE, Line, Patience},
    connect::{APPLICATION, Connector, application_of},
    parameter::Parameter,
};
use crate::{
    model::{Endpoint, Epoch, Leader, Replica, Revision, is_orchestrator_id},
    ports::{Claim, ClaimId, Claimed, Leadership, Observed, Renewed, StoreError},
    store::{
        contents::check_unsealed_epoch,
        row::{Wrong, flag, integer, integer_of, number, optional_text},
    },
};

/// Longest time that a claim or a barrier waits for a commit or a renewal that is under way. Longer than these take,
/// and short beside the smallest TTL.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_millis(500);

/// The longest lease that a configuration can have.
pub(super) const LONGEST_LEASE: Duration = Duration::from_mins(5);

/// The term that this replica has claimed last, and whose claim was acknowledged. All clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct LastClaim(watch::Sender<Option<Renewal>>);

/// The claim of a term, or a renewal of its lease, that was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Renewal {
    epoch: Epoch,
    lease_ttl: Duration,
    sent: Instant,
}

impl LastClaim {
    /// `None` if there is none.
    pub(super) fn get(&self) -> Option<Epoch> {
        self.0.borrow().map(|renewal| renewal.epoch)
    }

    /// Epochs only rise.
    fn set(&self, renewal: Renewal) {
        self.0.send_if_modified(|last| {
            let is_later = last.is_none_or(|last| last.epoch <= renewal.epoch);
            if is_later {
                *last = Some(renewal);
            }
            is_later
        });
    }

    /// Waits until a statement in the term of this epoch, which was just sent, has waited too long for its answer, as
    /// if its session had stopped: a renewal that was sent later was acknowledged, so the statement waits for no
    /// standby; and it has no answer for a TTL more, while the lease goes on to be renewed. Returns what was found.
    pub(super) async fn goes_on_without(&self, epoch: Epoch) -> String {
        let mut last = self.0.subscribe();
        let mut sent = Instant::now();
        for _ in 0..2 {
            let is_later = |last: &Option<Renewal>| last.is_some_and(|last| last.epoch == epoch && last.sent > sent);
            let Ok(Some(Renewal { lease_ttl, .. })) = last.wait_for(is_later).await.map(|last| *last) else {
                return pending().await;
            };
            sent = Instant::now() + lease_ttl;
        }
        "its session does not answer, although another one of this process does".into()
    }
}

/// The row, over a connection of its own: renewals must not wait for commits.
pub(super) struct LeaderRow {
    connector: Arc<Connector>,
    line: Mutex<Line>,
    claim: LastClaim,
}

impl LeaderRow {
    pub(super) fn new(connector: Arc<Connector>, claim: LastClaim) -> Self {
        Self { connector, line: Mutex::new(Line::new(candidates())), claim }
    }

    /// The term that this replica has claimed last, and whose claim was acknowledged.
    pub(super) fn claimed(&self) -> Option<Epoch> {
        self.claim.get()
    }

    fn schema(&self) -> &str {
        self.connector.url().schema()
    }

    /// Executes a statement. If this is dropped, so is the connection.
    async fn execute(
        &self,
        text: &str,
        parameters: &[&dyn Parameter],
        patience: Patience<'_>,
    ) -> Result<Option<tokio_postgres::Row>, StoreError> {
        self.line.lock().await.execute(&self.connector, text, parameters, patience).await.returned()
    }

    fn epoch(&self, row: &tokio_postgres::Row) -> Result<Epoch, StoreError> {
        epoch_of_leader(&self.connector, row, "epoch")
    }

    fn corrupt(&self, wrong: &Wrong) -> StoreError {
        StoreError::Corrupt { store: self.connector.url().to_string(), problem: format!("its table leader: {wrong}") }
    }
}

/// Ends a session of a replica that has locked a row and does not go on: its process, or its connection, has stopped
/// between two messages of a commit, or within a transaction, and no timeout of the server would free the row. Never
/// one that waits for a standby: its commit may be kept. Its name may be that of any earlier term, or of a statement
/// outside of one.
pub(super) async fn end_stalled(connector: &Connector, line: &mut Line) -> Result<(), StoreError> {
    let schema = connector.url().schema();
    let text = format!(
        "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity a
         WHERE datname = current_database() AND application_name LIKE '{APPLICATION}/%'
             AND wait_event = 'ClientRead' AND backend_xid IS NOT NULL
             AND state_change < clock_timestamp() - interval '{} ms'
             AND EXISTS (SELECT 1 FROM pg_locks k
                         WHERE k.pid = a.pid AND k.mode IN ('RowExclusiveLock', 'RowShareLock')
                             AND k.relation IN ('{schema}.meta'::regclass, '{schema}.leader'::regclass))
         LIMIT 1",
        LOCK_TIMEOUT.as_millis()
    );
    if let Some(row) = line.execute(connector, &text, &[], Patience::Short).await.returned()? {
        let pid: i32 = row.get(0);
        tracing::warn!(pid, "ended a session of a replica, which had stopped in the middle of a transaction");
    }
    Ok(())
}

/// The epoch of the row, in this column of the answer to a statement.
///
/// # Errors
/// Nothing seals the row, and another program has written one that no clock can have given: terms can't go on from it.
pub(super) fn epoch_of_leader(
    connector: &Connector,
    row: &tokio_postgres::Row,
    column: &str,
) -> Result<Epoch, StoreError> {
    let (store, url) = (connector.url().to_string(), connector.url().to_string());
    let epoch = number(row, column).map_err(|wrong| wrong.to_string());
    let checked = epoch.map(Epoch).and_then(|epoch| check_unsealed_epoch(epoch).map(|()| epoch));
    checked.map_err(|problem| StoreError::Tampered {
        store,
        url,
        problem: format!("the epoch in its table leader {problem}"),
    })
}

/// The name of sessions that may claim the row.
fn candidates() -> String {
    format!("{APPLICATION}/candidate")
}

impl Leadership for LeaderRow {
    fn observe(&self) -> BoxFuture<'_, Result<Observed, StoreError>> {
        Box::pin(async move {
            let schema = self.schema();
            let text = format!(
                "SELECT l.epoch, claim, beat, released, replica, address, lease_ms, orchestrator_id,
                        (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS time,
                        coalesce(m.last_revision, 0) AS last_revision, coalesce(m.epoch, 0) AS last_epoch
                 FROM {schema}.leader l LEFT JOIN {schema}.meta m ON m.id = 0 WHERE l.id = 0"
            );
            let required = self.connector.required();
            let mut line = self.line.lock().await;
            let row = line.execute(&self.connector, &text, &[], Patience::Short).await.returned()?;
            let server = line.server().cloned();
            drop(line);
            let row = row.ok_or_else(|| self.corrupt(&Wrong::new("row", "is not there")))?;
            let epoch = self.epoch(&row)?;
            let newest = |row| Ok((Revision(number(row, "last_revision")?), Epoch(number(row, "last_epoch")?)));
            let read = observed(&row, epoch).and_then(|observed| Ok((observed, newest(&row)?)));
            let (observed, (revision, last_epoch)) = read.map_err(|wrong| self.corrupt(&wrong))?;
            let store = self.connector.url().to_string();
            let behind = server.and_then(|server| required.check(&server, revision, last_epoch).err());
            Ok(Observed { behind: behind.map(|lacking| lacking.of(store)), ..observed })
        })
    }

    fn claim<'a>(&'a self, seen: &'a Observed, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move {
            let schema = self.schema();
            // The new token of `meta` fences the commits of earlier epochs, and of those no other column changes: they
            // are sealed.
            let text = format!(
                "WITH {DURABLE},
                 patience AS (SELECT set_config('lock_timeout', '{}ms', true) FROM durable),
                 claimed AS (
                     UPDATE {schema}.leader l
                     SET epoch = greatest(l.epoch + 1, m.epoch + 1, $3), claim = $4, beat = beat + 1, released = false,
                         replica = $5, address = $6, lease_ms = $7, orchestrator_id = $8
                     FROM patience, {schema}.meta m WHERE l.id = 0 AND m.id = 0 AND l.epoch = $1 AND l.beat = $2
                     RETURNING l.epoch
                 ),
                 fenced AS (UPDATE {schema}.meta SET token = $4 FROM claimed WHERE id = 0 RETURNING 1)
                 SELECT epoch FROM claimed, fenced",
                LOCK_TIMEOUT.as_millis()
            );
            let Claim { id, replica, orchestrator_id, lease_ttl, at_least } = claim;
            let address = replica.address.as_ref().map(ToString::to_string);
            let lease_ms = i64::try_from(lease_ttl.as_millis()).unwrap_or(i64::MAX);
            let (epoch, beat, at_least) = (integer(seen.epoch.0), integer(seen.beat), integer(at_least.0));
            let (id, of) = (integer(id.0), orchestrator_id.to_string());
            let parameters: [&dyn Parameter; 8] =
                [&epoch, &beat, &at_least, &id, &replica.name, &address, &lease_ms, &of];
            let sent = Instant::now();
            let row = match self.execute(&text, &parameters, Patience::UpTo(seen.epoch)).await {
                Ok(row) => row,
                Err(error) => {
                    end_stalled(&self.connector, &mut *self.line.lock().await).await?;
                    return Err(error);
                }
            };
            let Some(row) = row else { return Ok(Claimed::Lost) };
            let epoch = self.epoch(&row)?;
            self.claim.set(Renewal { epoch, lease_ttl: *lease_ttl, sent });
            // So that a later candidate recognizes the session.
            *self.line.lock().await = Line::new(application_of(epoch));
            Ok(Claimed::Won(epoch))
        })
    }

    fn renew(&self, epoch: Epoch) -> BoxFuture<'_, Result<Renewed, StoreError>> {
        Box::pin(async move {
            let text = format!(
                "WITH {DURABLE}
                 UPDATE {}.leader SET beat = beat + 1 FROM durable WHERE id = 0 AND epoch = $1 AND NOT released
                 RETURNING lease_ms",
                self.schema()
            );
            let sent = Instant::now();
            let row = self.execute(&text, &[&integer(epoch.0)], Patience::UpTo(epoch)).await?;
            Ok(match row {
                Some(row) => {
                    let lease_ttl = lease_ttl(&row).map_err(|wrong| self.corrupt(&wrong))?;
                    self.claim.set(Renewal { epoch, lease_ttl, sent });
                    Renewed::Acknowledged
                }
                None => Renewed::Superseded,
            })
        })
    }

    fn release(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let text = format!(
                "WITH {DURABLE}
                 UPDATE {}.leader SET beat = beat + 1, released = true FROM durable WHERE id = 0 AND epoch = $1
                 RETURNING 1",
                self.schema()
            );
            self.execute(&text, &[&integer(epoch.0)], Patience::UpTo(epoch)).await?;
            *self.line.lock().await = Line::new(candidates());
            Ok(())
        })
    }
}

fn observed(row: &tokio_postgres::Row, epoch: Epoch) -> Result<Observed, Wrong> {
    // What a replica of a valid configuration has not written must not keep others from leading.
    let leader = if flag(row, "released")? || epoch == Epoch::default() {
        None
    } else {
        let address = optional_text(row, "address")?;
        let address = address.and_then(|address| Endpoint::parse(&address).ok());
        let name = optional_text(row, "replica")?.unwrap_or_default();
        Some(Leader { replica: Replica { name, address }, epoch })
    };
    let orchestrator_id = optional_text(row, "orchestrator_id")?.filter(|id| is_orchestrator_id(id)).map(Arc::from);
    let time = Timestamp::from_millisecond(integer_of(row, "time")?);
    Ok(Observed {
        epoch,
        beat: number(row, "beat")?,
        claim: ClaimId(number(row, "claim")?),
        leader,
        lease_ttl: lease_ttl(row)?,
        orchestrator_id,
        time: time.map_err(|error| Wrong::new("time", error.to_string()))?,
        behind: None,
    })
}

/// The TTL of the lease, bounded: nothing seals the row.
fn lease_ttl(row: &tokio_postgres::Row) -> Result<Duration, Wrong> {
    Ok(Duration::from_millis(integer_of(row, "lease_ms")?.try_into().unwrap_or(0)).min(LONGEST_LEASE))
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_session_has_stopped_only_if_later_renewals_of_its_term_are_acknowledged_for_a_ttl() {
        const TTL: Duration = Duration::from_secs(10);
        let (claim, epoch) = (LastClaim::default(), Epoch(2));
        let acknowledged = |epoch, sent| claim.set(Renewal { epoch, lease_ttl: TTL, sent });
        let sent_before = Instant::now();
        acknowledged(epoch, sent_before);
        let found = claim.goes_on_without(epoch);
        tokio::pin!(found);
        assert!(timeout(TTL, &mut found).await.is_err());
        // While a commit waits for a standby, later renewals wait as well.
        acknowledged(epoch, sent_before);
        assert!(timeout(100 * TTL, &mut found).await.is_err());
        acknowledged(epoch, Instant::now());
        assert!(timeout(100 * TTL, &mut found).await.is_err(), "it may be away again");
        acknowledged(epoch, Instant::now());
        assert!(timeout(TTL, &mut found).await.is_ok());

        let of_another_term = claim.goes_on_without(Epoch(1));
        tokio::pin!(of_another_term);
        for _ in 0..10 {
            assert!(timeout(TTL, &mut of_another_term).await.is_err());
            acknowledged(epoch, Instant::now());
        }
    }
}
