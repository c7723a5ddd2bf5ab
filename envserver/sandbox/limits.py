"""What a box may use, and how a call in it can end."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from understudy.config import SandboxConfig

MIB = 2**20


class Outcome(StrEnum):
    """How a call ended; all but OK and ERROR end its box, too."""

    OK = "ok"
    ERROR = "error"
    """The code raised, or its process ended by itself."""
    TIME = "time"
    MEMORY = "memory"
    OUTPUT = "output"
    PROCESSES = "processes"
    DISK = "disk"
    """Too many files. Too many bytes are an error that the code sees, and do not end the box."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one box; crossing one ends the box and nothing else."""

    call_seconds: float = 10.0
    """Wall time of a call, and CPU time of all processes from one call's start to the next's."""
    memory_bytes: int = 1024 * MIB
    """Address space of each process, and memory that all processes hold together."""
    processes: int = 32
    """Processes and threads, the two that the box itself needs included."""
    output_bytes: int = MIB
    """What a call may print, and the size of a reply."""
    disk_bytes: int = 64 * MIB
    """Size of the box's only writable directory, and of a file in it."""
    files: int = 10_000
    """Files and directories in it."""

    @classmethod
    def of(cls, config: SandboxConfig) -> "Limits":
        """The limits that a configuration asks for."""
        return cls(
            call_seconds=config.call_seconds,
            memory_bytes=config.memory_bytes,
            processes=config.processes,
        )

    def explain(self, outcome: Outcome) -> str:
        """What to tell the policy when a limit ended its box."""
        reasons = {
            Outcome.TIME: f"the call took longer than {self.call_seconds:g} seconds",
            Outcome.MEMORY: f"it needed more than {self.memory_bytes // MIB} MiB of memory",
            Outcome.OUTPUT: f"it printed more than {self.output_bytes // 1024} KiB",
            Outcome.PROCESSES: f"it started more than {self.processes} processes or threads",
            Outcome.DISK: f"it made more than {self.files} files",
        }
        reason = reasons.get(outcome, "its process ended")
        return f"Stopped: {reason}. Variables and files are lost, and Python begins afresh."


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came out of one call; everything in it was made by untrusted code."""

    outcome: Outcome
    output: str = ""
    """What the code printed, and the traceback if it raised."""
    value: Any = None
    """Plain JSON, or None."""
    ended: bool = False
    """The box is gone, and with it variables and files."""
