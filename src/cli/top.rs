//! `orchestrator top`: the fleet, the running cycles, the history and the loops, live on a terminal.

mod detail;
mod draw;
mod feed;
mod model;
mod pieces;
mod view;

use std::{io, time::Duration};

use crossterm::event::{Event, EventStream, KeyEventKind};
use futures_util::StreamExt;
use ratatui::DefaultTerminal;
use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep_until},
};

use self::{
    draw::Look,
    feed::Feed,
    model::Model,
    view::{Then, View, action},
};
use super::{
    Exit, Failure, HOST,
    output::{has_colours, is_terminal},
    remote::Remote,
    table::has_unicode,
};

/// Watch the fleet, the running cycles, the history and the loops live on the terminal
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The view updates by itself: running and recorded cycles from the stream of the service, and the registry page by page \
at a limited rate, so that it works with ten thousand subsystems as with ten. It is read-only.

Keys: arrows move, Enter opens a subsystem with its latest output, or a cycle, / filters, s sorts by the next column, r reverses, \
Tab shows the latest cycles and the loops, ? lists all keys, q quits.

When the service restarts, or the connection breaks, what was known stays on the screen, dimmed, until the stream is \
resumed. Needs a terminal of at least 40 x 10; for pipes and programs, use `orchestrator watch` and \
`orchestrator status`.

Exit codes: 0 after q, 130 after Ctrl-C or a signal.

Examples:
  orchestrator top
  orchestrator top --address build.example.org:7700
  NO_COLOR=1 orchestrator top")]
pub(super) struct Top {
    #[command(flatten)]
    remote: Remote,
}

impl Top {
    /// Shows everything until the user or a signal ends it.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        if self.remote.format.is_json() || !is_terminal() {
            return Err(Failure::new(
                Exit::Usage,
                "top needs a terminal; for pipes and programs use `orchestrator watch` or `orchestrator status`, with \
                 --output json",
            ));
        }
        let model = Model::new(self.remote.address.to_string());
        let colours = has_colours();
        // From here on signals end it in an orderly way, so that the terminal is restored.
        let signals = Signals::listen().map_err(broken)?;
        let mut screen = Screen::take().map_err(broken)?;
        // Keys work even while the service does not respond.
        screen.show(Feed::open(self.remote), model, colours, signals).await
    }
}

/// The terminal in raw mode: it is restored when this is dropped. Ratatui also restores it after a panic.
struct Screen {
    terminal: DefaultTerminal,
}

impl Drop for Screen {
    fn drop(&mut self) {
        // An error of a closed terminal has no remedy.
        let _ = ratatui::try_restore();
    }
}

impl Screen {
    /// Shortest time between two drawings, however many events arrive.
    const FRAME: Duration = Duration::from_millis(50);
    /// Longest time between two drawings, since the shown ages grow.
    const TICK: Duration = Duration::from_millis(250);

    fn take() -> io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self { terminal }),
            Err(error) => {
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }

    /// The loop: handles events, and then draws.
    async fn show(
        &mut self,
        mut feed: Feed,
        mut model: Model,
        colours: bool,
        mut signals: Signals,
    ) -> Result<Exit, Failure> {
        let unicode = has_unicode();
        let mut view = View::default();
        let mut keys = EventStream::new();
        let mut last_drawn = Instant::now();
        let mut next_drawing = last_drawn;
        loop {
            select! {
                // Keys and signals come before news, however much there is.
                biased;
                () = signals.next() => return Ok(Exit::Left),
                event = keys.next() => {
                    let Some(event) = event else { return Ok(Exit::Left) };
                    if let Event::Key(key) = event.map_err(broken)? && key.kind != KeyEventKind::Release {
                        match action(key, &view.mode).map_or(Then::GoOn, |action| view.act(action, &model)) {
                            Then::GoOn => feed.want(view.wants()),
                            Then::Redraw => self.terminal.clear().map_err(broken)?,
                            Then::Quit => return Ok(Exit::Done),
                            Then::Interrupt => return Ok(Exit::Left),
                        }
                    }
                    // A resize also needs a new drawing.
                    next_drawing = Instant::now();
                }
                () = sleep_until(next_drawing) => {
                    let look = Look { now: HOST.clock.now(), colours, unicode };
                    self.terminal.draw(|frame| draw::draw(frame, &model, &mut view, look)).map_err(broken)?;
                    last_drawn = Instant::now();
                    next_drawing = last_drawn + Self::TICK;
                }
                news = feed.next() => {
                    let news = news?;
                    view.learn(&news);
                    // It may know all that it wants.
                    feed.want(view.wants());
                    model.learn(news, HOST.clock.now());
                    next_drawing = next_drawing.min(last_drawn + Self::FRAME);
                }
            }
        }
    }
}

#[allow(clippy::needless_pass_by_value, reason = "errors are given away")]
fn broken(error: io::Error) -> Failure {
    Failure::new(Exit::Refused, format!("can't use the terminal: {error}"))
}

/// The signals that stop it.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// The terminal was closed.
    hangup: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
