//! Lines, tables and text that fit into their area.

use std::borrow::Cow;

use ratatui::{
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::Modifier,
    text::{Line, Span},
};

use super::super::table::wrap;

/// Draws as many of these lines as fit, each cut at the end of the area.
pub(super) fn put_lines<'a>(buffer: &mut Buffer, area: Rect, lines: impl IntoIterator<Item = Line<'a>>) {
    for (row, line) in area.rows().zip(lines) {
        let is_cut = line.width() > usize::from(row.width);
        buffer.set_line(row.x, row.y, &line, row.width);
        if is_cut && row.width > 0 {
            buffer.set_string(row.right() - 1, row.y, "…", line.style);
        }
    }
}

/// A column of a table.
pub(super) struct Col {
    heading: String,
    width: Constraint,
    is_right: bool,
}

impl Col {
    /// A column of text.
    pub(super) fn left(heading: &str, width: u16) -> Self {
        Self { heading: heading.to_owned(), width: Constraint::Length(width), is_right: false }
    }

    /// A column of numbers.
    pub(super) fn right(heading: &str, width: u16) -> Self {
        Self { is_right: true, ..Self::left(heading, width) }
    }

    /// The column takes the remaining width.
    pub(super) fn rest(heading: &str) -> Self {
        Self { width: Constraint::Fill(1), ..Self::left(heading, 0) }
    }

    /// Marks the column that the table is sorted by with an arrow.
    pub(super) fn sorted(self, arrow: &str) -> Self {
        Self { heading: format!("{}{arrow}", self.heading), ..self }
    }
}

/// Draws a table: its headings, and as many rows as fit, each with true if it is selected. Longer cells are cut.
pub(super) fn table_of<'a>(
    buffer: &mut Buffer,
    area: Rect,
    columns: &[Col],
    rows: impl Iterator<Item = (bool, Vec<Span<'a>>)>,
) {
    let layout = Layout::horizontal(columns.iter().map(|column| column.width)).spacing(1);
    let places = layout.split(Rect { height: area.height.min(1), ..area });
    let headings = columns.iter().map(|column| bold(column.heading.clone())).collect();
    for (line, (is_selected, cells)) in area.rows().zip(std::iter::once((false, headings)).chain(rows)) {
        for ((cell, column), place) in cells.iter().zip(columns).zip(places.iter()) {
            let text = cut(&cell.content, usize::from(place.width));
            let gap = if column.is_right { place.width.saturating_sub(as_u16(Span::raw(&text).width())) } else { 0 };
            buffer.set_string(place.x + gap, line.y, text, cell.style);
        }
        if is_selected {
            buffer.set_style(line, Modifier::REVERSED);
        }
    }
}

/// Text cut to this width.
pub(super) fn cut(text: &str, width: usize) -> String {
    if Span::raw(text).width() <= width {
        return text.to_owned();
    }
    let mut shorter: String = text.chars().take(width).collect();
    while Span::raw(format!("{shorter}…")).width() > width && shorter.pop().is_some() {}
    shorter.push('…');
    shorter
}

/// Text wrapped to this width, between words if possible.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for mut line in wrap(text, width.max(1)) {
        // A word longer than a line, since this screen ends there.
        while Span::raw(&line).width() > width.max(1) {
            let mut first: String = line.chars().take(width.max(1)).collect();
            while Span::raw(&first).width() > width.max(1) && first.chars().count() > 1 {
                first.pop();
            }
            let rest = line.split_off(first.len());
            lines.push(line);
            line = rest;
        }
        lines.push(line);
    }
    lines
}

/// Replaces what a terminal without UTF-8 can't show.
pub(super) fn to_ascii(buffer: &mut Buffer) {
    for cell in &mut buffer.content {
        if !cell.symbol().is_ascii() {
            cell.set_symbol(match cell.symbol() {
                "─" | "▁" => "-",
                "▂" | "▃" | "·" => ".",
                "▄" | "▅" | "▪" => ":",
                "▆" | "▇" | "█" => "|",
                "■" => "#",
                "▸" | "→" => ">",
                "←" => "<",
                "▲" | "↑" => "^",
                "▼" | "↓" => "v",
                "✓" => "+",
                "✗" => "x",
                "…" => "~",
                _ => "?",
            });
        }
    }
}

/// Bold text.
pub(super) fn bold<'a>(text: impl Into<Cow<'a, str>>) -> Span<'a> {
    Span::styled(text, Modifier::BOLD)
}

/// Converts to a coordinate; no terminal is larger than `u16::MAX`.
pub(super) fn as_u16(number: usize) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_broken_between_words() {
        assert_eq!(wrapped("one two three", 8), ["one two", "three"]);
        assert_eq!(wrapped("abcdefgh", 3), ["abc", "def", "gh"]);
        assert_eq!(cut("abcdef", 4), "abc…");
    }
}
