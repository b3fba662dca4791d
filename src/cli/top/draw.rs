//! Draws the model on a terminal, only the lines that fit.

use std::{borrow::Cow, fmt::Write as _, ops::Range, time::Duration};

use clap::builder::styling::AnsiColor;
use jiff::Timestamp;
use ratatui::{
    Frame,
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Widget},
};

use super::{
    super::loops::no_ticks,
    super::output::{
        clean, coarse, colour, count, duration, grouped, milliseconds, missing, short, subsystem_state, timestamp,
        trigger, waits_for, word,
    },
    detail::{self, Entry},
    model::{Column, Counts, Cycle, Live, Model, Row, Stand, Subject, UNREADABLE},
    pieces::{Col, as_u16, bold, cut, put_lines, table_of, to_ascii, wrapped},
    view::{Detail, Mode, Pane, View},
};
use crate::proto::{self, orchestrator::v1 as pb};

/// Smallest useful size.
const SMALLEST: (u16, u16) = (40, 10);

/// Options of the drawing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// The time from which ages are computed.
    pub(super) now: Timestamp,
    pub(super) colours: bool,
    /// True if the terminal shows more than ASCII.
    pub(super) unicode: bool,
}

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, view: &mut View, look: Look) {
    let area = frame.area();
    let buffer = frame.buffer_mut();
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        let needs = format!("too small: {} x {} needed", SMALLEST.0, SMALLEST.1);
        put_lines(buffer, area, [Line::from(needs), Line::from("q quits")]);
        return;
    }
    let mut header = look.header(model, area.width);
    header.truncate(usize::from(area.height / 3));
    let [top, rest, bottom] = area.layout(&Layout::vertical([
        Constraint::Length(as_u16(header.len())),
        Constraint::Min(1),
        Constraint::Length(1),
    ]));
    put_lines(buffer, top, header);
    match (&mut view.mode, view.pane) {
        (Mode::Help, _) => help(buffer, rest, &mut view.top, &mut view.page),
        (Mode::Detail(detail), _) => look.detail(buffer, rest, model, detail, &mut view.top, &mut view.page),
        (_, Pane::Fleet) => look.overview(buffer, rest, model, view),
        (_, Pane::Cycles) => look.cycles(buffer, rest, model, view),
        (_, Pane::Loops) => look.loops(buffer, rest, model, view),
    }
    if model.lost.is_some() {
        // Everything except the line about the lost connection is old.
        let was = Rect { y: area.y + 1, height: rest.bottom() - area.y - 1, ..area };
        buffer.set_style(was, Style::new().add_modifier(Modifier::DIM));
    }
    put_lines(buffer, bottom, [footer(view)]);
    if !look.unicode {
        to_ascii(buffer);
    }
}

impl Look {
    // -----------------------------------------------------------------------------------------------------------
    // Above and below

