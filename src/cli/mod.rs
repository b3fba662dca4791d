//! The command line: one file a command. The remote ones use only the generated client.

mod audit;
mod backup;
mod bundle;
mod cancel;
mod certs;
mod check;
mod checkpoint;
mod completions;
mod conformance;
mod credentials;
mod cycles;
mod demo;
mod export;
mod health;
mod known;
mod loops;
mod man;
mod output;
mod parameters;
mod pin;
mod plan;
mod progress;
mod remote;
mod report;
mod run;
mod serve;
mod status;
mod store;
mod subsystems;
mod table;
mod token;
mod top;
mod verify;
mod watch;
mod whoami;

use std::{
    env,
    ffi::OsStr,
    fs::File,
    future::{Future, ready},
    io,
    process::ExitCode,
    sync::LazyLock,
    time::Duration,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use futures_util::future::BoxFuture;
use tokio::{
    runtime, select,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::timeout,
};

use crate::{host::Host, tasks::joined};

/// The time and the randomness of this process, and of a service that runs in it.
static HOST: LazyLock<Host> = LazyLock::new(Host::system);

/// Runs a fleet of remote subsystems in cycles
#[derive(Debug, Parser)]
#[command(
    name = "orchestrator",
    version = version(),
    about,
    after_help = "\
Exit codes of all commands except serve, health and conformance, whose help lists theirs:
  0    done; for run: the cycle SUCCEEDED
  1    the service refused or failed
  2    wrong usage, an invalid value or a wrong configuration
  3    checkpoint, export and watch --pin: what the service says does not verify
  4    the service can't be reached, or did not answer within --timeout
  10   run: the cycle was DEGRADED
  11   run: the cycle FAILED
  12   run: the cycle was CANCELLED or INTERRUPTED
  130  Ctrl-C

Options of the connection, such as --address and --timeout, follow the command.

Environment:
  ORCHESTRATOR_ADDRESS      default of --address
  ORCHESTRATOR_CREDENTIALS  default of --credentials
  ORCHESTRATOR_CA_FILE, ORCHESTRATOR_CERT_FILE, ORCHESTRATOR_KEY_FILE
                            defaults of --ca-file, --cert-file and --key-file
  ORCHESTRATOR_TIMEOUT      default of --timeout
  ORCHESTRATOR_OUTPUT       default of --output
  ORCHESTRATOR_CONFIG       default of --config
  NO_COLOR                  no colours
  COLUMNS                   the width of the terminal, if it is to be another
  LC_ALL, LC_CTYPE, LANG    text is ASCII unless the first that is set has UTF-8

Examples:
  orchestrator demo
  orchestrator serve --config orchestrator.toml
  orchestrator subsystems register prices --endpoint http://127.0.0.1:50051
  orchestrator run
  orchestrator watch
  orchestrator top
  orchestrator cycles list --state failed --output json
  orchestrator report --since 7d"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Demo(demo::Demo),
    Run(run::Run),
    Cancel(cancel::Cancel),
    Status(status::StatusCommand),
    Health(health::HealthCommand),
    Watch(watch::Watch),
    Top(top::Top),
    Cycles(cycles::Cycles),
    Subsystems(subsystems::Subsystems),
    Loops(loops::Loops),
    Report(report::Report),
    Plan(plan::PlanCommand),
    Check(check::Check),
    Store(store::Store),
    Token(token::TokenCommand),
    Certs(certs::Certs),
    #[command(name = "whoami")]
    WhoAmI(whoami::WhoAmI),
    Audit(audit::Audit),
    Checkpoint(checkpoint::CheckpointCommand),
    Export(export::Export),
    Verify(verify::Verify),
    Backup(backup::Backup),
    Restore(backup::Restore),
    Conformance(conformance::Conformance),
    Completions(completions::Completions),
    Man(man::Man),
}

/// The version, with the commit that was built, if the build knew it.
fn version() -> String {
    match env!("BUILD_COMMIT") {
        "" => env!("CARGO_PKG_VERSION").to_owned(),
        commit => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
    }
}

