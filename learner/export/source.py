"""The episodes of a log, decoded, with what became of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from learner.audit.audit import Audit
from learner.audit.entries import Entries, Item
from learner.audit.samples import DROPPED, EVALUATED, STATES, TRAINED, evaluation_of
from understudy.trajectory import Trajectory, TrajectoryError, check_digest, decode_payload

Split = Literal["trained", "evaluated", "all"]
_STATES = {"trained": (TRAINED,), "evaluated": (EVALUATED,), "all": range(len(STATES))}
"""States of the samples of a split."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an episode on a held-out task was played for."""

    number: int
    version: int
    """Version that was evaluated."""
    step: int
    """Steps behind that version."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A trajectory and its sample's way through the run."""

    run_id: str
    ordinal: int
    sample_index: int
    state: str
    """Of its sample, for example "trained"."""
    reason: str
    """Why the sample was dropped; empty unless it was."""
    step: int | None
    """Step of the batch that its group is in."""
    evaluation: Evaluation | None
    """Set where the task was held out."""
    time_us: int
    """When it was stored, in microseconds since 1970 UTC."""
    trajectory: Trajectory


class Source:
    """The episodes of a run's log, in the order in which they were stored.

    Args:
        run: the run's folder.
        split: those of trained samples, of evaluated ones, or all.

    Raises:
        ConfigError: the folder has no log.
    """

    def __init__(self, run: Path, split: Split) -> None:
        self._entries = Entries(run)
        self._audit = Audit(run)
        self.report = self._audit.run()
        """The audit of the log."""
        self.num_trimmed = 0
        """Episodes that were left out because retention took their payload."""
        self.damaged: list[str] = []
        """Those that were left out because their payload is no trajectory: why, in one line."""
        self._split = split
        self._seen = bytearray(len(self._audit.samples.states))

    def __iter__(self) -> Iterator[Episode]:
        for item in self._entries:
            if item.place.entry > self._audit.last_index:  # written since
                return
            key = self._chosen(item)
            if key is None:
                continue
            self._seen[key] = True
            if item.entry.trimmed_bytes:
                self.num_trimmed += 1
            elif episode := self._read(item, key):
                yield episode

    def _chosen(self, item: Item) -> int | None:
        """The key of a trajectory of the split; a second one of the same sample is none."""
        if not item.entry.HasField("trajectory_stored"):
            return None
        samples = self._audit.samples
        key = samples.find(item.entry.trajectory_stored.task_key)
        if key is None or self._seen[key]:
            return None
        return key if samples.states[key] in _STATES[self._split] else None

    def _read(self, item: Item, key: int) -> Episode | None:
        stored, samples = item.entry.trajectory_stored, self._audit.samples
        payload = bytes(item.payload)
        try:
            check_digest(payload, stored.payload_digest)
            trajectory = decode_payload(payload, stored.encoding)
        except TrajectoryError as error:
            self.damaged.append(f"entry {item.place.entry}: {error}")
            return None
        state = samples.states[key]
        return Episode(
            run_id=self.report.run_id,
            ordinal=stored.task_key.ordinal,
            sample_index=stored.task_key.sample_index,
            state=STATES[state],
            reason=samples.reason_of(key) if state == DROPPED else "",
            step=samples.step_of(stored.task_key.ordinal),
            evaluation=self._evaluation(evaluation_of(stored.task_key)),
            time_us=item.entry.time_us,
            trajectory=trajectory,
        )

    def _evaluation(self, number: int) -> Evaluation | None:
        issued = self._audit.evaluations.issued.get(number)
        if issued is None:
            return None
        return Evaluation(number=number, version=issued.version, step=issued.step)
