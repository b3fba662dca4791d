"""The rules of the contract: which calls do work, wait for it, or are refused.

* Work is done once. A repeated call of (`cycle_id`, `subsystem`) gets the first answer, and waits for it while the work
  still runs. Only the answer of a subsystem's latest cycle is kept: its cycles never overlap, and their ids increase.
  A failure is not an answer: a call after it does the work again.
* The functions of one subsystem never overlap, except `status`; those of different subsystems may.
* Work is told to stop when its answer can't be used any more: its deadline has passed, its callers have gone for
  ABANDONED seconds, or a later cycle or epoch calls. A connection that broke looks like a caller that has gone, but is
  followed by another call, which must find the work and not do it twice.
* A lower epoch than one already seen gets ABORTED, and a name that is not served here NOT_FOUND.
"""

import asyncio
import functools
import inspect
import logging
import math
import operator
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timezone
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from .contract import orchestrator_pb2 as registry
from .contract import subsystem_pb2 as pb
from .cycle import Cycle, Failure, Freshness, Input, Inputs, Stop, Stopped, Unavailable, shortened
from .objects import from_struct, to_struct
from .threads import Threads

log = logging.getLogger("dreamnet_subsystem")

SERVICE = "dreamnet.subsystem.v1.Subsystem"
ABANDONED = 5.0  # Seconds in which a call is repeated after its connection broke.
MAX_MESSAGE = (
    1 << 10
)  # Bytes of an error's message: those that are recorded. Many clients accept only 8 KiB of headers.
LARGE = 256 << 10  # Bytes of a request that takes long to read, so that other calls would have to wait.

A = TypeVar("A")
T = TypeVar("T")
Function = Callable[[Cycle], Any]


@dataclass(frozen=True)
class Subsystem:
    """A registration, without its endpoint, and the functions that do its work."""

    registration: registry.Registration
    run_cycle: Function
    initialize: Callable[[dict[str, Any]], Any] | None
    status: Callable[[], Any] | None

    @property
    def name(self) -> str:
        return self.registration.name


def _is_async(function: Callable[..., Any]) -> bool:
    """True for an `async def` function or method, or an object that is called as one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Work(Generic[T]):
    """Work in a task of its own, with the calls that wait for it."""

    def __init__(self, run: Callable[[Stop], Awaitable[T]], deadline: float, cycle_id: int = 0) -> None:
        self.cycle_id = cycle_id
        self._loop = asyncio.get_running_loop()
        self._stop = Stop(deadline)
        self._callers = 0
        self._timer: asyncio.TimerHandle | None = None
        self.task = asyncio.create_task(self._run(run))
        self.task.add_done_callback(self._ended)

    async def _run(self, run: Callable[[Stop], Awaitable[T]]) -> T:
        try:
            return await run(self._stop)
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise Failure("a task that it waited for was cancelled", grpc.StatusCode.INTERNAL) from None
            raise Stopped(self._stop.reason) from None

    def _ended(self, task: "asyncio.Task[T]") -> None:
        if self._timer:
            self._timer.cancel()
        if not task.cancelled():
            task.exception()  # It has been reported, and may have no caller any more.

    @property
    def has_failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)

    def stop(self, reason: str) -> None:
        """Cancels an `async def` function. Another sees it in its cycle, see `Cycle.stopped`."""
        if not self.task.done():
            self._stop.set(reason)
            self.task.cancel()

    async def join(self, deadline: float) -> T:
        """The answer. Raises Failure or Stopped."""
        self._callers += 1
        self._stop.deadline = max(self._stop.deadline, deadline)
        self._watch()
        try:
            # A caller that leaves doesn't take the work with it.
            return await asyncio.shield(self.task)
        finally:
            self._callers -= 1
            self._watch()

    def _watch(self) -> None:
        """Sets the timer for the moment at which the work has to stop, if nothing changes until then."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        at, reason = self._stop.deadline, "its deadline has passed"
        if not self._callers and (gone := self._loop.time() + ABANDONED) < at:
            at, reason = gone, "its callers have gone"
        if at != math.inf and not self.task.done():
            self._timer = self._loop.call_at(at, self.stop, reason)


