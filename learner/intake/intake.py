"""The intake's state behind one condition: the ledger and the log.

| loop or call   | consumes            | waits for                | woken by                       |
|----------------|---------------------|--------------------------|--------------------------------|
| lease          | waiting task keys   | one to be leasable       | version, failure, expiry, drop |
| next_batch     | complete groups     | as many as a batch takes | the record that completes one  |
| deliver, fail  | results of episodes | nothing                  |                                |
| keep_time      | expired leases      | the clock                |                                |

`close` wakes everybody, and every waiting call is refused as DRAINING. Whatever a caller is told is
on the disk before: each method that changes something returns after the log's flush, except for
results, whose acks wait for it.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from learner.intake.batches import Batch, BatchItem, choose_samples, split, statistics
from learner.intake.evaluations import figures_of
from learner.intake.journal import Journal
from learner.intake.leases import Offer
from learner.intake.ledger import Ledger, Result
from learner.intake.refusals import RefusedError, draining
from learner.intake.state import RunState
from learner.intake.tasks import Balance, Group, State, TaskKey
from learner.log.reader import LogReader
from learner.log.retention import trim_segment
from learner.log.writer import DurableLog
from understudy import metrics
from understudy.config import Config
from understudy.trajectory import decode_payload
from understudy.v1 import log_pb2, trajectory_pb2

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""How often leases are checked for expiry and gauges are set."""
FIRST_WORD_SECONDS = 300.0
"""How long the first actor may take to say anything: it waits until an engine has started."""
SAMPLES_PER_STEP = 2
"""Episodes of each batch that go to samples.jsonl."""
_SAY_SECONDS = 30.0


