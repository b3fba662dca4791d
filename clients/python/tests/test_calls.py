"""The rules of the contract, over real gRPC."""

import asyncio
import threading
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

from dreamnet_subsystem import Cycle, Failure, Fleet, Freshness, Severity, Stopped, Unavailable
from dreamnet_subsystem.contract import subsystem_pb2 as pb
from dreamnet_subsystem.objects import from_struct, to_struct

from .calling import PATIENCE, Caller, refused, serving


class Gate:
    """Work that runs until it is let through. It counts how often it began."""

    def __init__(self) -> None:
        self.begun = 0
        self.has_begun = threading.Semaphore(0)
        self.has_stopped = threading.Semaphore(0)
        self.reason = ""
        self.open = threading.Event()

    def run_cycle(self, cycle: Cycle) -> dict[str, Any]:
        self.begun += 1
        mine = self.begun
        self.has_begun.release()
        try:
            while not self.open.is_set():
                cycle.sleep(0.01)
        except Stopped as stopped:
            self.stopped(str(stopped))
            raise
        return {"begun": mine}

    async def async_run_cycle(self, _: Cycle) -> dict[str, Any]:
        self.begun += 1
        mine = self.begun
        self.has_begun.release()
        try:
            await asyncio.to_thread(self.open.wait)
        except asyncio.CancelledError:
            self.stopped("cancelled")
            self.open.set()
            raise
        return {"begun": mine}

    def stopped(self, reason: str) -> None:
        self.reason = reason
        self.has_stopped.release()

    async def until_begun(self) -> None:
        await asyncio.to_thread(self.has_begun.acquire, timeout=PATIENCE)


def fleet_of(function: Callable[[Cycle], Any], **options: Any) -> Fleet:
    fleet = Fleet(orchestrator="", **options.pop("fleet", {}))
    fleet.subsystem("it", **options)(function)
    return fleet


