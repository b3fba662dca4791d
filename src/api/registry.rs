//! The registry: registering, unregistering, suspending and resuming subsystems, their leases, and looking at them.

use std::{collections::BTreeMap, sync::Arc};

use prost::Message;
use tokio::task::yield_now;
use tonic::Status;

use super::{
    error::{self, status},
    gate::Entered,
    handlers::{Handlers, MAX_ANSWER, invalid},
    request, response,
    update::Update,
};
use crate::{
    ledger::DigestKey,
    model::{Cause, Name, Subsystem, Violations},
    orchestrator::{Change, Outcome, Refusal, Registered, Renamed},
    ports::{CallError, Snapshot},
    proto::{orchestrator::v1 as pb, timestamp},
};

impl Handlers {
    pub(super) async fn register_subsystem(
        &self,
        mut call: Entered<pb::RegisterSubsystemRequest>,
    ) -> Result<pb::RegisterSubsystemResponse, Status> {
        let (pb::RegisterSubsystemRequest { registration, lease }, by) = call.take_change();
        let registration = request::present("registration", registration).map_err(invalid)?;
        let subsystem = request::registration(registration, &self.reach).map_err(invalid)?;
        let lease = request::lease(lease).map_err(invalid)?;
        let outcome = call.orchestrator().register(subsystem, lease, &call.authority.registrar(), by).await;
        let outcome = outcome.map_err(|refusal| call.refused(refusal))?;
        let (subsystem, previous) = before_and_after(&call, &outcome);
        Ok(pb::RegisterSubsystemResponse { subsystem, created: outcome.change == Change::Created, previous })
    }

    pub(super) async fn update_subsystem(
        &self,
        mut call: Entered<pb::UpdateSubsystemRequest>,
    ) -> Result<pb::UpdateSubsystemResponse, Status> {
        let (pb::UpdateSubsystemRequest { registration, update_mask, etag }, by) = call.take_change();
        let values = request::present("registration", registration).map_err(invalid)?;
        let name = request::name("registration.name", &values.name).map_err(invalid)?;
        let update = Update::new(values, update_mask).map_err(invalid)?;
        let (reach, authority, digests) =
            (self.reach.clone(), call.authority.clone(), call.orchestrator().digests().clone());
        let revise = move |subsystem: &Subsystem, renamed: &BTreeMap<Name, Name>| {
            check_etag(&digests, subsystem, &etag)?;
            let registration = update.apply(subsystem);
            let not_covered = |target| Refusal::NotCovered { name: subsystem.name.clone(), target };
            authority.covers(&registration, renamed).map_err(not_covered)?;
            Ok(request::registration(registration, &reach)?)
        };
        let outcome = call.orchestrator().update(&name, revise, &call.authority.registrar(), by).await;
        let outcome = outcome.map_err(|refusal| call.refused(refusal))?;
        let (subsystem, previous) = before_and_after(&call, &outcome);
        Ok(pb::UpdateSubsystemResponse { subsystem, previous })
    }

    pub(super) async fn rename_subsystem(
        &self,
        mut call: Entered<pb::RenameSubsystemRequest>,
    ) -> Result<pb::RenameSubsystemResponse, Status> {
        /// Most names of changed subsystems or loops in an answer: more than a person reads.
        const MAX_CHANGED: usize = 1000;
        let (pb::RenameSubsystemRequest { name, new_name, etag }, by) = call.take_change();
        let mut bad = Violations::default();
        let (name, new_name) = (bad.name("name", &name), bad.name("new_name", &new_name));
        bad.into_result(()).map_err(invalid)?;
        let (authority, digests) = (call.authority.clone(), call.orchestrator().digests().clone());
        let judge = move |present: &Subsystem, renamed: &Subsystem| {
            check_etag(&digests, present, &etag)?;
            let not_covered = |target| Refusal::NotCovered { name: renamed.name.clone(), target };
            authority.covers(&response::registration(renamed), &BTreeMap::new()).map_err(not_covered)
        };
        let renamed = call.orchestrator().rename(&name, new_name, judge, &call.authority.registrar(), by).await;
        let Renamed { registered, subsystems, loops } = renamed.map_err(|refusal| call.refused(refusal))?;
        let texts = |names: Vec<Name>| names.iter().take(MAX_CHANGED).map(ToString::to_string).collect();
        Ok(pb::RenameSubsystemResponse {
            subsystem: Some(listed(&call, &registered, None)),
            changed_subsystems: texts(subsystems),
            changed_loops: texts(loops),
        })
    }

