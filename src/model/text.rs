//! Makes text from outside safe to show on a terminal or in a log, and numbers readable. Only this module knows which
//! characters are not plain text.

use std::borrow::Cow;

use super::excerpt;

/// True if the character controls a terminal, changes the text direction, or is invisible. Variation selectors are
/// allowed.
///
/// These are Unicode's control characters (general category Cc) and `Default_Ignorable_Code_Point` with the separators
/// of lines and paragraphs and the interlinear annotations:
/// <https://www.unicode.org/reports/tr44/#Default_Ignorable_Code_Point>.
#[must_use]
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffc}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Text on one line, for people: unprintable characters are left out, line ends and tabs become spaces.
#[must_use]
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).filter(|c| !is_unprintable(*c)).collect()
}

/// JSON in which unprintable characters are escaped. All of them must be inside strings, so the JSON must be on one
/// line.
#[must_use]
pub fn escape_json(json: &str) -> Cow<'_, str> {
    escape(json, is_unprintable, |c, text| {
        text.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
    })
}

/// Text in which the characters that `is_to_escape` picks are escaped as in Rust's strings: `\n`, `\u{202e}`.
#[must_use]
pub fn escape_text(text: &str, is_to_escape: impl Fn(char) -> bool) -> Cow<'_, str> {
    escape(text, is_to_escape, |c, text| text.extend(c.escape_default()))
}

fn escape(text: &str, is_to_escape: impl Fn(char) -> bool, put: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if !text.contains(&is_to_escape) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_to_escape(c) {
            put(c, &mut escaped);
        } else {
            escaped.push(c);
        }
    }
    escaped.into()
}

/// The text if it has at most `max` bytes, else its start with an ellipsis, which together have at most `max`.
#[must_use]
pub fn shortened<'a>(text: impl Into<Cow<'a, str>>, max: usize) -> Cow<'a, str> {
    const ELLIPSIS: &str = "…";
    let text = text.into();
    if text.len() <= max {
        return text;
    }
    format!("{}{ELLIPSIS}", excerpt(&text, max.saturating_sub(ELLIPSIS.len()))).into()
}

/// `1 entry`, `2 entries`, `1,000 open calls`: a number of things, each of which is called `one`.
#[must_use]
pub fn count(number: impl Into<u64>, one: &str) -> String {
    let number = number.into();
    let stem = one.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'o', 'u']));
    match (number, stem) {
        (1, _) => format!("1 {one}"),
        (_, Some(stem)) => format!("{} {stem}ies", grouped(number)),
        _ if one.ends_with("ch") => format!("{} {one}es", grouped(number)),
        _ => format!("{} {one}s", grouped(number)),
    }
}

/// A number with thousands separators.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_are_counted_in_plain_english() {
        let counted =
            [(0, "loop"), (1, "loop"), (1000, "open call"), (1, "entry"), (2, "entry"), (9, "day"), (2, "watch")];
        let counted = counted.map(|(number, one): (u64, _)| count(number, one)).join(", ");
        assert_eq!(counted, "0 loops, 1 loop, 1,000 open calls, 1 entry, 2 entries, 9 days, 2 watches");
    }

    #[test]
    fn a_text_above_its_limit_ends_with_an_ellipsis_within_it() {
        assert_eq!(shortened("abcdef", 6), "abcdef");
        assert_eq!(shortened("abcdefg", 6), "abc…");
        assert_eq!(shortened("éééé", 7), "éé…", "no character is cut");
    }

    #[test]
    fn received_text_can_not_command_a_terminal() {
        assert_eq!(clean("a\x1b[31mb\r\nc\u{9b}2Jd\u{202e}e\u{7f}\té"), "a[31mb  c2Jde é");
        assert_eq!(clean("s\u{61c}a\u{ad}f\u{3164}e\u{e0041}"), "safe");
        assert_eq!(escape_json("{\"a\":\"\u{9b}\u{202e}\u{e0041}é\"}"), r#"{"a":"\u009b\u202e\udb40\udc41é"}"#);
        assert_eq!(escape_text("a\n\u{202e}é", is_unprintable), "a\\n\\u{202e}é");
    }
}
