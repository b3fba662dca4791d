"""Makes the modules in src/dreamnet_subsystem/contract from the contract, or checks that they are up to date.

    python generate.py            # Makes them.
    python generate.py --check    # Exits with 1 if they differ from the contract.

Needs the version of grpcio-tools in requirements.txt: its protoc decides which versions of protobuf can load them.
"""

import importlib.resources
import pathlib
import re
import sys
import tempfile

from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent
CONTRACT = HERE.parent.parent / "proto"
MODULES = HERE / "src" / "dreamnet_subsystem" / "contract"
SOURCES = ["dreamnet/subsystem/v1/subsystem.proto", "dreamnet/orchestrator/v1/orchestrator.proto"]


def generate() -> dict[str, str]:
    """The text of each module, by the name of its file."""
    with tempfile.TemporaryDirectory() as directory:
        well_known = importlib.resources.files("grpc_tools") / "_proto"
        out = [f"--python_out={directory}", f"--pyi_out={directory}"]
        if protoc.main(["protoc", f"-I{CONTRACT}", f"-I{well_known}", *out, *SOURCES]) != 0:
            sys.exit("protoc failed; its message is above")
        made = sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())
        # The modules are beside each other, inside the package: authors may have others of the same names.
        return {
            path.name: re.sub(
                r"^from dreamnet\.\w+\.v1 import ", "from . import ", path.read_text(), flags=re.MULTILINE
            )
            for path in made
        }


def main() -> None:
    made = generate()
    present = {path.name: path.read_text() for path in MODULES.glob("*_pb2.py*")}
    if sys.argv[1:] == ["--check"]:
        stale = sorted(name for name in made.keys() | present.keys() if made.get(name) != present.get(name))
        if stale:
            sys.exit(f"{', '.join(stale)}: not what the contract gives; run python clients/python/generate.py")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        for name in present.keys() - made.keys():
            (MODULES / name).unlink()
        for name, text in made.items():
            (MODULES / name).write_text(text)


if __name__ == "__main__":
    main()
