//! Writes the log to stderr. Logging never waits for the reader: a thread writes, and lines that it can't write in time
//! are dropped and counted.

use std::{
    io::{self, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

use crate::model::text::{escape_json, escape_text, is_unprintable};

/// Most bytes of queued lines, while at most as many are being written: some thousands of lines, which is the log of
/// minutes, or of a second at the most detailed level.
const MAX_WAITING: usize = 1 << 20;
/// Longest wait at the end of the process for the last lines.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Number of dropped lines of this process.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Number of lines of the log that were dropped since this process started.
pub(super) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Queues lines for a thread that writes them. Clones share the thread.
#[derive(Clone, Debug)]
pub(super) struct Writer(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    is_writing: bool,
    /// Number of dropped lines that are not yet reported in the log.
    untold: u64,
}

impl Writer {
    /// Starts the thread, which writes to `out`, and calls `tell` with the number of dropped lines once there is room
    /// again.
    ///
    /// # Errors
    /// The thread can't be started.
    pub(super) fn start(out: impl Write + Send + 'static, tell: fn(u64)) -> io::Result<Self> {
        let writer = Self(Arc::default());
        let queue = writer.0.clone();
        // It ends with the process: nothing can interrupt a write.
        thread::Builder::new().name("log".into()).spawn(move || queue.write_to(out, tell))?;
        Ok(writer)
    }

    /// Waits until everything is written, for at most a moment.
    pub(super) fn flush(&self) {
        let waiting = self.0.waiting();
        let goes_on = |waiting: &mut Waiting| waiting.is_writing || !waiting.lines.is_empty();
        drop(self.0.changed.wait_timeout_while(waiting, LAST_LINES, goes_on));
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.lines.len() + line.len() > MAX_WAITING {
            waiting.untold += 1;
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.lines.extend_from_slice(line);
        drop(waiting);
        self.changed.notify_all();
    }

    fn write_to(&self, mut out: impl Write, tell: fn(u64)) {
        let mut can_write = false;
        loop {
            let (lines, untold) = {
                let idle = |waiting: &mut Waiting| waiting.lines.is_empty();
                let waiting = self.changed.wait_while(self.waiting(), idle);
                let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
                waiting.is_writing = true;
                let untold = if can_write { std::mem::take(&mut waiting.untold) } else { 0 };
                (std::mem::take(&mut waiting.lines), untold)
            };
            if untold > 0 {
                // This logs: after the lines that were queued before the dropped ones.
                tell(untold);
            }
            let unwritten = write(&mut out, &lines);
            can_write = unwritten == 0;
            let mut waiting = self.waiting();
            waiting.untold += unwritten;
            DROPPED.fetch_add(unwritten, Ordering::Relaxed);
            waiting.is_writing = false;
            drop(waiting);
            self.changed.notify_all();
        }
    }
}

/// Writes lines, and returns the number of lines that could not be written: the disk is full, or the reader has closed.
fn write(out: &mut impl Write, mut lines: &[u8]) -> u64 {
    /// Pause if stderr is non-blocking, because another process shares it and has made it so.
    const PAUSE: Duration = Duration::from_millis(10);
    while !lines.is_empty() {
        match out.write(lines) {
            Ok(written) if written > 0 => lines = &lines[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            #[expect(clippy::disallowed_methods, reason = "this thread is not one of tokio's, and has no other work")]
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Ok(_) | Err(_) => return lines.split_inclusive(|byte| *byte == b'\n').count() as u64,
        }
    }
    0
}

impl Write for &Writer {
    /// Receives one line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

/// Makes each entry one line of printable text, whatever values from outside it contains.
pub(super) struct Printable<W> {
    pub(super) inner: W,
    pub(super) as_json: bool,
    /// True if colour commands are kept, which only the formatter writes.
    pub(super) colour: bool,
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Printable<W> {
    type Writer = Printable<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Printable { inner: self.inner.make_writer(), as_json: self.as_json, colour: self.colour }
    }
}

impl<W: Write> Write for Printable<W> {
    /// Receives one line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let printable = if self.as_json {
            escape_json(text)
        } else {
            escape_text(text, |c| is_unprintable(c) && !(self.colour && c == '\u{1b}'))
        };
        self.inner.write_all(format!("{printable}\n").as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, SyncSender};

    use super::*;

    /// Reads the written lines only on request.
    struct Slow(SyncSender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Slow, Receiver<Vec<u8>>) {
        let (tx, rx) = mpsc::sync_channel(0);
        (Slow(tx), rx)
    }

    #[test]
    fn unread_lines_are_dropped_and_reported_once_the_queue_has_space() {
        static TOLD: AtomicU64 = AtomicU64::new(0);
        let (out, written) = slow();
        let writer = Writer::start(out, |lines| _ = TOLD.fetch_add(lines, Ordering::Relaxed)).unwrap();
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        (&writer).write_all(&line).unwrap();
        // Once this is being written, the queue is empty again.
        while writer.0.waiting().lines.len() == line.len() {
            thread::yield_now();
        }
        for _ in 0..MAX_WAITING / line.len() + 7 {
            (&writer).write_all(&line).unwrap();
        }
        writer.flush();
        assert_eq!((writer.0.waiting().untold, TOLD.load(Ordering::Relaxed)), (7, 0));
        assert_eq!(written.recv().unwrap().len(), line.len());
        assert_eq!(written.recv().unwrap().len(), MAX_WAITING);
        assert_eq!(TOLD.load(Ordering::Relaxed), 7);
        writer.flush();
        assert!(writer.0.waiting().lines.is_empty());
    }

    #[test]
    fn lines_that_can_not_be_written_are_counted() {
        let (out, written) = slow();
        drop(written);
        let writer = Writer::start(out, |_| panic!("nobody could read it")).unwrap();
        (&writer).write_all(b"one\n").unwrap();
        writer.flush();
        (&writer).write_all(b"two\n").unwrap();
        writer.flush();
        assert_eq!(writer.0.waiting().untold, 2);
    }
}
