"""A publication: the parts of all ranks on their way to one version."""

import asyncio
import bisect
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from learner.weights.head import Head
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ByteArray
from understudy.weights.manifest import check_slice, check_slice_values


class Publication:
    """Parts that belong to one (epoch, step). It ends committed or discarded, never both."""

    def __init__(self, first: weight_pb2.PartHeader) -> None:
        self.epoch: int = first.epoch
        self.step: int = first.step
        self.num_parts: int = first.num_parts
        self.started = time.perf_counter()
        self.announced: set[int] = set()
        """Parts whose header came."""
        self.verified: dict[int, Upload] = {}
        self.outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The version that was issued, or why there is none."""
        self.outcome.add_done_callback(lambda outcome: outcome.exception())

    def require_open(self) -> None:
        """Raise what ended the publication, if it was given up."""
        if self.outcome.done():
            self.outcome.result()

    def join(self, part: weight_pb2.PartHeader) -> None:
        """Take up a part. Raises WeightsRefusedError: PART_CONFLICT."""
        if (part.epoch, part.step, part.num_parts) != (self.epoch, self.step, self.num_parts):
            raise WeightsRefusedError(
                "PART_CONFLICT",
                f"epoch {part.epoch}, step {part.step} in {part.num_parts} parts; epoch "
                f"{self.epoch}, step {self.step} in {self.num_parts} parts is under way",
            )
        if part.part_index in self.announced:
            raise WeightsRefusedError(
                "PART_CONFLICT", f"part {part.part_index} of step {part.step} came twice"
            )
        self.announced.add(part.part_index)

    def end(self, error: Exception) -> None:
        """Give the publication up; every part's call is told why."""
        self.outcome.set_exception(error)
        self.verified.clear()

    @property
    def whole(self) -> bool:
        """Whether all parts are there and verified."""
        return len(self.verified) == self.num_parts

    @property
    def uploads(self) -> "list[Upload]":
        """Verified parts by index."""
        return [self.verified[index] for index in sorted(self.verified)]


class Upload:
    """The payload of one part while it comes in. Slices are verified on a thread as they come.

    Args:
        part: what is announced.
        head: the newest version, if there is one.

    Raises:
        WeightsRefusedError: BAD_MANIFEST, UNKNOWN_TENSOR, BAD_SHAPE, DOUBLED_TENSOR.
    """

    def __init__(self, part: weight_pb2.PartHeader, head: Head | None) -> None:
        check_header(part, head)
        self.part = part
        self._head = head
        self._ends = list(itertools.accumulate(piece.num_bytes for piece in part.slices))
        num_bytes = self._ends[-1] if self._ends else 0
        try:
            self.payload: ByteArray = np.empty(num_bytes, np.uint8)
        except (MemoryError, ValueError):
            raise WeightsRefusedError(
                "BAD_MANIFEST", f"part {part.part_index} has {num_bytes} bytes: no memory for them"
            ) from None
        self._position = 0
        self._num_taken = 0
        """Slices that were verified, or are being."""
        self._verifying: asyncio.Task[None] | None = None

    def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            WeightsRefusedError: BAD_PAYLOAD beyond the declared size; for what came before, as
                `finish`.
        """
        end = self._position + len(chunk)
        if end > len(self.payload):
            raise WeightsRefusedError(
                "BAD_PAYLOAD",
                f"part {self.part.part_index} is longer than its {len(self.payload)} B",
            )
        self.payload[self._position : end] = np.frombuffer(chunk, np.uint8)
        self._position = end
        if self._verifying is None or self._verifying.done():
            self._verify_next()

    async def finish(self) -> None:
        """Return once the part is verified.

        Raises:
            WeightsRefusedError: BAD_PAYLOAD, BAD_DIGEST, NON_FINITE.
        """
        if self._position != len(self.payload):
            raise WeightsRefusedError(
                "BAD_PAYLOAD",
                f"part {self.part.part_index} ends after {self._position} of {len(self.payload)} B",
            )
        while self._num_taken < len(self._ends):
            if self._verifying:
                await self._verifying
            self._verify_next()
        if self._verifying:
            await self._verifying

    def close(self) -> None:
        """Verify no further."""
        if self._verifying and not self._verifying.cancel() and not self._verifying.cancelled():
            self._verifying.exception()  # it was told, or something else was told before

    @property
    def bodies(self) -> Sequence[ByteArray]:
        """The bytes of each slice."""
        return self._bodies(0, len(self._ends))

    def _bodies(self, first: int, end: int) -> Sequence[ByteArray]:
        edges = [self._ends[first - 1] if first else 0, *self._ends[first:end]]
        return [self.payload[start:stop] for start, stop in itertools.pairwise(edges)]

    def _verify_next(self) -> None:
        if self._verifying:
            self._verifying.result()
        first, end = self._num_taken, bisect.bisect_right(self._ends, self._position)
        if end > first:
            self._num_taken = end
            verify = asyncio.to_thread(self._verify, first, end)
            self._verifying = asyncio.create_task(verify)

    def _verify(self, first: int, end: int) -> None:
        for piece, body in zip(self.part.slices[first:end], self._bodies(first, end), strict=True):
            if self._head:
                self._head.check(piece, body)
            else:
                check_slice_values(piece, body, finite=True)


def check_header(part: weight_pb2.PartHeader, head: Head | None) -> None:
    """Check a part's slices by themselves, so that what it declares bounds what it can take."""
    known = head.tensors if head else None
    num_elements: Counter[str] = Counter()
    for piece in part.slices:
        check_slice(piece, known, based=bool(part.base_version))
        num_elements[piece.name] += piece.num_elements
        if num_elements[piece.name] > math.prod(piece.shape):
            raise WeightsRefusedError(
                "DOUBLED_TENSOR", f"{piece.name}: slices of part {part.part_index} overlap"
            )
