"""Fleets with the real service, whose program is in the variable ORCHESTRATOR."""

import asyncio
import json
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from typing import Any

import grpc

from dreamnet_subsystem import Cycle, Fleet, FleetError
from dreamnet_subsystem.credentials import Credentials

from .calling import PATIENCE, Caller, refused, serving

PROGRAM = os.environ.get("ORCHESTRATOR", "")
ROOT = pathlib.Path(__file__).resolve().parents[3]


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@unittest.skipUnless(PROGRAM, "ORCHESTRATOR does not name the service's program")
class WithService(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.address = free_address()
        self.flags: list[str] = []
        self.log = (self.directory / "service.log").open("w")
        self.addCleanup(self.log.close)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Starts the service, with the same store each time, and waits until it listens."""
        store = f"sqlite:{self.directory}/orchestrator.db"
        command = [PROGRAM, "serve", "--listen", self.address, "--admin-listen", "off", "--store", store, *arguments]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.addCleanup(self.end, service)
        assert service.stdout
        self.assertIn("listening on", service.stdout.readline(), (self.directory / "service.log").read_text())
        return service

    @staticmethod
    def end(service: "subprocess.Popen[str]") -> None:
        service.terminate()
        service.wait(PATIENCE)
        assert service.stdout
        service.stdout.close()

    @staticmethod
    def kill(running: asyncio.subprocess.Process) -> None:
        if running.returncode is None:
            running.kill()

    async def ask(self, *command: str) -> Any:
        """The JSON that a command prints."""
        address = ("https://" if self.flags else "http://") + self.address.replace("127.0.0.1", "localhost")
        arguments = [*command, "--address", address, "--output", "json", *self.flags]
        made = await asyncio.to_thread(subprocess.run, [PROGRAM, *arguments], capture_output=True, text=True)
        self.assertEqual(made.returncode, 0, made.stderr + made.stdout)
        return json.loads(made.stdout or "{}")

    async def registered(self) -> dict[str, Any]:
        answer = await self.ask("subsystems", "list")
        return {it["registration"]["name"]: it for it in answer.get("subsystems", [])}

    async def until(self, what: str, holds: Callable[[dict[str, Any]], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not holds(registered := await self.registered()):
            self.assertLess(time.monotonic(), until, f"{what}: {registered}")

    async def run_cycle(self) -> tuple[str, dict[str, Any]]:
        """The state of a new cycle, and the part of each subsystem."""
        telemetry = (await self.ask("run", "--record-outputs"))["telemetry"]
        return telemetry["state"].removeprefix("CYCLE_STATE_"), {
            it["name"]: it for it in telemetry.get("subsystems", [])
        }

    def fleet(self, **options: Any) -> Fleet:
        return Fleet(**{"orchestrator": f"http://{self.address}", "lease": "1s", **options})

    async def test_it_waits_for_the_service_and_takes_part_through_its_restart(self) -> None:
        fleet = self.fleet()
        initialized: list[dict[str, Any]] = []

        @fleet.subsystem("first", parameters={"step": 2}, initialize=initialized.append, status=lambda: {"ok": True})
        def first(cycle: Cycle) -> dict[str, Any]:
            cycle.metric("cycle", cycle.cycle_id)
            return {"value": cycle.cycle_id * cycle.parameters["step"]}

        @fleet.subsystem("second", after=["first"], timeout="4s")
        async def second(cycle: Cycle) -> dict[str, Any]:
            return {"value": cycle.inputs["first"].output["value"] + 1}

        with self.assertLogs("dreamnet_subsystem") as logs:
            async with serving(fleet):
                until = time.monotonic() + PATIENCE
                while not any("trying again" in line for line in logs.output):
                    self.assertLess(time.monotonic(), until, logs.output)
                    await asyncio.sleep(0)
                service = self.start()
                await self.until("both are registered", lambda all: {"first", "second"} <= all.keys())
                for number in (1, 2):
                    state, parts = await self.run_cycle()
                    self.assertEqual(state, "SUCCEEDED")
                    self.assertEqual(parts["first"]["output"], {"value": 2 * number})
                    self.assertEqual(parts["second"]["output"], {"value": 2 * number + 1})
                    self.assertEqual(parts["first"]["metrics"], {"cycle": number})
                self.assertEqual(initialized, [{"step": 2}])

                self.end(service)
                self.start()
                state, parts = await self.run_cycle()
                self.assertEqual((state, parts["second"]["output"]), ("SUCCEEDED", {"value": 7}))
                self.assertEqual(len(initialized), 2)
            self.assertEqual(await self.registered(), {})
        waiting = [line for line in logs.output if "trying again" in line and "UNAVAILABLE" in line]
        self.assertLessEqual(len(waiting), 6, logs.output)
        self.assertTrue(any("subsystems are registered with" in line for line in logs.output), logs.output)

    async def test_a_lost_lease_is_registered_again(self) -> None:
        self.start()
        fleet = self.fleet()
        fleet.subsystem("it")(lambda _: None)
        with self.assertLogs("dreamnet_subsystem", "WARNING") as logs:
            async with serving(fleet):
                await self.until("it is registered", lambda all: "it" in all)
                await self.ask("subsystems", "unregister", "it")
                await self.until("it is registered again", lambda all: "it" in all)
        self.assertIn("it has lost its lease", logs.output[0])

    async def test_a_dead_process_loses_its_registration(self) -> None:
        self.start()
        fleet = self.fleet(unregister=False)
        fleet.subsystem("it")(lambda _: None)
        async with serving(fleet):
            await self.until("it is registered", lambda all: "it" in all)
        self.assertIn("it", await self.registered())
        await self.until("the lease has ended", lambda all: "it" not in all)

    async def test_a_successor_keeps_its_registration(self) -> None:
        self.start()
        old, new = self.fleet(), self.fleet()
        for fleet in (old, new):
            fleet.subsystem("it")(lambda _: None)
        async with serving(old) as (_, served):
            await self.until("the old one is registered", lambda all: "it" in all)
            async with serving(new) as (caller, _):
                endpoint = f"http://{caller.target}"
                await self.until("the new one is", lambda all: all["it"]["registration"]["endpoint"] == endpoint)
                old.stop()
                await asyncio.wait_for(served, PATIENCE)
                self.assertEqual((await self.registered())["it"]["registration"]["endpoint"], endpoint)

    async def test_an_invalid_registration_ends_the_fleet(self) -> None:
        self.start()
        fleet = self.fleet()
        fleet.subsystem("a", requires=["b"])(lambda _: None)
        fleet.subsystem("b", requires=["a"])(lambda _: None)
        with self.assertRaisesRegex(FleetError, "subsystem b: circular dependency: a requires b"):
            await asyncio.wait_for(fleet.serve(), PATIENCE)
        self.assertEqual(await self.registered(), {})

    async def test_it_passes_the_conformance_check(self) -> None:
        fleet = Fleet(orchestrator="")

        @fleet.subsystem("sync", initialize=lambda _: None, status=lambda: {"a": 1})
        def sync(cycle: Cycle) -> dict[str, Any]:
            cycle.sleep(cycle.parameters["work_ms"] / 1000)
            return {"cycle": cycle.cycle_id}

        async def status() -> dict[str, Any]:
            return {"a": 1}

        async def initialize(_: dict[str, Any]) -> None:
            await asyncio.sleep(0)

        @fleet.subsystem("async", initialize=initialize, status=status)
        async def asynchronous(cycle: Cycle) -> dict[str, Any]:
            await asyncio.sleep(cycle.parameters["work_ms"] / 1000)
            return {"cycle": cycle.cycle_id}

        async with serving(fleet) as (caller, _):
            for pair in (("sync", "async"), ("async", "sync")):
                names = [argument for name in pair for argument in ("--subsystem", name)]
                given = ["--strict", "--param", "work_ms=200", "--input", 'sensor={"value": 3}', "--output", "json"]
                command = [PROGRAM, "conformance", f"http://{caller.target}", *names, *given]
                made = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
                self.assertEqual(made.returncode, 0, made.stdout + made.stderr)
                outcomes = {it["outcome"] for it in json.loads(made.stdout)["checks"] if it["name"] != RESTART_ONLY}
                self.assertEqual(outcomes, {"PASSED"}, made.stdout)

    def issue(self, *names: str) -> pathlib.Path:
        pki = self.directory / "pki"
        commands = [["init"], *(["issue", "subsystem", name, "--host", "localhost"] for name in names)]
        for command in commands:
            made = subprocess.run([PROGRAM, "certs", "--dir", str(pki), *command], capture_output=True, text=True)
            self.assertEqual(made.returncode, 0, made.stderr)
        return pki

    async def test_with_tls_only_the_orchestrator_may_call(self) -> None:
        pki = self.issue("it", "other")
        self.start("--secure", str(pki))
        self.flags = ["--credentials", str(pki / "admin")]
        orchestrator = f"https://localhost:{self.address.rpartition(':')[2]}"
        fleet = self.fleet(orchestrator=orchestrator, credentials=pki / "it")
        fleet.subsystem("it")(lambda _: {"a": 1})
        async with serving(fleet) as (caller, _):
            self.assertTrue(caller.endpoint.startswith("https://"))
            await self.until("it is registered", lambda all: "it" in all)
            self.assertEqual((await self.registered())["it"]["owner"], "cert:spiffe://fleet/subsystem/it")
            state, parts = await self.run_cycle()
            self.assertEqual((state, parts["it"]["output"]), ("SUCCEEDED", {"a": 1}))
            # Another subsystem of the fleet, with an epoch that would lock the orchestrator out.
            other = Caller(caller.endpoint, Credentials(pki / "other"))
            code, message = await refused(other.run_cycle(1, epoch=1 << 60))
            self.assertEqual((code, message), ("PERMISSION_DENIED", "only spiffe://fleet/core may call"))
            await other.channel.close(None)
            # Without TLS, and so without a certificate.
            self.assertEqual((await refused(caller.run_cycle(1)))[0], "UNAVAILABLE")
            # A renewed certificate is used by the next connections.
            before = await asyncio.to_thread(self.certificate_of, caller.target, pki)
            renewed = ["certs", "--dir", str(pki), "renew", "--within", "400d"]
            made = await asyncio.to_thread(subprocess.run, [PROGRAM, *renewed], capture_output=True, text=True)
            self.assertEqual(made.returncode, 0, made.stderr)
            self.assertNotEqual(await asyncio.to_thread(self.certificate_of, caller.target, pki), before)
            self.assertEqual((await self.run_cycle())[0], "SUCCEEDED")
        self.assertEqual(await self.registered(), {})

    @staticmethod
    def certificate_of(target: str, pki: pathlib.Path) -> bytes | None:
        """What a server shows to the orchestrator on a new connection."""
        host, _, port = target.rpartition(":")
        tls = ssl.create_default_context(cafile=str(pki / "ca.pem"))
        tls.load_cert_chain(pki / "core" / "cert.pem", pki / "core" / "key.pem")
        tls.set_alpn_protocols(["h2"])
        with socket.create_connection((host, int(port)), PATIENCE) as plain:
            with tls.wrap_socket(plain, server_hostname=host) as connection:
                return connection.getpeercert(binary_form=True)

    async def test_a_program_ends_with_one_line_or_with_success(self) -> None:
        self.start()
        program = [sys.executable, str(ROOT / "examples" / "python" / "kit.py"), "--listen", "127.0.0.1:0"]
        bad = await asyncio.to_thread(
            subprocess.run, [*program, "--listen", self.address], capture_output=True, text=True, timeout=PATIENCE
        )
        self.assertEqual(bad.returncode, 1)
        self.assertIn("the port is in use", bad.stderr)
        self.assertNotIn("Traceback", bad.stderr)
        for number in (signal.SIGTERM, signal.SIGINT):
            command = [*program, "--orchestrator", f"http://{self.address}", "--reads", "sensor"]
            running = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.addCleanup(self.kill, running)
            assert running.stdout
            self.assertIn(b"listening on 127.0.0.1:", await running.stdout.readline())
            await self.until("average is registered", lambda all: "average" in all)
            self.assertEqual((await self.run_cycle())[0], "SUCCEEDED")
            running.send_signal(number)
            _, stderr = await asyncio.wait_for(running.communicate(), PATIENCE)
            log = stderr.decode()
            self.assertEqual(running.returncode, 0, log)
            self.assertIn("average is unregistered", log)
            self.assertEqual(await self.registered(), {})


RESTART_ONLY = "run-before-initialize"  # Only the first check after a start can see it.


class Channels(unittest.IsolatedAsyncioTestCase):
    async def test_a_token_is_sent_with_each_call(self) -> None:
        seen: list[str] = []

        async def register(_: bytes, context: Any) -> bytes:
            seen.append(dict(context.invocation_metadata()).get("authorization", ""))
            fleet.stop()
            return b""

        server = grpc.aio.server()
        methods = {"RegisterSubsystem": grpc.unary_unary_rpc_method_handler(register)}
        handler = grpc.method_handlers_generic_handler("dreamnet.orchestrator.v1.Orchestrator", methods)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with tempfile.NamedTemporaryFile("w") as token:  # Only its owner can read it.
            token.write("orc_1_2\n")
            token.flush()
            address = f"http://127.0.0.1:{port}"
            fleet = Fleet(orchestrator=address, credentials=token.name, unregister=False)
            fleet.subsystem("it")(lambda _: None)
            await asyncio.wait_for(fleet.serve(), PATIENCE)
        await server.stop(None)
        self.assertEqual(seen, ["Bearer orc_1_2"])


if __name__ == "__main__":
    unittest.main()
