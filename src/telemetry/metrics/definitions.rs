//! The definitions of all metrics. `docs/metrics.md` is generated from them.

/// The definition of a metric.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Its name, with its unit.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// The names of its labels. The number of values of each is bounded.
    pub labels: &'static [&'static str],
    /// Its help text.
    pub help: &'static str,
}

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only increases, until the process restarts.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Durations counted in buckets.
    Histogram,
}

impl Kind {
    /// Its name in Prometheus.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

macro_rules! definitions {
    ($($constant:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        $(pub(super) const $constant: Definition =
            Definition { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)+

        /// All of them, in the order in which they are written.
        pub const ALL: &[Definition] = &[$($constant),+];
    };
}

definitions! {
    BUILD_INFO: Gauge "orchestrator_build_info" ["version", "commit"]
        "1, with the version of this software, and the commit that it was built from, which is empty if the build did \
         not know it.";
    IS_LEADER: Gauge "orchestrator_is_leader" []
        "1 if this replica leads and runs cycles, else 0.";
    LEASE_REMAINING: Gauge "orchestrator_lease_remaining_seconds" []
        "How long this leader may still call subsystems if its lease is not renewed. Missing unless it leads.";
    LEASE_TTL: Gauge "orchestrator_lease_ttl_seconds" []
        "How long the lease of this leader lasts for other replicas: cluster.lease_ttl. Missing unless it leads.";
    CAN_LEAD: Gauge "orchestrator_can_lead" []
        "1 if this replica would take over, else 0: the log says why. Missing if no other process can share the store.";
    LEADER_CHANGES: Counter "orchestrator_leader_changes_total" []
        "Terms of leaders that this replica has seen begin, its own included.";
    CLOCK_OFFSET: Gauge "orchestrator_clock_offset_seconds" []
        "By how much the clock of the database is ahead of that of this replica, by its last answer while this one \
         followed. Beyond 30 s, the replica does not lead.";
    ACKNOWLEDGED_REVISION: Gauge "orchestrator_acknowledged_revision" []
        "The newest revision that this replica knows to be acknowledged, and shows. A follower lags by the difference \
         to that of the leader. Missing before it is known.";
    START_TIME: Gauge "orchestrator_start_time_seconds" []
        "When this process started, as Unix time.";
    TERM_START_TIME: Gauge "orchestrator_term_start_time_seconds" []
        "When the term of this leader began, as Unix time: for a process that has its store for itself, at its start. \
         Missing unless it leads.";
    EPOCH: Gauge "orchestrator_epoch" []
        "The term of this leader. It increases at every start and take-over. Missing unless it leads.";
    DRAINING: Gauge "orchestrator_draining" []
        "1 while the process shuts down and admits no cycles, else 0. Missing unless it leads.";

    CYCLES: Counter "orchestrator_cycles_total" ["state", "trigger"]
        "Cycles that this process has recorded, by state and trigger. INTERRUPTED cycles were started by an earlier \
         process.";
    CYCLE_DURATION: Histogram "orchestrator_cycle_duration_seconds" ["state"]
        "Duration of the cycles that this process ran, by state.";
    CYCLES_QUEUED: Gauge "orchestrator_cycles_queued" []
        "Cycles that wait for another one with a subsystem in common.";
    CYCLES_RUNNING: Gauge "orchestrator_cycles_running" []
        "Running cycles.";

    LOOP_TICKS: Counter "orchestrator_loop_ticks_total" ["loop", "disposition"]
        "Due ticks of a loop, by disposition. Survives restarts; the sum is the number of all due ticks.";
    LOOP_INTERVAL: Gauge "orchestrator_loop_interval_seconds" ["loop"]
        "Time between two ticks of a loop.";
    LOOP_LAG: Gauge "orchestrator_loop_lag_seconds" ["loop"]
        "How long the oldest waiting tick has waited for its cycle to begin; if no tick waits, how long the last one \
         waited, jitter included. Missing before the first.";
    LOOP_LAST_CYCLE: Gauge "orchestrator_loop_last_cycle_timestamp_seconds" ["loop"]
        "When the last cycle of a loop ended, as Unix time. Missing before the first in this process.";
    LOOP_STOPPED: Gauge "orchestrator_loop_stopped" ["loop"]
        "1 while a loop is stopped and has no ticks, else 0.";
    LOOP_PAUSED: Gauge "orchestrator_loop_paused" ["loop"]
        "1 while a loop is paused, by its name or with all loops, and has no ticks, else 0.";

    SUBSYSTEMS: Gauge "orchestrator_subsystems" ["origin"]
        "Registered subsystems: declared in the configuration file, or registered by RPC.";
    SUBSYSTEMS_MISSING: Gauge "orchestrator_subsystems_missing" []
        "Subsystems that registry.expected names and that are not registered.";
    LEASES: Gauge "orchestrator_leases" []
        "Registered subsystems that have a lease.";

    WATCHERS: Gauge "orchestrator_watchers" []
        "Connected watchers. Those of a follower count there; at the leader, all of them are one, the stream of the \
         follower.";
    WATCHERS_LAGGING: Gauge "orchestrator_watchers_lagging" []
        "Watchers that are so far behind that they read the history from the store.";
    WATCHER_EVENTS: Counter "orchestrator_watcher_events_total" []
        "Events sent to watchers: recorded cycles, live progress and bookmarks.";

    STORE_COMMIT_DURATION: Histogram "orchestrator_store_commit_duration_seconds" ["durability"]
        "Duration of commits that succeeded: durable ones wait for the disk, buffered ones for the operating system.";
    STORE_COMMIT_ERRORS: Counter "orchestrator_store_commit_errors_total" []
        "Commits that failed. Each failed retry counts as well.";
    STORE_UNREADABLE: Counter "orchestrator_store_unreadable_records_total" []
        "Records that this process could not read, each counted once. The log names them.";
    STORE_SIZE: Gauge "orchestrator_store_size_bytes" []
        "Size of the store in bytes, including its write-ahead log.";
    STORE_RECORDS: Gauge "orchestrator_store_records" []
        "Cycles that are retained in the history.";
    STORE_AMBIGUOUS: Counter "orchestrator_store_commits_ambiguous_total" ["outcome"]
        "Commits to PostgreSQL whose answer was lost, by what was found out then: they were made (kept), or not \
         (not_kept). Missing for other stores.";
    STORE_ROUND_TRIP: Histogram "orchestrator_store_round_trip_seconds" []
        "Time of statements to PostgreSQL that only begin a read: the way to the server and back. Missing for other \
         stores.";
    STORE_SYNCHRONOUS: Gauge "orchestrator_store_synchronous" []
        "1 if commits to PostgreSQL wait for standbys (synchronous_standby_names), so that a failover loses none, \
         else 0. Missing for other stores, and while no server answers.";
    STORE_OLDEST_XMIN: Gauge "orchestrator_store_oldest_xmin_age" []
        "Transactions of PostgreSQL since the oldest one whose view of the tables is still needed, as far as the user \
         of the service may see that. If it only increases, a forgotten transaction, replication slot or standby \
         makes the tables grow. Missing for other stores, and while no server answers.";

    TASK_RUNS: Counter "orchestrator_task_runs_total" ["task", "result"]
        "Repeated work of tasks, by whether it succeeded (ok) or failed: removing records that need not be kept \
         (retention), and unregistering subsystems with expired leases (leases). Failed work is retried; the log has \
         the reason.";
    TASK_LAST_SUCCESS: Gauge "orchestrator_task_last_success_timestamp_seconds" ["task"]
        "Time of a task's last success, as Unix time. Missing before the first success.";
    CALLS: Counter "orchestrator_calls_total" ["server", "rpc", "code"]
        "Calls of RPCs that have ended, scrapes of the metrics (Metrics), and logins of browsers (Login), by where \
         they came in and by the code of their answer. Those that their caller ended are CANCELLED. Missing before \
         the first.";
    CALLS_WOULD_BE_DENIED: Counter "orchestrator_calls_would_be_denied_total" ["server", "rpc", "code"]
        "Calls that access.mode = \"enforce\" would refuse, while it is \"dry_run\", by where they came in and by the \
         code of the refusal. Missing before the first.";
    FORWARDED: Counter "orchestrator_forwarded_calls_total" ["code"]
        "Calls that this replica had the leader answer since it did not lead itself, by the code of the answer. Those \
         that their caller ended are CANCELLED. Missing before the first.";
    SPANS: Counter "orchestrator_spans_total" ["result"]
        "Spans of traced cycles, by result: sent to the collector; dropped because it did not accept them \
         (not_taken), or because the queue was full (no_room). All 0 without a collector.";

    LOG_LINES_DROPPED: Counter "orchestrator_log_lines_dropped_total" []
        "Lines of the log that were dropped because stderr was not read in time, or could not be written to.";

    CONNECTIONS: Gauge "orchestrator_connections" ["server"]
        "Open connections: to the gRPC server, or to the admin address.";
    CONNECTIONS_LIMIT: Gauge "orchestrator_connections_limit" ["server"]
        "Limit of open connections. At the limit, idle connections are closed for new ones, which wait if no \
         connection is idle.";

    DIAL_CONNECTIONS: Gauge "orchestrator_dial_connections" []
        "Open connections to subsystems. Those with one endpoint share one.";
    DIAL_FAILURES: Counter "orchestrator_dial_failures_total" ["step"]
        "Connections to subsystems that were not made, by the step that failed: reaching an address (connect), the TLS \
         handshake (tls), or the start of HTTP/2 (http2). And calls that were not made because another server \
         answers than must, or a revoked one (identity).";

    TLS_EXPIRY: Gauge "orchestrator_tls_certificate_expiry_timestamp_seconds" ["file"]
        "When the first certificate in a file of server.tls, admin.tls or dial expires, as Unix time. Missing without \
         such files.";
    MEMORY_HELD: Gauge "orchestrator_memory_held_bytes" ["purpose"]
        "Bytes held for data whose size clients and subsystems decide, by purpose: requests that are being received, \
         answers that clients have not read yet, those of the admin address, records of the history, the latest \
         outputs, inputs in calls, replies of subsystems, and the registry; all is the sum.";
    MEMORY_LIMIT: Gauge "orchestrator_memory_limit_bytes" ["purpose"]
        "Limit of the bytes held. At a limit, further requests are refused.";

    RUNTIME_WORKERS: Gauge "orchestrator_runtime_workers" []
        "Threads that run tasks.";
    RUNTIME_TASKS: Gauge "orchestrator_runtime_tasks" []
        "Live tasks.";
    RUNTIME_QUEUED_TASKS: Gauge "orchestrator_runtime_queued_tasks" []
        "Ready tasks in the global queue. If it stays above 0, there are too few processors.";

    PROCESS_CPU: Counter "process_cpu_seconds_total" []
        "Total user and system CPU time spent in seconds.";
    PROCESS_OPEN_FDS: Gauge "process_open_fds" []
        "Number of open file descriptors.";
    PROCESS_MAX_FDS: Gauge "process_max_fds" []
        "Maximum number of open file descriptors.";
    PROCESS_VIRTUAL_MEMORY: Gauge "process_virtual_memory_bytes" []
        "Virtual memory size in bytes.";
    PROCESS_RESIDENT_MEMORY: Gauge "process_resident_memory_bytes" []
        "Resident memory size in bytes.";
    PROCESS_START_TIME: Gauge "process_start_time_seconds" []
        "Start time of the process since unix epoch in seconds.";
    PROCESS_THREADS: Gauge "process_threads" []
        "Number of OS threads in the process.";

    SUBSYSTEM_UP: Gauge "orchestrator_subsystem_up" ["subsystem"]
        "1 if its last part in a cycle SUCCEEDED, 0 if it ended as FAILED, TIMED_OUT or CIRCUIT_OPEN. SKIPPED and \
         CANCELLED parts do not change it. Missing before the first part in this process.";
    SUBSYSTEM_OUTCOMES: Counter "orchestrator_subsystem_outcomes_total" ["subsystem", "state"]
        "Its parts in cycles, by state.";
    SUBSYSTEM_DURATION: Histogram "orchestrator_subsystem_duration_seconds" ["subsystem"]
        "Duration of its parts in cycles, from the first call to the end, retries included. Parts without a call and \
         CANCELLED ones are left out.";
    SUBSYSTEM_ATTEMPTS: Counter "orchestrator_subsystem_attempts_total" ["subsystem"]
        "Calls of its RunCycle.";
    SUBSYSTEM_RETRIES: Counter "orchestrator_subsystem_retries_total" ["subsystem"]
        "Calls of its RunCycle that were not the first of their part.";
    SUBSYSTEM_ISSUES: Counter "orchestrator_subsystem_issues_total" ["subsystem", "severity"]
        "Issues of its parts in cycles, which did not fail them, by severity.";
    SUBSYSTEM_BREAKER_STATE: Gauge "orchestrator_subsystem_breaker_state" ["subsystem", "state"]
        "1 for the state that its circuit breaker is in, 0 for the others.";
    SUBSYSTEM_SUSPENDED: Gauge "orchestrator_subsystem_suspended" ["subsystem"]
        "1 while it is suspended and skipped in cycles, else 0.";
    SUBSYSTEM_OUTPUT_TIME: Gauge "orchestrator_subsystem_output_timestamp_seconds" ["subsystem"]
        "When the cycle that made its latest output ended, as Unix time. Missing if it has no output, or if the \
         record of that cycle was no longer retained at a restart.";
    SUBSYSTEM_LEASE_EXPIRY: Gauge "orchestrator_subsystem_lease_expiry_timestamp_seconds" ["subsystem"]
        "When it is unregistered unless its lease is renewed, as Unix time. Missing if it has no lease.";
    SUBSYSTEM_LEASE: Gauge "orchestrator_subsystem_lease_seconds" ["subsystem"]
        "Length of its lease. Missing if it has no lease.";
    SUBSYSTEM_METRIC: Gauge "orchestrator_subsystem_metric" ["subsystem", "metric"]
        "The metrics that it returned in its last part in a cycle, with their own names and units. Missing while its \
         last part did not succeed.";
}
