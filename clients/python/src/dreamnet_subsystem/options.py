"""The options of a registration: checked where they are given, and put into the contract's message."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypedDict

import grpc
from google.protobuf.duration_pb2 import Duration

from .contract import orchestrator_pb2 as pb
from .objects import to_struct

MAX_NAMES = 1024  # In `requires`, `after` and `reads` together. The contract sets these.
MAX_PARAMETERS = 64 << 10  # Bytes.
MILLISECOND, HOUR, DAY = 0.001, 3600.0, 86400.0


class OptionError(ValueError):
    """An option is unknown, or has a bad value. The message names it, and what to give instead."""


class Retry(TypedDict, total=False):
    """How calls are retried."""

    max_attempts: int
    """Most calls, including the first one: 1 to 10. Default 3."""
    initial_backoff: str | timedelta
    """1 ms to 1 h. Default 100 ms."""
    max_backoff: str | timedelta
    """At least `initial_backoff`, at most 1 h. Default 1 s."""
    backoff_multiplier: float
    """1 to 100. Default 2."""
    retryable_status_codes: list[str]
    """Names of gRPC status codes, without OK and CANCELLED. Default ["UNAVAILABLE"]."""


class Breaker(TypedDict, total=False):
    """When calls are held back."""

    failure_threshold: int
    """Number of consecutive failed cycles that opens the circuit breaker: 1 to 1,000. Default 5."""
    open_for: str | timedelta
    """How long it stays open before one probe call: 1 ms to 24 h. Default 30 s."""
    disabled: bool
    """True if it never opens."""


class Limits(TypedDict, total=False):
    """Limits on answers. An answer over one of them fails the call."""

    max_message_bytes: int
    """Up to 64 MiB. Default 4 MiB."""
    max_output_bytes: int
    """Up to 64 MiB. Default 1 MiB."""
    max_metrics: int
    """Up to 4,096. Default 64."""
    max_issues: int
    """Up to 1,024. Default 32."""


Parser = Callable[[str, Any], Any]


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises OptionError for the first option that does not exist."""
    known = sorted(known)
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"
            raise OptionError(f"{where} has no option {option}: {advice}")


def text(option: str, given: Any) -> str:
    """A text."""
    if not isinstance(given, str):
        raise OptionError(f"{option} is {given!r}; give a str")
    return given


def name(option: str, given: Any) -> str:
    """The name of a subsystem."""
    if not isinstance(given, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,62}", given):
        raise OptionError(f"{option} is {given!r}; give 1 to 63 letters, digits, '_', '-' or '.', first a letter")
    return given


def _names(option: str, given: Any) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        example = [given] if isinstance(given, str) else ["sensor"]
        raise OptionError(f"{option} is {given!r}; give a list of names, such as {option}={example!r}")
    return [name(option, item) for item in given]


def flag(option: str, given: Any) -> bool:
    """True or False."""
    if not isinstance(given, bool):
        raise OptionError(f"{option} is {given!r}; give True or False")
    return given


def whole(least: int, most: int) -> Parser:
    """A whole number in these bounds."""

    def parse(option: str, given: Any) -> int:
        if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
            raise OptionError(f"{option} is {given!r}; give a whole number from {least} to {most}")
        return given

    return parse


def _decimal(least: float, most: float) -> Parser:
    def parse(option: str, given: Any) -> float:
        if not isinstance(given, (int, float)) or isinstance(given, bool) or not least <= given <= most:
            raise OptionError(f"{option} is {given!r}; give a number from {least:g} to {most:g}")
        return float(given)

    return parse


_UNITS = {"ms": MILLISECOND, "s": 1.0, "m": 60.0, "h": HOUR}


