"""Subsystems of DreamNet in Python: a function for each. The rules of the contract are kept here, once.

    from dreamnet_subsystem import Cycle, Fleet

    fleet = Fleet(orchestrator="http://127.0.0.1:7700")

    @fleet.subsystem("average", after=["sensor"], timeout="4s")
    def average(cycle: Cycle) -> dict[str, float]:
        return {"mean": cycle.inputs["sensor"].output.get("value", 0.0)}

    fleet.run()

`Fleet` is where to start reading; `calls.py` has the rules of the contract, `registering.py` those of the registration.
"""

from .cycle import Cycle, Failure, Freshness, Input, Issue, Severity, Stopped, Unavailable
from .fleet import Fleet, FleetError
from .options import Breaker, Limits, OptionError, Retry

__all__ = [
    "Breaker",
    "Cycle",
    "Failure",
    "Fleet",
    "FleetError",
    "Freshness",
    "Input",
    "Issue",
    "Limits",
    "OptionError",
    "Retry",
    "Severity",
    "Stopped",
    "Unavailable",
]
