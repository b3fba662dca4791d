//! Patterns of identities, names and endpoints. `*` stands for one or more characters, but never for `/`; `{1}`, `{2}`
//! … for the text that a `*` of the identity stood for.

use std::fmt::{self, Write as _};

use crate::model::Name;

/// A pattern as it is written in a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Any,
    /// The text of this `*` of the identity, counted from 0.
    Captured(usize),
}

impl Pattern {
    /// Most characters of a pattern.
    pub(super) const MAX_LEN: usize = 256;

    /// Parses a pattern in which `{1}` to `{captures}` can be written.
    pub(super) fn parse(text: &str, captures: usize) -> Result<Self, String> {
        let is_printable = text.bytes().all(|byte| byte.is_ascii_graphic());
        if text.is_empty() || text.len() > Self::MAX_LEN || !is_printable {
            return Err(format!("is not 1 to {} printable ASCII characters", Self::MAX_LEN));
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, length) = match rest.find(['*', '{', '}']) {
                Some(0) if rest.starts_with('*') => (Piece::Any, 1),
                Some(0) => {
                    let inside = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map(|(inside, _)| inside);
                    let number = inside.and_then(|inside| (1..=captures).find(|number| number.to_string() == inside));
                    let Some(number) = number else {
                        return Err(match captures {
                            0 => "has a brace; `{1}` needs a * in each of `who`".to_owned(),
                            _ => format!("has a brace that is not part of `{{1}}` to `{{{captures}}}`"),
                        });
                    };
                    (Piece::Captured(number - 1), inside.map_or(0, str::len) + 2)
                }
                end => (Piece::Text(rest[..end.unwrap_or(rest.len())].to_owned()), end.unwrap_or(rest.len())),
            };
            // Without this, the texts of two adjacent ones could be divided in any way.
            if piece == Piece::Any && pieces.last() == Some(&Piece::Any) {
                return Err("has two * side by side; one * stands for any number of characters".into());
            }
            pieces.push(piece);
            rest = &rest[length..];
        }
        Ok(Self(pieces))
    }

    /// Number of `*`.
    pub(super) fn stars(&self) -> usize {
        self.0.iter().filter(|piece| **piece == Piece::Any).count()
    }

    /// The pattern with captured texts, literally. `None` if one of them is not a valid name: it could otherwise change
    /// the meaning of the pattern, as `/` does.
    pub(super) fn glob(&self, captured: &[String]) -> Option<Glob> {
        let mut glob = Vec::new();
        for piece in &self.0 {
            match piece {
                Piece::Any => glob.push(None),
                Piece::Text(text) => glob.extend(text.bytes().map(Some)),
                Piece::Captured(number) => {
                    let name = Name::parse(captured.get(*number)?).ok()?;
                    glob.extend(name.as_str().bytes().map(Some));
                }
            }
        }
        Some(Glob(glob))
    }
}

/// A pattern without captures: its bytes, with `None` for each `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Glob(Vec<Option<u8>>);

impl Glob {
    /// True if it matches every name.
    pub(super) fn is_any(&self) -> bool {
        self.0 == [None]
    }

    /// The same pattern in lower case, for hosts.
    pub(super) fn in_lower_case(self) -> Self {
        Self(self.0.into_iter().map(|byte| byte.map(|byte| byte.to_ascii_lowercase())).collect())
    }

    /// True if it matches the whole text.
    pub(super) fn matches(&self, text: &str) -> bool {
        self.captures(text).is_some()
    }

    /// The text of each `*`, if it matches: as short as possible, from left to right. Takes time in proportion to the
    /// product of both lengths.
    pub(super) fn captures(&self, text: &str) -> Option<Vec<String>> {
        let mut captured = Vec::new();
        // `*` never stands for a slash, so both have the same slashes.
        let mut segments = text.split('/');
        for glob in self.0.split(|byte| *byte == Some(b'/')) {
            captured.extend(of_segment(glob, segments.next()?)?);
        }
        segments.next().is_none().then_some(captured)
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| f.write_char(byte.map_or('*', char::from)))
    }
}

