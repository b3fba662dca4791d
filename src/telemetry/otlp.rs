//! Spans to a collector, over OTLP.
//!
//! The engine makes its spans itself, as plain values, once a cycle: so a cycle without tracing costs nothing, and the
//! exported times are those of the record. Names and attributes follow OpenTelemetry:
//! <https://opentelemetry.io/docs/specs/semconv/rpc/>.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
pub use opentelemetry_otlp::ExporterBuildError as ExporterError;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig, tonic_types::transport::ClientTlsConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks},
};
use tokio::{select, sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    model::{self, Code, CycleState, Endpoint, Method, Work},
    ports::Spans,
    random::Random,
};

/// Most spans that wait to be sent, of about 300 bytes each: 15 MB, and four times that if every call fails with the
/// longest message. When the queue is full because the collector is unreachable or slow, further cycles are not traced.
const MAX_WAITING: usize = 50_000;
/// Most spans in one message: with error messages of 1 KiB still below the 4 MiB that collectors accept.
const BATCH: usize = 1_000;
/// How long spans are collected before they are sent, so that short cycles share a message.
const LINGER: Duration = Duration::from_millis(200);
/// Longest wait for an answer of the collector.
const PATIENCE: Duration = Duration::from_secs(10);

/// Counts of spans by result.
#[derive(Debug, Default)]
struct Counts {
    /// Spans that are not yet sent, which the queue is limited by.
    waiting: AtomicUsize,
    sent: AtomicU64,
    no_room: AtomicU64,
    not_taken: AtomicU64,
}

/// Number of spans by result since this process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Accepted by the collector.
    pub sent: u64,
    /// Dropped: the queue was full.
    pub no_room: u64,
    /// Dropped: the collector was unreachable, too slow, or refused them.
    pub not_taken: u64,
}

/// Queues the spans of cycles for a [`Sender`].
#[derive(Debug)]
pub struct Exporter {
    queue: mpsc::UnboundedSender<Vec<model::Span>>,
    counts: Arc<Counts>,
    /// The bits of the ratio.
    sample_ratio: AtomicU64,
    random: Random,
}

/// Sends queued spans.
pub struct Sender {
    queue: mpsc::UnboundedReceiver<Vec<model::Span>>,
    counts: Arc<Counts>,
    exporter: SpanExporter,
    scope: InstrumentationScope,
    /// True if the collector did not accept the last message.
    is_away: bool,
}

/// An exporter to the collector at `endpoint`, which is connected to when there is something to send, and a sender,
/// which sends it as long as it runs. `sample_ratio` is the part of cycles that is traced; `random` chooses them.
///
/// # Errors
/// The endpoint is invalid, or a variable of OpenTelemetry (`OTEL_EXPORTER_OTLP_…`) is malformed.
pub fn exporter(
    endpoint: &str,
    sample_ratio: f64,
    random: Random,
    orchestrator_id: &str,
) -> Result<(Exporter, Sender), ExporterError> {
    let mut builder = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(PATIENCE);
    if endpoint.starts_with("https:") {
        builder = builder.with_tls_config(ClientTlsConfig::new().with_native_roots());
    }
    let mut exporter = builder.build()?;
    let resource = Resource::builder()
        .with_service_name("orchestrator")
        .with_attribute(KeyValue::new("service.instance.id", orchestrator_id.to_owned()))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    exporter.set_resource(&resource);
    let (queue, queued) = mpsc::unbounded_channel();
    let counts = Arc::<Counts>::default();
    let scope = InstrumentationScope::builder("orchestrator").with_version(env!("CARGO_PKG_VERSION")).build();
    let sender = Sender { queue: queued, counts: counts.clone(), exporter, scope, is_away: false };
    Ok((Exporter { queue, counts, sample_ratio: AtomicU64::new(sample_ratio.to_bits()), random }, sender))
}

