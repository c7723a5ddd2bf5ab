"""Mutators that keep a structure, so that inputs get past the parser to the checks behind it."""

import random
from collections.abc import Callable
from typing import Any

import atheris
from blake3 import blake3
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from understudy.v1 import weight_pb2

Mutator = Callable[[bytes, int, int], bytes]
"""Data, largest size of the result, seed."""

_INTEGERS = (0, 1, 2, 3, 4, 5, 7, 8, 32, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
_INTEGER_BITS = {
    FieldDescriptor.CPPTYPE_INT32: 31,
    FieldDescriptor.CPPTYPE_UINT32: 32,
    FieldDescriptor.CPPTYPE_INT64: 63,
    FieldDescriptor.CPPTYPE_UINT64: 64,
}
_MAX_REPEATED = 16
_MAX_BYTES = 256


def mutate_bytes(data: bytes, max_size: int, seed: int) -> bytes:
    """Plain bytes."""
    return bytes(atheris.Mutate(data, max_size))


def mutate_as(kind: type[Message]) -> Mutator:
    """A mutator of serialized messages: half of the time of a field, else of bytes."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            try:
                message = kind.FromString(data)
            except DecodeError:
                message = kind()
            for _ in range(rng.randint(1, 3)):
                mutate_message(message, rng)
            changed = message.SerializeToString()
            if len(changed) <= max_size:
                return changed
        return mutate_bytes(data, max_size, seed)

    return mutate


def mutate_message(message: Message, rng: random.Random) -> None:
    """Change one field, at any depth."""
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.is_repeated:
        _mutate_repeated(getattr(message, field.name), field, rng)
    elif field.message_type:
        mutate_message(getattr(message, field.name), rng)
    else:
        setattr(message, field.name, _mutate_value(getattr(message, field.name), field, rng))


def _mutate_repeated(values: Any, field: FieldDescriptor, rng: random.Random) -> None:
    action = rng.choice(("change", "change", "change", "add", "copy", "remove", "turn"))
    index = rng.randrange(len(values)) if values else 0
    if action == "change" and values and field.message_type:
        mutate_message(values[index], rng)
    elif action == "change" and values:
        values[index] = _mutate_value(values[index], field, rng)
    elif action == "remove" and values:
        del values[index]
    elif action == "turn":
        values.reverse()
    elif len(values) < _MAX_REPEATED:
        if action == "copy" and values:
            values.append(values[index])
        elif field.message_type:
            values.add()
        else:
            values.append(_mutate_value(field.default_value or 0, field, rng))


def _mutate_value(value: Any, field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutate_bytes(value, _MAX_BYTES, 0)
    if field.type == FieldDescriptor.TYPE_STRING:
        return mutate_bytes(value.encode(), _MAX_BYTES, 0).decode("utf-8", "ignore")
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return not value
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return rng.randrange(8)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((*_FLOATS, rng.uniform(-2, 2)))
    bits = _INTEGER_BITS[field.cpp_type]
    near = (value + 1, value - 1, value * 2, value // 2, 2**bits - 1, rng.getrandbits(bits))
    return abs(rng.choice((*_INTEGERS, *near))) % 2**bits


def join_parts(header: bytes, content: bytes) -> bytes:
    """One input of two: a message and the bytes that it describes."""
    return len(header).to_bytes(2, "little") + header + content


def split_parts(data: bytes) -> tuple[bytes, bytes]:
    """What join_parts joined, of any bytes."""
    end = 2 + int.from_bytes(data[:2], "little")
    return data[2:end], data[end:]


def sign_slices(
    message: weight_pb2.PartHeader | weight_pb2.WeightManifest, payload: bytes
) -> bytes:
    """The message with the right digest for each slice of the payload."""
    offset = 0
    for piece in message.slices:
        piece.digest = blake3(payload[offset : offset + piece.num_bytes]).digest()
        offset += piece.num_bytes
    return message.SerializeToString()
