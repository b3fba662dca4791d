"""Registrations with a lease: made, renewed, made again after a loss, and removed at the end."""

import asyncio
import logging
import operator
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from .contract import orchestrator_pb2 as pb
from .credentials import Address, Credentials
from .options import OptionError, duration

log = logging.getLogger("dreamnet_subsystem")

SERVICE = "dreamnet.orchestrator.v1.Orchestrator"
CALL_TIMEOUT = 5.0  # Seconds for each call. It only writes a row.
FIRST_PAUSE = 0.25  # Seconds after the first failure; then doubled, up to the time between two renewals.

Code = grpc.StatusCode


class Refused(Exception):
    """A registration is invalid, so that trying again is of no use."""


class Registrar:
    """Keeps these registrations with an orchestrator."""

    def __init__(
        self, orchestrator: Address, credentials: Credentials, registrations: Sequence[pb.Registration], lease: float
    ) -> None:
        self._orchestrator = orchestrator
        self._credentials = credentials
        self._registrations = registrations
        self._lease = lease
        self._registered: set[str] = set()
        self._reported: dict[str, str] = {}  # The problems that last, by the name of a subsystem, or "" for all.

    async def keep(self) -> None:
        """Registers and renews until it is cancelled. An orchestrator that can't be reached is tried again without a
        limit: it may be restarting. Raises Refused."""
        pause = FIRST_PAUSE
        while True:
            try:
                # After a failure, a new connection: it uses the certificate as it is then.
                async with self._credentials.connect(self._orchestrator) as channel:
                    while True:
                        for registration in self._registrations:
                            await self._keep_one(channel, registration)
                        if self._reported.pop("", None) is not None:
                            log.info("subsystems are registered with %s", self._orchestrator.url)
                        pause = FIRST_PAUSE
                        await asyncio.sleep(self._lease / 3)
            except grpc.aio.AioRpcError as error:
                self._report("", f"{error.code().name}: {error.details()}")
            except OptionError as error:  # The files of the certificate or token are being replaced.
                self._report("", str(error))
            # Subsystems that lost the same orchestrator don't all come back at the same moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._lease / 3)

    async def unregister(self) -> None:
        """Removes the registrations that are still those of this process. Tries once."""
        if not self._registered:
            return
        try:
            async with self._credentials.connect(self._orchestrator) as channel:
                for registration in self._registrations:
                    if registration.name in self._registered and await self._is_ours(channel, registration):
                        request = pb.UnregisterSubsystemRequest(name=registration.name)
                        await self._call(channel, "UnregisterSubsystem", request, pb.UnregisterSubsystemResponse)
                        log.info("%s is unregistered", registration.name)
        except (grpc.aio.AioRpcError, OptionError) as error:
            problem = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else error
            log.warning("not unregistered, so the lease has to run out: %s", problem)

    async def _keep_one(self, channel: grpc.aio.Channel, registration: pb.Registration) -> None:
        name = registration.name
        if name in self._registered:
            try:
                await self._call(channel, "RenewLease", pb.RenewLeaseRequest(name=name), pb.RenewLeaseResponse)
                return
            except grpc.aio.AioRpcError as error:
                # The lease has run out, or somebody has registered the name without one.
                if error.code() not in (Code.NOT_FOUND, Code.FAILED_PRECONDITION):
                    raise
                self._registered.discard(name)
                log.warning("%s has lost its lease: %s; registering it again", name, error.details())
        request = pb.RegisterSubsystemRequest(registration=registration, lease=duration(self._lease))
        try:
            await self._call(channel, "RegisterSubsystem", request, pb.RegisterSubsystemResponse)
        except grpc.aio.AioRpcError as error:
            if error.code() is Code.INVALID_ARGUMENT:
                raise Refused(f"subsystem {name}: {error.details()}") from None
            if error.code() is not Code.FAILED_PRECONDITION:
                raise
            # The configuration file declares it, or it has another name now.
            self._report(name, f"{error.code().name}: {error.details()}")
            return
        self._registered.add(name)
        self._reported.pop(name, None)
        log.info("%s is registered as %s with %s", name, registration.endpoint, self._orchestrator.url)

    async def _is_ours(self, channel: grpc.aio.Channel, registration: pb.Registration) -> bool:
        """False if a successor of this process has already registered the name."""
        try:
            request = pb.GetSubsystemRequest(name=registration.name)
            answer = await self._call(channel, "GetSubsystem", request, pb.GetSubsystemResponse)
        except grpc.aio.AioRpcError as error:
            if error.code() is Code.NOT_FOUND:
                return False
            if error.code() is Code.PERMISSION_DENIED:  # It may register, but not read.
                return True
            raise
        return bool(answer.subsystem.registration.endpoint == registration.endpoint)

    async def _call(self, channel: grpc.aio.Channel, rpc: str, request: Message, answer: type[Any]) -> Any:
        call: Callable[..., Awaitable[Any]] = channel.unary_unary(
            f"/{SERVICE}/{rpc}", operator.methodcaller("SerializeToString"), answer.FromString
        )
        return await call(request, timeout=CALL_TIMEOUT, metadata=self._credentials.metadata())

    def _report(self, name: str, problem: str) -> None:
        """Logs a problem once, however long it lasts."""
        if self._reported.get(name) != problem:
            self._reported[name] = problem
            place = self._orchestrator.url
            log.warning(
                "%s not registered with %s: %s; trying again",
                f"{name} is" if name else "subsystems are",
                place,
                problem,
            )
