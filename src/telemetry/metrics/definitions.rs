//! Every metric there is. `docs/metrics.md` is written from this.

/// What a metric is.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Its name, with its unit.
    pub name: &'static str,
    /// How it moves.
    pub kind: Kind,
    /// The names of its labels. None has values without a bound.
    pub labels: &'static [&'static str],
    /// What it says, in plain words.
    pub help: &'static str,
}

/// How a metric moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, until the process restarts.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Durations counted in buckets.
    Histogram,
}

impl Kind {
    /// As Prometheus calls it.
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
    BUILD_INFO: Gauge "orchestrator_build_info" ["version"]
        "1, with the version of this software.";
    START_TIME: Gauge "orchestrator_start_time_seconds" []
        "When this process began to run cycles, as Unix time.";
    EPOCH: Gauge "orchestrator_epoch" []
        "The term of this process. It grows with every start.";
    DRAINING: Gauge "orchestrator_draining" []
        "1 while the process shuts down and admits nothing any more, else 0.";

    CYCLES: Counter "orchestrator_cycles_total" ["state", "trigger"]
        "Cycles that this process has recorded, by how they ended and what started them. INTERRUPTED ones were begun by an earlier process.";
    CYCLE_DURATION: Histogram "orchestrator_cycle_duration_seconds" ["state"]
        "Duration of the cycles that this process ran, by how they ended.";
    CYCLES_QUEUED: Gauge "orchestrator_cycles_queued" []
        "Cycles that wait for one with a subsystem in common.";
    CYCLES_RUNNING: Gauge "orchestrator_cycles_running" []
        "Cycles that run now.";

    LOOP_TICKS: Counter "orchestrator_loop_ticks_total" ["loop", "disposition"]
        "Ticks of a loop that were due, by what became of them. Survives restarts; their sum is all that were due.";
    LOOP_INTERVAL: Gauge "orchestrator_loop_interval_seconds" ["loop"]
        "Time between two ticks of a loop.";
    LOOP_LAG: Gauge "orchestrator_loop_lag_seconds" ["loop"]
        "How long the oldest tick that waits has waited for its cycle to begin; when none waits, how long the last one had, jitter included. Missing before the first.";
    LOOP_LAST_CYCLE: Gauge "orchestrator_loop_last_cycle_timestamp_seconds" ["loop"]
        "When the last cycle of a loop ended, as Unix time. Missing before the first in this process.";
    LOOP_STOPPED: Gauge "orchestrator_loop_stopped" ["loop"]
        "1 while a loop is stopped and has no ticks, else 0.";

    SUBSYSTEMS: Gauge "orchestrator_subsystems" ["origin"]
        "Registered subsystems: declared in the configuration file, or registered by RPC.";
    LEASES: Gauge "orchestrator_leases" []
        "Registered subsystems that have a lease.";

    WATCHERS: Gauge "orchestrator_watchers" []
        "Watchers that are connected.";
    WATCHERS_LAGGING: Gauge "orchestrator_watchers_lagging" []
        "Watchers that are so far behind that they have to read the history from the store.";
    WATCHER_EVENTS: Counter "orchestrator_watcher_events_total" []
        "Events given to watchers: recorded cycles, live progress and bookmarks.";

    STORE_COMMIT_DURATION: Histogram "orchestrator_store_commit_duration_seconds" ["durability"]
        "Duration of commits that succeeded: durable ones wait for the disk, buffered ones for the operating system.";
    STORE_COMMIT_ERRORS: Counter "orchestrator_store_commit_errors_total" []
        "Commits that failed. What can be tried again is tried again, and counts each time.";
    STORE_UNREADABLE: Counter "orchestrator_store_unreadable_records_total" []
        "Records that this process has come upon and could not read, each once. The log names them.";
    STORE_SIZE: Gauge "orchestrator_store_size_bytes" []
        "Bytes that the store takes where it is kept, its log included.";
    STORE_RECORDS: Gauge "orchestrator_store_records" []
        "Cycles that are retained in the history.";

