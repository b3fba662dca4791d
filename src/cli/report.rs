//! `orchestrator report`: reliability and speed in a period, by subsystem.

mod figures;

use std::{cmp::Ordering, collections::BTreeMap};

use bytes::Bytes;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, Serializer};

use self::figures::{CycleFigures, SubsystemFigures, Tally, compare};
use super::{
    Exit, Failure, HOST, known,
    output::{
        Breadth, coarse, count, escape_json, grouped, instant, is_error_terminal, milliseconds, note, parse_positive,
        parse_time, print, sections, short, telemetry, timestamp, trigger,
    },
    remote::{Client, Remote},
    subsystems,
    table::{Facts, Page, Table, left, long, number, right, text},
    watch::unreadable,
};
use crate::proto::{
    self,
    orchestrator::v1::{self as pb, cycle_event::Event},
};

/// Analyse the history: reliability and speed of each subsystem, and which to speed up first
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Reads the cycles that finished from --since up to --until, and compares them with the period of the same length before \
it. Its memory use does not depend on the number of cycles.

The table:
  CYCLES       in which it took part, however that ended
  SUCCESS      of its parts that succeeded or count as failed: FAILED,
               TIMED_OUT, CIRCUIT_OPEN, and SKIPPED, unless it or one that it
               requires was suspended or left out
  P50 P95 P99  quantiles of the durations, retries included, of its parts that
               succeeded or timed out
  RETRIES      attempts beyond the first
  ON PATH      in how many of its cycles it stood on the critical path
  SHARE        its share of the time of all critical paths. Speed up the one
               with the largest share first: no cycle gets faster by what is
               not on its critical path
  ±SUCCESS     change against the period before, in percentage points; `new`
               where it took part in none of its cycles, `-` where there is
               nothing to compare
  ±P50 ±P95    relative change; +10 % is slower
  OTHER ENDS   its parts that did not succeed, by state

A quantile is the shortest duration that this share does not exceed: definition 1 of Hyndman and Fan (1996), \
percentile_disc of SQL. It is accurate to 0.5 %. Durations and success of whole cycles are those of the SUCCEEDED, \
DEGRADED and FAILED ones with a subsystem in them; only SUCCEEDED is success.

With --output json, one object:
  since, until   the period
  previousSince  the period before is from this to since
  completeSince  null, unless retention has removed cycles of either: from then
                 on the record is complete, and only what finished since is
                 counted; stderr says so
  cycles         cycles, succeeded, degraded, failed, cancelled, interrupted,
                 successRate, p50Ms, p95Ms, p99Ms, criticalMs, startedBy
  subsystems     of each: name, cycles, succeeded, failed, timedOut, skipped,
                 circuitOpen, cancelled, successRate, retries, p50Ms, p95Ms,
                 p99Ms, criticalCycles, criticalCycleShare, criticalMs,
                 criticalTimeShare
  in both        previousCycles, previousSuccessRate, previousP50Ms,
                 previousP95Ms, successRateChange (a difference), p50Change,
                 p95Change (relative)

Rates and shares are 0 to 1, and null where there is nothing to say. --output ndjson has the subsystems, a line each, \
and --output csv has a column for each of these; null is empty. Names begin with a letter and other values are \
numbers, so that no cell is a formula.

Examples:
  orchestrator report
  orchestrator report --since 7d --sort p95 --limit 10
  orchestrator report --since yesterday --until today
  orchestrator report --since 2026-01-31 --until 2026-01-31T12:00:00Z
  orchestrator report --since 1h --output json | jq '.subsystems[].p95Ms'
  orchestrator report --since 30d --output csv > report.csv")]
