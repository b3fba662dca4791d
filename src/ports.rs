//! The interfaces that the core needs: a [`Store`] for records, [`Subsystems`] to call, [`Spans`] for traces, and
//! [`Leadership`] where several replicas share a store.

mod leadership;
mod spans;
mod store;
mod subsystems;

pub use self::{
    leadership::{Claim, ClaimId, Claimed, Leadership, Observed, OtherOrchestrator, Renewed},
    spans::{Spans, Untraced},
    store::{
        AuditEntry, Check, Checks, Contents, ControlDecoder, Durability, EventCheck, EventFilter, EventPage, EventRule,
        Excess, Filter, FormerNames, Found, FoundEvent, Log, LoggedEvent, Lost, OldEvent, OldRecord, OpenCycle, Page,
        PageLimits, Record, Removal, ResumeError, Retention, RetentionRule, SCAN_LIMIT, Seals, ServerFigures,
        ServerState, Stage, Store, StoreError, StoreSize, StoredLoop, StoredOutput, StoredSubsystem, TriggerKind,
        Unreadable, UnreadableEvent, UnreadableRow, Write,
    },
    subsystems::{CallError, Callee, ConnectionFault, InitializeCall, Left, Reply, RunCall, Snapshot, Subsystems},
};