    pub(super) async fn register_subsystems(
        &self,
        mut call: Entered<pb::RegisterSubsystemsRequest>,
    ) -> Result<pb::RegisterSubsystemsResponse, Status> {
        let (request, by) = call.take_change();
        let named =
            request.registrations.iter().map(|it| 1 + it.requires.len() + it.after.len() + it.reads.len()).sum();
        let reach = self.reach.clone();
        let read = self.offload(named, move || request::registrations(request, &reach)).await?;
        let (subsystems, lease) = read.map_err(invalid)?;
        let registered = call.orchestrator().register_all(subsystems, lease, &call.authority.registrar(), by).await;
        let registered = registered.map_err(|refusal| call.refused(refusal))?;
        let names_of = |change| {
            let outcomes = registered.iter().filter(move |outcome| outcome.change == change);
            outcomes.map(|outcome| outcome.registered.member.subsystem.name.to_string()).collect()
        };
        let mut answer = pb::RegisterSubsystemsResponse {
            created: names_of(Change::Created),
            replaced: names_of(Change::Replaced),
            replacements: Vec::new(),
        };
        let mut bytes = answer.encoded_len();
        for outcome in registered.iter().filter(|outcome| outcome.change == Change::Replaced) {
            let (subsystem, previous) = before_and_after(&call, outcome);
            let replacement = pb::Replacement { subsystem, previous };
            bytes += replacement.encoded_len() + response::AROUND;
            if bytes > MAX_ANSWER {
                break;
            }
            answer.replacements.push(replacement);
        }
        Ok(answer)
    }

    pub(super) async fn list_subsystems(
        &self,
        mut call: Entered<pb::ListSubsystemsRequest>,
    ) -> Result<pb::ListSubsystemsResponse, Status> {
        let pb::ListSubsystemsRequest { page_size, page_token } = call.take_request();
        let (after, page_size) = request::page(page_size, &page_token, 100).map_err(invalid)?;
        let mut found = call.orchestrator().subsystems(after.as_ref().map(Name::as_str), page_size + 1);
        let more_follow = found.len() > page_size;
        found.truncate(page_size);
        let (subsystems, all_fit) = self.statuses(&call, &found, false, MAX_ANSWER).await;
        let last = subsystems.last().and_then(|last| last.registration.as_ref()).map(|last| last.name.clone());
        let next_page_token = last.filter(|_| more_follow || !all_fit).unwrap_or_default();
        Ok(pb::ListSubsystemsResponse { subsystems, next_page_token })
    }

    /// The status of each subsystem, if all fit into one answer.
    pub(super) async fn statuses<Q>(
        &self,
        call: &Entered<Q>,
        of: &[Arc<Registered>],
        with_snapshots: bool,
        room: usize,
    ) -> (Vec<pb::SubsystemStatus>, bool) {
        /// Most concurrent calls for snapshots, which can have any size.
        const AT_ONCE: usize = 64;
        let _permit = if with_snapshots { self.asking_all.acquire().await.ok() } else { None };
        let mut statuses = Vec::with_capacity(of.len());
        let mut bytes = 0;
        for some in of.chunks(AT_ONCE) {
            // With many subsystems it takes a while.
            yield_now().await;
            let snapshots = if with_snapshots { call.orchestrator().snapshots(some).await } else { Vec::new() };
            let mut snapshots = snapshots.iter();
            for registered in some {
                let status = listed(call, registered, snapshots.next());
                bytes += status.encoded_len() + response::AROUND;
                if bytes > room {
                    return (statuses, false);
                }
                statuses.push(status);
            }
        }
        (statuses, true)
    }
}

pub(super) async fn unregister_subsystem(
    mut call: Entered<pb::UnregisterSubsystemRequest>,
) -> Result<pb::UnregisterSubsystemResponse, Status> {
    let (request, by) = call.take_change();
    let name = subsystem_name(&request.name)?;
    let unregistered = call.orchestrator().unregister(&name, &call.authority.registrar(), by).await;
    unregistered.map_err(|refusal| call.refused(refusal))?;
    Ok(pb::UnregisterSubsystemResponse {})
}

