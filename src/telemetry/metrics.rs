//! Metrics in Prometheus' text format.
//!
//! They are built during a scrape, from the existing state; there is no registry of metrics, so the metrics of an
//! unregistered subsystem disappear with it. The text is made in pieces while it is sent: a scrape of a large fleet
//! holds one piece in memory, and delays a cycle at most for the time of one piece.

mod definitions;

use std::{borrow::Borrow, collections::BTreeMap, path::PathBuf, sync::Arc};

use futures_util::{Stream, stream};
use jiff::Timestamp;
use prometheus::{
    Error, TextEncoder,
    proto::{Bucket, Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};
#[cfg(target_os = "linux")]
use prometheus::{core::Collector, process_collector::ProcessCollector};
use tokio::{join, runtime::Handle, sync::Semaphore, task::yield_now, time::Instant};

#[allow(clippy::wildcard_imports, reason = "it is a list, and this is where all of it is shown")]
use self::definitions::*;
pub use self::definitions::{ALL, Definition, Kind};
use super::otlp::Exporter;
use crate::{
    api::{CallCounts, ForwardedCounts},
    cluster::Membership,
    dial,
    engine::{BreakerState, SubsystemCounts},
    listen::Connections,
    memory::{Memory, Shares},
    model::{CycleState, Histogram, Name},
    orchestrator::{Counts, Figures, History, Orchestrator, Registered, Watched},
    ports::{Durability, ServerFigures, TriggerKind},
};

/// The media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Number of subsystems in one piece: about 100 kB, made in about a millisecond.
const PAGE: usize = 64;

/// Returns when the first certificate of each file expires.
pub type Expiries = Box<dyn Fn() -> BTreeMap<PathBuf, Timestamp> + Send + Sync>;

/// The source of a scrape.
pub struct Metrics {
    /// Makes one piece at a time, so that all scrapes together take at most one processor from cycles.
    turn: Semaphore,
    calls: Option<Arc<CallCounts>>,
    forwarded: Option<Arc<ForwardedCounts>>,
    exporter: Option<Arc<Exporter>>,
    servers: Vec<(&'static str, Arc<Connections>)>,
    dialed: Option<Arc<dial::Counts>>,
    expiries: Option<Expiries>,
    memory: Option<Shares>,
    membership: Option<Membership>,
    started_at: Option<Timestamp>,
    history: Option<History>,
    #[cfg(target_os = "linux")]
    process: ProcessCollector,
}

/// The position of a scrape.
enum Position {
    Start,
    Subsystems {
        /// Index in [`BY_SUBSYSTEM`] of the metric that is being written.
        family: usize,
        /// True once its help and type have been written.
        begun: bool,
        /// The last subsystem that has been written.
        after: Option<Name>,
    },
}

impl Default for Metrics {
    /// Metrics of the process and the orchestrator.
    fn default() -> Self {
        Self {
            turn: Semaphore::new(1),
            calls: None,
            forwarded: None,
            exporter: None,
            servers: Vec::new(),
            dialed: None,
            expiries: None,
            memory: None,
            membership: None,
            started_at: None,
            history: None,
            #[cfg(target_os = "linux")]
            process: ProcessCollector::for_self(),
        }
    }
}

impl Metrics {
    /// Adds metrics of calls, the span exporter, the servers by name, connections to subsystems, TLS, and memory.
    pub(crate) fn and_of(
        self,
        calls: Arc<CallCounts>,
        exporter: Option<Arc<Exporter>>,
        servers: Vec<(&'static str, Arc<Connections>)>,
        dialed: Arc<dial::Counts>,
        expiries: Expiries,
        memory: Shares,
    ) -> Self {
        let (calls, dialed, expiries, memory) = (Some(calls), Some(dialed), Some(expiries), Some(memory));
        Self { calls, exporter, servers, dialed, expiries, memory, ..self }
    }

    /// Adds metrics of this replica, whose process started at this time, of what it shows of the history, and of the
    /// calls that it has the leader answer.
    #[must_use]
    pub(crate) fn and_of_replica(
        self,
        membership: Membership,
        started_at: Timestamp,
        history: History,
        forwarded: Option<Arc<ForwardedCounts>>,
    ) -> Self {
        let (membership, started_at, history) = (Some(membership), Some(started_at), Some(history));
        Self { forwarded, membership, started_at, history, ..self }
    }

    /// Writes all metrics, piece by piece, with those of the orchestrator if there is one. It is kept to the end.
    pub fn scrape<O>(self: Arc<Self>, orchestrator: O) -> impl Stream<Item = Result<String, Error>>
    where
        O: Borrow<Option<Arc<Orchestrator>>>,
    {
        stream::unfold((Position::Start, orchestrator), move |(position, orchestrator)| {
            let this = self.clone();
            async move {
                let (text, next) = match position {
                    Position::Start => {
                        let next = Position::Subsystems { family: 0, begun: false, after: None };
                        (encode(&this.general(orchestrator.borrow().as_deref()).await), next)
                    }
                    Position::Subsystems { family, begun, after } => {
                        // Cycles take precedence.
                        yield_now().await;
                        let _turn = this.turn.acquire().await;
                        page(orchestrator.borrow().as_deref()?, family, begun, after.as_ref())?
                    }
                };
                Some((text, (next, orchestrator)))
            }
        })
    }

    /// All metrics that are not by subsystem.
    async fn general(&self, orchestrator: Option<&Orchestrator>) -> Vec<MetricFamily> {
        let runtime = Handle::current().metrics();
        let mut families =
            vec![BUILD_INFO.family(vec![BUILD_INFO.value(&[env!("CARGO_PKG_VERSION"), env!("BUILD_COMMIT")], 1.0)])];
        families.extend(self.membership.iter().flat_map(of_replica));
        families.extend(self.history.iter().flat_map(of_history));
        families.extend(self.started_at.map(|at| START_TIME.single(unix_time(at))));
        if let Some(orchestrator) = orchestrator {
            families.extend(of_orchestrator(orchestrator).await);
        }
        let by_server = |of: &Definition, figure: fn(&Connections) -> usize| {
            of.family(self.servers.iter().map(|(name, it)| of.value(&[name], count(figure(it)))).collect())
        };
        let memory: Vec<_> = self.memory.iter().flat_map(|it| it.iter().chain([("all", &it.whole)])).collect();
        let by_purpose = |of: &Definition, figure: fn(&Memory) -> usize| {
            of.family(memory.iter().map(|(purpose, it)| of.value(&[purpose], count(figure(it)))).collect())
        };
        let spans = self.exporter.as_ref().map(|exporter| exporter.exported()).unwrap_or_default();
        let calls = self.calls.iter().flat_map(|calls| calls.iter());
        let calls = calls.map(|(way, rpc, code, calls)| CALLS.value(&[way, rpc, code.name()], number(calls)));
        let forwarded = self.forwarded.iter().flat_map(|forwarded| forwarded.iter());
        let forwarded = forwarded.map(|(code, calls)| FORWARDED.value(&[code.name()], number(calls)));
        let denied = self.calls.iter().flat_map(|calls| calls.iter_would_be_denied());
        let denied =
            denied.map(|(way, rpc, code, calls)| CALLS_WOULD_BE_DENIED.value(&[way, rpc, code.name()], number(calls)));
        let dialed = self.dialed.iter();
        let failures = dialed.clone().flat_map(|it| it.failures());
        let failures = failures.map(|(step, failures)| DIAL_FAILURES.value(&[step], number(failures)));
        families.extend([
            CALLS.family(calls.collect()),
            FORWARDED.family(forwarded.collect()),
            CALLS_WOULD_BE_DENIED.family(denied.collect()),
            SPANS.family(
                [("sent", spans.sent), ("not_taken", spans.not_taken), ("no_room", spans.no_room)]
                    .map(|(result, spans)| SPANS.value(&[result], number(spans)))
                    .into(),
            ),
            LOG_LINES_DROPPED.single(number(super::dropped_lines())),
            by_server(&CONNECTIONS, Connections::open),
            by_server(&CONNECTIONS_LIMIT, Connections::max),
            DIAL_CONNECTIONS.family(dialed.map(|it| DIAL_CONNECTIONS.value(&[], count(it.open()))).collect()),
            DIAL_FAILURES.family(failures.collect()),
            of_certificates(self.expiries.as_ref()),
            by_purpose(&MEMORY_HELD, Memory::held),
            by_purpose(&MEMORY_LIMIT, Memory::max),
            RUNTIME_WORKERS.single(count(runtime.num_workers())),
            RUNTIME_TASKS.single(count(runtime.num_alive_tasks())),
            RUNTIME_QUEUED_TASKS.single(count(runtime.global_queue_depth())),
        ]);
        #[cfg(target_os = "linux")]
        families.extend(self.process.collect());
        families
    }
}

/// The metrics of the server of a store.
fn of_server(figures: &ServerFigures) -> Vec<MetricFamily> {
    let ServerFigures { lost_and_kept, lost_and_not_kept, round_trips, state } = figures;
    let outcomes = [("kept", lost_and_kept), ("not_kept", lost_and_not_kept)];
    let outcomes = outcomes.map(|(outcome, commits)| STORE_AMBIGUOUS.value(&[outcome], number(*commits)));
    let mut families = vec![
        STORE_AMBIGUOUS.family(outcomes.into()),
        STORE_ROUND_TRIP.family(vec![STORE_ROUND_TRIP.durations(&[], round_trips)]),
    ];
    families.extend(state.iter().flat_map(|state| {
        [
            STORE_SYNCHRONOUS.single(if state.is_synchronous { 1.0 } else { 0.0 }),
            STORE_OLDEST_XMIN.single(number(state.oldest_xmin_age)),
        ]
    }));
    families
}

/// The next piece of the metrics by subsystem; `None` at the end.
fn page(
    orchestrator: &Orchestrator,
    family: usize,
    begun: bool,
    after: Option<&Name>,
) -> Option<(Result<String, Error>, Position)> {
    let (definition, metrics) = BY_SUBSYSTEM.get(family)?;
    let subsystems = orchestrator.subsystems(after.map(Name::as_str), PAGE);
    let found: Vec<_> = subsystems.iter().flat_map(|it| metrics(orchestrator, it)).collect();
    let has_begun = begun || !found.is_empty();
    let text =
        encode(&[definition.family(found)]).map(|text| if begun { without_head(&text).to_owned() } else { text });
    let next = match subsystems.last() {
        Some(last) if subsystems.len() == PAGE => {
            Position::Subsystems { family, begun: has_begun, after: Some(last.member.subsystem.name.clone()) }
        }
        _ => Position::Subsystems { family: family + 1, begun: false, after: None },
    };
    Some((text, next))
}

/// Families without a metric are left out, as the format requires.
fn encode(families: &[MetricFamily]) -> Result<String, Error> {
    let mut text = String::new();
    for family in families.iter().filter(|family| !family.get_metric().is_empty()) {
        TextEncoder::new().encode_utf8(std::slice::from_ref(family), &mut text)?;
    }
    Ok(text)
}

/// The help and type of a family are written once, in the two lines before its first metric.
fn without_head(text: &str) -> &str {
    text.splitn(3, '\n').nth(2).unwrap_or_default()
}

// ---------------------------------------------------------------------------------------------------------------
// The metrics

/// The metrics of an orchestrator that are not by subsystem.
async fn of_orchestrator(orchestrator: &Orchestrator) -> Vec<MetricFamily> {
    let figures = orchestrator.figures();
    let mut families = of_process_and_cycles(&figures);
    families.extend(of_loops(&figures));
    families.extend([
        SUBSYSTEMS.family(vec![
            SUBSYSTEMS.value(&["config"], count(figures.declared)),
            SUBSYSTEMS.value(&["rpc"], count(figures.registered)),
        ]),
        SUBSYSTEMS_MISSING.single(count(figures.missing)),
        LEASES.single(count(figures.leases)),
        STORE_COMMIT_DURATION.family(
            [("durable", Durability::Durable), ("buffered", Durability::Buffered)]
                .map(|(label, kind)| STORE_COMMIT_DURATION.durations(&[label], &figures.counts.commits(kind)))
                .into(),
        ),
        STORE_COMMIT_ERRORS.single(number(figures.counts.commit_errors)),
        STORE_UNREADABLE.single(number(figures.counts.unreadable_records)),
    ]);
    // Both wait if no server answers.
    let (size, server) = join!(orchestrator.store_size(), orchestrator.store_server());
    match size {
        Ok(size) => {
            families.extend([STORE_SIZE.single(number(size.bytes)), STORE_RECORDS.single(number(size.records))]);
        }
        // The other metrics are all the more important then.
        Err(error) => tracing::warn!(%error, "the size of the store is missing in the metrics"),
    }
    families.extend(server.as_ref().map(of_server).into_iter().flatten());
    families.extend(of_tasks(&figures.counts));
    families
}

/// Whether this replica leads.
fn of_replica(membership: &Membership) -> Vec<MetricFamily> {
    let mut families = vec![IS_LEADER.single(truth(membership.is_leading()))];
    if membership.has_peers() {
        let remaining = membership.lease().map(|lease| LEASE_REMAINING.value(&[], lease.remaining().as_secs_f64()));
        let ttl = membership.lease().map(|lease| LEASE_TTL.value(&[], lease.ttl().as_secs_f64()));
        let offset = membership.clock_offset().map(|offset| CLOCK_OFFSET.value(&[], offset.as_secs_f64()));
        families.extend([
            LEASE_REMAINING.family(remaining.into_iter().collect()),
            LEASE_TTL.family(ttl.into_iter().collect()),
            CAN_LEAD.single(truth(membership.unable().is_none())),
            LEADER_CHANGES.single(number(membership.changes())),
            CLOCK_OFFSET.family(offset.into_iter().collect()),
        ]);
    }
    families
}

/// The history and its watchers, also of a replica that follows.
fn of_history(history: &History) -> Vec<MetricFamily> {
    let newest = history.known().map(|newest| ACKNOWLEDGED_REVISION.value(&[], number(newest.revision.0)));
    let Watched { watchers, lagging, events } = history.watched();
    vec![
        ACKNOWLEDGED_REVISION.family(newest.into_iter().collect()),
        WATCHERS.single(count(watchers)),
        WATCHERS_LAGGING.single(count(lagging)),
        WATCHER_EVENTS.single(number(events)),
    ]
}

fn of_process_and_cycles(figures: &Figures) -> Vec<MetricFamily> {
    const TRIGGERS: [(&str, TriggerKind); 4] = [
        ("manual", TriggerKind::Manual),
        ("loop", TriggerKind::Loop),
        ("parent", TriggerKind::Parent),
        ("unknown", TriggerKind::Unknown),
    ];
    let cycles = CycleState::ALL.into_iter().flat_map(|state| {
        let counted = move |(trigger, kind)| (state, trigger, figures.counts.cycles(state, kind));
        TRIGGERS.into_iter().map(counted)
    });
    let cycles = cycles.map(|(state, trigger, cycles)| CYCLES.value(&[state.key(), trigger], number(cycles)));
    let durations = CycleState::ALL.into_iter().filter(|state| *state != CycleState::Interrupted);
    let durations = durations.map(|it| CYCLE_DURATION.durations(&[it.key()], &figures.counts.durations(it)));
    let term_began = figures.term_began_at.map(|at| TERM_START_TIME.value(&[], unix_time(at)));
    vec![
        TERM_START_TIME.family(term_began.into_iter().collect()),
        EPOCH.single(number(figures.epoch.0)),
        DRAINING.single(truth(figures.draining)),
        CYCLES.family(cycles.collect()),
        CYCLE_DURATION.family(durations.collect()),
        CYCLES_QUEUED.single(count(figures.queued)),
        CYCLES_RUNNING.single(count(figures.running)),
    ]
}

fn of_certificates(expiries: Option<&Expiries>) -> MetricFamily {
    let files = expiries.map(|expiries| expiries()).unwrap_or_default();
    let expiry =
        |(file, expiry): (&PathBuf, &Timestamp)| TLS_EXPIRY.value(&[&file.display().to_string()], unix_time(*expiry));
    TLS_EXPIRY.family(files.iter().map(expiry).collect())
}

fn of_tasks(counts: &Counts) -> [MetricFamily; 2] {
    let tasks = [("retention", &counts.retention), ("leases", &counts.leases)];
    let runs = tasks.iter().flat_map(|(task, passes)| {
        [("ok", passes.done), ("failed", passes.failed)]
            .map(|(result, runs)| TASK_RUNS.value(&[task, result], number(runs)))
    });
    let done_at = tasks.iter().filter_map(|(task, passes)| Some((task, passes.done_at?)));
    let done_at = done_at.map(|(task, at)| TASK_LAST_SUCCESS.value(&[task], unix_time(at)));
    [TASK_RUNS.family(runs.collect()), TASK_LAST_SUCCESS.family(done_at.collect())]
}

fn of_loops(figures: &Figures) -> Vec<MetricFamily> {
    let mut of_each = [LOOP_TICKS, LOOP_INTERVAL, LOOP_LAG, LOOP_LAST_CYCLE, LOOP_STOPPED, LOOP_PAUSED]
        .map(|definition| (definition, Vec::new()));
    let [ticks, interval, lag, last_cycle, stopped, paused] = &mut of_each;
    for (entry, late) in &figures.loops {
        let name = entry.settings.name.as_str();
        let of = entry.state.ticks;
        ticks.1.extend(
            [
                ("ran", of.ran),
                ("skipped", of.skipped),
                ("missed", of.missed),
                ("coalesced", of.coalesced),
                ("dropped", of.dropped),
            ]
            .map(|(disposition, ticks)| LOOP_TICKS.value(&[name, disposition], number(ticks))),
        );
        interval.1.push(LOOP_INTERVAL.value(&[name], entry.settings.interval.as_secs_f64()));
        lag.1.extend(late.map(|late| LOOP_LAG.value(&[name], late.as_secs_f64())));
        last_cycle.1.extend(entry.last_finished_at.map(|at| LOOP_LAST_CYCLE.value(&[name], unix_time(at))));
        stopped.1.push(LOOP_STOPPED.value(&[name], truth(entry.state.stopped)));
        paused.1.push(LOOP_PAUSED.value(&[name], truth(entry.state.is_paused())));
    }
    of_each.map(|(definition, metrics)| definition.family(metrics)).into()
}

/// The values of one metric for one subsystem.
type OfSubsystem = fn(&Orchestrator, &Registered) -> Vec<Metric>;

const BY_SUBSYSTEM: [(Definition, OfSubsystem); 12] = [
    (SUBSYSTEM_UP, |_, it| {
        let is_up = it.counts().is_up;
        is_up.map(|is_up| SUBSYSTEM_UP.value(&[name(it)], truth(is_up))).into_iter().collect()
    }),
    (SUBSYSTEM_OUTCOMES, |_, it| {
        let SubsystemCounts { succeeded, failed, timed_out, skipped, circuit_open, cancelled, .. } = it.counts();
        [
            ("succeeded", succeeded),
            ("failed", failed),
            ("timed_out", timed_out),
            ("skipped", skipped),
            ("circuit_open", circuit_open),
            ("cancelled", cancelled),
        ]
        .map(|(state, parts)| SUBSYSTEM_OUTCOMES.value(&[name(it), state], number(parts)))
        .into()
    }),
    (SUBSYSTEM_DURATION, |_, it| {
        let durations = it.counts().durations;
        vec![SUBSYSTEM_DURATION.durations(&[name(it)], &durations)]
    }),
    (SUBSYSTEM_ATTEMPTS, |_, it| {
        let attempts = it.counts().attempts;
        vec![SUBSYSTEM_ATTEMPTS.value(&[name(it)], number(attempts))]
    }),
    (SUBSYSTEM_RETRIES, |_, it| {
        let retries = it.counts().retries;
        vec![SUBSYSTEM_RETRIES.value(&[name(it)], number(retries))]
    }),
    (SUBSYSTEM_ISSUES, |_, it| {
        let SubsystemCounts { infos, warnings, errors, .. } = it.counts();
        [("info", infos), ("warning", warnings), ("error", errors)]
            .map(|(severity, issues)| SUBSYSTEM_ISSUES.value(&[name(it), severity], number(issues)))
            .into()
    }),
    (SUBSYSTEM_BREAKER_STATE, |_, it| {
        let breaker = it.member.breaker(Instant::now());
        [
            ("closed", breaker == BreakerState::Closed),
            ("open", matches!(breaker, BreakerState::Open(_))),
            ("half_open", breaker == BreakerState::HalfOpen),
        ]
        .map(|(state, is)| SUBSYSTEM_BREAKER_STATE.value(&[name(it), state], truth(is)))
        .into()
    }),
    (SUBSYSTEM_SUSPENDED, |_, it| vec![SUBSYSTEM_SUSPENDED.value(&[name(it)], truth(it.member.suspended))]),
    (SUBSYSTEM_OUTPUT_TIME, |_, it| {
        let at = it.counts().output_at;
        at.map(|at| SUBSYSTEM_OUTPUT_TIME.value(&[name(it)], unix_time(at))).into_iter().collect()
    }),
    (SUBSYSTEM_LEASE_EXPIRY, |orchestrator, it| {
        let ends_at = it.lease().map(|lease| unix_time(orchestrator.lease_ends_at(&lease)));
        ends_at.map(|at| SUBSYSTEM_LEASE_EXPIRY.value(&[name(it)], at)).into_iter().collect()
    }),
    (SUBSYSTEM_LEASE, |_, it| {
        let lease = it.lease().map(|lease| SUBSYSTEM_LEASE.value(&[name(it)], lease.length.as_secs_f64()));
        lease.into_iter().collect()
    }),
    (SUBSYSTEM_METRIC, |_, it| {
        let last = it.member.standing.last();
        let metrics = last.iter().flat_map(|last| &last.report.metrics);
        metrics.map(|(metric, value)| SUBSYSTEM_METRIC.value(&[name(it), metric], *value)).collect()
    }),
];

fn name(registered: &Registered) -> &str {
    registered.member.subsystem.name.as_str()
}

// ---------------------------------------------------------------------------------------------------------------
// The data model of the library

impl Definition {
    fn family(&self, metrics: Vec<Metric>) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(match self.kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Histogram => MetricType::HISTOGRAM,
        });
        family.set_metric(metrics);
        family
    }

    /// The family of a metric without labels.
    fn single(&self, value: f64) -> MetricFamily {
        self.family(vec![self.value(&[], value)])
    }

    fn labelled(&self, values: &[&str]) -> Metric {
        debug_assert_eq!(values.len(), self.labels.len(), "{}", self.name);
        let label = |(name, value): (&&str, &&str)| {
            let mut label = LabelPair::default();
            label.set_name((*name).to_owned());
            label.set_value((*value).to_owned());
            label
        };
        Metric::from_label(self.labels.iter().zip(values).map(label).collect())
    }

    fn value(&self, labels: &[&str], value: f64) -> Metric {
        let mut metric = self.labelled(labels);
        if self.kind == Kind::Counter {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        metric
    }

    fn durations(&self, labels: &[&str], durations: &Histogram) -> Metric {
        let bucket = |(bound, count)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        let mut histogram = prometheus::proto::Histogram::default();
        histogram.set_bucket(durations.cumulative().map(bucket).collect());
        histogram.set_sample_count(durations.count());
        histogram.set_sample_sum(durations.sum().as_secs_f64());
        let mut metric = self.labelled(labels);
        metric.set_histogram(histogram);
        metric
    }
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus' numbers are floats, and exact up to 2^53")]
fn number(count: u64) -> f64 {
    count as f64
}

fn count(count: usize) -> f64 {
    number(count as u64)
}

fn truth(is: bool) -> f64 {
    f64::from(u8::from(is))
}

fn unix_time(at: Timestamp) -> f64 {
    at.as_duration().as_secs_f64()
}
