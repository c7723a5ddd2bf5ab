"""Command `understudy learner`: the intake, the weight store and the trainer ranks."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from understudy.arguments import config_parser, load_from
from understudy.config import Config

INTAKE_MODULE = "learner.intake"
WEIGHTS_MODULE = "learner.weights"
TRAINER_MODULE = "learner.trainer.main"
_log = logging.getLogger(__name__)


def run_learner(argv: Sequence[str]) -> int:
    """Serve the intake, serve the weights, train with torchrun, or all of it."""
    parser = config_parser("learner", "Start the learner: its intake and its trainer ranks.")
    parser.add_argument(
        "--part",
        choices=("all", "intake", "weights", "trainer"),
        default="all",
        help="trainer nodes after the first run only `trainer`; `weights` is the weight store, "
        "where network.weights gives it a process of its own",
    )
    parser.add_argument("--stage", choices=("rl", "supervised"), default="rl")
    parser.add_argument("--out", type=Path, help="model folder that the supervised stage writes")
    arguments = parser.parse_args(argv)
    config = load_from(arguments)
    if arguments.part == "all" and arguments.stage == "rl":
        return _run_all(arguments, config)
    if arguments.part == "intake":
        command = intake_command(arguments)
    elif arguments.part == "weights":
        command = weights_command(arguments)
    else:
        prepare_torchrun()
        command = trainer_command(arguments, config)
    os.execv(command[0], command)


def intake_command(arguments: argparse.Namespace) -> list[str]:
    """Command line of the intake."""
    return [sys.executable, "-m", INTAKE_MODULE, *_passed_on(arguments)]


def weights_command(arguments: argparse.Namespace) -> list[str]:
    """Command line of the weight store, where it is a process of its own."""
    return [sys.executable, "-m", WEIGHTS_MODULE, *_passed_on(arguments)]


def prepare_torchrun() -> None:
    """Have each start of the ranks meet anew: in torchrun's own store, which outlives them, ranks
    that were started again find the addresses of those that died."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def trainer_command(arguments: argparse.Namespace, config: Config) -> list[str]:
    """Command line of this node's trainer ranks: torchrun, which restarts ranks that die."""
    learner = config.learner
    meeting = (
        ["--rdzv-backend=c10d", f"--rdzv-endpoint={learner.rendezvous}"]
        if learner.rendezvous
        else ["--standalone"]
    )
    out = ["--out", str(arguments.out)] if arguments.out else []
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *meeting,
        f"--nnodes={learner.nodes}",
        f"--nproc-per-node={learner.ranks}",
        f"--max-restarts={learner.max_restarts}",
        *("-m", TRAINER_MODULE, "--stage", arguments.stage),
        *out,
        *_passed_on(arguments),
    ]


def _passed_on(arguments: argparse.Namespace) -> list[str]:
    overrides = [word for value in arguments.set for word in ("--set", value)]
    insecure = ["--insecure"] if arguments.insecure else []
    return ["--config", str(arguments.config), *overrides, *insecure]


def _run_all(arguments: argparse.Namespace, config: Config) -> int:
    from understudy.process import prepare_process
    from understudy.supervisor import Supervisor, interrupted_code

    prepare_process("learner")
    prepare_torchrun()
    try:
        with Supervisor(config.run.path / "logs") as supervisor:
            supervisor.start("intake", intake_command(arguments))
            patience = config.network.connect_timeout_seconds
            supervisor.wait_serving("intake", config.learner.listen, config.network, patience)
            if config.network.weights:
                supervisor.start("weights", weights_command(arguments))
                supervisor.wait_serving("weights", config.network.weights, config.network, patience)
            supervisor.start("trainer", trainer_command(arguments, config))
            supervisor.wait("trainer")
            if config.learner.evaluation.every_steps:
                listen, network = config.learner.listen, config.network
                supervisor.wait_figure("intake", listen, network, "evaluating")
    except KeyboardInterrupt as interrupt:
        _log.warning("interrupted; what was done is in %s", config.run.path)
        return interrupted_code(interrupt)
    return 0
