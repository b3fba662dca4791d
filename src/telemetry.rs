//! Telemetry of the process: log lines on stderr, metrics for Prometheus, and spans for a collector ([`otlp`]).

pub mod metrics;
pub mod otlp;
mod writer;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    ffi::OsStr,
    fmt::Debug,
    io::{self, IsTerminal},
    panic::PanicHookInfo,
};

use tracing::{Subscriber, field::Field, subscriber::SetGlobalDefaultError};
use tracing_subscriber::{
    EnvFilter, Registry,
    field::MakeExt,
    filter::ParseError,
    fmt::{self, MakeWriter, format},
    layer::SubscriberExt,
    reload,
};

use self::writer::{Printable, Writer};
use crate::{
    config::{LogFormat, LogSettings},
    model::text,
};

/// Why logging can't be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is invalid.
    #[error("the log filter can't be read: {0}")]
    Filter(#[from] ParseError),
    /// Another logger is already set up.
    #[error("logging is set up already: {0}")]
    SetUpAlready(#[from] SetGlobalDefaultError),
    /// The thread that writes it can't be started.
    #[error("can't start the thread that writes the log: {0}")]
    Thread(#[from] io::Error),
    /// It is no longer in use.
    #[error("the log filter can't be changed: {0}")]
    Reload(#[from] reload::Error),
}

/// The filter of the log, which can be changed while the process runs.
#[derive(Clone, Debug)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// Replaces the filter.
    ///
    /// # Errors
    /// The filter is invalid; the old one still applies.
    pub fn set(&self, filter: &str) -> Result<(), LogError> {
        Ok(self.0.reload(parse(filter)?)?)
    }
}

/// The log of this process. Dropping it waits a moment for the last lines to be written.
#[derive(Debug)]
pub struct ProcessLog {
    /// The filter.
    pub filter: LogFilter,
    writer: Writer,
}

impl Drop for ProcessLog {
    fn drop(&mut self) {
        self.writer.flush();
    }
}

/// Sends the log of the whole process to stderr, including panics, each as one line. Logging never waits for the
/// reader: lines beyond 1 MiB in the queue are dropped, counted, and reported. Call it once in a process.
///
/// # Errors
/// The filter is invalid, the writing thread can't be started, or logging is already set up.
pub fn init(log: &LogSettings) -> Result<ProcessLog, LogError> {
    let is_terminal = io::stderr().is_terminal();
    let format = match log.format {
        LogFormat::Auto if is_terminal => LogFormat::Text,
        LogFormat::Auto => LogFormat::Json,
        format => format,
    };
    let colour = wants_colour(is_terminal, std::env::var_os("NO_COLOR").as_deref());
    let tell = |lines| tracing::warn!(lines, "lines of the log were dropped: they were not read in time");
    let writer = Writer::start(io::stderr(), tell)?;
    let (subscriber, filter) = subscriber(&log.filter, format == LogFormat::Json, colour, writer.clone())?;
    tracing::subscriber::set_global_default(subscriber)?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(ProcessLog { filter, writer })
}

/// Number of lines of the log that were dropped since this process started.
pub fn dropped_lines() -> u64 {
    writer::dropped()
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| tracing::field::display(&backtrace));
    let location = panic.location().map(tracing::field::display);
    let said = panic.payload_as_str().unwrap_or("without a message");
    tracing::error!(said, location, backtrace, "a panic, which is a defect of this software");
}

fn subscriber<W>(
    filter: &str,
    as_json: bool,
    colour: bool,
    writer: W,
) -> Result<(Box<dyn Subscriber + Send + Sync>, LogFilter), LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let filtered = tracing_subscriber::registry().with(filter);
    let writer = Printable { inner: writer, as_json, colour: colour && !as_json };
    // Its own errors would be written to stderr synchronously.
    let lines = fmt::layer().log_internal_errors(false).with_writer(writer);
    let subscriber: Box<dyn Subscriber + Send + Sync> = if as_json {
        Box::new(filtered.with(lines.json().flatten_event(true)))
    } else {
        let fields = format::debug_fn(write_field).delimited(" ");
        Box::new(filtered.with(lines.with_ansi(colour).fmt_fields(fields)))
    };
    Ok((subscriber, LogFilter(handle)))
}

