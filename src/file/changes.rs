use std::{
    fs,
    future::pending,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{Interval, MissedTickBehavior, interval, sleep},
};

/// Tells when a file was written, replaced or removed.
///
/// It is looked at now and then, and not watched: what is watched are directories, and a path can lead through any number of
/// them and of links, each of which can be replaced, by ways of which some file systems tell nothing.
pub struct Changes {
    path: Option<PathBuf>,
    seen: Option<Identity>,
    looks: Interval,
}

/// What is different when a path leads to another file, or to another content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    file: (u64, u64),
    size: u64,
    written: (i64, i64),
    /// Also by a program that sets the other time back.
    changed: (i64, i64),
}

impl Changes {
    /// Time between looks.
    const EVERY: Duration = Duration::from_secs(1);
    /// Editors write a file in several steps: it is done when it stays the same for so long.
    const SETTLE: Duration = Duration::from_millis(200);
    /// How often that is waited for: a file that is never done is read as it is.
    const MAX_STEPS: usize = 25;

    /// Changes of the file that a path leads to, from now on. `None`: there never are any.
    pub async fn of(path: Option<PathBuf>) -> Self {
        let mut looks = interval(Self::EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let seen = match &path {
            Some(path) => look(path).await,
            None => None,
        };
        Self { path, seen, looks }
    }

    /// Waits for the next change. None is lost if this is dropped.
    pub async fn next(&mut self) {
        let Some(path) = &self.path else { return pending().await };
        loop {
            self.looks.tick().await;
            let mut found = look(path).await;
            if found == self.seen {
                continue;
            }
            for _ in 0..Self::MAX_STEPS {
                sleep(Self::SETTLE).await;
                let before = std::mem::replace(&mut found, look(path).await);
                if found == before {
                    break;
                }
            }
            self.seen = found;
            return;
        }
    }
}

/// Nothing where there is no file, or none that can be reached.
async fn look(path: &Path) -> Option<Identity> {
    let path = path.to_owned();
    // A file system can take its time.
    let looked = spawn_blocking(move || fs::metadata(path).ok()).await;
    looked.ok().flatten().map(|it| Identity {
        file: (it.dev(), it.ino()),
        size: it.size(),
        written: (it.mtime(), it.mtime_nsec()),
        changed: (it.ctime(), it.ctime_nsec()),
    })
}
