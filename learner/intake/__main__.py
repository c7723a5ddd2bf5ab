"""Entry point of the intake: `python -m learner.intake --config run.toml`."""

import sys
from collections.abc import Sequence

from understudy.arguments import config_parser, load_from
from understudy.errors import UnderstudyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the intake and return the exit code."""
    parser = config_parser("learner", "Serve the learner's intake.")
    try:
        config = load_from(parser.parse_args(arguments))
    except UnderstudyError as error:
        print(f"learner.intake: {error}", file=sys.stderr)
        return 1

    from learner.intake.server import serve_intake
    from understudy.process import prepare_process, run

    prepare_process("intake", config.learner.cpus)
    return run(serve_intake(config))


if __name__ == "__main__":
    sys.exit(main())
