"""Where ledger events and trajectories are kept. A durable log goes behind the same interface."""

from dataclasses import dataclass
from typing import Protocol

from learner.intake.tasks import State, TaskKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A task key entered a state."""

    key: TaskKey
    state: State
    reason: str = ""
    """Why, if it was dropped or given back."""


class Store(Protocol):
    """Keeps events in order, and a record by task key until it is forgotten."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the records that are held."""

    def append(self, event: Event) -> None:
        """Add an event."""

    def put(self, key: TaskKey, record: bytes) -> None:
        """Hold a record."""

    def get(self, key: TaskKey) -> bytes:
        """The record of a task key that is held."""

    def forget(self, key: TaskKey) -> None:
        """Let go of a record."""

    async def flush(self) -> None:
        """Return once all that was added is as durable as this store makes it."""


class MemoryStore:
    """A store that ends with the process. Nobody could read its events later: none are kept."""

    def __init__(self) -> None:
        self._records: dict[TaskKey, bytes] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def append(self, event: Event) -> None:
        pass

    def put(self, key: TaskKey, record: bytes) -> None:
        assert key not in self._records
        self._records[key] = record
        self._num_bytes += len(record)

    def get(self, key: TaskKey) -> bytes:
        return self._records[key]

    def forget(self, key: TaskKey) -> None:
        self._num_bytes -= len(self._records.pop(key))

    async def flush(self) -> None:
        pass