    fn header(self, model: &Model, width: u16) -> Vec<Line<'static>> {
        let status = model.status.as_ref();
        let name = status.map_or_else(|| "orchestrator".to_owned(), |status| clean(&status.orchestrator_id));
        let link = match (&model.lost, &model.unanswered) {
            (Some((why, since)), _) => self.loud(format!("{} ({})", clean(why), self.ago(Some(*since)))),
            (None, Some(why)) => self.loud(clean(why)),
            (None, None) if status.is_none() => Span::raw("connecting"),
            (None, None) => self.state("SUCCEEDED", "connected"),
        };
        let mut first = Line::from(vec![bold(name), Span::raw(format!("  {}  ", model.address)), link]);
        if first.width() > usize::from(width) {
            // The address matters less than the state of the connection.
            first.spans[1] = Span::raw("  ");
        }
        let Some(status) = status else { return vec![first] };
        let uptime = status.uptime.and_then(proto::read_duration).unwrap_or_default();
        let process =
            format!("up {}  epoch {}  version {}", short(coarse(uptime)), status.epoch, clean(&status.version));
        let left = usize::from(width).saturating_sub(first.width());
        // Facts that don't fit are left out, starting from the end.
        let ends = process.match_indices("  ").map(|(end, _)| end).chain([process.len()]);
        if let Some(end) = ends.filter(|end| *end + 2 <= left).last() {
            first.push_span(format!("{:>left$}", &process[..end]));
        }
        let (mut failing, mut suspended, mut open) = (0, 0, 0);
        for row in model.fleet() {
            failing += u64::from(row.is_failing());
            suspended += u64::from(row.registered.suspended);
            open += u64::from(row.registered.breaker == "OPEN");
        }
        let facts = [
            ("cycles", model.total_cycles(), ""),
            ("queue", status.queued_cycles.into(), ""),
            ("subsystems", status.subsystem_count.into(), ""),
            ("failing", failing, "FAILED"),
            ("breakers open", open, "OPEN"),
            ("suspended", suspended, "SUSPENDED"),
            ("watchers", status.watchers.into(), ""),
        ];
        let mut second = Line::default();
        for (what, number, state) in facts {
            // Rare facts are shown only if they apply.
            if number == 0 && matches!(state, "OPEN" | "SUSPENDED") {
                continue;
            }
            let style = if number > 0 { self.style(state) } else { Style::new() };
            second.push_span(format!("{what} "));
            second.push_span(Span::styled(grouped(number), style.add_modifier(Modifier::BOLD)));
            second.push_span("  ");
        }
        if let Some(who) = &model.who {
            second.push_span("access ");
            second.push_span(bold(word(who.mode().as_str_name(), "ACCESS_MODE_").to_lowercase()));
            // In the mode `off`, callers are not told apart.
            if who.mode() != pb::AccessMode::Off {
                second.push_span(format!(" {}", clean(&who.identity)));
            }
        }
        let mut header = vec![first, second];
        if !status.store_error.is_empty() {
            let error = clean(&status.store_error);
            header.push(self.loud(format!("STORE ERROR: {error}; no cycle starts until it can be written")).into());
        }
        if status.read_only {
            header.push(
                self.loud("READ ONLY: it looks at a copy: no cycle runs, and nothing can be changed".into()).into(),
            );
        }
        if status.loops_paused {
            let why = "no loop starts a cycle until `orchestrator loops resume --all`";
            header.push(self.loud(format!("PAUSED: {why}")).into());
        }
        if status.missing_count > 0 {
            header.push(self.loud(format!("MISSING: {}", clean(&missing(status)))).into());
        }
        if !status.unable_to_lead.is_empty() {
            let replica = status.replica.as_ref().map_or_else(|| "this replica".into(), |it| clean(&it.name));
            header.push(self.loud(format!("CAN'T LEAD: {replica}: {}", clean(&status.unable_to_lead))).into());
        }
        if status.insecure {
            let why = "other machines may need no right: access.mode is not enforce";
            header.push(self.loud(format!("INSECURE: {why}")).into());
        }
        header
    }

    // ----------------------------------------------------------------------------------------------------------- The
    // fleet and its surroundings

    fn overview(self, buffer: &mut Buffer, area: Rect, model: &Model, view: &mut View) {
        /// Smallest width at which the loops are beside the history.
        const WIDE: u16 = 110;
        let loops = model.status.as_ref().map_or(0, |status| status.loops.len());
        let (cycles, bars, loops) = match area.height {
            ..11 => (0, 0, 0),
            11..18 => (2, 0, 0),
            18..28 => (3, 2, loops.min(2)),
            28..38 => (5, 4, loops.min(4)),
            _ => (8, 6, loops.min(6)),
        };
        // A title and two lines, and one for each further concurrent cycle: the rows below don't move when cycles start
        // and end.
        let cycles = if cycles == 0 { 0 } else { as_u16(model.most_live.clamp(2, cycles)) + 1 };
        // A title, the bars, and a line of marks.
        let history = if bars == 0 { 0 } else { bars + 2 };
        let loops = if bars == 0 { 0 } else { as_u16(loops.max(1)) + 1 };
        let rows = if area.width >= WIDE { [history, 0] } else { [history, loops] };
        let [cycles, history, loops, fleet] = area.layout(&Layout::vertical([
            Constraint::Length(cycles),
            Constraint::Length(rows[0]),
            Constraint::Length(rows[1]),
            Constraint::Min(3),
        ]));
        let [history, loops] = if area.width >= WIDE {
            history.layout(&Layout::horizontal([Constraint::Fill(1), Constraint::Length(52)]).spacing(2))
        } else {
            [history, loops]
        };
        self.running_cycles(buffer, cycles, model);
        self.history(buffer, history, model);
        self.loops_in_short(buffer, loops, model);
        self.fleet(buffer, fleet, model, view);
    }

    fn running_cycles(self, buffer: &mut Buffer, area: Rect, model: &Model) {
        if area.is_empty() {
            return;
        }
        let mut live = model.live.values();
        match (live.next(), model.most_live) {
            (None, _) => self.last_cycle(buffer, area, model),
            (Some(only), 1) => self.running_cycle(buffer, area, only, model),
            (Some(_), _) => self.side_by_side(buffer, area, model),
        }
    }

    fn last_cycle(self, buffer: &mut Buffer, area: Rect, model: &Model) {
        let inner = titled(buffer, area, " no cycle runs ", "");
        let Some((_, last)) = model.cycles.last_key_value() else { return };
        let when = self.ago(last.finished_at);
        let took = milliseconds(last.duration_ms);
        let said = match last.state {
            UNREADABLE => String::new(),
            _ if !last.has_result() => format!(", found {when} ago, {}, its parts are not known", last.trigger),
            _ => format!(" in {took}, {when} ago, {}, {} succeeded", last.trigger, last.succeeded),
        };
        let last_one =
            vec![format!("last: cycle {} ", last.number()).into(), self.state(last.state, last.state), said.into()];
        put_lines(buffer, inner, [last_one.into(), Line::from(last.error.clone())]);
    }

    /// The only running cycle.
    fn running_cycle(self, buffer: &mut Buffer, area: Rect, live: &Live, model: &Model) {
        let heard = self.as_heard(model);
        let counts = live.counts();
        let inner = titled(buffer, area, format!(" {} ", heard.progress(live)), "");
        let mut text = Line::default();
        if counts.failed > 0 {
            text.push_span(self.state("FAILED", format!("{} failed  ", grouped(counts.failed as u64))));
        }
        text.push_span(format!(
            "{} waiting  {} running",
            grouped(counts.waiting as u64),
            grouped(counts.running as u64)
        ));
        for (i, stand) in live.running().into_iter().enumerate() {
            if text.width() >= usize::from(area.width) {
                break;
            }
            let gap = if i == 0 { ": " } else { ", " };
            text.push_span(format!("{gap}{}{}", clean(&stand.name), heard.called_for(live, stand)));
        }
        put_lines(buffer, inner, [self.strip(live, usize::from(area.width)), text]);
    }

    /// The running cycles, the oldest first, one line each.
    fn side_by_side(self, buffer: &mut Buffer, area: Rect, model: &Model) {
        /// Fewest columns that are reserved for the strips if they need them.
        const STRIP: usize = 20;
        let heard = self.as_heard(model);
        let shown = usize::from(area.height.saturating_sub(1));
        let more = model.live.len().saturating_sub(shown);
        let right = if more > 0 { format!(" and {more} more: Tab ") } else { String::new() };
        let title = format!(" {} running ", count(model.live.len() as u64, "cycle"));
        let inner = titled(buffer, area, title, right);
        let shown: Vec<_> = model.live.values().take(shown).map(|live| (live, heard.progress(live))).collect();
        // The strips are aligned.
        let longest = shown.iter().map(|(_, progress)| Span::raw(progress).width()).max().unwrap_or(0);
        let strip = shown.iter().map(|(live, _)| live.stands.len()).max().unwrap_or(0).min(STRIP);
        let left = longest.min(usize::from(area.width).saturating_sub(strip + 2));
        let lines = shown.into_iter().map(|(live, progress)| {
            let progress = cut(&progress, left);
            let gap = left - Span::raw(&progress).width() + 2;
            let mut line = Line::from(format!("{progress}{:gap$}", ""));
            line.extend(self.strip(live, usize::from(area.width).saturating_sub(left + 2)));
            line
        });
        put_lines(buffer, inner, lines);
    }

    /// The title of a running cycle, with its progress.
    fn progress(self, live: &Live) -> String {
        format!(
            "cycle {}, {}: {} of {} ended, {}",
            live.cycle_id,
            live.trigger,
            grouped(live.counts().ended() as u64),
            grouped(live.stands.len() as u64),
            self.running_for(live, 0.0),
        )
    }

    /// As of the last message of the service: later progress is unknown.
    fn as_heard(self, model: &Model) -> Self {
        Self { now: model.lost.as_ref().map_or(self.now, |(_, since)| *since), ..self }
    }

    /// Time since this moment of a running cycle, to the tenth of a second.
    fn running_for(self, live: &Live, since_ms: f64) -> String {
        let running = live.started_at.map_or(0.0, |at| self.now.duration_since(at).as_millis_f64());
        milliseconds(((running - since_ms) / 100.0).floor().max(0.0) * 100.0)
    }

    /// Time since the start of a part, if its start was received.
    fn called_for(self, live: &Live, stand: &Stand) -> String {
        stand.began_ms.map_or_else(String::new, |began_ms| format!(" {}", self.running_for(live, began_ms)))
    }

    /// The state of every subsystem of the cycle, in the order of the plan. With more subsystems than columns, each
    /// column stands for several, and shows the worst state.
    fn strip(self, live: &Live, width: usize) -> Line<'static> {
        let all = live.stands.len();
        let columns = all.min(width);
        let marks = (0..columns).map(|i| {
            let counts = live.counts_of(part_of(all, columns, i));
            let Counts { waiting, running, succeeded, failed, other } = counts;
            match (failed, running, waiting) {
                (1.., _, _) => self.state("FAILED", "✗"),
                (0, 1.., _) => bold("▸"),
                (0, 0, 0) if succeeded == 0 && other > 0 => self.state("SKIPPED", "-"),
                (0, 0, 0) => self.state("SUCCEEDED", "■"),
                (0, 0, 1..) if counts.ended() > 0 => Span::raw("▪"),
                (0, 0, 1..) => Span::raw("·"),
            }
        });
        marks.collect::<Vec<_>>().into()
    }

    fn history(self, buffer: &mut Buffer, area: Rect, model: &Model) {
        const EIGHTHS: [&str; 9] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
        if area.is_empty() {
            return;
        }
        let mut shown: Vec<_> = model.cycles.values().rev().take(usize::from(area.width)).collect();
        shown.reverse();
        let mut durations: Vec<_> =
            shown.iter().filter(|cycle| cycle.has_result()).map(|cycle| cycle.duration_ms).collect();
        durations.sort_by(f64::total_cmp);
        let longest = durations.last().copied().unwrap_or(0.0);
        let right = match durations.get(durations.len() / 2) {
            Some(median) => format!(" median {}, longest {} ", milliseconds(*median), milliseconds(longest)),
            None => String::new(),
        };
        let title = format!(" history: {} ", count(shown.len() as u64, "cycle"));
        let inner = titled(buffer, area, title, right);
        let lines = inner.height.saturating_sub(1);
        for (x, cycle) in (inner.x..).zip(shown) {
            let share = if cycle.has_result() && longest > 0.0 { cycle.duration_ms / longest } else { 0.0 };
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "at most eight times the lines of a terminal"
            )]
            let eighths = ((share * f64::from(lines) * 8.0).round() as usize).max(1);
            for line in 0..lines {
                let filled = eighths.saturating_sub(usize::from(line) * 8).min(8);
                buffer.set_string(x, inner.y + lines - 1 - line, EIGHTHS[filled], self.style(cycle.state));
            }
            // The states differ also without colours: D is DEGRADED, F is FAILED, C is CANCELLED, I is INTERRUPTED,
            // U is UNREADABLE.
            let mark = if cycle.state == "SUCCEEDED" { " " } else { &cycle.state[..1] };
            buffer.set_string(x, inner.y + lines, mark, self.style(cycle.state));
        }
    }

    fn loops_in_short(self, buffer: &mut Buffer, area: Rect, model: &Model) {
        if area.is_empty() {
            return;
        }
        let loops = model.status.as_ref().map(|status| &status.loops[..]).unwrap_or_default();
        let inner = titled(buffer, area, format!(" {} ", count(loops.len() as u64, "loop")), "");
        let shown = usize::from(inner.height);
        let lines = loops.iter().take(shown).map(|status| {
            let settings = status.r#loop.clone().unwrap_or_default();
            let ticks = status.ticks.unwrap_or_default();
            let mut text = format!(
                "  every {}, {}{}: {} ran",
                duration(settings.interval.as_ref()),
                if no_ticks(status).is_some() { "" } else { "next " },
                self.next_tick(status),
                grouped(ticks.ran)
            );
            for (ended, ticks) in [
                ("skipped", ticks.skipped),
                ("missed", ticks.missed),
                ("coalesced", ticks.coalesced),
                ("dropped", ticks.dropped),
            ] {
                if ticks > 0 {
                    let _ = write!(text, ", {} {ended}", grouped(ticks));
                }
            }
            Line::from(vec![bold(clean(&settings.name)), text.into()])
        });
        put_lines(buffer, inner, lines);
        if loops.len() > shown {
            let more = format!(" and {} more: Tab ", loops.len() - shown);
            let x = area.right().saturating_sub(as_u16(more.len()));
            buffer.set_stringn(x, area.y, &more, more.len(), Style::new());
        }
    }

    fn next_tick(self, status: &pb::IntervalLoopStatus) -> String {
        if let Some(why) = no_ticks(status) {
            return why.to_owned();
        }
        let Some(due) = status.next_due_at.as_ref().and_then(timestamp) else { return "-".to_owned() };
        let left = due.duration_since(self.now);
        // The lease lasts at least as long as shown.
        let left = coarse(left.unsigned_abs().saturating_add(Duration::from_millis(999)));
        if due > self.now { format!("in {}", short(left)) } else { "due".to_owned() }
    }

    fn fleet(self, buffer: &mut Buffer, area: Rect, model: &Model, view: &mut View) {
        let rows = model.rows(&view.filter, view.sort, view.reversed);
        let selected = view.position(rows.iter().map(|row| row.name));
        // The selected row is visible.
        view.reveal(selected, area.height.saturating_sub(2));
        let shown = view.fit(rows.len(), area.height.saturating_sub(2));

        let found = match (view.filter.is_empty(), model.is_loaded) {
            (_, false) => format!(" fleet: reading, {} so far ", grouped(rows.len() as u64)),
            (true, true) => format!(" fleet: {} ", count(rows.len() as u64, "subsystem")),
            (false, true) => {
                let of = model.fleet().count() as u64;
                format!(" fleet: {} of {} with {:?} ", grouped(rows.len() as u64), grouped(of), clean(&view.filter))
            }
        };
        let arrow = if view.reversed == view.sort.is_text() { "▼" } else { "▲" };
        let range = if rows.is_empty() { String::new() } else { format!("{} to {}, ", shown.start + 1, shown.end) };
        let inner = titled(buffer, area, found, format!(" {range}by {} {arrow} ", view.sort.name()));

        let longest = model.fleet().map(|row| row.name.len()).max().unwrap_or(0);
        let name = as_u16(longest).clamp(10, (area.width / 4).max(10));
        let columns: Vec<_> = fleet_columns(area.width).collect();
        let mut table = vec![Col::left("", 1)];
        table.extend(columns.iter().map(|column| {
            let heading = column.name();
            let col = match column {
                Column::Subsystem => Col::left(heading, name),
                Column::Last => Col::left(heading, 12),
                Column::Duration | Column::Attempts => Col::right(heading, 9),
                Column::Breaker => Col::left(heading, 9),
                Column::Output => Col::left(heading, 16),
                Column::Reason => Col::rest(heading),
            };
            if *column == view.sort { col.sorted(arrow) } else { col }
        }));
        let shown_rows = rows[shown.clone()].iter().enumerate().map(|(i, row)| {
            let cells = columns.iter().map(|column| self.cell(row, *column, model));
            (shown.start + i == selected, std::iter::once(self.mark(row)).chain(cells).collect())
        });
        table_of(buffer, inner, &table, shown_rows);
        if rows.is_empty() && model.is_loaded {
            let none = if view.filter.is_empty() { "no subsystems are registered" } else { "no subsystem matches" };
            put_lines(buffer, Rect { y: inner.y + 1, height: 1, ..inner }, [Line::from(none)]);
        }
    }

    /// The mark for its state in its running cycle.
    fn mark(self, row: &Row<'_>) -> Span<'static> {
        match row.live.map(|(_, stand)| stand.state) {
            None => Span::raw(" "),
            Some(pb::SubsystemState::Waiting | pb::SubsystemState::Unspecified) => Span::raw("·"),
            Some(pb::SubsystemState::Running) => bold("▸"),
            Some(pb::SubsystemState::Succeeded) => self.state("SUCCEEDED", "✓"),
            Some(pb::SubsystemState::Skipped | pb::SubsystemState::Cancelled) => self.state("SKIPPED", "-"),
            Some(_) => self.state("FAILED", "✗"),
        }
    }

    fn cell(self, row: &Row<'_>, column: Column, model: &Model) -> Span<'static> {
        match column {
            Column::Subsystem => Span::raw(clean(row.name)),
            Column::Last => self.state(if row.is_failing() { "FAILED" } else { row.last() }, row.last()),
            Column::Duration => match row.part.and_then(|part| part.duration_ms) {
                Some(duration_ms) => Span::raw(milliseconds(duration_ms)),
                None => Span::raw("-"),
            },
            Column::Attempts => match row.part.map_or(0, |part| part.attempts) {
                0 => Span::raw("-"),
                attempts => Span::raw(attempts.to_string()),
            },
            Column::Breaker => self.state(row.registered.breaker, row.registered.breaker),
            Column::Output => {
                let is_current = row.freshness() == "FRESH";
                Span::styled(self.output(row), self.style(if is_current { "" } else { "SKIPPED" }))
            }
            Column::Reason => Span::raw(self.note(row, model)),
        }
    }

    /// The freshness of its latest output, its age, and the cycle that made it.
    fn output(self, row: &Row<'_>) -> String {
        let freshness = row.freshness();
        let Some(output) = row.output else { return freshness.to_owned() };
        let age = output.made_at.map_or_else(String::new, |at| format!(" {}", self.ago(Some(at))));
        format!("{freshness}{age} #{}", output.cycle_id)
    }

    /// Further remarks on it.
    fn note(self, row: &Row<'_>, model: &Model) -> String {
        let mut notes = Vec::new();
        if let Some((live, stand)) = row.live
            && stand.state == pb::SubsystemState::Running
        {
            notes.push(format!("running{}", self.as_heard(model).called_for(live, stand)));
        }
        if row.registered.suspended && row.reason() != "suspended" {
            notes.push("suspended".to_owned());
        }
        if let Some(ends) = row.registered.lease_expires_at {
            let left = ends.duration_since(self.now);
            let left = if left.is_positive() { short(coarse(left.unsigned_abs())) } else { "over".to_owned() };
            notes.push(format!("lease {left}"));
        }
        if !row.reason().is_empty() {
            notes.push(row.reason().to_owned());
        }
        notes.join("; ")
    }

    // -----------------------------------------------------------------------------------------------------------
    // The other panes

    fn cycles(self, buffer: &mut Buffer, area: Rect, model: &Model, view: &mut View) {
        /// The position of that column.
        const SUCCEEDED: usize = 4;
        let waiting = model.waiting();
        let listed = model.listed();
        let selected = view.position_of_cycle(&listed);
        let room = area.height.saturating_sub(2);
        view.reveal(selected, room);
        let range = view.fit(listed.len(), room);
        let running = if model.live.is_empty() { String::new() } else { format!("{} running, ", model.live.len()) };
        let queued = if waiting.is_empty() { String::new() } else { format!("{} waiting, ", waiting.len()) };
        let title =
            format!(" cycles: {running}{queued}{} recorded, the latest first ", grouped(model.cycles.len() as u64));
        let inner = titled(buffer, area, title, of_all(&range));
        let is_wide = area.width >= 100;
        let longest = |text: fn(&Cycle) -> &str| model.cycles.values().map(|it| text(it).len()).max().unwrap_or(0);
        let mut columns = vec![
            Col::left("STATE", 11),
            Col::right("CYCLE", 7),
            Col::right("FINISHED", 8),
            Col::right("DURATION", 8),
            Col::right("SUCCEEDED", as_u16(longest(|cycle| &cycle.succeeded)).max(9)),
            Col::left("TRIGGER", as_u16(longest(|cycle| &cycle.trigger)).clamp(7, if is_wide { 30 } else { 14 })),
            Col::rest("ERROR"),
        ];
        let running = model.live.values().rev().map(|live| self.running_row(live, model));
        let recorded = model.cycles.values().rev().map(|cycle| self.recorded_row(cycle));
        let waiting = waiting.into_iter().rev().map(|waiting| self.waiting_row(waiting));
        let rows = running.chain(waiting).chain(recorded).enumerate().skip(range.start).take(range.len());
        let rows = rows.map(|(i, mut cells)| {
            if !is_wide {
                // The error contains it as well.
                cells.remove(SUCCEEDED);
            }
            (i == selected, cells)
        });
        if !is_wide {
            columns.remove(SUCCEEDED);
        }
        table_of(buffer, inner, &columns, rows);
    }

    fn running_row<'a>(self, live: &'a Live, model: &Model) -> Vec<Span<'a>> {
        let counts = live.counts();
        let failed = if counts.failed == 0 { String::new() } else { format!("{} failed so far", counts.failed) };
        vec![
            bold("RUNNING"),
            Span::raw(live.cycle_id.to_string()),
            Span::raw("-"),
            Span::raw(self.as_heard(model).running_for(live, 0.0)),
            Span::raw(format!("{}/{}", counts.succeeded, live.stands.len())),
            Span::raw(live.trigger.as_str()),
            self.state("FAILED", failed),
        ]
    }

    fn waiting_row(self, waiting: &pb::WaitingCycle) -> Vec<Span<'static>> {
        let since = waiting.scheduled_at.as_ref().and_then(timestamp);
        vec![
            Span::raw("WAITING"),
            Span::raw(waiting.cycle_id.to_string()),
            Span::raw("-"),
            Span::raw(self.ago(since)),
            Span::raw("-"),
            Span::raw(trigger(waiting.trigger(), &waiting.r#loop)),
            Span::raw(format!("waits for {}", waits_for(waiting))),
        ]
    }

    fn recorded_row(self, cycle: &Cycle) -> Vec<Span<'_>> {
        let duration_ms = Some(cycle.duration_ms).filter(|_| cycle.has_result());
        vec![
            self.state(cycle.state, cycle.state),
            Span::raw(cycle.number()),
            Span::raw(cycle.finished_at.map_or_else(|| "-".to_owned(), |at| format!("{} ago", self.ago(Some(at))))),
            Span::raw(duration_ms.map_or_else(|| "-".to_owned(), milliseconds)),
            Span::raw(cycle.succeeded.as_str()),
            Span::raw(cycle.trigger.as_str()),
            Span::raw(cycle.error.as_str()),
        ]
    }

    fn loops(self, buffer: &mut Buffer, area: Rect, model: &Model, view: &mut View) {
        let loops = model.status.as_ref().map(|status| &status.loops[..]).unwrap_or_default();
        let not_run: usize = loops.iter().map(|status| status.not_run.len()).sum();
        // Ticks that did not run are below, in at most half of the area.
        let below = if not_run == 0 { 0 } else { as_u16(not_run + 2).min(area.height / 2) };
        let [above, below] = area.layout(&Layout::vertical([Constraint::Min(3), Constraint::Length(below)]));
        let range = view.fit(loops.len(), above.height.saturating_sub(2));
        let inner = titled(buffer, above, format!(" {} ", count(loops.len() as u64, "loop")), of_all(&range));
        let columns = [
            Col::rest("LOOP"),
            Col::left("INTERVAL", 8),
            Col::left("NEXT", 7),
            Col::right("DUE", 7),
            Col::right("RAN", 7),
            Col::right("SKIPPED", 7),
            Col::right("MISSED", 7),
            Col::right("COALESCED", 9),
            Col::right("DROPPED", 7),
        ];
        let rows = loops[range].iter().map(|status| {
            let settings = status.r#loop.clone().unwrap_or_default();
            let ticks = status.ticks.unwrap_or_default();
            let counts = [ticks.due, ticks.ran, ticks.skipped, ticks.missed, ticks.coalesced, ticks.dropped];
            let mut cells = vec![
                bold(clean(&settings.name)),
                Span::raw(duration(settings.interval.as_ref())),
                Span::raw(self.next_tick(status)),
            ];
            cells.extend(counts.map(|count| Span::raw(grouped(count))));
            (false, cells)
        });
        table_of(buffer, inner, &columns, rows);

        if below.is_empty() {
            return;
        }
        let inner = titled(buffer, below, " ticks that did not run, the latest first ", "");
        let mut ranges: Vec<_> =
            loops.iter().flat_map(|status| status.not_run.iter().map(move |range| (status, range))).collect();
        ranges.sort_by_key(|(_, range)| std::cmp::Reverse(range.last_due_at.as_ref().and_then(timestamp)));
        let lines = ranges.into_iter().map(|(status, range)| {
            let state = word(range.disposition().as_str_name(), "TICK_DISPOSITION_");
            let name = status.r#loop.as_ref().map(|settings| clean(&settings.name)).unwrap_or_default();
            let [first, last] =
                [&range.first_due_at, &range.last_due_at].map(|at| self.ago(at.as_ref().and_then(timestamp)));
            let when = if range.count == 1 { format!("{last} ago") } else { format!("{first} to {last} ago") };
            vec![
                bold(name),
                format!("  {} ", count(range.count, "tick")).into(),
                self.state("SKIPPED", state),
                format!(", {when}").into(),
            ]
            .into()
        });
        put_lines(buffer, inner, lines);
    }

    // -----------------------------------------------------------------------------------------------------------
    // Overlays

    fn detail(
        self,
        buffer: &mut Buffer,
        area: Rect,
        model: &Model,
        detail: &Detail,
        top: &mut usize,
        page: &mut usize,
    ) {
        let (name, stand) = match &detail.of {
            Subject::Subsystem(name) => {
                let live = model.row(name).and_then(|row| row.live);
                let stand = live
                    .map(|(live, stand)| format!(" now in cycle {}: {} ", live.cycle_id, subsystem_state(stand.state)));
                (clean(name), stand.unwrap_or_default())
            }
            Subject::Cycle(id) => (format!("cycle {id}"), String::new()),
        };
        let live = match detail.of {
            Subject::Cycle(id) => model.live.get(&id).map(|live| Ok(detail::running(live))),
            Subject::Subsystem(_) => None,
        };
        let lines: Vec<_> = match live.as_ref().or(detail.is.as_ref()) {
            None => vec![Line::from("loading …")],
            Some(Err(why)) => vec![self.loud(clean(why)).into()],
            Some(Ok(entries)) => {
                let labels = entries.iter().map(|entry| match entry {
                    Entry::Fact(what, _) | Entry::State(what, ..) => what.chars().count(),
                    Entry::Heading(_) | Entry::Text(_) => 0,
                });
                let label = labels.max().unwrap_or(0).clamp(12, usize::from(area.width / 3));
                let width = usize::from(area.width).saturating_sub(label + 2);
                entries.iter().flat_map(|entry| self.entry(entry, label, width, detail.left)).collect()
            }
        };
        let range = fit(top, page, lines.len(), area.height.saturating_sub(1));
        let title = format!(" {name}{} ", of_all(&range).trim_end());
        let inner = titled(buffer, area, title, stand);
        put_lines(buffer, inner, lines.into_iter().skip(range.start).take(range.len()));
    }

    /// The lines of an entry. A long fact is wrapped; an output can be scrolled to the side.
    fn entry(self, entry: &Entry, label: usize, width: usize, left: usize) -> Vec<Line<'_>> {
        match entry {
            Entry::Heading(heading) => vec![Line::default(), bold(*heading).into()],
            Entry::State(what, is, more) => {
                /// Columns of the longest state.
                const STATE: usize = 12;
                let pieces = wrapped(more, width.saturating_sub(STATE + 2)).into_iter().enumerate();
                let line = |(i, piece): (usize, String)| {
                    let (what, is) = if i == 0 { (cut(what, label), is.as_str()) } else { (String::new(), "") };
                    let shown = self.state(is, format!("{is:STATE$}  "));
                    vec![Span::raw(format!("{what:label$}  ")), shown, Span::raw(piece)].into()
                };
                pieces.map(line).collect()
            }
            Entry::Text(text) => vec![text.chars().skip(left).collect::<String>().into()],
            Entry::Fact(what, is) => {
                let pieces = wrapped(is, width).into_iter().enumerate();
                let line = |(i, piece): (usize, String)| {
                    let what = if i == 0 { cut(what, label) } else { String::new() };
                    vec![Span::raw(format!("{what:label$}  ")), Span::raw(piece)].into()
                };
                pieces.map(line).collect()
            }
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Pieces

    /// An age in one unit.
    fn ago(self, at: Option<Timestamp>) -> String {
        let Some(at) = at else { return "-".to_owned() };
        match self.now.duration_since(at).as_secs().max(0) {
            seconds @ ..60 => format!("{seconds}s"),
            seconds @ 60..3_600 => format!("{}m", seconds / 60),
            seconds @ 3_600..86_400 => format!("{}h", seconds / 3_600),
            seconds => format!("{}d", seconds / 86_400),
        }
    }

    fn style(self, state: &str) -> Style {
        match colour(state).filter(|_| self.colours) {
            Some(AnsiColor::Green) => Style::new().fg(Color::Green),
            Some(AnsiColor::Yellow) => Style::new().fg(Color::Yellow),
            Some(AnsiColor::Red) => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
            _ => Style::new(),
        }
    }

    fn state<'a>(self, state: &str, text: impl Into<Cow<'a, str>>) -> Span<'a> {
        Span::styled(text, self.style(state))
    }

    fn loud(self, text: String) -> Span<'static> {
        Span::styled(text, self.style("FAILED").add_modifier(Modifier::BOLD))
    }
}

