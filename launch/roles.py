"""All roles of a run as processes of this machine.

    envserver, inference, intake, trainer, actor   each `python -m` of its own, logs/<role>.log

The trainer publishes the first weights, inference waits for them, actors wait for both.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from understudy.config import Config
from understudy.supervisor import Supervisor


def _nothing() -> None:
    return


class LocalRoles:
    """One process a role, started in the order in which they can be of use."""

    def __init__(self, supervisor: Supervisor, config_file: Path, config: Config) -> None:
        self._supervisor = supervisor
        self._arguments = ("--config", str(config_file))
        self._config = config

    def start_services(self, each_poll: Callable[[], None] = _nothing) -> None:
        """Start all but the actor, and wait until they serve.

        Raises:
            ProcessEndedError: a role ended, with the end of its log.
            PeerUnreachableError: a role did not serve in time.
        """
        config = self._config
        self.start("envserver")
        self.start("intake", ["learner", "--part", "intake"])
        self.start("inference")
        self._wait("intake", config.learner.listen, each_poll)
        self.start("trainer", ["learner", "--part", "trainer"])
        self._wait("envserver", config.envserver.listen, each_poll)
        self._wait("inference", config.inference.listen, each_poll)

    def start(self, name: str, command: Sequence[str] = ()) -> None:
        """Start one role by its command, by default the one of its name."""
        words = [*(command or [name]), *self._arguments]
        self._supervisor.start(name, [sys.executable, "-m", "understudy.cli", *words])

    def train(self, each_poll: Callable[[], None] = _nothing) -> None:
        """Start the actor and wait until the trainer has taken its last step."""
        self.start("actor")
        self._supervisor.wait("trainer", each_poll)
        self._supervisor.stop("actor")

    def _wait(self, name: str, address: str, each_poll: Callable[[], None]) -> None:
        # An engine takes its time to compile; the peers of a local run are watched meanwhile.
        timeout = max(self._config.network.connect_timeout_seconds, 300.0)
        self._supervisor.wait_serving(name, address, self._config.network, timeout, each_poll)
