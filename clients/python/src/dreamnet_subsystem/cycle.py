"""What a subsystem's function gets, and how it fails."""

import enum
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc

from .objects import to_number

MAX_METRIC_NAME = 128  # Bytes. The contract sets these.
MAX_ISSUE_CODE = 128
MAX_ISSUE_MESSAGE = 4 << 10


class Freshness(enum.Enum):
    """Whether an input is current."""

    FRESH = "FRESH"  # Made in this cycle.
    STALE = "STALE"  # Made in another cycle.
    ABSENT = "ABSENT"  # No output exists.


class Severity(enum.Enum):
    """How serious an issue is."""

    INFO = "INFO"  # Nothing is wrong.
    WARNING = "WARNING"  # A part of the work was left out or done worse than intended.
    ERROR = "ERROR"  # A part of the work failed, though the call as a whole did not.


@dataclass(frozen=True)
class Input:
    """The latest output of another subsystem."""

    output: dict[str, Any] = field(default_factory=dict)
    """A JSON object, whose numbers are floats. Empty if the input is ABSENT."""
    freshness: Freshness = Freshness.FRESH
    cycle_id: int = 0
    """The cycle that made it. 0 if the input is ABSENT."""


class Inputs(dict[str, Input]):
    """The inputs by the name of their maker: one for each name in `requires`, `after` and `reads`."""

    def __missing__(self, name: str) -> Input:
        has = ", ".join(sorted(self)) or "none"
        raise KeyError(f"{name} is not an input: name it in requires, after or reads (inputs: {has})")


@dataclass(frozen=True)
class Issue:
    """A problem or information that does not fail the call."""

    code: str
    message: str
    severity: Severity


class Failure(Exception):
    """Fails the call with a code of gRPC, recorded with the message. An exception of another kind becomes INTERNAL."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> None:
        if code is grpc.StatusCode.OK:
            raise ValueError("a Failure can't have the code OK")
        super().__init__(message)
        self.message = message
        self.code = code


class Unavailable(Failure):
    """Nothing was done, and it is safe to call again: the orchestrator does, as the registration's `retry` says."""

    def __init__(self, message: str) -> None:
        super().__init__(message, grpc.StatusCode.UNAVAILABLE)


class Stopped(Exception):
    """The answer can't be used any more, so the work ends. Raised by `Cycle.check` and `Cycle.sleep`."""


class Stop:
    """Tells work, which may be on another thread, that its answer can't be used any more."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.reason = ""
        self._set = threading.Event()

    def set(self, reason: str) -> None:
        if not self._set.is_set():
            self.reason = reason
            self._set.set()

    def is_set(self) -> bool:
        return self._set.is_set()

    def wait(self, seconds: float) -> None:
        self._set.wait(seconds)


@dataclass
class Cycle:
    """The part of one subsystem in one cycle. For a unit test of a function, name only the fields that it uses."""

    subsystem: str = ""
    """The name of the called subsystem."""
    cycle_id: int = 0
    """Strictly increasing, with gaps."""
    epoch: int = 0
    """The term of the calling orchestrator."""
    attempt: int = 1
    """The number of this call in its cycle. Log it; it must not change the work."""
    scheduled_at: datetime | None = None
    """When the cycle was due, in UTC: "now" for work that must be repeatable."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Those of the registration, overridden key by key by those of the cycle."""
    inputs: Mapping[str, Input] = field(default_factory=Inputs)
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """`traceparent` and `tracestate` (W3C Trace Context), if the cycle is traced: for OpenTelemetry's `extract`, and
    for requests that the work makes."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Those reported so far, see `metric`."""
    issues: list[Issue] = field(default_factory=list)
    """Those reported so far, see `issue`."""
    stop: Stop = field(default_factory=Stop, repr=False)

    @property
    def traceparent(self) -> str | None:
        """The span of the call, as W3C Trace Context writes it. None if the cycle is not traced."""
        return self.trace_headers.get("traceparent")

    def metric(self, name: str, value: float) -> None:
        """Reports a number to follow over time. By default, the orchestrator accepts 64 of them.

        Raises ValueError if the name is not 1 to 128 bytes, or the value is NaN or infinite.
        """
        if not 1 <= len(name.encode()) <= MAX_METRIC_NAME:
            raise ValueError(f"the name of the metric {name[:40]!r} is not 1 to {MAX_METRIC_NAME} bytes")
        self.metrics[name] = to_number(f"metric {name}", value)

    def issue(self, code: str, message: str, severity: Severity = Severity.WARNING) -> None:
        """Reports a problem or information without failing. By default, the orchestrator accepts 32 of them.

        `code` is a short constant for grouping by programs. A message of more than 4 KiB is shortened.
        Raises ValueError if the code is more than 128 bytes.
        """
        if len(code.encode()) > MAX_ISSUE_CODE:
            raise ValueError(f"the code of the issue {code[:40]!r} is more than {MAX_ISSUE_CODE} bytes")
        self.issues.append(Issue(code, shortened(message, MAX_ISSUE_MESSAGE), Severity(severity)))

    def remaining(self) -> float:
        """Seconds until the deadline: 0 after it, infinite without one."""
        return max(0.0, self.stop.deadline - time.monotonic())

    @property
    def stopped(self) -> bool:
        """True if the answer can't be used any more: the deadline has passed, the callers have gone, or a later cycle
        or epoch has begun. An `async def` function is cancelled then; another should return."""
        return self.stop.is_set() or self.remaining() == 0

    def check(self) -> None:
        """Raises Stopped if the answer can't be used any more. For between the steps of long work."""
        if self.stopped:
            raise Stopped(self.stop.reason or "its deadline has passed")

    def sleep(self, seconds: float) -> None:
        """Sleeps, and raises Stopped as soon as the answer can't be used any more. In an `async def` function, use
        `asyncio.sleep`."""
        self.stop.wait(min(seconds, self.remaining()))
        self.check()


def shortened(text: str, most: int) -> str:
    """The text, cut to this many bytes of UTF-8."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most:
        return encoded.decode()
    return encoded[: most - len("…".encode())].decode(errors="ignore") + "…"
