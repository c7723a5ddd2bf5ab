"""Keeps a rank's share of a batch that could not be learned from, for people to look at.

google.protobuf.proto.parse_length_prefixed reads its messages, NextBatchResponse, one by one.
"""

import io
from pathlib import Path

from google.protobuf import proto

from learner.trainer.intake_client import BatchShare
from understudy.v1 import batch_pb2


def save_share(folder: Path, rank: int, share: BatchShare) -> Path:
    """Write a share as NextBatch sent it, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{share.header.step:08d}-rank-{rank}.pb"
    stream = io.BytesIO()
    proto.serialize_length_prefixed(batch_pb2.NextBatchResponse(header=share.header), stream)
    for trajectory in share.trajectories:
        message = batch_pb2.NextBatchResponse(trajectory=trajectory)
        proto.serialize_length_prefixed(message, stream)
    path.write_bytes(stream.getvalue())
    return path
