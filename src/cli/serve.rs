//! `orchestrator serve`: runs the service.

use std::{env, fmt::Write as _, io::Write as _, process::ExitCode};

use tokio::{select, task::spawn_blocking};

use super::{
    HOST,
    output::{clean_lines, last_words, note},
};
use crate::{
    config::{Config, Overrides},
    model::Begin,
    serve::{self, Exit, Operator, Service, StartError},
    telemetry,
};

/// Exit code of an invalid configuration, the same as clap's for invalid arguments.
const BAD_CONFIG: u8 = 2;

/// Run the service until SIGTERM or SIGINT
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Once requests are answered, prints \"listening on ADDRESS\" on stdout, and \"dashboard at URL\" on a second line. Logs \
go to stderr, as text on a terminal and as JSON elsewhere (log.format).

Signals:
  SIGTERM, SIGINT  the first drains: running cycles may finish within
                   server.drain_grace; a second, 1 s or more after it, aborts
  SIGHUP           reads the configuration and the files of TLS again, as does a
                   change of one of these files

Exit codes:
  0    drained: everything was finished and recorded
  1    could not start, the last state could not be written, or a part of the
       service ended by a defect
  2    the configuration is wrong, or the files of TLS that it names are, or the
       store is that of another orchestrator
  3    another process has taken over the store
  130  a second signal cut the shutdown short; cycles that ran are recorded as
       interrupted at the next start

Examples:
  orchestrator serve
  orchestrator serve --config orchestrator.toml
  orchestrator serve --config orchestrator.toml --paused
  orchestrator serve --read-only --store sqlite:b.db --listen 127.0.0.1:7701 \\
      --admin-listen 127.0.0.1:7781
  orchestrator serve --listen 127.0.0.1:7701 --store sqlite:/var/lib/fleet.db
  orchestrator serve --set cycle.deadline=30s --log-format json
  orchestrator serve --set tracing.otlp_endpoint=http://127.0.0.1:4317")]
pub(super) struct Serve {
    /// Begin with all loops paused: no cycle starts by itself until `orchestrator loops resume --all`; RunCycle works
    #[arg(long)]
    paused: bool,
    /// Look at a copy of a database, such as a backup: nothing is run, changed or written, and nothing is taken over
    #[arg(long, conflicts_with = "paused")]
    read_only: bool,
    #[command(flatten)]
    overrides: Overrides,
}

impl Serve {
    /// Serves until a signal stops it.
    pub(super) async fn run(self) -> ExitCode {
        let begin = match (self.read_only, self.paused) {
            (true, _) => Begin::ReadOnly,
            (false, true) => Begin::Paused,
            (false, false) => Begin::Again,
        };
        let file = self.overrides.config.clone();
        let load = move || Config::load(&self.overrides, env::vars_os());
        let mut operator = match Operator::of(file, load).await {
            Ok(operator) => operator,
            Err(error) => {
                note(&format!("can't listen for signals: {error}"));
                return failed();
            }
        };
        let log_and_config = match operator.configuration().await {
            // A signal arrived before anything was started.
            None => return ExitCode::SUCCESS,
            Some(Ok(config)) => {
                telemetry::init(&config.log).map(|log| (log, config)).map_err(|error| error.to_string())
            }
            Some(Err(error)) => Err(error.to_string()),
        };
        let (log, config) = match log_and_config {
            Ok(log_and_config) => log_and_config,
            Err(error) => {
                // The text can be long, and its reader may have paused.
                select! {
                    _ = spawn_blocking(move || note(&clean_lines(&error))) => {}
                    () = operator.stop() => {}
                }
                return BAD_CONFIG.into();
            }
        };
        let applied = |config: &Config| {
            if let Err(error) = log.filter.set(&config.log.filter) {
                tracing::error!(%error, "the log filter is not changed");
            }
        };
        let ready = |service: &Service| {
            let mut text = format!("listening on {}\n", service.address());
            if let Some(url) = service.dashboard() {
                let _ = writeln!(text, "dashboard at {url}");
            }
            // A closed or paused reader must neither stop nor delay the service.
            drop(spawn_blocking(move || std::io::stdout().write_all(text.as_bytes())));
        };
        match serve::serve(operator, config, begin, HOST.clone(), applied, ready).await {
            Ok(exit) => ExitCode::from(exit as u8),
            Err(error) => {
                if tracing::enabled!(tracing::Level::ERROR) {
                    tracing::error!("{error}");
                } else {
                    last_words(clean_lines(&error.to_string())).await;
                }
                match error {
                    StartError::Tls(_) | StartError::OtherOrchestrator(_) => BAD_CONFIG.into(),
                    _ => failed(),
                }
            }
        }
    }
}

fn failed() -> ExitCode {
    ExitCode::from(Exit::Failed as u8)
}
