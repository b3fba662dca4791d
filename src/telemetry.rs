//! What the process says about itself: log lines on stderr, metrics to whoever scrapes them, and spans to a collector
//! ([`otlp`]).

pub mod metrics;
pub mod otlp;

use std::{
    ffi::OsStr,
    io::{self, IsTerminal},
};

use tracing::{Subscriber, subscriber::SetGlobalDefaultError};
use tracing_subscriber::{
    EnvFilter, Registry,
    filter::ParseError,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload,
};

use crate::config::{Log, LogFormat};

/// Why logging can't be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter makes no sense.
    #[error("the log filter can't be read: {0}")]
    Filter(#[from] ParseError),
    /// Something else logs already.
    #[error("logging is set up already: {0}")]
    SetUpAlready(#[from] SetGlobalDefaultError),
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
    /// The filter can't be read, and the old one still applies.
    pub fn set(&self, filter: &str) -> Result<(), LogError> {
        Ok(self.0.reload(parse(filter)?)?)
    }
}

/// Sends the log of the whole process to stderr. Once in a process.
///
/// # Errors
/// The filter can't be read, or logging has been set up before.
pub fn init(log: &Log) -> Result<LogFilter, LogError> {
    let is_terminal = io::stderr().is_terminal();
    let format = match log.format {
        LogFormat::Auto if is_terminal => LogFormat::Text,
        LogFormat::Auto => LogFormat::Json,
        format => format,
    };
    let colour = wants_colour(is_terminal, std::env::var_os("NO_COLOR").as_deref());
    let (subscriber, filter) = subscriber(&log.filter, format == LogFormat::Json, colour, io::stderr)?;
    tracing::subscriber::set_global_default(subscriber)?;
    Ok(filter)
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
    let lines = fmt::layer().with_writer(writer);
    let subscriber: Box<dyn Subscriber + Send + Sync> = if as_json {
        Box::new(filtered.with(lines.json().flatten_event(true)))
    } else {
        Box::new(filtered.with(lines.with_ansi(colour)))
    };
    Ok((subscriber, LogFilter(handle)))
}

fn parse(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(filter)
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
    fn colour_is_for_terminals() {
        assert!(wants_colour(true, None));
        assert!(wants_colour(true, Some(OsStr::new(""))));
        assert!(!wants_colour(true, Some(OsStr::new("1"))));
        assert!(!wants_colour(false, None));
    }
}
