"""Engines that a trainer on the same node writes weights into, past the weight store."""

from abc import abstractmethod
from typing import Any

from inference.engine import Engine

Info = dict[str, Any]
"""JSON's types only."""


class ReceivingEngine(Engine):
    """Receives weights; one call at a time, in the order of TransferService.

    Any of them may fail with whatever vLLM raises, or hang; what follows then is `fail`.
    """

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Processes that join the trainer's group."""

    @abstractmethod
    async def init_transfer(self, info: Info) -> None:
        """Join the trainer's group."""

    @abstractmethod
    async def start_update(self) -> None:
        """Pause generation, and prepare the model for new values."""

    @abstractmethod
    async def receive_weights(self, info: Info) -> None:
        """Receive all values."""

    @abstractmethod
    async def finish_update(self, version: int) -> float:
        """Serve what was received as this version. Returns seconds of pause."""

    @abstractmethod
    def fail(self, cause: str) -> None:
        """Serve no more, for this cause: weights or workers are in no known state."""
