//! Tables and facts, laid out for the place where they are shown.
//!
//! On a terminal, a table has all columns if they fit, with text wrapped in its column. Otherwise each row is a block:
//! a line with the columns that fit, and the others below it. In a pipe or a file, each row is one line, and
//! nothing is left out or cut.

use std::env;

use clap::builder::styling::{AnsiColor, Style};
use console::{Term, measure_text_width, truncate_str};

use super::output::{clean, colour, grouped, has_colours, is_terminal};

/// Blanks between two columns, and before the lines below a row.
const GAP: usize = 2;
/// Most lines of a text that a terminal shows.
const LINES: usize = 2;

/// The place where text is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    /// Columns of the terminal; `None` if a line can have any length.
    width: Option<usize>,
    /// True if no column is left out and no text is cut.
    is_wide: bool,
    has_colours: bool,
    has_unicode: bool,
}

impl Page {
    /// Standard output. With `is_wide`, nothing is left out or cut on a terminal either.
    pub(super) fn of_stdout(is_wide: bool) -> Self {
        Self {
            width: is_terminal().then(terminal_width),
            is_wide,
            has_colours: has_colours(),
            has_unicode: has_unicode(),
        }
    }

    /// Lines, each cut at the width of the terminal.
    pub(super) fn cut_lines(self, lines: &str) -> String {
        let Some(width) = self.width.filter(|_| !self.is_wide) else { return lines.to_owned() };
        let cut: Vec<_> = lines.split('\n').map(|line| truncate_str(line, width, self.ellipsis())).collect();
        cut.join("\n")
    }

    fn ellipsis(self) -> &'static str {
        if self.has_unicode { "…" } else { "..." }
    }

    /// A heading with the characters that the locale has.
    fn heading(self, heading: &str) -> String {
        if self.has_unicode { heading.to_owned() } else { heading.replace('±', "+/-") }
    }
}

/// The columns of the terminal: `COLUMNS` if it is set, as by a user who wants another width.
fn terminal_width() -> usize {
    let asked = env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).filter(|columns| *columns > 0);
    asked.unwrap_or_else(|| Term::stdout().size().1.into())
}

/// True if the locale of the user has UTF-8: POSIX takes the first of these variables that is not empty.
pub(super) fn has_unicode() -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(env::var_os).find(|it| !it.is_empty());
    locale.is_some_and(|locale| {
        let locale = locale.to_string_lossy().to_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

// ---------------------------------------------------------------------------------------------------------------
// Columns and cells

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    heading: &'static str,
    is_right: bool,
    /// True if its text can be wrapped.
    is_long: bool,
    /// True if its text is never cut.
    is_whole: bool,
    /// True if it is left out where it has no room.
    is_minor: bool,
}

/// A column of short values, such as names and states.
pub(super) fn left(heading: &'static str) -> Column {
    Column { heading, is_right: false, is_long: false, is_whole: false, is_minor: false }
}

/// A column of numbers.
pub(super) fn right(heading: &'static str) -> Column {
    Column { is_right: true, ..left(heading) }
}

/// A column of text, such as reasons and lists. A terminal shows two lines of it.
pub(super) fn long(heading: &'static str) -> Column {
    Column { is_long: true, ..left(heading) }
}

impl Column {
    /// The same column, which a terminal leaves out where it has no room.
    pub(super) fn minor(self) -> Self {
        Self { is_minor: true, ..self }
    }

    /// The same column of text, which is never cut.
    pub(super) fn whole(self) -> Self {
        Self { is_whole: true, ..self }
    }
}

/// A value of a table.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    text: String,
    colour: Option<AnsiColor>,
}

impl Cell {
    /// Its text with blanks up to this width, in its colour if the page has colours.
    fn line(&self, text: &str, width: usize, is_right: bool, page: Page) -> String {
        let blanks = " ".repeat(width.saturating_sub(measure_text_width(text)));
        let text = match self.colour.filter(|_| page.has_colours) {
            Some(colour) => {
                let style = Style::new().fg_color(Some(colour.into()));
                format!("{style}{text}{style:#}")
            }
            None => text.to_owned(),
        };
        if is_right { blanks + &text } else { text + &blanks }
    }

