//! A network between a service and a PostgreSQL server, which can be cut.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    select,
    sync::watch,
};

use super::{
    patiently,
    postgres::{host, through},
};

/// A socket in front of that of a server.
pub struct Network {
    directory: TempDir,
    passage: Passage,
}

#[derive(Clone)]
struct Passage {
    state: watch::Sender<State>,
    /// Number of bytes after which it falls silent, if it does.
    left: Arc<Mutex<Option<usize>>>,
    /// Number of bytes that have passed so far.
    passed: Arc<AtomicUsize>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Whole,
    /// Bytes stay where they are, and connections stay open.
    Silent,
    /// Connections are closed.
    Shut,
}

impl Network {
    /// A network before the socket of the server in this directory.
    pub fn before(server: &Path) -> Self {
        const NAME: &str = ".s.PGSQL.5432";
        let directory = tempfile::tempdir().unwrap();
        let passage = Passage { state: watch::Sender::new(State::Whole), left: Arc::default(), passed: Arc::default() };
        let listener = UnixListener::bind(directory.path().join(NAME)).unwrap();
        let (server, of_all) = (server.join(NAME), passage.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, passage) = (server.clone(), of_all.clone());
                let passes = async move {
                    passage.until(State::Whole).await;
                    let Ok(server) = UnixStream::connect(server).await else { return };
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::join!(pass_on(from_client, to_server, &passage), pass_on(from_server, to_client, &passage));
                };
                let shut = of_all.clone();
                tokio::spawn(async move {
                    select! {
                        () = shut.until(State::Shut) => {}
                        () = passes => {}
                    }
                });
            }
        });
        Self { directory, passage }
    }

    /// Keeps all bytes back from now on, as a network does that is cut.
    pub fn fall_silent(&self) {
        self.passage.state.send_replace(State::Silent);
    }

    /// Falls silent once this number of bytes has passed, in either direction.
    pub fn fall_silent_after(&self, bytes: usize) {
        *self.passage.left.lock().unwrap() = Some(bytes);
    }

    /// Closes all connections, also those that are made from now on.
    pub fn shut(&self) {
        self.passage.state.send_replace(State::Shut);
    }

    /// Lets everything pass from now on, also what was kept back.
    pub fn mend(&self) {
        *self.passage.left.lock().unwrap() = None;
        self.passage.state.send_replace(State::Whole);
    }

    /// Number of bytes that have passed so far, in both directions.
    pub fn passed(&self) -> usize {
        self.passage.passed.load(Ordering::Relaxed)
    }

    /// Waits until it is silent.
    pub async fn until_silent(&self) {
        patiently("the cut", self.passage.until(State::Silent)).await;
    }

    /// The directory of its socket, as the host of a URL.
    pub fn host(&self) -> String {
        host(self.directory.path())
    }

    /// The URL of the store at `url`, by way of this.
    pub fn url(&self, url: &str) -> String {
        through(self.directory.path(), url)
    }
}

impl Passage {
    async fn until(&self, state: State) {
        let mut now = self.state.subscribe();
        let _ = now.wait_for(|now| *now == state).await;
    }

    /// Of this number of bytes, those that pass before it falls silent.
    fn allows(&self, bytes: usize) -> usize {
        let mut left = self.left.lock().unwrap();
        match *left {
            Some(last) if last <= bytes => {
                *left = None;
                self.state.send_replace(State::Silent);
                last
            }
            Some(more) => {
                *left = Some(more - bytes);
                bytes
            }
            None => bytes,
        }
    }
}

async fn pass_on(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, passage: &Passage) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        let mut rest = &bytes[..read];
        while !rest.is_empty() {
            passage.until(State::Whole).await;
            let (passing, later) = rest.split_at(passage.allows(rest.len()));
            if to.write_all(passing).await.is_err() {
                return;
            }
            passage.passed.fetch_add(passing.len(), Ordering::Relaxed);
            rest = later;
        }
    }
}
