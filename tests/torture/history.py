"""What the clients of an intake were told, and the contradictions that show in that alone."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple


class Key(NamedTuple):
    """A task key."""

    ordinal: int
    sample_index: int


class Played(NamedTuple):
    """A record that was sent for a task key."""

    key: Key
    digest: bytes
    """SHA-256 of its payload."""
    failed: bool
    """Its episode came to nothing."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's share of a batch, as it was received."""

    step: int
    rank: int
    world_size: int
    ledger_digest: bytes
    head_version: int
    groups: tuple[tuple[int, bytes, bool], ...]
    """Ordinal, rewards and uniformity of each group of the whole batch."""
    trajectories: frozenset[tuple[Key, bytes]]
    """Task keys and digests of the share's payloads."""


@dataclass(kw_only=True)
class History:
    """Everything that was answered, in order; `violations` says what cannot be."""

    file: IO[str]
    knows_payloads: bool = True
    """Whether the actors are the harness's own, so that `played` has all that is sent."""
    violations: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)
    leases: dict[int, tuple[Key, str]] = field(default_factory=dict)
    """Task key and actor by lease id."""
    played: dict[Key, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    """Digests of all payloads that were ever sent for a key."""
    acked: list[Played] = field(default_factory=list)
    shares: dict[tuple[int, int, int], Share] = field(default_factory=dict)
    """By step, rank and world size."""
    headers: dict[int, Share] = field(default_factory=dict)
    """Any rank's share by step."""
    trainers: list[tuple[int, int]] = field(default_factory=list)
    """Epoch and step."""
    versions: list[tuple[int, int, int]] = field(default_factory=list)
    """Version, step and trainer's epoch."""
    completed: list[tuple[int, int]] = field(default_factory=list)
    """Step and trainer's epoch."""
    checkpoints: list[tuple[int, int, int]] = field(default_factory=list)
    """Step, oldest step that is kept, trainer's epoch."""
    welcomes: list[tuple[int, int]] = field(default_factory=list)
    """Intake's epoch and incarnation."""
    _steps_of: dict[Key, int] = field(default_factory=dict)

    @classmethod
    def create(cls, path: Path) -> "History":
        """A history that is written to a file too, line by line."""
        return cls(file=path.open("a", encoding="ascii"))

    def write(self, kind: str, **fields: object) -> None:
        """A line for whoever reads the history later."""
        line = {"time": round(time.time(), 4), "kind": kind, **fields}
        self.file.write(json.dumps(line, default=_encode) + "\n")

    def violation(self, text: str) -> None:
        """Something that must never be."""
        self.violations.append(text)
        self.write("violation", text=text)
        self.file.flush()

    def leased(self, actor_id: str, leases: Sequence[tuple[int, Key]]) -> None:
        """Leases were handed out."""
        self.write("leased", actor=actor_id, leases=leases)
        self.figures["leases"] += len(leases)
        for lease_id, key in leases:
            if lease_id in self.leases:
                self.violation(f"lease id {lease_id} was given out twice: {key}")
            self.leases[lease_id] = key, actor_id

    def sent(self, played: Played) -> None:
        """A record is about to be sent."""
        self.played[played.key].add(played.digest)

    def ack(self, actor_id: str, batch: Sequence[Played]) -> None:
        """Records were acked."""
        self.write("acked", actor=actor_id, keys=[played.key for played in batch])
        self.figures["acked"] += len(batch)
        self.acked += batch

    def batch(self, share: Share) -> None:
        """A rank got its share of a batch."""
        place = share.step, share.rank, share.world_size
        self.write("batch", place=place, digest=share.ledger_digest)
        self.figures["batches"] += 1
        before = self.shares.setdefault(place, share)
        if before != share:
            self.violation(f"step {share.step}: rank {share.rank} got another batch than before")
        other = self.headers.setdefault(share.step, share)
        if (other.ledger_digest, other.groups) != (share.ledger_digest, share.groups):
            self.violation(f"step {share.step}: two headers of one batch differ")
        for key, digest in share.trajectories:
            if self._steps_of.setdefault(key, share.step) != share.step:
                self.violation(f"{key} is in steps {self._steps_of[key]} and {share.step}")
            if self.knows_payloads and digest not in self.played[key]:
                self.violation(f"step {share.step}: {key} has a payload that nobody sent")

    def training(self, epoch: int, step: int) -> None:
        """A trainer started."""
        self.write("training", epoch=epoch, step=step)
        self.figures["trainers"] += 1
        if self.trainers and epoch <= self.trainers[-1][0]:
            self.violation(f"trainer's epoch {epoch} after {self.trainers[-1][0]}")
        self.trainers.append((epoch, step))

    def published(self, version: int, step: int, epoch: int) -> None:
        """A version was issued."""
        self.write("published", version=version, step=step, epoch=epoch)
        self.figures["versions"] += 1
        if self.versions and version <= self.versions[-1][0]:
            self.violation(f"version {version} was issued after {self.versions[-1][0]}")
        self.versions.append((version, step, epoch))

    def welcomed(self, epoch: int, incarnation: int) -> None:
        """A stream was opened by an actor that had no incarnation."""
        self.write("welcomed", epoch=epoch, incarnation=incarnation)
        if self.welcomes and epoch < self.welcomes[-1][0]:
            self.violation(f"intake's epoch {epoch} after {self.welcomes[-1][0]}")
        if incarnation in (number for _, number in self.welcomes):
            self.violation(f"incarnation {incarnation} was given twice")
        self.welcomes.append((epoch, incarnation))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _encode(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
