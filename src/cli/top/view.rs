//! The state of the view, and how keys change it. No terminal and no I/O.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{
    detail::{self, Entry},
    model::{Column, Listed, Model, News, Subject},
};

/// The state of the view.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) pane: Pane,
    pub(super) mode: Mode,
    pub(super) sort: Column,
    pub(super) reversed: bool,
    /// Only subsystems with this text are shown.
    pub(super) filter: String,
    /// The selected subsystem, which stays selected when its row moves. `None` selects the first row.
    pub(super) selected: Option<String>,
    /// The selected cycle, which stays selected when others come before it. `None` selects the first row.
    pub(super) selected_cycle: Option<Listed>,
    /// The first visible line of the pane, or of the overlay.
    pub(super) top: usize,
    /// Number of lines that fit in the last drawing.
    pub(super) page: usize,
}

/// The content of the screen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Pane {
    /// The fleet, with summaries of the running cycles, the history and the loops.
    #[default]
    Fleet,
    Cycles,
    Loops,
}

/// The effect of keys.
#[derive(Debug, Default)]
pub(super) enum Mode {
    /// Keys move and select.
    #[default]
    Browse,
    /// Keys edit the filter.
    Filter,
    Help,
    /// Keys scroll through the details of one subsystem or cycle.
    Detail(Detail),
}

/// The details of one subsystem or cycle.
#[derive(Debug)]
pub(super) struct Detail {
    pub(super) of: Subject,
    /// `None` until the service has answered.
    pub(super) is: Option<Result<Vec<Entry>, String>>,
    /// Columns of the output that are scrolled out to the left.
    pub(super) left: usize,
}

/// The action of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    /// Ctrl-C.
    Interrupt,
    Redraw,
    /// Closes the overlay or the filter; otherwise quits.
    Back,
    Up,
    Down,
    Left,
    Right,
    PageUp,
    PageDown,
    First,
    Last,
    NextColumn,
    PreviousColumn,
    Reverse,
    Open,
    Help,
    Show(Pane),
    NextPane,
    Filter,
    Type(char),
    Erase,
    EraseAll,
    Accept,
}

/// The action to take outside the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    GoOn,
    Redraw,
    Quit,
    Interrupt,
}

/// The action of a key; `None` for most keys.
pub(super) fn action(key: KeyEvent, mode: &Mode) -> Option<Action> {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return match (key.code, mode) {
            (KeyCode::Char('c'), _) => Some(Action::Interrupt),
            (KeyCode::Char('l'), _) => Some(Action::Redraw),
            (KeyCode::Char('u'), Mode::Filter) => Some(Action::EraseAll),
            (KeyCode::Char('f'), _) => Some(Action::PageDown),
            (KeyCode::Char('b'), _) => Some(Action::PageUp),
            _ => None,
        };
    }
    match (key.code, mode) {
        (KeyCode::Enter, Mode::Filter) => Some(Action::Accept),
        (KeyCode::Backspace, Mode::Filter) => Some(Action::Erase),
        (KeyCode::Char(c), Mode::Filter) => Some(Action::Type(c)),
        (KeyCode::Esc, _) | (KeyCode::Char('q'), Mode::Help | Mode::Detail(_)) => Some(Action::Back),
        (KeyCode::Up, _) | (KeyCode::Char('k'), _) => Some(Action::Up),
        (KeyCode::Down, _) | (KeyCode::Char('j'), _) => Some(Action::Down),
        (KeyCode::PageUp, _) => Some(Action::PageUp),
        (KeyCode::PageDown | KeyCode::Char(' '), _) => Some(Action::PageDown),
        (KeyCode::Home | KeyCode::Char('g'), _) => Some(Action::First),
        (KeyCode::End | KeyCode::Char('G'), _) => Some(Action::Last),
        (KeyCode::Char('q'), Mode::Browse) => Some(Action::Quit),
        (KeyCode::Char('?') | KeyCode::F(1), _) => Some(Action::Help),
        (KeyCode::Left | KeyCode::Char('h'), Mode::Detail(_)) => Some(Action::Left),
        (KeyCode::Right | KeyCode::Char('l'), Mode::Detail(_)) => Some(Action::Right),
        (KeyCode::Enter, Mode::Browse) => Some(Action::Open),
        (KeyCode::Tab, Mode::Browse) => Some(Action::NextPane),
        (KeyCode::Char('1'), Mode::Browse) => Some(Action::Show(Pane::Fleet)),
        (KeyCode::Char('2'), Mode::Browse) => Some(Action::Show(Pane::Cycles)),
        (KeyCode::Char('3'), Mode::Browse) => Some(Action::Show(Pane::Loops)),
        (KeyCode::Char('/'), Mode::Browse) => Some(Action::Filter),
        (KeyCode::Char('s' | '>') | KeyCode::Right, Mode::Browse) => Some(Action::NextColumn),
        (KeyCode::Char('S' | '<') | KeyCode::Left, Mode::Browse) => Some(Action::PreviousColumn),
        (KeyCode::Char('r'), Mode::Browse) => Some(Action::Reverse),
        _ => None,
    }
}

