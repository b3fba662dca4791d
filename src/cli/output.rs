//! Output of commands: text for people, canonical proto JSON for programs.
//!
//! All text from subsystems and from the service passes [`clean`] before it is printed.

use std::{
    env,
    io::{self, IsTerminal, Write as _},
    str::FromStr,
    time::Duration,
};

use bytes::Bytes;
use clap::{
    ValueEnum,
    builder::{
        PossibleValuesParser, TypedValueParser,
        styling::{AnsiColor, Style},
    },
};
use jiff::{
    RoundMode, SignedDuration, Span, SpanRelativeTo, Timestamp, TimestampRound, Unit, civil::DateTime, tz::TimeZone,
};
use prost::Message;
use tokio::{
    task::{block_in_place, spawn_blocking},
    time::timeout,
};

use super::{Exit, Failure, HOST, table::Page};
pub(super) use crate::model::text::{clean, count, escape_json, grouped};
use crate::{
    model::Payload,
    proto::{self, orchestrator::v1 as pb},
};

/// The format of the output.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(super) struct Format {
    /// Tables for people, or the service's answers as canonical proto JSON: json is one object, also for a list, and
    /// ndjson is one object a line; a stream has one a line with both
    #[arg(long, value_name = "FORMAT", env = "ORCHESTRATOR_OUTPUT", default_value = "table", global = true)]
    output: Output,
    #[command(flatten)]
    pub(super) breadth: Breadth,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
    Ndjson,
}

/// How much of a table a terminal shows.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(super) struct Breadth {
    /// On a terminal, leave out no column and cut no text, however narrow it is
    #[arg(long, global = true)]
    wide: bool,
}

impl Breadth {
    /// Standard output.
    pub(super) fn page(self) -> Page {
        Page::of_stdout(self.wide)
    }
}

impl Format {
    /// True if the output is for programs.
    pub(super) fn is_json(self) -> bool {
        self.output != Output::Table
    }

    /// Begins a list of this name, if the output is for programs.
    ///
    /// # Errors
    /// As [`print`].
    pub(super) fn list(self, name: &str) -> Result<Option<JsonList>, Failure> {
        match self.output {
            Output::Table => Ok(None),
            Output::Json => {
                print(&format!("{{\"{name}\":["))?;
                Ok(Some(JsonList::Object { items: 0 }))
            }
            Output::Ndjson => Ok(Some(JsonList::Lines)),
        }
    }

    /// Standard output, for text.
    pub(super) fn page(self) -> Page {
        self.breadth.page()
    }

    /// Prints a message of the contract: as JSON, or as the text that `text` makes.
    ///
    /// # Errors
    /// The reader has closed the output, or it can't be written.
    pub(super) fn show<M: Message>(
        self,
        kind: &'static str,
        message: &M,
        text: impl FnOnce(&M) -> String,
    ) -> Result<(), Failure> {
        if self.is_json() { print(&format!("{}\n", json(kind, message)?)) } else { print(&text(message)) }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Printing

/// Writes to stdout. The reader may pause: other tasks continue meanwhile, on other threads.
///
/// # Errors
/// The reader has closed the output, or it can't be written.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let printed = block_in_place(|| {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
    });
    printed.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::nobody_reads(),
        _ => Failure::new(Exit::Refused, format!("can't write the output: {error}")),
    })
}

/// Prints a note on stderr. Waits like [`print`].
pub(super) fn note(text: &str) {
    // A closed reader of notes does not stop the command.
    _ = block_in_place(|| writeln!(io::stderr(), "{text}"));
}

/// Prints a last note on stderr, and waits for its reader for at most one second.
pub(super) async fn last_words(text: String) {
    const PATIENCE: Duration = Duration::from_secs(1);
    _ = timeout(PATIENCE, spawn_blocking(move || note(&text))).await;
}

/// True if stdout is a terminal.
pub(super) fn is_terminal() -> bool {
    io::stdout().is_terminal() && is_capable()
}

