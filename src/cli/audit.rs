//! `orchestrator audit`: the calls of the service, and who made them.

use prost::Message;

use super::{
    Exit, Failure,
    output::{clean, grouped, names, note, parse_positive, parse_time, print, time},
    remote::Remote,
    table::{Cell, Table, left, long, right, text},
};
use crate::proto::orchestrator::v1 as pb;

/// List what was changed, read and denied, and who called
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Newest first. Needs the role auditor or admin. Each event is an entry of the log of the history, which `orchestrator \
verify` proves.

With --output json, one object: {\"events\":[...]} with a LoggedAuditEvent each, written page by page; with ndjson, a \
LoggedAuditEvent a line.

Examples:
  orchestrator audit
  orchestrator audit --since 24h --caller token:ops
  orchestrator audit --denied --output ndjson | jq -r .event.rpc")]
pub(super) struct Audit {
    /// Most events to list [default: 20]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u64>)]
    limit: Option<u64>,
    /// List all events that pass the filter
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Only events at or after this time: 2026-01-31T12:00:00Z, 2026-01-31, yesterday, or 2h (ago)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<prost_types::Timestamp>,
    /// Only events of this caller, such as token:ops
    #[arg(long, value_name = "IDENTITY")]
    caller: Option<String>,
    /// Only events of this RPC, such as RunCycle, or of this action of the service, such as reload
    #[arg(long, value_name = "RPC")]
    rpc: Option<String>,
    /// Only calls that were denied, or would be denied if access.mode was enforce
    #[arg(long)]
    denied: bool,
    /// Only changes, and no calls that changed nothing
    #[arg(long, conflicts_with = "denied")]
    changes: bool,
    #[command(flatten)]
    remote: Remote,
}

impl Audit {
    /// Lists the events.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        /// Events in one page: at most 1 MiB.
        const PAGE: u64 = 1000;
        /// Events that are listed unless the user says how many.
        const LIMIT: u64 = 20;
        let Self { limit, all, since, caller, rpc, denied, changes, remote } = self;
        let max = if all { u64::MAX } else { limit.unwrap_or(LIMIT) };
        let mut request = pb::ListAuditEventsRequest {
            page_size: 0,
            page_token: String::new(),
            since,
            caller: caller.unwrap_or_default(),
            rpc: rpc.unwrap_or_default(),
            denied,
            kind: if changes { pb::AuditKind::Change } else { pb::AuditKind::Unspecified }.into(),
        };
        let mut client = remote.connect_to_ledger().await?.0;
        let mut list = remote.format.list("events")?;
        let mut table = table();
        let mut found = 0;
        let has_more = loop {
            request.page_size = u32::try_from(max.saturating_sub(found).min(PAGE)).unwrap_or(u32::MAX);
            let page = remote.quickly(client.list_audit_events(request.clone())).await?.into_inner();
            found += (page.events.len() + page.unreadable.len()) as u64;
            for pb::UnreadableAuditEvent { leaf, problem } in &page.unreadable {
                note(&format!("the audit event of leaf {leaf} can't be read: {}", clean(problem)));
            }
            for event in &page.events {
                match &mut list {
                    Some(list) => list.add("LoggedAuditEvent", &event.encode_to_vec())?,
                    None => table.row(row(event)?),
                }
            }
            if page.next_page_token.is_empty() || found >= max {
                break !page.next_page_token.is_empty();
            }
            request.page_token = page.next_page_token;
        };
        match list {
            Some(list) => list.end()?,
            None => print(&table.or("no events", remote.format.page()))?,
        }
        if has_more && !all && limit.is_none() {
            note(&format!("There are more than these {LIMIT}: use --limit or --all."));
        }
        Ok(Exit::Done)
    }
}

/// A table for [`row`]s.
fn table() -> Table {
    Table::new([
        left("TIME"),
        left("CALLER"),
        left("RPC"),
        long("TARGETS"),
        right("CYCLE").minor(),
        right("CALLS").minor(),
        long("RESULT"),
        left("FROM").minor(),
    ])
}

fn row(logged: &pb::LoggedAuditEvent) -> Result<[Cell; 8], Failure> {
    /// Targets that are named; others are counted.
    const NAMED: usize = 3;
    let event = pb::AuditEvent::decode(logged.event.clone()).map_err(|error| {
        Failure::new(Exit::Refused, format!("the service has sent an event that can't be read: {error}"))
    })?;
    let (named, others) = event.targets.split_at(event.targets.len().min(NAMED));
    let mut targets = names(named, NAMED);
    let others = others.len() as u64 + event.targets_left_out;
    if others > 0 {
        targets = format!("{targets} and {} more", grouped(others));
    }
    let result = match event.decision() {
        pb::Decision::WouldBeDenied => format!("{} (would be denied)", event.code),
        pb::Decision::Denied => event.reason.clone(),
        _ if event.code.is_empty() => "begun".to_owned(),
        _ => event.code.clone(),
    };
    let peer = match event.via.as_str() {
        "" => event.peer,
        via => format!("{} via {via}", event.peer),
    };
    let or_dash = |value: String| text(if value.is_empty() { "-".to_owned() } else { value });
    let cycle = if event.cycle_id == 0 { String::new() } else { event.cycle_id.to_string() };
    Ok([
        text(time(event.time.as_ref())),
        or_dash(event.caller),
        text(event.rpc),
        or_dash(targets),
        or_dash(cycle),
        text(event.count.to_string()),
        text(result),
        or_dash(peer),
    ])
}

#[cfg(test)]
mod tests {
    use super::{super::table::tests::assert_screens, *};

    fn logged(event: &pb::AuditEvent) -> pb::LoggedAuditEvent {
        pb::LoggedAuditEvent { event: event.encode_to_vec().into(), ..pb::LoggedAuditEvent::default() }
    }

    #[test]
    fn a_list_fits_its_terminal() -> Result<(), Failure> {
        let allowed = |rpc: &str, targets: &[&str]| pb::AuditEvent {
            time: Some(prost_types::Timestamp { seconds: 1_795_860_000, nanos: 0 }),
            caller: "token:ops".into(),
            rpc: rpc.into(),
            targets: targets.iter().map(ToString::to_string).collect(),
            count: 1,
            code: "OK".into(),
            peer: "127.0.0.1:53712".into(),
            decision: pb::Decision::Allowed.into(),
            ..pb::AuditEvent::default()
        };
        let denied = pb::AuditEvent {
            caller: "cert:spiffe://fleet.example.org/subsystems/prices".into(),
            code: "PERMISSION_DENIED".into(),
            decision: pb::Decision::Denied.into(),
            reason: "no grant of cert:spiffe://fleet.example.org/subsystems/prices has the role operator for the \
                     subsystem sentiment-of-the-market"
                .into(),
            count: 1_204,
            ..allowed("RegisterSubsystem", &["sentiment-of-the-market"])
        };
        let mut table = table();
        table.row(row(&logged(&pb::AuditEvent { cycle_id: 12_345, ..allowed("RunCycle", &["prices", "news"]) }))?);
        table.row(row(&logged(&denied))?);
        let many = pb::AuditEvent { targets_left_out: 24, ..allowed("RegisterSubsystems", &["a", "b", "c", "d"]) };
        table.row(row(&logged(&many))?);
        assert_screens("audit", |page| table.finish(page));
        Ok(())
    }
}