pub(super) struct Report {
    /// Start of the period: 2026-01-31T12:00:00Z, 2026-01-31, yesterday, or how long ago, such as 2h or 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_time)]
    since: prost_types::Timestamp,
    /// End of the period, in the same forms [default: now]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<prost_types::Timestamp>,
    /// Only cycles of this loop
    #[arg(long = "loop", value_name = "NAME")]
    loop_name: Option<String>,
    /// Show only this subsystem; may be repeated. Shares still refer to all subsystems
    #[arg(long = "subsystem", value_name = "NAME", value_delimiter = ',')]
    subsystems: Vec<String>,
    /// Order of the subsystems, worst first, unless it is by name
    #[arg(long, value_name = "BY", default_value = "critical-time")]
    sort: Sort,
    /// Most subsystems to show [default: all]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u64>)]
    limit: Option<u64>,
    #[command(flatten)]
    remote: Remote<Format>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sort {
    // Not `///`: with a help for each value, clap prints the help of all flags in its long form.

    // The largest share of the critical time first
    CriticalTime,
    // By name
    Name,
    // The lowest success rate first
    SuccessRate,
    // The longest median duration first
    P50,
    // The longest 95th percentile of durations first
    P95,
    // The longest 99th percentile of durations first
    P99,
    // The most retries first
    Retries,
    // The largest relative growth of P95 first
    P95Change,
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct Format {
    /// A table for people; one JSON object; or the subsystems, as JSON objects a line each or as CSV
    #[arg(long, value_name = "FORMAT", env = "ORCHESTRATOR_OUTPUT", default_value = "table", global = true)]
    output: Output,
    #[command(flatten)]
    breadth: Breadth,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Table,
    Json,
    Ndjson,
    Csv,
}

/// The period, and the start of the one before it.
#[derive(Clone, Copy)]
struct Period {
    previous_since: Timestamp,
    since: Timestamp,
    until: Timestamp,
}

/// The whole report, as in the JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    #[serde(serialize_with = "proto_time")]
    since: Timestamp,
    #[serde(serialize_with = "proto_time")]
    until: Timestamp,
    #[serde(serialize_with = "proto_time")]
    previous_since: Timestamp,
    #[serde(serialize_with = "proto_time_if_any")]
    complete_since: Option<Timestamp>,
    cycles: CycleFigures,
    subsystems: Vec<SubsystemFigures>,
}

/// With the digits of canonical proto JSON, as in the other commands.
fn proto_time<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&proto::timestamp(*at))
}

#[allow(clippy::ref_option, reason = "serde asks so")]
fn proto_time_if_any<S: Serializer>(at: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    at.map(|at| proto::timestamp(at).to_string()).serialize(serializer)
}