    /// True if it has nothing to say.
    fn is_empty(&self) -> bool {
        matches!(self.text.as_str(), "" | "-" | "0")
    }
}

/// A cell with text from outside.
pub(super) fn text(text: impl AsRef<str>) -> Cell {
    Cell { text: clean(text.as_ref()), colour: None }
}

/// A cell with a number.
pub(super) fn number(number: impl Into<u64>) -> Cell {
    Cell { text: grouped(number.into()), colour: None }
}

/// A cell with a state, in its colour.
pub(super) fn state(word: &str) -> Cell {
    Cell { text: word.to_owned(), colour: colour(word) }
}

// ---------------------------------------------------------------------------------------------------------------
// Tables

/// A table without borders.
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

/// Where the columns of a table are.
struct Layout {
    /// Those on the line of each row, with their widths.
    line: Vec<(usize, usize)>,
    /// Those below it.
    below: Vec<usize>,
}

impl Table {
    /// A table with these columns.
    pub(super) fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: columns.into_iter().collect(), rows: Vec::new() }
    }

    /// Adds a row, with a cell for each column.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines of the table; empty if it has no rows.
    pub(super) fn finish_unless_empty(&self, page: Page) -> String {
        if self.rows.is_empty() { String::new() } else { self.finish(page) }
    }

    /// The lines of the table; if it has no rows, the line `none`.
    pub(super) fn or(&self, none: &str, page: Page) -> String {
        if self.rows.is_empty() { format!("{none}\n") } else { self.finish(page) }
    }

    /// The lines of the table.
    pub(super) fn finish(&self, page: Page) -> String {
        let layout = self.layout(page);
        let headings: Vec<_> = self.columns.iter().map(|it| text(page.heading(it.heading))).collect();
        let mut lines = self.lines_of(&headings, &layout.line, page);
        for row in &self.rows {
            lines.extend(self.lines_of(row, &layout.line, page));
            lines.extend(self.lines_below(row, &layout.below, page));
        }
        lines.iter().flat_map(|line| [line.trim_end(), "\n"]).collect()
    }

    fn layout(&self, page: Page) -> Layout {
        /// Columns of text up to this wide are treated as short.
        const SHORT: usize = 24;
        let cells = |i: usize| self.rows.iter().filter_map(move |row| row.get(i)).map(|cell| cell.text.as_str());
        let natural = self.columns.iter().enumerate().map(|(i, column)| {
            let heading = measure_text_width(&page.heading(column.heading));
            cells(i).map(measure_text_width).max().unwrap_or(0).max(heading)
        });
        let natural: Vec<_> = natural.collect();
        let gaps = GAP * natural.len().saturating_sub(1);
        let whole: usize = natural.iter().sum::<usize>() + gaps;
        let all = || natural.iter().copied().enumerate().collect::<Vec<_>>();
        let Some(width) = page.width.filter(|width| whole > *width) else {
            return Layout { line: all(), below: Vec::new() };
        };
        let is_short = |i: usize| !self.columns[i].is_long || natural[i] <= SHORT;
        let widest = (0..natural.len()).filter(|i| !is_short(*i)).max_by_key(|i| natural[*i]);
        if let Some(widest) = widest {
            let room = (width + natural[widest]).saturating_sub(whole);
            let fits = |text| {
                let lines = wrap(text, room);
                lines.len() <= LINES && lines.iter().all(|line| measure_text_width(line) <= room)
            };
            if cells(widest).all(fits) {
                let mut line = all();
                line[widest].1 = room;
                return Layout { line, below: Vec::new() };
            }
        }
        let mut is_on_line = vec![false; natural.len()];
        let mut used = 0;
        let mut has_room = true;
        for is_minor in [false, true] {
            // Minor columns come once all others have found room.
            if is_minor && !has_room {
                break;
            }
            let columns = self.columns.iter().enumerate().filter(|(_, column)| column.is_minor == is_minor);
            for (i, _) in columns.filter(|(i, _)| is_short(*i)) {
                let gap = if i == 0 { 0 } else { GAP };
                // The first column names the row.
                is_on_line[i] = i == 0 || used + gap + natural[i] <= width;
                has_room &= is_on_line[i];
                used += if is_on_line[i] { gap + natural[i] } else { 0 };
            }
        }
        let (line, below) = all().into_iter().partition::<Vec<_>, _>(|(i, _)| is_on_line[*i]);
        let below = below.into_iter().map(|(i, _)| i).filter(|i| page.is_wide || !self.columns[*i].is_minor);
        Layout { line, below: below.collect() }
    }

    /// The cells of a row that are side by side.
    fn lines_of(&self, row: &[Cell], line: &[(usize, usize)], page: Page) -> Vec<String> {
        let wrapped: Vec<_> = line
            .iter()
            .filter_map(|&(i, width)| {
                let (column, cell) = (self.columns[i], row.get(i)?);
                let lines =
                    if column.is_long { column.wrapped(&cell.text, width, page) } else { vec![cell.text.clone()] };
                Some((column, cell, width, lines))
            })
            .collect();
        let height = wrapped.iter().map(|(.., lines)| lines.len()).max().unwrap_or(0);
        let blanks = " ".repeat(GAP);
        let line = |y: usize| {
            let cells = wrapped.iter().map(|(column, cell, width, lines)| {
                cell.line(lines.get(y).map_or("", String::as_str), *width, column.is_right, page)
            });
            cells.collect::<Vec<_>>().join(&blanks)
        };
        (0..height).map(line).collect()
    }

    /// The cells of a row that are below its line, with their headings: side by side those that fit in a line, and
    /// below them the longer ones, wrapped.
    fn lines_below(&self, row: &[Cell], below: &[usize], page: Page) -> Vec<String> {
        let Some(width) = page.width else { return Vec::new() };
        let cells = below.iter().filter_map(|&i| Some((self.columns[i], row.get(i)?)));
        let name = |column: &Column| page.heading(column.heading).to_lowercase();
        let needs = |column: &Column, cell: &Cell| {
            GAP + measure_text_width(&name(column)) + GAP + measure_text_width(&cell.text)
        };
        let (long, short): (Vec<_>, Vec<_>) =
            cells.filter(|(_, cell)| !cell.is_empty()).partition(|(column, cell)| needs(column, cell) > width);
        let blanks = " ".repeat(GAP);
        let mut lines: Vec<String> = Vec::new();
        let mut used = width;
        for (column, cell) in short {
            let (name, more) = (name(&column), needs(&column, cell));
            if used + more > width {
                lines.push(String::new());
                used = 0;
            }
            used += more;
            if let Some(line) = lines.last_mut() {
                line.extend([&*blanks, &*name, ": ", &*cell.line(&cell.text, 0, false, page)]);
            }
        }
        for (column, cell) in long {
            let room = width.saturating_sub(2 * GAP);
            let column = if column.is_long { column } else { column.whole() };
            let wrapped = column.wrapped(&format!("{}: {}", name(&column), cell.text), room, page);
            let indent = |i| blanks.repeat(if i == 0 { 1 } else { 2 });
            lines.extend(wrapped.into_iter().enumerate().map(|(i, line)| indent(i) + &line));
        }
        lines
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Facts

/// Names and values, a line each. Values are wrapped, and never cut.
#[derive(Default)]
pub(super) struct Facts(Vec<(String, Cell)>);

impl Facts {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Adds a fact, unless the value is empty.
    pub(super) fn fact(&mut self, what: &str, is: impl AsRef<str>) {
        if !is.as_ref().is_empty() {
            self.0.push((what.to_owned(), text(is)));
        }
    }

    /// Adds a fact that is a state.
    pub(super) fn state(&mut self, what: &str, is: &str) {
        self.0.push((what.to_owned(), state(is)));
    }

    /// The lines.
    pub(super) fn finish(&self, page: Page) -> String {
        let names = self.0.iter().map(|(what, _)| measure_text_width(what)).max().unwrap_or(0);
        let mut lines = String::new();
        for (what, is) in &self.0 {
            let values = match page.width {
                Some(width) => wrap(&is.text, width.saturating_sub(names + GAP)),
                None => vec![is.text.clone()],
            };
            for (i, value) in values.iter().enumerate() {
                let what = if i == 0 { what } else { "" };
                let line = format!("{what:names$}{:GAP$}{}", "", is.line(value, 0, false, page));
                lines += line.trim_end();
                lines.push('\n');
            }
        }
        lines
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Long text

impl Column {
    /// Text in lines of this width, cut after two of them unless it is shown whole.
    fn wrapped(self, text: &str, width: usize, page: Page) -> Vec<String> {
        if page.width.is_none() || measure_text_width(text) <= width {
            return vec![text.to_owned()];
        }
        let lines = wrap(text, width);
        if self.is_whole || page.is_wide { lines } else { cut(lines, width, page.ellipsis()) }
    }
}

/// Text in lines of this width, broken only between words, never between a number and its unit. A longer word has a
/// line of its own, which the terminal continues on the next one, so that it can be copied.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    // Blanks before a word stay: text may be aligned by them.
    for word in words(text) {
        let length = measure_text_width(word.trim_end());
        if used > 0 && used + length > width {
            lines.push(String::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            *line += &word;
            used += measure_text_width(&word);
        }
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

/// The words of a text, with the blanks behind them. A number and its unit are one word.
fn words(text: &str) -> Vec<String> {
    const UNITS: [&str; 4] = ["%", "ms", "pp", "s"];
    let mut words: Vec<String> = Vec::new();
    for word in text.split_inclusive(' ') {
        let is_unit = UNITS.contains(&word.trim_end_matches([' ', ',']));
        let is_number = |before: &&mut String| before.trim_end().ends_with(|end: char| end.is_ascii_digit());
        match words.last_mut().filter(|before| is_unit && is_number(before)) {
            Some(number) => *number += word,
            None => words.push(word.to_owned()),
        }
    }
    words
}

/// The lines up to where they fill two lines of a terminal of this width, with an ellipsis if that is not all.
fn cut(mut lines: Vec<String>, width: usize, ellipsis: &str) -> Vec<String> {
    let height = |line: &str| measure_text_width(line).div_ceil(width.max(1)).max(1);
    let mut room = LINES;
    let fits = |line: &&String| {
        let fits = height(line) <= room;
        room = room.saturating_sub(height(line));
        fits
    };
    let kept = lines.iter().take_while(fits).count();
    if kept == lines.len() {
        return lines;
    }
    let taken: usize = lines[..kept].iter().map(|line| height(line)).sum();
    let left = LINES - taken;
    // If lines are left, the next word is longer than they are.
    lines.truncate(if left > 0 { kept + 1 } else { kept });
    if let Some(last) = lines.last_mut() {
        let room = width * if left > 0 { left } else { height(last) };
        let end = format!(" {ellipsis}");
        while measure_text_width(last) + measure_text_width(&end) > room {
            let Some((before, _)) = last.rsplit_once(' ') else {
                // Only a word that fills its line is cut inside.
                let shorter = truncate_str(last, room.saturating_sub(measure_text_width(ellipsis)), "");
                *last = shorter.into_owned() + ellipsis;
                return lines;
            };
            *last = before.trim_end().to_owned();
        }
        *last += &end;
    }
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]
pub(super) mod tests {
    use std::{fs, path::Path};

    use super::*;

    const PAGE: Page = Page { width: None, is_wide: false, has_colours: false, has_unicode: true };

    /// Checks what is shown at 40, 80 and 120 columns against the file of this name in `src/cli/screens`. With
    /// `ORCHESTRATOR_TEST_UPDATE` in the environment, the file is written instead: look at its changes.
    #[track_caller]
    pub(in super::super) fn assert_screens(name: &str, show: impl Fn(Page) -> String) {
        let mut screens = String::new();
        for width in [40, 80, 120] {
            let shown = show(Page { width: Some(width), ..PAGE });
            for line in shown.lines().filter(|line| measure_text_width(line) > width) {
                // The names of facts take up to 17 columns.
                let longest_word = line.split(' ').map(measure_text_width).max().unwrap();
                assert!(longest_word > width - 17, "{name} at {width}: {line}");
            }
            let ruler = format!("{:=<width$}", format!("= {width} columns "));
            screens.extend([&*ruler, "\n", &*shown]);
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/cli/screens/{name}.txt"));
        if env::var_os("ORCHESTRATOR_TEST_UPDATE").is_some() {
            fs::write(&path, &screens).unwrap();
        }
        assert_eq!(screens, fs::read_to_string(&path).unwrap(), "{name}");
    }

    fn table() -> Table {
        let mut table = Table::new([left("NAME"), right("±COUNT").minor(), left("STATE"), long("REASON")]);
        table.row([
            text("alpha"),
            number(1_u64),
            state("FAILED"),
            text("one two three four five six seven eight nine"),
        ]);
        table.row([text("beta"), number(22_u64), state("SUCCEEDED"), text("")]);
        table
    }

    #[test]
    fn a_row_is_one_line_where_lines_can_have_any_length() {
        let expected = "\
NAME   ±COUNT  STATE      REASON
alpha       1  FAILED     one two three four five six seven eight nine
beta       22  SUCCEEDED
";
        assert_eq!(table().finish(PAGE), expected);
        assert_eq!(table().finish(Page { width: Some(70), ..PAGE }), expected, "nor where they fit");
        let ascii = table().finish(Page { has_unicode: false, ..PAGE });
        assert!(ascii.starts_with("NAME   +/-COUNT  STATE"), "{ascii}");
    }

    #[test]
    fn long_text_is_wrapped_in_its_column_or_below_the_row() {
        let shown = |width| table().finish(Page { width: Some(width), ..PAGE });
        let wrapped = "\
NAME   ±COUNT  STATE      REASON
alpha       1  FAILED     one two three four five six
                          seven eight nine
beta       22  SUCCEEDED
";
        assert_eq!(shown(56), wrapped);
        let below = "\
NAME   ±COUNT  STATE
alpha       1  FAILED
  reason: one two three
    four five six seven …
beta       22  SUCCEEDED
";
        assert_eq!(shown(27), below);
        assert!(!shown(16).contains("COUNT"), "a minor column is left out");
        let all = table().finish(Page { width: Some(16), is_wide: true, ..PAGE });
        assert!(all.contains("  ±count: 1\n") && all.contains("nine\n") && !all.contains('…'), "{all}");
    }

    #[test]
    fn a_word_is_never_broken() {
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("a http://example.org:50051 b", 10), ["a", "http://example.org:50051", "b"]);
        assert_eq!(wrap("", 8), [""]);
        assert_eq!(wrap("p50 12.5 ms, p95 0 %", 12), ["p50 12.5 ms,", "p95 0 %"]);
        assert_eq!(wrap("p50 12.5 ms, p95 0 %", 10), ["p50", "12.5 ms,", "p95 0 %"], "nor a number from its unit");
        assert_eq!(wrap("the letter s", 11), ["the letter", "s"]);
        let cut = |text: &str| cut(wrap(text, 8), 8, "…");
        assert_eq!(cut("one two three"), ["one two", "three"]);
        assert_eq!(cut("one two three four"), ["one two", "three …"]);
        assert_eq!(cut("one two threefour five"), ["one two", "threefo…"], "unless it fills the last line");
        assert_eq!(cut("twelveletters-and-more"), ["twelveletters-a…"]);
        assert_eq!(cut("你好你好 你好你好 你好"), ["你好你好", "你好你…"], "wide characters take two columns");
    }

    #[test]
    fn values_of_facts_are_wrapped_beside_their_names() {
        let mut facts = Facts::new();
        facts.fact("error", "one two three four");
        facts.fact("nothing", "");
        facts.state("state", "FAILED");
        assert_eq!(
            facts.finish(Page { width: Some(18), ..PAGE }),
            "error  one two\n       three four\nstate  FAILED\n"
        );
        assert_eq!(facts.finish(PAGE), "error  one two three four\nstate  FAILED\n");
        let coloured = facts.finish(Page { has_colours: true, ..PAGE });
        assert!(coloured.ends_with("state  \u{1b}[31mFAILED\u{1b}[0m\n"), "{coloured:?}");
    }
}
