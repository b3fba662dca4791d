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

/// Reports when one of several files is written, replaced or removed.
///
/// It polls the files instead of using notifications: these are for directories, and a path can lead through any number
/// of directories and links, each of which can be replaced. Some file systems send no notifications.
pub struct Changes {
    paths: Vec<PathBuf>,
    seen: Vec<Option<Identity>>,
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
    /// Editors write a file in several steps, and a certificate is replaced after its key: they are complete when they
    /// stay unchanged for this long.
    const SETTLE: Duration = Duration::from_millis(200);
    /// Most such waits: files that keep changing are read as they are.
    const MAX_STEPS: usize = 25;

    /// Changes of the files at these paths, from now on. Without paths there are none.
    pub async fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut looks = interval(Self::EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let paths: Vec<_> = paths.into_iter().collect();
        let seen = look(&paths).await;
        Self { paths, seen, looks }
    }

    /// Waits for the next change. Cancel safe.
    pub async fn next(&mut self) {
        if self.paths.is_empty() {
            return pending().await;
        }
        loop {
            self.looks.tick().await;
            let mut found = look(&self.paths).await;
            if found == self.seen {
                continue;
            }
            for _ in 0..Self::MAX_STEPS {
                sleep(Self::SETTLE).await;
                let before = std::mem::replace(&mut found, look(&self.paths).await);
                if found == before {
                    break;
                }
            }
            self.seen = found;
            return;
        }
    }
}

/// `None` for a file that does not exist or can't be reached.
async fn look(paths: &[PathBuf]) -> Vec<Option<Identity>> {
    if paths.is_empty() {
        return Vec::new();
    }
    let paths = paths.to_owned();
    // A file system can be slow.
    let looked = spawn_blocking(move || paths.iter().map(|path| identity(path)).collect()).await;
    looked.unwrap_or_default()
}

fn identity(path: &Path) -> Option<Identity> {
    fs::metadata(path).ok().map(|it| Identity {
        file: (it.dev(), it.ino()),
        size: it.size(),
        written: (it.mtime(), it.mtime_nsec()),
        changed: (it.ctime(), it.ctime_nsec()),
    })
}