impl Report {
    /// Reads the history and shows the report.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let period = self.period()?;
        let figures = self.figures(period).await?;
        if let Some(complete_since) = figures.complete_since {
            let of_what =
                if complete_since > period.since { "this period" } else { "the period before, for the trend" };
            note(&format!(
                "the history begins at {}: older cycles are no longer retained, so only a part of {of_what} is counted",
                instant(complete_since)
            ));
        }
        print(&match self.remote.format.output {
            Output::Table => figures.tables(self.remote.format.breadth.page()),
            Output::Json => line(&figures)?,
            Output::Ndjson => figures.subsystems.iter().map(line).collect::<Result<_, _>>()?,
            Output::Csv => figures.csv()?,
        })?;
        Ok(Exit::Done)
    }

    fn period(&self) -> Result<Period, Failure> {
        let wrong = |message: String| Failure::new(Exit::Usage, message);
        let read = |flag: &str, time: &prost_types::Timestamp| {
            timestamp(time).ok_or_else(|| wrong(format!("{flag} is out of range")))
        };
        let now = HOST.clock.now();
        let since = read("--since", &self.since)?;
        let until = self.until.as_ref().map_or(Ok(now), |until| read("--until", until))?;
        if since >= now {
            return Err(wrong(format!("--since is {}, which is not in the past", instant(since))));
        }
        if since >= until {
            return Err(wrong(format!(
                "--until is {}, which is not after --since, {}",
                instant(until),
                instant(since)
            )));
        }
        let previous_since = since.checked_sub(until.duration_since(since)).unwrap_or(Timestamp::MIN);
        Ok(Period { previous_since, since, until })
    }

    /// Checks the subsystems and the loop.
    async fn figures(&self, period: Period) -> Result<Figures, Failure> {
        let mut client = self.remote.connect().await?;
        let renamed = FormerNames::read(&self.remote, &mut client).await?;
        let figures = self.read(&mut client, period, &renamed).await?;
        if figures.cycles.cycles == 0 {
            // A loop without cycles may be a typing error.
            known::check(&self.remote, &mut client, &[], self.loop_name.as_slice()).await?;
        }
        match self.select(figures, &renamed) {
            Ok(figures) => Ok(figures),
            Err(failure) => {
                known::check(&self.remote, &mut client, &self.subsystems, &[]).await?;
                Err(failure)
            }
        }
    }

    async fn read(&self, client: &mut Client, period: Period, renamed: &FormerNames) -> Result<Figures, Failure> {
        let oldest = self.oldest(client).await?;
        let (now, previous) = self.count(client, period, oldest.revision, renamed).await?;
        let (cycles, subsystems) = compare(&now, &previous);
        let Period { previous_since, since, until } = period;
        let complete_since = oldest.finished_at.filter(|at| oldest.revision > 1 && *at > previous_since);
        Ok(Figures { since, until, previous_since, complete_since, cycles, subsystems })
    }

    /// The oldest record above which no record was removed: the first record if none was removed.
    ///
    /// Below it, retention may keep, for instance, more FAILED cycles than others, so that rates would be wrong.
    async fn oldest(&self, client: &mut Client) -> Result<Oldest, Failure> {
        let request = pb::WatchCyclesRequest { from_oldest: true, ..pb::WatchCyclesRequest::default() };
        let first = async { client.watch_cycles(request).await?.into_inner().message().await };
        let first = self.remote.quickly(first).await?.and_then(|response| response.event);
        match first {
            Some(pb::CycleEvent { revision, event: Some(Event::Recorded(record)), .. }) => {
                Ok(Oldest { revision, finished_at: finished_at(&telemetry(&record)?) })
            }
            Some(pb::CycleEvent { revision, event: Some(Event::Unreadable(_)), .. }) => {
                Ok(Oldest { revision, finished_at: None })
            }
            _ => Ok(Oldest { revision: 0, finished_at: None }),
        }
    }

    /// Counts the cycles from this revision on, of the period and of the one before it.
    async fn count(
        &self,
        client: &mut Client,
        period: Period,
        oldest: u64,
        renamed: &FormerNames,
    ) -> Result<(Tally, Tally), Failure> {
        /// Records in one page: about 3 MB with 28 subsystems, where the service ends a page anyway.
        const PAGE: u32 = 1000;
        // With a filter on the time, the service would examine the whole history.
        let mut request = pb::ListCyclesRequest {
            page_size: PAGE,
            r#loop: self.loop_name.clone().unwrap_or_default(),
            finished_before: Some(proto::timestamp(period.until)),
            ..pb::ListCyclesRequest::default()
        };
        let (mut now, mut previous) = (Tally::default(), Tally::default());
        let mut progress = Progress::new(period);
        loop {
            let page = self.remote.quickly(client.list_cycles(request.clone())).await?.into_inner();
            // After the clock was set back, some records are out of order, so only a whole older page ends the period.
            let mut is_over = !page.cycles.is_empty();
            for cycle in &page.unreadable {
                note(&format!("left out: {}", unreadable(cycle)));
            }
            for record in &page.cycles {
                let cycle = renamed.in_cycle(telemetry(record)?);
                let Some(finished_at) = finished_at(&cycle).filter(|_| cycle.revision >= oldest) else { continue };
                let tally = match finished_at {
                    at if at >= period.since => &mut now,
                    at if at >= period.previous_since => &mut previous,
                    _ => continue,
                };
                is_over = false;
                tally.add(&cycle).map_err(|error| Failure::new(Exit::Refused, error.to_string()))?;
            }
            request.page_token = page.next_page_token;
            if is_over || request.page_token.is_empty() {
                return Ok((now, previous));
            }
            progress.counted(&page.cycles)?;
        }
    }

    /// Only the requested subsystems, in the requested order.
    fn select(&self, mut figures: Figures, renamed: &FormerNames) -> Result<Figures, Failure> {
        let wanted: Vec<_> = self.subsystems.iter().map(|name| renamed.present(name)).collect();
        let is_there = |name: &&&str| figures.subsystems.iter().any(|it| it.name.as_str() == **name);
        if let Some(name) = wanted.iter().find(|name| !is_there(name)) {
            let of_loop = self.loop_name.as_ref().map_or_else(String::new, |name| format!(" of loop {name}"));
            let (since, until) = (instant(figures.since), instant(figures.until));
            let message = format!("{name} took part in no cycle{of_loop} that finished from {since} to {until}");
            return Err(Failure::new(Exit::Refused, message));
        }
        if !wanted.is_empty() {
            figures.subsystems.retain(|it| wanted.contains(&it.name.as_str()));
        }
        let largest = |a: Option<f64>, b: Option<f64>| b.partial_cmp(&a).unwrap_or(Ordering::Equal);
        figures.subsystems.sort_by(|a, b| {
            let order = match self.sort {
                Sort::CriticalTime => largest(a.critical_time_share, b.critical_time_share),
                Sort::Name => Ordering::Equal,
                Sort::SuccessRate => largest(a.success_rate.map(|rate| -rate), b.success_rate.map(|rate| -rate)),
                Sort::P50 => largest(a.p50_ms, b.p50_ms),
                Sort::P95 => largest(a.p95_ms, b.p95_ms),
                Sort::P99 => largest(a.p99_ms, b.p99_ms),
                Sort::Retries => b.retries.cmp(&a.retries),
                Sort::P95Change => largest(a.p95_change, b.p95_change),
            };
            order.then_with(|| a.name.cmp(&b.name))
        });
        let limit = self.limit.and_then(|limit| usize::try_from(limit).ok());
        figures.subsystems.truncate(limit.unwrap_or(usize::MAX));
        Ok(figures)
    }
}

