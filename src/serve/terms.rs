//! The terms of this replica as the leader. A store that one process has for itself has one term, as long as the
//! process. Otherwise the replica follows, claims to lead once no other one does, takes the store over, and leads until
//! another replica has claimed to: then it drops the orchestrator, whole, and follows again. Listeners and connections
//! stay.

use std::{convert::Infallible, future::pending, mem, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    select,
    sync::watch,
    task::JoinError,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{instrument::WithSubscriber, subscriber::NoSubscriber};

use super::{StartError, declared, in_common, log, settings};
use crate::{
    api::Api,
    cluster::{self, Candidate, Lease, Leased, Membership, Won},
    config::Config,
    dial::Dialer,
    host::Host,
    memory::Shares,
    model::{Begin, Epoch, Revision, Role},
    orchestrator::{History, Orchestrator, OrchestratorTasks, Position, Refusal, Stopped, Sums, TakenOver},
    ports::{Leadership, Spans, Store, StoreError, Subsystems},
    store::OpenError,
};

/// Longest time for the database to note that a term has ended. Then other replicas wait for the end of the lease.
const RELEASE: Duration = Duration::from_secs(2);
/// After a term that could not begin, this replica does not claim another one for this time: so other replicas can.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// A follower finds out at this interval whether it can lead.
const REHEARSALS: Duration = Duration::from_mins(1);
/// Why it does not claim to lead before it has found that out.
const UNREAD: &str = "it has not read the store yet";
/// It reads the store for that: if this takes long, the interval is this many times as long.
const REHEARSED: u32 = 20;

/// The parts of the process that each term uses.
#[derive(Clone)]
pub(super) struct Parts {
    pub(super) memory: Shares,
    pub(super) host: Host,
    pub(super) dialer: Arc<Dialer>,
    pub(super) spans: Arc<dyn Spans>,
    pub(super) sums: Sums,
    pub(super) history: History,
}

/// The terms, the present one and those to come.
pub(super) struct Terms {
    api: Api,
    phase: Phase,
    /// How the next term begins.
    how: Begin,
    /// What this replica and the others agree by; `None` if there can be no others.
    shared: Option<Shared>,
}

/// What a replica needs to lead again.
#[derive(Clone)]
struct Shared {
    leadership: Arc<dyn Leadership>,
    store: Arc<dyn Store>,
    parts: Parts,
    /// The one that applies to the next term.
    config: Arc<watch::Sender<Arc<Config>>>,
}

enum Phase {
    /// It follows, until it has claimed to lead.
    Following(Following),
    /// The process ends.
    Over,
    /// It has claimed to lead, and takes the store over.
    Beginning(Box<Beginning>),
    Leading(Box<Leading>),
}

struct Following {
    /// `None` if it was cancelled before the replica won.
    wins: AbortOnDropHandle<Option<(Candidate, Won)>>,
    cancelled: CancellationToken,
}

/// Why a replica begins to follow.
enum After {
    /// It has started, and does not know whether it can lead.
    Start,
    /// It has led, or has just found out that it can.
    Able,
    /// It could not begin the term of this epoch.
    Failure(Epoch),
}

struct Beginning {
    candidate: Candidate,
    epoch: Epoch,
    lease: Lease,
    /// Renews the lease meanwhile, and returns the epoch by which the term is over.
    keeping: AbortOnDropHandle<Epoch>,
    begun: BoxFuture<'static, Result<Started, StartError>>,
}

/// The end of the beginning of a term.
enum Ended {
    /// The term, by the claim of another replica for this epoch. Or what renews its lease, by a defect.
    Term(Result<Epoch, JoinError>),
    Beginning(Result<Started, StartError>),
}

/// An orchestrator that has started.
type Started = (Orchestrator, OrchestratorTasks);

struct Leading {
    orchestrator: Arc<Orchestrator>,
    tasks: OrchestratorTasks,
    /// Its term, if there can be other replicas.
    term: Option<Term>,
}

struct Term {
    candidate: Candidate,
    epoch: Epoch,
    /// Renews the lease, and tells the orchestrator when it ends.
    _keeping: AbortOnDropHandle<()>,
}

impl Terms {
    /// The term of a process that has its store for itself, or only looks at it.
    pub(super) async fn alone(
        config: &Config,
        parts: Parts,
        taken_over: TakenOver,
        api: Api,
    ) -> Result<Self, StartError> {
        let subsystems = parts.dialer.clone();
        let taken_over = TakenOver { history: Some(parts.history.clone()), ..taken_over };
        let (orchestrator, tasks) = start(config, &parts, taken_over, subsystems).await?;
        let orchestrator = Arc::new(orchestrator);
        api.lead(orchestrator.clone());
        let phase = Phase::Leading(Box::new(Leading { orchestrator, tasks, term: None }));
        Ok(Self { api, phase, how: Begin::Again, shared: None })
    }

    /// The terms of a replica that shares its store. If no other one leads, it leads when this returns.
    ///
    /// # Errors
    /// No other replica leads, and this one can't with its configuration; or the store is that of another orchestrator.
    pub(super) async fn shared(
        config: &Config,
        how: Begin,
        parts: Parts,
        (store, leadership): (Arc<dyn Store>, Arc<dyn Leadership>),
        api: Api,
    ) -> Result<Self, StartError> {
        let config = Arc::new(watch::Sender::new(Arc::new(config.clone())));
        let shared = Shared { leadership, store, parts, config };
        let mut candidate = shared.candidate(&api);
        let (won, after) = shared.first_term(&mut candidate, api.membership()).await?;
        let mut terms = Self { api, phase: Phase::Over, how, shared: Some(shared) };
        let Some(won) = won else {
            tracing::info!("this replica follows");
            terms.follow(candidate, after);
            return Ok(terms);
        };
        let epoch = won.epoch;
        terms.begin(candidate, won);
        if let Some(Err(error)) = terms.begun().await {
            // The process ends, so it does this first.
            terms.phase = Phase::Over;
            if let Some(shared) = &terms.shared {
                shared.release(epoch).await;
            }
            return Err(error);
        }
        Ok(terms)
    }

    /// The orchestrator, while this replica leads.
    pub(super) fn orchestrator(&self) -> Option<&Arc<Orchestrator>> {
        match &self.phase {
            Phase::Leading(leading) => Some(&leading.orchestrator),
            Phase::Following(_) | Phase::Over | Phase::Beginning(_) => None,
        }
    }

    /// Waits until the process has to end: another process has taken over a store that is not shared, the store accepts
    /// no more writes, or a task has ended by a defect. Cancel safe. May be called again after [`Stopped::Other`].
    pub(super) async fn ended(&mut self) -> Result<(), Stopped> {
        loop {
            match &mut self.phase {
                Phase::Following(following) => match (&mut following.wins).await {
                    Ok(Some((candidate, won))) => self.begin(candidate, won),
                    Ok(None) => self.phase = Phase::Over,
                    // It has panicked, which is logged. Without it, this replica would never lead again.
                    Err(defect) => {
                        let problem = format!("the candidate has ended: {defect}");
                        return Err(Stopped::Store(StoreError::Defect { problem }));
                    }
                },
                Phase::Over => pending().await,
                Phase::Beginning(_) => self.begun_or_told().await,
                Phase::Leading(leading) => match leading.tasks.finished().await {
                    Err(Stopped::Store(error @ StoreError::Fenced { .. })) if self.shared.is_some() => {
                        tracing::warn!(%error, "this replica follows from now on");
                        self.demote();
                    }
                    finished => return finished,
                },
            }
        }
    }

    /// Applies another configuration, to the present term or to the next one.
    ///
    /// # Errors
    /// As those of [`Orchestrator::reload`].
    pub(super) async fn reload(&mut self, config: &Config) -> Result<(), Refusal> {
        while let Phase::Beginning(_) = self.phase {
            self.begun_or_told().await;
        }
        if let Some(orchestrator) = self.orchestrator() {
            orchestrator.reload(settings(config), declared(config)).await?;
        }
        if let Some(shared) = &self.shared {
            shared.config.send_replace(Arc::new(config.clone()));
            shared.parts.history.apply(&settings(config));
            shared.parts.history.declare(&declared(config));
            self.api.membership().set_settings(in_common(config));
        }
        Ok(())
    }

    /// Ends the present term in order, and has no further one.
    pub(super) fn drain(&mut self) {
        match &self.phase {
            Phase::Leading(leading) => leading.orchestrator.drain(),
            Phase::Following(following) => following.cancelled.cancel(),
            Phase::Over | Phase::Beginning(_) => {}
        }
    }

    /// After [`Terms::drain`]: waits until the last write is done. Then another replica can take over at once.
    ///
    /// # Errors
    /// Why it was not done.
    pub(super) async fn finished(&mut self) -> Result<(), Stopped> {
        let epoch = match &mut self.phase {
            Phase::Over => return Ok(()),
            Phase::Following(following) => match timeout(RELEASE, &mut following.wins).await {
                Ok(Ok(Some((_, won)))) => Some(won.epoch),
                _ => return Ok(()),
            },
            // Nothing was taken over before the first commit, and that is fenced or recovered from.
            Phase::Beginning(beginning) => Some(beginning.epoch),
            Phase::Leading(leading) => {
                let finished = leading.tasks.finished().await;
                match finished {
                    Err(Stopped::Store(StoreError::Fenced { .. })) if self.shared.is_some() => return Ok(()),
                    finished => finished?,
                }
                leading.term.as_ref().map(|term| term.epoch)
            }
        };
        if let (Some(epoch), Some(shared)) = (epoch, &self.shared) {
            // Renewals end first: one of them would have the connection.
            self.phase = Phase::Over;
            shared.release(epoch).await;
            self.api.membership().follows();
        }
        Ok(())
    }

    /// Another replica leads: drops the orchestrator.
    fn demote(&mut self) {
        self.api.follow();
        self.api.membership().follows();
        let phase = mem::replace(&mut self.phase, Phase::Over);
        if let Phase::Leading(leading) = phase
            && let Leading { term: Some(Term { candidate, .. }), .. } = *leading
        {
            self.follow(candidate, After::Able);
        }
    }

    /// Follows, until it leads.
    fn follow(&mut self, mut candidate: Candidate, after: After) {
        let Some(shared) = self.shared.clone() else { return };
        let (cancelled, membership) = (CancellationToken::new(), self.api.membership().clone());
        let token = cancelled.clone();
        let wins = async move {
            let first = match after {
                After::Start => {
                    membership.set_unable(Some(UNREAD));
                    Duration::ZERO
                }
                After::Able => REHEARSALS,
                After::Failure(epoch) => {
                    shared.release(epoch).await;
                    let _ = token.run_until_cancelled(sleep(AFTER_FAILURE)).await;
                    REHEARSALS
                }
            };
            select! {
                biased;
                won = candidate.wins(&token) => Some((candidate, won?)),
                never = shared.keep_rehearsing(first, &membership) => match never {},
            }
        };
        self.phase = Phase::Following(Following { wins: AbortOnDropHandle::new(tokio::spawn(wins)), cancelled });
    }

    /// Takes the store over for a term that this replica has claimed.
    fn begin(&mut self, candidate: Candidate, Won { epoch, lease }: Won) {
        let Some(shared) = self.shared.clone() else { return };
        let how = self.how;
        let (leadership, kept) = (shared.leadership.clone(), lease.clone());
        let keep = async move { cluster::keep(&*leadership, epoch, &kept).await };
        let config = shared.config.borrow().clone();
        let keeping = AbortOnDropHandle::new(tokio::spawn(keep));
        let leased = Leased::new(shared.parts.dialer.clone(), lease.clone());
        let begun = async move {
            let Shared { store, parts, .. } = &shared;
            let taken_over = log::take_over(&config, how, &parts.host, store.clone()).await?;
            parts.sums.set_reads(settings(&config).audit_reads);
            let contents = &taken_over.contents;
            let (known, end) = (parts.history.known(), Position { revision: contents.last_revision, epoch: None });
            parts.history.goes_on(known, end).await?;
            check_history(&config, parts, contents.last_revision)?;
            let (sums, history) = (Some(parts.sums.clone()), Some(parts.history.clone()));
            let taken_over = TakenOver { sums, history, ..taken_over };
            start(&config, parts, taken_over, Arc::new(leased)).await
        };
        self.phase = Phase::Beginning(Box::new(Beginning { candidate, epoch, lease, keeping, begun: begun.boxed() }));
    }

    /// Waits until the term that begins has begun, or can't, or is over before that. `None` if none begins. Cancel
    /// safe.
    async fn begun(&mut self) -> Option<Result<(), StartError>> {
        let Phase::Beginning(beginning) = &mut self.phase else { return None };
        let ended = select! {
            biased;
            over = &mut beginning.keeping => Ended::Term(over),
            begun = &mut beginning.begun => Ended::Beginning(begun),
        };
        let phase = mem::replace(&mut self.phase, Phase::Over);
        let Phase::Beginning(beginning) = phase else { return None };
        let Beginning { candidate, epoch, lease, keeping, .. } = *beginning;
        let (orchestrator, tasks) = match ended {
            Ended::Beginning(Ok((orchestrator, tasks))) => (Arc::new(orchestrator), tasks),
            Ended::Term(Ok(by)) => {
                tracing::warn!(%by, "another replica has claimed to lead before this term had begun: this one follows");
                self.follow(candidate, After::Able);
                return Some(Ok(()));
            }
            Ended::Term(Err(defect)) => {
                tracing::error!(%defect, "the lease is not renewed any more, and this replica follows again");
                self.follow(candidate, After::Failure(epoch));
                return Some(Ok(()));
            }
            Ended::Beginning(Err(error)) if is_passing(&error) => {
                tracing::warn!(%error, "this replica has claimed to lead, and follows again");
                self.follow(candidate, After::Failure(epoch));
                return Some(Ok(()));
            }
            Ended::Beginning(Err(error)) => {
                self.follow(candidate, After::Failure(epoch));
                return Some(Err(error));
            }
        };
        self.how = Begin::Again;
        let keeping = {
            let (orchestrator, lease) = (orchestrator.clone(), lease.clone());
            tokio::spawn(async move { keep_leading(&lease, keeping, &orchestrator).await })
        };
        self.api.lead(orchestrator.clone());
        if let Some(shared) = &self.shared {
            // It may have been without a leader for so long that watches had ended: new ones begin from now on.
            shared.parts.history.set_fed(true);
        }
        self.api.membership().set_unable(None);
        self.api.membership().leads(epoch, lease);
        let term = Term { candidate, epoch, _keeping: AbortOnDropHandle::new(keeping) };
        self.phase = Phase::Leading(Box::new(Leading { orchestrator, tasks, term: Some(term) }));
        Some(Ok(()))
    }

    /// As [`Terms::begun`], for a process that goes on as a follower if the term can't begin.
    async fn begun_or_told(&mut self) {
        if let Some(Err(error)) = self.begun().await {
            tell_unable(self.api.membership(), &error);
        }
    }
}

impl Shared {
    fn candidate(&self, api: &Api) -> Candidate {
        let Self { leadership, parts, config, .. } = self;
        let of = {
            let config = config.borrow();
            (config.orchestrator_id.as_str().into(), config.cluster.lease_ttl)
        };
        Candidate::new(leadership.clone(), api.membership().clone(), of, parts.host.clone())
    }

    /// Claims the first term, if no other replica leads and this one can. Otherwise `None`, and what precedes the time
    /// in which it follows.
    ///
    /// # Errors
    /// No other replica leads, and this one can't: its operator has to know. Also for the store of another
    /// orchestrator, whether a replica of that leads or not.
    async fn first_term(
        &self,
        candidate: &mut Candidate,
        membership: &Membership,
    ) -> Result<(Option<Won>, After), StartError> {
        let unknown = |error| tracing::warn!(%error, "it is not known which replica leads");
        membership.set_unable(Some(UNREAD));
        let config = self.config.borrow().clone();
        match self.leadership.observe().await {
            Ok(observed) => observed.check_orchestrator(&config.orchestrator_id)?,
            Err(error) => {
                unknown(error);
                return Ok((None, After::Start));
            }
        }
        match candidate.look().await {
            Ok(_) if membership.role() == (Role::Follower { leader: None }) => {}
            Ok(_) => return Ok((None, After::Start)),
            Err(error) => {
                unknown(error);
                return Ok((None, After::Start));
            }
        }
        match self.rehearse(&config).await {
            Ok(()) => membership.set_unable(None),
            Err(error) if is_passing(&error) => return Ok((None, After::Start)),
            Err(error) => return Err(error),
        };
        let won = candidate.look().await.unwrap_or_else(|error| {
            unknown(error);
            None
        });
        Ok((won, After::Able))
    }

    /// Finds out again and again whether this replica can lead, with its configuration and the present contents of the
    /// store: for the first time after this pause, and whenever its configuration has changed.
    async fn keep_rehearsing(&self, first: Duration, membership: &Membership) -> Infallible {
        let mut changes = self.config.subscribe();
        let mut pause = first;
        loop {
            select! {
                biased;
                _ = changes.changed() => {}
                () = sleep(pause) => {}
            }
            let (begun, config) = (Instant::now(), self.config.borrow().clone());
            let rehearsed = self.rehearse(&config).await;
            let took = begun.elapsed();
            tracing::debug!(?took, can_lead = rehearsed.is_ok(), "rehearsed the beginning of a term");
            pause = (took * REHEARSED).max(REHEARSALS);
            match rehearsed {
                Ok(()) => {
                    if membership.set_unable(None) {
                        tracing::info!("this replica can lead");
                    }
                }
                // It has been able to, and nothing says that it is not.
                Err(error) if is_away(&error) && membership.unable().is_none() => {}
                Err(error) => {
                    tell_unable(membership, &error);
                    if is_passing(&error) {
                        pause = (took * REHEARSED).max(AFTER_FAILURE);
                    }
                }
            }
        }
    }

    /// Does what begins a term, over a store that is only looked at. What a start would log is logged once the term
    /// begins.
    async fn rehearse(&self, config: &Config) -> Result<(), StartError> {
        let Self { parts, store, .. } = self;
        let Some(taken_over) = log::rehearse(config, &parts.host, &**store).await? else { return Ok(()) };
        check_history(config, parts, taken_over.contents.last_revision)?;
        let started = start(config, parts, taken_over, parts.dialer.clone());
        let (orchestrator, mut tasks) = started.with_subscriber(NoSubscriber::new()).await?;
        orchestrator.drain();
        // It has nothing to write.
        let _ = tasks.finished().await;
        Ok(())
    }

    /// Ends the term of this epoch.
    async fn release(&self, epoch: Epoch) {
        match timeout(RELEASE, self.leadership.release(epoch)).await {
            Ok(Ok(())) => tracing::info!(epoch = epoch.0, "this replica leads no more: another one can take over"),
            Ok(Err(error)) => tracing::warn!(%error, "the term was not released: others wait for the end of its lease"),
            Err(_) => tracing::warn!("the term was not released in time: others wait for the end of its lease"),
        }
    }
}

/// Starts an orchestrator. The last step of it begins the new epoch: until then nothing is taken over.
async fn start(
    config: &Config,
    Parts { memory, host, spans, .. }: &Parts,
    taken_over: TakenOver,
    subsystems: Arc<dyn Subsystems>,
) -> Result<Started, StartError> {
    let (settings, declared) = (settings(config), declared(config));
    let started =
        Orchestrator::start(settings, memory, host.clone(), subsystems, taken_over, declared, spans.clone()).await;
    Ok(started?)
}

/// Checks that nothing is known to be missing in a store whose newest record has this revision.
///
/// # Errors
/// Something is.
fn check_history(config: &Config, parts: &Parts, newest: Revision) -> Result<(), StartError> {
    match parts.history.missing() {
        Some(Position { revision: missing, .. }) => {
            Err(StartError::HistoryLost { url: config.store.url.clone(), missing, newest })
        }
        None => Ok(()),
    }
}

/// Tells an orchestrator when its lease ends, when it is renewed after that, and when its term is over.
async fn keep_leading(lease: &Lease, mut keeping: AbortOnDropHandle<Epoch>, orchestrator: &Orchestrator) {
    let over = loop {
        select! {
            biased;
            over = &mut keeping => break over,
            () = lease.lapsed() => orchestrator.lapse(),
        }
        select! {
            biased;
            over = &mut keeping => break over,
            () = lease.confirmed() => orchestrator.confirm(),
        }
    };
    match over {
        Ok(by) => orchestrator.fence(by),
        // It has panicked, which is logged.
        Err(defect) => tracing::error!(%defect, "the lease is not renewed any more"),
    }
}

/// Notes that this replica can't lead, and logs the reason unless it is known.
fn tell_unable(membership: &Membership, error: &StartError) {
    if membership.set_unable(Some(&error.to_string())) {
        tracing::warn!(%error, "this replica can't lead, and only follows until it can");
    }
}

/// True if the store could not be asked.
fn is_away(error: &StartError) -> bool {
    use StoreError::Unavailable;
    matches!(error, StartError::TakeOver(Unavailable { .. }) | StartError::Open(OpenError::Store(Unavailable { .. })))
}

/// True if a later term of this replica may begin, with the same configuration: another replica was faster, or the
/// store can't be written now.
fn is_passing(error: &StartError) -> bool {
    match error {
        StartError::TakeOver(error)
        | StartError::Open(OpenError::Store(error))
        | StartError::Refused(Refusal::StoreUnavailable(_, error)) => {
            !error.is_final() || matches!(error, StoreError::Fenced { .. })
        }
        _ => false,
    }
}
