//! The subsystems: each call decides anew how it behaves.

use std::{
    collections::BTreeMap,
    future::pending,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use orchestrator_core::{
    model::Payload,
    proto::subsystem::v1::{
        self as pb,
        subsystem_server::{Subsystem, SubsystemServer},
    },
};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};
use tonic::{Request, Response, Status};

use crate::{
    chance::Chance,
    network::{Host, LastRead},
};

/// Of the choices from 0 to 99, the first one for no answer.
const SILENT: u32 = 95;

/// A call of `RunCycle`, as the fleet has seen it.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) subsystem: String,
    pub(crate) cycle_id: u64,
    pub(crate) epoch: u64,
    pub(crate) attempt: u32,
    /// Positions in the order of all events of the fleet.
    pub(crate) began: usize,
    pub(crate) answered: Option<usize>,
    /// The time when it came, from the start.
    pub(crate) at: Duration,
}

/// What the fleet knows.
#[derive(Default)]
pub(crate) struct Log {
    pub(crate) calls: Vec<Call>,
    events: usize,
    /// The highest epoch that has called each subsystem.
    epochs: BTreeMap<String, u64>,
    /// The highest epoch that has called any, with the time when its first call came.
    latest: Option<(u64, Instant)>,
    /// Calls that were sent after a later epoch had called.
    pub(crate) overlaps: Vec<String>,
}

/// The subsystems behind one endpoint.
#[derive(Clone)]
pub(crate) struct Fleet {
    log: Arc<Mutex<Log>>,
    chance: Chance,
    /// Of a hundred calls, the number that certainly gets no answer.
    silent: u32,
    /// False while all subsystems answer at once.
    is_wild: Arc<Mutex<bool>>,
}

/// A connection to it.
struct Connection {
    fleet: Fleet,
    read: LastRead,
}

impl Fleet {
    pub(crate) fn new(chance: Chance, log: Arc<Mutex<Log>>, silent: u32) -> Self {
        Self { log, chance, silent, is_wild: Arc::new(Mutex::new(true)) }
    }

    pub(crate) fn tame(&self) {
        *self.is_wild.lock().unwrap() = false;
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Serves at this host, until the task is aborted.
    pub(crate) fn serve(&self, host: &Host) -> JoinHandle<()> {
        let (fleet, incoming) = (self.clone(), host.incoming(1));
        tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let stream = incoming.next().await;
                let connection = Connection { fleet: fleet.clone(), read: stream.last_read() };
                let service = TowerToHyperService::new(SubsystemServer::new(connection));
                let connection =
                    http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
                connections.spawn(async move { drop(connection.await) });
            }
        })
    }
}

impl Connection {
    /// Notes the epoch of a call.
    fn hear(&self, subsystem: &str, epoch: u64) -> Result<(), Status> {
        let mut log = self.fleet.log();
        match log.latest {
            Some((latest, at)) if epoch < latest && self.read.sent() > at => {
                log.overlaps.push(format!("epoch {epoch} calls {subsystem} after epoch {latest} has called"));
            }
            Some((latest, _)) if epoch <= latest => {}
            _ => log.latest = Some((epoch, Instant::now())),
        }
        let known = log.epochs.entry(subsystem.to_owned()).or_default();
        *known = epoch.max(*known);
        if *known > epoch { Err(Status::aborted("a later epoch has called")) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Subsystem for Connection {
    async fn initialize(
        &self,
        request: Request<pb::InitializeRequest>,
    ) -> Result<Response<pb::InitializeResponse>, Status> {
        let request = request.into_inner();
        self.hear(&request.subsystem, request.epoch)?;
        Ok(Response::new(pb::InitializeResponse {}))
    }

    async fn run_cycle(&self, request: Request<pb::RunCycleRequest>) -> Result<Response<pb::RunCycleResponse>, Status> {
        let pb::RunCycleRequest { subsystem, cycle_id, epoch, attempt, .. } = request.into_inner();
        self.hear(&subsystem, epoch)?;
        let fleet = &self.fleet;
        let mut rng = fleet.chance.on(&(&subsystem, cycle_id, epoch, attempt));
        let (choice, slow) = (rng.u32(..100), Duration::from_millis(rng.u64(1..400)));
        let choice = if rng.u32(..100) < fleet.silent { SILENT } else { choice };
        let choice = if *fleet.is_wild.lock().unwrap() { choice } else { 0 };
        let at = fleet.chance.elapsed();
        let call = {
            let mut log = fleet.log();
            log.events += 1;
            let began = log.events;
            log.calls.push(Call { subsystem, cycle_id, epoch, attempt, began, answered: None, at });
            log.calls.len() - 1
        };
        let answer = match choice {
            0..60 => Ok(output(cycle_id)),
            60..80 => {
                sleep(slow).await;
                Ok(output(cycle_id))
            }
            80..85 => Err(Status::internal("it has failed")),
            85..90 => Err(Status::unavailable("not now")),
            90..92 => Err(Status::failed_precondition("it has restarted")),
            92..SILENT => Ok(Bytes::from_static(b"\xff\xff no struct")),
            SILENT.. => pending().await,
        };
        let mut log = fleet.log();
        log.events += 1;
        let ended = log.events;
        log.calls[call].answered = Some(ended);
        drop(log);
        answer.map(|output| Response::new(pb::RunCycleResponse { output, ..pb::RunCycleResponse::default() }))
    }

    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Result<Response<pb::GetStatusResponse>, Status> {
        Err(Status::unimplemented("it has none"))
    }
}

fn output(cycle_id: u64) -> Bytes {
    let object = serde_json::json!({ "cycle": cycle_id });
    Payload::from_json(object.as_object().unwrap()).unwrap().as_bytes().clone()
}
