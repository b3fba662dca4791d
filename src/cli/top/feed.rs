//! The source of news: one task follows the stream, another one polls data that is not in the stream.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Status};

use super::{
    super::{
        Exit, Failure,
        output::{clean, telemetry},
        remote::{Client, Remote},
        watch::Events,
    },
    model::{KEPT_CYCLES, News, Subject},
};
use crate::proto::orchestrator::v1::{self as pb, cycle_event::Event};

/// Capacity of the queue of news: small, since one entry may be the record of a large cycle. Further news waits in the
/// service.
const BACKLOG: usize = 8;

/// The task that delivers news. It ends when this is dropped.
pub(super) struct Feed {
    news: mpsc::Receiver<News>,
    wants: watch::Sender<Option<Subject>>,
    task: JoinSet<Ended>,
}

impl Feed {
    /// Starts connecting to the service and following it.
    pub(super) fn open(remote: Remote) -> Self {
        let (sender, news) = mpsc::channel(BACKLOG);
        let (wants, wanted) = watch::channel(None);
        let mut task = JoinSet::new();
        task.spawn(bring(remote, wanted, sender));
        Self { news, wants, task }
    }

    /// The next news.
    ///
    /// # Errors
    /// The service can't be reached at first, or refuses.
    pub(super) async fn next(&mut self) -> Result<News, Failure> {
        let defect = || Failure::new(Exit::Refused, "the task that follows the service has ended; this is a defect");
        tokio::select! {
            Some(news) = self.news.recv() => Ok(news),
            Some(ended) = self.task.join_next() => match ended {
                Ok(Ended::Failed(failure)) => Err(failure),
                Ok(Ended::Closed) | Err(_) => Err(defect()),
            },
            else => Err(defect()),
        }
    }

    /// From now on, also polls this.
    pub(super) fn want(&self, subject: Option<&Subject>) {
        self.wants.send_if_modified(|wants| {
            let changes = wants.as_ref() != subject;
            if changes {
                *wants = subject.cloned();
            }
            changes
        });
    }
}

