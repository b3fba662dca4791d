//! The streams of HTTP/2 connections: each is a task that its connection owns, and a stream whose client does not read
//! is ended individually.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task_local,
    time::{Instant, Sleep, interval, sleep},
};
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::{
    connections::ConnectionState,
    rooms::{Abort, Kept, Room},
};

task_local! {
    /// The state of the current task's stream. The library creates the task, and does not report to a body whether its
    /// data was sent.
    static TAKING: Arc<Taking>;
}

/// Runs the streams of one connection.
#[derive(Clone)]
pub(super) struct Streams {
    pub(super) state: Arc<ConnectionState>,
    /// Permits for the streams of all connections.
    pub(super) permits: Arc<Semaphore>,
    pub(super) answers: Arc<Room>,
    pub(super) ends: Arc<Ends>,
    pub(super) tasks: TaskTracker,
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        // It ends with its connection, through the library.
        self.tasks.spawn(self.clone().run(stream));
    }
}

impl Streams {
    async fn run(self, stream: impl Future<Output = ()>) {
        let busy = self.state.busy();
        // One stream of each connection needs no permit, so that a client with few calls is never kept out.
        let permit = self.permits.try_acquire_owned().ok();
        let taking = Arc::new(Taking {
            is_only: busy.is_only(),
            permit,
            abort: Arc::new(Abort::of(self.state.clone())),
            ..Taking::default()
        });
        select! {
            biased;
            () = TAKING.scope(taking.clone(), stream) => {
                self.ends.note(&taking);
                taking.abort.stream_is_over();
            }
            // Dropping it resets the stream.
            () = taking.stalled(&self.answers) => {}
            () = taking.abort.wanted() => {
                tracing::debug!("a stream was aborted: its client is slow, and other clients need the memory");
                // A piece may still be queued, and must be dropped.
                self.ends.note(&taking);
                if self.state.is_stalled() {
                    self.state.cut_off();
                }
            }
        }
    }

    /// Completes when the client has not read the end of an answer for too long.
    pub(super) async fn left(&self) {
        let mut look = interval(Taking::IMPATIENCE);
        loop {
            look.tick().await;
            let patience = Taking::patience(&self.answers);
            let mut ends = self.ends.lock();
            ends.retain(Ends::is_there);
            if ends.iter().any(|(since, _)| since.elapsed() >= patience) {
                return;
            }
        }
    }
}

/// The ends of answers on one connection that are not known to be read, and since when. Their streams have ended and
/// can't be reset any more. A working client reads them all.
#[derive(Debug, Default)]
pub(super) struct Ends(Mutex<Vec<(Instant, Weak<Taking>)>>);

impl Ends {
    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, Weak<Taking>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_there((_, taking): &(Instant, Weak<Taking>)) -> bool {
        taking.upgrade().is_some_and(|taking| taking.waiting.load(Ordering::SeqCst) > 0)
    }

    fn note(&self, taking: &Arc<Taking>) {
        let mut ends = self.lock();
        // Most are read at once. The list is at most twice as long as the number of unread ones.
        if ends.len() == ends.capacity() {
            ends.retain(Self::is_there);
            let room = ends.len().max(16);
            ends.reserve(room);
        }
        ends.push((Instant::now(), Arc::downgrade(taking)));
    }
}

/// How far a client has read its answer on one stream.
#[derive(Debug, Default)]
pub(super) struct Taking {
    is_only: bool,
    /// The permit of the stream.
    permit: Option<OwnedSemaphorePermit>,
    abort: Arc<Abort>,
    /// Pieces that the library has but the kernel has not.
    waiting: AtomicUsize,
    taken: AtomicUsize,
    /// Number of answered messages.
    answered: AtomicUsize,
    /// Why the rest of the request is not read.
    refused: OnceLock<Status>,
    /// Woken when another message may be read.
    turn: AtomicWaker,
}

impl Taking {
    /// Longest time that a client may not read.
    const PATIENCE: Duration = Duration::from_mins(1);
    /// The same if other clients need the memory.
    const IMPATIENCE: Duration = Duration::from_secs(5);

    /// The state of the current task's stream.
    pub(super) fn current() -> Arc<Self> {
        TAKING.try_with(Clone::clone).unwrap_or_default()
    }

    /// True if this was the only stream of its connection when it began: such a stream needs no permit.
    pub(super) fn is_only(&self) -> bool {
        self.is_only
    }

    /// True if this stream has a permit, or needs none.
    pub(super) fn has_permit(&self) -> bool {
        self.is_only || self.permit.is_some()
    }

    /// Wraps a piece of the answer, to see when it is sent.
    pub(super) fn piece(self: &Arc<Self>, bytes: Bytes, kept: Option<Arc<Kept>>) -> Bytes {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Bytes::from_owner(Piece { bytes, taking: self.clone(), _kept: kept })
    }

    /// Aborts the stream when other clients need its memory.
    pub(super) fn abort(&self) -> &Arc<Abort> {
        &self.abort
    }

    /// Records that the request was refused while it was being read. A service of the library does not pass this on to
    /// its client.
    pub(super) fn refuse(&self, status: Status) -> Status {
        self.refused.get_or_init(|| status).clone()
    }

    /// Why the request was refused, if it was.
    pub(super) fn refused(&self) -> Option<&Status> {
        self.refused.get()
    }

    /// Records that a message was answered.
    pub(super) fn answered(&self) {
        self.answered.fetch_add(1, Ordering::SeqCst);
        self.turn.wake();
    }

    /// Waits until this many messages have been answered, and the client has read the answers.
    pub(super) fn poll_turn(&self, cx: &mut Context<'_>, messages: usize) -> Poll<()> {
        let is_there = || self.answered.load(Ordering::SeqCst) >= messages && self.waiting.load(Ordering::SeqCst) == 0;
        if is_there() {
            return Poll::Ready(());
        }
        self.turn.register(cx.waker());
        if is_there() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn patience(answers: &Room) -> Duration {
        if answers.is_short() { Self::IMPATIENCE } else { Self::PATIENCE }
    }

    /// Completes when the client has not read waiting data for too long. Poll it after the source of pieces, in the
    /// same task.
    async fn stalled(&self, answers: &Room) {
        struct Watch {
            taken: usize,
            since: Instant,
            look: Pin<Box<Sleep>>,
        }
        let mut watch: Option<Watch> = None;
        poll_fn(|cx| {
            if self.waiting.load(Ordering::SeqCst) == 0 {
                watch = None;
                return Poll::Pending;
            }
            loop {
                let taken = self.taken.load(Ordering::SeqCst);
                let watch = watch.get_or_insert_with(|| Watch {
                    taken,
                    since: Instant::now(),
                    look: Box::pin(sleep(Self::IMPATIENCE)),
                });
                ready!(watch.look.as_mut().poll(cx));
                let now = Instant::now();
                if taken != watch.taken {
                    (watch.taken, watch.since) = (taken, now);
                }
                if now - watch.since >= Self::patience(answers) {
                    tracing::debug!("a stream was aborted: its client does not read");
                    return Poll::Ready(());
                }
                watch.look.as_mut().reset(now + Self::IMPATIENCE);
            }
        })
        .await;
    }
}

/// A piece of an answer. It is dropped when the kernel has it.
struct Piece {
    bytes: Bytes,
    taking: Arc<Taking>,
    /// The memory of the whole answer, which this piece keeps alive.
    _kept: Option<Arc<Kept>>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.taking.taken.fetch_add(1, Ordering::SeqCst);
        if self.taking.waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.taking.turn.wake();
        }
    }
}
