//! Watches that stay open while replicas take over from each other: wherever the leader is, the stream goes on after
//! the last revision that it has given.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::{
    select,
    time::{Instant, sleep},
};
use tonic::{Request, Response, Status};

use super::Forwarder;
use crate::{
    api::{
        Answer, Api, Events,
        caller::Caller,
        cycles,
        error::{self, is_of_replica},
        gate::Begun,
        rpc::Rpc,
    },
    orchestrator::Refusal,
    proto::orchestrator::v1 as pb,
};

/// Longest time without a leader. A watcher gets a bookmark at least each 30 s otherwise, so that it knows that the
/// stream is alive.
const PATIENCE: Duration = Duration::from_mins(1);
/// Time until a leader is asked again that could not be reached, or that is ending.
const PAUSE: Duration = Duration::from_millis(200);

/// A watch. Its request asks for what follows the last event.
struct Watch {
    api: Api,
    forwarder: Forwarder,
    caller: Caller,
    begun: Begun,
    request: pb::WatchCyclesRequest,
}

impl Api {
    /// Begins a watch, which goes on wherever the leader is.
    pub(in crate::api) async fn watch(&self, request: Request<pb::WatchCyclesRequest>) -> Answer<Events> {
        let Some(forwarder) = self.forwarder.clone() else { return self.watch_here(request).map(Response::new) };
        let (_, mut extensions, request) = request.into_parts();
        let caller = extensions.remove::<Caller>().ok_or_else(|| Status::internal("the caller is not known"))?;
        // It counts as one watch, however often it goes on.
        let begun = match extensions.remove::<Begun>() {
            Some(begun) => begun,
            None => self.gate.begin(&caller, Some(Rpc::WatchCycles))?,
        };
        let watch = Watch { api: self.clone(), forwarder, caller, begun, request };
        let events = watch.open().await?;
        let events = stream::unfold(Some((watch, events)), |open| async {
            let (mut watch, mut events) = open?;
            let event = watch.next(&mut events).await?;
            let open = event.is_ok().then_some((watch, events));
            Some((event, open))
        });
        Ok(Response::new(events.boxed()))
    }

    fn watch_here(&self, request: Request<pb::WatchCyclesRequest>) -> Result<Events, Status> {
        self.gate.stream(request, cycles::watch_cycles).map(StreamExt::boxed)
    }
}

impl Watch {
    /// The events that follow the last one.
    async fn open(&self) -> Result<Events, Status> {
        let mut request = Request::new(self.request.clone());
        request.extensions_mut().insert(self.caller.clone());
        request.extensions_mut().insert(self.begun.clone());
        let here = |api: Api, request| async move { api.watch_here(request).map(Response::new) };
        self.api.streaming(Rpc::WatchCycles.name(), request, here).await
    }

    /// The next event. `None` if there are no more.
    async fn next(&mut self, events: &mut Events) -> Option<Result<pb::WatchCyclesResponse, Status>> {
        loop {
            match events.next().await? {
                Ok(event) => {
                    if let Some(pb::CycleEvent { revision, epoch, .. }) = event.event {
                        self.request.from_oldest = false;
                        (self.request.after_revision, self.request.after_epoch) = (Some(revision), epoch);
                    }
                    return Some(Ok(event));
                }
                Err(status) if self.goes_on(&status) => match self.open_again().await {
                    Ok(further) => *events = further,
                    Err(status) => return Some(Err(status)),
                },
                Err(status) => return Some(Err(status)),
            }
        }
    }

    /// True if the stream goes on after it has ended so.
    fn goes_on(&self, status: &Status) -> bool {
        is_of_replica(status) && !self.forwarder.0.ending.is_cancelled()
    }

    /// Waits for a leader, and for its events that follow the last one.
    async fn open_again(&self) -> Result<Events, Status> {
        let until = Instant::now() + PATIENCE;
        let mut roles = self.forwarder.0.roles.clone();
        loop {
            match self.open().await {
                Err(status) if self.goes_on(&status) && Instant::now() < until => {}
                opened => return opened,
            }
            select! {
                biased;
                () = self.forwarder.0.ending.cancelled() => return Err(error::status(Refusal::Draining)),
                _ = roles.changed() => {}
                () = sleep(PAUSE) => {}
            }
        }
    }
}
