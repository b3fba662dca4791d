//! The parts of the running service: tasks with a name and a purpose, which are owned together, and whose end is
//! detected.

use std::{any::Any, collections::HashMap, convert::Infallible, fmt::Display, future::pending, panic::resume_unwind};

use tokio::task::{Id, JoinError, JoinSet};

/// The description of a part in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name, for example "the gRPC server".
    pub name: &'static str,
    /// Its purpose, for example "answers callers".
    pub purpose: &'static str,
}

/// Tasks that run until they are stopped. The end of a task before that would otherwise go unnoticed.
#[derive(Debug, Default)]
pub struct Parts {
    tasks: JoinSet<Result<(), String>>,
    parts: HashMap<Id, Part>,
}

/// A part has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}, which {purpose}, has ended: {why}", name = .part.name, purpose = .part.purpose)]
pub struct Ended {
    /// The task that has ended.
    pub part: Part,
    /// The reason: its error, or the message of its panic.
    pub why: String,
}

impl Parts {
    /// Starts a part.
    pub fn start<E: Display>(&mut self, part: Part, task: impl Future<Output = Result<(), E>> + Send + 'static) {
        let task = self.tasks.spawn(async move { task.await.map_err(|error| error.to_string()) });
        self.parts.insert(task.id(), part);
    }

    /// Starts a part that can't fail.
    pub fn start_infallible(&mut self, part: Part, task: impl Future<Output = ()> + Send + 'static) {
        self.start(part, async {
            task.await;
            Ok::<_, Infallible>(())
        });
    }

    /// Waits until one of them ends; forever if there are no parts. Cancel safe.
    pub async fn next_ended(&mut self) -> Ended {
        match self.tasks.join_next_with_id().await {
            Some(Ok((id, result))) => self.ended(id, result.err().unwrap_or_else(|| "it returned".to_owned())),
            Some(Err(error)) => self.ended(error.id(), why(error)),
            None => pending().await,
        }
    }

    fn ended(&mut self, id: Id, why: String) -> Ended {
        /// Each task is started as a part.
        const UNKNOWN: Part = Part { name: "a part", purpose: "is not known" };
        Ended { part: self.parts.remove(&id).unwrap_or(UNKNOWN), why }
    }

    /// Waits until all of them have ended, after they were stopped. Failures are logged.
    pub async fn all_ended(&mut self) {
        while let Some(ended) = self.tasks.join_next_with_id().await {
            let (id, why) = match ended {
                Ok((_, Ok(()))) => continue,
                Ok((id, Err(error))) => (id, error),
                Err(error) => (error.id(), why(error)),
            };
            let ended = self.ended(id, why);
            ended.log("a part failed while it ended");
        }
    }

    /// Ends all of them at once.
    pub fn abort(&mut self) {
        self.tasks.abort_all();
    }
}

impl Ended {
    /// The end of a task that was joined.
    pub fn of(part: Part, error: JoinError) -> Self {
        Self { part, why: why(error) }
    }

    /// Logs it as an error, with the consequence as the message.
    pub fn log(&self, message: &str) {
        let Self { part: Part { name, purpose }, why } = self;
        tracing::error!(part = name, purpose, why, "{message}");
    }
}

/// The result of a task that was joined. A panic of the task continues here; `None` if the task was aborted, as all are
/// when the runtime shuts down.
pub fn joined<T>(result: Result<T, JoinError>) -> Option<T> {
    match result {
        Ok(done) => Some(done),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_aborted) => None,
        },
    }
}

fn why(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => format!("it panicked: {}", message(&*panic)),
        Err(error) => error.to_string(),
    }
}

/// The message of a panic, if it is a string.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    const GRPC: Part = Part { name: "the gRPC server", purpose: "answers calls" };
    const ADMIN: Part = Part { name: "the admin server", purpose: "serves the dashboard" };

    fn lasting() -> impl Future<Output = Result<(), Infallible>> {
        pending()
    }

    #[tokio::test]
    async fn the_end_of_a_part_is_reported_with_its_name_and_reason() {
        let fails = || async {
            tokio::task::yield_now().await;
            let lucky = false;
            assert!(lucky, "out of {}", "luck");
            Ok::<_, Infallible>(())
        };
        for (expected, end) in [("it returned", 0), ("no port", 1), ("it panicked: out of luck", 2)] {
            let mut parts = Parts::default();
            parts.start(GRPC, lasting());
            match end {
                0 => parts.start(ADMIN, ready(Ok::<_, Infallible>(()))),
                1 => parts.start(ADMIN, ready(Err("no port"))),
                _ => parts.start(ADMIN, fails()),
            }
            let ended = parts.next_ended().await;
            assert_eq!(ended, Ended { part: ADMIN, why: expected.to_owned() });
            assert_eq!(
                ended.to_string(),
                format!("the admin server, which serves the dashboard, has ended: {expected}")
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn parts_that_go_on_are_waited_for() {
        let mut parts = Parts::default();
        parts.start(GRPC, lasting());
        let patience = std::time::Duration::from_hours(1);
        assert!(tokio::time::timeout(patience, parts.next_ended()).await.is_err());
        assert!(tokio::time::timeout(patience, Parts::default().next_ended()).await.is_err());
        parts.abort();
        parts.all_ended().await;
    }
}
