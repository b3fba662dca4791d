"""A whole subsystem in Python, made from the contract alone.

It averages the `value` of its inputs, over the latest `window` values (a parameter).
"""

import argparse
import asyncio
import collections
import pathlib
import signal
import sys

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dreamnet.orchestrator.v1 import orchestrator_pb2 as orchestrator_pb
from dreamnet.orchestrator.v1 import orchestrator_pb2_grpc as orchestrator_rpc
from dreamnet.subsystem.v1 import subsystem_pb2 as pb
from dreamnet.subsystem.v1 import subsystem_pb2_grpc as rpc

ANSWERS_KEPT = 8  # Cycles. A call is repeated only while its cycle runs.
LEASE = 15  # Seconds until the orchestrator unregisters a dead subsystem.
GRACE = 5  # Seconds for running calls to end after a signal.
MAX_MESSAGE = 64 << 20  # Bytes. Inputs can be larger than gRPC's default limit of 4 MiB.


class Average(rpc.SubsystemServicer):
    # All code runs on one thread: no other call changes the state between two `await`s.

    def __init__(self, name, caller):
        self.name = name
        self.caller = caller  # The URI in the only certificate that is accepted. None without TLS.
        self.epoch = 0
        self.values = None  # The latest values. None means that it is not initialized.
        self.counted = {}  # By input: the cycle of the last output that was counted.
        self.answers = {}  # By cycle, oldest first.
        self.cycles = 0
        self.turn = asyncio.Lock()

    async def Initialize(self, request, context):
        await self.admit(request, context)
        window = request.parameters["window"] if "window" in request.parameters else 10
        if not isinstance(window, float | int) or not 1 <= window <= 1000:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"window is {window!r}, not 1 to 1000")
        self.values = collections.deque(self.values or (), maxlen=int(window))
        return pb.InitializeResponse()

    async def RunCycle(self, request, context):
        await self.admit(request, context)
        if self.values is None:  # The orchestrator calls Initialize and then RunCycle again.
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not initialized")
        async with self.turn:  # A repeated call waits here for the answer of the first one.
            if request.cycle_id not in self.answers:
                await self.work(request)
                await self.admit(request, context)  # It may have been superseded meanwhile.
                self.answers[request.cycle_id] = self.average(request.inputs)
                if len(self.answers) > ANSWERS_KEPT:
                    del self.answers[next(iter(self.answers))]
            return self.answers[request.cycle_id]

    async def GetStatus(self, request, context):
        await self.admit(request, context)
        answer = pb.GetStatusResponse()
        answer.status.update({"cycles": self.cycles, "values": list(self.values or ())})
        return answer

    async def admit(self, request, context):
        # The authority has signed the certificates of other subsystems as well.
        if self.caller and context.auth_context().get("peer_uri") != [self.caller.encode()]:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"only {self.caller} may call")
        if request.subsystem != self.name:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.subsystem!r} is not here, only {self.name!r}")
        epoch = getattr(request, "epoch", self.epoch)
        if epoch < self.epoch:
            message = f"epoch {epoch} is over, epoch {self.epoch} has called; restart {self.name} if that one is gone"
            await context.abort(grpc.StatusCode.ABORTED, message)
        if epoch > self.epoch:  # The cycles of the older epoch have ended.
            self.epoch = epoch
            self.answers.clear()

    async def work(self, request):
        """Simulates work for `work_ms` milliseconds (a parameter). When the deadline passes or the caller cancels,
        gRPC cancels the call here, before anything has changed."""
        if "work_ms" in request.parameters:
            await asyncio.sleep(request.parameters["work_ms"] / 1000)

    def average(self, inputs):
        answer = pb.RunCycleResponse()
        for name, given in inputs.items():
            value = given.output["value"] if "value" in given.output else None
            if not isinstance(value, float):
                answer.issues.add(severity=pb.SEVERITY_WARNING, code="NO_VALUE", message=f"{name} gave no value")
            elif self.counted.get(name) == given.cycle_id:
                message = f"{name} gave nothing since cycle {given.cycle_id}"
                answer.issues.add(severity=pb.SEVERITY_INFO, code="NOTHING_NEW", message=message)
            else:
                self.values.append(value)
        self.counted = {name: given.cycle_id for name, given in inputs.items()}
        self.cycles += 1
        if self.values:
            answer.output["value"] = sum(self.values) / len(self.values)
        answer.metrics["values"] = len(self.values)
        return answer


def read(directory):
    """The key, the certificate and the authority in a directory that `orchestrator certs issue` has made."""
    return [pathlib.Path(directory, name).read_bytes() for name in ("key.pem", "cert.pem", "ca.pem")]


