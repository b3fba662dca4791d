"""The subsystem of subsystem.py, made with the kit in clients/python: what is left is what it does.

It averages the `value` of its inputs, over the latest `window` values (a parameter).
"""

import argparse
import collections
from typing import Any

from dreamnet_subsystem import Cycle, Failure, Fleet, Freshness, Severity

GIVEN = ("listen", "orchestrator", "credentials", "caller")  # Options of the fleet, if they are given.


class Average:
    def __init__(self) -> None:
        self.values: collections.deque[float] = collections.deque()
        self.counted: dict[str, int] = {}  # By input: the cycle of the last output that was counted.
        self.cycles = 0

    def initialize(self, parameters: dict[str, Any]) -> None:
        window = parameters.get("window", 10.0)
        if not isinstance(window, float) or not 1 <= window <= 1000:
            raise Failure(f"window is {window!r}, not 1 to 1000")
        self.values = collections.deque(self.values, maxlen=int(window))

    def run_cycle(self, cycle: Cycle) -> dict[str, float]:
        cycle.sleep(cycle.parameters.get("work_ms", 0) / 1000)  # Simulates work.
        for name, given in cycle.inputs.items():
            value = given.output.get("value")
            if not isinstance(value, float):
                cycle.issue("NO_VALUE", f"{name} gave no value")
            elif given.freshness is Freshness.STALE and self.counted.get(name) == given.cycle_id:
                cycle.issue("NOTHING_NEW", f"{name} gave nothing since cycle {given.cycle_id}", Severity.INFO)
            else:
                self.values.append(value)
        self.counted = {name: given.cycle_id for name, given in cycle.inputs.items()}
        self.cycles += 1
        cycle.metric("values", len(self.values))
        return {"value": sum(self.values) / len(self.values)} if self.values else {}

    def status(self) -> dict[str, Any]:
        return {"cycles": self.cycles, "values": list(self.values)}


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="average", help="the subsystem's name (default: %(default)s)")
    for option in GIVEN:
        parser.add_argument(f"--{option}", help=f"the option {option} of a Fleet")
    for order in ("requires", "after", "reads"):
        parser.add_argument(f"--{order}", type=names, default=[], metavar="A,B", help="names of other subsystems")
    args = parser.parse_args()
    average = Average()
    fleet = Fleet(**{option: given for option in GIVEN if (given := getattr(args, option)) is not None})
    fleet.subsystem(
        args.name,
        requires=args.requires,
        after=args.after,
        reads=args.reads,
        initialize=average.initialize,
        status=average.status,
    )(average.run_cycle)
    fleet.run(on_listening=lambda endpoint: print(f"listening on {endpoint.partition('://')[2]}", flush=True))


if __name__ == "__main__":
    main()