class Hosted:
    """A subsystem, and the rules of the contract for it."""

    def __init__(self, subsystem: Subsystem, threads: Threads, status_threads: Threads) -> None:
        self._subsystem = subsystem
        self._threads = threads
        self._status_threads = status_threads
        self._epoch = 0  # The highest so far.
        self._is_initialized = subsystem.initialize is None
        self._latest: Work[pb.RunCycleResponse] | None = None
        self._works: set[Work[Any]] = set()  # All that run.
        self._turn = asyncio.Lock()  # Held by the one function that runs.
        self._status: asyncio.Task[pb.GetStatusResponse] | None = None
        self.is_draining = False

    async def initialize(self, request: pb.InitializeRequest, context: Any) -> pb.InitializeResponse:
        self._enter_epoch(request.epoch)
        initialize = self._subsystem.initialize
        if initialize is None:
            return pb.InitializeResponse()
        self._refuse_if_draining()

        async def run(stop: Stop) -> pb.InitializeResponse:
            async with self._turn:
                self._is_initialized = False  # The last call counts, also if it fails.
                parameters = functools.partial(from_struct, request.parameters)
                await self._call("initialize", initialize, stop, parameters, lambda _: None, request.ByteSize())
                self._is_initialized = True
                return pb.InitializeResponse()

        deadline = _deadline(context)
        return await self._begin(run, deadline).join(deadline)

    async def run_cycle(self, request: pb.RunCycleRequest, context: Any) -> pb.RunCycleResponse:
        deadline = _deadline(context)
        while True:
            self._enter_epoch(request.epoch)
            if not self._is_initialized:
                raise Failure("not initialized: call Initialize first", grpc.StatusCode.FAILED_PRECONDITION)
            work = self._work_of(request, context, deadline)
            try:
                answer = await work.join(deadline)
            except Stopped:
                # It stopped because an earlier call ended; this one still waits, so the work begins again.
                if self.is_draining or time.monotonic() >= deadline:
                    raise
            else:
                self._enter_epoch(request.epoch)  # It may have been superseded meanwhile.
                return answer

    async def get_status(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        if self._subsystem.status is None:
            raise Failure(f"{self._subsystem.name} has no status", grpc.StatusCode.UNIMPLEMENTED)
        if self._status is None or self._status.done():
            self._status = asyncio.create_task(self._take_status(self._subsystem.status))
            self._status.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Calls at the same time share one snapshot, so that any number of them takes one thread.
        return await asyncio.shield(self._status)

    async def drain(self) -> None:
        """Waits until no work is running; what has not begun by now never does."""
        self.is_draining = True
        while self._works:
            await asyncio.wait([work.task for work in self._works])

    def close(self) -> None:
        """Stops whatever runs."""
        self._stop_works("the process ends")
        if self._status:
            self._status.cancel()

    def _stop_works(self, reason: str) -> None:
        for work in self._works:
            work.stop(reason)

    def _enter_epoch(self, epoch: int) -> None:
        """Refuses a superseded caller. A new epoch ends the work and the answer of the old one."""
        name = self._subsystem.name
        if epoch < self._epoch:
            message = f"epoch {epoch} is over: epoch {self._epoch} has called; restart {name} if that one is gone"
            raise Failure(message, grpc.StatusCode.ABORTED)
        if epoch > self._epoch:
            self._stop_works(f"epoch {epoch} has begun")
            self._epoch, self._latest = epoch, None

    def _work_of(self, request: pb.RunCycleRequest, context: Any, deadline: float) -> Work[pb.RunCycleResponse]:
        """The work of this cycle, which begins now if it has not."""
        latest = self._latest
        if latest and request.cycle_id < latest.cycle_id:
            message = f"cycle {request.cycle_id} is over: cycle {latest.cycle_id} has called"
            raise Failure(message, grpc.StatusCode.ABORTED)
        if latest and request.cycle_id == latest.cycle_id and not latest.has_failed:
            return latest
        self._refuse_if_draining()
        if latest and request.cycle_id > latest.cycle_id:
            latest.stop(f"cycle {request.cycle_id} has begun")
        trace_headers = {key: value for key, value in context.invocation_metadata() if key in TRACE_HEADERS}

        async def run(stop: Stop) -> pb.RunCycleResponse:
            async with self._turn:
                return await self._run_cycle(request, trace_headers, stop)

        self._latest = self._begin(run, deadline, request.cycle_id)
        return self._latest

    def _begin(self, run: Callable[[Stop], Awaitable[T]], deadline: float, cycle_id: int = 0) -> Work[T]:
        work = Work(run, deadline, cycle_id)
        self._works.add(work)
        work.task.add_done_callback(lambda _: self._works.discard(work))
        return work

    def _refuse_if_draining(self) -> None:
        if self.is_draining:
            raise Unavailable(f"{self._subsystem.name} is shutting down")

    async def _run_cycle(
        self, request: pb.RunCycleRequest, trace_headers: Mapping[str, str], stop: Stop
    ) -> pb.RunCycleResponse:
        cycle: Cycle | None = None

        def given() -> Cycle:
            nonlocal cycle
            cycle = _cycle(request, trace_headers, stop)
            return cycle

        def answer(output: object) -> pb.RunCycleResponse:
            return _response(output, cycle or given())

        return await self._call("run_cycle", self._subsystem.run_cycle, stop, given, answer, request.ByteSize())

    async def _take_status(self, status: Callable[[], Any]) -> pb.GetStatusResponse:
        def answer(taken: object) -> pb.GetStatusResponse:
            return pb.GetStatusResponse(status=_object("status", taken))

        try:
            if _is_async(status):
                return answer(await status())
            thread = f"{self._subsystem.name}: status"
            return await self._status_threads.run(thread, lambda: answer(status()))
        except Stopped:
            raise
        except Exception as error:
            raise self._failure("status", error) from error

    async def _call(
        self,
        what: str,
        function: Callable[[A], Any],
        stop: Stop,
        argument: Callable[[], A],
        result: Callable[[Any], T],
        size: int,
    ) -> T:
        """The result of the function, whose argument is made of this many bytes of a request.

        Raises Failure, or Stopped.
        """
        thread = f"{self._subsystem.name}: {what}"
        if stop.is_set():
            raise Stopped(stop.reason)
        try:
            if not _is_async(function):
                return await self._threads.run(thread, lambda: result(function(argument())))
            given = await self._threads.run(thread, argument) if size > LARGE else argument()
            return result(await function(given))
        except Stopped as stopped:
            if not stop.is_set() and time.monotonic() < stop.deadline:
                raise self._failure(what, stopped) from stopped
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: BaseException) -> Failure:
        if isinstance(error, Failure):
            return error
        log.error("%s: %s failed", self._subsystem.name, what, exc_info=error)
        return Failure(f"{type(error).__name__}: {error}", grpc.StatusCode.INTERNAL)