/// Draws the list of all keys.
fn help(buffer: &mut Buffer, area: Rect, top: &mut usize, page: &mut usize) {
    const HELP: &[(&str, &str)] = &[
        ("↑ ↓  k j", "the previous row, the next row"),
        ("PgUp PgDn", "a page"),
        ("Home End  g G", "the first, the last"),
        ("Enter", "details of the selected subsystem, with its latest output, or of the selected cycle"),
        ("/", "show only rows with this text: a name, FAILED, OPEN, STALE, …"),
        ("s S  → ←", "sort by the next or the previous column"),
        ("r", "reverse the order"),
        ("1 2 3  Tab", "the fleet, the latest cycles, the loops"),
        ("Ctrl-L", "redraw"),
        ("Esc", "back; from the fleet: quit"),
        ("q  Ctrl-C", "quit"),
        ("", ""),
        ("· ▸ ✓ ✗ -", "now: waiting, running, succeeded, failed, skipped"),
        ("■ ▪", "a mark for several subsystems: all have ended, some have"),
        ("D F C I U", "cycle: DEGRADED, FAILED, CANCELLED, INTERRUPTED, UNREADABLE"),
        ("LAST", "state of its last part"),
        ("OUTPUT", "FRESH: made by its last part, STALE: by an earlier one; with its age, and the cycle that made it"),
    ];
    /// Columns of the keys.
    const KEYS: usize = 15;
    let width = usize::from(area.width).saturating_sub(KEYS);
    let lines = HELP.iter().flat_map(|&(key, what)| {
        let pieces = wrapped(what, width).into_iter().enumerate();
        pieces.map(move |(i, piece)| {
            vec![bold(format!("{:KEYS$}", if i == 0 { key } else { "" })), Span::raw(piece)].into()
        })
    });
    let lines: Vec<Line<'_>> = lines.collect();
    let range = fit(top, page, lines.len(), area.height.saturating_sub(1));
    let inner = titled(buffer, area, " help ", "");
    put_lines(buffer, inner, lines.into_iter().skip(range.start).take(range.len()));
}

