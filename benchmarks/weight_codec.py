"""What deltas of a step cost on one core, beside other ways to write the same bytes.

Every figure is CPU time of this thread a byte of bfloat16, the median of rounds in which all parts
take turns, so that they meet the same machine.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import zstandard

from understudy.v1 import weight_pb2
from understudy.weights.encoding import (
    Delta,
    apply,
    digest_of,
    encode,
    find_changes,
    words,
)
from understudy.weights.layout import ByteArray

DTYPE = "BF16"
State = Mapping[str, ByteArray]
"""Bytes of each tensor."""


class Codec:
    """One step of a model: its tensors before and after, written and read in several ways."""

    def __init__(self, old: State, new: State) -> None:
        self._old, self._new = old, new
        self._num_bytes = sum(map(len, old.values()))
        self._deltas = {name: encode(DTYPE, old[name], new[name]) for name in old}
        self._slices = {name: _describe(name, self._deltas[name], new[name]) for name in old}
        self._bodies = {name: _body(delta) for name, delta in self._deltas.items()}
        self._target = {name: np.empty_like(values) for name, values in old.items()}
        self._frames: dict[str, list[bytes]] = {}
        self._xor_frames: dict[str, list[bytes]] = {}

    def measure(self, num_rounds: int) -> dict[str, float]:
        """All figures of a line."""
        parts: dict[str, Callable[[], None]] = {
            "encode": self._encode_and_digest,
            "encode_alone": self._encode,
            "diff": self._diff,
            "copy": self._copy,
            "apply": self._apply,
            "digest": self._digest,
            "verify": self._verify,
            "zstd_encode": self._zstd_encode,
            "xor_encode": self._xor_encode,
            "zstd_decode": self._zstd_decode,
            "xor_decode": self._xor_decode,
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(num_rounds + 1):
            for name, part in parts.items():
                start = time.thread_time()
                part()
                seconds[name].append(time.thread_time() - start)
        # The first round meets cold caches and fresh memory.
        taken = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        taken["decode"] = taken["copy"] + taken["apply"] + taken["verify"]
        rates = {f"{name}_mb_per_s": self._num_bytes / s / 1e6 for name, s in taken.items()}
        return self._ratios() | {name: float(round(rate)) for name, rate in rates.items()}

    def _ratios(self) -> dict[str, float]:
        changed = sum(delta.num_changed for delta in self._deltas.values())
        manifest = weight_pb2.WeightManifest(slices=self._slices.values()).ByteSize()
        sizes = {
            "wire_ratio": sum(map(len, self._bodies.values())) + manifest,
            "zstd_ratio": _total(self._frames),
            "xor_ratio": _total(self._xor_frames),
        }
        return {"changed_share": round(2 * changed / self._num_bytes, 5)} | {
            name: round(self._num_bytes / size, 2) for name, size in sizes.items()
        }

    def _encode_and_digest(self) -> None:
        for name, new in self._new.items():
            encode(DTYPE, self._old[name], new)
            digest_of(new)

    def _encode(self) -> None:
        for name, new in self._new.items():
            encode(DTYPE, self._old[name], new)

    def _diff(self) -> None:
        for name, new in self._new.items():
            find_changes(words(DTYPE, self._old[name]), words(DTYPE, new))

    def _copy(self) -> None:
        for name, old in self._old.items():
            self._target[name][:] = old

    def _apply(self) -> None:
        for name, target in self._target.items():
            apply(self._slices[name], self._bodies[name], target)

    def _digest(self) -> None:
        for target in self._target.values():
            digest_of(target)

    def _verify(self) -> None:
        for name, target in self._target.items():
            assert digest_of(target) == self._slices[name].digest

    def _zstd_encode(self) -> None:
        compressor = zstandard.ZstdCompressor(level=1)
        for name, new in self._new.items():
            self._frames[name] = [compressor.compress(new.data)]

    def _zstd_decode(self) -> None:
        decompressor = zstandard.ZstdDecompressor()
        for name, (frame,) in self._frames.items():
            self._target[name][:] = np.frombuffer(decompressor.decompress(frame), np.uint8)

    def _xor_encode(self) -> None:
        compressor = zstandard.ZstdCompressor(level=1)
        for name, new in self._new.items():
            planes = (self._old[name] ^ new).reshape(-1, 2).T
            self._xor_frames[name] = [
                compressor.compress(np.ascontiguousarray(plane).data) for plane in planes
            ]

    def _xor_decode(self) -> None:
        decompressor = zstandard.ZstdDecompressor()
        for name, frames in self._xor_frames.items():
            planes = self._target[name].reshape(-1, 2)
            for index, frame in enumerate(frames):
                flips = np.frombuffer(decompressor.decompress(frame), np.uint8)
                np.bitwise_xor(self._old[name].reshape(-1, 2)[:, index], flips, planes[:, index])


def _describe(name: str, delta: Delta, new: ByteArray) -> weight_pb2.TensorSlice:
    return weight_pb2.TensorSlice(
        name=name,
        dtype=DTYPE,
        shape=[len(new) // 2],
        num_elements=len(new) // 2,
        encoding=delta.encoding,
        num_bytes=delta.num_bytes,
        digest=digest_of(new),
        num_changed=delta.num_changed,
        plane_bytes=map(len, delta.planes),
    )


def _body(delta: Delta) -> ByteArray:
    return np.frombuffer(b"".join(map(bytes, delta.payload)), np.uint8)


def _total(frames: Mapping[str, list[bytes]]) -> int:
    return sum(len(frame) for tensor in frames.values() for frame in tensor)