impl View {
    /// Applies the action of a key.
    pub(super) fn act(&mut self, action: Action, model: &Model) -> Then {
        match action {
            Action::Quit => return Then::Quit,
            Action::Interrupt => return Then::Interrupt,
            Action::Redraw => return Then::Redraw,
            Action::Back => match self.mode {
                Mode::Browse if self.pane != Pane::Fleet => self.show(Pane::Fleet),
                Mode::Browse if !self.filter.is_empty() => self.choose(|view| view.filter.clear()),
                Mode::Browse => return Then::Quit,
                Mode::Filter => {
                    self.mode = Mode::Browse;
                    self.choose(|view| view.filter.clear());
                }
                Mode::Help | Mode::Detail(_) => {
                    self.mode = Mode::Browse;
                    self.top = 0;
                }
            },
            Action::Up => self.scroll(model, |line, _| line.saturating_sub(1)),
            Action::Down => self.scroll(model, |line, _| line.saturating_add(1)),
            Action::PageUp => self.scroll(model, usize::saturating_sub),
            Action::PageDown => self.scroll(model, usize::saturating_add),
            Action::First => self.scroll(model, |_, _| 0),
            Action::Last => self.scroll(model, |_, _| usize::MAX),
            Action::Left => self.shift(|left| left.saturating_sub(SHIFT)),
            Action::Right => self.shift(|left| left.saturating_add(SHIFT).min(detail::MAX_COLUMNS)),
            Action::NextColumn => self.choose(|view| view.sort = neighbour(view.sort, 1)),
            Action::PreviousColumn => self.choose(|view| view.sort = neighbour(view.sort, Column::ALL.len() - 1)),
            Action::Reverse => self.choose(|view| view.reversed = !view.reversed),
            Action::Open => self.open(model),
            Action::Help => {
                self.mode = if matches!(self.mode, Mode::Help) { Mode::Browse } else { Mode::Help };
                self.top = 0;
            }
            Action::Show(pane) => self.show(pane),
            Action::NextPane => self.show(match self.pane {
                Pane::Fleet => Pane::Cycles,
                Pane::Cycles => Pane::Loops,
                Pane::Loops => Pane::Fleet,
            }),
            Action::Filter => {
                self.show(Pane::Fleet);
                self.mode = Mode::Filter;
            }
            Action::Type(c) if self.filter.len() < MAX_FILTER && !c.is_control() => {
                self.choose(|view| view.filter.push(c));
            }
            Action::Type(_) => {}
            Action::Erase => self.choose(|view| _ = view.filter.pop()),
            Action::EraseAll => self.choose(|view| view.filter.clear()),
            Action::Accept => self.mode = Mode::Browse,
        }
        Then::GoOn
    }

    /// Takes the answer that the view waits for.
    pub(super) fn learn(&mut self, news: &News) {
        let Mode::Detail(detail) = &mut self.mode else { return };
        match (&detail.of, news) {
            (Subject::Subsystem(shown), News::Subsystem(name, is)) if shown == name => {
                detail.is = Some(is.as_ref().map(|status| detail::entries(status)).map_err(Clone::clone));
            }
            (Subject::Cycle(shown), News::Cycle(id, is)) if shown == id => {
                detail.is = Some(is.as_ref().map(|cycle| detail::cycle(cycle)).map_err(Clone::clone));
            }
            _ => {}
        }
    }

    /// What the service is asked for: the subsystem whose detail is shown, or the cycle until its record is known,
    /// which does not change.
    pub(super) fn wants(&self) -> Option<&Subject> {
        match &self.mode {
            Mode::Detail(Detail { of: Subject::Cycle(_), is: Some(Ok(_)), .. }) => None,
            Mode::Detail(detail) => Some(&detail.of),
            _ => None,
        }
    }

    fn show(&mut self, pane: Pane) {
        if self.pane != pane {
            (self.pane, self.top) = (pane, 0);
        }
    }

    /// Changes the filter or the order of the rows, and scrolls to the first row.
    fn choose(&mut self, change: impl FnOnce(&mut Self)) {
        if self.pane == Pane::Fleet {
            change(self);
            (self.selected, self.top) = (None, 0);
        }
    }