/// The text of each `*` in a segment. The usual algorithm: when the rest does not match, only the latest `*` takes one
/// more character, because an earlier one would only leave less for it.
/// <https://research.swtch.com/glob>
fn of_segment(glob: &[Option<u8>], text: &str) -> Option<Vec<String>> {
    let bytes = text.as_bytes();
    let (mut at, mut in_glob) = (0, 0);
    let mut stars: Vec<(usize, usize, usize)> = Vec::new();
    loop {
        match glob.get(in_glob) {
            // It takes at least one character.
            Some(None) if at < bytes.len() => {
                stars.push((in_glob, at, at + 1));
                at += 1;
                in_glob += 1;
                continue;
            }
            Some(Some(byte)) if bytes.get(at) == Some(byte) => {
                at += 1;
                in_glob += 1;
                continue;
            }
            None if at == bytes.len() => break,
            _ => {}
        }
        let (place, _, end) = stars.last_mut().filter(|(_, _, end)| *end < bytes.len())?;
        *end += 1;
        (at, in_glob) = (*end, *place + 1);
    }
    stars.into_iter().map(|(_, from, end)| Some(text.get(from..end)?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn captures(pattern: &str, text: &str) -> Option<Vec<String>> {
        Pattern::parse(pattern, 0).unwrap().glob(&[]).unwrap().captures(text)
    }

    #[test]
    fn a_star_stands_for_characters_of_one_segment() {
        for (pattern, text, expected) in [
            ("*", "a", Some(&["a"][..])),
            ("*", "", None),
            ("*", "a/b", None),
            ("a*", "a", None),
            ("spiffe://d/process/*", "spiffe://d/process/main", Some(&["main"])),
            ("spiffe://d/process/*", "spiffe://d/process/a/b", None),
            ("spiffe://d/process/*", "spiffe://d/process/", None),
            ("spiffe://*/process/*", "spiffe://d/process/main", Some(&["d", "main"])),
            ("a*b*c", "a1b2bc", Some(&["1", "2b"])),
            ("a*b*c", "abbbc", Some(&["b", "b"])),
            ("*.d", "a.d.d", Some(&["a.d"])),
            ("a", "a", Some(&[])),
            ("a", "ab", None),
            ("ab", "a", None),
        ] {
            let expected = expected.map(|texts| texts.iter().map(ToString::to_string).collect::<Vec<_>>());
            assert_eq!(captures(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_captured_text_is_literal_and_must_be_a_name() {
        let glob = |captured: &str| Pattern::parse("x-{1}", 1).unwrap().glob(&[captured.to_owned()]);
        assert!(glob("a").unwrap().matches("x-a"));
        assert!(!glob("a").unwrap().matches("x-b"));
        for no_name in ["*", "a*", "{1}", "a/b", "", "1"] {
            assert_eq!(glob(no_name), None, "{no_name}");
        }
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for (pattern, captures) in [
            ("", 0),
            ("a b", 0),
            ("ä", 0),
            ("**", 0),
            ("{1}", 0),
            ("{2}", 1),
            ("{", 1),
            ("}", 1),
            ("{1", 1),
            ("{01}", 1),
        ] {
            assert!(Pattern::parse(pattern, captures).is_err(), "{pattern:?}");
        }
        assert!(Pattern::parse(&"a".repeat(257), 0).is_err());
        assert!(Pattern::parse("{1}-*-{2}", 2).is_ok());
    }

    /// The meaning of a pattern, by trying everything.
    fn matches(glob: &[u8], text: &[u8]) -> bool {
        match glob.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => {
                let most = text.iter().take_while(|byte| **byte != b'/').count();
                (1..=most).any(|taken| matches(rest, &text[taken..]))
            }
            Some((byte, rest)) => text.split_first().is_some_and(|(first, text)| first == byte && matches(rest, text)),
        }
    }

    proptest! {
        #[test]
        fn a_pattern_matches_as_by_trying_everything(
            pattern in "[ab/]?(\\*?[ab/]{1,2}){0,4}\\*?",
            text in "[ab/]{0,12}",
        ) {
            prop_assume!(!pattern.is_empty());
            let captured = captures(&pattern, &text);
            prop_assert_eq!(captured.is_some(), matches(pattern.as_bytes(), text.as_bytes()));
            // The captured texts make the text.
            if let Some(captured) = captured {
                let mut made = pattern.clone();
                for captured in &captured {
                    prop_assert!(!captured.contains('/') && !captured.is_empty());
                    made = made.replacen('*', captured, 1);
                }
                prop_assert_eq!(made, text);
            }
        }
    }
}
