//! Limits the memory for data that peers send, request, or don't read: one limit over everything, and under it one
//! limit for each purpose.
//!
//! Keep a [`Held`] with every value whose size a peer decides, for the reserved bytes rather than for those in use. At
//! its limit, a purpose refuses further data; it never makes another purpose wait.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::Notify;

/// A limit of bytes, and the bytes held under it. Clones share both.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    purpose: &'static str,
    /// The original limit.
    share: usize,
    max: AtomicUsize,
    held: AtomicUsize,
    /// The limit above this one.
    whole: Option<Memory>,
    freed: Notify,
}

/// The purposes, each with its share of the whole: by default the shares add up to the whole, so that one purpose takes
/// nothing from another. A share that the configuration increases is still bounded by the whole.
#[derive(Clone, Debug)]
pub struct Shares {
    /// The limit over all of them.
    pub whole: Memory,
    /// Requests that clients send, while they are being received and read. 3/32.
    pub requests: Memory,
    /// Answers and events on gRPC streams that clients have not read yet. 4/32.
    pub answers: Memory,
    /// Answers and events on the admin address that clients have not read yet. 2/32.
    pub admin: Memory,
    /// Records of the history in memory: cached, read for a page or a watcher, or in answers that are not encoded yet;
    /// and the filters of watchers. 4/32.
    pub history: Memory,
    /// The latest outputs of all subsystems. 8/32.
    pub outputs: Memory,
    /// Inputs in calls to subsystems. 4/32.
    pub inputs: Memory,
    /// Answers of subsystems, while they are being received and decoded, and until the cycle is recorded. 5/32.
    pub replies: Memory,
    /// Registrations, loops, and the last part of each subsystem. 2/32.
    pub registry: Memory,
}

/// Bytes held under a limit. Dropping it releases them.
#[derive(Debug)]
pub struct Held {
    memory: Memory,
    bytes: usize,
}

/// A limit is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Full {
    /// The purpose of the memory.
    pub purpose: &'static str,
    /// The limit, in bytes.
    pub max: usize,
    /// The bytes that were to be held together. More than the limit: they never fit, whatever else is given back.
    pub wanted: usize,
}

impl Memory {
    /// The limit over everything: `max` bytes, none of them held.
    #[must_use]
    pub fn whole(max: usize) -> Self {
        Self::pool("all memory", max, None)
    }

    /// A limit for one purpose, under this one. The purpose completes the phrase "the limit of 1 MiB for".
    #[must_use]
    pub fn part(&self, purpose: &'static str, max: usize) -> Self {
        Self::pool(purpose, max, Some(self.clone()))
    }

    fn pool(purpose: &'static str, max: usize, whole: Option<Self>) -> Self {
        let (share, max, held) = (max, AtomicUsize::new(max), AtomicUsize::new(0));
        Self(Arc::new(Pool { purpose, share, max, held, whole, freed: Notify::new() }))
    }

    /// The purpose of the memory.
    pub fn purpose(&self) -> &'static str {
        self.0.purpose
    }

    /// The limit, in bytes.
    pub fn max(&self) -> usize {
        self.0.max.load(Ordering::Relaxed)
    }

    /// Changes the limit; `None` restores the original limit. Bytes that are already held stay, even over the limit.
    pub fn set_max(&self, max: Option<usize>) {
        self.0.max.store(max.unwrap_or(self.0.share), Ordering::Relaxed);
        self.0.freed.notify_waiters();
    }

    /// Bytes that are held now.
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }

    /// Holds `bytes`.
    ///
    /// # Errors
    /// They don't fit under this limit, or under one above it.
    pub fn try_hold(&self, bytes: usize) -> Result<Held, Full> {
        self.add(bytes).map_err(|full| full.full(bytes))?;
        Ok(Held { memory: self.clone(), bytes })
    }

    /// Holds `bytes` even over the limit: for data that was kept before the limit was lowered and must not be lost.
    pub fn hold_beyond(&self, bytes: usize) -> Held {
        let pools = std::iter::successors(Some(self), |memory| memory.0.whole.as_ref());
        for memory in pools {
            memory.0.held.fetch_add(bytes, Ordering::Relaxed);
        }
        Held { memory: self.clone(), bytes }
    }

    /// Waits until `bytes` fit, and holds them. Waits forever if they are more than the limit: limit the wait, or the
    /// bytes.
    pub async fn hold(&self, bytes: usize) -> Held {
        while let Err(full) = self.add(bytes) {
            // Only a release under the reached limit helps: other limits have releases all the time.
            let freed = full.0.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            // Tried again, since a release in between would be missed.
            match self.add(bytes) {
                Ok(()) => break,
                Err(still) if std::ptr::eq(still, full) => freed.await,
                Err(_) => {}
            }
        }
        Held { memory: self.clone(), bytes }
    }

    /// Fails with the reached limit: this one or one above it.
    fn add(&self, bytes: usize) -> Result<(), &Self> {
        let max = self.max();
        let fits = |held: usize| held.checked_add(bytes).filter(|held| *held <= max);
        if self.0.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            return Err(self);
        }
        if let Some(whole) = &self.0.whole
            && let Err(full) = whole.add(bytes)
        {
            self.0.held.fetch_sub(bytes, Ordering::Relaxed);
            // The temporary reservation may have refused others meanwhile.
            self.0.freed.notify_waiters();
            return Err(full);
        }
        Ok(())
    }

    fn full(&self, wanted: usize) -> Full {
        Full { purpose: self.purpose(), max: self.max(), wanted }
    }

    fn give_back(&self, bytes: usize) {
        self.0.held.fetch_sub(bytes, Ordering::Relaxed);
        self.0.freed.notify_waiters();
        if let Some(whole) = &self.0.whole {
            whole.give_back(bytes);
        }
    }
}

