//! What the operator says to a process that serves: signals, and the configuration.

use std::{io, path::PathBuf, sync::Arc};

use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
    task::spawn_blocking,
};

use crate::{
    config::{Config, ConfigError},
    file::Changes,
};

type Load = dyn Fn() -> Result<Config, ConfigError> + Send + Sync;

/// Hears the operator of this process, from as early on as possible: where it is the first of its container, a signal that
/// it does not listen for has no effect.
pub struct Operator {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    load: Arc<Load>,
    changes: Changes,
}

/// What the operator wants.
pub(super) enum Wish {
    /// An end. Said again, one at once.
    Stop,
    /// Another configuration; and what says so.
    Reload(&'static str),
}

impl Operator {
    /// Listens for signals, and for changes of `file`. `load` reads the configuration, wherever it comes from.
    ///
    /// # Errors
    /// Signals can't be listened for.
    pub async fn of(
        file: Option<PathBuf>,
        load: impl Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            load: Arc::new(load),
            // Before it is read for the first time, so that no change is missed in between.
            changes: Changes::of(file).await,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    pub async fn stop(&mut self) {
        select! {
            biased;
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Reads the configuration. `None` when it was told to stop before it was read.
    pub async fn configuration(&mut self) -> Option<Result<Config, ConfigError>> {
        let load = self.load.clone();
        // A file system can take its time.
        let loaded = spawn_blocking(move || load());
        select! {
            biased;
            () = self.stop() => None,
            // It ends by a defect only, which the log has.
            loaded = loaded => Some(loaded.unwrap_or_else(|error| Err(ConfigError::unread(&error)))),
        }
    }

    /// Waits for what the operator wants next.
    pub(super) async fn wish(&mut self) -> Wish {
        select! {
            biased;
            _ = self.terminate.recv() => Wish::Stop,
            _ = self.interrupt.recv() => Wish::Stop,
            _ = self.hangup.recv() => Wish::Reload("SIGHUP"),
            () = self.changes.next() => Wish::Reload("the configuration file has changed"),
        }
    }
}