/// The keys that are active.
fn footer(view: &View) -> Line<'static> {
    let keys: &[_] = match (&view.mode, view.pane) {
        (Mode::Filter, _) => {
            return vec![bold("/"), Span::raw(clean(&view.filter)), reversed(" "), "  Enter: keep, Esc: clear".into()]
                .into();
        }
        (Mode::Help, _) => &[("Esc", "back"), ("↑↓", "scroll")],
        (Mode::Detail(_), _) => &[("Esc", "back"), ("↑↓←→", "scroll"), ("PgUp PgDn", "page"), ("?", "help")],
        (Mode::Browse, Pane::Fleet) => &[
            ("q", "quit"),
            ("?", "help"),
            ("/", "filter"),
            ("s", "sort"),
            ("r", "reverse"),
            ("Enter", "detail"),
            ("Tab", "cycles, loops"),
        ],
        (Mode::Browse, Pane::Cycles) => {
            &[("Esc", "fleet"), ("Enter", "detail"), ("Tab", "loops"), ("?", "help"), ("q", "quit")]
        }
        (Mode::Browse, Pane::Loops) => {
            &[("Esc", "fleet"), ("Tab", "fleet"), ("↑↓", "scroll"), ("?", "help"), ("q", "quit")]
        }
    };
    let keys = keys.iter().flat_map(|&(key, what)| [bold(key), Span::raw(format!(" {what}  "))]);
    keys.collect::<Vec<_>>().into()
}

