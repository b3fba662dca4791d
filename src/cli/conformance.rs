//! `orchestrator conformance`: checks that a subsystem conforms to the contract.

mod checks;
mod junit;
mod probe;

use std::{fs, path::PathBuf, time::Duration};

use serde::Serialize;
use serde_json::Value;

use self::{
    checks::{CHECKS, Check, Level, Needs, Problem, RUN_CYCLE},
    probe::Probe,
};
use super::{
    Exit, Failure,
    output::{Format, clean, count, escape_json, print, sections},
    parameters::{self, Parameters},
    table::{Page, Table, left, state, text},
};
use crate::model::{Code, Endpoint, Name, excerpt};

/// Most bytes of a request or an answer in a report: an error or an output can have any size.
const MAX_TEXT: usize = 4 << 10;
/// Longest duration of a call: the largest timeout of a registration.
const MAX_TIMEOUT: Duration = Duration::from_hours(24);

/// Check that a subsystem conforms to the contract
#[derive(Debug, clap::Args)]
#[command(after_help = "\
It runs real cycles against the subsystem: use a test instance. It calls with an epoch and cycle ids taken from the \
clock: the instance refuses an orchestrator that was started earlier, until the instance is restarted.

Required checks apply to every subsystem. Without --subsystem a made-up name is used, which works only if the endpoint \
accepts every name. The handling of calls in progress can be checked only if cycles take at least 0.2 s: use --param \
to make them take longer, if the subsystem has a parameter for it.

Exit codes:
  0    no required check has failed; with --strict, no recommended one either
  1    a check has failed
  2    wrong usage
  4    the subsystem can't be reached

Examples:
  orchestrator conformance http://127.0.0.1:50051 --subsystem prices
  orchestrator conformance unix:/run/signals.sock --subsystem signals \\
      --param window=5 --input 'prices={\"a\": 1}' --requires prices
  orchestrator conformance http://127.0.0.1:50051 --subsystem prices \\
      --strict --junit conformance.xml")]
pub(super) struct Conformance {
    /// Where it is dialed: http://HOST:PORT, https://HOST:PORT or unix:/PATH
    #[arg(value_parser = endpoint)]
    endpoint: Endpoint,
    /// The name of the subsystem to check; repeat it for other subsystems at the endpoint, which are called
    /// concurrently
    #[arg(long = "subsystem", value_name = "NAME", value_parser = Name::parse)]
    subsystems: Vec<Name>,
    #[command(flatten)]
    parameters: Parameters,
    /// An input of every cycle, its output as a JSON object; may be repeated
    #[arg(long = "input", value_name = "NAME=OBJECT", value_parser = parameters::parameter)]
    inputs: Vec<(String, Value)>,
    /// Inputs that the subsystem `requires`, which are FRESH in every cycle; without it, they are also sent as STALE
    /// and ABSENT. Each needs an --input
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    requires: Vec<String>,
    /// Longest duration of one call
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    timeout: Duration,
    /// Treat recommendations as requirements
    #[arg(long)]
    strict: bool,
    /// Also write the report as JUnit XML, for CI systems
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

/// The report, as `--output json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    endpoint: String,
    subsystem: String,
    /// True if no check that counts has failed, and at least one has passed.
    passed: bool,
    checks: Vec<Finding>,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    level: Level,
    outcome: Outcome,
    /// The rule, in the words of the contract.
    rule: &'static str,
    /// True if a failure changes the exit code.
    counts: bool,
    /// Why the check is not applicable; else empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    /// The request, if the check failed; else empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    sent: String,
    /// The answer, if the check failed; else empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    came: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Outcome {
    Passed,
    Failed,
    NotApplicable,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Passed => "PASSED",
            Self::Failed => "FAILED",
            Self::NotApplicable => "NOT_APPLICABLE",
        }
    }
}

impl Finding {
    fn new(check: &Check, found: Result<(), Problem>, strict: bool) -> Self {
        let Check { name, level, rule, .. } = *check;
        let counts = strict || level == Level::Required;
        let [reason, sent, came] = [(); 3].map(|()| String::new());
        let finding = Self { name, level, outcome: Outcome::Passed, rule, counts, reason, sent, came };
        match found {
            Ok(()) => finding,
            Err(Problem::NotApplicable(reason)) => Self { outcome: Outcome::NotApplicable, reason, ..finding },
            Err(Problem::Failed { sent, came }) => {
                let [sent, came] = [sent, came].map(|text| bounded(text, MAX_TEXT));
                Self { outcome: Outcome::Failed, sent, came, ..finding }
            }
        }
    }

    /// The status code that came, if the check failed because of one.
    fn code(&self) -> &str {
        self.came.split(':').next().unwrap_or_default()
    }

    fn has_failed(&self) -> bool {
        self.outcome == Outcome::Failed
    }
}

/// Reads the endpoint. Its value is in the message already.
fn endpoint(text: &str) -> Result<Endpoint, String> {
    Endpoint::parse(text).map_err(|why| why.replacen(&format!("is {text:?}; "), "", 1))
}

fn timeout(text: &str) -> Result<Duration, String> {
    let timeout = super::remote::timeout(text)?;
    if timeout > MAX_TIMEOUT { Err("give at most 24h".to_owned()) } else { Ok(timeout) }
}

/// The text, shortened to `max` bytes.
fn bounded(text: String, max: usize) -> String {
    match excerpt(&text, max) {
        whole if whole.len() == text.len() => text,
        part => format!("{part}… ({} bytes in all)", text.len()),
    }
}

