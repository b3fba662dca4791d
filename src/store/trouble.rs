//! Reports commits that are late.

use std::{future::Future, pin::pin, time::Duration};

use futures_util::stream::{self, BoxStream};
use tokio::{sync::watch, time::timeout};

use crate::ports::StoreError;

/// A commit that takes longer is reported as late. It is awaited without a limit: what it waits for may recover.
const LATE: Duration = Duration::from_secs(5);

/// What a store reports while a commit is awaited.
pub(super) struct Trouble {
    /// The location of the store, for people.
    store: String,
    /// The probable cause, and what to do about it.
    remedy: &'static str,
    reported: watch::Sender<Option<StoreError>>,
}

impl Trouble {
    pub(super) fn new(store: String, remedy: &'static str) -> Self {
        Self { store, remedy, reported: watch::Sender::new(None) }
    }

    /// Awaits a commit, and reports it while it is late.
    pub(super) async fn watch<T>(&self, commit: impl Future<Output = T>) -> T {
        let mut commit = pin!(commit);
        if let Ok(committed) = timeout(LATE, &mut commit).await {
            return committed;
        }
        let (store, problem) = (self.store.clone(), self.remedy.to_owned());
        self.reported.send_replace(Some(StoreError::Late { store, waited: LATE, problem }));
        let committed = commit.await;
        self.reported.send_replace(None);
        committed
    }

    /// The reports from now on.
    pub(super) fn reports(&self) -> BoxStream<'static, Option<StoreError>> {
        Box::pin(stream::unfold(self.reported.subscribe(), |mut reported| async {
            reported.changed().await.ok()?;
            let now = reported.borrow_and_update().clone();
            Some((now, reported))
        }))
    }
}