class Calls(unittest.IsolatedAsyncioTestCase):
    async def test_a_function_gets_the_request_and_its_answer_is_sent(self) -> None:
        seen: list[Cycle] = []

        def work(cycle: Cycle) -> dict[str, Any]:
            seen.append(cycle)
            cycle.metric("mean", 2)
            cycle.issue("OLD", "y is old", Severity.INFO)
            return {"list": [1, None, {"a": True}], "text": "é", "empty": {}, "none": []}

        inputs = {
            "x": pb.Input(output=to_struct("x", {"v": 1}), freshness=pb.FRESHNESS_FRESH, cycle_id=7),
            "y": pb.Input(output=to_struct("y", {"v": 2}), freshness=pb.FRESHNESS_STALE, cycle_id=5),
            "z": pb.Input(),
        }
        traced = (("traceparent", "00-1-2-01"), ("tracestate", "a=b"), ("other", "x"))
        async with serving(fleet_of(work)) as (caller, _):
            answer = await caller.run_cycle(7, parameters={"p": 1}, inputs=inputs, metadata=traced)
        self.assertEqual(
            from_struct(answer.output), {"list": [1, None, {"a": True}], "text": "é", "empty": {}, "none": []}
        )
        self.assertEqual(dict(answer.metrics), {"mean": 2})
        self.assertEqual(
            [(it.severity, it.code, it.message) for it in answer.issues], [(pb.SEVERITY_INFO, "OLD", "y is old")]
        )
        cycle = seen[0]
        self.assertEqual((cycle.subsystem, cycle.cycle_id, cycle.epoch, cycle.attempt), ("it", 7, 1, 1))
        self.assertEqual(cycle.parameters, {"p": 1})
        self.assertEqual((cycle.inputs["x"].output, cycle.inputs["x"].freshness), ({"v": 1}, Freshness.FRESH))
        self.assertEqual((cycle.inputs["y"].cycle_id, cycle.inputs["y"].freshness), (5, Freshness.STALE))
        self.assertEqual((cycle.inputs["z"].output, cycle.inputs["z"].freshness), ({}, Freshness.ABSENT))
        with self.assertRaisesRegex(KeyError, r"name it in requires, after or reads \(inputs: x, y, z\)"):
            cycle.inputs["sensor"]
        self.assertEqual(cycle.traceparent, "00-1-2-01")
        self.assertEqual(cycle.trace_headers, {"traceparent": "00-1-2-01", "tracestate": "a=b"})
        # gRPC sends the time that is left rounded up.
        self.assertTrue(0 < cycle.remaining() < PATIENCE + 1)

    async def test_work_is_done_once_also_while_the_first_call_runs(self) -> None:
        gate = Gate()
        async with serving(fleet_of(gate.run_cycle)) as (caller, _):
            calls = [asyncio.ensure_future(caller.output(1)) for _ in range(4)]
            await gate.until_begun()
            gate.open.set()
            self.assertEqual(await asyncio.gather(*calls), [{"begun": 1}] * 4)
            self.assertEqual(await caller.output(1), {"begun": 1})
            self.assertEqual(await caller.output(2), {"begun": 2})
            # Only the latest answer is kept: an earlier cycle is over, and is not done again.
            self.assertEqual((await refused(caller.run_cycle(1)))[0], "ABORTED")
            self.assertEqual(gate.begun, 2)

    async def test_a_call_after_one_that_was_cut_off_finds_its_work(self) -> None:
        gate = Gate()
        for work in (gate.run_cycle, gate.async_run_cycle):
            gate.open.clear()
            begun = gate.begun + 1
            async with serving(fleet_of(work, status=dict)) as (caller, _):
                await self.cut_off(caller, gate)
                again = asyncio.ensure_future(caller.output(1))
                await caller.status()  # It has come over the same connection, after that call.
                gate.open.set()
                self.assertEqual(await again, {"begun": begun})

    async def test_work_whose_callers_have_gone_is_stopped(self) -> None:
        for is_async in (False, True):
            gate = Gate()
            with mock.patch("dreamnet_subsystem.calls.ABANDONED", 0.01):
                async with serving(fleet_of(gate.async_run_cycle if is_async else gate.run_cycle)) as (caller, _):
                    await self.cut_off(caller, gate)
                    await asyncio.to_thread(gate.has_stopped.acquire, timeout=PATIENCE)
                    self.assertIn(gate.reason, ("its callers have gone", "cancelled"))

    async def cut_off(self, caller: Caller, gate: Gate) -> None:
        """Cancels a call whose work has begun."""
        call = caller.run_cycle(1)
        first = asyncio.ensure_future(refused(call))
        await gate.until_begun()
        call.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await first

    async def test_late_work_is_stopped_and_a_call_with_time_left_does_it_again(self) -> None:
        gate = Gate()
        async with serving(fleet_of(gate.run_cycle)) as (caller, _):
            self.assertEqual((await refused(caller.run_cycle(1, timeout=0.2)))[0], "DEADLINE_EXCEEDED")
            gate.open.set()
            self.assertIn(await caller.output(1), ({"begun": 1}, {"begun": 2}))

    async def test_a_later_cycle_stops_the_work_of_an_earlier_one(self) -> None:
        for is_async in (False, True):
            ended: list[str] = []

            def work(cycle: Cycle, ended: list[str] = ended) -> None:
                if cycle.cycle_id == 1:
                    try:
                        cycle.sleep(3600)
                    except Stopped as stopped:
                        ended.append(str(stopped))
                        raise

            async def async_work(cycle: Cycle, ended: list[str] = ended) -> None:
                if cycle.cycle_id == 1:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        ended.append("cycle 2 has begun")
                        raise

            async with serving(fleet_of(async_work if is_async else work)) as (caller, _):
                first = asyncio.ensure_future(refused(caller.run_cycle(1)))
                await asyncio.wait({first}, timeout=0.1)
                await caller.run_cycle(2)
                self.assertEqual((await first)[0], "ABORTED")
            self.assertEqual(ended, ["cycle 2 has begun"])

    async def test_an_older_epoch_is_refused_and_a_newer_one_discards_answers(self) -> None:
        gate = Gate()
        gate.open.set()
        async with serving(fleet_of(gate.run_cycle)) as (caller, _):
            await caller.output(5, epoch=2)
            code, message = await refused(caller.run_cycle(6, epoch=1))
            self.assertEqual(code, "ABORTED")
            self.assertIn("epoch 1 is over: epoch 2 has called; restart it if that one is gone", message)
            self.assertEqual((await refused(caller.initialize(epoch=1)))[0], "ABORTED")
            self.assertEqual(await caller.output(1, epoch=3), {"begun": 2})

    async def test_it_is_initialized_before_its_first_cycle(self) -> None:
        given: list[dict[str, Any]] = []

        def initialize(parameters: dict[str, Any]) -> None:
            given.append(parameters)
            if parameters.get("bad"):
                raise Failure("bad is not good")

        async with serving(fleet_of(lambda _: {"given": len(given)}, initialize=initialize)) as (caller, _):
            self.assertEqual((await refused(caller.run_cycle(1)))[0], "FAILED_PRECONDITION")
            await caller.initialize(parameters={"a": 1})
            self.assertEqual(await caller.output(1), {"given": 1})
            # The last call counts, also if it fails.
            self.assertEqual(await refused(caller.initialize(parameters={"bad": True})), ("UNKNOWN", "bad is not good"))
            self.assertEqual((await refused(caller.run_cycle(2)))[0], "FAILED_PRECONDITION")
        self.assertEqual(given, [{"a": 1}, {"bad": True}])

    async def test_exceptions_become_codes_with_a_message_and_a_traceback_in_the_log(self) -> None:
        def unavailable() -> Any:
            raise Unavailable("busy")

        def stop_iteration() -> Any:
            return next(iter([]))

        def exit_process() -> Any:
            raise SystemExit(3)

        def cancelled() -> Any:
            raise asyncio.CancelledError

        def wrong_number() -> Any:
            return {"prices": [1, float("nan")]}

        def inexact() -> Any:
            return {"id": 2**53 + 1}

        def not_an_object() -> Any:
            return [1]

        def not_json() -> Any:
            return {"at": {"x": object()}}

        def deep() -> Any:
            made: dict[str, Any] = {}
            for _ in range(31):
                made = {"a": made}
            return made

        def long() -> Any:
            raise Failure("é" * 100_000)

        cases: list[tuple[Callable[[], Any], str, str, bool]] = [
            (unavailable, "UNAVAILABLE", "busy", False),
            (stop_iteration, "INTERNAL", "StopIteration", True),
            (exit_process, "INTERNAL", "SystemExit: 3", True),
            (cancelled, "INTERNAL", "a task that it waited for was cancelled", False),
            (wrong_number, "INTERNAL", "ValueError: output.prices[1] is nan", True),
            (inexact, "INTERNAL", "ValueError: output.id is 9007199254740993, beyond 2^53", True),
            (not_an_object, "INTERNAL", "TypeError: it returned list as its output; return a dict or None", True),
            (not_json, "INTERNAL", "TypeError: output.at.x is of type object", True),
            (deep, "INTERNAL", "nests deeper than 30 objects", True),
            (long, "UNKNOWN", "é" * 500, False),
        ]
        current: list[Callable[[], Any]] = []

        async def async_work(_: Cycle) -> Any:
            return current[0]()

        for work in (lambda _: current[0](), async_work):
            async with serving(fleet_of(work)) as (caller, _):
                for number, (function, code, message, is_logged) in enumerate(cases, 1):
                    current[:] = [function]
                    with self.subTest(function.__name__), self._logs(is_logged) as logs:
                        got = await refused(caller.run_cycle(number))
                        self.assertEqual(got[0], code)
                        self.assertIn(message, got[1])
                        self.assertLessEqual(len(got[1].encode()), 1024)
                        if logs:
                            self.assertIn("Traceback", logs.output[0])
                            self.assertIn("it: run_cycle failed", logs.output[0])
                # A failure is not an answer, and the next call does the work.
                current[:] = [lambda: {"ok": True}]
                self.assertEqual(await caller.output(len(cases)), {"ok": True})

    def _logs(self, is_logged: bool) -> Any:
        return self.assertLogs("dreamnet_subsystem") if is_logged else self.assertNoLogs("dreamnet_subsystem")

    async def test_other_subsystems_and_snapshots_are_answered_while_one_is_busy(self) -> None:
        gate = Gate()
        fleet = fleet_of(gate.run_cycle, status=lambda: {"begun": gate.begun}, fleet={"threads": 2})
        fleet.subsystem("other")(lambda _: {"other": True})
        async with serving(fleet) as (caller, _):
            busy = asyncio.ensure_future(caller.output(1))
            await gate.until_begun()
            self.assertEqual(await caller.output(1, subsystem="other"), {"other": True})
            self.assertEqual(await caller.status(), {"begun": 1})
            gate.open.set()
            await busy
            self.assertEqual((await refused(caller.run_cycle(1, subsystem="nobody")))[0], "NOT_FOUND")

    async def test_functions_of_one_subsystem_never_overlap(self) -> None:
        running, most = 0, 0
        begun, end = asyncio.Event(), asyncio.Event()

        async def work(_: object) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            begun.set()
            await end.wait()
            running -= 1

        async with serving(fleet_of(work, initialize=work, status=dict)) as (caller, _):
            end.set()
            await caller.initialize()
            pairs: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
                (lambda: caller.run_cycle(1), caller.initialize),
                (caller.initialize, lambda: caller.run_cycle(2)),
                (caller.initialize, caller.initialize),
            ]
            for first, second in pairs:
                begun.clear()
                end.clear()
                calls = [asyncio.ensure_future(first())]
                await begun.wait()
                calls.append(asyncio.ensure_future(second()))
                await caller.status()  # It has come over the same connection, after both.
                end.set()
                await asyncio.gather(*calls, return_exceptions=True)
        self.assertEqual(most, 1)

    async def test_a_subsystem_without_status_has_none(self) -> None:
        async with serving(fleet_of(lambda _: None)) as (caller, _):
            request = pb.GetStatusRequest(subsystem="it")
            code, message = await refused(caller.call("GetStatus", request, pb.GetStatusResponse))
            self.assertEqual((code, message), ("UNIMPLEMENTED", "it has no status"))

    async def test_inputs_of_sixty_mebibytes_arrive(self) -> None:
        for work in (lambda cycle: {"n": len(cycle.inputs["x"].output["t"])}, self._length):
            async with serving(fleet_of(work)) as (caller, _):
                large = pb.Input(output=to_struct("x", {"t": "x" * (60 << 20)}), freshness=pb.FRESHNESS_FRESH)
                self.assertEqual(await caller.output(1, inputs={"x": large}), {"n": 60 << 20})

    @staticmethod
    async def _length(cycle: Cycle) -> dict[str, Any]:
        return {"n": len(cycle.inputs["x"].output["t"])}


if __name__ == "__main__":
    unittest.main()
