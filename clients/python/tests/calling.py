"""A caller of subsystems, as an orchestrator is one, for the tests."""

import asyncio
import logging
import operator
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from dreamnet_subsystem import Fleet
from dreamnet_subsystem.calls import SERVICE
from dreamnet_subsystem.contract import subsystem_pb2 as pb
from dreamnet_subsystem.credentials import Address, Credentials
from dreamnet_subsystem.objects import from_struct, to_struct

# In its debug mode, which unittest switches on, it reports every step that takes long.
logging.getLogger("asyncio").setLevel(logging.ERROR)

PATIENCE = 20.0  # Seconds, for what should be there at once.


LARGE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Caller:
    """Calls the subsystem `it` over one connection."""

    def __init__(self, endpoint: str, credentials: Credentials | None = None) -> None:
        self.endpoint = endpoint
        self.target = endpoint if endpoint.startswith("unix:") else endpoint.partition("://")[2]
        if credentials:
            self.channel: Any = credentials.connect(Address(endpoint))
        else:
            self.channel = grpc.aio.insecure_channel(self.target, options=LARGE)

    def call(self, rpc: str, request: Any, answer: type[Any], **options: Any) -> Any:
        method = self.channel.unary_unary(
            f"/{SERVICE}/{rpc}", operator.methodcaller("SerializeToString"), answer.FromString
        )
        return method(request, **{"timeout": PATIENCE, **options})

    def run_cycle(
        self,
        cycle_id: int,
        epoch: int = 1,
        subsystem: str = "it",
        parameters: dict[str, Any] | None = None,
        inputs: dict[str, pb.Input] | None = None,
        **options: Any,
    ) -> Any:
        request = pb.RunCycleRequest(
            subsystem=subsystem,
            cycle_id=cycle_id,
            epoch=epoch,
            attempt=1,
            parameters=to_struct("parameters", parameters or {}),
            inputs=inputs or {},
        )
        return self.call("RunCycle", request, pb.RunCycleResponse, **options)

    def initialize(self, epoch: int = 1, parameters: dict[str, Any] | None = None, subsystem: str = "it") -> Any:
        given = to_struct("parameters", parameters or {})
        request = pb.InitializeRequest(subsystem=subsystem, epoch=epoch, parameters=given)
        return self.call("Initialize", request, pb.InitializeResponse)

    async def output(self, cycle_id: int, **options: Any) -> dict[str, Any]:
        return from_struct((await self.run_cycle(cycle_id, **options)).output)

    async def status(self) -> dict[str, Any]:
        answer = await self.call("GetStatus", pb.GetStatusRequest(subsystem="it"), pb.GetStatusResponse)
        return from_struct(answer.status)


async def refused(call: Any) -> tuple[str, str]:
    """The code and the message with which a call fails."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    raise AssertionError(f"not refused: {answer}")


@asynccontextmanager
async def serving(fleet: Fleet) -> AsyncIterator[tuple[Caller, "asyncio.Task[None]"]]:
    """A caller of the fleet, and the task that serves it."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(fleet.serve(listening.set_result))
    both: set[asyncio.Future[Any]] = {task, listening}
    await asyncio.wait(both, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    caller = Caller(listening.result())
    try:
        yield caller, task
    finally:
        fleet.stop()
        await asyncio.wait({task}, timeout=PATIENCE)
        await caller.channel.close(None)
        await task
