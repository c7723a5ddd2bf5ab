"""Publishes the policy's weights beside the training loop.

    main thread   shard --cast copy--> spare copy                        shard --> spare copy ...
    own thread                           |  diff against the committed copy, encode, digest, send
                                         +--> store answers: the two copies change places

Each rank publishes its own shard, without a gather, and tries again by itself. Without tensor
parallelism there is no collective in it; with it, shards.py tells of the one there is, on the main
thread. The committed copy is what the store has confirmed, and nothing else: only then is the next
delta right, whatever was lost on the way. A process's first publication sends all values.

Where adapters learn, only they are in those copies. The model, which stays as it is, is copied and
digested once, sent with the first publication, and announced as unchanged in all others.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from learner.trainer.model import Policy
from learner.trainer.packing import TokenSequence
from learner.trainer.part import FrozenSlices
from learner.trainer.probe import Probe
from learner.trainer.ranks import Ranks
from learner.trainer.sender import PartSender
from learner.trainer.shards import shard_slices
from learner.trainer.snapshot import HostCopy
from understudy.config import Config
from understudy.v1 import weight_pb2

if TYPE_CHECKING:
    from learner.trainer.direct import DirectPublisher

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A publication that the store has not confirmed."""

    header: weight_pb2.PartHeader
    copy: HostCopy
    """What is published."""
    version: Future[int]


class Publisher:
    """Publishes one policy's weights, version after version. Used on the main thread.

    Host memory: two copies of what learns of the shard in the served dtype, what changed between
    them, and one copy of what does not learn.

    Args:
        policy: what is published.
        epoch: of this trainer.
        config: the run's.
        ranks: all trainer ranks.

    Raises:
        ConfigError: the model has a buffer that cannot be published.
    """

    def __init__(self, policy: Policy, epoch: int, config: Config, ranks: Ranks) -> None:
        self._policy = policy
        self._epoch = epoch
        self._run_id = config.run.name
        self._ranks = ranks
        self._probe = Probe(policy.language_model.config.vocab_size, config)
        dtype, device = _DTYPES[config.model.dtype], ranks.device
        # Without the values, some of which are copies: the copies' sizes are all that is needed.
        slices = [replace(s, values=s.values.to("meta")) for s in shard_slices(policy, ranks)]
        self._committed, self._spare = (HostCopy(slices, dtype, device) for _ in range(2))
        frozen = list(shard_slices(policy, ranks, frozen=True))
        frozen_copy = HostCopy(frozen, dtype, device)
        frozen_copy.fill(frozen)
        self._sender = PartSender(config.network, FrozenSlices(frozen_copy))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._flight: _Flight | None = None
        self._header = weight_pb2.PartHeader()
        """Of the version that was committed last."""
        self._version = 0

    @property
    def version(self) -> int:
        """Newest version that is known to be committed; 0 before the first."""
        self.check()
        return self._version

    def probe_with(self, samples: Sequence[TokenSequence]) -> None:
        """Take the first sequence that was really played as the probe from now on."""
        self._probe.use(samples)

    def submit(self, step: int) -> None:
        """Begin to publish the weights after `step` optimizer steps; they may change at once.

        Waits for the publication before: versions never overtake each other. The probe's forward
        pass is the health check of whoever serves the weights and no part of publishing: it is the
        one thing here in which ranks take part together.

        Raises:
            PeerUnreachableError, UnderstudyError: as flush, of the publication before.
        """
        probe = self._probe.take(self._policy, self._ranks)
        self.flush()
        self._spare.fill(shard_slices(self._policy, self._ranks))
        header = weight_pb2.PartHeader(
            run_id=self._run_id,
            epoch=self._epoch,
            step=step,
            part_index=self._ranks.rank,
            num_parts=self._ranks.world_size,
            probe=probe if self._ranks.rank == 0 else None,
        )
        self._begin(header, self._spare, self._version)

    def publish_again(self) -> None:
        """Publish once more, whole, what was submitted last, and wait until it is committed.

        For a store that has lost what it had. Every rank calls it.

        Raises:
            PeerUnreachableError, UnderstudyError: as flush.
        """
        self.flush()
        self._begin(self._header, self._committed, 0)
        self.flush()

    def flush(self) -> None:
        """Wait until what was submitted is committed.

        Raises:
            PeerUnreachableError: when the store went away and stayed away.
            UnderstudyError: when it refuses.
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        self._version = flight.version.result()
        self._header = flight.header
        if flight.copy is self._spare:
            self._committed, self._spare = self._spare, self._committed

    def check(self) -> None:
        """Take note of an answer that is there, without waiting for one. Raises as flush."""
        if self._flight is not None and self._flight.version.done():
            self.flush()

    def close(self) -> None:
        """Give up what is not committed."""
        self._sender.close()
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, header: weight_pb2.PartHeader, copy: HostCopy, base_version: int) -> None:
        version = self._thread.submit(
            self._sender.deliver, header, copy, self._committed, base_version
        )
        self._flight = _Flight(header=header, copy=copy, version=version)


def make_publisher(
    policy: Policy, epoch: int, config: Config, ranks: Ranks
) -> "Publisher | DirectPublisher":
    """The publisher that learner.weights.transport names. Raises as Publisher."""
    if config.learner.weights.transport == "delta":
        return Publisher(policy, epoch, config, ranks)
    from learner.trainer.direct import DirectPublisher

    return DirectPublisher(policy, epoch, config, ranks)
