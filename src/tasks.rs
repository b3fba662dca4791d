//! The tasks that run as long as the service: each has a name and a purpose, they are owned together, and the end of
//! each is detected.

use std::{any::Any, collections::HashMap, convert::Infallible, fmt::Display, future::pending, panic::resume_unwind};

use tokio::task::{Id, JoinError, JoinSet};

/// The description of a task in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its name, for example "the gRPC server".
    pub name: &'static str,
    /// Its purpose, for example "answers callers".
    pub purpose: &'static str,
}

/// Tasks that run until they are stopped. The end of a task before that would otherwise go unnoticed.
#[derive(Debug, Default)]
pub struct Tasks {
    running: JoinSet<Result<(), String>>,
    by_id: HashMap<Id, Task>,
}

/// A task has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}, which {purpose}, has ended: {why}", name = .task.name, purpose = .task.purpose)]
pub struct TaskEnded {
    /// The task that has ended.
    pub task: Task,
    /// The reason: its error, or the message of its panic.
    pub why: String,
}

impl Tasks {
    /// Starts a task, which does this work.
    pub fn start<E: Display>(&mut self, task: Task, work: impl Future<Output = Result<(), E>> + Send + 'static) {
        let started = self.running.spawn(async move { work.await.map_err(|error| error.to_string()) });
        self.by_id.insert(started.id(), task);
    }

    /// Starts a task whose work can't fail.
    pub fn start_infallible(&mut self, task: Task, work: impl Future<Output = ()> + Send + 'static) {
        self.start(task, async {
            work.await;
            Ok::<_, Infallible>(())
        });
    }

    /// Waits until one of them ends; forever if there are none. Cancel safe.
    pub async fn next_ended(&mut self) -> TaskEnded {
        match self.running.join_next_with_id().await {
            Some(Ok((id, result))) => self.ended(id, result.err().unwrap_or_else(|| "it returned".to_owned())),
            Some(Err(error)) => self.ended(error.id(), why(error)),
            None => pending().await,
        }
    }

    fn ended(&mut self, id: Id, why: String) -> TaskEnded {
        /// Each id is entered when its task starts.
        const UNKNOWN: Task = Task { name: "a task", purpose: "is not known" };
        TaskEnded { task: self.by_id.remove(&id).unwrap_or(UNKNOWN), why }
    }

    /// Waits until all of them have ended, after they were stopped. Failures are logged.
    pub async fn all_ended(&mut self) {
        while let Some(ended) = self.running.join_next_with_id().await {
            let (id, why) = match ended {
                Ok((_, Ok(()))) => continue,
                Ok((id, Err(error))) => (id, error),
                Err(error) => (error.id(), why(error)),
            };
            let ended = self.ended(id, why);
            ended.log("a task failed while it ended");
        }
    }

    /// Ends all of them at once.
    pub fn abort(&mut self) {
        self.running.abort_all();
    }
}

impl TaskEnded {
    /// The end of a task that was joined.
    pub fn of(task: Task, error: JoinError) -> Self {
        Self { task, why: why(error) }
    }

    /// Logs it as an error, with the consequence as the message.
    pub fn log(&self, message: &str) {
        let Self { task: Task { name, purpose }, why } = self;
        tracing::error!(task = name, purpose, why, "{message}");
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
        Ok(panic) => format!("it panicked: {}", panic_message(&*panic)),
        Err(error) => error.to_string(),
    }
}

/// The message of a panic, if it is a string.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    const GRPC: Task = Task { name: "the gRPC server", purpose: "answers calls" };
    const ADMIN: Task = Task { name: "the admin server", purpose: "serves the dashboard" };

    fn lasting() -> impl Future<Output = Result<(), Infallible>> {
        pending()
    }

    #[tokio::test]
    async fn the_end_of_a_task_is_reported_with_its_name_and_reason() {
        let fails = || async {
            tokio::task::yield_now().await;
            let lucky = false;
            assert!(lucky, "out of {}", "luck");
            Ok::<_, Infallible>(())
        };
        for (expected, end) in [("it returned", 0), ("no port", 1), ("it panicked: out of luck", 2)] {
            let mut tasks = Tasks::default();
            tasks.start(GRPC, lasting());
            match end {
                0 => tasks.start(ADMIN, ready(Ok::<_, Infallible>(()))),
                1 => tasks.start(ADMIN, ready(Err("no port"))),
                _ => tasks.start(ADMIN, fails()),
            }
            let ended = tasks.next_ended().await;
            assert_eq!(ended, TaskEnded { task: ADMIN, why: expected.to_owned() });
            assert_eq!(
                ended.to_string(),
                format!("the admin server, which serves the dashboard, has ended: {expected}")
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_end_is_reported_while_tasks_run() {
        let mut tasks = Tasks::default();
        tasks.start(GRPC, lasting());
        let patience = std::time::Duration::from_hours(1);
        assert!(tokio::time::timeout(patience, tasks.next_ended()).await.is_err());
        assert!(tokio::time::timeout(patience, Tasks::default().next_ended()).await.is_err());
        tasks.abort();
        tasks.all_ended().await;
    }
}
