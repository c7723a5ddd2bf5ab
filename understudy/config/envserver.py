"""[envserver]: the environment server's section."""

from pydantic import PositiveInt

from understudy.config.shared import Address, HostPort, Positive, ProcessConfig


class EnvserverConfig(ProcessConfig):
    """[envserver]: where episodes happen."""

    listen: Address = "127.0.0.1:7200"
    """Address of the gRPC server."""
    metrics_listen: HostPort = "127.0.0.1:9200"
    suites: tuple[str, ...] = ("practice",)
    """Suites to serve: registered names, or `module:Class`."""
    max_sessions: PositiveInt = 1024
    """Episodes at one time; one more is refused with a retry hint."""
    idle_timeout_seconds: Positive = 600.0
    """A session silent for longer is ended."""
    step_timeout_seconds: Positive = 300.0
    """A reset or step that takes longer fails its episode."""
    worker_threads: PositiveInt = 16
    """Threads that run environments; one whose call hangs is left to it and replaced."""