Method = Callable[[Hosted, Any, Any], Awaitable[Message]]


class Service:
    """The contract's service, for all subsystems behind one endpoint."""

    def __init__(self, hosted: Mapping[str, Hosted], caller: str | None) -> None:
        self._hosted = hosted
        self._caller = caller  # The URI in the certificate of the only caller that is accepted. None without TLS.
        self._open = 0  # Calls whose answer is not sent yet.
        self._idle = asyncio.Event()
        self._idle.set()

    async def until_answered(self) -> None:
        """Waits until the answers of all calls are sent."""
        await self._idle.wait()

    def handler(self) -> Any:
        rpcs: dict[str, tuple[type[Any], Method]] = {
            "Initialize": (pb.InitializeRequest, Hosted.initialize),
            "RunCycle": (pb.RunCycleRequest, Hosted.run_cycle),
            "GetStatus": (pb.GetStatusRequest, Hosted.get_status),
        }
        methods = {
            rpc: grpc.unary_unary_rpc_method_handler(
                self._answering(method),
                request_deserializer=request.FromString,
                response_serializer=operator.methodcaller("SerializeToString"),
            )
            for rpc, (request, method) in rpcs.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _answering(self, method: Method) -> Callable[[Any, Any], Awaitable[Message]]:
        async def answer(request: Any, context: Any) -> Message:
            self._open += 1
            self._idle.clear()
            context.add_done_callback(self._closed)
            try:
                return await method(self._called(request.subsystem, context), request, context)
            except Failure as failure:
                code, message = failure.code, failure.message
            except Stopped as stopped:
                is_late = context.time_remaining() == 0
                code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
                message = f"stopped: {stopped}"
            await context.abort(code, shortened(message, MAX_MESSAGE))
            raise AssertionError("abort raises")

        return answer

    def _closed(self, _: Any) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()

    def _called(self, name: str, context: Any) -> Hosted:
        # The authority has signed the certificates of other subsystems as well.
        if self._caller and context.auth_context().get("peer_uri") != [self._caller.encode()]:
            raise Failure(f"only {self._caller} may call", grpc.StatusCode.PERMISSION_DENIED)
        hosted = self._hosted.get(name)
        if hosted is None:
            message = f"{name[:63]!r} is not served here; check its endpoint in the registration"
            raise Failure(message, grpc.StatusCode.NOT_FOUND)
        return hosted


# ----------------------------------------------------------------------------------------------------------------------
# To and from the messages

TRACE_HEADERS = ("traceparent", "tracestate")

_FRESHNESS = {pb.FRESHNESS_FRESH: Freshness.FRESH, pb.FRESHNESS_STALE: Freshness.STALE}


def _deadline(context: Any) -> float:
    """When the call ends, by the monotonic clock."""
    remaining = context.time_remaining()
    return math.inf if remaining is None else time.monotonic() + remaining


def _cycle(request: pb.RunCycleRequest, trace_headers: Mapping[str, str], stop: Stop) -> Cycle:
    inputs = Inputs()
    for name, given in request.inputs.items():
        freshness = _FRESHNESS.get(given.freshness, Freshness.ABSENT)
        output = {} if freshness is Freshness.ABSENT else from_struct(given.output)
        inputs[name] = Input(output, freshness, given.cycle_id)
    at = request.scheduled_at
    return Cycle(
        subsystem=request.subsystem,
        cycle_id=request.cycle_id,
        epoch=request.epoch,
        attempt=request.attempt,
        scheduled_at=at.ToDatetime(timezone.utc) if request.HasField("scheduled_at") else None,
        parameters=from_struct(request.parameters),
        inputs=inputs,
        trace_headers=trace_headers,
        stop=stop,
    )


def _object(what: str, given: object) -> Any:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"it returned {type(given).__name__} as its {what}; return a dict or None")
    return to_struct(what, given or {})


def _response(output: object, cycle: Cycle) -> pb.RunCycleResponse:
    answer = pb.RunCycleResponse(output=_object("output", output), metrics=cycle.metrics)
    for issue in cycle.issues:
        severity = pb.Severity.Value(f"SEVERITY_{issue.severity.name}")
        answer.issues.add(severity=severity, code=issue.code, message=issue.message)
    return answer