/// The present names of subsystems by their former ones: figures of a subsystem are those under all of its names.
struct FormerNames(BTreeMap<String, String>);

impl FormerNames {
    async fn read<F: clap::Args>(remote: &Remote<F>, client: &mut Client) -> Result<Self, Failure> {
        let mut renamed = BTreeMap::new();
        let take = |page: Vec<pb::SubsystemStatus>| {
            for status in page {
                let name = subsystems::name(&status);
                renamed.extend(status.former_names.into_iter().map(|former| (former, name.clone())));
            }
            Ok(())
        };
        subsystems::pages(remote, client, take).await?;
        Ok(Self(renamed))
    }

    fn present<'a>(&'a self, name: &'a str) -> &'a str {
        self.0.get(name).map_or(name, String::as_str)
    }

    /// The cycle, whose subsystems have their present names.
    fn in_cycle(&self, mut cycle: pb::CycleTelemetry) -> pb::CycleTelemetry {
        if !self.0.is_empty() {
            let parts = cycle.subsystems.iter_mut().map(|part| &mut part.name);
            for name in parts.chain(&mut cycle.critical_path) {
                *name = self.present(name).to_owned();
            }
        }
        cycle
    }
}

struct Oldest {
    /// 0 if the history is empty.
    revision: u64,
    finished_at: Option<Timestamp>,
}

fn finished_at(cycle: &pb::CycleTelemetry) -> Option<Timestamp> {
    cycle.finished_at.as_ref().and_then(timestamp)
}

// ---------------------------------------------------------------------------------------------------------------
// Progress

/// The progress of reading a long history, on a terminal. Removed when dropped.
struct Progress {
    period: Period,
    cycles: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Shows nothing yet, since one page is often enough.
    fn new(period: Period) -> Self {
        Self { period, cycles: 0, bar: None }
    }

