"""Payload bytes that a process sends and receives by FetchWeights, a second of its CPU time.

python -m benchmarks.weight_transfer    serves a payload, and says its CPU time on stdin's end
"""

import asyncio
import subprocess
import sys
import time

import uvloop

from inference.shelf import Shelf
from inference.weight_servicer import PassingWeightServicer
from understudy.config import NetworkConfig
from understudy.rpc import RoleControl, RoleServer, Service, open_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.links import Link, MemoryPayload

PAYLOAD_BYTES = 2**28
ROUNDS = 6


def measure() -> dict[str, object]:
    """Fetch several times, one after another."""
    words = [sys.executable, "-m", "benchmarks.weight_transfer"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        used, wall = uvloop.run(_fetch(f"127.0.0.1:{port}"))
        output, _ = server.communicate()
    megabytes = ROUNDS * PAYLOAD_BYTES / 1e6
    return {
        "send_mb_per_s": round(megabytes / float(output)),
        "receive_mb_per_s": round(megabytes / used),
        "wall_mb_per_s": round(megabytes / wall),
    }


async def _fetch(address: str) -> tuple[float, float]:
    """Seconds of CPU and of the wall clock."""
    async with open_channel(address, NetworkConfig()) as channel:
        stub = weight_pb2_grpc.WeightServiceStub(channel)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(ROUNDS):
            request = weight_pb2.FetchWeightsRequest()
            chunks = [len(each.chunk) async for each in stub.FetchWeights(request)]
            assert sum(chunks) == PAYLOAD_BYTES
        return time.process_time() - cpu, time.perf_counter() - start


async def serve() -> None:
    """Serve until stdin ends."""
    shelf = Shelf()
    manifest = weight_pb2.WeightManifest(version=1, payload_bytes=PAYLOAD_BYTES)
    shelf.links.add(Link(manifest=manifest, payload=MemoryPayload(bytes(PAYLOAD_BYTES))))
    service = Service(
        name="understudy.v1.WeightService",
        add=weight_pb2_grpc.add_WeightServiceServicer_to_server,
        servicer=PassingWeightServicer(shelf),
    )
    control = RoleControl("inference")
    server = RoleServer("inference", "127.0.0.1:0", NetworkConfig(), [service], control)
    port = await server.bind()
    await server.set_serving()
    started = time.process_time()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(time.process_time() - started, flush=True)
    await server.stop()


if __name__ == "__main__":
    uvloop.run(serve())
