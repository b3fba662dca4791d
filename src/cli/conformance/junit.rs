//! The report as JUnit XML, for CI systems.

use std::fmt::Write as _;

use super::{Outcome, Report};
use crate::model::text::is_unprintable;

/// The whole document. A recommendation that has failed without `--strict` is a skipped test, so that it does not fail
/// a CI run.
pub(super) fn document(report: &Report) -> String {
    let number = |outcome, counts: bool| {
        report.checks.iter().filter(|finding| finding.outcome == outcome && finding.counts == counts).count()
    };
    let failures = number(Outcome::Failed, true);
    let skipped = report.checks.iter().filter(|finding| finding.outcome != Outcome::Passed).count() - failures;
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let name = escaped(&format!("conformance of {} at {}", report.subsystem, report.endpoint));
    let tests = report.checks.len();
    // Writing to a string does not fail.
    let _ =
        writeln!(xml, "<testsuite name=\"{name}\" tests=\"{tests}\" failures=\"{failures}\" skipped=\"{skipped}\">");
    for finding in &report.checks {
        let _ =
            write!(xml, "  <testcase classname=\"conformance.{}\" name=\"{}\">", finding.level.word(), finding.name);
        let [rule, sent, came, reason] = [finding.rule, &finding.sent, &finding.came, &finding.reason].map(escaped);
        let _ = match finding.outcome {
            Outcome::Passed => Ok(()),
            Outcome::NotApplicable => write!(xml, "<skipped message=\"{reason}\"/>"),
            Outcome::Failed if finding.counts => {
                write!(xml, "<failure message=\"{came}\">sent: {sent}\ncame: {came}\ncontract: {rule}</failure>")
            }
            Outcome::Failed => write!(xml, "<skipped message=\"recommended, and failed: {came}\"/>"),
        };
        xml.push_str("</testcase>\n");
    }
    xml.push_str("</testsuite>\n");
    xml
}

/// Text for content and attributes. XML has no way to write most control characters.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            // Escaped, so that a terminal shows the characters instead of obeying them.
            c if is_unprintable(c) => _ = write!(escaped, "&#x{:x};", u32::from(c)),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    #[test]
    fn text_can_not_end_its_element() {
        assert_eq!(
            super::escaped("<a b=\"c\">&\n\u{1}\u{202e}é"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#10;\u{fffd}&#x202e;é"
        );
    }
}
