"""The environment server's process."""

from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from understudy import metrics
from understudy.config import Config
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.v1 import environment_pb2_grpc


async def serve_environments(config: Config) -> int:
    """Serve config.envserver.suites until drained. Returns the exit code."""
    control = RoleControl("envserver")
    servicer = EnvironmentServicer(load_suites(config.envserver.suites), config.envserver, control)
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
        servicer.workers.close()
    return 0
