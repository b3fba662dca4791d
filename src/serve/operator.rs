//! Requests of the operator to a running service: signals, and changes of the configuration.

use std::{io, path::PathBuf, sync::Arc};

use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
    task::spawn_blocking,
    time::{Duration, Instant},
};

use crate::{
    config::{Config, ConfigError},
    file::Changes,
};

type Load = dyn Fn() -> Result<Config, ConfigError> + Send + Sync;

/// Receives requests of the operator, starting as early as possible: in the first process of a container, a signal
/// without a handler has no effect.
pub struct Operator {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    load: Arc<Load>,
    changes: Changes,
}

/// A request of the operator.
pub(super) enum Wish {
    /// Stop. A second one aborts.
    Stop,
    /// Reload the configuration, with the reason.
    Reload(&'static str),
}

impl Operator {
    /// Handles signals, and changes of `file`. `load` reads the configuration.
    ///
    /// # Errors
    /// Signal handlers can't be installed.
    pub async fn of(
        file: Option<PathBuf>,
        load: impl Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            load: Arc::new(load),
            // Before the first read, so that no change is missed in between.
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

    /// Reads the configuration. `None` if a signal stopped it before it was read.
    pub async fn configuration(&mut self) -> Option<Result<Config, ConfigError>> {
        let load = self.load.clone();
        // A file system can be slow.
        let loaded = spawn_blocking(move || load());
        select! {
            biased;
            () = self.stop() => None,
            // It ends only because of a defect, which is in the log.
            loaded = loaded => Some(loaded.unwrap_or_else(|error| Err(ConfigError::unread(&error)))),
        }
    }

    /// Waits for the next request of the operator.
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

/// Waits for the signal that aborts a shutdown. The first signal never does: either it began the shutdown (`is_asked`),
/// or the shutdown began because of a defect, and the first signal asks for what is under way. Nor does a signal within
/// a second of the first: `timeout` and some shells send one signal to a process and then to its group, two within
/// milliseconds, and want the process to stop as after one.
pub(super) async fn aborted(is_asked: bool, mut stop: impl AsyncFnMut()) {
    const SAME_SIGNAL: Duration = Duration::from_secs(1);
    if !is_asked {
        stop().await;
        tracing::info!("the service is already shutting down: a second signal aborts that");
    }
    let first = Instant::now();
    loop {
        stop().await;
        if first.elapsed() >= SAME_SIGNAL {
            return;
        }
        tracing::info!("ignored a signal that came within a second of the first: a later one aborts the shutdown");
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{sleep_until, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_shutdown_is_aborted_by_the_second_signal_whatever_began_it() {
        // The time of the abort by signals at these times, all in milliseconds.
        let aborted_at = async |is_asked, signals: &[u64]| {
            let begun = Instant::now();
            let mut signals = signals.iter();
            let stop = async || match signals.next() {
                Some(at) => sleep_until(begun + Duration::from_millis(*at)).await,
                None => pending().await,
            };
            let aborted = timeout(Duration::from_mins(1), aborted(is_asked, stop)).await;
            aborted.ok().map(|()| begun.elapsed().as_millis())
        };
        assert_eq!(aborted_at(true, &[2000]).await, Some(2000));
        assert_eq!(aborted_at(true, &[10, 2000]).await, Some(2000));
        assert_eq!(aborted_at(false, &[2000]).await, None, "it was the first signal");
        assert_eq!(aborted_at(false, &[2000, 2010, 4000]).await, Some(4000));
    }
}
