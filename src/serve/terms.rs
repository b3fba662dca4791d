//! The terms of this replica as the leader. A store that one process has for itself has one term, as long as the
//! process. Otherwise the replica follows, claims to lead once no other one does, takes the store over, and leads until
//! another replica has claimed to: then it drops the orchestrator, whole, and follows again. Listeners and connections
//! stay.

use std::{future::pending, mem, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    select,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{StartError, declared, log, settings};
use crate::{
    api::Api,
    cluster::{self, Candidate, Lease, Leased, Won},
    config::Config,
    dial::Dialer,
    host::Host,
    memory::Shares,
    model::{Begin, Epoch},
    orchestrator::{History, Orchestrator, OrchestratorTasks, Position, Refusal, Stopped, Sums, TakenOver},
    ports::{Leadership, Spans, Store, StoreError, Subsystems},
    store::OpenError,
};

/// Longest time for the database to note that a term has ended. Then other replicas wait for the end of the lease.
const RELEASE: Duration = Duration::from_secs(2);
/// After a term that could not begin, this replica does not claim another one for this time: so other replicas can.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

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
    config: Arc<Config>,
}

enum Phase {
    /// Another replica leads, or this one will soon.
    Following(Following),
    /// It follows, and does not lead: it can't with its configuration, or the process ends.
    Unable {
        _follows: Option<AbortOnDropHandle<()>>,
    },
    /// It has claimed to lead, and takes the store over.
    Beginning(Box<Beginning>),
    Leading(Box<Leading>),
}

struct Following {
    /// `None` if it was cancelled before the replica won.
    wins: AbortOnDropHandle<Result<Option<(Candidate, Won)>, Unable>>,
    cancelled: CancellationToken,
}

/// A candidate that can't lead.
type Unable = (Candidate, StartError);

/// What precedes the time in which a replica follows.
enum After {
    /// It has started, or its configuration was reloaded.
    Start,
    /// It has led.
    Term,
    /// It could not begin the term of this epoch.
    Failure(Epoch),
}

struct Beginning {
    candidate: Candidate,
    epoch: Epoch,
    lease: Lease,
    /// Renews the lease meanwhile.
    keeping: AbortOnDropHandle<()>,
    begun: BoxFuture<'static, Result<Begun, StartError>>,
}

