"""A fleet of subsystems in one process: where they are declared, served, registered, and stopped."""

import asyncio
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc

from .calls import SERVICE, Hosted, Service, Subsystem
from .credentials import SERVER_OPTIONS, Address, Credentials
from .cycle import Cycle
from .health import Health
from .options import (
    OPTIONS,
    Breaker,
    Limits,
    OptionError,
    Retry,
    flag,
    refuse_unknown,
    registration,
    seconds,
    text,
    whole,
)
from .registering import Refused, Registrar
from .threads import Threads

log = logging.getLogger("dreamnet_subsystem")

STATUS_THREADS = 4  # They are apart, so that a status is answered while all other threads work.
CALLS_OF_EACH = 8  # Concurrent calls for each subsystem: a cycle, its repeats, snapshots, and health checks.
LEAST_CALLS = 64
LAST_ANSWERS = 5.0  # Seconds to send the answers of the last work. A dead peer never takes them.
UNREGISTER = 5.0  # Seconds for the orchestrator to remove the registrations at the end.

F = TypeVar("F", bound=Callable[[Cycle], Any])


class FleetError(Exception):
    """The fleet can't be served, or its registration is invalid. The message says what to do."""


class Fleet:
    """Subsystems that are served at one endpoint.

    Every option is checked when it is given: an unknown one, or a bad value, raises OptionError.
    """

    def __init__(
        self,
        *,
        orchestrator: str | None = None,
        credentials: str | os.PathLike[str] | None = None,
        listen: str = "127.0.0.1:0",
        endpoint: str | None = None,
        caller: str = "spiffe://fleet/core",
        lease: str | timedelta = "15s",
        grace: str | timedelta = "10s",
        unregister: bool = True,
        threads: int = 32,
        **unknown: NoReturn,
    ) -> None:
        """
        orchestrator: where to register: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`. Default:
            ORCHESTRATOR_ADDRESS. Without it, or with "", the fleet only listens, and others register it.
        credentials: a directory with cert.pem, key.pem and ca.pem, as `orchestrator certs issue` makes it, for TLS in
            both directions; or a file with a token for the orchestrator. Default: ORCHESTRATOR_CREDENTIALS.
        listen: `HOST:PORT` or `unix:/PATH`. Port 0 is a free one.
        endpoint: where the orchestrator dials it, if not where it listens.
        caller: the URI in the certificate of the orchestrator. With TLS, no other caller is accepted.
        lease: the time until the orchestrator removes a dead process: 1 s to 24 h. Renewed three times as often.
        grace: the time for running calls to end after a signal: up to 1 h.
        unregister: True to remove the registrations at the end, together with the latest outputs. False for a process
            that is restarted: then cycles in between fail for it, until the lease ends.
        threads: the most functions that run at a time, of those that are not `async def`: 1 to 1,024.
        """
        refuse_unknown("Fleet", unknown, FLEET_OPTIONS)
        path = os.environ.get("ORCHESTRATOR_CREDENTIALS") if credentials is None else os.fspath(credentials)
        ca_file = os.environ.get("ORCHESTRATOR_CA_FILE")
        self._credentials = Credentials(Path(path) if path else None, Path(ca_file) if ca_file else None)
        given = os.environ.get("ORCHESTRATOR_ADDRESS") if orchestrator is None else orchestrator
        scheme = "https" if self._credentials.has_certificate else "http"
        self._orchestrator = Address.parse("orchestrator", given, scheme) if given else None
        self._credentials.check(self._orchestrator)
        self._listen = Address.parse("listen", listen)
        self._endpoint = Address.parse("endpoint", endpoint).url if endpoint is not None else None
        self._caller = text("caller", caller) if self._credentials.has_certificate else None
        self._lease = seconds(1, 86400)("lease", lease)
        self._grace = seconds(0, 3600)("grace", grace)
        self._unregister = flag("unregister", unregister)
        self._threads = whole(1, 1024)("threads", threads)
        self._subsystems: dict[str, Subsystem] = {}
        self._stop: Callable[[], object] | None = None
        if self._listen.is_tls or listen.startswith("http:"):
            raise OptionError(f"listen is {listen!r}; give HOST:PORT or unix:/PATH, without a scheme")
        if self._credentials.has_certificate and self._listen.url.startswith("unix:"):
            raise OptionError(f"listen is {listen!r}, where TLS is not used; give HOST:PORT, or no certificate")
        if self._orchestrator and not self._endpoint and _host(self._listen) in ("0.0.0.0", "[::]"):
            raise OptionError(f"listen is {listen!r}, which can't be dialed: give endpoint='http://HOST:PORT' as well")

    def subsystem(
        self,
        subsystem: str,
        *,
        requires: Sequence[str] | None = None,
        after: Sequence[str] | None = None,
        reads: Sequence[str] | None = None,
        phase: int | None = None,
        timeout: str | timedelta | None = None,
        critical: bool | None = None,
        parameters: Mapping[str, Any] | None = None,
        record_output: bool | None = None,
        retry: Retry | None = None,
        breaker: Breaker | None = None,
        limits: Limits | None = None,
        initialize: Callable[[dict[str, Any]], Any] | None = None,
        status: Callable[[], Any] | None = None,
        **unknown: NoReturn,
    ) -> Callable[[F], F]:
        """Declares a subsystem of this name, whose part in a cycle is the function that follows.

        The function gets a `Cycle`, and returns its output: a dict that JSON can represent, or None for an empty one.
        It is an `async def`, or it runs on a thread. An exception fails the call; the others continue.

        requires, after, reads: the names of its inputs. It runs after those of `requires` (and not if one fails) and
            of `after`, and in any order with those of `reads`.
        phase: every subsystem of a lower phase ends before. −1,000,000 to 1,000,000, default 0.
        timeout: the time for its part in a cycle, with all repeated calls: 1 ms to 24 h, default 10 s.
        critical: True if a cycle in which it fails is FAILED.
        parameters: what `initialize` and `Cycle.parameters` get. At most 64 KiB.
        record_output: True if the record of every cycle contains its output.
        retry, breaker, limits: see `Retry`, `Breaker`, `Limits`.
        initialize: called with the parameters before the first cycle of each orchestrator process and after a change of
            the registration, and in this process before any cycle. It must not reset what cycles have built up.
        status: returns a snapshot of the state for people, a dict. Called at any time, even while a cycle runs.
        """
        refuse_unknown(f"subsystem {subsystem}", unknown, SUBSYSTEM_OPTIONS)
        if subsystem in self._subsystems:
            raise OptionError(f"subsystem {subsystem} is declared twice; give one of them another name")
        for option, hook in (("initialize", initialize), ("status", status)):
            if hook is not None and not callable(hook):
                raise OptionError(f"subsystem {subsystem}: {option} is {hook!r}; give a function")
        options = {
            "requires": requires,
            "after": after,
            "reads": reads,
            "phase": phase,
            "timeout": timeout,
            "critical": critical,
            "parameters": parameters,
            "record_output": record_output,
            "retry": retry,
            "breaker": breaker,
            "limits": limits,
        }
        declared = registration(subsystem, options)

        def declare(run_cycle: F) -> F:
            if not callable(run_cycle):
                raise OptionError(f"subsystem {subsystem}: {run_cycle!r} is not a function")
            self._subsystems[subsystem] = Subsystem(declared, run_cycle, initialize, status)
            return run_cycle

        return declare

    def run(self, on_listening: Callable[[str], object] | None = None) -> None:
        """Serves until SIGTERM or SIGINT; then running calls may end, and new ones get UNAVAILABLE. A second signal
        ends it at once. It is the last line of a program: a problem ends the process with one line and exit code 1.

        Logs go to stderr, unless the program has set up `logging`.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        try:
            asyncio.run(self.serve(on_listening))
        except (FleetError, OptionError) as error:
            sys.exit(str(error))

    def stop(self) -> None:
        """Stops as a signal does. For another thread, or a function of the fleet."""
        if self._stop:
            self._stop()

    async def serve(self, on_listening: Callable[[str], object] | None = None) -> None:
        """The same as `run`, in an event loop of the program. Raises FleetError. Being cancelled is another way to stop
        it, without grace.

        `on_listening` is called once calls are answered, with the endpoint.
        """
        if not self._subsystems:
            raise FleetError("the fleet has no subsystem: decorate a function with @fleet.subsystem(NAME)")
        loop = asyncio.get_running_loop()
        stop, cut_off = asyncio.Event(), asyncio.Event()

        def request_stop() -> None:
            (cut_off if stop.is_set() else stop).set()

        self._stop = functools.partial(loop.call_soon_threadsafe, stop.set)
        signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        for signum in signals:
            loop.add_signal_handler(signum, request_stop)
        try:
            await self._serve(stop, cut_off, on_listening)
        finally:
            self._stop = None
            for signum in signals:
                loop.remove_signal_handler(signum)

    async def _serve(
        self, stop: asyncio.Event, cut_off: asyncio.Event, on_listening: Callable[[str], object] | None
    ) -> None:
        threads, status_threads = Threads(self._threads), Threads(STATUS_THREADS)
        hosted = {name: Hosted(it, threads, status_threads) for name, it in self._subsystems.items()}
        health = Health(SERVICE)
        most = max(LEAST_CALLS, CALLS_OF_EACH * len(hosted))
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=most)
        service = Service(hosted, self._caller)
        server.add_generic_rpc_handlers((service.handler(), health.handler()))
        endpoint = self._bind(server)
        await server.start()
        log.info("serving %s at %s", ", ".join(hosted), endpoint)
        registrar = self._registrar(endpoint)
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait())]
        if registrar:
            tasks.append(asyncio.create_task(registrar.keep()))
        refused: Refused | None = None
        try:
            if on_listening:
                on_listening(endpoint)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for hosts in hosted.values():
                hosts.is_draining = True
            health.stop()
            tasks += [asyncio.create_task(cut_off.wait())]
            refused = await self._leave(registrar, tasks[1:-1])
            if await self._drain(hosted, tasks[-1]):
                with suppress(asyncio.TimeoutError):  # gRPC closes connections without waiting for large answers.
                    await asyncio.wait_for(service.until_answered(), LAST_ANSWERS)
                await server.stop(LAST_ANSWERS)
        finally:
            for task in tasks:
                task.cancel()
            for hosts in hosted.values():
                hosts.close()
            await server.stop(None)
            left = await threads.join(1.0) + await status_threads.join(0.0)
            if left:
                log.warning("left behind, still running: %s", ", ".join(left))
            await asyncio.gather(*tasks, return_exceptions=True)
        if refused:
            raise FleetError(str(refused))

    async def _leave(self, registrar: Registrar | None, keeping: Sequence[asyncio.Task[Any]]) -> Refused | None:
        """Ends the registrations. Returns why they were refused, if they were."""
        for task in keeping:
            task.cancel()
        refused: Refused | None = None
        for ended in await asyncio.gather(*keeping, return_exceptions=True):
            if isinstance(ended, Refused):
                refused = ended
            elif isinstance(ended, Exception):
                raise ended
        if registrar and self._unregister:
            try:
                await asyncio.wait_for(registrar.unregister(), UNREGISTER)
            except asyncio.TimeoutError:
                log.warning("not unregistered within %g s, so the lease has to run out", UNREGISTER)
        return refused

    async def _drain(self, hosted: Mapping[str, Hosted], cut_off: "asyncio.Task[Any]") -> bool:
        """Waits until running work has ended, for the grace period at most. True if it has."""
        drained = asyncio.gather(*(it.drain() for it in hosted.values()))
        await asyncio.wait([drained, cut_off], timeout=self._grace, return_when=asyncio.FIRST_COMPLETED)
        is_drained = drained.done()
        if not is_drained:
            drained.cancel()
            log.warning("running calls are cut off")
        await asyncio.gather(drained, return_exceptions=True)
        return is_drained

    def _bind(self, server: grpc.aio.Server) -> str:
        """Listens, and returns the endpoint for registrations."""
        target, secure = self._listen.target, self._credentials.has_certificate
        if not secure and not self._listen.is_local:
            log.warning("listening on %s without TLS: anybody who can connect can call", target)
        try:
            if secure:
                port = server.add_secure_port(target, self._credentials.serving())
            else:
                port = server.add_insecure_port(target)
        except RuntimeError:  # Its message names no cause.
            port = 0
        if not port:
            why = "the port is in use, or the host is not an address of this machine"
            raise FleetError(f"can't listen on {target}: {why}")
        if self._endpoint:
            return self._endpoint
        if target.startswith("unix:"):
            return target
        return f"{'https' if secure else 'http'}://{_host(self._listen)}:{port}"

    def _registrar(self, endpoint: str) -> Registrar | None:
        if not self._orchestrator:
            log.info(
                "not registered: give orchestrator='http://HOST:PORT' or ORCHESTRATOR_ADDRESS, or let others do it"
            )
            return None
        registrations = [it.registration for it in self._subsystems.values()]
        for it in registrations:
            it.endpoint = endpoint
        return Registrar(self._orchestrator, self._credentials, registrations, self._lease)


FLEET_OPTIONS = [it for it in Fleet.__init__.__annotations__ if it not in ("unknown", "return")]
SUBSYSTEM_OPTIONS = [*OPTIONS, "initialize", "status"]


def _host(address: Address) -> str:
    return address.target.rpartition(":")[0]