impl View {
    /// Scrolls so that the selected one of the lines is visible.
    fn reveal(&mut self, selected: usize, room: u16) {
        self.top = self.top.clamp((selected + 1).saturating_sub(usize::from(room)), selected);
    }

    /// The range of visible lines, of `all` lines with room for `room`.
    fn fit(&mut self, all: usize, room: u16) -> Range<usize> {
        fit(&mut self.top, &mut self.page, all, room)
    }
}

fn fit(top: &mut usize, page: &mut usize, all: usize, room: u16) -> Range<usize> {
    let room = usize::from(room).max(1);
    *page = room;
    *top = (*top).min(all.saturating_sub(room));
    *top..(*top + room).min(all)
}

/// The range of visible lines as text.
fn of_all(range: &Range<usize>) -> String {
    if range.is_empty() { String::new() } else { format!(" {} to {} ", range.start + 1, range.end) }
}

/// The columns of the fleet that fit.
fn fleet_columns(width: u16) -> impl Iterator<Item = Column> {
    Column::ALL.into_iter().filter(move |column| match column {
        Column::Subsystem | Column::Last | Column::Reason => true,
        Column::Duration => width >= 50,
        Column::Output => width >= 68,
        Column::Breaker => width >= 96,
        Column::Attempts => width >= 108,
    })
}

/// Draws a horizontal line with a title, and returns the area below it.
fn titled<'a>(buffer: &mut Buffer, area: Rect, title: impl Into<Cow<'a, str>>, right: impl Into<Cow<'a, str>>) -> Rect {
    let (title, right) = (title.into(), right.into());
    let title = cut(&title, usize::from(area.width.saturating_sub(2)));
    let left = usize::from(area.width).saturating_sub(Span::raw(&title).width() + 4);
    let block = Block::new().borders(Borders::TOP).title(Line::from(vec!["─".into(), bold(title)]));
    let fits = Span::raw(&*right).width() <= left;
    let block = if fits && !right.is_empty() {
        block.title(Line::from(vec![Span::styled(right, Style::reset()), "─".into()]).right_aligned())
    } else {
        block
    };
    let inner = block.inner(area);
    block.render(area, buffer);
    inner
}

