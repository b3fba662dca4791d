//! `orchestrator status`: the running cycles, the last cycle, and the state of the service.

use futures_util::{StreamExt, stream};
use tonic::Code;

use super::{
    Exit, Failure,
    cycles::in_short,
    loops,
    output::{age, count, duration, grouped, missing, payload, sections, telemetry, trigger, waits_for},
    remote::{Client, Health, Remote},
    subsystems,
    table::{Facts, Page, Table, left, long, number, right, text},
};
use crate::proto::orchestrator::v1 as pb;

/// Show the running cycles, the last cycle, and the state of the service
#[derive(Debug, clap::Args)]
#[command(after_help = "\
With --output json, one object: a GetStatusResponse of the contract.

Examples:
  orchestrator status
  orchestrator status --subsystems
  orchestrator status --snapshots
  orchestrator status --output json | jq -r .status.totalCycles")]
pub(super) struct StatusCommand {
    /// Also show the state of every subsystem
    #[arg(long)]
    subsystems: bool,
    /// Also ask each subsystem for a snapshot of its own state; implies --subsystems
    #[arg(long)]
    snapshots: bool,
    #[command(flatten)]
    remote: Remote,
}

impl StatusCommand {
    /// Shows the status.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let remote = &self.remote;
        let (mut client, health) = remote.connect_for_long().await?;
        let answer = remote.quickly(client.get_status(pb::GetStatusRequest::default())).await?.into_inner();
        let mut status = answer.status.unwrap_or_default();
        if self.subsystems || self.snapshots {
            // Page by page, since one answer can't contain a large registry.
            subsystems::pages(remote, &mut client, |page| {
                status.subsystems.extend(page);
                Ok(())
            })
            .await?;
        }
        if self.snapshots {
            let names = status.subsystems.iter().map(subsystems::name).collect();
            status.subsystems = with_snapshots(remote, &client, &health, names).await?;
        }
        let last = if status.last_cycle.is_empty() { None } else { Some(telemetry(&status.last_cycle)?) };
        let response = pb::GetStatusResponse { status: Some(status) };
        let page = remote.format.page();
        remote.format.show("GetStatusResponse", &response, |response| {
            response.status.as_ref().map(|status| shown(status, last.as_ref(), page)).unwrap_or_default()
        })?;
        Ok(Exit::Done)
    }
}

/// These subsystems with their snapshots, without any that have been unregistered.
async fn with_snapshots(
    remote: &Remote,
    client: &Client,
    health: &Health,
    names: Vec<String>,
) -> Result<Vec<pb::SubsystemStatus>, Failure> {
    /// Concurrent calls: enough to be quick, few enough to leave room for other clients.
    const AT_ONCE: usize = 16;
    let one = async |name: String| {
        let mut client = client.clone();
        let request = pb::GetSubsystemRequest { name, include_output: false, include_snapshot: true };
        let call = async {
            match client.get_subsystem(request).await {
                Ok(response) => Ok(response.into_inner().subsystem),
                Err(status) if status.code() == Code::NotFound => Ok(None),
                Err(status) => Err(status),
            }
        };
        remote.patiently(health, call).await
    };
    let found: Vec<_> = stream::iter(names).map(one).buffered(AT_ONCE).collect().await;
    found.into_iter().filter_map(Result::transpose).collect()
}

fn shown(status: &pb::OrchestratorStatus, last: Option<&pb::CycleTelemetry>, page: Page) -> String {
    let mut facts = Facts::new();
    let commit = if status.commit.is_empty() { String::new() } else { format!(" ({})", status.commit) };
    facts.fact("orchestrator", format!("{}, version {}{commit}", status.orchestrator_id, status.version));
    facts.fact("up", format!("{}, epoch {}", in_seconds(status.uptime.as_ref()), status.epoch));
    // Where there can be others.
    if status.lease_remaining.is_some() || status.role() == pb::ReplicaRole::Follower && !status.read_only {
        facts.fact("replica", replica(status));
    }
    if !status.unable_to_lead.is_empty() {
        facts.fact("CAN'T LEAD", status.unable_to_lead.clone());
    }
    facts.fact("subsystems", grouped(status.subsystem_count.into()));
    facts.fact("cycles", format!("{} recorded", grouped(status.total_cycles)));
    facts.fact("last", last.map_or_else(|| "-".to_owned(), in_short));
    if status.running_cycles.is_empty() {
        facts.fact("running", "-");
    }
    status.running_cycles.iter().for_each(|cycle| facts.fact("running", running(cycle)));
    facts.fact("queued", count(status.queued_cycles, "cycle"));
    let (oldest, newest) = (status.oldest_revision, status.newest_revision);
    let history = if oldest > newest { "-".to_owned() } else { format!("{oldest} to {newest}") };
    facts.fact("revisions", history);
    facts.fact("watchers", grouped(status.watchers.into()));
    if status.insecure {
        facts.fact("INSECURE", "other machines may need no right: access.mode is not enforce");
    }
    if status.read_only {
        facts.fact("READ ONLY", "it looks at a copy: no cycle runs, and nothing can be changed");
    }
    if status.loops_paused {
        facts.fact("PAUSED", "no loop starts a cycle until `orchestrator loops resume --all`");
    }
    if status.missing_count > 0 {
        facts.fact("MISSING", missing(status));
    }
    if !status.store_error.is_empty() {
        facts.fact("STORE ERROR", format!("{}; no cycle starts until it can be written", status.store_error));
    }
    let loops = if status.loops.is_empty() { String::new() } else { loops::table(&status.loops, page) };
    let mut table = subsystems::table();
    status.subsystems.iter().for_each(|status| table.row(subsystems::row(status)));
    let subsystems = table.finish_unless_empty(page);
    let snapshots = snapshots(&status.subsystems).finish_unless_empty(page);
    sections([facts.finish(page), waiting(status, page), loops, subsystems, snapshots])
}

