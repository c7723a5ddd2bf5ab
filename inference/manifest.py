"""What a fetched version must be before anything is served from it.

Names are known, types and shapes are the model's, slices cover every tensor exactly once, each
digest and each value is checked, the version is newer, the run the same, the epoch not lower.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inference.weights import ITEM_BYTES, Layout, Shadow, all_finite, plan_layout
from understudy.errors import UnderstudyError
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import weight_pb2

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,255}")
_MAX_DIMENSIONS = 8


class RefusedError(UnderstudyError):
    """Something from the weight store that is not taken; `reason` in capitals labels the metric."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where the served weights come from; what comes next has to follow."""

    run_id: str = ""
    """Run; empty before the first version."""
    epoch: int = 0
    """Epoch of the trainer that published them."""
    version: int = 0
    """Policy version."""


def check_lineage(manifest: weight_pb2.WeightManifest, current: Lineage) -> Lineage:
    """Return the manifest's lineage, or refuse it."""
    if current.run_id and manifest.run_id != current.run_id:
        raise RefusedError(
            "OTHER_RUN",
            f"version {manifest.version} is of run {manifest.run_id!r}, this replica serves "
            f"{current.run_id!r}; restart it to serve the other",
        )
    if manifest.epoch < current.epoch:
        raise RefusedError(
            "OLD_EPOCH", f"epoch {manifest.epoch} is below {current.epoch}: a trainer that was left"
        )
    if manifest.version <= current.version:
        raise RefusedError(
            "OLD_VERSION", f"version {manifest.version} is not above {current.version}"
        )
    if manifest.base_version:
        raise RefusedError(
            "WRONG_BASE", f"a full copy was asked for, base {manifest.base_version} was sent"
        )
    return Lineage(run_id=manifest.run_id, epoch=manifest.epoch, version=manifest.version)


def check_slices(manifest: weight_pb2.WeightManifest, expected: Layout | None) -> Layout:
    """Check that the slices make whole tensors, and return their layout.

    Args:
        manifest: manifest of a full copy.
        expected: layout of the model that is served; None before the first version.
    """
    by_name: dict[str, list[weight_pb2.TensorSlice]] = defaultdict(list)
    for part in manifest.slices:
        _check_slice(part)
        by_name[part.name].append(part)
    for parts in by_name.values():
        _check_coverage(parts)
    total = sum(part.num_bytes for part in manifest.slices)
    if total != manifest.payload_bytes or not total:
        raise RefusedError(
            "BAD_MANIFEST", f"slices have {total} bytes, the payload {manifest.payload_bytes}"
        )
    if expected is None:
        return plan_layout((name, p[0].dtype, tuple(p[0].shape)) for name, p in by_name.items())
    _check_known(by_name, expected)
    return expected


def _check_slice(part: weight_pb2.TensorSlice) -> None:
    if not _NAME.fullmatch(part.name):
        raise RefusedError("UNKNOWN_TENSOR", f"{part.name[:80]!r} is no tensor name")
    if part.dtype not in ITEM_BYTES or len(part.shape) > _MAX_DIMENSIONS or 0 in part.shape:
        raise RefusedError(
            "BAD_MANIFEST", f"{part.name}: {part.dtype[:16]!r} {list(part.shape)[:9]} is not served"
        )
    if part.encoding != weight_pb2.TENSOR_ENCODING_DENSE or len(part.digest) != 32:
        raise RefusedError("BAD_MANIFEST", f"{part.name}: not dense with a SHA-256")
    if not part.num_elements or part.num_bytes != part.num_elements * ITEM_BYTES[part.dtype]:
        raise RefusedError(
            "BAD_MANIFEST", f"{part.name}: {part.num_elements} values in {part.num_bytes} bytes"
        )


def _check_coverage(parts: Sequence[weight_pb2.TensorSlice]) -> None:
    """One tensor's slices agree and lie behind each other, from its first to its last element."""
    first = parts[0]
    end = 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.dtype != first.dtype or part.shape != first.shape:
            raise RefusedError("BAD_MANIFEST", f"{part.name}: slices disagree on dtype or shape")
        if part.start != end:
            reason = "DOUBLED_TENSOR" if part.start < end else "MISSING_TENSOR"
            raise RefusedError(reason, f"{part.name}: a slice starts at {part.start}, not at {end}")
        end = part.start + part.num_elements
    size = int(np.prod(list(first.shape), dtype=object)) if first.shape else 1
    if end != size:
        reason = "DOUBLED_TENSOR" if end > size else "MISSING_TENSOR"
        raise RefusedError(reason, f"{first.name}: slices end at {end}, the tensor at {size}")


def _check_known(by_name: dict[str, list[weight_pb2.TensorSlice]], expected: Layout) -> None:
    known = {entry.name: entry for entry in expected}
    if unknown := sorted(by_name.keys() - known):
        raise RefusedError("UNKNOWN_TENSOR", f"the model has no {', '.join(unknown[:4])}")
    if missing := sorted(known.keys() - by_name):
        raise RefusedError("MISSING_TENSOR", f"the copy lacks {', '.join(missing[:4])}")
    for name, entry in known.items():
        part = by_name[name][0]
        if (part.dtype, tuple(part.shape)) != (entry.dtype, entry.shape):
            raise RefusedError(
                "BAD_SHAPE",
                f"{name} is {part.dtype} {list(part.shape)}, the model has {entry.dtype} "
                f"{list(entry.shape)}",
            )


def check_payload(manifest: weight_pb2.WeightManifest, staging: Shadow) -> None:
    """Check digest and values of every slice; takes a second for some gigabytes."""
    for part in manifest.slices:
        start = part.start * ITEM_BYTES[part.dtype]
        data = staging.tensor_bytes(part.name)[start : start + part.num_bytes]
        if hashlib.sha256(data.data).digest() != part.digest:
            raise RefusedError("BAD_DIGEST", f"{part.name} from {part.start}: wrong SHA-256")
        if not all_finite(part.dtype, data):
            raise RefusedError("NON_FINITE", f"{part.name} has infinite values or NaN")


def decode_probe(
    probe: weight_pb2.LogprobProbe, vocab_size: int, max_model_len: int
) -> tuple[IntArray, FloatArray] | None:
    """The probe's token ids [N] and log-probabilities [N-1]; None if there is none."""
    if not probe.token_ids:
        return None
    count = len(probe.token_ids) // 4
    if len(probe.token_ids) % 4 or count < 2 or len(probe.logprobs) != 4 * (count - 1):
        raise RefusedError("BAD_PROBE", "not N token ids and N-1 log-probabilities")
    token_ids = np.frombuffer(probe.token_ids, "<i4")
    if count >= max_model_len or token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise RefusedError("BAD_PROBE", "tokens beyond the context or the vocabulary")
    return token_ids, np.frombuffer(probe.logprobs, "<f4")