/// Writes one field of a text line. Its value may come from outside, so its control characters are escaped.
fn write_field(line: &mut format::Writer<'_>, field: &Field, value: &dyn Debug) -> std::fmt::Result {
    let value = format!("{value:?}");
    let value = text::escape_text(&value, text::is_unprintable);
    match field.name() {
        "message" => write!(line, "{value}"),
        name if line.has_ansi_escapes() => write!(line, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"),
        name => write!(line, "{name}={value}"),
    }
}

fn parse(filter: &str) -> Result<EnvFilter, ParseError> {
    /// The HTTP/2 library warns for each connection of a flood, which `listen` summarizes. It is enabled only by name.
    const QUIET: &str = "h2=off";
    EnvFilter::builder().parse(format!("{QUIET},{filter}"))
}

/// By <https://no-color.org>: colour is for terminals, unless `NO_COLOR` is set and not empty.
fn wants_colour(is_terminal: bool, no_color: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{debug, info};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
        }
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_carry_their_fields() {
        let lines = Lines::default();
        let to = lines.clone();
        let (subscriber, _filter) = subscriber("info", true, true, move || to.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            info!(cycle_id = 7, "recorded");
            info!("again");
        });
        let written = lines.take();
        let lines: Vec<serde_json::Value> = written.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["message"], "recorded");
        assert_eq!(lines[0]["cycle_id"], 7);
        assert_eq!(lines[0]["level"], "INFO");
    }

    #[test]
    fn texts_of_others_stay_on_their_line_in_both_formats() {
        const HOSTILE: &str = "a\n\u{1b}[31m\u{9b}31m\u{202e}\u{200b}\r\té";
        for (as_json, colour) in [(true, false), (false, false), (false, true)] {
            let lines = Lines::default();
            let to = lines.clone();
            let (subscriber, _filter) = subscriber("info", as_json, colour, move || to.clone()).unwrap();
            tracing::subscriber::with_default(subscriber, || {
                info!(shown = %HOSTILE, quoted = HOSTILE, debugged = ?HOSTILE, "{HOSTILE}");
            });
            let written = lines.take();
            let line = written.strip_suffix('\n').unwrap();
            assert!(line.contains('é'), "{line:?}");
            let own = if colour { '\u{1b}' } else { 'é' };
            assert!(!line.contains(|c| text::is_unprintable(c) && c != own), "{line:?}");
            assert!(!line.contains("\u{1b}[31m"), "{line:?}");
            if as_json {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!((&line["message"], &line["shown"]), (&HOSTILE.into(), &HOSTILE.into()));
            }
        }
    }

    #[test]
    fn the_filter_can_be_changed_while_it_runs() {
        let lines = Lines::default();
        let to = lines.clone();
        let (subscriber, filter) = subscriber("info", false, false, move || to.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            debug!("one");
            filter.set("debug").unwrap();
            debug!("two");
            assert!(matches!(filter.set("a=b=c"), Err(LogError::Filter(_))));
            debug!("three");
        });
        let written = lines.take();
        assert!(!written.contains("one"), "{written}");
        assert!(written.contains("two") && written.contains("three"), "{written}");
        assert!(!written.contains('\u{1b}'), "{written}");
    }

    #[test]
    fn the_http2_library_is_logged_if_it_is_named() {
        for (filter, is_heard) in [("info", false), ("debug", false), ("info,h2=warn", true)] {
            let lines = Lines::default();
            let to = lines.clone();
            let (subscriber, _filter) = subscriber(filter, false, false, move || to.clone()).unwrap();
            tracing::subscriber::with_default(subscriber, || tracing::warn!(target: "h2::proto", "reached"));
            assert_eq!(lines.take().contains("reached"), is_heard, "{filter}");
        }
    }

    #[test]
    fn only_terminals_get_colours() {
        assert!(wants_colour(true, None));
        assert!(wants_colour(true, Some(OsStr::new(""))));
        assert!(!wants_colour(true, Some(OsStr::new("1"))));
        assert!(!wants_colour(false, None));
    }
}
