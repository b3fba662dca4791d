"""How a fleet stops, and its health."""

import asyncio
import operator
import threading
import unittest
from typing import Any

from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from dreamnet_subsystem import Cycle, Fleet, FleetError

from .calling import PATIENCE, refused, serving
from .test_calls import Gate, fleet_of


class Stopping(unittest.IsolatedAsyncioTestCase):
    async def test_running_calls_end_and_new_ones_are_unavailable(self) -> None:
        gate = Gate()
        fleet = fleet_of(gate.run_cycle)
        fleet.subsystem("other")(lambda _: None)
        async with serving(fleet) as (caller, task):
            watch = caller.channel.unary_stream(
                "/grpc.health.v1.Health/Watch", operator.methodcaller("SerializeToString"), UInt32Value.FromString
            )(StringValue())
            self.assertEqual((await watch.read()).value, 1)
            running = asyncio.ensure_future(caller.output(1))
            await gate.until_begun()
            fleet.stop()
            self.assertEqual((await watch.read()).value, 2)
            repeated = asyncio.ensure_future(caller.output(1))
            self.assertEqual(
                await refused(caller.run_cycle(1, subsystem="other")), ("UNAVAILABLE", "other is shutting down")
            )
            gate.open.set()
            self.assertEqual(await running, {"begun": 1})
            self.assertEqual(await repeated, {"begun": 1})
            await asyncio.wait_for(task, PATIENCE)

    async def test_the_last_answer_arrives_whole(self) -> None:
        gate = Gate()

        def work(cycle: Cycle) -> dict[str, Any]:
            gate.run_cycle(cycle)
            return {"text": "x" * (32 << 20)}

        fleet = fleet_of(work)
        async with serving(fleet) as (caller, _):
            running = asyncio.ensure_future(caller.output(1))
            await gate.until_begun()
            fleet.stop()
            gate.open.set()
            self.assertEqual(len((await running)["text"]), 32 << 20)

    async def test_work_beyond_the_grace_period_is_stopped(self) -> None:
        for work in (Gate().run_cycle, self._forever):
            fleet = fleet_of(work, fleet={"grace": "50ms"})
            with self.assertLogs("dreamnet_subsystem", "WARNING") as logs:
                async with serving(fleet) as (caller, task):
                    running = asyncio.ensure_future(refused(caller.run_cycle(1)))
                    await asyncio.wait({running}, timeout=0.1)
                    fleet.stop()
                    await asyncio.wait_for(task, PATIENCE)
                    self.assertIn((await running)[0], ("CANCELLED", "UNAVAILABLE"))
            self.assertIn("running calls are cut off", logs.output[0])

    @staticmethod
    async def _forever(_: Cycle) -> None:
        await asyncio.Event().wait()

    async def test_a_thread_that_never_ends_is_named_and_left_behind(self) -> None:
        end = threading.Event()
        self.addCleanup(end.set)
        fleet = fleet_of(lambda _: end.wait() and None, fleet={"grace": "0s"})
        with self.assertLogs("dreamnet_subsystem", "WARNING") as logs:
            async with serving(fleet) as (caller, task):
                running = asyncio.ensure_future(refused(caller.run_cycle(1)))
                await asyncio.wait({running}, timeout=0.1)
                fleet.stop()
                await asyncio.wait_for(task, PATIENCE)
                await running
        self.assertIn("left behind, still running: it: run_cycle", logs.output[-1])

    async def test_threads_end_with_the_fleet(self) -> None:
        before = set(threading.enumerate())
        async with serving(fleet_of(lambda _: None, status=dict)) as (caller, _):
            await asyncio.gather(caller.output(1), *(caller.status() for _ in range(20)))
        left = [it.name for it in set(threading.enumerate()) - before if it.name.startswith("it:")]
        self.assertEqual(left, [])

    async def test_it_serves_at_a_unix_socket_and_again_after_it_has_stopped(self) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            fleet = fleet_of(lambda _: {"a": 1}, fleet={"listen": f"unix:{directory}/s"})
            for _ in range(2):
                async with serving(fleet) as (caller, _task):
                    self.assertEqual(await caller.output(1), {"a": 1})

    async def test_a_port_in_use_is_reported(self) -> None:
        fleet = fleet_of(lambda _: None)
        async with serving(fleet) as (caller, _):
            with self.assertRaisesRegex(FleetError, f"can't listen on {caller.target}: the port is in use"):
                await fleet_of(lambda _: None, fleet={"listen": caller.target}).serve()

    async def test_a_fleet_without_a_subsystem_is_refused(self) -> None:
        with self.assertRaisesRegex(FleetError, "decorate a function"):
            await Fleet(orchestrator="").serve()

    async def test_health_of_another_service_is_not_found(self) -> None:
        async with serving(fleet_of(lambda _: None)) as (caller, _):
            check: Any = caller.channel.unary_unary(
                "/grpc.health.v1.Health/Check", operator.methodcaller("SerializeToString"), UInt32Value.FromString
            )
            for service in ("", "dreamnet.subsystem.v1.Subsystem"):
                self.assertEqual((await check(StringValue(value=service), timeout=PATIENCE)).value, 1)
            self.assertEqual((await refused(check(StringValue(value="x"), timeout=PATIENCE)))[0], "NOT_FOUND")


if __name__ == "__main__":
    unittest.main()
