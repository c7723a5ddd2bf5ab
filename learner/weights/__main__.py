"""Entry point of the weight store: `python -m learner.weights --config run.toml`."""

import sys
from collections.abc import Sequence

from understudy.arguments import config_parser, load_from
from understudy.errors import UnderstudyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the weight store and return the exit code."""
    parser = config_parser("learner", "Serve the learner's weight store.")
    try:
        config = load_from(parser.parse_args(arguments))
    except UnderstudyError as error:
        print(f"learner.weights: {error}", file=sys.stderr)
        return 1

    from learner.weights.server import serve_weights
    from understudy.process import prepare_process, run

    prepare_process("weights", config.learner.cpus)
    return run(serve_weights(config))


if __name__ == "__main__":
    sys.exit(main())
