"""A rank that sends part 0 of 2, or the beginning of it, and then waits for its answer.

python weight_child.py ADDRESS EPOCH BASE_VERSION NUM_BYTES
"""

import sys
import time
from collections.abc import Iterator

import grpc

from intake_rig import make_part
from understudy.rpc import error_reason
from understudy.v1 import weight_pb2, weight_pb2_grpc
from weight_store_helpers import UPPER, WEIGHTS, moved


def messages(epoch: int, base: int, num_bytes: int) -> Iterator[weight_pb2.PublishWeightsRequest]:
    header, payload = make_part(
        moved(WEIGHTS), 1, num_parts=2, epoch=epoch, rows=UPPER, base=WEIGHTS, base_version=base
    )
    yield weight_pb2.PublishWeightsRequest(header=header)
    yield weight_pb2.PublishWeightsRequest(chunk=payload[:num_bytes])
    while len(payload) > num_bytes:
        time.sleep(1)


def main(address: str, *numbers: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = weight_pb2_grpc.WeightServiceStub(channel)
        while True:
            try:
                stub.PublishWeights(messages(*map(int, numbers)))
            except grpc.RpcError as error:
                if error_reason(error) != "PART_CONFLICT":
                    raise


if __name__ == "__main__":
    main(*sys.argv[1:])
