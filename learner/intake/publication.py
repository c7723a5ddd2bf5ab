"""A publication: the parts of all ranks on their way to one version."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from learner.intake.refusals import RefusedError
from learner.intake.slices import ByteArray, Slice


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A sequence and the learner's log-probabilities of it, as bytes."""

    token_ids: bytes = b""
    logprobs: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank is about to send."""

    epoch: int
    step: int
    """Steps behind the version."""
    index: int
    num_parts: int
    base_version: int
    slices: tuple[Slice, ...]
    probe: Probe = Probe()

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload."""
        return sum(piece.num_bytes for piece in self.slices)


class Upload:
    """The payload of one part while it comes in."""

    def __init__(self, part: Part, publication: "Publication") -> None:
        self.part = part
        self.publication = publication
        try:
            self.payload: ByteArray = np.empty(part.num_bytes, np.uint8)
        except (MemoryError, ValueError):
            raise RefusedError(
                "BAD_MANIFEST", f"part {part.index} has {part.num_bytes} bytes: no memory for them"
            ) from None
        self._position = 0

    def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            RefusedError: BAD_MANIFEST beyond the declared size; PUBLICATION_DISCARDED.
        """
        self.publication.require_open()
        end = self._position + len(chunk)
        if end > len(self.payload):
            raise RefusedError(
                "BAD_MANIFEST", f"part {self.part.index} is longer than its {len(self.payload)} B"
            )
        self.payload[self._position : end] = np.frombuffer(chunk, np.uint8)
        self._position = end

    def require_whole(self) -> None:
        """Raise BAD_MANIFEST unless all declared bytes came."""
        if self._position != len(self.payload):
            raise RefusedError(
                "BAD_MANIFEST",
                f"part {self.part.index} ends after {self._position} of {len(self.payload)} B",
            )


@dataclass(kw_only=True, eq=False)
class Publication:
    """Parts that belong to one (epoch, step). It ends committed or discarded, never both."""

    epoch: int
    step: int
    num_parts: int
    started: float = field(default_factory=time.perf_counter)
    announced: set[int] = field(default_factory=set)
    """Parts whose header came."""
    verified: dict[int, Upload] = field(default_factory=dict)
    version: int = 0
    """Set by the commit."""
    discarded: str = ""
    """Why it was given up."""

    def require_open(self) -> None:
        """Raise PUBLICATION_DISCARDED once it was given up."""
        if self.discarded:
            raise RefusedError(
                "PUBLICATION_DISCARDED",
                f"step {self.step} of epoch {self.epoch}: {self.discarded}; publish it again",
            )

    def require_same(self, part: Part) -> None:
        """Raise PART_CONFLICT unless a part is one that this publication still lacks."""
        if (part.epoch, part.step, part.num_parts) != (self.epoch, self.step, self.num_parts):
            raise RefusedError(
                "PART_CONFLICT",
                f"epoch {part.epoch}, step {part.step} in {part.num_parts} parts; epoch "
                f"{self.epoch}, step {self.step} in {self.num_parts} parts is under way",
            )
        if part.index in self.announced:
            raise RefusedError("PART_CONFLICT", f"part {part.index} of step {part.step} came twice")

    @property
    def uploads(self) -> list[Upload]:
        """Verified parts by index."""
        return [self.verified[index] for index in sorted(self.verified)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Version:
    """A committed full copy. Immutable; its payload is that of its parts behind each other."""

    version: int
    step: int
    epoch: int
    slices: tuple[Slice, ...]
    probe: Probe
    payloads: Sequence[ByteArray]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole payload."""
        return sum(len(payload) for payload in self.payloads)

    def chunks(self, offset: int, chunk_bytes: int) -> Iterator[bytes]:
        """The payload from an offset on."""
        for payload in self.payloads:
            for start in range(min(offset, len(payload)), len(payload), chunk_bytes):
                yield payload[start : start + chunk_bytes].tobytes()
            offset = max(offset - len(payload), 0)
