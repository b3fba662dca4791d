//! `orchestrator conformance`: checks from outside that a subsystem keeps the contract.

mod checks;
mod junit;
mod probe;

use std::{fs, path::PathBuf, time::Duration};

use serde::Serialize;
use serde_json::Value;

use self::{
    checks::{CHECKS, Check, Level, Problem},
    probe::Probe,
};
use super::{
    Exit, Failure,
    output::{Format, Table, clean, count, escape_json, print, sections, state, text},
    parameters::{self, Parameters},
};
use crate::model::{Endpoint, Name, excerpt};

/// The most bytes of what was sent and of what came in a report: an error or an output can be of any size.
const MAX_TEXT: usize = 4 << 10;
/// How long a call may take at most: as long as a registration can allow.
const MAX_TIMEOUT: Duration = Duration::from_hours(24);

/// Check that a subsystem keeps the contract
#[derive(Debug, clap::Args)]
#[command(after_help = "\
It runs real cycles against the subsystem, so it is for test instances. It calls with an epoch and cycle ids taken from
the clock: the instance refuses an orchestrator that was started before, until it is restarted.

What is required, every subsystem has to keep; what is recommended makes it better. Without --subsystem a made-up name
is used, which only a subsystem that takes every name answers. What happens to a call in the middle shows only when
cycles take 0.2 s or longer: if parameters can make them, give those.

Exit codes:
  0    all that is required has passed; with --strict, also all that is recommended
  1    it has not
  2    wrong usage
  4    the subsystem can't be reached

Examples:
  orchestrator conformance http://127.0.0.1:50051 --subsystem prices
  orchestrator conformance unix:/run/signals.sock --subsystem signals --param window=5 --input 'prices={\"a\": 1}'
  orchestrator conformance http://127.0.0.1:50051 --subsystem prices --strict --junit conformance.xml")]
pub(super) struct Conformance {
    /// Where it is dialed: http://HOST:PORT, https://HOST:PORT or unix:/PATH
    #[arg(value_parser = Endpoint::parse)]
    endpoint: Endpoint,
    /// The name of the subsystem to check; when repeated, of others that are served there, to be called beside it
    #[arg(long = "subsystem", value_name = "NAME", value_parser = Name::parse)]
    subsystems: Vec<Name>,
    #[command(flatten)]
    parameters: Parameters,
    /// An input of every cycle, its output as a JSON object; may be repeated
    #[arg(long = "input", value_name = "NAME=OBJECT", value_parser = parameters::parameter)]
    inputs: Vec<(String, Value)>,
    /// How long one call may take
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    timeout: Duration,
    /// What is recommended counts like what is required
    #[arg(long)]
    strict: bool,
    /// Also write the report as JUnit XML, for CI systems
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

/// What was found. Its JSON is what `--output json` prints.
#[derive(Debug, Serialize)]
struct Report {
    endpoint: String,
    subsystem: String,
    /// All that counts has passed.
    passed: bool,
    checks: Vec<Finding>,
}

/// What one check found.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    level: Level,
    outcome: Outcome,
    /// What the contract says.
    rule: &'static str,
    /// It decides about the exit code.
    counts: bool,
    /// Why it is not applicable; else empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    /// What was sent, when it failed; else empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    sent: String,
    /// What came back, when it failed; else empty.
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

    fn has_failed(&self) -> bool {
        self.outcome == Outcome::Failed
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let timeout = super::remote::timeout(text)?;
    if timeout > MAX_TIMEOUT { Err("give at most 24h".to_owned()) } else { Ok(timeout) }
}

/// A text that fits into a report.
fn bounded(text: String, max: usize) -> String {
    match excerpt(&text, max) {
        whole if whole.len() == text.len() => text,
        part => format!("{part}… ({} bytes in all)", text.len()),
    }
}

impl Conformance {
    /// Runs all checks, one after the other.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let Self { endpoint, subsystems, parameters, inputs, timeout, strict, junit, format } = self;
        let mut names: Vec<String> = Vec::with_capacity(subsystems.len());
        for name in subsystems {
            if !names.iter().any(|other| other == name.as_str()) {
                names.push(name.to_string());
            }
        }
        let probe = Probe::connect(endpoint, names, parameters.encode()?, inputs, timeout).await?;
        let mut checks = Vec::with_capacity(CHECKS.len());
        for check in CHECKS {
            checks.push(Finding::new(check, (check.run)(&probe).await, strict));
        }
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
            print(&report.text())?;
        }
        written?;
        Ok(if passed { Exit::Done } else { Exit::Refused })
    }
}

impl Report {
    fn text(&self) -> String {
        let mut table = Table::new(["CHECK", "LEVEL", "OUTCOME"]);
        for finding in &self.checks {
            table.row([text(finding.name), text(finding.level.word()), state(finding.outcome.word())]);
        }
        let mut details = Vec::new();
        for finding in &self.checks {
            let Finding { name, rule, reason, sent, came, .. } = finding;
            match finding.outcome {
                Outcome::Passed => {}
                Outcome::NotApplicable => details.push(format!("{name} is not applicable: {}\n", clean(reason))),
                Outcome::Failed => details.push(format!(
                    "{name} failed\n  sent      {}\n  came      {}\n  contract  {rule}\n",
                    clean(sent),
                    clean(came)
                )),
            }
        }
        let number = |outcome| self.checks.iter().filter(|finding| finding.outcome == outcome).count() as u64;
        let summary = format!(
            "{}: {} passed, {} failed, {} not applicable\n",
            count(self.checks.len() as u64, "check"),
            number(Outcome::Passed),
            number(Outcome::Failed),
            number(Outcome::NotApplicable)
        );
        sections([table.finish(), details.join("\n"), summary + &self.advice()])
    }

    /// What to do next.
    fn advice(&self) -> String {
        let failed: Vec<_> = self.checks.iter().filter(|finding| finding.has_failed()).collect();
        let all_came = |code: &str| failed.len() > 2 && failed.iter().all(|finding| finding.came.starts_with(code));
        let (endpoint, subsystem) = (clean(&self.endpoint), clean(&self.subsystem));
        if all_came("UNIMPLEMENTED") {
            format!("{endpoint} does not serve dreamnet.subsystem.v1.Subsystem.\n")
        } else if all_came("NOT_FOUND") {
            format!("No {subsystem:?} is served there: give the subsystem's name with --subsystem.\n")
        } else if all_came("ABORTED") {
            format!(
                "Somebody has called {subsystem:?} with a later epoch: restart it, and let nobody else call it meanwhile.\n"
            )
        } else if !self.checks.iter().any(|finding| finding.outcome == Outcome::Passed) {
            format!(
                "No check has passed: does a gRPC server answer at {endpoint}, with TLS if it is https and without if not?\n"
            )
        } else {
            "Restart it before an orchestrator calls it that was started earlier: it has seen a later epoch.\n"
                .to_owned()
        }
    }
}