    CALLS: Counter "orchestrator_calls_total" ["server", "rpc", "code"]
        "Calls of RPCs that have ended, and scrapes of the metrics (Metrics), by where they came in and by the code of their answer. Those that their caller ended are CANCELLED. Missing before the first.";
    SPANS: Counter "orchestrator_spans_total" ["result"]
        "Spans of cycles that were collected, by what became of them: sent to the collector; dropped because it did not take them (not_taken), or because too many waited for it already (no_room). All 0 where there is no collector.";

    LOG_LINES_DROPPED: Counter "orchestrator_log_lines_dropped_total" []
        "Lines of the log that were dropped because stderr was not read in time, or could not be written to.";

    CONNECTIONS: Gauge "orchestrator_connections" ["server"]
        "Connections that are open: to the gRPC server, or to the admin address.";
    CONNECTIONS_LIMIT: Gauge "orchestrator_connections_limit" ["server"]
        "Connections that may be open. Where they are, idle ones give way to further ones, which wait if none is idle.";

    MEMORY_HELD: Gauge "orchestrator_memory_held_bytes" ["purpose"]
        "Bytes held for what clients and subsystems decide the size of, by what they are for: requests that are being received, answers that clients have not taken yet, those of the admin address, records of the history, the latest outputs, inputs in calls, replies of subsystems, and the registry; all is all of them together.";
    MEMORY_LIMIT: Gauge "orchestrator_memory_limit_bytes" ["purpose"]
        "Bytes that may be held. Where a limit is reached, what comes on top is refused.";

    RUNTIME_WORKERS: Gauge "orchestrator_runtime_workers" []
        "Threads that run tasks.";
    RUNTIME_TASKS: Gauge "orchestrator_runtime_tasks" []
        "Tasks that are alive.";
    RUNTIME_QUEUED_TASKS: Gauge "orchestrator_runtime_queued_tasks" []
        "Tasks that are ready and wait in the global queue. If it stays above 0, the processors are too few.";

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
        "1 if its last part in a cycle SUCCEEDED, 0 if it ended as FAILED, TIMED_OUT or CIRCUIT_OPEN. Parts that were SKIPPED or CANCELLED say nothing and change nothing. Missing before the first part in this process.";
    SUBSYSTEM_OUTCOMES: Counter "orchestrator_subsystem_outcomes_total" ["subsystem", "state"]
        "Its parts in cycles, by how they ended.";
    SUBSYSTEM_DURATION: Histogram "orchestrator_subsystem_duration_seconds" ["subsystem"]
        "Duration of its parts in cycles, from the first call to the end, retries included. Parts without a call and CANCELLED ones are left out.";
    SUBSYSTEM_ATTEMPTS: Counter "orchestrator_subsystem_attempts_total" ["subsystem"]
        "Calls of its RunCycle.";
    SUBSYSTEM_RETRIES: Counter "orchestrator_subsystem_retries_total" ["subsystem"]
        "Calls of its RunCycle that were not the first of their part.";
    SUBSYSTEM_BREAKER_STATE: Gauge "orchestrator_subsystem_breaker_state" ["subsystem", "state"]
        "1 for the state that its circuit breaker is in, 0 for the others.";
    SUBSYSTEM_SUSPENDED: Gauge "orchestrator_subsystem_suspended" ["subsystem"]
        "1 while it is suspended and left out of cycles, else 0.";
    SUBSYSTEM_OUTPUT_TIME: Gauge "orchestrator_subsystem_output_timestamp_seconds" ["subsystem"]
        "When the cycle that made its latest output ended, as Unix time. Missing when it has no output, or when the record of that cycle was not retained through a restart.";
    SUBSYSTEM_LEASE_EXPIRY: Gauge "orchestrator_subsystem_lease_expiry_timestamp_seconds" ["subsystem"]
        "When it is unregistered unless its lease is renewed, as Unix time. Missing when it has no lease.";
    SUBSYSTEM_LEASE: Gauge "orchestrator_subsystem_lease_seconds" ["subsystem"]
        "For how long each renewal of its lease holds. Missing when it has no lease.";
    SUBSYSTEM_METRIC: Gauge "orchestrator_subsystem_metric" ["subsystem", "metric"]
        "The metrics that it returned in its last part in a cycle, by their own names and in their own units. Missing while its last part did not succeed.";
}