/// A duration in whole seconds, since it changes all the time.
fn in_seconds(exact: Option<&prost_types::Duration>) -> String {
    duration(exact.map(|exact| prost_types::Duration { nanos: 0, ..*exact }).as_ref())
}

/// Which replica answers, and which one leads.
fn replica(status: &pb::OrchestratorStatus) -> String {
    let shown = |replica: &pb::Replica| match &*replica.address {
        "" => replica.name.clone(),
        address => format!("{}, at {address}", replica.name),
    };
    let own = status.replica.as_ref().map(shown).unwrap_or_default();
    let is_lapsed = status.lease_remaining.is_none_or(|left| (left.seconds, left.nanos) <= (0, 0));
    match (status.role(), &status.leader) {
        (pb::ReplicaRole::Leader, _) if is_lapsed => {
            format!("{own}, leads, but can't renew its lease: it calls no subsystem")
        }
        (pb::ReplicaRole::Leader, _) => {
            format!("{own}, leads; its lease ends in {}", in_seconds(status.lease_remaining.as_ref()))
        }
        (_, Some(leader)) => format!("{own}, follows {}", shown(leader)),
        (_, None) => format!("{own}; no replica leads"),
    }
}

fn running(running: &pb::RunningCycle) -> String {
    format!(
        "cycle {}, {}, started {}: {} of {} ended, {} being called",
        running.cycle_id,
        trigger(running.trigger(), &running.r#loop),
        age(running.started_at.as_ref()),
        grouped(running.ended.into()),
        grouped(running.total.into()),
        grouped(running.running.into()),
    )
}

fn waiting(status: &pb::OrchestratorStatus, page: Page) -> String {
    let mut table = Table::new([right("WAITING"), left("TRIGGER"), left("SINCE"), long("FOR")]);
    for waiting in &status.waiting_cycles {
        table.row([
            number(waiting.cycle_id),
            text(trigger(waiting.trigger(), &waiting.r#loop)),
            text(age(waiting.scheduled_at.as_ref())),
            text(waits_for(waiting)),
        ]);
    }
    let more = (status.queued_cycles as usize).saturating_sub(status.waiting_cycles.len());
    let shown = table.finish_unless_empty(page);
    if shown.is_empty() || more == 0 { shown } else { format!("{shown}and {}\n", count(more as u64, "more cycle")) }
}

fn snapshots(subsystems: &[pb::SubsystemStatus]) -> Table {
    let mut table = Table::new([left("SUBSYSTEM"), long("SNAPSHOT").whole()]);
    for status in subsystems {
        let snapshot = match (status.snapshot.is_empty(), status.snapshot_error.as_str()) {
            (true, "") => continue,
            (_, "") => payload(&status.snapshot),
            (_, error) => format!("none: {error}"),
        };
        table.row([text(subsystems::name(status)), text(snapshot)]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_says_whether_it_leads() {
        let line = |role: pb::ReplicaRole, leader: Option<pb::Replica>, lease| {
            let status = pb::OrchestratorStatus {
                replica: Some(pb::Replica { name: "a".into(), address: "http://h:1".into() }),
                role: role.into(),
                leader,
                lease_remaining: lease,
                ..pb::OrchestratorStatus::default()
            };
            let shown = shown(&status, None, Page::of_stdout(false));
            shown.lines().find_map(|line| line.strip_prefix("replica")).map(|line| line.trim().to_owned())
        };
        let lease = Some(prost_types::Duration { seconds: 8, nanos: 0 });
        let other = Some(pb::Replica { name: "b".into(), address: String::new() });
        assert_eq!(
            line(pb::ReplicaRole::Leader, None, lease).unwrap(),
            "a, at http://h:1, leads; its lease ends in 8s"
        );
        let lapsed = line(pb::ReplicaRole::Leader, None, Some(prost_types::Duration::default())).unwrap();
        assert!(lapsed.ends_with("leads, but can't renew its lease: it calls no subsystem"), "{lapsed}");
        assert_eq!(line(pb::ReplicaRole::Follower, other, None).unwrap(), "a, at http://h:1, follows b");
        assert_eq!(line(pb::ReplicaRole::Follower, None, None).unwrap(), "a, at http://h:1; no replica leads");
        // It has its store for itself.
        assert_eq!(line(pb::ReplicaRole::Leader, None, None), None);
    }

    #[test]
    fn every_running_cycle_has_a_line() {
        let running = |cycle_id, name: &str| pb::RunningCycle {
            cycle_id,
            trigger: pb::Trigger::Loop.into(),
            r#loop: name.into(),
            total: 3,
            ended: 1,
            running: 2,
            ..pb::RunningCycle::default()
        };
        let status = |running_cycles: Vec<pb::RunningCycle>| pb::OrchestratorStatus {
            running_cycle: running_cycles.first().cloned(),
            running_cycles,
            ..pb::OrchestratorStatus::default()
        };
        let lines = |status: &pb::OrchestratorStatus| {
            let shown = shown(status, None, Page::of_stdout(false));
            let lines =
                shown.lines().filter_map(|line| line.strip_prefix("running")).map(|line| line.trim().to_owned());
            lines.collect::<Vec<_>>()
        };
        assert_eq!(lines(&status(vec![])), ["-"]);
        let two = lines(&status(vec![running(7, "slow"), running(9, "fast")]));
        assert!(
            two[0].starts_with("cycle 7, loop slow, started") && two[1].starts_with("cycle 9, loop fast"),
            "{two:?}"
        );
        assert_eq!(two.len(), 2);
        assert!(two[1].ends_with("1 of 3 ended, 2 being called"), "{two:?}");
    }
}