    /// Moves the selection if rows can be selected, otherwise scrolls. The end is known only when it is drawn.
    fn scroll(&mut self, model: &Model, to: impl Fn(usize, usize) -> usize) {
        if matches!(self.mode, Mode::Help | Mode::Detail(_)) || self.pane == Pane::Loops {
            self.top = to(self.top, self.page);
            return;
        }
        if self.pane == Pane::Cycles {
            let cycles = model.listed();
            let selected = to(self.position_of_cycle(&cycles), self.page).min(cycles.len().saturating_sub(1));
            // The first row stays selected when further cycles come.
            self.selected_cycle = cycles.get(selected).copied().filter(|_| selected > 0);
            return;
        }
        let rows = model.rows(&self.filter, self.sort, self.reversed);
        let selected = to(self.position(rows.iter().map(|row| row.name)), self.page);
        self.selected = rows.get(selected.min(rows.len().saturating_sub(1))).map(|row| row.name.to_owned());
    }

    /// The position of the selected row among these.
    pub(super) fn position<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> usize {
        self.selected.as_ref().and_then(|selected| names.position(|name| name == selected)).unwrap_or(0)
    }

    /// The position of the selected cycle among these.
    pub(super) fn position_of_cycle(&self, cycles: &[Listed]) -> usize {
        self.selected_cycle.and_then(|selected| cycles.iter().position(|it| it.is_of(selected))).unwrap_or(0)
    }

    fn open(&mut self, model: &Model) {
        let of = match self.pane {
            Pane::Fleet => {
                let rows = model.rows(&self.filter, self.sort, self.reversed);
                let Some(row) = rows.get(self.position(rows.iter().map(|row| row.name))) else { return };
                self.selected = Some(row.name.to_owned());
                Subject::Subsystem(row.name.to_owned())
            }
            Pane::Cycles => {
                let cycles = model.listed();
                // The service finds a cycle only by its id.
                let Some(cycle) = cycles.get(self.position_of_cycle(&cycles)).filter(|it| it.id != 0) else { return };
                self.selected_cycle = Some(*cycle);
                Subject::Cycle(cycle.id)
            }
            Pane::Loops => return,
        };
        self.mode = Mode::Detail(Detail { of, is: None, left: 0 });
        self.top = 0;
    }

    fn shift(&mut self, to: impl FnOnce(usize) -> usize) {
        if let Mode::Detail(detail) = &mut self.mode {
            detail.left = to(detail.left);
        }
    }
}

/// Longer than any name.
const MAX_FILTER: usize = 100;
/// Columns that one key scrolls to the side.
const SHIFT: usize = 8;

fn neighbour(column: Column, away: usize) -> Column {
    let all = Column::ALL;
    let position = all.iter().position(|it| *it == column).unwrap_or(0);
    all[(position + away) % all.len()]
}

#[cfg(test)]
mod tests {
    use super::{
        super::model::tests::{cycle, knowing, page, registered, started},
        *,
    };
    use crate::proto::orchestrator::v1::CycleState;

    fn key(code: KeyCode) -> KeyEvent {
        KeyEvent::new(code, KeyModifiers::NONE)
    }

    /// Presses these keys one after the other, and returns the result of the last one.
    fn press(view: &mut View, model: &Model, keys: impl IntoIterator<Item = KeyCode>) -> Then {
        keys.into_iter().fold(Then::GoOn, |_, code| match action(key(code), &view.mode) {
            Some(action) => view.act(action, model),
            None => Then::GoOn,
        })
    }

    fn fleet() -> Model {
        knowing([page(["alpha", "beta", "gamma"].map(registered).to_vec())])
    }

    #[test]
    fn keys_end_it_only_from_the_outermost_view() {
        let (mut view, model) = (View::default(), fleet());
        assert_eq!(press(&mut view, &model, [KeyCode::Char('q')]), Then::Quit);
        assert_eq!(press(&mut view, &model, [KeyCode::Esc]), Then::Quit);
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        for mode in [Mode::Browse, Mode::Filter, Mode::Help] {
            assert_eq!(action(interrupt, &mode), Some(Action::Interrupt));
        }
        for opens in [KeyCode::Char('?'), KeyCode::Enter, KeyCode::Char('/'), KeyCode::Tab] {
            assert_eq!(press(&mut view, &model, [opens, KeyCode::Esc]), Then::GoOn, "{opens}");
            assert!(matches!((&view.mode, view.pane), (Mode::Browse, Pane::Fleet)), "{opens}");
        }
        assert_eq!(press(&mut view, &model, [KeyCode::Char('?'), KeyCode::Char('q')]), Then::GoOn);
    }

