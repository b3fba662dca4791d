"""`grpc.health.v1`: SERVING while calls are answered.

Its messages have the wire form of StringValue (`string service = 1`) and UInt32Value (`status = 1`). Modules made from
its proto would collide with those of `grpcio-health-checking` in the same process.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

SERVING = 1
NOT_SERVING = 2
SERVICE_UNKNOWN = 3


class Health:
    """The health of the whole process, whose name is empty, and of these services."""

    def __init__(self, *services: str) -> None:
        self._services = ("", *services)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Not serving from now on. Ends watches, which would keep the server."""
        self._stopped.set()

    def handler(self) -> Any:
        codec: dict[str, Any] = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": UInt32Value.SerializeToString,
        }
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, **codec),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, **codec),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)

    def _status(self, service: str) -> UInt32Value:
        if service not in self._services:
            return UInt32Value(value=SERVICE_UNKNOWN)
        return UInt32Value(value=NOT_SERVING if self._stopped.is_set() else SERVING)

    async def _check(self, request: StringValue, context: Any) -> UInt32Value:
        status = self._status(request.value)
        if status.value == SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.value[:200]!r} is not a service here")
        return status

    async def _watch(self, request: StringValue, context: Any) -> AsyncIterator[UInt32Value]:
        yield self._status(request.value)
        if not self._stopped.is_set():
            await self._stopped.wait()
            yield self._status(request.value)