impl Exporter {
    /// Changes the fraction of cycles that are traced.
    pub fn set_sample_ratio(&self, ratio: f64) {
        self.sample_ratio.store(ratio.to_bits(), Ordering::Relaxed);
    }

    /// Counts of spans by result so far.
    pub fn exported(&self) -> Exported {
        let Counts { waiting: _, sent, no_room, not_taken } = &*self.counts;
        let [sent, no_room, not_taken] = [sent, no_room, not_taken].map(|count| count.load(Ordering::Relaxed));
        Exported { sent, no_room, not_taken }
    }
}

impl Spans for Exporter {
    fn samples(&self) -> Option<bool> {
        Some(self.random.fraction() < f64::from_bits(self.sample_ratio.load(Ordering::Relaxed)))
    }

    fn ended(&self, spans: Vec<model::Span>) {
        let count = spans.len();
        // An empty queue accepts a cycle of any size: a cycle makes at most one span for each call.
        let has_room = |waiting| (waiting == 0 || waiting + count <= MAX_WAITING).then_some(waiting + count);
        let taken = self.counts.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, has_room);
        if taken.is_err() || self.queue.send(spans).is_err() {
            self.counts.no_room.fetch_add(count as u64, Ordering::Relaxed);
            tracing::debug!("the spans of a cycle are dropped: the collector is unreachable or too slow");
        }
    }
}