impl Shares {
    /// The shares of `max` bytes.
    #[must_use]
    pub fn of(max: usize) -> Self {
        let whole = Memory::whole(max);
        let share = |purpose, parts| whole.part(purpose, max / 32 * parts);
        Self {
            requests: share("requests that are being received", 3),
            answers: share("answers that clients have not taken yet", 4),
            admin: share("answers that the admin address's clients have not taken yet", 2),
            history: share("records of the history", 4),
            outputs: share("the latest outputs", 8),
            inputs: share("inputs in calls to subsystems", 4),
            replies: share("answers of subsystems", 5),
            registry: share("registrations and loops", 2),
            whole,
        }
    }

    /// Each purpose with its name, without the whole.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Memory)> {
        let Self { whole: _, requests, answers, admin, history, outputs, inputs, replies, registry } = self;
        [
            ("requests", requests),
            ("answers", answers),
            ("admin", admin),
            ("history", history),
            ("outputs", outputs),
            ("inputs", inputs),
            ("replies", replies),
            ("registry", registry),
        ]
        .into_iter()
    }
}

/// Most bytes of memory that this process may use: the memory of the machine, or the limit of the process's memory
/// group (cgroup, of either version), if that is less. `None` if neither is known.
///
/// <https://docs.kernel.org/admin-guide/cgroup-v2.html>
#[must_use]
pub fn allowed() -> Option<usize> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| {
        let kibibytes = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        kibibytes.trim().trim_end_matches(" kB").parse::<usize>().ok()?.checked_mul(1 << 10)
    });
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    limits_of(&groups).filter_map(|path| read(&path)?.trim().parse().ok()).chain(machine).min()
}

/// The files with the limits of all groups of this process. In a container, paths may be those of the machine, of which
/// only the root exists.
fn limits_of(groups: &str) -> impl Iterator<Item = PathBuf> {
    groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let place = match controllers {
            "" => Some(("/sys/fs/cgroup", "memory.max")),
            _ if controllers.split(',').any(|it| it == "memory") => {
                Some(("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))
            }
            _ => None,
        };
        let own = Path::new(path.trim_start_matches('/'));
        let each = move |(mount, file): (&str, &str)| {
            own.ancestors().map(|group| Path::new(mount).join(group).join(file)).collect::<Vec<_>>()
        };
        place.map(each).unwrap_or_default()
    })
}

impl Held {
    /// The bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Changes the number of held bytes to `bytes`.
    ///
    /// # Errors
    /// They are more than before, and don't fit. The number is unchanged then.
    pub fn resize(&mut self, bytes: usize) -> Result<(), Full> {
        match bytes.checked_sub(self.bytes) {
            // After the limit was lowered, held bytes may be over it, and stay.
            Some(0) => {}
            Some(more) => self.memory.add(more).map_err(|full| full.full(bytes))?,
            None => self.memory.give_back(self.bytes - bytes),
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Holds `more` bytes in addition.
    ///
    /// # Errors
    /// They don't fit. The number is unchanged then.
    pub fn grow(&mut self, more: usize) -> Result<(), Full> {
        self.resize(self.bytes.saturating_add(more))
    }
}

impl Held {
    /// Splits off this many bytes, or all if there are fewer.
    #[must_use]
    pub fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { memory: self.memory.clone(), bytes }
    }

    /// Attaches the held memory to these bytes, until the last reference to any part of them is dropped.
    #[must_use]
    pub fn around(self, bytes: Bytes) -> Bytes {
        struct Owner(Bytes, #[allow(dead_code, reason = "it is held")] Held);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        Bytes::from_owner(Owner(bytes, self))
    }
}

impl Full {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        if self.wanted > self.max { "send or ask for less, or raise the limit" } else { "try again later" }
    }
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { purpose, max, wanted } = self;
        if wanted > max {
            write!(f, "{wanted} bytes of memory are needed, more than the limit of {} for {purpose}", Size(*max))
        } else {
            write!(f, "the limit of {} for {purpose} is reached", Size(*max))
        }
    }
}

impl std::error::Error for Full {}

