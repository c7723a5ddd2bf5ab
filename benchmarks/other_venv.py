"""Virtual environments for packages that cannot share ours, made once beside it."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class PackageMissingError(Exception):
    """The packages could not be installed."""


def other_python(folder: Path, packages: Sequence[str], warm_up: str = "pass") -> Path:
    """Interpreter of an environment with these packages; made the first time, by the registry.

    Args:
        folder: where it is, or is to be.
        packages: as pip takes them.
        warm_up: a line of Python that is run once, for what is only done at the first import.

    Raises:
        PackageMissingError: with what pip said.
    """
    python, ready = folder / "bin" / "python", folder / f"ready-{'-'.join(packages)}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready.exists():
            return python
        commands = (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *packages],
            [str(python), "-c", warm_up],
        )
        try:
            for command in commands:
                subprocess.run(
                    command, check=True, capture_output=True, text=True, timeout=900, cwd=folder
                )  # some packages write logs where they are imported
        except (subprocess.SubprocessError, OSError) as error:
            said = str(getattr(error, "stderr", "") or error)
            shutil.rmtree(folder / "lib", ignore_errors=True)
            raise PackageMissingError(f"{' '.join(packages)}: {said[-2000:]}") from error
        ready.touch()
    return python