impl Sender {
    /// Sends spans until `stop`, and then the queued ones.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::new();
        while let Some(spans) = self.next(&stop).await {
            batch.extend(spans);
            select! {
                biased;
                () = sleep(LINGER) => {}
                () = stop.cancelled() => {}
            }
            while let Ok(spans) = self.queue.try_recv() {
                batch.extend(spans);
                while batch.len() >= BATCH {
                    let rest = batch.split_off(BATCH);
                    self.send(mem::replace(&mut batch, rest)).await;
                }
            }
            while !batch.is_empty() {
                let rest = batch.split_off(batch.len().min(BATCH));
                self.send(mem::replace(&mut batch, rest)).await;
            }
        }
    }

    async fn next(&mut self, stop: &CancellationToken) -> Option<Vec<model::Span>> {
        select! {
            biased;
            spans = self.queue.recv() => return spans,
            () = stop.cancelled() => {}
        }
        self.queue.close();
        self.queue.recv().await
    }

    async fn send(&mut self, batch: Vec<model::Span>) {
        let count = batch.len();
        let sent = self.exporter.export(batch.into_iter().map(|span| self.data(span)).collect()).await;
        self.counts.waiting.fetch_sub(count, Ordering::Relaxed);
        let end = if sent.is_ok() { &self.counts.sent } else { &self.counts.not_taken };
        end.fetch_add(count as u64, Ordering::Relaxed);
        // Logged once, not for every message.
        match (&sent, self.is_away) {
            (Err(error), false) => tracing::warn!(%error, "can't send spans to the collector; they are dropped"),
            (Ok(()), true) => tracing::info!("the collector accepts spans again"),
            _ => {}
        }
        self.is_away = sent.is_err();
    }

    fn data(&self, span: model::Span) -> SpanData {
        let model::Span { context, parent, started_at, duration, work } = span;
        let is_remote = matches!(work, Work::Cycle { has_remote_parent: true, .. });
        let Described { name, kind, attributes, status } = describe(work);
        let start_time = UNIX_EPOCH + Duration::try_from(started_at.as_duration()).unwrap_or_default();
        SpanData {
            span_context: SpanContext::new(
                TraceId::from_bytes(context.trace_id.0.to_be_bytes()),
                SpanId::from_bytes(context.span_id.to_be_bytes()),
                TraceFlags::default().with_sampled(context.is_sampled),
                false,
                context.state.and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE),
            ),
            parent_span_id: parent.map_or(SpanId::INVALID, |id| SpanId::from_bytes(id.to_be_bytes())),
            parent_span_is_remote: is_remote,
            span_kind: kind,
            name: name.into(),
            start_time,
            end_time: start_time + duration,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

struct Described {
    name: &'static str,
    kind: SpanKind,
    attributes: Vec<KeyValue>,
    status: Status,
}

fn describe(work: Work) -> Described {
    // Attributes have no unsigned numbers.
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    match work {
        Work::Cycle { cycle_id, epoch, trigger, state, error, has_remote_parent: _ } => {
            let mut attributes = vec![
                KeyValue::new("orchestrator.cycle_id", number(cycle_id.0)),
                KeyValue::new("orchestrator.epoch", number(epoch.0)),
                KeyValue::new("orchestrator.cycle.state", state.name()),
                KeyValue::new("orchestrator.cycle.trigger", trigger.name()),
            ];
            attributes.extend(trigger.loop_name().map(|name| KeyValue::new("orchestrator.loop", name.to_string())));
            attributes.extend(trigger.parent().map(|parent| KeyValue::new("orchestrator.parent", parent.to_string())));
            let status = if state == CycleState::Succeeded { Status::Unset } else { Status::error(error) };
            Described { name: "cycle", kind: SpanKind::Internal, attributes, status }
        }
        Work::Call { subsystem, method, cycle_id, attempt, code, message } => {
            let name = match method {
                Method::Initialize => "dreamnet.subsystem.v1.Subsystem/Initialize",
                Method::RunCycle => "dreamnet.subsystem.v1.Subsystem/RunCycle",
            };
            let mut attributes = vec![
                KeyValue::new("rpc.system.name", "grpc"),
                KeyValue::new("rpc.method", name),
                KeyValue::new("rpc.response.status_code", code.name()),
                KeyValue::new("orchestrator.subsystem", subsystem.name.to_string()),
                KeyValue::new("orchestrator.cycle_id", number(cycle_id.0)),
                KeyValue::new("orchestrator.attempt", i64::from(attempt)),
            ];
            attributes.extend(server(&subsystem.endpoint));
            let status = match (method, code) {
                // UNIMPLEMENTED means that a subsystem needs no initialization.
                (_, Code::Ok) | (Method::Initialize, Code::Unimplemented) => Status::Unset,
                _ => {
                    attributes.push(KeyValue::new("error.type", code.name()));
                    Status::error(message)
                }
            };
            Described { name, kind: SpanKind::Client, attributes, status }
        }
        Work::Commit => {
            Described { name: "commit", kind: SpanKind::Internal, attributes: Vec::new(), status: Status::Unset }
        }
    }
}

/// The address of a call.
fn server(endpoint: &Endpoint) -> Vec<KeyValue> {
    match endpoint {
        Endpoint::Unix(path) => vec![KeyValue::new("server.address", path.clone())],
        Endpoint::Http(uri) | Endpoint::Https(uri) => {
            let authority = uri.split_once("://").map_or(uri.as_str(), |(_, authority)| authority);
            let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
            let mut attributes = vec![KeyValue::new("server.address", host.to_owned())];
            attributes.extend(port.parse::<i64>().ok().map(|port| KeyValue::new("server.port", port)));
            attributes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Span, SpanContext, TraceId};

    #[tokio::test]
    async fn spans_without_memory_are_counted() {
        let (exporter, _sender) = exporter("http://127.0.0.1:1", 1.0, Random::seeded(0), "o").unwrap();
        let span = || Span {
            context: SpanContext::root(TraceId(1), 1, true),
            parent: None,
            started_at: jiff::Timestamp::UNIX_EPOCH,
            duration: Duration::ZERO,
            work: Work::Commit,
        };
        let spans = |count| (0..count).map(|_| span()).collect::<Vec<_>>();
        exporter.ended(spans(MAX_WAITING - 1));
        exporter.ended(spans(2));
        exporter.ended(spans(1));
        exporter.ended(spans(1));
        assert_eq!(exporter.exported(), Exported { no_room: 3, ..Exported::default() });
    }
}
