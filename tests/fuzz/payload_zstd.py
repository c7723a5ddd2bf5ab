"""Compressed payloads: frames are changed, and what is in them."""

import contextlib
import random

import zstandard

from tests.fuzz import payload_raw
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.trajectories import SOUND, ZSTD, check
from understudy.trajectory import TrajectoryError, decode_payload, encode_trajectory

MAX_LEN = 2048
MAX_DECODED_BYTES = 2**16
"""Limit that the decoder is given."""
_COMPRESSORS = [
    zstandard.ZstdCompressor(level=1, write_content_size=size, write_checksum=checksum)
    for size in (True, True, True, False)
    for checksum in (True, False)
]
_DECOMPRESSOR = zstandard.ZstdDecompressor(max_window_size=2**20)


def seeds() -> list[bytes]:
    """Sound frames, a bomb, two frames, trailing bytes, no content size, forged sizes, a dictionary
    that nobody has, an empty frame and a skippable one."""
    sound = [encode_trajectory(trajectory) for trajectory in SOUND]
    bomb = zstandard.ZstdCompressor().compress(bytes(2**22))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
    magic = b"\x28\xb5\x2f\xfd"
    forged = magic + b"\xe0" + (2**40).to_bytes(8, "little") + sound[0][6:]
    window = magic + b"\xc0\xa8" + (100).to_bytes(8, "little") + sound[0][6:]
    dictionary = magic + b"\x21\x07\x05" + sound[0][6:]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    odd = [bomb, sound[0] * 2, sound[0] + b"x", silent, forged, window, dictionary, skippable]
    return [*sound, *odd, zstandard.compress(b""), magic]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the frame, or what it holds."""
    rng = random.Random(seed)
    if rng.random() < 0.6:
        with contextlib.suppress(zstandard.ZstdError):
            if zstandard.get_frame_parameters(data).content_size <= MAX_DECODED_BYTES:
                inside = payload_raw.mutate(_DECOMPRESSOR.decompress(data), 2**16, seed)
                changed = rng.choice(_COMPRESSORS).compress(inside)
                if len(changed) <= max_size:
                    return changed
    return mutate_bytes(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Decode, and check what comes out."""
    with contextlib.suppress(TrajectoryError):
        check(decode_payload(data, ZSTD, MAX_DECODED_BYTES))
