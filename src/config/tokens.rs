//! The file of static tokens.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::Path,
};

use jiff::Timestamp;

use super::{
    ConfigError, Kind, Problem, Source, entries, file_text,
    reader::{Problems, Reader, parse},
};
use crate::{
    access::{Token, TokenSpec},
    file,
};

/// Most tokens in a file.
const MAX_TOKENS: usize = 10_000;

/// Reads a file of tokens, which others may not be able to read or change.
///
/// # Errors
/// All problems together, or the file can't be read or is open to others.
pub fn read_tokens(path: &Path) -> Result<Vec<Token>, ConfigError> {
    let name = path.display().to_string();
    let table = parse(&name, &file_text(&name, file::read_secret(path))?)?;
    let mut problems = Problems::default();
    let mut reader = Reader::new(table, BTreeMap::default(), &mut problems);
    let kind = Kind { of: "token", list: "tokens", max: MAX_TOKENS, limit: "a file" };
    let tokens = entries(&mut reader, kind, token_spec, Token::from_spec, |_| "");
    reader.finish();
    let mut ids = BTreeSet::new();
    for Token { id, .. } in tokens.iter().filter(|token| !ids.insert(token.id)) {
        let problem = format!("have the id {id} twice; remove one of the two");
        problems.push(Problem::new(Source::File(name.as_str().into(), 0), "tokens", problem));
    }
    problems.into_result(tokens)
}

fn token_spec(read: &mut Reader<'_>) -> TokenSpec {
    TokenSpec {
        id: read.text("id").unwrap_or_default(),
        name: read.text("name").unwrap_or_default(),
        sha256: read.text("sha256").unwrap_or_default(),
        expires_at: read.parsed("expires_at", |text| {
            text.parse::<Timestamp>().map_err(|_| "give a time such as \"2027-01-31T12:00:00Z\"".to_owned())
        }),
    }
}

/// The text of a file with these tokens.
#[must_use]
pub fn tokens_text(tokens: &[Token]) -> String {
    let mut text = String::from(
        "# Static tokens of callers, written by `orchestrator token`. It contains no secrets. Only trusted users may be\n\
         # able to change it: a new entry is a new token.\n",
    );
    for Token { id, name, digest, expires_at } in tokens {
        let _ = write!(text, "\n[[tokens]]\nid = \"{id}\"\nname = \"{name}\"\nsha256 = \"{digest}\"\n");
        if let Some(at) = expires_at {
            let _ = writeln!(text, "expires_at = \"{at}\"");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;
    use crate::model::Name;

    fn read(text: &str) -> Result<Vec<Token>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let place = file.path().display().to_string();
        read_tokens(file.path()).map_err(|error| error.to_string().replace(&place, "tokens.toml"))
    }

    #[test]
    fn tokens_are_read_as_they_were_written() {
        let name = |name| Name::parse(name).unwrap();
        let (one, _) = Token::create(name("wall"), None).unwrap();
        let (other, _) = Token::create(name("wall"), Some("2027-01-31T12:00:00Z".parse().unwrap())).unwrap();
        let tokens = vec![one.clone(), other];
        assert_eq!(read(&tokens_text(&tokens)), Ok(tokens));
        assert_eq!(read(""), Ok(Vec::new()));
        let twice = read(&tokens_text(&[one.clone(), one.clone()])).unwrap_err();
        assert_eq!(twice, format!("tokens.toml: tokens have the id {} twice; remove one of the two", one.id));
    }

    #[test]
    fn every_problem_of_a_token_is_named() {
        let text = "[[tokens]]\nname = \"a b\"\nid = \"1\"\nexpires_at = \"soon\"\n[[tokens]]\nname = \"wall\"\nid = \
                    \"00000000000000AA\"\nsha256 = \"0\"\nexpires = 5\n";
        let problems = read(text).unwrap_err();
        let problems: Vec<_> = problems.lines().collect();
        assert_eq!(
            problems,
            [
                "tokens.toml:1: tokens[0]: sha256 is \"\"; give the 64 hexadecimal digits, in lower case, of the SHA-256 \
                 of the token",
                "tokens.toml:2: tokens[0]: name \"a b\" is not a name: a name is 1 to 63 characters, a letter, then \
                 letters, digits, '_', '-' or '.'",
                "tokens.toml:3: tokens[0]: id is \"1\"; give the 16 hexadecimal digits, in lower case, between the \
                 underscores of the token",
                "tokens.toml:4: tokens[0]: expires_at is \"soon\"; give a time such as \"2027-01-31T12:00:00Z\"",
                "tokens.toml:7: token wall: id is \"00000000000000AA\"; give the 16 hexadecimal digits, in lower case, \
                 between the underscores of the token",
                "tokens.toml:8: token wall: sha256 is \"0\"; give the 64 hexadecimal digits, in lower case, of the \
                 SHA-256 of the token",
                "tokens.toml:9: token wall: expires is unknown; did you mean expires_at?",
            ]
        );
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644)).unwrap();
        let refused = read_tokens(file.path()).unwrap_err().to_string();
        assert!(refused.contains("has mode 0644, so that other users of this machine could use it"), "{refused}");
    }
}
