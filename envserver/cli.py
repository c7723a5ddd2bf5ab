"""Command `understudy envserver`."""

from collections.abc import Sequence

from understudy.arguments import parse_config


def run_envserver(argv: Sequence[str]) -> int:
    """Serve environments."""
    config = parse_config("envserver", argv)

    from envserver.server import serve_environments
    from understudy.process import prepare_process, run

    prepare_process("envserver", config.envserver.cpus)
    return run(serve_environments(config))
