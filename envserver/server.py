"""The environment server's process."""

from collections.abc import Iterable

from envserver.environment import Suite
from envserver.registry import load_suites
from envserver.sandbox import Pool
from envserver.sandbox.selftest import open_sandbox
from envserver.servicer import EnvironmentServicer
from understudy import metrics
from understudy.config import Config, SandboxConfig
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.v1 import environment_pb2_grpc

CLOSE_SECONDS = 10.0
"""How long environments may take to close when the server stops."""


async def serve_environments(config: Config) -> int:
    """Serve config.envserver.suites until drained. Returns the exit code."""
    control = RoleControl("envserver")
    suites = load_suites(config.envserver.suites)
    pool = await _open_sandbox(suites.values(), config.envserver.sandbox)
    servicer = EnvironmentServicer(suites, config.envserver, control)
    control.figures = lambda: {"sessions": servicer.num_sessions}
    server = RoleServer(
        "envserver",
        config.envserver.listen,
        config.network,
        [
            Service(
                name="understudy.v1.EnvironmentService",
                add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
                servicer=servicer,
            )
        ],
        control,
    )
    try:
        await server.bind()
        metrics.start_exporter(config.envserver.metrics_listen, "envserver")
        await server.set_serving()
        await control.draining.wait()
    finally:
        await server.stop()
        await servicer.wait_closed(CLOSE_SECONDS)
        servicer.workers.close()
        if pool:
            await pool.close()
    return 0


async def _open_sandbox(suites: Iterable[Suite], config: SandboxConfig) -> Pool | None:
    """Give the suites that need it the sandbox. Raises ConfigError if it does not hold."""
    needing = [suite for suite in suites if suite.needs_sandbox]
    if not needing:
        return None
    pool = await open_sandbox(config)
    for suite in needing:
        suite.sandbox = pool
    return pool
