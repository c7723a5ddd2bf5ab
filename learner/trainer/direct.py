"""Publishes the policy's weights from GPU to GPU, where learner and inference share a node.

    all ranks   probe -> gather, parameter by parameter ----------------------------> next step
    rank 0      IssueVersion -> StartUpdate -> UpdateWeights | broadcast -> FinishUpdate
    replicas                    paused ------------------------------------- serving it

Nothing is kept and nothing is compared: a publication that fails ends this process, and the
replicas that were in it, and all start again. Steps wait for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from learner.trainer.calls import patiently
from learner.trainer.model import Policy
from learner.trainer.packing import TokenSequence
from learner.trainer.probe import Probe
from learner.trainer.ranks import Ranks
from learner.trainer.replicas import Replicas
from learner.trainer.watchdog import Watchdog
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.rpc import open_sync_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc

_ISSUE_SECONDS = 30.0


class Transfer(Protocol):
    """What sends: vLLM's TrainerWeightTransferEngine."""

    def send_weights(self) -> None:
        """Lead all replicas through an update; every rank calls it."""


Join = Callable[[Policy, Config, Ranks, Replicas], Transfer]


class DirectPublisher:
    """As Publisher, but `submit` returns when the version is served by all replicas.

    Args:
        policy: what is published.
        epoch: of this trainer.
        config: the run's.
        ranks: all trainer ranks.
        join: has all join a group, at the first publication.
        watchdog: ends the process when a step is late.
    """

    def __init__(
        self,
        policy: Policy,
        epoch: int,
        config: Config,
        ranks: Ranks,
        *,
        join: Join | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._policy = policy
        self._epoch = epoch
        self._config = config
        self._ranks = ranks
        self._join = join or join_nccl
        self._watchdog = watchdog or Watchdog()
        self._probe = Probe(policy.language_model.config.vocab_size, config)
        self._replicas = Replicas(config, epoch, self._watchdog)
        self._intake = open_sync_channel(config.network.learner, config.network)
        self._transfer: Transfer | None = None
        self._published = weight_pb2.LogprobProbe()
        self._step = 0
        self.version = 0
        """Newest version that is served by all replicas; 0 before the first."""

    def probe_with(self, samples: Sequence[TokenSequence]) -> None:
        """Take the first sequence that was really played as the probe from now on."""
        self._probe.use(samples)

    def submit(self, step: int) -> None:
        """Publish the weights after `step` optimizer steps. Every rank calls it.

        Raises:
            PeerUnreachableError: when the intake or a replica went away and stayed away.
            UnderstudyError: when one of them refuses, fails or is late.
        """
        self._published = self._probe.take(self._policy, self._ranks)
        self._publish(step)

    def publish_again(self) -> None:
        """Publish the same weights as a new version. Every rank calls it. Raises as submit."""
        self._publish(self._step)

    def flush(self) -> None:
        """Nothing is under way."""

    def check(self) -> None:
        """Raise UnderstudyError if a replica was started again: it would wait for ever."""
        if self._ranks.rank == 0:
            self._replicas.check()

    def close(self) -> None:
        """Leave the replicas alone."""
        self._replicas.close()
        self._intake.close()

    def _publish(self, step: int) -> None:
        if self._transfer is None:
            self._transfer = self._join(self._policy, self._config, self._ranks, self._replicas)
            self._watchdog.disarm()
        version = self._issue(step)
        # Rank 0 arms it anew with each step; the others wait in gathers for as long as those take.
        self._watchdog.arm("publishing", 4 * self._config.learner.weights.transfer_seconds)
        self._replicas.prepare(version, step, self._published)
        self._transfer.send_weights()  # if it raises, the watchdog sees to it that the process ends
        self._watchdog.disarm()
        self.version, self._step = version, step

    def _issue(self, step: int) -> int:
        """The version's number, on all ranks."""
        version = 0
        if self._ranks.rank == 0:
            stub = weight_pb2_grpc.VersionServiceStub(self._intake)
            request = weight_pb2.IssueVersionRequest(
                run_id=self._config.run.name,
                epoch=self._epoch,
                step=step,
                payload_bytes=self._num_bytes(),
            )
            version = patiently(
                lambda: stub.IssueVersion(request, timeout=_ISSUE_SECONDS), self._config.network
            ).version
        return int(self._ranks.max([version])[0])

    def _num_bytes(self) -> int:
        size = getattr(torch, self._config.model.dtype).itemsize
        return sum(math.prod(p.shape) * size for _, p in self._policy.checkpoint_parameters())


def join_nccl(policy: Policy, config: Config, ranks: Ranks, replicas: Replicas) -> Transfer:
    """Join by vLLM's NCCL backend.

    Raises:
        ConfigError: without a GPU, or without vLLM.
    """
    where = "learner.weights.transport = 'nccl'"
    if ranks.device.type != "cuda":
        raise ConfigError(f"{where}: the trainer has no GPU; take 'delta'")
    try:
        from learner.trainer.nccl import CheckpointSource, join_group
    except ImportError as error:
        raise ConfigError(f"{where} needs vllm beside the trainer: {error}") from None
    source = CheckpointSource(policy, getattr(torch, config.model.dtype))
    return join_group(replicas, source, ranks)