def seconds(least: float, most: float) -> Parser:
    """A duration in these bounds, such as "4s", in seconds."""

    def parse(option: str, given: Any) -> float:
        made = math.nan
        if isinstance(given, timedelta):
            made = given.total_seconds()
        elif isinstance(given, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", given.strip())):
            made = float(match[1]) * _UNITS[match[2]]
        elif isinstance(given, (int, float)) and not isinstance(given, bool):
            raise OptionError(f'{option} is {given!r} without a unit; give "{given}s" or "{given}ms"')
        if math.isnan(made):
            raise OptionError(f'{option} is {given!r}; give a duration such as "500ms", "4s" or "2m", or a timedelta')
        if not least <= made <= most:
            raise OptionError(f"{option} is {given!r}; give {_spoken(least)} to {_spoken(most)}")
        return made

    return parse


def _spoken(length: float) -> str:
    unit, size = next((unit, size) for unit, size in reversed(_UNITS.items()) if length >= size)
    return f"{length / size:g} {unit}"


def duration(length: float) -> Duration:
    """The message of this many seconds."""
    made = Duration()
    made.FromNanoseconds(round(length * 1e6) * 1000)
    return made


def _duration(least: float, most: float) -> Parser:
    parse = seconds(least, most)
    return lambda option, given: duration(parse(option, given))


def _codes(option: str, given: Any) -> list[str]:
    known = [code.name for code in grpc.StatusCode if code.name not in ("OK", "CANCELLED")]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise OptionError(f'{option} is {given!r}; give a list of names, such as ["UNAVAILABLE"]')
    codes = list(given)
    for code in codes:
        if code not in known:
            raise OptionError(f"{option} contains {code!r}; give names of {', '.join(known)}")
    return codes


def _parameters(option: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise OptionError(f"{option} is {given!r}; give a dict")
    try:
        struct = to_struct(option, given)
    except (TypeError, ValueError) as error:
        raise OptionError(str(error)) from None
    if struct.ByteSize() > MAX_PARAMETERS:
        raise OptionError(f"{option} takes {struct.ByteSize()} bytes; give at most {MAX_PARAMETERS}")
    return struct


def _table(message: Callable[..., Any], parsers: Mapping[str, Parser]) -> Parser:
    def parse(option: str, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise OptionError(f"{option} is {given!r}; give a dict with some of {', '.join(parsers)}")
        refuse_unknown(option, given, parsers)
        return message(**{key: parsers[key](f"{option}.{key}", value) for key, value in given.items()})

    return parse


OPTIONS: Mapping[str, Parser] = {
    "requires": _names,
    "after": _names,
    "reads": _names,
    "phase": whole(-1_000_000, 1_000_000),
    "timeout": _duration(MILLISECOND, DAY),
    "critical": flag,
    "parameters": _parameters,
    "record_output": flag,
    "retry": _table(
        pb.RetryPolicy,
        {
            "max_attempts": whole(1, 10),
            "initial_backoff": _duration(MILLISECOND, HOUR),
            "max_backoff": _duration(MILLISECOND, HOUR),
            "backoff_multiplier": _decimal(1, 100),
            "retryable_status_codes": _codes,
        },
    ),
    "breaker": _table(
        pb.BreakerPolicy,
        {"failure_threshold": whole(1, 1000), "open_for": _duration(MILLISECOND, DAY), "disabled": flag},
    ),
    "limits": _table(
        pb.Limits,
        {
            "max_message_bytes": whole(1, 64 << 20),
            "max_output_bytes": whole(1, 64 << 20),
            "max_metrics": whole(1, 4096),
            "max_issues": whole(1, 1024),
        },
    ),
}
"""How each option of a registration is read, by its name. The names are those of the contract."""


def registration(subsystem: str, given: Mapping[str, Any]) -> pb.Registration:
    """The registration with these options, without an endpoint.

    Raises OptionError for the first one that has a bad value. An option that is None is left to its default.
    """
    where = f"subsystem {subsystem}"
    try:
        name("its name", subsystem)
        made = {key: OPTIONS[key](key, value) for key, value in given.items() if value is not None}
        others = [other for order in ("requires", "after", "reads") for other in made.get(order, [])]
        if subsystem in others:
            raise OptionError("it can't be its own input: keep its latest output in a variable")
        if len(others) > MAX_NAMES:
            raise OptionError(f"requires, after and reads have {len(others)} names; give at most {MAX_NAMES}")
        return pb.Registration(name=subsystem, **made)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
