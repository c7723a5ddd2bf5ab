"""Entry point of one trainer rank.

torchrun --nproc-per-node 2 -m learner.trainer.main --stage rl --config run.toml
python -m learner.trainer.main --stage supervised --config run.toml --out models/base
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from understudy.arguments import config_parser, load_from
from understudy.config import Config
from understudy.errors import ConfigError, UnderstudyError
from understudy.process import prepare_process

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage of training and return the exit code."""
    parser = config_parser("learner", "Train: one rank, alone or under torchrun.")
    parser.add_argument("--stage", choices=("supervised", "rl"), required=True)
    parser.add_argument("--out", type=Path, help="folder for the supervised stage's model")
    args = parser.parse_args(arguments)
    try:
        config = load_from(args)
        learner = config.learner
        prepare_process("trainer", _cpus_of_rank(learner.trainer_cpus), learner.trainer_threads)
        _run(config, args)
    except UnderstudyError as error:
        _log.error("%s", error)
        return 1
    return 0


def _cpus_of_rank(cpus: Sequence[int]) -> Sequence[int]:
    """This rank's part of the CPUs that the node's ranks may use; all of them if they are few."""
    rank, num = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    return cpus[int(rank) :: int(num)] or cpus


def _run(config: Config, args: argparse.Namespace) -> None:
    if args.stage == "supervised" and args.out is None:
        raise ConfigError("--out is missing; name the folder for the supervised stage's model")
    import torch  # the first heavy import, after threads and CPUs are set
    import transformers

    from learner.trainer.ranks import joined

    transformers.logging.disable_progress_bar()

    torch.manual_seed(config.run.seed)
    with joined(config.learner.train.tensor_parallel) as ranks:
        if args.stage == "supervised":
            from learner.trainer.supervised import train_supervised

            train_supervised(config, args.out, ranks)
        else:
            from learner.trainer.reinforce import train_reinforce

            train_reinforce(config, ranks)


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's own shutdown.

    During that, with a gloo group behind it, a process now and then aborts ("terminate called
    without an active exception"): all work is done by then, but torchrun would take it for a
    failure and start all over again.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