/// An orchestrator that has started.
type Begun = (Orchestrator, OrchestratorTasks);

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
        let (orchestrator, tasks) = begin(config, &parts, taken_over, subsystems).await?;
        let orchestrator = Arc::new(orchestrator);
        api.lead(orchestrator.clone());
        let phase = Phase::Leading(Box::new(Leading { orchestrator, tasks, term: None }));
        Ok(Self { api, phase, how: Begin::Again, shared: None })
    }

    /// The terms of a replica that shares its store. If no other one leads, it leads when this returns.
    ///
    /// # Errors
    /// It has claimed to lead, and can't with this configuration.
    pub(super) async fn shared(
        config: &Config,
        how: Begin,
        parts: Parts,
        (store, leadership): (Arc<dyn Store>, Arc<dyn Leadership>),
        api: Api,
    ) -> Result<Self, StartError> {
        let shared = Shared { leadership, store, parts, config: Arc::new(config.clone()) };
        let mut candidate = shared.candidate(&api);
        let won = match candidate.look(true).await {
            Ok(won) => won,
            Err(error) => {
                tracing::warn!(%error, "it is not known which replica leads");
                None
            }
        };
        let mut terms = Self { api, phase: Phase::Unable { _follows: None }, how, shared: Some(shared) };
        let Some(won) = won else {
            tracing::info!("this replica follows");
            terms.follow(candidate, After::Start);
            return Ok(terms);
        };
        let epoch = won.epoch;
        terms.begin(candidate, won);
        if let Some(Err(error)) = terms.begun().await {
            // The process ends, so it does this first.
            terms.phase = Phase::Unable { _follows: None };
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
            Phase::Following(_) | Phase::Unable { .. } | Phase::Beginning(_) => None,
        }
    }

    /// Waits until the process has to end: another process has taken over a store that is not shared, the store accepts
    /// no more writes, or a task has ended by a defect. Cancel safe. May be called again after [`Stopped::Other`].
    pub(super) async fn ended(&mut self) -> Result<(), Stopped> {
        loop {
            match &mut self.phase {
                Phase::Following(following) => match (&mut following.wins).await {
                    Ok(Ok(Some((candidate, won)))) => self.begin(candidate, won),
                    Ok(Ok(None)) => self.phase = Phase::Unable { _follows: None },
                    Ok(Err((candidate, error))) => {
                        tell_unable(&error);
                        self.only_follow(candidate, None);
                    }
                    // It has panicked, which is logged. Without it, this replica would never lead again.
                    Err(defect) => {
                        let problem = format!("the candidate has ended: {defect}");
                        return Err(Stopped::Store(StoreError::Defect { problem }));
                    }
                },
                Phase::Unable { .. } => pending().await,
                Phase::Beginning(_) => {
                    if let Some(Err(error)) = self.begun().await {
                        tell_unable(&error);
                    }
                }
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
            if let Some(Err(error)) = self.begun().await {
                tell_unable(&error);
            }
        }
        if let Some(orchestrator) = self.orchestrator() {
            orchestrator.reload(settings(config), declared(config)).await?;
        }
        if let Some(shared) = &mut self.shared {
            shared.config = Arc::new(config.clone());
            shared.parts.history.apply(&settings(config));
            shared.parts.history.declare(&declared(config));
            if let Phase::Unable { .. } = self.phase {
                let candidate = shared.candidate(&self.api);
                self.follow(candidate, After::Start);
            }
        }
        Ok(())
    }

    /// Ends the present term in order, and has no further one.
    pub(super) fn drain(&mut self) {
        match &self.phase {
            Phase::Leading(leading) => leading.orchestrator.drain(),
            Phase::Following(following) => following.cancelled.cancel(),
            Phase::Unable { .. } => self.phase = Phase::Unable { _follows: None },
            Phase::Beginning(_) => {}
        }
    }

    /// After [`Terms::drain`]: waits until the last write is done. Then another replica can take over at once.
    ///
    /// # Errors
    /// Why it was not done.
    pub(super) async fn finished(&mut self) -> Result<(), Stopped> {
        let epoch = match &mut self.phase {
            Phase::Unable { .. } => return Ok(()),
            Phase::Following(following) => match timeout(RELEASE, &mut following.wins).await {
                Ok(Ok(Ok(Some((_, won))))) => Some(won.epoch),
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
            self.phase = Phase::Unable { _follows: None };
            shared.release(epoch).await;
            self.api.membership().follows();
        }
        Ok(())
    }

    /// Another replica leads: drops the orchestrator.
    fn demote(&mut self) {
        self.api.follow();
        self.api.membership().follows();
        let phase = mem::replace(&mut self.phase, Phase::Unable { _follows: None });
        if let Phase::Leading(leading) = phase
            && let Leading { term: Some(Term { candidate, .. }), .. } = *leading
        {
            self.follow(candidate, After::Term);
        }
    }

    /// Follows, until it leads.
    fn follow(&mut self, mut candidate: Candidate, after: After) {
        let Some(shared) = self.shared.clone() else { return };
        let cancelled = CancellationToken::new();
        let token = cancelled.clone();
        let wins = async move {
            match after {
                After::Start => select! {
                    biased;
                    () = token.cancelled() => return Ok(None),
                    able = shared.wait_until_able() => if let Err(error) = able {
                        return Err((candidate, error));
                    },
                    () = candidate.only_follows() => {}
                },
                After::Term => {}
                After::Failure(epoch) => {
                    shared.release(epoch).await;
                    let _ = token.run_until_cancelled(sleep(AFTER_FAILURE)).await;
                }
            }
            Ok(candidate.wins(&token).await.map(|won| (candidate, won)))
        };
        self.phase = Phase::Following(Following { wins: AbortOnDropHandle::new(tokio::spawn(wins)), cancelled });
    }

    /// Only follows, after the term of this epoch could not begin, if there was one.
    fn only_follow(&mut self, mut candidate: Candidate, failed: Option<Epoch>) {
        let shared = self.shared.clone();
        let follows = async move {
            if let (Some(shared), Some(epoch)) = (shared, failed) {
                shared.release(epoch).await;
            }
            candidate.only_follows().await;
        };
        self.phase = Phase::Unable { _follows: Some(AbortOnDropHandle::new(tokio::spawn(follows))) };
    }

    /// Takes the store over for a term that this replica has claimed.
    fn begin(&mut self, candidate: Candidate, Won { epoch, lease }: Won) {
        let Some(shared) = self.shared.clone() else { return };
        let how = self.how;
        let (leadership, kept) = (shared.leadership.clone(), lease.clone());
        let keep = async move { cluster::keep(&*leadership, epoch, &kept).await };
        let keeping = AbortOnDropHandle::new(tokio::spawn(keep));
        let leased = Leased::new(shared.parts.dialer.clone(), lease.clone());
        let begun = async move {
            let Shared { store, parts, config, .. } = &shared;
            let taken_over = log::take_over(config, how, parts.host.random.id128(), store.clone()).await?;
            parts.sums.set_reads(settings(config).audit_reads);
            let contents = &taken_over.contents;
            let (known, end) = (parts.history.known(), Position { revision: contents.last_revision, epoch: None });
            parts.history.goes_on(known, end).await?;
            if let Some(Position { revision: missing, .. }) = parts.history.missing() {
                let (url, newest) = (config.store.url.clone(), contents.last_revision);
                return Err(StartError::HistoryLost { url, missing, newest });
            }
            let (sums, history) = (Some(parts.sums.clone()), Some(parts.history.clone()));
            let taken_over = TakenOver { sums, history, ..taken_over };
            begin(config, parts, taken_over, Arc::new(leased)).await
        };
        self.phase = Phase::Beginning(Box::new(Beginning { candidate, epoch, lease, keeping, begun: begun.boxed() }));
    }

    /// Waits until the term that begins has begun, or can't. `None` if none begins. Cancel safe.
    async fn begun(&mut self) -> Option<Result<(), StartError>> {
        let Phase::Beginning(beginning) = &mut self.phase else { return None };
        let begun = (&mut beginning.begun).await;
        let phase = mem::replace(&mut self.phase, Phase::Unable { _follows: None });
        let Phase::Beginning(beginning) = phase else { return None };
        let Beginning { candidate, epoch, lease, keeping, .. } = *beginning;
        let (orchestrator, tasks) = match begun {
            Ok((orchestrator, tasks)) => (Arc::new(orchestrator), tasks),
            Err(error) if is_passing(&error) => {
                tracing::warn!(%error, "this replica has claimed to lead, and follows again");
                self.follow(candidate, After::Failure(epoch));
                return Some(Ok(()));
            }
            Err(error) => {
                self.only_follow(candidate, Some(epoch));
                return Some(Err(error));
            }
        };
        self.how = Begin::Again;
        let keeping = {
            let shared = self.shared.clone()?;
            let (orchestrator, lease) = (orchestrator.clone(), lease.clone());
            tokio::spawn(async move { keep_leading(&shared, epoch, &lease, keeping, &orchestrator).await })
        };
        self.api.lead(orchestrator.clone());
        self.api.membership().leads(epoch, lease);
        let term = Term { candidate, epoch, _keeping: AbortOnDropHandle::new(keeping) };
        self.phase = Phase::Leading(Box::new(Leading { orchestrator, tasks, term: Some(term) }));
        Some(Ok(()))
    }
}

impl Shared {
    fn candidate(&self, api: &Api) -> Candidate {
        let Self { leadership, parts, config, .. } = self;
        Candidate::new(leadership.clone(), api.membership().clone(), config.cluster.lease_ttl, parts.host.clone())
    }

    /// Waits until it is known that it can lead with its configuration and the present contents of the store.
    ///
    /// # Errors
    /// It can't.
    async fn wait_until_able(&self) -> Result<(), StartError> {
        while let Err(error) = self.rehearse().await {
            if !is_passing(&error) {
                return Err(error);
            }
            sleep(AFTER_FAILURE).await;
        }
        Ok(())
    }

    /// Does what begins a term, over a store that is only looked at.
    async fn rehearse(&self) -> Result<(), StartError> {
        let Self { parts, config, store, .. } = self;
        let Some(taken_over) = log::rehearse(config, &parts.host, &**store).await? else { return Ok(()) };
        let (orchestrator, mut tasks) = begin(config, parts, taken_over, parts.dialer.clone()).await?;
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
async fn begin(
    config: &Config,
    Parts { memory, host, spans, .. }: &Parts,
    taken_over: TakenOver,
    subsystems: Arc<dyn Subsystems>,
) -> Result<Begun, StartError> {
    let (settings, declared) = (settings(config), declared(config));
    let started =
        Orchestrator::start(settings, memory, host.clone(), subsystems, taken_over, declared, spans.clone()).await;
    Ok(started?)
}

/// Tells an orchestrator when its lease ends, when it is renewed after that, and when its term is over.
async fn keep_leading(
    Shared { leadership, .. }: &Shared,
    epoch: Epoch,
    lease: &Lease,
    mut keeping: AbortOnDropHandle<()>,
    orchestrator: &Orchestrator,
) {
    loop {
        select! {
            biased;
            _ = &mut keeping => break,
            () = lease.lapsed() => orchestrator.lapse(),
        }
        select! {
            biased;
            _ = &mut keeping => break,
            () = lease.confirmed() => orchestrator.confirm(),
        }
    }
    // For people.
    let by = leadership.observe().await.map_or_else(|_| epoch.next(), |observed| observed.epoch);
    orchestrator.fence(by);
}

/// Logs why this replica does not lead.
fn tell_unable(error: &StartError) {
    tracing::error!(%error, "this replica can't lead, and only follows until its configuration is reloaded");
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