    /// Shows the number of counted cycles; more follow.
    fn counted(&mut self, records: &[Bytes]) -> Result<(), Failure> {
        self.cycles += records.len() as u64;
        let Some(last) = records.last().filter(|_| is_error_terminal()) else { return Ok(()) };
        let Some(at) = finished_at(&telemetry(last)?) else { return Ok(()) };
        let seconds = |length: SignedDuration| u64::try_from(length.as_secs()).unwrap_or_default();
        let bar = self.bar.get_or_insert_with(|| {
            let length = seconds(self.period.until.duration_since(self.period.previous_since));
            let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
            match ProgressStyle::with_template("reading  [{bar:24}]  {wide_msg}") {
                Ok(style) => bar.with_style(style.progress_chars("=> ")),
                Err(_) => bar,
            }
        });
        bar.set_message(format!("{}, back to {}", count(self.cycles, "cycle"), instant(at)));
        bar.set_position(seconds(self.period.until.duration_since(at)));
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Showing

impl Figures {
    /// The subsystems. A [`crate::model::Name`] begins with a letter, so that a spreadsheet treats no cell as a
    /// formula.
    fn csv(&self) -> Result<String, Failure> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        self.subsystems.iter().try_for_each(|it| writer.serialize(it)).map_err(|error| unwritable(&error))?;
        let bytes = writer.into_inner().map_err(|error| unwritable(&error))?;
        String::from_utf8(bytes).map_err(|error| unwritable(&error))
    }

    fn tables(&self, page: Page) -> String {
        sections([self.facts().finish(page), self.table().finish_unless_empty(page)])
    }

    fn facts(&self) -> Facts {
        let cycles = &self.cycles;
        let length = short(coarse(self.until.duration_since(self.since).unsigned_abs()));
        let mut facts = Facts::new();
        facts.fact("period", format!("{} to {} ({length})", instant(self.since), instant(self.until)));
        let by_state = counts([
            (cycles.succeeded, "SUCCEEDED"),
            (cycles.degraded, "DEGRADED"),
            (cycles.failed, "FAILED"),
            (cycles.cancelled, "CANCELLED"),
            (cycles.interrupted, "INTERRUPTED"),
        ]);
        if cycles.cycles == 0 {
            facts.fact("cycles", "none");
        } else {
            facts.fact("cycles", format!("{}: {by_state}", grouped(cycles.cycles)));
        }
        let started_by = cycles.started_by.iter();
        let started_by = started_by.map(|it| format!("{} {}", trigger(it.trigger, &it.r#loop), grouped(it.cycles)));
        facts.fact("started by", started_by.collect::<Vec<_>>().join(", "));
        facts.fact("success", cycles.success_rate.map_or_else(String::new, percent));
        if let (Some(p50), Some(p95), Some(p99)) = (cycles.p50_ms, cycles.p95_ms, cycles.p99_ms) {
            let [p50, p95, p99] = [p50, p95, p99].map(milliseconds);
            facts.fact("duration", format!("p50 {p50}, p95 {p95}, p99 {p99}"));
        }
        let trend = || {
            let points = cycles.success_rate_change.map_or_else(|| "-".to_owned(), percentage_points);
            let [p50, p95] = [cycles.p50_change, cycles.p95_change].map(|it| it.map_or_else(|| "-".to_owned(), change));
            format!("success {points}, p50 {p50}, p95 {p95}")
        };
        facts.fact(
            "period before",
            match cycles.previous_cycles {
                0 => "no cycles to compare with".to_owned(),
                before => format!("{}; since then {}", count(before, "cycle"), trend()),
            },
        );
        facts
    }

    fn table(&self) -> Table {
        let mut table = Table::new([
            left("SUBSYSTEM"),
            right("CYCLES"),
            right("SUCCESS"),
            right("P50"),
            right("P95"),
            right("P99").minor(),
            right("RETRIES").minor(),
            right("ON PATH").minor(),
            right("SHARE"),
            right("±SUCCESS").minor(),
            right("±P50").minor(),
            right("±P95"),
            long("OTHER ENDS"),
        ]);
        for it in &self.subsystems {
            let shown = |figure: Option<f64>, show: fn(f64) -> String| text(figure.map_or_else(|| "-".into(), show));
            let is_new = it.previous_cycles == 0 && self.cycles.previous_cycles > 0;
            let compared = |change: Option<f64>, show: fn(f64) -> String| match change {
                None if is_new => text("new"),
                change => shown(change, show),
            };
            let ended_else = counts([
                (it.failed, "FAILED"),
                (it.timed_out, "TIMED_OUT"),
                (it.circuit_open, "CIRCUIT_OPEN"),
                (it.skipped, "SKIPPED"),
                (it.cancelled, "CANCELLED"),
            ]);
            table.row([
                text(it.name.as_str()),
                number(it.cycles),
                shown(it.success_rate, percent),
                shown(it.p50_ms, milliseconds),
                shown(it.p95_ms, milliseconds),
                shown(it.p99_ms, milliseconds),
                number(it.retries),
                shown(it.critical_cycle_share, percent),
                shown(it.critical_time_share, percent),
                compared(it.success_rate_change, percentage_points),
                compared(it.p50_change, change),
                compared(it.p95_change, change),
                text(ended_else),
            ]);
        }
        table
    }
}

/// One line of JSON.
fn line(of: &impl Serialize) -> Result<String, Failure> {
    let json = serde_json::to_string(of).map_err(|error| unwritable(&error))?;
    Ok(format!("{}\n", escape_json(&json)))
}

fn unwritable(error: &dyn std::error::Error) -> Failure {
    Failure::new(Exit::Refused, format!("can't write the report: {error}"))
}

/// The counts that are not 0.
fn counts<const N: usize>(counts: [(u64, &str); N]) -> String {
    let counts = counts.into_iter().filter(|(count, _)| *count > 0);
    counts.map(|(count, of_what)| format!("{} {of_what}", grouped(count))).collect::<Vec<_>>().join(", ")
}

/// A share in percent. Only exactly 1 is shown as 100 %, and only exactly 0 as 0 %.
fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        0.0 | 100.0 => format!("{percent:.0} %"),
        _ => format!("{:.1} %", percent.clamp(0.1, 99.9)),
    }
}

/// The change of a share.
fn percentage_points(change: f64) -> String {
    signed(change * 100.0, 1, "pp")
}

/// A relative change in percent.
fn change(change: f64) -> String {
    signed(change * 100.0, 0, "%")
}

/// With a sign, unless it rounds to 0.
fn signed(number: f64, decimals: usize, unit: &str) -> String {
    let text = format!("{number:+.decimals$}");
    let is_none = text.chars().all(|c| !('1'..='9').contains(&c));
    if is_none { format!("0 {unit}") } else { format!("{text} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::{super::table::tests::assert_screens, *};
    use pb::SubsystemState::{self, Failed, Skipped, Succeeded};

    fn tally(cycles: u64, of: impl Fn(u64) -> Vec<(&'static str, SubsystemState, f64)>) -> Result<Tally, Failure> {
        let mut tally = Tally::default();
        for i in 0..cycles {
            let parts = of(i).into_iter().map(|(name, state, duration_ms)| pb::SubsystemTelemetry {
                name: name.into(),
                state: state.into(),
                started_at: (state != Skipped).then(prost_types::Timestamp::default),
                duration_ms,
                attempts: 1,
                ..pb::SubsystemTelemetry::default()
            });
            let subsystems: Vec<_> = parts.collect();
            let has_failed = subsystems.iter().any(|part| part.state() != Succeeded);
            let state = if has_failed { pb::CycleState::Degraded } else { pb::CycleState::Succeeded };
            let cycle = pb::CycleTelemetry {
                state: state.into(),
                trigger: pb::Trigger::Loop.into(),
                r#loop: "heartbeat".into(),
                duration_ms: 431.0,
                critical_path: vec!["exchange".into(), "prices".into()],
                subsystems,
                ..pb::CycleTelemetry::default()
            };
            tally.add(&cycle).map_err(|error| Failure::new(Exit::Refused, error.to_string()))?;
        }
        Ok(tally)
    }

    #[test]
    fn a_report_fits_its_terminal() -> Result<(), Failure> {
        let parts = |i: u64| {
            let prices = if i.is_multiple_of(7) { Failed } else { Succeeded };
            let signals = if prices == Failed { Skipped } else { Succeeded };
            vec![
                ("exchange", Succeeded, 431.0),
                ("prices", prices, 12.5),
                ("sentiment-of-the-market", signals, 1_250.0),
            ]
        };
        let before = tally(1_000, |_| vec![("exchange", Succeeded, 400.0), ("prices", Succeeded, 12.5)])?;
        let (cycles, subsystems) = compare(&tally(1_400, parts)?, &before);
        let since = Timestamp::UNIX_EPOCH;
        let until = since.saturating_add(SignedDuration::from_hours(24)).unwrap_or(since);
        let figures = Figures { since, until, previous_since: since, complete_since: None, cycles, subsystems };
        assert_screens("report", |page| figures.tables(page));
        Ok(())
    }

    #[test]
    fn percentages_and_changes_are_rounded() {
        assert_eq!([0.0, 0.000_01, 0.5, 0.999_9, 1.0].map(percent), ["0 %", "0.1 %", "50.0 %", "99.9 %", "100 %"]);
        assert_eq!([-0.25, 0.0001, 0.001].map(percentage_points), ["-25.0 pp", "0 pp", "+0.1 pp"]);
        assert_eq!([0.104, -0.004, 20.0].map(change), ["+10 %", "0 %", "+2000 %"]);
    }
}
