"""Command `understudy inference`."""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from understudy.arguments import parse_config


def run_inference(argv: Sequence[str]) -> int:
    """Serve generations."""
    config = parse_config("inference", argv)

    from inference.server import serve_inference
    from understudy.process import prepare_process, run

    prepare_process("inference", config.inference.cpus, config.inference.threads)
    leave(run(serve_inference(config)))


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's teardown; what is registered for its exit runs.

    All work is done by then. In the teardown, native modules that vLLM loads would write a hundred
    lines about what they leak to the end of the log, where people look for what went wrong.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