pub(super) async fn get_subsystem(
    mut call: Entered<pb::GetSubsystemRequest>,
) -> Result<pb::GetSubsystemResponse, Status> {
    let pb::GetSubsystemRequest { name, include_output, include_snapshot } = call.take_request();
    let registered = call.orchestrator().subsystem(&subsystem_name(&name)?).map(Arc::new).map_err(status)?;
    let snapshot = if include_snapshot {
        call.orchestrator().snapshots(std::slice::from_ref(&registered)).await.pop()
    } else {
        None
    };
    let mut subsystem = response::subsystem_status(&call, &registered, include_output, snapshot.as_ref());
    if subsystem.encoded_len() + response::AROUND > MAX_ANSWER {
        subsystem.last = subsystem.last.map(response::listed_part);
    }
    if subsystem.encoded_len() + response::AROUND > MAX_ANSWER {
        let (output, snapshot) = (subsystem.output.len(), subsystem.snapshot.len());
        return Err(error::answer_too_large(
            Some(&registered.member.subsystem.name),
            &if output.max(snapshot) < MAX_ANSWER - (1 << 20) {
                format!("request the output of {name} and its snapshot separately")
            } else {
                let [output, snapshot] = [output, snapshot].map(|bytes| format!("{bytes} bytes"));
                format!(
                    "of {name}, {output} are its output and {snapshot} its snapshot: leave out the larger one, and \
                     keep it below 2 MiB by limits.max_output_bytes of the registration"
                )
            },
        ));
    }
    Ok(pb::GetSubsystemResponse { subsystem: Some(subsystem) })
}

pub(super) async fn renew_lease(mut call: Entered<pb::RenewLeaseRequest>) -> Result<pb::RenewLeaseResponse, Status> {
    let name = subsystem_name(&call.take_request().name)?;
    let renewed = call.orchestrator().renew_lease(&name, &call.authority.registrar());
    let expires_at = renewed.map_err(|refusal| call.refused(refusal))?;
    Ok(pb::RenewLeaseResponse { lease_expires_at: Some(timestamp(expires_at)) })
}

pub(super) async fn suspend_subsystem(
    mut call: Entered<pb::SuspendSubsystemRequest>,
) -> Result<pb::SuspendSubsystemResponse, Status> {
    let (request, by) = call.take_change();
    Ok(pb::SuspendSubsystemResponse { subsystem: Some(suspended(&call, &request.name, true, by).await?) })
}

pub(super) async fn resume_subsystem(
    mut call: Entered<pb::ResumeSubsystemRequest>,
) -> Result<pb::ResumeSubsystemResponse, Status> {
    let (request, by) = call.take_change();
    Ok(pb::ResumeSubsystemResponse { subsystem: Some(suspended(&call, &request.name, false, by).await?) })
}

/// Suspends or resumes a subsystem, and returns its status after that.
async fn suspended<Q>(call: &Entered<Q>, name: &str, suspend: bool, by: Cause) -> Result<pb::SubsystemStatus, Status> {
    let registered = call.orchestrator().suspend(&subsystem_name(name)?, suspend, by).await.map_err(status)?;
    Ok(listed(call, &registered, None))
}

/// The status of a subsystem after a call, and before it if the call has replaced the registration.
fn before_and_after<Q>(
    call: &Entered<Q>,
    Outcome { registered, previous, .. }: &Outcome,
) -> (Option<pb::SubsystemStatus>, Option<pb::SubsystemStatus>) {
    (Some(listed(call, registered, None)), previous.as_ref().map(|previous| listed(call, previous, None)))
}

/// The status of a subsystem in a list.
fn listed<Q>(
    call: &Entered<Q>,
    registered: &Registered,
    snapshot: Option<&Result<Snapshot, CallError>>,
) -> pb::SubsystemStatus {
    let status = response::subsystem_status(call, registered, false, snapshot);
    pb::SubsystemStatus { last: status.last.map(response::listed_part), ..status }
}

/// Checks that a registration has this etag; any has an empty one.
///
/// # Errors
/// It has another one.
fn check_etag(digests: &DigestKey, subsystem: &Subsystem, etag: &str) -> Result<(), Refusal> {
    let present = response::etag(digests, &response::registration(subsystem));
    if etag.is_empty() || etag == present {
        return Ok(());
    }
    Err(Refusal::EtagMismatch { name: subsystem.name.clone(), etag: present })
}

fn subsystem_name(name: &str) -> Result<Name, Status> {
    request::name("name", name).map_err(invalid)
}
