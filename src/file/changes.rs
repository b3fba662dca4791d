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

/// Reports when a file is written, replaced or removed.
///
/// It polls the file instead of using notifications: these are for directories, and a path can lead through any number
/// of directories and links, each of which can be replaced. Some file systems send no notifications.
pub struct Changes {
    path: Option<PathBuf>,
    seen: Option<Identity>,
    looks: Interval,
}

/// Attributes that differ if a path leads to another file or its content has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    file: (u64, u64),
    size: u64,
    written: (i64, i64),
    /// Changes even if a program resets the other time.
    changed: (i64, i64),
}

impl Changes {
    /// Time between polls.
    const EVERY: Duration = Duration::from_secs(1);
    /// Editors write a file in several steps: it is complete when it stays unchanged for this long.
    const SETTLE: Duration = Duration::from_millis(200);
    /// Most such waits: a file that keeps changing is read as it is.
    const MAX_STEPS: usize = 25;

    /// Changes of the file at a path, from now on. `None` never reports any.
    pub async fn of(path: Option<PathBuf>) -> Self {
        let mut looks = interval(Self::EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let seen = match &path {
            Some(path) => look(path).await,
            None => None,
        };
        Self { path, seen, looks }
    }

    /// Waits for the next change. Cancel safe.
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

/// `None` if the file does not exist or can't be reached.
async fn look(path: &Path) -> Option<Identity> {
    let path = path.to_owned();
    // A file system can be slow.
    let looked = spawn_blocking(move || fs::metadata(path).ok()).await;
    looked.ok().flatten().map(|it| Identity {
        file: (it.dev(), it.ino()),
        size: it.size(),
        written: (it.mtime(), it.mtime_nsec()),
        changed: (it.ctime(), it.ctime_nsec()),
    })
}
