"""Command `understudy replay`: trains from a run's log alone."""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from understudy.config import Config, load_config, write_config
from understudy.errors import ConfigError

SERVER_MODULE = "learner.replay.server"
WEIGHTS = "*.safetensors"


def run_replay(argv: Sequence[str]) -> int:
    """Replay a run into <run>/replay and compare the two models. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="understudy replay",
        description="Train from the log of a run alone, into <run>/replay.",
    )
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/demo")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the run's config.json; may be repeated",
    )
    arguments = parser.parse_args(argv)
    config = _config_of(arguments.run, arguments.set)
    code = _train(config, arguments.run)
    if not code:
        print(_compare(arguments.run / "model", config.run.path / "model"))
    return code


def _config_of(run: Path, overrides: Sequence[str]) -> Config:
    if not (run / "config.json").exists() or not (run / "log").is_dir():
        raise ConfigError(f"{run} is no run that can be replayed: config.json or log/ is missing")
    config = load_config(run / "config.json", overrides)
    name = config.run.model_copy(update={"directory": run, "name": "replay"})
    network = config.network.model_copy(update={"weights": None})
    return config.model_copy(update={"run": name, "network": network})


def _train(config: Config, run: Path) -> int:
    from learner.cli import prepare_torchrun, trainer_command
    from understudy.process import prepare_process
    from understudy.supervisor import Supervisor, interrupted_code

    prepare_process("replay")
    prepare_torchrun()
    shutil.rmtree(config.run.path, ignore_errors=True)  # an older replay's
    path = write_config(config, config.run.path)
    passed_on = argparse.Namespace(config=path, set=[], insecure=False, stage="rl", out=None)
    server = [sys.executable, "-m", SERVER_MODULE, "--config", str(path), "--log", f"{run}/log"]
    timeout = max(config.network.connect_timeout_seconds, 600.0)  # a long log is read first
    try:
        with Supervisor(config.run.path / "logs") as supervisor:
            supervisor.start("batches", server)
            supervisor.wait_serving("batches", config.learner.listen, config.network, timeout)
            supervisor.start("trainer", trainer_command(passed_on, config))
            supervisor.wait("trainer")
    except KeyboardInterrupt as interrupt:
        return interrupted_code(interrupt)
    return 0


def _compare(first: Path, second: Path) -> str:
    """One line about two model folders."""
    digests = [_digest(folder) for folder in (first, second)]
    if not digests[0]:
        return f"{second}: the run itself left no model to compare with"
    verdict = "equal, bit for bit" if digests[0] == digests[1] else "not equal"
    return f"{first} and {second}: {verdict}"


def _digest(folder: Path) -> str:
    files = sorted(folder.glob(WEIGHTS))
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
