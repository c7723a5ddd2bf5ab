"""Generates understudy/v1 from protos/ for wheels and editable installs alike."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def generate() -> None:
    """Write messages, aio stubs and their type stubs beside the package's own code."""
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    plugins = [
        f"--plugin={name}={shutil.which(name, path=search)}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    code = protoc.main(
        [
            "protoc",
            *plugins,
            f"-I{ROOT / 'protos'}",
            f"-I{well_known}",
            f"--python_out={ROOT}",
            f"--grpc_python_out={ROOT}",
            f"--mypy_out={ROOT}",
            f"--mypy_grpc_out={ROOT}",
            *sources,
        ]
    )
    if code:
        raise RuntimeError(f"protoc ended with {code} on {sources}")


class ProtoBuildHook(BuildHookInterface):
    """Runs protoc before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate()


if __name__ == "__main__":
    generate()