impl Cli {
    /// Reads the command line and the environment. If they are invalid, or ask for help, or a shell asks for
    /// completions, the process exits here.
    pub fn read() -> Self {
        completions::answer();
        let matches = without_empty_variables(Self::command()).try_get_matches();
        let read = matches
            .and_then(|matches| Self::from_arg_matches(&matches).map_err(|error| error.format(&mut Self::command())));
        read.unwrap_or_else(|error| Self::without_environment(error).exit())
    }

    /// The error without the environment: clap lists options that the environment sets as required parts of the usage.
    /// If the environment is the cause of the error, a note says so.
    fn without_environment(error: clap::Error) -> clap::Error {
        if !error.use_stderr() {
            return error;
        }
        if let Err(error) = ignore_environment(Self::command()).try_get_matches() {
            return error;
        }
        output::note("the invalid value comes from the environment: see `orchestrator help` for the variables");
        error
    }

    /// Runs the command, and returns the exit code.
    pub fn run(self) -> ExitCode {
        /// Time for tasks to end and to close their files and connections. Threads that hang, for instance in a name
        /// lookup or in a file, are not awaited.
        const LAST_TASKS: Duration = Duration::from_millis(500);
        let runtime = match has_files().and_then(|()| runtime::Builder::new_multi_thread().enable_all().build()) {
            Ok(runtime) => runtime,
            Err(error) => {
                output::note(&format!("can't start: {error}; about {FILES} open files are needed (ulimit -n)"));
                return Exit::Refused.into();
            }
        };
        let exit = runtime.block_on(self.execute());
        runtime.shutdown_timeout(LAST_TASKS);
        exit
    }

    async fn execute(self) -> ExitCode {
        let (parting, last_words) = tokio::sync::watch::channel(String::new());
        let work: BoxFuture<'static, Result<Exit, Failure>> = match self.command {
            Command::Serve(serve) => return serve.run().await,
            // These handle signals and shut down themselves. Only their error is left to report.
            Command::Demo(demo) => Box::pin(ready(demo.run().await)),
            Command::Top(top) => Box::pin(ready(top.run().await)),
            Command::Run(run) => Box::pin(run.run(parting)),
            Command::Cancel(cancel) => Box::pin(cancel.run()),
            Command::Status(status) => Box::pin(status.run()),
            Command::Health(health) => Box::pin(health.run()),
            Command::Watch(watch) => Box::pin(watch.run()),
            Command::Cycles(cycles) => Box::pin(cycles.run()),
            Command::Subsystems(subsystems) => Box::pin(subsystems.run()),
            Command::Loops(loops) => Box::pin(loops.run()),
            Command::Report(report) => Box::pin(report.run()),
            Command::Plan(plan) => Box::pin(plan.run()),
            Command::WhoAmI(whoami) => Box::pin(whoami.run()),
            Command::Audit(audit) => Box::pin(audit.run()),
            Command::Checkpoint(checkpoint) => Box::pin(checkpoint.run()),
            Command::Export(export) => Box::pin(export.run()),
            Command::Conformance(conformance) => Box::pin(conformance.run()),
            // These have no handler of Ctrl-C, so that it ends them at once.
            Command::Check(check) => Box::pin(ready(check.run())),
            Command::Store(store) => Box::pin(store.run()),
            Command::Token(token) => Box::pin(ready(token.run())),
            Command::Certs(certs) => Box::pin(ready(certs.run())),
            Command::Verify(verify) => Box::pin(ready(verify.run())),
            Command::Backup(backup) => Box::pin(ready(backup.run())),
            Command::Restore(restore) => Box::pin(ready(restore.run())),
            Command::Completions(completions) => Box::pin(ready(completions.run())),
            Command::Man(man) => Box::pin(ready(man.run())),
        };
        until_left(work, last_words).await
    }
}

