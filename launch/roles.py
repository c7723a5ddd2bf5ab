"""All roles of a run as processes of this machine.

    envserver, inference, intake, trainer, actor   each `python -m` of its own, logs/<role>.log
    weights                                        too, where network.weights is set

The trainer publishes the first weights, inference waits for them, actors wait for both.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from understudy.config import Config
from understudy.errors import PeerUnreachableError
from understudy.rpc import open_sync_channel
from understudy.supervisor import Supervisor
from understudy.v1 import control_pb2, control_pb2_grpc


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
        if config.network.weights:
            self.start("weights", ["learner", "--part", "weights"])
        self.start("inference")
        self._wait("intake", config.learner.listen, each_poll)
        if config.network.weights:
            self._wait("weights", config.network.weights, each_poll)
        self.start("trainer", ["learner", "--part", "trainer"])
        self._wait("envserver", config.envserver.listen, each_poll)
        self._wait("inference", config.inference.listen, each_poll)

    def start(self, name: str, command: Sequence[str] = ()) -> None:
        """Start one role by its command, by default the one of its name."""
        words = [*(command or [name]), *self._arguments]
        self._supervisor.start(name, [sys.executable, "-m", "understudy.cli", *words])

    def train(self, each_poll: Callable[[], None] = _nothing) -> None:
        """Start the actor and wait until the trainer has taken its last step, and the version that
        came of it is evaluated, if that is asked for."""
        self.start("actor")
        self._supervisor.wait("trainer", each_poll)
        if self._config.learner.evaluation.every_steps:
            address = self._config.learner.listen
            network = self._config.network
            self._supervisor.wait_figure("intake", address, network, "evaluating", each_poll)
        self._supervisor.stop("actor")

    def wait_for_newest(self, each_poll: Callable[[], None] = _nothing) -> int:
        """Wait until every replica serves the newest version, and return it.

        Raises:
            PeerUnreachableError: a replica stays behind; its log says why.
        """
        deadline = time.monotonic() + self._config.network.connect_timeout_seconds
        with open_sync_channel(self._config.network.learner, self._config.network) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            while True:
                figures = stub.GetStatus(control_pb2.GetStatusRequest(), timeout=10).figures
                version, served = figures["version"], figures["lowest_replica_version"]
                if served == version > 0:
                    return int(version)
                if time.monotonic() > deadline:
                    raise PeerUnreachableError(
                        f"a replica serves version {served:.0f}, not the newest, {version:.0f}; "
                        "see logs/inference.log"
                    )
                self._supervisor.check()
                each_poll()
                time.sleep(0.1)

    def _wait(self, name: str, address: str, each_poll: Callable[[], None]) -> None:
        # An engine takes its time to compile; the peers of a local run are watched meanwhile.
        timeout = max(self._config.network.connect_timeout_seconds, 300.0)
        self._supervisor.wait_serving(name, address, self._config.network, timeout, each_poll)
