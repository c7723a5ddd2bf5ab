"""Command `understudy envserver`."""

import os
from collections.abc import Sequence

from understudy.arguments import parse_config


def run_envserver(argv: Sequence[str]) -> int:
    """Serve environments."""
    config = parse_config("envserver", argv)

    # Adapters start programs: gRPC's handlers for forks are of no use where an exec follows.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from envserver.server import serve_environments
    from understudy.process import prepare_process, run

    prepare_process("envserver", config.envserver.cpus)
    return run(serve_environments(config))
