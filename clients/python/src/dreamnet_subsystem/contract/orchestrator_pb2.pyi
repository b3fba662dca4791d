import datetime

from . import subsystem_pb2 as _subsystem_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CycleState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CYCLE_STATE_UNSPECIFIED: _ClassVar[CycleState]
    CYCLE_STATE_SUCCEEDED: _ClassVar[CycleState]
    CYCLE_STATE_DEGRADED: _ClassVar[CycleState]
    CYCLE_STATE_FAILED: _ClassVar[CycleState]
    CYCLE_STATE_CANCELLED: _ClassVar[CycleState]
    CYCLE_STATE_INTERRUPTED: _ClassVar[CycleState]

class Trigger(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRIGGER_UNSPECIFIED: _ClassVar[Trigger]
    TRIGGER_MANUAL: _ClassVar[Trigger]
    TRIGGER_LOOP: _ClassVar[Trigger]
    TRIGGER_PARENT: _ClassVar[Trigger]

class SubsystemState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUBSYSTEM_STATE_UNSPECIFIED: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_SUCCEEDED: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_FAILED: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_TIMED_OUT: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_SKIPPED: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_CIRCUIT_OPEN: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_CANCELLED: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_WAITING: _ClassVar[SubsystemState]
    SUBSYSTEM_STATE_RUNNING: _ClassVar[SubsystemState]

class SkipReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SKIP_REASON_UNSPECIFIED: _ClassVar[SkipReason]
    SKIP_REASON_SUSPENDED: _ClassVar[SkipReason]
    SKIP_REASON_REQUIREMENT_FAILED: _ClassVar[SkipReason]
    SKIP_REASON_REQUIREMENT_MISSING: _ClassVar[SkipReason]
    SKIP_REASON_REQUIREMENT_LEFT_OUT: _ClassVar[SkipReason]
    SKIP_REASON_CYCLE_DEADLINE: _ClassVar[SkipReason]
    SKIP_REASON_NOT_REGISTERED: _ClassVar[SkipReason]
    SKIP_REASON_OWNER_REVOKED: _ClassVar[SkipReason]

class ReplicaRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_ROLE_UNSPECIFIED: _ClassVar[ReplicaRole]
    REPLICA_ROLE_LEADER: _ClassVar[ReplicaRole]
    REPLICA_ROLE_FOLLOWER: _ClassVar[ReplicaRole]

class OverlapPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERLAP_POLICY_UNSPECIFIED: _ClassVar[OverlapPolicy]
    OVERLAP_POLICY_SKIP: _ClassVar[OverlapPolicy]
    OVERLAP_POLICY_BUFFER_ONE: _ClassVar[OverlapPolicy]
    OVERLAP_POLICY_BUFFER_ALL: _ClassVar[OverlapPolicy]
    OVERLAP_POLICY_CANCEL_OTHER: _ClassVar[OverlapPolicy]

class CatchUp(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CATCH_UP_UNSPECIFIED: _ClassVar[CatchUp]
    CATCH_UP_NONE: _ClassVar[CatchUp]
    CATCH_UP_ONE: _ClassVar[CatchUp]

class TickDisposition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TICK_DISPOSITION_UNSPECIFIED: _ClassVar[TickDisposition]
    TICK_DISPOSITION_RAN: _ClassVar[TickDisposition]
    TICK_DISPOSITION_SKIPPED: _ClassVar[TickDisposition]
    TICK_DISPOSITION_MISSED: _ClassVar[TickDisposition]
    TICK_DISPOSITION_COALESCED: _ClassVar[TickDisposition]
    TICK_DISPOSITION_DROPPED: _ClassVar[TickDisposition]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_UNSPECIFIED: _ClassVar[Origin]
    ORIGIN_CONFIG: _ClassVar[Origin]
    ORIGIN_RPC: _ClassVar[Origin]

class BreakerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BREAKER_STATE_UNSPECIFIED: _ClassVar[BreakerState]
    BREAKER_STATE_CLOSED: _ClassVar[BreakerState]
    BREAKER_STATE_OPEN: _ClassVar[BreakerState]
    BREAKER_STATE_HALF_OPEN: _ClassVar[BreakerState]
CYCLE_STATE_UNSPECIFIED: CycleState
CYCLE_STATE_SUCCEEDED: CycleState
CYCLE_STATE_DEGRADED: CycleState
CYCLE_STATE_FAILED: CycleState
CYCLE_STATE_CANCELLED: CycleState
CYCLE_STATE_INTERRUPTED: CycleState
TRIGGER_UNSPECIFIED: Trigger
TRIGGER_MANUAL: Trigger
TRIGGER_LOOP: Trigger
TRIGGER_PARENT: Trigger
SUBSYSTEM_STATE_UNSPECIFIED: SubsystemState
SUBSYSTEM_STATE_SUCCEEDED: SubsystemState
SUBSYSTEM_STATE_FAILED: SubsystemState
SUBSYSTEM_STATE_TIMED_OUT: SubsystemState
SUBSYSTEM_STATE_SKIPPED: SubsystemState
SUBSYSTEM_STATE_CIRCUIT_OPEN: SubsystemState
SUBSYSTEM_STATE_CANCELLED: SubsystemState
SUBSYSTEM_STATE_WAITING: SubsystemState
SUBSYSTEM_STATE_RUNNING: SubsystemState
SKIP_REASON_UNSPECIFIED: SkipReason
SKIP_REASON_SUSPENDED: SkipReason
SKIP_REASON_REQUIREMENT_FAILED: SkipReason
SKIP_REASON_REQUIREMENT_MISSING: SkipReason
SKIP_REASON_REQUIREMENT_LEFT_OUT: SkipReason
SKIP_REASON_CYCLE_DEADLINE: SkipReason
SKIP_REASON_NOT_REGISTERED: SkipReason
SKIP_REASON_OWNER_REVOKED: SkipReason
REPLICA_ROLE_UNSPECIFIED: ReplicaRole
REPLICA_ROLE_LEADER: ReplicaRole
REPLICA_ROLE_FOLLOWER: ReplicaRole
OVERLAP_POLICY_UNSPECIFIED: OverlapPolicy
OVERLAP_POLICY_SKIP: OverlapPolicy
OVERLAP_POLICY_BUFFER_ONE: OverlapPolicy
OVERLAP_POLICY_BUFFER_ALL: OverlapPolicy
OVERLAP_POLICY_CANCEL_OTHER: OverlapPolicy
CATCH_UP_UNSPECIFIED: CatchUp
CATCH_UP_NONE: CatchUp
CATCH_UP_ONE: CatchUp
TICK_DISPOSITION_UNSPECIFIED: TickDisposition
TICK_DISPOSITION_RAN: TickDisposition
TICK_DISPOSITION_SKIPPED: TickDisposition
TICK_DISPOSITION_MISSED: TickDisposition
TICK_DISPOSITION_COALESCED: TickDisposition
TICK_DISPOSITION_DROPPED: TickDisposition
ORIGIN_UNSPECIFIED: Origin
ORIGIN_CONFIG: Origin
ORIGIN_RPC: Origin
BREAKER_STATE_UNSPECIFIED: BreakerState
BREAKER_STATE_CLOSED: BreakerState
BREAKER_STATE_OPEN: BreakerState
BREAKER_STATE_HALF_OPEN: BreakerState

class RetryPolicy(_message.Message):
    __slots__ = ("max_attempts", "initial_backoff", "max_backoff", "backoff_multiplier", "retryable_status_codes")
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_BACKOFF_FIELD_NUMBER: _ClassVar[int]
    MAX_BACKOFF_FIELD_NUMBER: _ClassVar[int]
    BACKOFF_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_STATUS_CODES_FIELD_NUMBER: _ClassVar[int]
    max_attempts: int
    initial_backoff: _duration_pb2.Duration
    max_backoff: _duration_pb2.Duration
    backoff_multiplier: float
    retryable_status_codes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, max_attempts: _Optional[int] = ..., initial_backoff: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_backoff: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., backoff_multiplier: _Optional[float] = ..., retryable_status_codes: _Optional[_Iterable[str]] = ...) -> None: ...

class BreakerPolicy(_message.Message):
    __slots__ = ("failure_threshold", "open_for", "disabled")
    FAILURE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    OPEN_FOR_FIELD_NUMBER: _ClassVar[int]
    DISABLED_FIELD_NUMBER: _ClassVar[int]
    failure_threshold: int
    open_for: _duration_pb2.Duration
    disabled: bool
    def __init__(self, failure_threshold: _Optional[int] = ..., open_for: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., disabled: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_output_bytes", "max_metrics", "max_issues")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_METRICS_FIELD_NUMBER: _ClassVar[int]
    MAX_ISSUES_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_output_bytes: int
    max_metrics: int
    max_issues: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_output_bytes: _Optional[int] = ..., max_metrics: _Optional[int] = ..., max_issues: _Optional[int] = ...) -> None: ...

class Tls(_message.Message):
    __slots__ = ("peer",)
    PEER_FIELD_NUMBER: _ClassVar[int]
    peer: str
    def __init__(self, peer: _Optional[str] = ...) -> None: ...

class Registration(_message.Message):
    __slots__ = ("name", "endpoint", "phase", "requires", "after", "reads", "timeout", "retry", "breaker", "critical", "parameters", "limits", "record_output", "tls")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    CRITICAL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RECORD_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    name: str
    endpoint: str
    phase: int
    requires: _containers.RepeatedScalarFieldContainer[str]
    after: _containers.RepeatedScalarFieldContainer[str]
    reads: _containers.RepeatedScalarFieldContainer[str]
    timeout: _duration_pb2.Duration
    retry: RetryPolicy
    breaker: BreakerPolicy
    critical: bool
    parameters: _struct_pb2.Struct
    limits: Limits
    record_output: bool
    tls: Tls
    def __init__(self, name: _Optional[str] = ..., endpoint: _Optional[str] = ..., phase: _Optional[int] = ..., requires: _Optional[_Iterable[str]] = ..., after: _Optional[_Iterable[str]] = ..., reads: _Optional[_Iterable[str]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., retry: _Optional[_Union[RetryPolicy, _Mapping]] = ..., breaker: _Optional[_Union[BreakerPolicy, _Mapping]] = ..., critical: bool = ..., parameters: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., record_output: bool = ..., tls: _Optional[_Union[Tls, _Mapping]] = ...) -> None: ...

class SubsystemStatus(_message.Message):
    __slots__ = ("registration", "origin", "lease_expires_at", "suspended", "breaker", "initialized", "last", "last_cycle_id", "output_cycle_id", "output", "snapshot", "snapshot_error", "owner", "owner_revoked", "redacted", "etag", "former_names")
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LEASE_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    SUSPENDED_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    LAST_CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ERROR_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    OWNER_REVOKED_FIELD_NUMBER: _ClassVar[int]
    REDACTED_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    FORMER_NAMES_FIELD_NUMBER: _ClassVar[int]
    registration: Registration
    origin: Origin
    lease_expires_at: _timestamp_pb2.Timestamp
    suspended: bool
    breaker: BreakerState
    initialized: bool
    last: SubsystemTelemetry
    last_cycle_id: int
    output_cycle_id: int
    output: _struct_pb2.Struct
    snapshot: _struct_pb2.Struct
    snapshot_error: str
    owner: str
    owner_revoked: bool
    redacted: bool
    etag: str
    former_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, registration: _Optional[_Union[Registration, _Mapping]] = ..., origin: _Optional[_Union[Origin, str]] = ..., lease_expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., suspended: bool = ..., breaker: _Optional[_Union[BreakerState, str]] = ..., initialized: bool = ..., last: _Optional[_Union[SubsystemTelemetry, _Mapping]] = ..., last_cycle_id: _Optional[int] = ..., output_cycle_id: _Optional[int] = ..., output: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., snapshot: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., snapshot_error: _Optional[str] = ..., owner: _Optional[str] = ..., owner_revoked: bool = ..., redacted: bool = ..., etag: _Optional[str] = ..., former_names: _Optional[_Iterable[str]] = ...) -> None: ...

class SubsystemTelemetry(_message.Message):
    __slots__ = ("name", "state", "started_at", "finished_at", "duration_ms", "queued_ms", "attempts", "error_code", "error_message", "issues", "metrics", "output", "skip_reason", "output_sha256")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ISSUES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SKIP_REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: SubsystemState
    started_at: _timestamp_pb2.Timestamp
    finished_at: _timestamp_pb2.Timestamp
    duration_ms: float
    queued_ms: float
    attempts: int
    error_code: str
    error_message: str
    issues: _containers.RepeatedCompositeFieldContainer[_subsystem_pb2.Issue]
    metrics: _containers.ScalarMap[str, float]
    output: _struct_pb2.Struct
    skip_reason: SkipReason
    output_sha256: bytes
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[SubsystemState, str]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finished_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., duration_ms: _Optional[float] = ..., queued_ms: _Optional[float] = ..., attempts: _Optional[int] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., issues: _Optional[_Iterable[_Union[_subsystem_pb2.Issue, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., output: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., skip_reason: _Optional[_Union[SkipReason, str]] = ..., output_sha256: _Optional[bytes] = ...) -> None: ...

class CycleTelemetry(_message.Message):
    __slots__ = ("cycle_id", "started_at", "finished_at", "duration_ms", "error", "state", "trigger", "loop", "scheduled_at", "epoch", "critical_path", "subsystems", "request_id", "revision", "truncated", "trace_id", "triggered_by", "parent")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    LOOP_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_AT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CRITICAL_PATH_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_BY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    started_at: _timestamp_pb2.Timestamp
    finished_at: _timestamp_pb2.Timestamp
    duration_ms: float
    error: str
    state: CycleState
    trigger: Trigger
    loop: str
    scheduled_at: _timestamp_pb2.Timestamp
    epoch: int
    critical_path: _containers.RepeatedScalarFieldContainer[str]
    subsystems: _containers.RepeatedCompositeFieldContainer[SubsystemTelemetry]
    request_id: str
    revision: int
    truncated: bool
    trace_id: str
    triggered_by: str
    parent: ParentCycle
    def __init__(self, cycle_id: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finished_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., duration_ms: _Optional[float] = ..., error: _Optional[str] = ..., state: _Optional[_Union[CycleState, str]] = ..., trigger: _Optional[_Union[Trigger, str]] = ..., loop: _Optional[str] = ..., scheduled_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., epoch: _Optional[int] = ..., critical_path: _Optional[_Iterable[str]] = ..., subsystems: _Optional[_Iterable[_Union[SubsystemTelemetry, _Mapping]]] = ..., request_id: _Optional[str] = ..., revision: _Optional[int] = ..., truncated: bool = ..., trace_id: _Optional[str] = ..., triggered_by: _Optional[str] = ..., parent: _Optional[_Union[ParentCycle, _Mapping]] = ...) -> None: ...

class ParentCycle(_message.Message):
    __slots__ = ("orchestrator_id", "subsystem", "epoch", "cycle_id")
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    orchestrator_id: str
    subsystem: str
    epoch: int
    cycle_id: int
    def __init__(self, orchestrator_id: _Optional[str] = ..., subsystem: _Optional[str] = ..., epoch: _Optional[int] = ..., cycle_id: _Optional[int] = ...) -> None: ...

class SubsystemProgress(_message.Message):
    __slots__ = ("name", "state", "elapsed_ms", "attempts", "error_code", "error_message")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: SubsystemState
    elapsed_ms: float
    attempts: int
    error_code: str
    error_message: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[SubsystemState, str]] = ..., elapsed_ms: _Optional[float] = ..., attempts: _Optional[int] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class CycleStarted(_message.Message):
    __slots__ = ("cycle_id", "started_at", "trigger", "loop", "scheduled_at", "subsystems")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    LOOP_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_AT_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    started_at: _timestamp_pb2.Timestamp
    trigger: Trigger
    loop: str
    scheduled_at: _timestamp_pb2.Timestamp
    subsystems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cycle_id: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., trigger: _Optional[_Union[Trigger, str]] = ..., loop: _Optional[str] = ..., scheduled_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., subsystems: _Optional[_Iterable[str]] = ...) -> None: ...

class CycleProgress(_message.Message):
    __slots__ = ("cycle_id", "updates", "dropped")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    updates: _containers.RepeatedCompositeFieldContainer[SubsystemProgress]
    dropped: int
    def __init__(self, cycle_id: _Optional[int] = ..., updates: _Optional[_Iterable[_Union[SubsystemProgress, _Mapping]]] = ..., dropped: _Optional[int] = ...) -> None: ...

class Bookmark(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    def __init__(self, checkpoint: _Optional[str] = ...) -> None: ...

class UnreadableCycle(_message.Message):
    __slots__ = ("cycle_id", "revision", "problem")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    revision: int
    problem: str
    def __init__(self, cycle_id: _Optional[int] = ..., revision: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class CycleEvent(_message.Message):
    __slots__ = ("revision", "recorded", "started", "progress", "bookmark", "unreadable", "epoch")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    RECORDED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BOOKMARK_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    revision: int
    recorded: CycleTelemetry
    started: CycleStarted
    progress: CycleProgress
    bookmark: Bookmark
    unreadable: UnreadableCycle
    epoch: int
    def __init__(self, revision: _Optional[int] = ..., recorded: _Optional[_Union[CycleTelemetry, _Mapping]] = ..., started: _Optional[_Union[CycleStarted, _Mapping]] = ..., progress: _Optional[_Union[CycleProgress, _Mapping]] = ..., bookmark: _Optional[_Union[Bookmark, _Mapping]] = ..., unreadable: _Optional[_Union[UnreadableCycle, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class PlannedSubsystem(_message.Message):
    __slots__ = ("name", "phase", "level", "waits_for", "skip_reason", "expected_duration_ms", "skip_requirement", "breaker")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    SKIP_REASON_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    SKIP_REQUIREMENT_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    name: str
    phase: int
    level: int
    waits_for: _containers.RepeatedScalarFieldContainer[str]
    skip_reason: SkipReason
    expected_duration_ms: float
    skip_requirement: str
    breaker: BreakerState
    def __init__(self, name: _Optional[str] = ..., phase: _Optional[int] = ..., level: _Optional[int] = ..., waits_for: _Optional[_Iterable[str]] = ..., skip_reason: _Optional[_Union[SkipReason, str]] = ..., expected_duration_ms: _Optional[float] = ..., skip_requirement: _Optional[str] = ..., breaker: _Optional[_Union[BreakerState, str]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("subsystems", "levels", "critical_path", "expected_duration_ms", "subsystem_count")
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    CRITICAL_PATH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEM_COUNT_FIELD_NUMBER: _ClassVar[int]
    subsystems: _containers.RepeatedCompositeFieldContainer[PlannedSubsystem]
    levels: int
    critical_path: _containers.RepeatedScalarFieldContainer[str]
    expected_duration_ms: float
    subsystem_count: int
    def __init__(self, subsystems: _Optional[_Iterable[_Union[PlannedSubsystem, _Mapping]]] = ..., levels: _Optional[int] = ..., critical_path: _Optional[_Iterable[str]] = ..., expected_duration_ms: _Optional[float] = ..., subsystem_count: _Optional[int] = ...) -> None: ...

class IntervalLoop(_message.Message):
    __slots__ = ("name", "interval", "offset", "jitter", "overlap_policy", "catch_up", "catch_up_window", "subsystems", "parameters", "deadline", "record_outputs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    JITTER_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_POLICY_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    RECORD_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    interval: _duration_pb2.Duration
    offset: _duration_pb2.Duration
    jitter: _duration_pb2.Duration
    overlap_policy: OverlapPolicy
    catch_up: CatchUp
    catch_up_window: _duration_pb2.Duration
    subsystems: _containers.RepeatedScalarFieldContainer[str]
    parameters: _struct_pb2.Struct
    deadline: _duration_pb2.Duration
    record_outputs: bool
    def __init__(self, name: _Optional[str] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., offset: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., jitter: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., overlap_policy: _Optional[_Union[OverlapPolicy, str]] = ..., catch_up: _Optional[_Union[CatchUp, str]] = ..., catch_up_window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., subsystems: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., record_outputs: bool = ...) -> None: ...

class TickCounts(_message.Message):
    __slots__ = ("due", "ran", "skipped", "missed", "coalesced", "dropped")
    DUE_FIELD_NUMBER: _ClassVar[int]
    RAN_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    COALESCED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    due: int
    ran: int
    skipped: int
    missed: int
    coalesced: int
    dropped: int
    def __init__(self, due: _Optional[int] = ..., ran: _Optional[int] = ..., skipped: _Optional[int] = ..., missed: _Optional[int] = ..., coalesced: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class TickRange(_message.Message):
    __slots__ = ("first_due_at", "last_due_at", "count", "disposition")
    FIRST_DUE_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_DUE_AT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DISPOSITION_FIELD_NUMBER: _ClassVar[int]
    first_due_at: _timestamp_pb2.Timestamp
    last_due_at: _timestamp_pb2.Timestamp
    count: int
    disposition: TickDisposition
    def __init__(self, first_due_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_due_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., count: _Optional[int] = ..., disposition: _Optional[_Union[TickDisposition, str]] = ...) -> None: ...

class IntervalLoopStatus(_message.Message):
    __slots__ = ("loop", "origin", "stopped", "next_due_at", "ticks", "not_run", "last_cycle_id", "redacted", "paused")
    LOOP_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    NEXT_DUE_AT_FIELD_NUMBER: _ClassVar[int]
    TICKS_FIELD_NUMBER: _ClassVar[int]
    NOT_RUN_FIELD_NUMBER: _ClassVar[int]
    LAST_CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    REDACTED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    loop: IntervalLoop
    origin: Origin
    stopped: bool
    next_due_at: _timestamp_pb2.Timestamp
    ticks: TickCounts
    not_run: _containers.RepeatedCompositeFieldContainer[TickRange]
    last_cycle_id: int
    redacted: bool
    paused: bool
    def __init__(self, loop: _Optional[_Union[IntervalLoop, _Mapping]] = ..., origin: _Optional[_Union[Origin, str]] = ..., stopped: bool = ..., next_due_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ticks: _Optional[_Union[TickCounts, _Mapping]] = ..., not_run: _Optional[_Iterable[_Union[TickRange, _Mapping]]] = ..., last_cycle_id: _Optional[int] = ..., redacted: bool = ..., paused: bool = ...) -> None: ...

class RunningCycle(_message.Message):
    __slots__ = ("cycle_id", "started_at", "trigger", "loop", "total", "ended", "running")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    LOOP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    started_at: _timestamp_pb2.Timestamp
    trigger: Trigger
    loop: str
    total: int
    ended: int
    running: int
    def __init__(self, cycle_id: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., trigger: _Optional[_Union[Trigger, str]] = ..., loop: _Optional[str] = ..., total: _Optional[int] = ..., ended: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class WaitingCycle(_message.Message):
    __slots__ = ("cycle_id", "trigger", "loop", "scheduled_at", "waits_for_cycle_id", "waits_for_subsystem")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    LOOP_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_AT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    trigger: Trigger
    loop: str
    scheduled_at: _timestamp_pb2.Timestamp
    waits_for_cycle_id: int
    waits_for_subsystem: str
    def __init__(self, cycle_id: _Optional[int] = ..., trigger: _Optional[_Union[Trigger, str]] = ..., loop: _Optional[str] = ..., scheduled_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., waits_for_cycle_id: _Optional[int] = ..., waits_for_subsystem: _Optional[str] = ...) -> None: ...

class OrchestratorStatus(_message.Message):
    __slots__ = ("last_cycle", "total_cycles", "running_cycle", "queued_cycles", "loops", "epoch", "started_at", "uptime", "version", "orchestrator_id", "subsystem_count", "subsystems", "oldest_revision", "newest_revision", "store_error", "watchers", "running_cycles", "waiting_cycles", "insecure", "commit", "loops_paused", "read_only", "missing_count", "missing", "replica", "role", "leader", "lease_remaining", "unable_to_lead")
    LAST_CYCLE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_CYCLES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CYCLE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_CYCLES_FIELD_NUMBER: _ClassVar[int]
    LOOPS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_ID_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEM_COUNT_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_REVISION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_REVISION_FIELD_NUMBER: _ClassVar[int]
    STORE_ERROR_FIELD_NUMBER: _ClassVar[int]
    WATCHERS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CYCLES_FIELD_NUMBER: _ClassVar[int]
    WAITING_CYCLES_FIELD_NUMBER: _ClassVar[int]
    INSECURE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    LOOPS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    MISSING_COUNT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_FIELD_NUMBER: _ClassVar[int]
    UNABLE_TO_LEAD_FIELD_NUMBER: _ClassVar[int]
    last_cycle: CycleTelemetry
    total_cycles: int
    running_cycle: RunningCycle
    queued_cycles: int
    loops: _containers.RepeatedCompositeFieldContainer[IntervalLoopStatus]
    epoch: int
    started_at: _timestamp_pb2.Timestamp
    uptime: _duration_pb2.Duration
    version: str
    orchestrator_id: str
    subsystem_count: int
    subsystems: _containers.RepeatedCompositeFieldContainer[SubsystemStatus]
    oldest_revision: int
    newest_revision: int
    store_error: str
    watchers: int
    running_cycles: _containers.RepeatedCompositeFieldContainer[RunningCycle]
    waiting_cycles: _containers.RepeatedCompositeFieldContainer[WaitingCycle]
    insecure: bool
    commit: str
    loops_paused: bool
    read_only: bool
    missing_count: int
    missing: _containers.RepeatedScalarFieldContainer[str]
    replica: Replica
    role: ReplicaRole
    leader: Replica
    lease_remaining: _duration_pb2.Duration
    unable_to_lead: str
    def __init__(self, last_cycle: _Optional[_Union[CycleTelemetry, _Mapping]] = ..., total_cycles: _Optional[int] = ..., running_cycle: _Optional[_Union[RunningCycle, _Mapping]] = ..., queued_cycles: _Optional[int] = ..., loops: _Optional[_Iterable[_Union[IntervalLoopStatus, _Mapping]]] = ..., epoch: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., version: _Optional[str] = ..., orchestrator_id: _Optional[str] = ..., subsystem_count: _Optional[int] = ..., subsystems: _Optional[_Iterable[_Union[SubsystemStatus, _Mapping]]] = ..., oldest_revision: _Optional[int] = ..., newest_revision: _Optional[int] = ..., store_error: _Optional[str] = ..., watchers: _Optional[int] = ..., running_cycles: _Optional[_Iterable[_Union[RunningCycle, _Mapping]]] = ..., waiting_cycles: _Optional[_Iterable[_Union[WaitingCycle, _Mapping]]] = ..., insecure: bool = ..., commit: _Optional[str] = ..., loops_paused: bool = ..., read_only: bool = ..., missing_count: _Optional[int] = ..., missing: _Optional[_Iterable[str]] = ..., replica: _Optional[_Union[Replica, _Mapping]] = ..., role: _Optional[_Union[ReplicaRole, str]] = ..., leader: _Optional[_Union[Replica, _Mapping]] = ..., lease_remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., unable_to_lead: _Optional[str] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("name", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class RunCycleRequest(_message.Message):
    __slots__ = ("subsystems", "parameters", "request_id", "overlap_policy", "validate_only", "deadline", "record_outputs")
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_POLICY_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    ASYNC_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    RECORD_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    subsystems: _containers.RepeatedScalarFieldContainer[str]
    parameters: _struct_pb2.Struct
    request_id: str
    overlap_policy: OverlapPolicy
    validate_only: bool
    deadline: _duration_pb2.Duration
    record_outputs: bool
    def __init__(self, subsystems: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., request_id: _Optional[str] = ..., overlap_policy: _Optional[_Union[OverlapPolicy, str]] = ..., validate_only: bool = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., record_outputs: bool = ..., **kwargs) -> None: ...

class RunCycleResponse(_message.Message):
    __slots__ = ("cycle_id", "telemetry", "plan")
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    telemetry: CycleTelemetry
    plan: Plan
    def __init__(self, cycle_id: _Optional[int] = ..., telemetry: _Optional[_Union[CycleTelemetry, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class CancelCycleRequest(_message.Message):
    __slots__ = ("cycle_id",)
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    def __init__(self, cycle_id: _Optional[int] = ...) -> None: ...

class CancelCycleResponse(_message.Message):
    __slots__ = ("telemetry",)
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    telemetry: CycleTelemetry
    def __init__(self, telemetry: _Optional[_Union[CycleTelemetry, _Mapping]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("include_subsystems", "include_snapshots", "omit_last_cycle")
    INCLUDE_SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    OMIT_LAST_CYCLE_FIELD_NUMBER: _ClassVar[int]
    include_subsystems: bool
    include_snapshots: bool
    omit_last_cycle: bool
    def __init__(self, include_subsystems: bool = ..., include_snapshots: bool = ..., omit_last_cycle: bool = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: OrchestratorStatus
    def __init__(self, status: _Optional[_Union[OrchestratorStatus, _Mapping]] = ...) -> None: ...

class WatchCyclesRequest(_message.Message):
    __slots__ = ("after_revision", "from_oldest", "progress", "loops", "states", "subsystems", "after_epoch")
    AFTER_REVISION_FIELD_NUMBER: _ClassVar[int]
    FROM_OLDEST_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LOOPS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    AFTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    after_revision: int
    from_oldest: bool
    progress: bool
    loops: _containers.RepeatedScalarFieldContainer[str]
    states: _containers.RepeatedScalarFieldContainer[CycleState]
    subsystems: _containers.RepeatedScalarFieldContainer[str]
    after_epoch: int
    def __init__(self, after_revision: _Optional[int] = ..., from_oldest: bool = ..., progress: bool = ..., loops: _Optional[_Iterable[str]] = ..., states: _Optional[_Iterable[_Union[CycleState, str]]] = ..., subsystems: _Optional[_Iterable[str]] = ..., after_epoch: _Optional[int] = ...) -> None: ...

class WatchCyclesResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: CycleEvent
    def __init__(self, event: _Optional[_Union[CycleEvent, _Mapping]] = ...) -> None: ...

class GetCycleRequest(_message.Message):
    __slots__ = ("cycle_id",)
    CYCLE_ID_FIELD_NUMBER: _ClassVar[int]
    cycle_id: int
    def __init__(self, cycle_id: _Optional[int] = ...) -> None: ...

class GetCycleResponse(_message.Message):
    __slots__ = ("telemetry",)
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    telemetry: CycleTelemetry
    def __init__(self, telemetry: _Optional[_Union[CycleTelemetry, _Mapping]] = ...) -> None: ...

class ListCyclesRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "states", "trigger", "loop", "subsystem", "subsystem_states", "finished_from", "finished_before", "request_id")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    LOOP_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    SUBSYSTEM_STATES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FROM_FIELD_NUMBER: _ClassVar[int]
    FINISHED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[CycleState]
    trigger: Trigger
    loop: str
    subsystem: str
    subsystem_states: _containers.RepeatedScalarFieldContainer[SubsystemState]
    finished_from: _timestamp_pb2.Timestamp
    finished_before: _timestamp_pb2.Timestamp
    request_id: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[CycleState, str]]] = ..., trigger: _Optional[_Union[Trigger, str]] = ..., loop: _Optional[str] = ..., subsystem: _Optional[str] = ..., subsystem_states: _Optional[_Iterable[_Union[SubsystemState, str]]] = ..., finished_from: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finished_before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class ListCyclesResponse(_message.Message):
    __slots__ = ("cycles", "next_page_token", "unreadable")
    CYCLES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    cycles: _containers.RepeatedCompositeFieldContainer[CycleTelemetry]
    next_page_token: str
    unreadable: _containers.RepeatedCompositeFieldContainer[UnreadableCycle]
    def __init__(self, cycles: _Optional[_Iterable[_Union[CycleTelemetry, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unreadable: _Optional[_Iterable[_Union[UnreadableCycle, _Mapping]]] = ...) -> None: ...

class PlanCycleRequest(_message.Message):
    __slots__ = ("subsystems", "page_size", "page_token")
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    subsystems: _containers.RepeatedScalarFieldContainer[str]
    page_size: int
    page_token: str
    def __init__(self, subsystems: _Optional[_Iterable[str]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class PlanCycleResponse(_message.Message):
    __slots__ = ("plan", "next_page_token")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    next_page_token: str
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RegisterSubsystemRequest(_message.Message):
    __slots__ = ("registration", "lease")
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    registration: Registration
    lease: _duration_pb2.Duration
    def __init__(self, registration: _Optional[_Union[Registration, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RegisterSubsystemResponse(_message.Message):
    __slots__ = ("subsystem", "created", "previous")
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    created: bool
    previous: SubsystemStatus
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ..., created: bool = ..., previous: _Optional[_Union[SubsystemStatus, _Mapping]] = ...) -> None: ...

class UpdateSubsystemRequest(_message.Message):
    __slots__ = ("registration", "update_mask", "etag")
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    registration: Registration
    update_mask: _field_mask_pb2.FieldMask
    etag: str
    def __init__(self, registration: _Optional[_Union[Registration, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., etag: _Optional[str] = ...) -> None: ...

class UpdateSubsystemResponse(_message.Message):
    __slots__ = ("subsystem", "previous")
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    previous: SubsystemStatus
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ..., previous: _Optional[_Union[SubsystemStatus, _Mapping]] = ...) -> None: ...

class RenameSubsystemRequest(_message.Message):
    __slots__ = ("name", "new_name", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NEW_NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    new_name: str
    etag: str
    def __init__(self, name: _Optional[str] = ..., new_name: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class RenameSubsystemResponse(_message.Message):
    __slots__ = ("subsystem", "changed_subsystems", "changed_loops")
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    CHANGED_SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    CHANGED_LOOPS_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    changed_subsystems: _containers.RepeatedScalarFieldContainer[str]
    changed_loops: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ..., changed_subsystems: _Optional[_Iterable[str]] = ..., changed_loops: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterSubsystemsRequest(_message.Message):
    __slots__ = ("registrations", "lease")
    REGISTRATIONS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    registrations: _containers.RepeatedCompositeFieldContainer[Registration]
    lease: _duration_pb2.Duration
    def __init__(self, registrations: _Optional[_Iterable[_Union[Registration, _Mapping]]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RegisterSubsystemsResponse(_message.Message):
    __slots__ = ("created", "replaced", "replacements")
    CREATED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    REPLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    created: _containers.RepeatedScalarFieldContainer[str]
    replaced: _containers.RepeatedScalarFieldContainer[str]
    replacements: _containers.RepeatedCompositeFieldContainer[Replacement]
    def __init__(self, created: _Optional[_Iterable[str]] = ..., replaced: _Optional[_Iterable[str]] = ..., replacements: _Optional[_Iterable[_Union[Replacement, _Mapping]]] = ...) -> None: ...

class Replacement(_message.Message):
    __slots__ = ("subsystem", "previous")
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    previous: SubsystemStatus
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ..., previous: _Optional[_Union[SubsystemStatus, _Mapping]] = ...) -> None: ...

class UnregisterSubsystemRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnregisterSubsystemResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSubsystemRequest(_message.Message):
    __slots__ = ("name", "include_output", "include_snapshot")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    name: str
    include_output: bool
    include_snapshot: bool
    def __init__(self, name: _Optional[str] = ..., include_output: bool = ..., include_snapshot: bool = ...) -> None: ...

class GetSubsystemResponse(_message.Message):
    __slots__ = ("subsystem",)
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ...) -> None: ...

class ListSubsystemsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSubsystemsResponse(_message.Message):
    __slots__ = ("subsystems", "next_page_token")
    SUBSYSTEMS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    subsystems: _containers.RepeatedCompositeFieldContainer[SubsystemStatus]
    next_page_token: str
    def __init__(self, subsystems: _Optional[_Iterable[_Union[SubsystemStatus, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("lease_expires_at",)
    LEASE_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    lease_expires_at: _timestamp_pb2.Timestamp
    def __init__(self, lease_expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SuspendSubsystemRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SuspendSubsystemResponse(_message.Message):
    __slots__ = ("subsystem",)
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ...) -> None: ...

class ResumeSubsystemRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ResumeSubsystemResponse(_message.Message):
    __slots__ = ("subsystem",)
    SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    subsystem: SubsystemStatus
    def __init__(self, subsystem: _Optional[_Union[SubsystemStatus, _Mapping]] = ...) -> None: ...

class PruneCyclesRequest(_message.Message):
    __slots__ = ("keep_newest", "finished_before", "dry_run")
    KEEP_NEWEST_FIELD_NUMBER: _ClassVar[int]
    FINISHED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    keep_newest: int
    finished_before: _timestamp_pb2.Timestamp
    dry_run: bool
    def __init__(self, keep_newest: _Optional[int] = ..., finished_before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., dry_run: bool = ...) -> None: ...

class PruneCyclesResponse(_message.Message):
    __slots__ = ("removed", "oldest_revision", "kept")
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    OLDEST_REVISION_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    removed: int
    oldest_revision: int
    kept: str
    def __init__(self, removed: _Optional[int] = ..., oldest_revision: _Optional[int] = ..., kept: _Optional[str] = ...) -> None: ...

class StartIntervalLoopRequest(_message.Message):
    __slots__ = ("loop",)
    LOOP_FIELD_NUMBER: _ClassVar[int]
    loop: IntervalLoop
    def __init__(self, loop: _Optional[_Union[IntervalLoop, _Mapping]] = ...) -> None: ...

class StartIntervalLoopResponse(_message.Message):
    __slots__ = ("loop",)
    LOOP_FIELD_NUMBER: _ClassVar[int]
    loop: IntervalLoopStatus
    def __init__(self, loop: _Optional[_Union[IntervalLoopStatus, _Mapping]] = ...) -> None: ...

class StopIntervalLoopRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class StopIntervalLoopResponse(_message.Message):
    __slots__ = ("loop",)
    LOOP_FIELD_NUMBER: _ClassVar[int]
    loop: IntervalLoopStatus
    def __init__(self, loop: _Optional[_Union[IntervalLoopStatus, _Mapping]] = ...) -> None: ...

class PauseIntervalLoopsRequest(_message.Message):
    __slots__ = ("name", "all")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    name: str
    all: bool
    def __init__(self, name: _Optional[str] = ..., all: bool = ...) -> None: ...

class PauseIntervalLoopsResponse(_message.Message):
    __slots__ = ("loops",)
    LOOPS_FIELD_NUMBER: _ClassVar[int]
    loops: _containers.RepeatedCompositeFieldContainer[IntervalLoopStatus]
    def __init__(self, loops: _Optional[_Iterable[_Union[IntervalLoopStatus, _Mapping]]] = ...) -> None: ...

class ResumeIntervalLoopsRequest(_message.Message):
    __slots__ = ("name", "all")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    name: str
    all: bool
    def __init__(self, name: _Optional[str] = ..., all: bool = ...) -> None: ...

class ResumeIntervalLoopsResponse(_message.Message):
    __slots__ = ("loops",)
    LOOPS_FIELD_NUMBER: _ClassVar[int]
    loops: _containers.RepeatedCompositeFieldContainer[IntervalLoopStatus]
    def __init__(self, loops: _Optional[_Iterable[_Union[IntervalLoopStatus, _Mapping]]] = ...) -> None: ...

class ListIntervalLoopsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListIntervalLoopsResponse(_message.Message):
    __slots__ = ("loops", "next_page_token")
    LOOPS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    loops: _containers.RepeatedCompositeFieldContainer[IntervalLoopStatus]
    next_page_token: str
    def __init__(self, loops: _Optional[_Iterable[_Union[IntervalLoopStatus, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