impl Drop for Held {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.memory.give_back(self.bytes);
        }
    }
}

/// A number of bytes in the largest unit that it reaches, rounded down.
struct Size(usize);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 => write!(f, "{} MiB", bytes >> 20),
            bytes if bytes >= 1 << 10 => write!(f, "{} KiB", bytes >> 10),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Wake},
    };

    use super::*;

    #[test]
    fn a_part_is_bounded_by_its_own_limit_and_by_the_whole() {
        let whole = Memory::whole(100);
        let (requests, answers) = (whole.part("requests", 80), whole.part("answers", 80));
        let held = requests.try_hold(60).unwrap();
        assert_eq!(requests.try_hold(30).unwrap_err().to_string(), "the limit of 80 bytes for requests is reached");
        assert_eq!(answers.try_hold(60).unwrap_err(), Full { purpose: "all memory", max: 100, wanted: 60 });
        let never = requests.try_hold(81).unwrap_err();
        assert_eq!(never.to_string(), "81 bytes of memory are needed, more than the limit of 80 bytes for requests");
        assert_ne!(never.remedy(), requests.try_hold(30).unwrap_err().remedy());
        assert_eq!((requests.held(), answers.held(), whole.held()), (60, 0, 60));
        drop(held);
        assert_eq!((requests.held(), whole.held()), (0, 0));
        assert!(answers.try_hold(usize::MAX).is_err());
    }

    #[test]
    fn the_shares_add_up_to_the_whole() {
        let shares = Shares::of(1 << 30);
        assert_eq!(shares.iter().map(|(_, share)| share.max()).sum::<usize>(), shares.whole.max());
    }

    #[test]
    fn the_limits_of_memory_groups_are_found() {
        let of = |groups| limits_of(groups).map(|path| path.display().to_string()).collect::<Vec<_>>();
        let second = ["/sys/fs/cgroup/a/b/memory.max", "/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/memory.max"];
        assert_eq!(of("0::/a/b\n"), second);
        let first = "/sys/fs/cgroup/memory/a/memory.limit_in_bytes";
        assert_eq!(of("3:cpu:/x\n2:hugetlb,memory:/a\n"), [first, "/sys/fs/cgroup/memory/memory.limit_in_bytes"]);
        assert!(of("1:name=systemd:/").is_empty() && of("").is_empty());
        #[cfg(target_os = "linux")]
        assert!(allowed().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn held_memory_grows_and_shrinks() {
        let memory = Memory::whole(10).part("outputs", 10);
        let mut held = memory.try_hold(4).unwrap();
        assert!(held.grow(7).is_err());
        held.resize(10).unwrap();
        held.resize(1).unwrap();
        assert_eq!((held.bytes(), memory.held()), (1, 1));
        // A lowered limit refuses more, but releases nothing.
        memory.set_max(Some(0));
        assert!(held.grow(1).is_err());
        held.resize(1).unwrap();
        memory.set_max(None);
        held.resize(10).unwrap();
        held.resize(1).unwrap();
        let beyond = memory.hold_beyond(20);
        assert_eq!((memory.held(), memory.0.whole.as_ref().unwrap().held()), (21, 21));
        drop((held, beyond));
        assert_eq!((memory.held(), memory.0.whole.as_ref().unwrap().held()), (0, 0));
    }

    #[test]
    fn bytes_hold_their_memory_while_any_of_them_is_kept() {
        let memory = Memory::whole(10).part("history", 10);
        let mut held = memory.try_hold(10).unwrap();
        let mut bytes = held.split(6).around(Bytes::from_static(b"record"));
        drop(held);
        assert_eq!(memory.held(), 6);
        let rest = bytes.split_off(3);
        drop(bytes);
        assert_eq!((&rest[..], memory.held()), (&b"ord"[..], 6));
        drop(rest);
        assert_eq!(memory.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_when_the_part_and_the_whole_have_enough_memory() {
        let whole = Memory::whole(10);
        let (requests, answers) = (whole.part("requests", 10), whole.part("answers", 10));
        let mut others = answers.try_hold(8).unwrap();
        let waiting = tokio::spawn({
            let requests = requests.clone();
            async move { requests.hold(5).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        others.resize(5).unwrap();
        assert_eq!(waiting.await.unwrap().bytes(), 5);
    }

    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_wait_for_one_limit_is_not_woken_by_others() {
        let whole = Memory::whole(100);
        let (requests, answers) = (whole.part("requests", 10), whole.part("answers", 10));
        let held = answers.try_hold(10).unwrap();
        let woken = Arc::new(Woken(AtomicUsize::new(0)));
        let waker = Arc::clone(&woken).into();
        let cx = &mut Context::from_waker(&waker);
        let mut waiting = pin!(answers.hold(5));
        assert!(waiting.as_mut().poll(cx).is_pending());
        drop(requests.try_hold(5).unwrap());
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        drop(held);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(waiting.as_mut().poll(cx).is_ready());
    }
}