impl Conformance {
    /// Runs all checks, one after the other.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let Self { endpoint, subsystems, parameters, inputs, requires, timeout, strict, junit, format } = self;
        let mut names: Vec<String> = Vec::with_capacity(subsystems.len());
        for name in subsystems {
            if !names.iter().any(|other| other == name.as_str()) {
                names.push(name.to_string());
            }
        }
        let probe = Probe::connect(endpoint, names, parameters.encode()?, inputs, requires, timeout).await?;
        let checks = checked(&probe, strict).await;
        let passed = !checks.iter().any(|finding| finding.counts && finding.has_failed());
        let report =
            Report { endpoint: probe.endpoint().to_string(), subsystem: probe.name().to_owned(), passed, checks };
        let written = junit.map_or(Ok(()), |path| {
            fs::write(&path, junit::document(&report))
                .map_err(|error| Failure::new(Exit::Usage, format!("can't write --junit {}: {error}", path.display())))
        });
        if format.is_json() {
            let json = serde_json::to_string(&report)
                .map_err(|error| Failure::new(Exit::Refused, format!("can't write the report: {error}")))?;
            print(&format!("{}\n", escape_json(&json)))?;
        } else {
            print(&report.text(format.page()))?;
        }
        written?;
        Ok(if passed { Exit::Done } else { Exit::Refused })
    }
}

/// The results of all checks. If a plain cycle fails, that is reported once: what it leaves unknown is not applicable.
async fn checked(probe: &Probe, strict: bool) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::with_capacity(CHECKS.len());
    for check in CHECKS {
        let runs = findings.iter().find(|finding| finding.name == RUN_CYCLE);
        let is_blocked = check.needs == Needs::Cycle && runs.is_some_and(|runs| runs.outcome != Outcome::Passed);
        let found = if is_blocked {
            Err(Problem::NotApplicable(format!("it needs a RunCycle that succeeds; see {RUN_CYCLE}")))
        } else {
            (check.run)(probe).await
        };
        findings.push(Finding::new(check, found, strict));
    }
    if let Some(cause) = cause(&findings).map(str::to_owned) {
        for finding in findings.iter_mut().filter(|finding| finding.has_failed() && finding.name != RUN_CYCLE) {
            if finding.code() == cause {
                finding.outcome = Outcome::NotApplicable;
                finding.reason = format!("it failed with {cause}, as {RUN_CYCLE} did");
                finding.sent.clear();
                finding.came.clear();
            }
        }
    }
    findings
}

/// The code with which a plain cycle failed.
fn cause(findings: &[Finding]) -> Option<&str> {
    let runs = findings.iter().find(|finding| finding.name == RUN_CYCLE && finding.has_failed());
    runs.map(Finding::code)
}

impl Report {
    fn text(&self, page: Page) -> String {
        let mut table = Table::new([left("CHECK"), left("LEVEL"), left("OUTCOME")]);
        for finding in &self.checks {
            table.row([text(finding.name), text(finding.level.word()), state(finding.outcome.word())]);
        }
        let mut details = Vec::new();
        for finding in self.checks.iter().filter(|finding| finding.has_failed()) {
            let Finding { name, rule, sent, came, .. } = finding;
            details.push(format!(
                "{name} failed\n  sent      {}\n  came      {}\n  contract  {rule}\n",
                clean(sent),
                clean(came)
            ));
        }
        let mut left: Vec<&Finding> = self.checks.iter().filter(|it| it.outcome == Outcome::NotApplicable).collect();
        while let Some(Finding { reason, .. }) = left.first().copied() {
            let (alike, others): (Vec<&Finding>, _) = left.into_iter().partition(|finding| finding.reason == *reason);
            let names: Vec<_> = alike.iter().map(|finding| finding.name).collect();
            details.push(format!("Not applicable: {}\n  {}\n", names.join(", "), clean(reason)));
            left = others;
        }
        let number = |outcome| self.checks.iter().filter(|finding| finding.outcome == outcome).count() as u64;
        let summary = format!(
            "{}: {} passed, {} failed, {} not applicable\n",
            count(self.checks.len() as u64, "check"),
            number(Outcome::Passed),
            number(Outcome::Failed),
            number(Outcome::NotApplicable)
        );
        sections([table.finish(page), details.join("\n"), summary + &self.advice()])
    }

    /// Advice on the next step.
    fn advice(&self) -> String {
        let (endpoint, subsystem) = (clean(&self.endpoint), clean(&self.subsystem));
        let cause = cause(&self.checks).unwrap_or_default();
        if cause == Code::Unimplemented.to_string() {
            format!("{endpoint} does not serve dreamnet.subsystem.v1.Subsystem.\n")
        } else if cause == Code::NotFound.to_string() {
            format!("{endpoint} does not serve a subsystem {subsystem:?}: give its name with --subsystem.\n")
        } else if cause == Code::Aborted.to_string() {
            format!(
                "Another caller has used a higher epoch with {subsystem:?}: restart it, and stop other callers \
                 meanwhile.\n"
            )
        } else if !self.checks.iter().any(|finding| finding.outcome == Outcome::Passed) {
            format!(
                "No check has passed: check that {endpoint} is a gRPC server, with TLS for https and without for \
                 http.\n"
            )
        } else {
            "Restart the subsystem before an orchestrator that was started earlier calls it: it has seen a higher \
             epoch.\n"
                .to_owned()
        }
    }
}
