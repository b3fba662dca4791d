//! Terminals for interactive commands.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::Stdio,
    sync::{Arc, Mutex},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};
use tokio::{process::Command, sync::watch, time::timeout};

use super::PATIENCE;

/// A new terminal of this size: the side of the user, and that of the program.
pub fn open(columns: u16, rows: u16) -> (OwnedFd, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    tcsetwinsize(&master, size(columns, rows)).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let program = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    (master, program.into())
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// A terminal that interprets the output of a program, and its user.
pub struct Terminal {
    master: File,
    program: OwnedFd,
    screen: Arc<watch::Sender<vt100::Parser>>,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// An empty terminal of this size.
    pub fn new(columns: u16, rows: u16) -> Self {
        let (master, program) = open(columns, rows);
        let master = File::from(master);
        let [height, width] = [rows, columns].map(|it| it.try_into().unwrap());
        let screen = Arc::new(watch::Sender::new(vt100::Parser::new(height, width, 0)));
        let (mut read, shown) = (master.try_clone().unwrap(), screen.clone());
        let written = Arc::new(Mutex::new(Vec::new()));
        let kept = written.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            // The end of a terminal whose other side is closed is an error.
            while let Ok(length @ 1..) = read.read(&mut chunk) {
                kept.lock().unwrap().extend(&chunk[..length]);
                shown.send_modify(|parser| parser.process(&chunk[..length]));
            }
        });
        Self { master, program, screen, written }
    }

    /// Connects a command to it.
    pub fn connect(&self, command: &mut Command) {
        let side = || Stdio::from(self.program.try_clone().unwrap());
        command.env("TERM", "xterm-256color").stdin(side()).stdout(side()).stderr(side());
    }

    /// Presses keys, as the bytes that they send.
    pub fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Changes the size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let [height, width] = [rows, columns].map(|it| it.try_into().unwrap());
        self.screen.send_modify(|parser| parser.screen_mut().set_size(height, width));
        tcsetwinsize(&self.master, size(columns, rows)).unwrap();
    }

    /// Waits until the shown text fulfills this condition, and returns it.
    pub async fn until(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        self.until_screen(what, |screen| holds(&screen.contents())).await
    }

    /// Waits until this text is shown, and returns all shown text.
    pub async fn until_shown(&self, text: &str) -> String {
        self.until(text, |shown| shown.contains(text)).await
    }

    /// The same with the whole screen: its cells, their colours and the cursor.
    pub async fn until_screen(&self, what: &str, holds: impl Fn(&vt100::Screen) -> bool) -> String {
        let mut screen = self.screen.subscribe();
        let came = timeout(PATIENCE, screen.wait_for(|parser| holds(parser.screen()))).await;
        let came = came.map(|parser| parser.unwrap().screen().contents());
        came.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what} in\n{}", self.look(vt100::Screen::contents)))
    }

    /// Looks at the screen as it is now.
    pub fn look<T>(&self, look: impl FnOnce(&vt100::Screen) -> T) -> T {
        look(self.screen.borrow().screen())
    }

    /// Its whole output so far.
    pub fn written(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().unwrap()).into_owned()
    }

    /// Waits until the program has restored its modes: it echoes input, edits lines, and shows the first screen.
    pub async fn until_given_back(&self) {
        self.until_screen("the terminal to be given back", |screen| {
            !screen.alternate_screen() && !screen.hide_cursor()
        })
        .await;
        let modes = tcgetattr(&self.program).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "{modes:?}");
    }
}
