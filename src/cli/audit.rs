//! `orchestrator audit`: the calls of the service, and who made them.

use prost::Message;

use super::{
    Exit, Failure,
    output::{JsonList, Table, clean, count, names, note, parse_positive, parse_time, print, text, time},
    remote::Remote,
};
use crate::proto::orchestrator::v1 as pb;

/// List what was changed, read and denied, and who called
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Newest first. Needs the role auditor or admin. Each event is an entry of the log of the history, which `orchestrator \
verify` proves.

With --output json, one object: {\"events\":[…]} with a LoggedAuditEvent each, written page by page.

Examples:
  orchestrator audit
  orchestrator audit --since 24h --caller token:ops
  orchestrator audit --denied --output json | jq -r '.events[].event.rpc'")]
pub(super) struct Audit {
    /// Most events to list [default: 20]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u64>)]
    limit: Option<u64>,
    /// List all events that pass the filter
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Only events at or after this time (RFC 3339), or at most this long ago, such as 2h
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
        let mut list = if remote.format.is_json() { Some(JsonList::begin("events")?) } else { None };
        let columns = ["TIME", "CALLER", "RPC", "TARGETS", "CYCLE", "CALLS", "RESULT", "FROM"];
        let mut table = Table::list(columns).right(4).right(5);
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
            None => print(&table.or("no events"))?,
        }
        if has_more && !all && limit.is_none() {
            note(&format!("There are more than these {LIMIT}: use --limit or --all."));
        }
        Ok(Exit::Done)
    }
}

fn row(logged: &pb::LoggedAuditEvent) -> Result<Vec<comfy_table::Cell>, Failure> {
    /// Targets that are named; others are counted.
    const NAMED: usize = 3;
    let event = pb::AuditEvent::decode(logged.event.clone()).map_err(|error| {
        Failure::new(Exit::Refused, format!("the service has sent an event that can't be read: {error}"))
    })?;
    let mut targets = names(&event.targets, NAMED);
    if event.targets_left_out > 0 {
        targets = format!("{targets} and {}", count(event.targets_left_out, "other"));
    }
    let result = match event.decision() {
        pb::Decision::WouldBeDenied => format!("{} (would be denied)", event.code),
        pb::Decision::Denied => event.reason.clone(),
        _ if event.code.is_empty() => "begun".to_owned(),
        _ => event.code.clone(),
    };
    let or_dash = |value: String| text(if value.is_empty() { "-".to_owned() } else { value });
    let cycle = if event.cycle_id == 0 { String::new() } else { event.cycle_id.to_string() };
    Ok(vec![
        text(time(event.time.as_ref())),
        or_dash(event.caller),
        text(event.rpc),
        or_dash(targets),
        or_dash(cycle),
        text(event.count.to_string()),
        text(result),
        or_dash(event.peer),
    ])
}
