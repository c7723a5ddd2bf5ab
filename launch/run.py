"""`understudy run`: a whole run on this machine."""

import logging

from launch.progress import Progress
from launch.roles import LocalRoles
from understudy.config import Config, write_config
from understudy.supervisor import Supervisor, interrupted_code

_log = logging.getLogger(__name__)


def run_local(config: Config) -> int:
    """Start all roles, train to the end or to Ctrl-C, end all roles. Returns the exit code.

    A run that was begun before goes on from its newest checkpoint.
    """
    run_path = config.run.path
    if (run_path / "log").exists():
        _log.info("%s holds a run already; going on with it", run_path)
    metrics = run_path / "metrics.jsonl"
    config_file = write_config(config, run_path)
    try:
        with Supervisor(run_path / "logs") as supervisor, Progress({}) as progress:
            roles = LocalRoles(supervisor, config_file, config)
            with progress.stage("start"):
                roles.start_services(progress.poll)
            steps = config.learner.train.steps
            with progress.stage("reinforce", metrics, steps):
                roles.train(progress.poll)
    except KeyboardInterrupt as interrupt:
        _log.warning("interrupted; what was done is in %s", run_path)
        return interrupted_code(interrupt)
    _log.info("done: model and metrics are in %s", run_path)
    return 0
