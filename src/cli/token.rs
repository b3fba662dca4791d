//! `orchestrator token`: creates, lists and removes static tokens.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use jiff::Timestamp;

use super::{
    Exit, Failure, HOST,
    output::{expiry, instant, length, note, print},
    table::{Page, Table, left, text},
};
use crate::{
    access::{Token, TokenId},
    config::{read_tokens, tokens_text},
    file,
    model::Name,
};

/// Create, list and remove static tokens, in the file that the key access.tokens_file names
#[derive(Debug, clap::Args)]
pub(super) struct TokenCommand {
    #[command(subcommand)]
    command: Command,
    /// The file of tokens
    #[arg(long, value_name = "PATH", default_value = "tokens.toml", global = true)]
    file: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a token and print it
    #[command(after_help = "\
The token is printed once and stored nowhere: the file contains only its SHA-256. A running service reads the changed \
file within two seconds. Grants in the configuration say what token:NAME may do. Several tokens can have the same \
name: to replace one, create the new one first.

Examples:
  orchestrator token create prometheus --to prometheus.token
  orchestrator token create ops --expires 8h
  ORCHESTRATOR_CREDENTIALS=ops.token orchestrator whoami")]
    Create {
        /// Its callers are token:NAME
        #[arg(value_parser = parse_name)]
        name: Name,
        /// How long it is valid, such as 8h, 90d or 52w; or never
        #[arg(long, value_name = "DURATION", default_value = "90d", value_parser = parse_expiry)]
        expires: Expiry,
        /// Write the token to this new file, which only you can read, instead of printing it
        #[arg(long, value_name = "PATH")]
        to: Option<PathBuf>,
    },
    /// List the tokens, without their secrets
    #[command(visible_alias = "ls")]
    List,
    /// Remove a token, so that it is no longer valid
    Revoke {
        /// The id of the token: see `orchestrator token list`
        #[arg(value_parser = parse_id)]
        id: TokenId,
    },
}

/// When a new token expires.
#[derive(Clone, Copy, Debug)]
enum Expiry {
    Never,
    At(Timestamp),
}

fn parse_name(text: &str) -> Result<Name, String> {
    Name::parse(text).map_err(|error| error.to_string())
}

fn parse_id(text: &str) -> Result<TokenId, String> {
    TokenId::parse(text).ok_or_else(|| "give the 16 hexadecimal digits between the underscores of the token".to_owned())
}

fn parse_expiry(text: &str) -> Result<Expiry, String> {
    if text == "never" {
        return Ok(Expiry::Never);
    }
    let at = length(text).and_then(|length| HOST.clock.now().checked_add(length).ok());
    at.map(Expiry::At).ok_or_else(|| "give how long it is valid, such as 8h, 90d or 52w; or never".to_owned())
}

impl TokenCommand {
    /// Runs the subcommand.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let path = &self.file;
        // Until the end: of two commands at the same time, one would undo the change of the other.
        let _lock = lock(path);
        match self.command {
            Command::Create { name, expires, to } => create(path, name, expires, to.as_deref())?,
            Command::List => print(&list(&tokens(path)?))?,
            Command::Revoke { id } => {
                let all = tokens(path)?;
                let (removed, kept): (Vec<_>, Vec<_>) = all.into_iter().partition(|token| token.id == id);
                let Some(token) = removed.first() else {
                    let message = format!("{} has no token with the id {id}", path.display());
                    return Err(Failure::new(Exit::Refused, message));
                };
                store(path, &kept)?;
                note(&format!("removed the token {id} of token:{}", token.name));
            }
        }
        Ok(Exit::Done)
    }
}

fn create(path: &Path, name: Name, expires: Expiry, to: Option<&Path>) -> Result<(), Failure> {
    let expires_at = match expires {
        Expiry::Never => None,
        Expiry::At(at) => Some(at.round(jiff::Unit::Second).unwrap_or(at)),
    };
    let mut all = if path.exists() { tokens(path)? } else { Vec::new() };
    let (token, secret) =
        Token::create(name, expires_at).map_err(|error| Failure::new(Exit::Refused, error.to_string()))?;
    let (id, name) = (token.id, token.name.clone());
    all.push(token);
    // The file of the secret first: a token that nobody has is worse than a secret without a token.
    if let Some(to) = to {
        file::create_private(to, &format!("{secret}\n")).map_err(|error| written(to, &error))?;
    }
    store(path, &all)?;
    let until = expires_at.map_or_else(|| "does not expire".to_owned(), |at| format!("expires at {}", instant(at)));
    note(&format!("token {id} of token:{name} {until}; its SHA-256 is in {}", path.display()));
    match to {
        Some(to) => note(&format!("the token itself is in {}", to.display())),
        None => print(&format!("{secret}\n"))?,
    }
    Ok(())
}

fn tokens(path: &Path) -> Result<Vec<Token>, Failure> {
    read_tokens(path).map_err(|error| Failure::new(Exit::Usage, error.to_string()))
}

fn list(tokens: &[Token]) -> String {
    let mut table = Table::new([left("ID"), left("IDENTITY"), left("EXPIRES")]);
    for Token { id, name, expires_at, .. } in tokens {
        let expires = expires_at.map_or_else(|| "never".to_owned(), expiry);
        table.row([text(id.to_string()), text(format!("token:{name}")), text(expires)]);
    }
    table.or("no tokens", Page::of_stdout(false))
}

/// Waits until no other command changes files in this directory. Without a lock where the system has none.
fn lock(path: &Path) -> Option<File> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).ok().filter(|directory| directory.lock().is_ok())
}

/// Replaces the file of tokens.
fn store(path: &Path, tokens: &[Token]) -> Result<(), Failure> {
    file::replace(path, &tokens_text(tokens)).map_err(|error| written(path, &error))
}

fn written(path: &Path, error: &io::Error) -> Failure {
    Failure::new(Exit::Refused, format!("{} can't be written: {error}", path.display()))
}