/// True if stderr is a terminal.
pub(super) fn is_error_terminal() -> bool {
    io::stderr().is_terminal() && is_capable()
}

fn is_capable() -> bool {
    env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// True if stdout accepts colours. <https://no-color.org>
pub(super) fn has_colours() -> bool {
    is_terminal() && env::var_os("NO_COLOR").is_none_or(|it| it.is_empty())
}

// ---------------------------------------------------------------------------------------------------------------
// JSON

/// A message of the contract as canonical proto JSON, on one line. `kind` is the message's name in
/// `dreamnet.orchestrator.v1`.
///
/// # Errors
/// The service has sent a message that violates its contract.
pub(super) fn json<M: Message>(kind: &'static str, message: &M) -> Result<String, Failure> {
    encoded_json(kind, &message.encode_to_vec())
}

/// As [`json`], for encoded bytes.
///
/// # Errors
/// As [`json`].
pub(super) fn encoded_json(kind: &'static str, bytes: &[u8]) -> Result<String, Failure> {
    let malformed = |error| format!("the service has sent a message that can't be read: {error}");
    let text = proto::json::encode(kind, bytes).map_err(|error| Failure::new(Exit::Refused, malformed(error)))?;
    Ok(escape_json(&text).into_owned())
}

/// A list for programs, printed page by page.
pub(super) enum JsonList {
    /// One object, as `{"cycles":[…]}`.
    Object { items: usize },
    /// An item a line.
    Lines,
}

impl JsonList {
    /// Adds one encoded message.
    ///
    /// # Errors
    /// As [`json`] and [`print`].
    pub(super) fn add(&mut self, kind: &'static str, bytes: &[u8]) -> Result<(), Failure> {
        let item = encoded_json(kind, bytes)?;
        match self {
            Self::Object { items } => {
                let comma = if *items == 0 { "" } else { "," };
                *items += 1;
                print(&format!("{comma}{item}"))
            }
            Self::Lines => print(&format!("{item}\n")),
        }
    }

    /// Ends the list.
    ///
    /// # Errors
    /// As [`print`].
    pub(super) fn end(self) -> Result<(), Failure> {
        match self {
            Self::Object { .. } => print("]}\n"),
            Self::Lines => Ok(()),
        }
    }
}

/// Decodes a record.
///
/// # Errors
/// The service has sent a message that violates its contract.
pub(super) fn telemetry(bytes: &Bytes) -> Result<pb::CycleTelemetry, Failure> {
    pb::CycleTelemetry::decode(bytes.clone()).map_err(|error| {
        Failure::new(Exit::Refused, format!("the service has sent a record that can't be read: {error}"))
    })
}

/// A `Struct` as JSON.
pub(super) fn payload(bytes: &Bytes) -> String {
    match Payload::check(bytes.clone()) {
        Ok(payload) => escape_json(&serde_json::Value::from(payload.to_json()).to_string()).into_owned(),
        Err(malformed) => format!("({malformed})"),
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Text

/// Text of several lines, each [`clean`].
pub(super) fn clean_lines(text: &str) -> String {
    text.lines().map(clean).collect::<Vec<_>>().join("\n")
}

/// Joins the sections that are not empty, with an empty line between them.
pub(super) fn sections<const N: usize>(sections: [String; N]) -> String {
    let shown: Vec<_> = sections.into_iter().filter(|section| !section.is_empty()).collect();
    shown.join("\n")
}

/// Names in one line, at most `max` of them by name.
pub(super) fn names(names: &[String], max: usize) -> String {
    let shown: Vec<_> = names.iter().take(max).map(|name| clean(name)).collect();
    match names.len().saturating_sub(max) {
        0 => shown.join(", "),
        more => format!("{} and {} more", shown.join(", "), grouped(more as u64)),
    }
}

/// A word of the contract without its type: `FAILED` of `CYCLE_STATE_FAILED`.
pub(super) fn word(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// How a cycle ended.
pub(super) fn cycle_state(state: pb::CycleState) -> &'static str {
    word(state.as_str_name(), "CYCLE_STATE_")
}

/// The state of a subsystem's part.
pub(super) fn subsystem_state(state: pb::SubsystemState) -> &'static str {
    word(state.as_str_name(), "SUBSYSTEM_STATE_")
}

/// Why a subsystem is not called, in words; empty if it is called.
pub(super) fn skip_reason(reason: pb::SkipReason) -> &'static str {
    match reason {
        pb::SkipReason::Unspecified => "",
        pb::SkipReason::Suspended => "suspended",
        pb::SkipReason::RequirementFailed => "a required subsystem did not succeed",
        pb::SkipReason::RequirementMissing => "a required subsystem is not registered",
        pb::SkipReason::RequirementLeftOut => "a required subsystem is suspended or not in this cycle",
        pb::SkipReason::CycleDeadline => "the cycle's deadline had passed",
        pb::SkipReason::NotRegistered => "not registered",
        pb::SkipReason::OwnerRevoked => "its owner is revoked",
    }
}

/// What started a cycle.
pub(super) fn trigger(trigger: pb::Trigger, name: &str) -> String {
    match trigger {
        pb::Trigger::Unspecified => "unknown".to_owned(),
        pb::Trigger::Manual => "manual".to_owned(),
        pb::Trigger::Loop => format!("loop {}", clean(name)),
        pb::Trigger::Parent => "parent".to_owned(),
    }
}

/// The expected subsystems that are not registered.
pub(super) fn missing(status: &pb::OrchestratorStatus) -> String {
    /// Most names in the line.
    const NAMED: usize = 5;
    let mut names: Vec<_> = status.missing.iter().take(NAMED).cloned().collect();
    let more = u64::from(status.missing_count).saturating_sub(names.len() as u64);
    if more > 0 {
        names.push(format!("{} more", grouped(more)));
    }
    let verb = if status.missing_count == 1 { "is" } else { "are" };
    format!("{}, which {verb} expected (registry.expected) and not registered", names.join(", "))
}

/// The cause for which a cycle waits.
pub(super) fn waits_for(waiting: &pb::WaitingCycle) -> String {
    match (waiting.waits_for_cycle_id, waiting.waits_for_subsystem.as_str()) {
        (0, _) => "fewer running cycles".to_owned(),
        (cycle_id, "") => format!("cycle {cycle_id} (all subsystems)"),
        (cycle_id, name) => format!("cycle {cycle_id} ({})", clean(name)),
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Times

/// Milliseconds with a suitable unit and three digits.
pub(super) fn milliseconds(ms: f64) -> String {
    match ms {
        ..0.0005 => "0 ms".to_owned(),
        ..9.995 => format!("{ms:.2} ms"),
        ..99.95 => format!("{ms:.1} ms"),
        ..999.5 => format!("{ms:.0} ms"),
        ..9_995.0 => format!("{:.2} s", ms / 1e3),
        ..59_950.0 => format!("{:.1} s", ms / 1e3),
        _ => short(Duration::try_from_secs_f64((ms / 1e3).round()).unwrap_or(Duration::MAX)),
    }
}

/// A duration in the form that flags accept.
pub(super) fn short(duration: Duration) -> String {
    let signed = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    if signed.is_zero() { "0s".to_owned() } else { format!("{signed:#}") }
}

/// As above, for durations of the contract; empty if it is not set.
pub(super) fn duration(duration: Option<&prost_types::Duration>) -> String {
    let duration = duration.copied().and_then(proto::read_duration);
    duration.map(short).unwrap_or_default()
}

/// A time, to the second, in UTC; a dash if it is not set.
pub(super) fn time(time: Option<&prost_types::Timestamp>) -> String {
    // Not rounded up, so that the shown time can be used as a bound in a filter.
    let whole_seconds = TimestampRound::new().smallest(Unit::Second).mode(RoundMode::Trunc);
    match time.and_then(timestamp).and_then(|time| time.round(whole_seconds).ok()) {
        Some(time) => time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        None => "-".to_owned(),
    }
}

/// As above, for times that are not in messages.
pub(super) fn instant(at: Timestamp) -> String {
    time(Some(&proto::timestamp(at)))
}

/// When something expires, or has expired.
pub(super) fn expiry(at: Timestamp) -> String {
    let expired = if at <= HOST.clock.now() { " (expired)" } else { "" };
    format!("{}{expired}", instant(at))
}

/// A time relative to now: `5s ago`, `now`, `in 3m 20s`.
pub(super) fn age(time: Option<&prost_types::Timestamp>) -> String {
    let Some(time) = time.and_then(timestamp) else { return "-".to_owned() };
    let ago = HOST.clock.now().duration_since(time);
    let coarse = short(coarse(ago.unsigned_abs()));
    match (ago.unsigned_abs().as_secs(), ago.is_negative()) {
        (0, _) => "now".to_owned(),
        (_, true) => format!("in {coarse}"),
        (_, false) => format!("{coarse} ago"),
    }
}

/// The two largest units of a duration.
pub(super) fn coarse(duration: Duration) -> Duration {
    let unit = match duration.as_secs() {
        0..3_600 => 1,
        3_600..86_400 => 60,
        _ => 3_600,
    };
    Duration::from_secs(duration.as_secs() / unit * unit)
}

/// A time for calculations; `None` if it is outside the range of the library.
pub(super) fn timestamp(time: &prost_types::Timestamp) -> Option<Timestamp> {
    proto::read_timestamp(*time)
}

// ---------------------------------------------------------------------------------------------------------------
// Colours

/// A state in its colour, where there are colours.
pub(super) fn painted(word: &str, width: usize) -> String {
    match colour(word) {
        Some(colour) if has_colours() => {
            let style = Style::new().fg_color(Some(colour.into()));
            format!("{style}{word:width$}{style:#}")
        }
        _ => format!("{word:width$}"),
    }
}

/// The colour of a state; `None` for an ordinary one.
pub(super) fn colour(state: &str) -> Option<AnsiColor> {
    match state {
        "SUCCEEDED" | "PASSED" | "CLOSED" => Some(AnsiColor::Green),
        "DEGRADED" | "SKIPPED" | "CANCELLED" | "HALF_OPEN" | "SUSPENDED" => Some(AnsiColor::Yellow),
        "FAILED" | "TIMED_OUT" | "CIRCUIT_OPEN" | "INTERRUPTED" | "OPEN" | "OWNER_REVOKED" | "UNREADABLE"
        | "MISSING" => Some(AnsiColor::Red),
        _ => None,
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Words of the contract as arguments

/// Reads one of these words of the contract, in lower case as in the configuration file.
pub(super) fn one_of<E: Copy + Send + Sync + 'static>(
    values: &'static [E],
    word: fn(E) -> &'static str,
) -> impl TypedValueParser<Value = E> {
    let words: Vec<_> = values.iter().map(|&value| word(value).to_lowercase()).collect();
    PossibleValuesParser::new(words).try_map(move |text| {
        values.iter().copied().find(|&value| word(value).eq_ignore_ascii_case(&text)).ok_or("is not one of these words")
    })
}

/// Reads a number of at least 1: in the contract, 0 means that it is not set.
///
/// # Errors
/// The text is invalid; the message says which form is valid.
pub(super) fn parse_positive<N: FromStr + Default + PartialEq>(text: &str) -> Result<N, String> {
    let number = text.parse().ok().filter(|number| *number != N::default());
    number.ok_or_else(|| "give a whole number of at least 1".to_owned())
}

/// Reads a duration of a request. The service checks its bounds.
///
/// # Errors
/// The text is invalid; the message says which form is valid.
pub(super) fn parse_duration(text: &str) -> Result<prost_types::Duration, String> {
    let duration: SignedDuration =
        text.parse().map_err(|_| "give a duration with its unit, such as 250ms, 5s or 1m30s".to_owned())?;
    Ok(prost_types::Duration { seconds: duration.as_secs(), nanos: duration.subsec_nanos() })
}

/// Reads a time: in RFC 3339; as a day, which stands for its begin in UTC; or as a duration before now, in which a day
/// has 24 hours.
///
/// # Errors
/// The text is invalid; the message says which form is valid.
pub(super) fn parse_time(text: &str) -> Result<prost_types::Timestamp, String> {
    let utc = |at: DateTime| at.to_zoned_datetime(TimeZone::UTC).ok().map(|at| at.timestamp());
    let today = || HOST.clock.now().to_zoned_datetime(TimeZone::UTC).date();
    let day = || match text {
        "today" => Some(today().into()),
        "yesterday" => Some(today().yesterday().ok()?.into()),
        _ => text.parse().ok(),
    };
    // "2h ago" is parsed as a negative duration.
    let ago = || HOST.clock.now().checked_sub(span(text)?.unsigned_abs()).ok();
    let time = text.parse().ok().or_else(|| utc(day()?)).or_else(ago);
    time.map(crate::proto::timestamp).ok_or_else(|| {
        "give a time such as 2026-01-31T12:00:00Z, a day such as 2026-01-31 or yesterday (UTC), or how long ago, such \
         as 2h or 7d"
            .to_owned()
    })
}

/// Reads a duration above zero, in which a day has 24 hours. `None` if the text is no such duration.
pub(super) fn length(text: &str) -> Option<SignedDuration> {
    span(text).filter(SignedDuration::is_positive)
}

fn span(text: &str) -> Option<SignedDuration> {
    let span: Span = text.parse().ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_rounded_and_have_units() {
        let said = [0.0, 0.42, 9.996, 132.4, 999.6, 1_234.0, 61_000.0, 7_380_000.0].map(milliseconds);
        assert_eq!(said, ["0 ms", "0.42 ms", "10.0 ms", "132 ms", "1.00 s", "1.23 s", "1m 1s", "2h 3m"]);
        assert_eq!(short(coarse(Duration::from_secs(93_784))), "26h");
        assert_eq!(short(Duration::ZERO), "0s");
    }

    #[test]
    fn a_time_is_given_as_a_date_or_as_an_age() {
        let seconds_ago = |text: &str| parse_time(text).map(|time| Timestamp::now().as_second() - time.seconds);
        for (text, expected) in [("90m", 5_400), ("7d", 604_800), ("1w 1d", 691_200), ("2h ago", 7_200)] {
            assert!(seconds_ago(text).is_ok_and(|ago| (0..60).contains(&(ago - expected))), "{text}");
        }
        let seconds = |text: &str| parse_time(text).map(|time| time.seconds);
        for text in ["1970-01-01T00:00:07Z", "1970-01-01 00:00:07Z", "1970-01-01T02:00:07+02:00", "1970-01-01T00:00:07"]
        {
            assert_eq!(seconds(text), Ok(7), "{text}");
        }
        assert_eq!(seconds("1970-01-03"), Ok(172_800));
        let (today, yesterday) = (seconds("today").unwrap_or_default(), seconds("yesterday").unwrap_or_default());
        assert_eq!((today % 86_400, today - yesterday), (0, 86_400));
        assert!(
            seconds("2026-11-28").is_ok_and(|day| day < today || today == 0) && today <= Timestamp::now().as_second()
        );
        for text in ["", "tomorrow", "7", "1mo", "99999999d", "2026-02-30", "2026-13"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_and_names_stay_readable() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        let all = ["a", "b", "c"].map(String::from);
        assert_eq!((names(&all, 3), names(&all, 2)), ("a, b, c".into(), "a, b and 1 more".into()));
    }
}
