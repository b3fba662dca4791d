"""Options are refused where they are given, with a message that says what to give instead."""

import os
import pathlib
import tempfile
import unittest
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

from dreamnet_subsystem import Cycle, Fleet, OptionError
from dreamnet_subsystem.options import registration


def fleet(**options: Any) -> Fleet:
    return Fleet(**{"orchestrator": "", **options})


class Options(unittest.TestCase):
    def test_a_bad_option_of_a_subsystem_is_named(self) -> None:
        for options, message in (
            ({"timeut": "4s"}, "subsystem it has no option timeut: did you mean timeout?"),
            ({"quux": 1}, "subsystem it has no option quux: the options are after, breaker, critical, initialize, "),
            ({"after": "sensor"}, "after is 'sensor'; give a list of names, such as after=['sensor']"),
            ({"reads": ["a b"]}, "reads is 'a b'; give 1 to 63 letters"),
            ({"requires": ["it"]}, "it can't be its own input"),
            ({"reads": [f"n{number}" for number in range(1025)]}, "have 1025 names; give at most 1024"),
            ({"timeout": 4}, 'timeout is 4 without a unit; give "4s" or "4ms"'),
            ({"timeout": "4 parsecs"}, "timeout is '4 parsecs'; give a duration such as"),
            ({"timeout": "0s"}, "timeout is '0s'; give 1 ms to 24 h"),
            ({"timeout": timedelta(days=2)}, "give 1 ms to 24 h"),
            ({"phase": "1"}, "phase is '1'; give a whole number from -1000000 to 1000000"),
            ({"critical": 1}, "critical is 1; give True or False"),
            ({"retry": {"max_attemps": 3}}, "retry has no option max_attemps: did you mean max_attempts?"),
            ({"retry": {"max_attempts": 11}}, "retry.max_attempts is 11; give a whole number from 1 to 10"),
            ({"retry": {"backoff_multiplier": True}}, "retry.backoff_multiplier is True; give a number from 1 to 100"),
            ({"retry": {"retryable_status_codes": ["BUSY"]}}, "contains 'BUSY'; give names of UNKNOWN"),
            ({"limits": 3}, "limits is 3; give a dict with some of max_message_bytes"),
            ({"parameters": {"a": [float("inf")]}}, "parameters.a[0] is inf"),
            ({"parameters": {"a": "x" * 70000}}, "give at most 65536"),
            ({"status": {"a": 1}}, "status is {'a': 1}; give a function"),
        ):
            with self.subTest(message):
                with self.assertRaises(OptionError) as refused:
                    fleet().subsystem("it", **options)
                self.assertIn(message, str(refused.exception))
                self.assertTrue(str(refused.exception).startswith("subsystem it"), refused.exception)

    def test_names_are_checked_and_unique(self) -> None:
        for name in ("", "x y", "1a", "é", "a" * 64):
            with self.assertRaisesRegex(OptionError, "give 1 to 63 letters"):
                fleet().subsystem(name)
        twice = fleet()
        twice.subsystem("it")(lambda _: None)
        with self.assertRaisesRegex(OptionError, "subsystem it is declared twice"):
            twice.subsystem("it")

    def test_options_are_put_into_the_registration(self) -> None:
        made = registration(
            "it",
            {
                "after": ("a",),
                "timeout": "1.5s",
                "retry": {"initial_backoff": "20ms", "retryable_status_codes": ["INTERNAL"]},
                "breaker": {"open_for": timedelta(minutes=1), "disabled": True},
                "limits": {"max_issues": 5},
                "parameters": {"a": 1},
                "critical": None,
            },
        )
        self.assertEqual((made.name, list(made.after), made.timeout.ToMilliseconds()), ("it", ["a"], 1500))
        self.assertEqual(made.retry.initial_backoff.ToMilliseconds(), 20)
        self.assertEqual(list(made.retry.retryable_status_codes), ["INTERNAL"])
        self.assertEqual((made.breaker.open_for.ToSeconds(), made.breaker.disabled), (60, True))
        self.assertEqual((made.limits.max_issues, made.parameters["a"], made.critical), (5, 1, False))

    def test_a_bad_option_of_the_fleet_is_named(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            token = directory / "token"
            token.write_text("orc_1_2\n")
            token.chmod(0o600)
            exposed = directory / "exposed"
            exposed.write_text("orc_1_2\n")
            exposed.chmod(0o644)
            empty = directory / "empty"
            empty.touch(0o600)
            for options, message in (
                ({"orchestrater": ""}, "Fleet has no option orchestrater: did you mean orchestrator?"),
                ({"orchestrator": "ftp://x:1"}, "orchestrator is 'ftp://x:1'; give http://HOST:PORT, https://"),
                ({"orchestrator": "localhost"}, "orchestrator is 'localhost'; give http://HOST:PORT"),
                ({"orchestrator": "http://x:99999"}, "orchestrator is 'http://x:99999'; give"),
                ({"listen": "nope"}, "listen is 'nope'"),
                ({"listen": "http://127.0.0.1:1"}, "give HOST:PORT or unix:/PATH, without a scheme"),
                ({"listen": "0.0.0.0:0", "orchestrator": "http://a:1"}, "give endpoint='http://HOST:PORT' as well"),
                ({"lease": "500ms"}, "lease is '500ms'; give 1 s to 24 h"),
                ({"unregister": "no"}, "unregister is 'no'; give True or False"),
                ({"threads": 0}, "threads is 0; give a whole number from 1 to 1024"),
                ({"credentials": "/nowhere"}, "credentials: /nowhere does not exist; give a directory with cert.pem"),
                ({"credentials": directory}, "key.pem can't be read: No such file"),
                (
                    {"credentials": token, "orchestrator": "http://a:1"},
                    "the token would be sent in clear to http://a:1",
                ),
                ({"credentials": exposed, "orchestrator": "https://a:1"}, "has mode 0644"),
                ({"credentials": empty, "orchestrator": "https://a:1"}, "contains no token"),
            ):
                with self.subTest(message), self.assertRaises(OptionError) as refused:
                    fleet(**options)
                self.assertIn(message, str(refused.exception))
            for orchestrator in ("http://127.0.0.1:1", "http://[::1]:1", "localhost:1", "unix:/o", "https://a:1"):
                fleet(credentials=token, orchestrator=orchestrator)

    def test_the_environment_names_the_orchestrator_and_the_credentials(self) -> None:
        for variable, message in (
            ("ORCHESTRATOR_ADDRESS", "orchestrator is '/nowhere'"),
            ("ORCHESTRATOR_CREDENTIALS", "credentials: /nowhere does not exist"),
        ):
            with mock.patch.dict(os.environ, {variable: "/nowhere"}), self.assertRaisesRegex(OptionError, message):
                Fleet()


class Cycles(unittest.TestCase):
    def test_a_function_can_be_tested_without_a_server(self) -> None:
        cycle = Cycle(parameters={"a": 1})
        cycle.metric("m", 2)
        cycle.issue("CODE", "x" * 5000)
        cycle.check()
        cycle.sleep(0)
        self.assertEqual((cycle.metrics, cycle.traceparent, cycle.stopped), ({"m": 2}, None, False))
        self.assertEqual(len(cycle.issues[0].message.encode()), 4096)
        calls: list[tuple[Callable[[], None], str]] = [
            (lambda: cycle.metric("", 1), "is not 1 to 128 bytes"),
            (lambda: cycle.metric("m", float("nan")), "metric m is nan"),
            (lambda: cycle.issue("x" * 129, ""), "more than 128 bytes"),
        ]
        for call, message in calls:
            with self.assertRaisesRegex(ValueError, message):
                call()


if __name__ == "__main__":
    unittest.main()