/// Runs a command and reports its failure; on Ctrl-C, prints `parting` on stderr and exits.
///
/// The command is a separate task: its output may wait for a paused reader, and Ctrl-C has to work then, too.
async fn until_left(
    work: impl Future<Output = Result<Exit, Failure>> + Send + 'static,
    last_words: tokio::sync::watch::Receiver<String>,
) -> ExitCode {
    /// Time for the command to clear its view on a terminal, unless it waits for a reader.
    const PATIENCE: Duration = Duration::from_secs(1);
    let mut interrupt = match signal(SignalKind::interrupt()) {
        Ok(interrupt) => interrupt,
        Err(error) => {
            output::note(&format!("can't listen for Ctrl-C: {error}"));
            return Exit::Refused.into();
        }
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        work.await.unwrap_or_else(|Failure { exit, message, .. }| {
            if !message.is_empty() {
                output::note(&output::clean_lines(&message));
            }
            exit
        })
    });
    select! {
        _ = interrupt.recv() => {}
        Some(ended) = tasks.join_next() => return joined(ended).unwrap_or(Exit::Left).into(),
    }
    _ = timeout(PATIENCE, tasks.shutdown()).await;
    let last_words = last_words.borrow().clone();
    if !last_words.is_empty() {
        output::last_words(last_words).await;
    }
    Exit::Left.into()
}

/// Files that a command needs at its start. They are tried first: the library that handles signals panics if there are
/// too few.
const FILES: usize = 24;

fn has_files() -> io::Result<()> {
    (0..FILES).map(|_| File::open("/dev/null")).collect::<io::Result<Vec<_>>>().map(drop)
}

/// The same command and its subcommands, without values from empty variables of the environment: these count as unset.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &OsStr| env::var_os(name).is_some_and(|value| value.is_empty());
    let without = |argument: clap::Arg| {
        if argument.get_env().is_some_and(is_empty) { argument.env(None::<&str>) } else { argument }
    };
    command.mut_args(without).mut_subcommands(without_empty_variables)
}

/// The same command and its subcommands, without values from the environment.
fn ignore_environment(command: clap::Command) -> clap::Command {
    command.mut_args(|argument| argument.env(None::<&str>)).mut_subcommands(ignore_environment)
}

/// How a command ended, for scripts. The help of [`Cli`] lists the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    Done = 0,
    Refused = 1,
    Usage = 2,
    Unproved = 3,
    Unreachable = 4,
    Degraded = 10,
    Failed = 11,
    Cancelled = 12,
    Left = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command failed.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    /// The problem and its remedy, for stderr. Empty if nothing is to be printed.
    message: String,
    /// The name that was not found, if that is the reason.
    unknown: Option<known::Unknown>,
    /// True if the service knows the caller, who has no right to this call.
    is_denied: bool,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), unknown: None, is_denied: false }
    }

    /// The same failure, with another line in its message.
    fn and(self, line: &str) -> Self {
        Self { message: format!("{}\n{line}", self.message), ..self }
    }

    /// The service does not know this name.
    fn unknown(unknown: known::Unknown) -> Self {
        let message = unknown.message();
        Self { unknown: Some(unknown), ..Self::new(Exit::Refused, message) }
    }

    /// The reader of the output has closed it.
    fn nobody_reads() -> Self {
        Self::new(Exit::Done, "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command and all below it, by their whole names.
    fn commands(command: &clap::Command, name: &str) -> Vec<(String, clap::Command)> {
        let below = command.get_subcommands().flat_map(|it| commands(it, &format!("{name} {}", it.get_name())));
        [(name.to_owned(), command.clone())].into_iter().chain(below).collect()
    }

    #[test]
    fn help_fits_80_columns() {
        for (name, command) in commands(&Cli::command(), "orchestrator") {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let lines: Vec<_> = help.lines().collect();
            for line in lines.iter().filter(|line| line.starts_with(' ')) {
                // clap would break a longer line, and a broken example can't be copied.
                assert!(line.chars().count() <= 80, "{name}: {line}");
            }
            for pair in lines.windows(2) {
                // clap breaks paragraphs, so they contain no line breaks.
                let are_prose = pair.iter().all(|line| line.starts_with(|first: char| !first.is_whitespace()));
                assert!(!are_prose, "{name}: {pair:?}");
            }
            assert!(!command.get_arguments().any(has_long_values), "{name} has the long form of help");
        }
    }

    /// True if clap prints the help of all arguments in its long form, because a value of this one has a help.
    fn has_long_values(argument: &clap::Arg) -> bool {
        !argument.is_hide_possible_values_set()
            && argument.get_possible_values().iter().any(|value| value.get_help().is_some())
    }
}