/// Why a task ends.
enum Ended {
    /// The receiver of news was dropped.
    Closed,
    /// The service can't be reached, or refuses.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

async fn tell(news: &mpsc::Sender<News>, what: News) -> Result<(), Ended> {
    news.send(what).await.map_err(|_| Ended::Closed)
}

/// Connects to the service, and then delivers news until the receiver is dropped.
async fn bring(remote: Remote, wanted: watch::Receiver<Option<Subject>>, news: mpsc::Sender<News>) -> Ended {
    let (client, events) = match open(&remote).await {
        Ok(opened) => opened,
        Err(failure) => return failure.into(),
    };
    tokio::select! {
        ended = follow(remote.clone(), client.clone(), events, news.clone()) => ended,
        ended = ask(remote.clone(), client, wanted, news) => ended,
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The stream

/// Connects, and opens the stream after the newest record.
async fn open(remote: &Remote) -> Result<(Client, Events), Failure> {
    let mut client = remote.connect().await?;
    let status = remote.quickly(client.get_status(pb::GetStatusRequest::default())).await?.into_inner();
    let newest = status.status.map_or(0, |status| status.newest_revision);
    let request =
        pb::WatchCyclesRequest { after_revision: Some(newest), progress: true, ..pb::WatchCyclesRequest::default() };
    Ok((client, Events::open(remote, request, None).await?))
}

/// Follows the stream until the receiver of news is dropped.
async fn follow(remote: Remote, mut client: Client, mut events: Events, news: mpsc::Sender<News>) -> Ended {
    /// Pause after a refusal, whose cause does not pass at once.
    const PAUSE: Duration = Duration::from_secs(3);
    loop {
        let mut ended = forward(&remote, &mut client, &mut events, &news).await;
        // Required records were removed, or this is another database, or there are too many watchers: start again.
        (client, events) = loop {
            let Err(Ended::Failed(failure)) = ended else { return Ended::Closed };
            if let Err(closed) = tell(&news, News::Lost(first_line(&failure))).await {
                return closed;
            }
            sleep(PAUSE).await;
            match open(&remote).await {
                Ok(opened) => break opened,
                Err(again) => ended = Err(again.into()),
            }
        };
        if let Err(closed) = tell(&news, News::Forget).await {
            return closed;
        }
    }
}

/// Delivers the latest history, and then the stream until it fails.
async fn forward(
    remote: &Remote,
    client: &mut Client,
    events: &mut Events,
    news: &mpsc::Sender<News>,
) -> Result<Infallible, Ended> {
    for cycle in history(remote, client).await?.into_iter().rev() {
        tell(news, cycle).await?;
    }
    loop {
        // Only the latest note counts, and a note that is dropped here is soon replaced.
        let event = events.next(|note| _ = news.try_send(News::Lost(note.to_owned()))).await?;
        let what = match event.event {
            Some(Event::Recorded(record)) => News::Recorded(Box::new(telemetry(&record)?)),
            Some(Event::Started(started)) => News::Started(started),
            Some(Event::Progress(progress)) => News::Progress(progress),
            Some(Event::Unreadable(cycle)) => News::Unreadable(cycle),
            Some(Event::Bookmark(_)) | None => News::CaughtUp,
        };
        tell(news, what).await?;
    }
}

/// The latest cycles, the newest first; in each page, unreadable records come last.
async fn history(remote: &Remote, client: &mut Client) -> Result<Vec<News>, Failure> {
    /// A page has at most 3 MiB, which is only a few cycles of a large fleet, but enough for a start.
    const PAGES: usize = 4;
    let mut cycles = Vec::new();
    let mut request = pb::ListCyclesRequest { page_size: 250, ..pb::ListCyclesRequest::default() };
    for _ in 0..PAGES {
        let page = remote.quickly(client.list_cycles(request.clone())).await?.into_inner();
        for record in &page.cycles {
            cycles.push(News::Past(Box::new(telemetry(record)?)));
        }
        cycles.extend(page.unreadable.into_iter().map(News::Unreadable));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() || cycles.len() >= KEPT_CYCLES {
            break;
        }
    }
    Ok(cycles)
}

// ---------------------------------------------------------------------------------------------------------------
// The questions

/// Polls the status, one page of the registry, and what the user has opened.
async fn ask(
    remote: Remote,
    client: Client,
    mut wanted: watch::Receiver<Option<Subject>>,
    news: mpsc::Sender<News>,
) -> Ended {
    let mut asker =
        Asker { remote, client, news, epoch: 0, page_token: String::new(), bytes: 0, is_first_reading: true };
    loop {
        let began = Instant::now();
        let subject = wanted.borrow_and_update().clone();
        let told = match asker.round(subject).await {
            Err(Ended::Failed(failure)) => {
                // Another process may not accept the token.
                asker.page_token.clear();
                // A silent connection does not end by itself.
                if failure.exit == Exit::Unreachable
                    && let Ok(client) = asker.remote.connect().await
                {
                    asker.client = client;
                }
                tell(&asker.news, News::Unanswered(first_line(&failure))).await
            }
            told => told,
        };
        if let Err(closed) = told {
            return closed;
        }
        // The user waits for this one, so it is requested at once.
        let pause = asker.pause().saturating_sub(began.elapsed());
        if let Ok(Err(_nobody_wants)) = timeout(pause, wanted.changed()).await {
            return Ended::Closed;
        }
    }
}

struct Asker {
    remote: Remote,
    client: Client,
    news: mpsc::Sender<News>,
    /// The process of the service that has said who the caller is: the mode and the credential are the same while it
    /// runs.
    epoch: u64,
    page_token: String,
    /// Bytes of the answers in this round.
    bytes: usize,
    is_first_reading: bool,
}

impl Asker {
    /// Subsystems of a page.
    const PAGE: u32 = 500;

    /// True while the registry is read for the first time, which takes priority.
    fn is_hasty(&self) -> bool {
        self.is_first_reading && !self.page_token.is_empty()
    }

    /// Shortest duration of one round: a second, and longer if answers are large, which limits the bytes a second that
    /// the service and the network have to carry.
    fn pause(&self) -> Duration {
        const BYTES_PER_SECOND: f64 = 1_048_576.0;
        if self.is_hasty() {
            return Duration::ZERO;
        }
        #[allow(clippy::cast_precision_loss, reason = "far below what a float holds")]
        let seconds = self.bytes as f64 / BYTES_PER_SECOND;
        Duration::from_secs_f64(seconds.clamp(1.0, 30.0))
    }

    async fn round(&mut self, subject: Option<Subject>) -> Result<(), Ended> {
        self.bytes = 0;
        match subject {
            Some(Subject::Subsystem(name)) => {
                let is = self.subsystem(&name).await?;
                tell(&self.news, News::Subsystem(name, is)).await?;
            }
            Some(Subject::Cycle(id)) => {
                let is = self.cycle(id).await?;
                tell(&self.news, News::Cycle(id, is)).await?;
            }
            None => {}
        }
        if !self.is_hasty() {
            // The stream delivers the last cycle.
            let request = pb::GetStatusRequest { omit_last_cycle: true, ..pb::GetStatusRequest::default() };
            let response = self.remote.quickly(self.client.get_status(request)).await?.into_inner();
            self.bytes += response.encoded_len();
            let status = response.status.unwrap_or_default();
            let epoch = status.epoch;
            tell(&self.news, News::Status(Box::new(status))).await?;
            if self.epoch != epoch {
                if let Some(who) = self.who().await? {
                    tell(&self.news, News::Who(Box::new(who))).await?;
                }
                self.epoch = epoch;
            }
        }
        let request = pb::ListSubsystemsRequest { page_size: Self::PAGE, page_token: self.page_token.clone() };
        let page = self.remote.quickly(self.client.list_subsystems(request)).await?.into_inner();
        self.bytes += page.encoded_len();
        self.page_token = page.next_page_token;
        let is_last = self.page_token.is_empty();
        self.is_first_reading &= !is_last;
        tell(&self.news, News::Page { subsystems: page.subsystems, is_last }).await
    }

    /// The caller, and whether rights are enforced. `None` if an earlier version of the service
    /// can't say it.
    async fn who(&self) -> Result<Option<pb::WhoAmIResponse>, Failure> {
        let mut client = self.remote.connect_to_access().await?;
        let call = async {
            match client.who_am_i(pb::WhoAmIRequest {}).await {
                Ok(response) => Ok(Some(response.into_inner())),
                Err(status) if status.code() == Code::Unimplemented => Ok(None),
                Err(status) => Err(status),
            }
        };
        self.remote.quickly(call).await
    }

    /// A subsystem, with its latest output if the caller may see that; or why it can't be shown.
    async fn subsystem(&mut self, name: &str) -> Result<Result<Box<pb::SubsystemStatus>, String>, Failure> {
        let request =
            |include_output| pb::GetSubsystemRequest { name: name.to_owned(), include_output, include_snapshot: false };
        let call = async {
            let mut response = self.client.get_subsystem(request(true)).await;
            if response.as_ref().is_err_and(is_denied) {
                response = self.client.get_subsystem(request(false)).await;
            }
            match response {
                Ok(response) => {
                    Ok(response.into_inner().subsystem.ok_or_else(|| "it is not in the response".to_owned()))
                }
                Err(status) if status.code() == Code::NotFound => Ok(Err("it is no longer registered".to_owned())),
                Err(status) if is_denied(&status) => Ok(Err(clean(status.message()))),
                Err(status) => Err(status),
            }
        };
        let subsystem = self.remote.quickly(call).await?;
        self.bytes += subsystem.as_ref().map_or(0, Message::encoded_len);
        Ok(subsystem.map(Box::new))
    }

    /// The record of a cycle, or the reason for its absence.
    async fn cycle(&mut self, cycle_id: u64) -> Result<Result<Box<pb::CycleTelemetry>, String>, Failure> {
        let call = async {
            match self.client.get_cycle(pb::GetCycleRequest { cycle_id }).await {
                Ok(response) => Ok(Ok(response.into_inner().telemetry)),
                Err(status) if status.code() == Code::NotFound => {
                    Ok(Err("its record is no longer retained".to_owned()))
                }
                Err(status) if status.code() == Code::FailedPrecondition => Ok(Err("it is not finished".to_owned())),
                Err(status) if is_denied(&status) => Ok(Err(clean(status.message()))),
                Err(status) => Err(status),
            }
        };
        let record = self.remote.quickly(call).await?;
        self.bytes += record.as_ref().map_or(0, Bytes::len);
        record.map(|record| telemetry(&record).map(Box::new)).map_or_else(|why| Ok(Err(why)), |read| read.map(Ok))
    }
}

fn is_denied(status: &Status) -> bool {
    status.code() == Code::PermissionDenied
}

/// The message of a failure in one line.
fn first_line(failure: &Failure) -> String {
    clean(failure.message.lines().next().unwrap_or_default())
}
