"""What an actor may push wrongly, by name, with the reason that answers it; and who builds it."""

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard

from intake_rig import make_record, trajectory
from understudy.trajectory import encode_trajectory
from understudy.v1 import common_pb2, task_pb2, trajectory_pb2

VOCAB_SIZE = 5000
MAX_PAYLOAD_BYTES = 2**20
MAX_MESSAGE_BYTES = 32 * 2**20
RAW = common_pb2.ENCODING_RAW
Record = trajectory_pb2.TrajectoryRecord
Lease = task_pb2.Lease


# --- Payloads ---


def sound(lease: Lease, **fields: Any) -> trajectory_pb2.Trajectory:
    payload = zstandard.decompress(encode_trajectory(trajectory(lease, **fields)))
    return trajectory_pb2.Trajectory.FromString(payload)


def frame(lease: Lease) -> bytes:
    return encode_trajectory(trajectory(lease))


def header(descriptor: int, *parts: bytes) -> bytes:
    """A zstd frame's header, then one empty last block."""
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + b"".join(parts) + b"\x01\x00\x00"


def compress(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def with_forged_size(data: bytes) -> bytes:
    """The same blocks behind a header that says 2^40 bytes."""
    parameters = zstandard.get_frame_parameters(data)
    assert parameters.content_size < 2**16
    assert data[4] & 0x20  # a single segment: no window descriptor
    return data[:4] + b"\xe4" + (2**40).to_bytes(8, "little") + data[7:]


FRAMES: dict[str, tuple[Callable[[Lease], bytes], str]] = {
    "empty": (lambda lease: b"", "BAD_PAYLOAD"),
    "no frame": (lambda lease: b"\xff" * 300, "BAD_PAYLOAD"),
    "another compression": (lambda lease: zlib.compress(b"x" * 100), "BAD_PAYLOAD"),
    "forged content size": (lambda lease: with_forged_size(frame(lease)), "TOO_LARGE"),
    "forged size, no blocks": (lambda _: header(0xE0, (2**40).to_bytes(8, "little")), "TOO_LARGE"),
    "content size absent": (
        lambda lease: compress(sound(lease).SerializeToString(), write_content_size=False),
        "TOO_LARGE",
    ),
    "window of 2 GiB": (
        lambda lease: header(0xC0, b"\xa8", (100).to_bytes(8, "little")),
        "BAD_PAYLOAD",
    ),
    "window of 2 GiB, no size": (lambda lease: header(0x00, b"\xa8"), "TOO_LARGE"),
    "bomb beyond the limit": (lambda lease: compress(bytes(2**26 + 1)), "TOO_LARGE"),
    "bomb within the limit": (lambda lease: compress(bytes(2**24)), "TOO_LARGE"),
    "two frames": (lambda lease: frame(lease) * 2, "BAD_PAYLOAD"),
    "trailing byte": (lambda lease: frame(lease) + b"x", "BAD_PAYLOAD"),
    "skippable frame before": (
        lambda lease: b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + frame(lease),
        "BAD_PAYLOAD",
    ),
    "truncated": (lambda lease: frame(lease)[:-1], "BAD_PAYLOAD"),
    "header only": (lambda lease: frame(lease)[:6], "BAD_PAYLOAD"),
    "dictionary": (lambda lease: header(0x21, b"\x07", b"\x05"), "BAD_PAYLOAD"),
    "message cut": (lambda lease: compress(sound(lease).SerializeToString()[:-5]), "BAD_PAYLOAD"),
    "no message": (lambda lease: compress(b"\xff" * 1000), "BAD_PAYLOAD"),
    "message of nothing": (lambda lease: compress(b"\x08"), "BAD_PAYLOAD"),
    "groups 101 deep": (lambda lease: compress(b"\x7b" * 101 + b"\x7c" * 101), "BAD_PAYLOAD"),
    "million empty segments": (lambda lease: compress(b"\x32\x00" * 10**6), "TOO_LARGE"),
    "million empty spans": (
        lambda lease: compress(b"\x32\x80\x89\x7a" + b"\x22\x00" * 10**6),
        "TOO_LARGE",
    ),
    "million empty turns": (lambda lease: compress(b"\x3a\x00" * 10**6), "TOO_LARGE"),
    "text that is no UTF-8": (lambda lease: compress(b"\x12\x02\xff\xfe"), "BAD_PAYLOAD"),
}


def reworked(lease: Lease, payload: bytes) -> Record:
    """A record with another payload under its right digest."""
    record = make_record(lease, trajectory(lease))
    record.payload = payload
    record.payload_digest = hashlib.sha256(payload).digest()
    return record


def spans(*values: tuple[int, int, int]) -> list[common_pb2.VersionSpan]:
    return [common_pb2.VersionSpan(version=v, start=start, end=end) for v, start, end in values]


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


NAN, INF = float("nan"), float("inf")
FIELDS: dict[str, tuple[str, Any, str]] = {
    "ids not whole": ("token_ids", b"\0" * 47, "BAD_PAYLOAD"),
    "ids fewer than the mask": ("token_ids", b"\0" * 44, "BAD_PAYLOAD"),
    "ids more than the mask": ("token_ids", b"\0" * 52, "BAD_PAYLOAD"),
    "id negative": ("token_ids", np.full(12, -1, "<i4").tobytes(), "BAD_PAYLOAD"),
    "id of the vocabulary's size": (
        "token_ids",
        np.array([*range(11), VOCAB_SIZE], "<i4").tobytes(),
        "BAD_PAYLOAD",
    ),
    "id 2^31-1": ("token_ids", np.full(12, 2**31 - 1, "<i4").tobytes(), "BAD_PAYLOAD"),
    "mask empty": ("loss_mask", b"", "BAD_PAYLOAD"),
    "mask of twos": ("loss_mask", b"\0" * 6 + b"\x02" * 6, "BAD_PAYLOAD"),
    "mask without a prompt": ("loss_mask", b"\x01" * 12, "BAD_PAYLOAD"),
    "mask of nothing": ("loss_mask", b"\0" * 12, "BAD_PAYLOAD"),
    "logprobs fewer": ("logprobs", floats(*[-1] * 5), "BAD_PAYLOAD"),
    "logprobs more": ("logprobs", floats(*[-1] * 7), "BAD_PAYLOAD"),
    "logprobs not whole": ("logprobs", floats(*[-1] * 6)[:-1], "BAD_PAYLOAD"),
    "logprob NaN": ("logprobs", floats(*[-1] * 5, NAN), "BAD_PAYLOAD"),
    "logprob -inf": ("logprobs", floats(*[-1] * 5, -INF), "BAD_PAYLOAD"),
    "logprob +inf": ("logprobs", floats(*[-1] * 5, INF), "BAD_PAYLOAD"),
    "logprob above 0": ("logprobs", floats(*[-1] * 5, 1e-45), "BAD_PAYLOAD"),
    "spans none": ("version_spans", [], "BAD_PAYLOAD"),
    "spans overlap": ("version_spans", spans((1, 0, 4), (1, 3, 6)), "BAD_PAYLOAD"),
    "spans with a gap": ("version_spans", spans((1, 0, 2), (1, 3, 6)), "BAD_PAYLOAD"),
    "spans with a late start": ("version_spans", spans((1, 1, 6)), "BAD_PAYLOAD"),
    "spans short": ("version_spans", spans((1, 0, 5)), "BAD_PAYLOAD"),
    "spans long": ("version_spans", spans((1, 0, 7)), "BAD_PAYLOAD"),
    "span empty": ("version_spans", spans((1, 0, 0), (1, 0, 6)), "BAD_PAYLOAD"),
    "span backwards": ("version_spans", spans((1, 0, 6), (1, 6, 0)), "BAD_PAYLOAD"),
    "span ends at 2^32-1": ("version_spans", spans((1, 0, 2**32 - 1)), "BAD_PAYLOAD"),
    "versions descend": ("version_spans", spans((2, 0, 3), (1, 3, 6)), "BAD_PAYLOAD"),
    "part of 65 letters": ("part", "p" * 65, "BAD_PAYLOAD"),
    "part of a path": ("part", "../a", "BAD_PAYLOAD"),
    "part with a line end": ("part", "a\n", "BAD_PAYLOAD"),
    "part with a NUL": ("part", "a\0", "BAD_PAYLOAD"),
    "version 0": ("version_spans", spans((0, 0, 6)), "UNKNOWN_VERSION"),
    "version 2^64-1": ("version_spans", spans((2**64 - 1, 0, 6)), "UNKNOWN_VERSION"),
}

VALUES: dict[str, Callable[[trajectory_pb2.Trajectory], object]] = {
    "outcome unset": lambda message: message.ClearField("outcome"),
    "outcome unknown": lambda message: setattr(message, "outcome", 99),
    "outcome negative": lambda message: setattr(message, "outcome", -1),
    "reward NaN": lambda message: setattr(message, "reward", NAN),
    "reward infinite": lambda message: setattr(message, "reward", -INF),
    "temperature NaN": lambda message: setattr(message.sampling, "temperature", NAN),
    "temperature -1": lambda message: setattr(message.sampling, "temperature", -1),
    "temperature 11": lambda message: setattr(message.sampling, "temperature", 11),
    "turn of no segment": lambda message: setattr(message.turns[0], "segment", 1),
    "turn backwards": lambda message: setattr(message.turns[0], "start", 7),
    "turn beyond the end": lambda message: setattr(message.turns[0], "end", 7),
    "turn's reward NaN": lambda message: setattr(message.turns[0], "reward", NAN),
    "another suite": lambda message: setattr(message.task, "suite", "other"),
    "another split": lambda message: setattr(message.task, "split", "test"),
    "another task": lambda message: setattr(message.task, "task_ordinal", 2**64 - 1),
    "too many tokens": lambda message: message.segments.add(
        token_ids=bytes(4 * 4097), loss_mask=bytes(4097)
    ),
    "too many frozen tokens": lambda message: message.segments.add(
        token_ids=bytes(4 * 4097), loss_mask=bytes(4097), part="a", frozen=True
    ),
}


# --- Envelopes ---

ENVELOPES: dict[str, tuple[dict[str, Any], str]] = {
    "encoding unknown": ({"encoding": 99}, "BAD_PAYLOAD"),
    "encoding of another payload": ({"encoding": RAW}, "BAD_PAYLOAD"),
    "outcome unset": ({"outcome": 0}, "BAD_PAYLOAD"),
    "outcome unknown": ({"outcome": 99}, "BAD_PAYLOAD"),
    "no digest": ({"payload_digest": b""}, "BAD_DIGEST"),
    "half a digest": ({"payload_digest": b"\0" * 16}, "BAD_DIGEST"),
    "payload above the limit": ({"payload": b"x" * (MAX_PAYLOAD_BYTES + 1)}, "TOO_LARGE"),
    "payload of the limit": ({"payload": b"x" * MAX_PAYLOAD_BYTES}, "BAD_PAYLOAD"),
}


# --- Messages ---


def hello(**fields: Any) -> bytes:
    message = trajectory_pb2.Hello(**{"actor_id": "raw", **fields})
    return trajectory_pb2.PushTrajectoriesRequest(hello=message).SerializeToString()


DEEP = b"\x7b" * 101 + b"\x7c" * 101
"""Groups of an unknown field, nested; no message of ours nests so deep."""
MESSAGES: dict[str, tuple[list[bytes], str, str]] = {
    "garbage first": ([b"\xff" * 64], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "garbage later": ([hello(), b"\xff" * 64], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "hello cut": ([hello()[:-1]], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "hello with bad UTF-8": ([b"\x0a\x03\x12\x01\xff"], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "101 groups first": ([hello() + DEEP], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "101 groups later": ([hello(), DEEP], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "empty first": ([b""], "INVALID_ARGUMENT", "BAD_HELLO"),
    "unknown field first": ([b"\x7a\x01x"], "INVALID_ARGUMENT", "BAD_HELLO"),
    "empty later": ([hello(), b""], "FAILED_PRECONDITION", "OUT_OF_ORDER"),
    "hello twice": ([hello(), hello()], "FAILED_PRECONDITION", "OUT_OF_ORDER"),
    "other run": ([hello(run_id="other")], "FAILED_PRECONDITION", "RUN_MISMATCH"),
    "name of NULs is a name": (
        [hello(actor_id="\0" * 64), b""],
        "FAILED_PRECONDITION",
        "OUT_OF_ORDER",
    ),
    "name too long in bytes": ([hello(actor_id="\u00e9" * 33)], "INVALID_ARGUMENT", "BAD_HELLO"),
    "empty record": ([hello(), b"\x12\x02\x0a\x00"], "FAILED_PRECONDITION", "OLD_EPOCH"),
    "message above the limit": (
        [hello(), b"\x7a\xfc\xff\xff\x0f" + bytes(MAX_MESSAGE_BYTES - 4)],
        "RESOURCE_EXHAUSTED",
        "RESOURCE_EXHAUSTED",
    ),
    "message of the limit": (
        [hello(), b"\x7a\xfb\xff\xff\x0f" + bytes(MAX_MESSAGE_BYTES - 5)],
        "FAILED_PRECONDITION",
        "OUT_OF_ORDER",
    ),
}
