"""The batches of a log, as the trainer asks for them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from learner.intake.batches import Batch, BatchItem, split, statistics
from learner.intake.intake import read_records
from learner.intake.journal import Journal
from learner.intake.refusals import RefusedError
from learner.intake.state import RunState
from learner.log.reader import LogReader
from learner.log.segments import Location
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.v1 import trajectory_pb2, weight_pb2


class RecordedBatches:
    """Every batch that a log has assigned; nothing is written to it.

    Args:
        config: of the replay: the run's, under another name.
        log: the run's log.
        journal: takes the line of each step.

    Raises:
        ConfigError: the log is damaged, has no batch, or has no longer what they hold.
    """

    def __init__(self, config: Config, log: LogReader, journal: Journal) -> None:
        self.config = config
        self.state = RunState(config.learner.tasks, config.learner.train.steps)
        self._log = log
        self._journal = journal
        self.epoch = 0
        """Of the trainer that started last."""
        self._num_versions = 0
        trimmed = self._fold()
        newest = max(self.state.batches, default=0)
        # A run that ended and was taken up again has several last batches in its log.
        self._batches = {
            step: replace(batch, last=step == newest) for step, batch in self.state.batches.items()
        }
        if not self._batches:
            raise ConfigError("the log has no batch; there is nothing to train from")
        num_gone = sum(item.location in trimmed for b in self._batches.values() for item in b.items)
        if num_gone:
            raise ConfigError(
                f"the log has no longer {num_gone} trajectories of its batches: learner.log."
                "retention = 'checkpoint' let them go; only a run with 'all' can be replayed"
            )

    def _fold(self) -> set[Location]:
        """Take all entries but those that let batches go; returns where payloads are missing."""
        trimmed = set()
        for entry, location in self._log:
            if entry.WhichOneof("event") != "checkpoint_saved":
                self.state.recover(entry, location)
            if entry.trimmed_bytes:
                trimmed.add(location)
        if self._log.findings.bad_ranges or self._log.findings.num_missing:
            raise ConfigError("the log is damaged; see what understudy audit says of the run")
        return trimmed

    async def start_training(self, step: int, ledger_digest: bytes) -> int:
        """A trainer starts with so many steps behind it; returns its epoch.

        Raises:
            RefusedError: LEDGER_MISMATCH.
        """
        if step > len(self._batches) or ledger_digest != self.state.ledger_digests[step]:
            raise RefusedError("LEDGER_MISMATCH", f"step {step} is of another run; start anew")
        self.epoch += 1
        return self.epoch

    async def issue(self, request: weight_pb2.IssueVersionRequest) -> int:
        """A number for what the trainer publishes; nobody plays with it."""
        self._num_versions += 1
        return self._num_versions

    async def next_batch(
        self, step: int, rank: int, world_size: int, epoch: int
    ) -> tuple[Batch, list[BatchItem]]:
        """The batch of a step, and a rank's share of it.

        Raises:
            RefusedError: STEP_OUT_OF_ORDER beyond the last batch.
        """
        if step not in self._batches:
            raise RefusedError("STEP_OUT_OF_ORDER", f"step {step}: the log has no such batch")
        batch = self._batches[step]
        return batch, split(batch.items, world_size)[rank]

    async def read(self, items: Sequence[BatchItem]) -> list[trajectory_pb2.TrajectoryRecord]:
        """The records of a batch's items."""
        return await read_records(self._log, items)

    async def complete_step(self, step: int, epoch: int, measured: Mapping[str, float]) -> None:
        """The optimizer step of a batch was taken."""
        self._journal.step(step, {**measured, **statistics(self._batches[step])})

    async def record_checkpoint(
        self, step: int, oldest_kept_step: int, epoch: int, digest: bytes
    ) -> None:
        """A checkpoint is durable: nothing is let go for it."""