def server_credentials(directory):
    """TLS with clients that have a certificate. The files are read again for each connection."""

    def current():
        key, certificate, authority = read(directory)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    return grpc.dynamic_ssl_server_credentials(current(), current, require_client_authentication=True)


def connect(orchestrator, directory):
    if directory is None:
        return grpc.aio.insecure_channel(orchestrator)
    key, certificate, authority = read(directory)
    return grpc.aio.secure_channel(orchestrator, grpc.ssl_channel_credentials(authority, key, certificate))


async def stay_registered(registration, orchestrator, directory):
    """Registers with a lease and renews it. Retries without a limit, unless the registration is invalid: returns why."""
    register = orchestrator_pb.RegisterSubsystemRequest(registration=registration, lease=Duration(seconds=LEASE))
    renew = orchestrator_pb.RenewLeaseRequest(name=registration.name)
    unregister = orchestrator_pb.UnregisterSubsystemRequest(name=registration.name)
    registered = False
    reported = None
    try:
        while True:
            try:
                # After a failure, the new connection uses the certificate as it is then.
                async with connect(orchestrator, directory) as channel:
                    stub = orchestrator_rpc.OrchestratorStub(channel)
                    while True:
                        if registered:
                            await stub.RenewLease(renew, timeout=GRACE)
                        else:
                            await stub.RegisterSubsystem(register, timeout=GRACE)
                            registered = True
                        reported = None
                        await asyncio.sleep(LEASE / 3)
            except grpc.aio.AioRpcError as error:
                problem = f"the orchestrator at {orchestrator}: {error.code().name}: {error.details()}"
                if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                    return problem
                if error.code() != reported:  # Once, however long it lasts.
                    print(f"{problem}; trying again every second", file=sys.stderr)
                    reported = error.code()
                # The lease has expired, or the subsystem was registered without one.
                if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
                    registered = False
            except OSError as error:  # The files of a certificate are being replaced.
                print(f"{error}; trying again every second", file=sys.stderr)
            await asyncio.sleep(1)
    finally:
        if registered:
            async with connect(orchestrator, directory) as channel:
                await orchestrator_rpc.OrchestratorStub(channel).UnregisterSubsystem(unregister, timeout=GRACE)


async def serve(args):
    """Serves until a signal. Returns what went wrong, if anything did."""
    # Without SO_REUSEPORT a second process on the same port fails, instead of getting half of the connections.
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE)]
    server = grpc.aio.server(options=options)
    caller = args.caller if args.credentials else None
    rpc.add_SubsystemServicer_to_server(Average(args.name, caller), server)
    healthy = health.aio.HealthServicer()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    host, _, _ = args.listen.rpartition(":")
    try:
        if args.credentials:
            port = server.add_secure_port(args.listen, server_credentials(args.credentials))
        else:
            port = server.add_insecure_port(args.listen)
    except OSError as error:
        return f"--credentials: {error}"
    except RuntimeError:  # Its message names no cause.
        return f"can't listen on {args.listen}: the port is in use, or the host is not an address of this machine"
    await server.start()
    address = f"{host}:{port}"
    print(f"listening on {address}", flush=True)

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    tasks = [asyncio.create_task(stop.wait())]
    if args.orchestrator:
        registration = orchestrator_pb.Registration(
            name=args.name,
            endpoint=f"{'https' if args.credentials else 'http'}://{address}",
            requires=args.requires,
            after=args.after,
            reads=args.reads,
        )
        tasks.append(asyncio.create_task(stay_registered(registration, args.orchestrator, args.credentials)))

    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    await healthy.enter_graceful_shutdown()
    await server.stop(GRACE)
    return next((problem for problem in ended if isinstance(problem, str)), None)


def address(text):
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def names(text):
    return [name for name in text.split(",") if name]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", type=address, default="127.0.0.1:50051", help="host:port (default: %(default)s)")
    parser.add_argument("--name", default="average", help="the subsystem's name (default: %(default)s)")
    parser.add_argument("--orchestrator", help="host:port to register with (default: not registered)")
    parser.add_argument("--credentials", metavar="DIR", help="cert.pem, key.pem and ca.pem for TLS (default: no TLS)")
    caller = "spiffe://fleet/core"
    parser.add_argument("--caller", metavar="URI", default=caller, help="the orchestrator's URI (default: %(default)s)")
    for order in ("requires", "after", "reads"):
        parser.add_argument(f"--{order}", type=names, default=[], metavar="A,B", help="names of other subsystems")
    sys.exit(asyncio.run(serve(parser.parse_args())))


if __name__ == "__main__":
    main()
