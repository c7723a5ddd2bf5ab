"""Leases: who plays what, and until when."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from learner.intake.tasks import Sample, Task, TaskKey


@dataclass(kw_only=True, slots=True)
class Lease:
    """The right to play one sample, for a while."""

    lease_id: int
    sample: Sample
    actor_id: str
    expires: float
    """On the clock of whoever passes `now`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A lease with all that an actor has to know of it, as things were when it was leased."""

    lease: Lease
    task: Task
    temperature: float
    min_version: int
    """Lowest version that may play it."""


def lease_seed(run_seed: int, key: TaskKey) -> int:
    """Seed of an episode in a deterministic run, from 0 to below 2^63: the same however often the
    sample is leased, and unlike that of any other sample."""
    text = f"{run_seed}/{key.ordinal}/{key.sample_index}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Leases:
    """All leases. Each lasts equally long, so that insertion order is the order of expiry."""

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._leases: OrderedDict[int, Lease] = OrderedDict()

    def add(self, lease_id: int, sample: Sample, actor_id: str, now: float) -> None:
        """Enter a lease."""
        self._leases[lease_id] = Lease(
            lease_id=lease_id,
            sample=sample,
            actor_id=actor_id,
            expires=now + self.lease_seconds,
        )

    def get(self, lease_id: int) -> Lease:
        """A lease that is held."""
        return self._leases[lease_id]

    def renew(self, actor_id: str, lease_ids: Iterable[int], now: float) -> list[int]:
        """Extend an actor's leases; returns those that are gone."""
        gone = []
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None or lease.actor_id != actor_id:
                gone.append(lease_id)
                continue
            lease.expires = now + self.lease_seconds
            self._leases.move_to_end(lease_id)
        return gone

    def remove(self, lease_id: int) -> None:
        """End a lease."""
        del self._leases[lease_id]

    def expired(self, now: float) -> list[Lease]:
        """Leases whose time is over, oldest first."""
        late = []
        for lease in self._leases.values():
            if lease.expires > now:
                break
            late.append(lease)
        return late
