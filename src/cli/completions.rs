//! `orchestrator completions`: completions for shells. A shell asks this program for each of them, so that they contain
//! the names that the service knows.

use std::{env, ffi::OsString, time::Duration};

use clap::{Arg, Args, Command, CommandFactory, FromArgMatches};
use clap_complete::{ArgValueCandidates, CompleteEnv, CompletionCandidate, Shell, env::Shells};
use tokio::{runtime, time::timeout};

use super::{
    Cli, Exit, Failure, known,
    output::{Format, print},
    remote::Remote,
};

/// The variable by which a shell asks for completions, with its name.
const VARIABLE: &str = "ORCHESTRATOR_COMPLETE";
/// Longest wait for the names: a user waits for them.
const PATIENCE: Duration = Duration::from_secs(1);

/// Print completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
They contain the names of the subsystems and loops of the service at --address, if it answers within a second. Load \
them in the startup file of the shell, so that they belong to the installed version.

Examples:
  orchestrator completions fish | source       # in ~/.config/fish/config.fish
  eval \"$(orchestrator completions bash)\"      # in ~/.bashrc
  eval \"$(orchestrator completions zsh)\"       # in ~/.zshrc, after compinit")]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    /// Prints them.
    pub(super) fn run(&self) -> Result<Exit, Failure> {
        let mut script = Vec::new();
        let shell = self.shell.to_string();
        if let Some(completer) = Shells::builtins().completer(&shell) {
            let name = "orchestrator";
            let written = completer.write_registration(VARIABLE, name, name, name, &mut script);
            written.map_err(|error| Failure::new(Exit::Refused, error.to_string()))?;
        }
        print(&String::from_utf8_lossy(&script))?;
        Ok(Exit::Done)
    }
}

/// Answers a shell that asks for completions, and exits. Does nothing if none asks.
pub(super) fn answer() {
    CompleteEnv::with_factory(|| with_names(Cli::command(), "")).var(VARIABLE).complete();
}

/// What names an argument takes.
#[derive(Clone, Copy)]
enum Names {
    Subsystems,
    Loops,
}

/// The command line, with names as values. `of` is the command that this one belongs to.
fn with_names(command: Command, of: &str) -> Command {
    let name = command.get_name().to_owned();
    let command = command.mut_args(|arg| match names_of(&arg, of) {
        Some(names) => arg.add(ArgValueCandidates::new(move || candidates(names))),
        None => arg,
    });
    command.mut_subcommands(|subcommand| with_names(subcommand, &name))
}

/// The names that an argument of a subcommand of `of` takes.
fn names_of(arg: &Arg, of: &str) -> Option<Names> {
    match (arg.get_long(), of) {
        (Some("subsystem" | "requires" | "after" | "reads"), _) => Some(Names::Subsystems),
        (Some("loop"), _) => Some(Names::Loops),
        (None, "subsystems") if arg.get_id() == "name" => Some(Names::Subsystems),
        (None, "loops") if ["name", "names"].contains(&arg.get_id().as_str()) => Some(Names::Loops),
        _ => None,
    }
}

/// The names that the service knows; none if it does not say so soon.
fn candidates(names: Names) -> Vec<CompletionCandidate> {
    let known = || {
        let remote = remote(env::args_os().skip(1))?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build().ok()?;
        runtime.block_on(async { timeout(PATIENCE, known(names, &remote)).await }).ok()?.ok()
    };
    known().unwrap_or_default().into_iter().map(CompletionCandidate::new).collect()
}

async fn known(names: Names, remote: &Remote) -> Result<Vec<String>, Failure> {
    let mut client = remote.connect().await?;
    match names {
        Names::Subsystems => known::subsystems(remote, &mut client).await,
        Names::Loops => known::loops(remote, &mut client).await,
    }
}

/// The connection that a line which is not complete is about: by its options, and by the environment.
fn remote(words: impl Iterator<Item = OsString>) -> Option<Remote> {
    let command = Remote::<Format>::augment_args(Command::new("orchestrator"));
    let mut of_connection = vec![OsString::from("orchestrator")];
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy().into_owned();
        let Some(option) = text.strip_prefix("--") else { continue };
        let (option, has_value) = option.split_once('=').map_or((option, false), |(option, _)| (option, true));
        if command.get_arguments().any(|arg| arg.get_long() == Some(option)) {
            of_connection.push(word);
            of_connection.extend(words.next_if(|_| !has_value));
        }
    }
    let matches = command.ignore_errors(true).try_get_matches_from(of_connection).ok()?;
    Remote::from_arg_matches(&matches).ok()
}