fn reversed(text: &'static str) -> Span<'static> {
    Span::styled(text, Modifier::REVERSED)
}

/// The range of `all` that column `i` of `columns` stands for.
fn part_of(all: usize, columns: usize, i: usize) -> Range<usize> {
    let columns = columns.max(1);
    i * all / columns..(i + 1) * all / columns
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::{
        super::{
            model::{
                News,
                tests::{at, cycle, knowing, page, part, progress, registered, started},
            },
            view::Action,
        },
        *,
    };
    use pb::{
        CycleState,
        SubsystemState::{Failed, Running, Succeeded},
    };

    const LOOK: Look = Look { now: Timestamp::UNIX_EPOCH, colours: false, unicode: true };

    /// The screen at this number of seconds after the epoch.
    fn drawn(model: &Model, view: &mut View, seconds: i64, width: u16, height: u16) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, view, Look { now: at(seconds), ..LOOK })).unwrap();
        terminal.backend().buffer().clone()
    }

    fn lines(buffer: &Buffer) -> Vec<String> {
        let line = |row: Rect| row.positions().map(|at| buffer[at].symbol()).collect::<String>();
        buffer.area.rows().map(line).map(|line| line.trim_end().to_owned()).collect()
    }

    fn shown(model: &Model, view: &mut View, width: u16, height: u16) -> Vec<String> {
        lines(&drawn(model, view, 10, width, height))
    }

    /// The line with this text.
    #[track_caller]
    fn line_with<'a>(lines: &'a [String], text: &str) -> &'a str {
        lines.iter().find(|line| line.contains(text)).unwrap_or_else(|| panic!("no {text:?} in\n{}", lines.join("\n")))
    }

    fn status() -> News {
        let heartbeat = pb::IntervalLoopStatus {
            r#loop: Some(pb::IntervalLoop {
                name: "heartbeat".into(),
                interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
                ..pb::IntervalLoop::default()
            }),
            next_due_at: Some(proto::timestamp(at(12))),
            ticks: Some(pb::TickCounts { due: 4, ran: 3, skipped: 1, ..pb::TickCounts::default() }),
            ..pb::IntervalLoopStatus::default()
        };
        News::Status(Box::new(pb::OrchestratorStatus {
            orchestrator_id: "orchestrator".into(),
            epoch: 7,
            version: "0.1.0".into(),
            uptime: Some(prost_types::Duration { seconds: 61, nanos: 5 }),
            subsystem_count: 3,
            total_cycles: 2,
            newest_revision: 2,
            queued_cycles: 1,
            waiting_cycles: vec![pb::WaitingCycle {
                cycle_id: 9,
                scheduled_at: Some(proto::timestamp(at(1))),
                waits_for_cycle_id: 3,
                waits_for_subsystem: "alpha".into(),
                ..pb::WaitingCycle::default()
            }],
            watchers: 4,
            loops: vec![heartbeat],
            ..pb::OrchestratorStatus::default()
        }))
    }

    fn recorded(cycle: pb::CycleTelemetry) -> News {
        News::Recorded(Box::new(cycle))
    }

    /// Three subsystems and two cycles, with a failure in the second cycle.
    fn house() -> Model {
        let leased = pb::SubsystemStatus { lease_expires_at: Some(proto::timestamp(at(40))), ..registered("gamma") };
        let all =
            |state| vec![part("alpha", Succeeded, 12.0), part("beta", state, 250.0), part("gamma", Succeeded, 1.0)];
        knowing([
            status(),
            page(vec![registered("alpha"), registered("beta"), leased]),
            recorded(cycle(1, 1, CycleState::Succeeded, all(Succeeded))),
            recorded(cycle(2, 6, CycleState::Degraded, all(Failed))),
        ])
    }

    #[test]
    fn between_cycles_all_panes_are_shown() {
        let lines = shown(&house(), &mut View::default(), 80, 24);
        let expected = "\
orchestrator  http://127.0.0.1:7700  connected  up 1m 1s  epoch 7  version 0.1.0
cycles 2  queue 1  subsystems 3  failing 1  watchers 4
─ no cycle runs ────────────────────────────────────────────────────────────────
last: cycle 2 DEGRADED in 200 ms, 4s ago, loop heartbeat, 2/3 succeeded
1 of 2 failed
─ history: 2 cycles ─────────────────────────────── median 200 ms, longest 200 ms ─
 █
██
 D
─ 1 loop ───────────────────────────────────────────────────────────────────────
heartbeat  every 5s, next in 2s: 3 ran, 1 skipped
─ fleet: 3 subsystems ───────────────────────────────── 1 to 3, by SUBSYSTEM ▲ ─
  SUBSYSTEM▲ LAST          DURATION OUTPUT           REASON
  alpha     SUCCEEDED      12.0 ms FRESH 4s #2
  beta      FAILED          250 ms STALE 9s #1      INTERNAL beta is [31mbroken
  gamma     SUCCEEDED      1.00 ms FRESH 4s #2      lease 30s";
        for (line, expected) in lines.iter().zip(expected.lines()) {
            let squeeze = |text: &str| text.split_whitespace().map(|word| word.trim_matches('─')).collect::<String>();
            assert_eq!(squeeze(line), squeeze(expected), "in\n{}", lines.join("\n"));
        }
        assert!(lines[23].starts_with("q quit  ? help  / filter"), "{lines:?}");
        let wide = shown(&house(), &mut View::default(), 140, 45);
        assert!(wide[0].ends_with("up 1m 1s  epoch 7  version 0.1.0"), "{}", wide[0]);
        assert!(line_with(&wide, "history: 2 cycles").contains("1 loop"));
        assert!(line_with(&wide, "  beta ").contains("3 CLOSED    STALE 9s #1"), "{wide:?}");
    }

    #[test]
    fn a_running_cycle_shows_its_waiting_running_and_failed_subsystems() {
        let mut model = house();
        model.learn(started(3, 8, &["alpha", "beta", "gamma"]), at(8));
        model.learn(progress(3, &[("alpha", Running), ("beta", Running)]), at(8));
        model.learn(progress(3, &[("beta", Failed)]), at(9));
        let lines = shown(&model, &mut View::default(), 80, 24);
        assert!(line_with(&lines, "cycle 3, unknown: 1 of 3 ended, 2.00 s").starts_with('─'));
        assert_eq!(lines[3], "▸✗·");
        assert_eq!(lines[4], "1 failed  1 waiting  1 running: alpha 1.50 s");
        assert!(line_with(&lines, "▸ alpha").ends_with("running 1.50 s"));
        assert!(line_with(&lines, "✗ beta").contains("FAILED"));
        // One line shows all of them, whatever their number.
        let names: Vec<_> = (0..10_000).map(|i| format!("s{i}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        model.learn(recorded(cycle(3, 8, CycleState::Failed, vec![])), at(8));
        model.learn(started(4, 8, &names), at(8));
        model.learn(progress(4, &[("s0", Succeeded), ("s5000", Running), ("s9999", Failed)]), at(8));
        let lines = shown(&model, &mut View::default(), 80, 24);
        assert_eq!(lines[3], format!("▪{}▸{}✗", "·".repeat(39), "·".repeat(38)));
    }

    #[test]
    fn cycles_side_by_side_have_a_line_each() {
        let mut model = house();
        model.learn(started(3, 8, &["alpha", "beta"]), at(8));
        model.learn(started(12, 9, &["gamma"]), at(9));
        model.learn(progress(12, &[("gamma", Running)]), at(9));
        model.learn(progress(3, &[("alpha", Running), ("beta", Running)]), at(9));
        model.learn(progress(3, &[("beta", Failed)]), at(9));
        let lines = shown(&model, &mut View::default(), 80, 24);
        line_with(&lines, "─ 2 cycles running ─");
        assert_eq!(lines[3], "cycle 3, unknown: 1 of 2 ended, 2.00 s   ▸✗");
        assert_eq!(lines[4], "cycle 12, unknown: 0 of 1 ended, 1.00 s  ▸");
        // Each subsystem has its state in its own cycle.
        assert!(line_with(&lines, "▸ alpha").ends_with("running 1.50 s"), "{lines:?}");
        assert!(line_with(&lines, "▸ gamma").contains("running 500 ms"), "{lines:?}");
        assert!(line_with(&lines, "✗ beta").contains("FAILED"));
        let mut detail = View::default();
        detail.act(Action::Open, &model);
        line_with(&shown(&model, &mut detail, 80, 24), "now in cycle 3: RUNNING");
        let cycles = shown(&model, &mut View { pane: Pane::Cycles, ..View::default() }, 120, 24);
        line_with(&cycles, "cycles: 2 running, 1 waiting, 2 recorded, the latest first");
        let ids = cycles.iter().skip(4).filter_map(|line| line.split_whitespace().nth(1));
        assert_eq!(ids.take(5).collect::<Vec<_>>(), ["12", "3", "9", "2", "1"], "{cycles:?}");
        assert!(line_with(&cycles, "RUNNING     ").ends_with("unknown"), "{cycles:?}");

        // The other cycle ends: the rows below don't move.
        let fleet = |lines: &[String]| lines.iter().position(|line| line.contains("fleet: 3 subsystems")).unwrap();
        model.learn(recorded(cycle(12, 9, CycleState::Succeeded, vec![part("gamma", Succeeded, 1.0)])), at(9));
        let fewer = shown(&model, &mut View::default(), 80, 24);
        line_with(&fewer, "─ 1 cycle running ─");
        assert_eq!(fleet(&fewer), fleet(&lines));
    }

    #[test]
    fn waiting_cycles_are_listed_by_their_ids_until_they_run() {
        let mut model = house();
        let cycles = |model: &Model| shown(model, &mut View { pane: Pane::Cycles, ..View::default() }, 120, 24);
        let lines = cycles(&model);
        line_with(&lines, " cycles: 1 waiting, 2 recorded, the latest first ");
        assert!(line_with(&lines, "WAITING").ends_with("waits for cycle 3 (alpha)"), "{lines:?}");
        assert!(line_with(&lines, "WAITING").starts_with("WAITING           9 "), "{lines:?}");
        model.learn(started(9, 8, &["alpha"]), at(8));
        assert!(!cycles(&model).iter().any(|line| line.contains("WAITING")));
    }

    #[test]
    fn running_cycles_without_space_are_counted() {
        let mut model = house();
        for i in 3..259 {
            model.learn(started(i, 8, &[&format!("s{i}")]), at(8));
        }
        for (height, lines, more) in [(24, 3, "and 253 more: Tab"), (45, 8, "and 248 more: Tab")] {
            let shown = shown(&model, &mut View::default(), 80, height);
            assert!(line_with(&shown, "256 cycles running").contains(more), "{shown:?}");
            assert_eq!(shown.iter().filter(|line| line.starts_with("cycle ")).count(), lines, "{shown:?}");
        }
        // In a narrow terminal, titles are truncated and the strips are not.
        let narrow = shown(&model, &mut View::default(), 40, 24);
        assert_eq!(narrow[3], "cycle 3, unknown: 0 of 1 ended, 2.00…  ·");
        let mut view = View { pane: Pane::Cycles, ..View::default() };
        view.act(Action::Last, &model);
        line_with(&shown(&model, &mut view, 80, 24), "SUCCEEDED");
    }

    #[test]
    fn a_lost_connection_dims_the_last_known_state() {
        let mut model = house();
        model.learn(started(3, 2, &["alpha"]), at(2));
        model.learn(progress(3, &[("alpha", Running)]), at(2));
        model.learn(News::Lost("the connection is lost; reconnecting".into()), at(3));
        let buffer = drawn(&model, &mut View::default(), 10, 100, 24);
        let lines = lines(&buffer);
        assert!(lines[0].contains("the connection is lost; reconnecting (7s)"), "{}", lines[0]);
        assert!(line_with(&lines, "▸ alpha").contains("SUCCEEDED"));
        line_with(&lines, "cycle 3, unknown: 0 of 1 ended, 1.00 s");
        line_with(&lines, "1 running: alpha 500 ms");
        let dim = |x, y: u16| buffer[(x, y)].modifier.contains(Modifier::DIM);
        assert!((1..23).all(|y| dim(3, y)) && !dim(3, 0));
        model.learn(News::CaughtUp, at(11));
        let buffer = drawn(&model, &mut View::default(), 12, 100, 24);
        assert!(!buffer.content.iter().any(|cell| cell.modifier.contains(Modifier::DIM)));
    }

    #[test]
    fn an_error_of_the_store_and_a_late_answer_are_prominent() {
        let News::Status(status) = status() else { panic!("no status") };
        let mut model = house();
        let status = pb::OrchestratorStatus { store_error: "disk\x1b full".into(), ..*status };
        model.learn(News::Status(Box::new(status)), at(9));
        model.learn(News::Unanswered("the service did not answer within 10s".into()), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        assert!(lines[0].contains("not answer within 10s"));
        assert_eq!(lines[2], "STORE ERROR: disk full; no cycle starts until it can be written");
    }

    #[test]
    fn the_mode_of_access_control_and_an_insecure_service_are_shown() {
        let News::Status(status) = status() else { panic!("no status") };
        let mut model = house();
        let who = |mode: pb::AccessMode| {
            let identity = "jwt:a\x1bb".into();
            News::Who(Box::new(pb::WhoAmIResponse { identity, mode: mode.into(), ..Default::default() }))
        };
        model.learn(who(pb::AccessMode::Off), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        assert!(lines[1].ends_with("watchers 4  access off"), "{}", lines[1]);
        model.learn(who(pb::AccessMode::DryRun), at(9));
        model.learn(News::Status(Box::new(pb::OrchestratorStatus { insecure: true, ..*status })), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        assert!(lines[1].ends_with("access dry_run jwt:ab"), "{}", lines[1]);
        assert_eq!(lines[2], "INSECURE: other machines may need no right: access.mode is not enforce");
    }

    #[test]
    fn a_pause_of_all_loops_missing_subsystems_a_replica_that_cannot_lead_and_a_look_at_a_copy_are_shown() {
        let News::Status(mut status) = status() else { panic!("no status") };
        status.loops_paused = true;
        status.loops.iter_mut().for_each(|it| it.paused = true);
        let mut model = house();
        model.learn(News::Status(status), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        assert_eq!(lines[2], "PAUSED: no loop starts a cycle until `orchestrator loops resume --all`");
        let text = lines.join("\n");
        assert!(text.contains(", paused: "), "{text}");
        let lacking = pb::OrchestratorStatus {
            missing_count: 7,
            missing: ["a", "b", "c", "d", "e", "f", "g"].map(str::to_owned).into(),
            ..pb::OrchestratorStatus::default()
        };
        model.learn(News::Status(Box::new(lacking)), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        let missing = "MISSING: a, b, c, d, e, 2 more, which are expected (registry.expected) and not registered";
        assert_eq!(lines[2], missing);
        let follows = pb::OrchestratorStatus {
            replica: Some(pb::Replica { name: "b".into(), ..pb::Replica::default() }),
            unable_to_lead: "the key is missing".into(),
            ..pb::OrchestratorStatus::default()
        };
        model.learn(News::Status(Box::new(follows)), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        assert_eq!(lines[2], "CAN'T LEAD: b: the key is missing");
        let looks = pb::OrchestratorStatus { read_only: true, ..pb::OrchestratorStatus::default() };
        model.learn(News::Status(Box::new(looks)), at(9));
        let lines = shown(&model, &mut View::default(), 100, 24);
        assert_eq!(lines[2], "READ ONLY: it looks at a copy: no cycle runs, and nothing can be changed");
    }

    #[test]
    fn no_size_panics_and_the_smallest_ones_show_a_message() {
        let mut model = house();
        model.learn(started(3, 8, &["alpha", "beta"]), at(8));
        let detail = || {
            let mut view = View::default();
            view.act(Action::Open, &model);
            view.learn(&News::Subsystem("alpha".into(), Ok(Box::new(registered("alpha")))));
            view
        };
        let views: [fn() -> View; 4] = [
            View::default,
            || View { mode: Mode::Help, ..View::default() },
            || View { pane: Pane::Cycles, top: 99, ..View::default() },
            || View { pane: Pane::Loops, top: 99, filter: "x".into(), ..View::default() },
        ];
        let heights = [0, 1, 9, 10, 11, 17, 18, 24, 28, 40];
        for (width, height) in
            [0, 1, 39, 40, 50, 80, 110].into_iter().flat_map(|width| heights.map(|height| (width, height)))
        {
            for view in views {
                drawn(&model, &mut view(), 10, width, height);
            }
            drawn(&model, &mut detail(), 10, width, height);
            drawn(&Model::default(), &mut View::default(), 10, width, height);
        }
        assert_eq!(shown(&model, &mut View::default(), 39, 3)[0], "too small: 40 x 10 needed");
        assert!(line_with(&shown(&model, &mut View::default(), 40, 10), "beta").contains("FAILED"));
    }

    #[test]
    fn a_filter_shows_its_text_and_its_matches() {
        let model = house();
        let mut view = View { filter: "bet".into(), mode: Mode::Filter, ..View::default() };
        let lines = shown(&model, &mut view, 80, 24);
        assert!(line_with(&lines, "fleet:").contains("1 of 3 with \"bet\""));
        assert!(!lines.iter().any(|line| line.contains("alpha")));
        assert!(lines[23].starts_with("/bet"));
        view.filter = "nothing".into();
        line_with(&shown(&model, &mut view, 80, 24), "no subsystem matches");
    }

    #[test]
    fn the_selected_row_is_always_shown() {
        let names: Vec<_> = (0..10_000).map(|i| format!("s{i:05}")).collect();
        let model = knowing([status(), page(names.iter().map(|name| registered(name)).collect())]);
        let mut view = View::default();
        shown(&model, &mut view, 80, 24);
        let selected = |view: &mut View| {
            let buffer = drawn(&model, view, 10, 80, 24);
            let row = buffer.area.rows().find(|row| buffer[(0, row.y)].modifier.contains(Modifier::REVERSED)).unwrap();
            lines(&buffer)[usize::from(row.y)].split_whitespace().next().unwrap().to_owned()
        };
        assert_eq!(selected(&mut view), "s00000");
        view.act(Action::Last, &model);
        assert_eq!(selected(&mut view), "s09999");
        view.act(Action::PageUp, &model);
        assert_eq!(selected(&mut view), format!("s{:05}", 9_999 - view.page));
        line_with(&shown(&model, &mut view, 80, 24), "fleet: 10,000 subsystems");
    }

    #[test]
    fn the_other_panes_list_cycles_and_loops() {
        let model = house();
        let cycles = shown(&model, &mut View { pane: Pane::Cycles, ..View::default() }, 120, 24);
        assert!(line_with(&cycles, "DEGRADED").ends_with("4s ago   200 ms       2/3 loop heartbeat 1 of 2 failed"));
        let narrow = shown(&model, &mut View { pane: Pane::Cycles, ..View::default() }, 80, 24);
        assert!(line_with(&narrow, "DEGRADED").ends_with("1 of 2 failed"));
        let loops = shown(&model, &mut View { pane: Pane::Loops, ..View::default() }, 80, 24);
        let row: Vec<_> = line_with(&loops, "heartbeat").split_whitespace().collect();
        assert_eq!(row, ["heartbeat", "5s", "in", "2s", "4", "3", "1", "0", "0", "0"]);
    }

    #[test]
    fn unreadable_cycles_are_marked_in_their_places() {
        let mut model = house();
        let damaged = |cycle_id, revision| {
            News::Unreadable(pb::UnreadableCycle { cycle_id, revision, problem: "it is too short".into() })
        };
        model.learn(damaged(3, 3), at(0));
        // A record whose id can't be read either.
        model.learn(damaged(0, 4), at(0));
        let pane = |pane| View { pane, ..View::default() };
        let cycles = shown(&model, &mut pane(Pane::Cycles), 120, 24);
        let row: Vec<_> = line_with(&cycles, "UNREADABLE").split_whitespace().collect();
        assert_eq!(row[..6], ["UNREADABLE", "?", "-", "-", "-", "-"]);
        assert!(line_with(&cycles, "UNREADABLE        3").ends_with("its record can't be read: it is too short"));
        line_with(&cycles, "DEGRADED          2");
        let fleet = shown(&model, &mut pane(Pane::Fleet), 80, 24);
        assert!(line_with(&fleet, "last: cycle ?").ends_with("UNREADABLE"));
        line_with(&fleet, "DUU");
        assert!(line_with(&fleet, "history: 4 cycles").contains("median 200 ms, longest 200 ms"));
    }

    #[test]
    fn hostile_names_and_messages_are_text() {
        const HOSTILE: &str = "x\x1b]0;title\x07\u{9b}2J\u{202e}\ny";
        let broken = pb::SubsystemTelemetry { error_message: HOSTILE.into(), ..part(HOSTILE, Failed, 1.0) };
        let failed = pb::CycleTelemetry {
            error: HOSTILE.into(),
            r#loop: HOSTILE.into(),
            ..cycle(1, 1, CycleState::Failed, vec![broken])
        };
        let model = knowing([
            status(),
            page(vec![registered(HOSTILE)]),
            recorded(failed),
            started(2, 3, &[HOSTILE]),
            progress(2, &[(HOSTILE, Running)]),
            News::Lost(HOSTILE.into()),
        ]);
        for pane in [Pane::Fleet, Pane::Cycles, Pane::Loops] {
            let buffer = drawn(&model, &mut View { pane, filter: String::new(), ..View::default() }, 10, 120, 30);
            let bad = |c: char| c.is_control() || c == '\u{202e}';
            assert!(!buffer.content.iter().any(|cell| cell.symbol().contains(bad)));
        }
        let mut view = View::default();
        view.act(Action::Open, &model);
        let lines = shown(&model, &mut view, 120, 30);
        line_with(&lines, "x]0;title2J y");
        line_with(&lines, "loading …");
    }

    #[test]
    fn colours_are_used_only_on_request_and_can_be_read_on_light_and_dark() {
        let model = house();
        let paint = |colours| {
            let mut terminal = Terminal::new(TestBackend::new(100, 30)).unwrap();
            let look = Look { now: at(10), colours, ..LOOK };
            terminal.draw(|frame| draw(frame, &model, &mut View::default(), look)).unwrap();
            let mut colours: Vec<_> = terminal.backend().buffer().content.iter().map(|cell| cell.fg).collect();
            colours.retain(|colour| *colour != Color::Reset);
            colours
        };
        assert_eq!(paint(false), []);
        let painted = paint(true);
        let readable = [Color::Green, Color::Yellow, Color::Red];
        assert!(!painted.is_empty() && painted.iter().all(|colour| readable.contains(colour)), "{painted:?}");
    }

    #[test]
    fn an_opened_cycle_shows_every_part_while_it_runs_and_afterwards() {
        let mut model = house();
        model.learn(started(3, 8, &["alpha", "beta"]), at(8));
        model.learn(progress(3, &[("alpha", Succeeded), ("beta", Running)]), at(9));
        let mut view = View { pane: Pane::Cycles, ..View::default() };
        view.act(Action::Open, &model);
        let lines = shown(&model, &mut view, 80, 24);
        line_with(&lines, "─ cycle 3 1 to 8");
        line_with(&lines, "state         RUNNING");
        line_with(&lines, "alpha         SUCCEEDED");
        line_with(&lines, "beta          RUNNING");
        let record =
            cycle(3, 9, CycleState::Degraded, vec![part("alpha", Succeeded, 12.0), part("beta", Failed, 250.0)]);
        model.learn(recorded(record.clone()), at(9));
        view.learn(&News::Cycle(3, Ok(Box::new(record))));
        let lines = shown(&model, &mut view, 80, 40);
        line_with(&lines, "DEGRADED");
        assert!(line_with(&lines, "SUCCEEDED").ends_with("12.0 ms"), "{lines:?}");
        assert!(line_with(&lines, "FAILED").ends_with("250 ms  INTERNAL beta is [31mbroken"), "{lines:?}");
    }

    #[test]
    fn a_terminal_without_utf_8_gets_ascii() {
        let mut model = house();
        model.learn(started(3, 8, &["alpha", "beta"]), at(8));
        for pane in [Pane::Fleet, Pane::Cycles, Pane::Loops] {
            let mut terminal = Terminal::new(TestBackend::new(60, 30)).unwrap();
            let mut view = View { pane, ..View::default() };
            let look = Look { now: at(10), unicode: false, ..LOOK };
            terminal.draw(|frame| draw(frame, &model, &mut view, look)).unwrap();
            let shown = lines(terminal.backend().buffer()).join("\n").replace("? help", "");
            assert!(shown.is_ascii() && !shown.contains('?'), "{shown}");
        }
    }
}