    #[test]
    fn the_selected_row_moves_and_is_opened() {
        let (mut view, model) = (View { page: 10, ..View::default() }, fleet());
        press(&mut view, &model, [KeyCode::Down]);
        assert_eq!(view.selected.as_deref(), Some("beta"));
        press(&mut view, &model, [KeyCode::PageDown]);
        assert_eq!(view.selected.as_deref(), Some("gamma"));
        press(&mut view, &model, [KeyCode::Home, KeyCode::Up]);
        assert_eq!(view.selected.as_deref(), Some("alpha"));
        press(&mut view, &model, [KeyCode::Char('G'), KeyCode::Enter]);
        assert_eq!(view.wants(), Some(&Subject::Subsystem("gamma".into())));
        let of_another = News::Subsystem("alpha".into(), Err("gone".into()));
        view.learn(&of_another);
        assert!(matches!(&view.mode, Mode::Detail(Detail { is: None, .. })));
        view.learn(&News::Subsystem("gamma".into(), Ok(Box::new(registered("gamma")))));
        assert!(matches!(&view.mode, Mode::Detail(Detail { is: Some(Ok(_)), .. })));
        press(&mut view, &model, [KeyCode::Down, KeyCode::Right]);
        assert!(matches!(&view.mode, Mode::Detail(Detail { left: SHIFT, .. })) && view.top == 1);
        press(&mut view, &model, [KeyCode::Esc]);
        assert_eq!((view.wants(), view.selected.as_deref()), (None, Some("gamma")));
    }

    #[test]
    fn a_cycle_stays_selected_and_is_opened() {
        let recorded = |id, seconds| News::Recorded(Box::new(cycle(id, seconds, CycleState::Succeeded, Vec::new())));
        let mut model = knowing([recorded(1, 1), recorded(2, 2), started(3, 3, &["alpha"])]);
        let mut view = View { page: 10, pane: Pane::Cycles, ..View::default() };
        let wanted = |view: &View| match view.wants() {
            Some(Subject::Cycle(id)) => *id,
            other => panic!("{other:?}"),
        };
        press(&mut view, &model, [KeyCode::Enter]);
        assert_eq!(wanted(&view), 3, "the first row is selected");
        press(&mut view, &model, [KeyCode::Esc, KeyCode::Down]);
        // Two cycles come before it.
        model.learn(recorded(3, 3), jiff::Timestamp::UNIX_EPOCH);
        model.learn(started(4, 4, &["alpha"]), jiff::Timestamp::UNIX_EPOCH);
        press(&mut view, &model, [KeyCode::Enter]);
        assert_eq!(wanted(&view), 2);
        view.learn(&News::Cycle(1, Err("gone".into())));
        assert_eq!(wanted(&view), 2, "the answer is about another cycle");
        let News::Recorded(record) = recorded(2, 2) else { panic!("no record") };
        view.learn(&News::Cycle(2, Ok(record)));
        assert!(matches!(&view.mode, Mode::Detail(Detail { is: Some(Ok(_)), .. })));
        assert_eq!(view.wants(), None, "a record does not change");
        press(&mut view, &model, [KeyCode::Esc, KeyCode::Down, KeyCode::Down, KeyCode::Enter]);
        assert_eq!(wanted(&view), 1, "the last one");
    }

    #[test]
    fn text_filters_and_columns_sort() {
        let (mut view, model) = (View::default(), fleet());
        press(&mut view, &model, "/qx?".chars().map(KeyCode::Char));
        assert_eq!(view.filter, "qx?");
        press(&mut view, &model, [KeyCode::Backspace, KeyCode::Backspace, KeyCode::Enter]);
        assert_eq!((view.filter.as_str(), matches!(view.mode, Mode::Browse)), ("q", true));
        assert_eq!(press(&mut view, &model, [KeyCode::Enter]), Then::GoOn, "without a row, no subsystem is opened");
        assert_eq!(view.wants(), None);
        assert_eq!(press(&mut view, &model, [KeyCode::Esc]), Then::GoOn, "leaves the filter first");
        assert_eq!(view.filter, "");
        press(&mut view, &model, [KeyCode::Char('s'), KeyCode::Char('s'), KeyCode::Char('r')]);
        assert_eq!((view.sort, view.reversed), (Column::Duration, true));
        press(&mut view, &model, "SSS".chars().map(KeyCode::Char));
        assert_eq!(view.sort, Column::Reason);
    }
}
