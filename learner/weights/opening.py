"""How a process takes up a run's weights, whichever process that is."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from learner.weights.bundle import Bundle
from learner.weights.disk import WeightDisk
from learner.weights.holdings import Issue
from learner.weights.recovery import Recovered, recover
from learner.weights.servicer import WeightServicer
from learner.weights.store import WeightStore
from understudy.config import Config
from understudy.rpc import Service
from understudy.v1 import weight_pb2_grpc

MAX_MESSAGE_BYTES = 32 * 2**20
"""Largest message to a server with a weight store: a part's header, with a line for every slice."""


@dataclass(frozen=True, kw_only=True)
class OpenedWeights:
    """What the store is made of, before it knows who numbers its versions."""

    config: Config
    bundle: Bundle
    recovered: Recovered

    def servicer(self, issue: Issue) -> WeightServicer:
        """The store and its service."""
        store = WeightStore(self.recovered, self.config.learner.weights.keep_deltas, issue)
        return WeightServicer(store, self.bundle, self.config.run.name)


async def open_weights(config: Config, issued: Sequence[int] | None = None) -> OpenedWeights:
    """Take a run's weights for this process, and read what is there.

    Args:
        config: the run.
        issued: see `recover`.

    Raises:
        ConfigError: no model at model.path; another process has the weights; a folder that cannot
            be written.
    """
    bundle = Bundle.read(config.model.path, config.learner.lora)
    disk = await asyncio.to_thread(WeightDisk.open, config.run.path / "weights", config.run.name)
    try:
        recovered = await asyncio.to_thread(recover, disk, issued)
    except BaseException:  # whatever it is, the next attempt needs the lock
        disk.close()
        raise
    return OpenedWeights(config=config, bundle=bundle, recovered=recovered)


def weight_service(servicer: WeightServicer) -> Service:
    """What a server registers."""
    return Service(
        name="understudy.v1.WeightService",
        add=weight_pb2_grpc.add_WeightServiceServicer_to_server,
        servicer=servicer,
    )
