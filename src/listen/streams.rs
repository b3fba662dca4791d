//! The streams of HTTP/2 connections: each is a task that its connection owns, and one whose client takes nothing of its
//! answer is ended alone.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use tokio::{
    select,
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task_local,
    time::{Instant, Sleep, interval, sleep},
};
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::{
    connections::Place,
    rooms::{Kept, Room},
};

task_local! {
    /// That of the stream whose task this is. The library makes the task, and tells a body nothing of what became of what it
    /// gave.
    static TAKING: Arc<Taking>;
}

/// Runs the streams of one connection.
#[derive(Clone)]
pub(super) struct Streams {
    pub(super) place: Arc<Place>,
    /// For the streams of all connections.
    pub(super) places: Arc<Semaphore>,
    pub(super) answers: Arc<Room>,
    pub(super) ends: Arc<Ends>,
    pub(super) tasks: TaskTracker,
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        // It ends with its connection: the library tells it.
        self.tasks.spawn(self.clone().run(stream));
    }
}

impl Streams {
    async fn run(self, stream: impl Future<Output = ()>) {
        let busy = self.place.busy();
        // One stream of each connection always has a place: others can't keep a client out that asks for little.
        let place = self.places.try_acquire_owned().ok();
        let taking = Arc::new(Taking {
            has_place: busy.is_only() || place.is_some(),
            _place: place,
            connection: Some(self.place.clone()),
            ..Taking::default()
        });
        select! {
            biased;
            () = TAKING.scope(taking.clone(), stream) => {
                self.ends.note(&taking);
                taking.is_over.store(true, Ordering::SeqCst);
            }
            // That it is dropped resets the stream.
            () = taking.stalled(&self.answers) => {}
            () = taking.gives_way.notified() => {
                tracing::debug!("a stream has ended: its client is slow, and others need the memory");
                // A piece may be on its way, and must not stay there.
                self.ends.note(&taking);
                if self.place.is_stalled() {
                    self.place.cut_off();
                }
            }
        }
    }

    /// Ends when the client has left the end of an answer for too long.
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

/// The ends of answers on one connection that their clients have not taken, as far as is known, and since when. Their streams
/// are over: nobody can reset them any more. No client that works leaves one.
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
        // Most are taken at once. It grows no further than twice what is not.
        if ends.len() == ends.capacity() {
            ends.retain(Self::is_there);
            let room = ends.len().max(16);
            ends.reserve(room);
        }
        ends.push((Instant::now(), Arc::downgrade(taking)));
    }
}

/// How far a client has taken what it is answered on one stream.
#[derive(Debug, Default)]
pub(super) struct Taking {
    has_place: bool,
    /// One of those that the streams of all connections have together.
    _place: Option<OwnedSemaphorePermit>,
    connection: Option<Arc<Place>>,
    /// All is given to the library.
    is_over: AtomicBool,
    /// Told when its memory is needed by others.
    gives_way: Notify,
    /// Pieces that the library has been given and the kernel has not.
    waiting: AtomicUsize,
    taken: AtomicUsize,
    /// Messages that have been answered.
    answered: AtomicUsize,
    /// Why the rest of the request is not read.
    refused: OnceLock<Status>,
    /// Woken when a further message may be read.
    turn: AtomicWaker,
}

impl Taking {
    /// How long a client may take nothing.
    const PATIENCE: Duration = Duration::from_mins(1);
    /// How long it may when others need the memory.
    const IMPATIENCE: Duration = Duration::from_secs(5);

    /// That of the stream whose task this is.
    pub(super) fn current() -> Arc<Self> {
        TAKING.try_with(Clone::clone).unwrap_or_default()
    }

    /// Whether there was room for this stream.
    pub(super) fn has_place(&self) -> bool {
        self.has_place
    }

    /// A piece of the answer, on its way to the client.
    pub(super) fn piece(self: &Arc<Self>, bytes: Bytes, kept: Option<Arc<Kept>>) -> Bytes {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Bytes::from_owner(Piece { bytes, taking: self.clone(), _kept: kept })
    }

    /// Ends the stream, or if that is over, the connection on which its end is left.
    pub(super) fn give_way(&self) {
        self.gives_way.notify_one();
        if let Some(connection) = self.connection.as_ref().filter(|_| self.is_over.load(Ordering::SeqCst)) {
            connection.cut_off();
        }
    }

    /// Notes that the request was refused while it was being read. A service of the library tells its clients nothing of it.
    pub(super) fn refuse(&self, status: Status) -> Status {
        self.refused.get_or_init(|| status).clone()
    }

    /// Why the request was refused, if it was.
    pub(super) fn refused(&self) -> Option<&Status> {
        self.refused.get()
    }

    /// Notes that a message has been answered.
    pub(super) fn answered(&self) {
        self.answered.fetch_add(1, Ordering::SeqCst);
        self.turn.wake();
    }

    /// Whether it has been told to give way.
    #[cfg(test)]
    pub(super) fn gives_way(&self) -> bool {
        futures_util::FutureExt::now_or_never(self.gives_way.notified()).is_some()
    }

    /// Waits until so many messages have been answered, and the client has taken the answers.
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

    /// Ends when the client has taken nothing for too long of what waits for it. It is to be polled after what gives
    /// pieces, by the same task.
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
                    tracing::debug!("a stream has ended: its client takes nothing");
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
    /// The room of the whole answer, whose bytes this one keeps.
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
