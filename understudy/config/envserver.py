"""[envserver]: the environment server's section."""

from typing import Annotated, Any

from pydantic import Field, PositiveInt

from understudy.config.base import Section
from understudy.config.shared import Address, HostPort, Positive, ProcessConfig


class SandboxConfig(Section):
    """[envserver.sandbox]: boxes for tools that run code or read files. Only suites that need them
    start any."""

    warm_boxes: PositiveInt = 8
    """Boxes that stand ready; an episode takes one with its first call that needs it."""
    call_seconds: Positive = 10.0
    """Wall time of one call, and CPU time of all processes of its box."""
    memory_bytes: Annotated[int, Field(ge=128 * 2**20)] = 2**30
    """Memory of a box, and address space of each of its processes."""
    processes: Annotated[int, Field(ge=8)] = 32
    """Processes and threads of a box."""
    unsafe: bool = False
    """Serve suites that need the sandbox even where its self-test fails. Code that models write
    then runs with the server's own rights, or with whatever is left of the sandbox."""


class EnvserverConfig(ProcessConfig):
    """[envserver]: where episodes happen."""

    listen: Address = "127.0.0.1:7200"
    """Address of the gRPC server."""
    metrics_listen: HostPort = "127.0.0.1:9200"
    suites: tuple[str, ...] | dict[str, dict[str, Any]] = ("practice",)
    """Suites to serve: registered names, or `module:Class`; or a table `[envserver.suites.NAME]`
    each, with options of the suite's own."""
    max_sessions: PositiveInt = 1024
    """Episodes at one time; one more is refused with a retry hint."""
    idle_timeout_seconds: Positive = 600.0
    """A session silent for longer is ended."""
    step_timeout_seconds: Positive = 300.0
    """A reset or step that takes longer fails its episode."""
    worker_threads: PositiveInt = 16
    """Threads that run environments; one whose call hangs is left to it and replaced."""
    sandbox: SandboxConfig = SandboxConfig()
