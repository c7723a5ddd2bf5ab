"""Payloads that are not compressed: every rule of the format."""

import contextlib

import zstandard

from tests.fuzz.mutation import mutate_as
from tests.fuzz.trajectories import RAW, SOUND, check
from understudy.trajectory import TrajectoryError, decode_payload, encode_trajectory
from understudy.v1 import trajectory_pb2

MAX_LEN = 2048
mutate = mutate_as(trajectory_pb2.Trajectory)


def seeds() -> list[bytes]:
    """Sound payloads."""
    return [zstandard.decompress(encode_trajectory(trajectory)) for trajectory in SOUND]


def TestOneInput(data: bytes) -> None:
    """Decode, and check what comes out."""
    with contextlib.suppress(TrajectoryError):
        check(decode_payload(data, RAW))
