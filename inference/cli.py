"""Command `understudy inference`."""

from collections.abc import Sequence

from understudy.arguments import parse_config


def run_inference(argv: Sequence[str]) -> int:
    """Serve generations."""
    config = parse_config("inference", argv)

    from inference.server import serve_inference
    from understudy.process import prepare_process, run

    prepare_process("inference", config.inference.cpus, config.inference.threads)
    return run(serve_inference(config))
