#!/usr/bin/env bash
# The wheel in dist/, installed into an empty environment, and used from there.
set -euo pipefail
cd "$(dirname "$0")"
empty="$(mktemp -d)"
trap 'rm -rf "$empty"' EXIT
python3 -m venv "$empty/venv"
"$empty/venv/bin/python" -m pip install --quiet --disable-pip-version-check dist/*.whl
cd "$empty"
venv/bin/python - <<'PYTHON'
import asyncio, importlib.metadata, importlib.resources

from dreamnet_subsystem import Cycle, Fleet

assert importlib.resources.files("dreamnet_subsystem").joinpath("py.typed").is_file()
fleet = Fleet(orchestrator="")


@fleet.subsystem("it")
def it(cycle: Cycle) -> dict[str, int]:
    return {"cycle": cycle.cycle_id}


def listening(endpoint: str) -> None:
    print(importlib.metadata.version("dreamnet-subsystem"), "serves at", endpoint)
    fleet.stop()


asyncio.run(fleet.serve(listening))
PYTHON
