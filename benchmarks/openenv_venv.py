"""A virtual environment with OpenEnv's own package, made once in `.venv-openenv`."""

from pathlib import Path

from benchmarks.other_venv import PackageMissingError, other_python

VERSION = "0.10.0"
FOLDER = Path(__file__).parents[1] / ".venv-openenv"
OpenEnvMissingError = PackageMissingError


def openenv_python() -> Path:
    """Its interpreter; the first time this takes minutes and 500 MB, and needs the registry.

    Raises:
        OpenEnvMissingError: with what pip said.
    """
    return other_python(FOLDER, [f"openenv=={VERSION}"])