class Intake:
    """Owns a run's experience, from the lease to the trained batch.

    Args:
        config: the run.
        log: the run's, open.
        state: what the log adds up to.
        journal: takes the line of each step.
        paused: whether leasing is to stand still.
    """

    def __init__(
        self,
        config: Config,
        log: DurableLog,
        state: RunState,
        journal: Journal,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.log = log
        self.ledger = Ledger(
            log,
            state,
            config.learner.evaluation,
            keeps_uniform=config.learner.keeps_uniform_groups,
        )
        self.state = state
        self.on_room: Callable[[], None] = lambda: None
        """Called now and then while the log has room."""
        self._journal = journal
        self._paused = paused
        self._changed = asyncio.Condition()
        self._closed = False
        self._world_sizes: dict[int, int] = {}
        self._dropped: Mapping[str, int] = self.balance().dropped
        self._num_askers = 0
        self._num_idle_actors = 0
        self._at_quota = False
        """Calls that wait for a lease."""
        self._heard = time.monotonic() + FIRST_WORD_SECONDS
        """When an actor last said anything; at the start, when one is to have said something."""
        self._first_asked = math.inf
        self._waited_seconds = 0.0
        self._has_weights = True
        self._trimming: asyncio.Task[None] | None = None
        self._num_trimmed = 0
        self._gauges = {name: metrics.TASK_KEYS.labels(name) for name in self.balance().figures()}

    def balance(self) -> Balance:
        """The accounts of all task keys."""
        return self.state.balance()

    async def close(self) -> None:
        """Refuse what waits and what comes."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._trimming:
            await self._trimming

    # Tasks.

    async def lease(self, actor_id: str, max_leases: int, timeout: float) -> list[Offer]:
        """Lease samples, waiting until there is one; none after `timeout` seconds, or if the run
        is exhausted."""
        async with self._changed:
            await self._wait_for_lease(timeout)
            self._raise_if_closed()
            if self._leases_nothing():
                return []
            leases = self.ledger.lease(actor_id, max_leases)
            offers = [self.ledger.offer(lease) for lease in leases]
        await self.log.flush()
        return offers

    async def _wait_for_lease(self, timeout: float) -> None:
        self._num_idle_actors += 1
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait_for(self._may_answer_lease)
        except TimeoutError:
            pass
        finally:
            self._num_idle_actors -= 1
            self._heard = time.monotonic()

    def _may_answer_lease(self) -> bool:
        leasable = self.ledger.can_lease and not self._leases_nothing()
        return self._closed or self.ledger.exhausted or leasable

    def _leases_nothing(self) -> bool:
        """Somebody paused it, or the log has no room for what would come of a lease."""
        return self._paused() or bool(self.log.throttled)

    def renew(self, actor_id: str, lease_ids: Sequence[int]) -> list[int]:
        """Extend leases; returns those that are gone."""
        self._heard = time.monotonic()
        return self.state.leases.renew(actor_id, lease_ids, self._heard)

    # Results.

    async def deliver(self, result: Result) -> bool:
        """Take a trajectory; False for a duplicate. It is durable after the log's next flush."""
        async with self._changed:
            self._heard = time.monotonic()
            taken = self.ledger.deliver(result)
            # Waking all who wait costs more than a record: only if there is something for them.
            ended = self._report_evaluations()
            if ended or self.ledger.can_lease or self._batch_is_ready(result.key):
                self._changed.notify_all()
        return taken

    def _batch_is_ready(self, key: TaskKey) -> bool:
        """Whether a result made a batch complete that somebody waits for."""
        complete = self._num_askers and self.ledger.is_complete(key.ordinal)
        return bool(complete and self.ledger.ready_groups())

    async def fail(
        self,
        key: TaskKey,
        lease_id: int,
        reason: str,
        origin: log_pb2.RecordOrigin,
        answer: "log_pb2.Answer.ValueType",
    ) -> None:
        """A record brought no trajectory, for example because its environment failed."""
        async with self._changed:
            self._heard = time.monotonic()
            self.ledger.answer(origin, key, answer, reason)
            self.ledger.fail(key, lease_id, reason.lower())
            self._report_evaluations()
            self._changed.notify_all()

    def _report_evaluations(self) -> bool:
        """Write the line of each evaluation that has ended; returns whether there was one."""
        ended = self.ledger.take_ended()
        for evaluation in ended:
            figures = figures_of(evaluation, time.time_ns() // 1000)
            self._journal.evaluation(evaluation.step, figures)
            if figures["heldout_accuracy"] is not None:
                metrics.HELDOUT_ACCURACY.set(figures["heldout_accuracy"])
        return bool(ended)

    # Trainers.

    async def start_training(self, step: int, ledger_digest: bytes) -> int:
        """A trainer starts; returns its epoch.

        Raises:
            RefusedError: STEP_OUT_OF_ORDER, LEDGER_MISMATCH, DRAINING.
        """
        async with self._changed:
            self._raise_if_closed()
            epoch = self.ledger.start_training(step, ledger_digest)
            self._report_evaluations()
            self._world_sizes.clear()
            self._changed.notify_all()
        await self.log.flush()
        _log.info("trainer of epoch %d starts with %d steps behind it", epoch, step)
        return epoch

    async def set_weights(self, held: bool) -> None:
        """The weight store says whether it holds any version. Until it does, it may."""
        async with self._changed:
            self._has_weights = held
            self._changed.notify_all()

    async def advance(self, step: int, epoch: int) -> int:
        """Issue a version that has so many steps behind it.

        Raises:
            RefusedError: OLD_EPOCH, DRAINING.
        """
        async with self._changed:
            self._raise_if_closed()
            version = self.ledger.publish(step, epoch)
            self._has_weights = True
            self._changed.notify_all()
        await self.log.flush()
        return version

    async def record_checkpoint(
        self, step: int, oldest_kept_step: int, epoch: int, digest: bytes
    ) -> None:
        """A checkpoint is durable. Idempotent.

        Raises:
            RefusedError: OLD_EPOCH, STEP_OUT_OF_ORDER.
        """
        async with self._changed:
            self.ledger.require_trainer(epoch)
            self.ledger.record_checkpoint(step, oldest_kept_step, digest)
        await self.log.flush()
        if self.config.learner.log.retention == "checkpoint" and self._trimming is None:
            self._trimming = asyncio.create_task(self._trim())

    async def _trim(self) -> None:
        """Let go of payloads that no kept checkpoint will ask for: in whole segments, since what
        the run learns from it learns in about the order in which it came."""
        try:
            needed = self.state.oldest_segment()
            while self.log.is_sealed(self._num_trimmed + 1):
                if needed is not None and self._num_trimmed + 1 >= needed:
                    break
                trimmed = await trim_segment(self.log, self._num_trimmed + 1, _is_trajectory)
                if trimmed is None:
                    break  # no space; the next checkpoint tries again
                self._num_trimmed += 1
        finally:
            self._trimming = None

    # Batches.

    async def next_batch(
        self, step: int, rank: int, world_size: int, epoch: int
    ) -> tuple[Batch, list[BatchItem]]:
        """The batch of a step, and a rank's share of it.

        Raises:
            RefusedError: BAD_RANK, OLD_EPOCH, STEP_OUT_OF_ORDER, WEIGHTS_LOST, DRAINING.
        """
        if not rank < world_size:
            raise RefusedError("BAD_RANK", f"rank {rank} is not below world_size {world_size}")
        async with self._changed:
            with metrics.timed(metrics.BATCH_WAIT_SECONDS):
                await self._wait_for_batch(step, epoch)
            agreed = self._world_sizes.setdefault(step, world_size)
            if world_size != agreed:
                raise RefusedError(
                    "BAD_RANK", f"world_size {world_size}: step {step} is split over {agreed} ranks"
                )
            batch = self.state.batches[step]
            # It was the last when it was closed; the run may have been taken up since.
            newest = step + 1 == self.state.num_closed and self.ledger.last_is_closed
            batch = replace(batch, last=batch.last and newest)
        await self.log.flush()
        return batch, split(batch.items, world_size)[rank]

    async def read(self, items: Sequence[BatchItem]) -> list[trajectory_pb2.TrajectoryRecord]:
        """The records of a batch's items, from the log."""
        return await read_records(self.log, items)

    async def _wait_for_batch(self, step: int, epoch: int) -> None:
        self._check_request(step, epoch)
        self._first_asked = min(self._first_asked, time.monotonic())
        self._num_askers += 1
        try:
            while step not in self.state.batches:
                self._raise_if_closed()
                if groups := self.ledger.ready_groups():
                    self._close_batch(step, groups)
                else:
                    await self._changed.wait()
                self._check_request(step, epoch)  # another trainer may have started meanwhile
        finally:
            self._num_askers -= 1

    def _time_is_up(self) -> bool:
        limit = self.config.learner.train.max_seconds
        return limit is not None and time.monotonic() - self._first_asked > limit

    def _check_request(self, step: int, epoch: int) -> None:
        self.ledger.require_trainer(epoch)
        if not self._has_weights:
            raise RefusedError("WEIGHTS_LOST", "the weight store is empty; publish, then ask again")
        next_step = self.state.num_closed
        if step in self.state.batches or (step == next_step and not self.ledger.last_is_closed):
            return
        remedy = (
            f"the run has {self.state.admission.steps} steps"
            if self.ledger.last_is_closed
            else f"step {next_step} is next"
        )
        raise RefusedError("STEP_OUT_OF_ORDER", f"step {step} cannot be asked for; {remedy}")

    def _close_batch(self, step: int, groups: Sequence[Group]) -> None:
        if self._time_is_up():
            self.ledger.end_with(step)
        tasks = self.config.learner.tasks
        self.ledger.assign(groups, self.config.run.seed if tasks.shuffle_rewards else None)
        self._changed.notify_all()

    async def complete_step(self, step: int, epoch: int, measured: Mapping[str, float]) -> None:
        """The optimizer step of a batch was taken. Idempotent.

        Raises:
            RefusedError: OLD_EPOCH; STEP_OUT_OF_ORDER for a step whose batch was never asked for.
        """
        async with self._changed:
            self.ledger.require_trainer(epoch)
            batch = self._complete(step)
            self._changed.notify_all()
        await self.log.flush()
        if batch:
            await self._write_step(batch, measured)

    def _complete(self, step: int) -> Batch | None:
        """The batch of a step that was not completed before."""
        if step < self.state.num_completed:
            return None
        if step not in self.state.batches or step != self.state.num_completed:
            raise RefusedError(
                "STEP_OUT_OF_ORDER",
                f"step {step}; {self.state.num_completed} is the next to complete, "
                f"{self.state.num_closed} the next batch",
            )
        self.ledger.complete(step)
        self._world_sizes.pop(step, None)
        return self.state.batches[step]

    async def _write_step(self, batch: Batch, measured: Mapping[str, float]) -> None:
        for item in batch.items:
            metrics.POLICY_STALENESS.observe(item.staleness)
        dropped = self.balance().dropped
        new = Counter(dropped)
        new.subtract(self._dropped)
        self._dropped = dropped
        figures = {"dropped": {reason: n for reason, n in new.items() if n}}
        self._journal.step(batch.step, {**measured, **statistics(batch), **figures})
        records = await self.read(choose_samples(batch, SAMPLES_PER_STEP))
        self._journal.samples(
            batch.step,
            batch.trained_version,
            [decode_payload(record.payload, record.encoding) for record in records],
        )

    # Time.

    async def keep_time(self) -> None:
        """Expire leases and set gauges until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            async with self._changed:
                num_expired = self.ledger.expire(time.monotonic())
                if num_expired:
                    metrics.LEASES_EXPIRED.inc(num_expired)
                    _log.warning("%d leases expired; their tasks are leased again", num_expired)
                if self._nobody_plays() and self.ledger.abandon_evaluations():
                    _log.warning("no actor is left; the rest of the last evaluation is dropped")
                # Given back just now, or held up by a pause; or there is an end to be told.
                if self._report_evaluations() or self.ledger.can_lease:
                    self._changed.notify_all()
            self._watch_room()
            self._set_gauges()
            self._say_waiting()

    def _watch_room(self) -> None:
        """Offer the log's room; say it when the quota takes it away, and when it is back."""
        at_quota = self.log.throttled == "quota"
        if at_quota and not self._at_quota:
            _log.warning(
                "the log is at its quota, learner.log.quota_bytes = %d: nothing is leased or taken "
                "until a checkpoint lets payloads go (learner.log.retention = %r); if none will, "
                "raise the quota",
                self.config.learner.log.quota_bytes,
                self.config.learner.log.retention,
            )
        elif self._at_quota and not at_quota:
            _log.warning("the log is below its quota again")
        self._at_quota = at_quota
        if not self.log.throttled:
            self.on_room()

    def _nobody_plays(self) -> bool:
        """Whether no actor has said anything for so long that its leases have expired, and for as
        long again."""
        silent = time.monotonic() - self._heard > 2 * self.config.learner.tasks.lease_seconds
        return silent and not self._num_idle_actors and not self._leases_nothing()

    def _set_gauges(self) -> None:
        balance = self.balance()
        if not balance.holds:
            _log.error("task keys do not balance: %s", balance)
        for name, number in balance.figures().items():
            self._gauges[name].set(number)
        metrics.STORED_TRAJECTORIES.set(balance.states[State.STORED])
        metrics.LOG_BYTES.set(self.log.num_bytes)
        metrics.LOG_UNSYNCED_BYTES.set(self.log.unsynced_bytes)
        metrics.LOG_THROTTLED.set(bool(self.log.throttled))
        metrics.LOG_QUARANTINED.set(len(self.log.findings.bad_ranges))
        metrics.CHECKPOINT_STEP.set(self.state.checkpoint_step)

    def _say_waiting(self) -> None:
        """Tell why the trainer waits, now and then."""
        self._waited_seconds = self._waited_seconds + TICK_SECONDS if self._num_askers else 0.0
        if self._waited_seconds < _SAY_SECONDS:
            return
        self._waited_seconds = 0.0
        admission = self.state.admission
        figures = self.balance().figures().items()
        _log.warning(
            "step %d waits for experience: version %d of step %d is newest, %s",
            self.state.num_closed,
            admission.version,
            admission.step,
            ", ".join(f"{number} {name}" for name, number in figures),
        )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise draining()


async def read_records(
    log: DurableLog | LogReader, items: Sequence[BatchItem]
) -> list[trajectory_pb2.TrajectoryRecord]:
    """The records of a batch's items, read on a thread.

    Raises:
        BadEntryError: the log has no longer what it was given.
    """
    return await asyncio.to_thread(lambda: [_record(*log.read(item.location)) for item in items])


def _record(entry: log_pb2.LogEntry, payload: bytes) -> trajectory_pb2.TrajectoryRecord:
    """The record that brought a stored trajectory."""
    stored = entry.trajectory_stored
    return trajectory_pb2.TrajectoryRecord(
        incarnation=stored.origin.incarnation,
        sequence=stored.origin.sequence,
        lease_id=stored.lease_id,
        task_key=stored.task_key,
        outcome=stored.outcome,
        encoding=stored.encoding,
        payload=payload,
        payload_digest=stored.payload_digest,
    )


def _is_trajectory(entry: log_pb2.LogEntry) -> bool:
    return entry.HasField("trajectory_stored")
