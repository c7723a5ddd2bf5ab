"""Intake: records a second that are validated, durable and acked, over loopback gRPC.

A real intake process on a real disk; this process plays the actors, with one stream each. Records
are valid trajectories of the given compressed size. They are sent as fast as credits allow, as
messages that are joined from bytes encoded beforehand: both processes share the cores, and it is
the intake that is measured.

    {"bench": "intake", "record_kib": 64, "streams": 64, "records_per_s": ..., "mb_per_s": ...,
     "ack_p50_ms": ..., "ack_p99_ms": ..., "rss_mb": ..., "cpu_ms_per_record": ...}

The ack times count from handing a message to gRPC until the ack that covers its last record. With
more in flight they grow and the rate hardly does: --window sets how many records a stream has
un-acked at most.
"""

import argparse
import asyncio
import hashlib
import json
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import uvloop

from benchmarks.rollout import free_address, publish
from understudy.config import Config, write_config
from understudy.process import prepare_process
from understudy.rpc import open_channel
from understudy.supervisor import Supervisor
from understudy.trajectory import Segment, Trajectory, VersionSpan, encode_trajectory
from understudy.v1 import (
    common_pb2,
    task_pb2,
    task_pb2_grpc,
    trajectory_pb2,
)

PUSH = "/understudy.v1.TrajectoryService/PushTrajectories"
RECORDS = trajectory_pb2.PushTrajectoriesRequest.RECORDS_FIELD_NUMBER
RECORD = trajectory_pb2.TrajectoryRecords.RECORDS_FIELD_NUMBER
VOCAB_SIZE = 32_000
MESSAGE_BYTES = 2**18
SETTLE_SHARE = 0.2
"""Share of the records that is sent before the clock starts."""


def main() -> None:
    """Run every case and print its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kib", type=int, nargs="+", default=[4, 64, 1024])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--mib", type=int, default=768, help="most payload bytes a case")
    parser.add_argument("--records", type=int, default=20_000, help="most records a case")
    parser.add_argument("--window", type=int, default=64, help="most un-acked records in all")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    for kib in arguments.kib:
        for streams in arguments.streams:
            number = min(arguments.mib * 1024 // kib, arguments.records)
            window = max(min(arguments.window, 65_536 // kib), streams)
            print(json.dumps(measure(kib, streams, number, window)), flush=True)


def measure(kib: int, num_streams: int, num_records: int, window: int) -> dict[str, object]:
    """One case, on a disk that keeps what is written: the folder is here, not in /tmp."""
    with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir=Path.cwd()) as folder:
        config = _config(Path(folder))
        config_file = write_config(config, config.run.path)
        with Supervisor(config.run.path / "logs") as supervisor:
            words = ["-m", "learner.intake", "--config", str(config_file)]
            supervisor.start("intake", [sys.executable, *words])
            supervisor.wait_serving("intake", config.learner.listen, config.network, 60)
            load = Load(config, make_payload(kib * 1024), num_records, num_streams, window)
            process = psutil.Process(supervisor.pid("intake"))
            uvloop.run(load.run(process))
            rss = process.memory_info().rss
    return {
        "bench": "intake",
        "record_kib": kib,
        "streams": num_streams,
        **load.figures(),
        "rss_mb": round(rss / 1e6),
    }


class Load:
    """All actors of a case."""

    def __init__(
        self, config: Config, payload: bytes, num_records: int, num_streams: int, window: int
    ) -> None:
        self._config = config
        self._payload = payload
        self._contents = trajectory_pb2.TrajectoryRecord(
            outcome=trajectory_pb2.OUTCOME_COMPLETED,
            encoding=common_pb2.ENCODING_ZSTD,
            payload=payload,
            payload_digest=hashlib.sha256(payload).digest(),
        ).SerializeToString()
        self._num_records = num_records
        self._num_streams = num_streams
        self._window = max(window // num_streams, 1)
        self._num_acked = 0
        self._seconds: list[float] = []
        self._start = self._end = (0.0, 0.0, 0)

    async def run(self, process: psutil.Process) -> None:
        """Lease everything, then push it."""
        await publish(self._config)
        async with open_channel(self._config.learner.listen, self._config.network) as channel:
            leases = await _lease(task_pb2_grpc.TaskServiceStub(channel), self._num_records)
        parts = [leases[i :: self._num_streams] for i in range(self._num_streams)]
        pushes = [self._push(f"actor-{i}", part, process) for i, part in enumerate(parts)]
        await asyncio.gather(*pushes)

    def figures(self) -> dict[str, float]:
        """What was measured between the clock's start and the last ack."""
        seconds, cpu, number = (b - a for a, b in zip(self._start, self._end, strict=True))
        p50, p99 = np.percentile(self._seconds, [50, 99]) * 1000
        return {
            "records_per_s": round(number / seconds),
            "mb_per_s": round(number * len(self._payload) / seconds / 1e6),
            "ack_p50_ms": round(p50, 1),
            "ack_p99_ms": round(p99, 1),
            "cpu_ms_per_record": round(1000 * cpu / number, 3),
        }

    async def _push(
        self, actor_id: str, leases: list[task_pb2.Lease], process: psutil.Process
    ) -> None:
        async with open_channel(self._config.learner.listen, self._config.network) as channel:
            method: Any = channel.stream_stream(
                PUSH, response_deserializer=trajectory_pb2.PushTrajectoriesResponse.FromString
            )
            call = method()
            hello = trajectory_pb2.Hello(actor_id=actor_id)
            await call.write(
                trajectory_pb2.PushTrajectoriesRequest(hello=hello).SerializeToString()
            )
            welcome = (await call.read()).welcome
            per_message = max(1, min(MESSAGE_BYTES // len(self._payload), self._window // 2))
            sent: deque[tuple[int, float]] = deque()
            next_record = acked = 0
            while acked < len(leases):
                while next_record < len(leases) and next_record - acked < self._window:
                    part = leases[next_record : next_record + per_message]
                    message = self._message(part, next_record, welcome)
                    next_record += len(part)
                    sent.append((next_record, time.perf_counter()))
                    await call.write(message)
                response = await call.read()
                assert response is not grpc.aio.EOF, await call.details()
                assert not response.HasField("nack"), response.nack
                self._take(response.ack.next_sequence - acked, process)
                acked = response.ack.next_sequence
                while sent and sent[0][0] <= acked:
                    self._measure(time.perf_counter() - sent.popleft()[1])
            call.cancel()

    def _message(
        self, leases: list[task_pb2.Lease], sequence: int, welcome: trajectory_pb2.Welcome
    ) -> bytes:
        """A PushTrajectoriesRequest. A message's bytes are its fields' bytes one after another."""
        parts = []
        for number, lease in enumerate(leases, sequence):
            envelope = trajectory_pb2.TrajectoryRecord(
                incarnation=welcome.incarnation,
                sequence=number,
                epoch=welcome.epoch,
                lease_id=lease.lease_id,
                task_key=lease.task_key,
            ).SerializeToString()
            size = len(envelope) + len(self._contents)
            parts += [_field_head(RECORD, size), envelope, self._contents]
        return b"".join([_field_head(RECORDS, sum(map(len, parts))), *parts])

    def _take(self, number: int, process: psutil.Process) -> None:
        before = self._num_acked
        self._num_acked += number
        settled = SETTLE_SHARE * self._num_records
        if before < settled <= self._num_acked:
            self._start = self._now(process)
        if self._num_acked == self._num_records:
            self._end = self._now(process)

    def _now(self, process: psutil.Process) -> tuple[float, float, int]:
        times = process.cpu_times()
        return time.perf_counter(), times.user + times.system, self._num_acked

    def _measure(self, seconds: float) -> None:
        if self._start[2]:
            self._seconds.append(seconds)


async def _lease(stub: "task_pb2_grpc.TaskServiceAsyncStub", number: int) -> list[task_pb2.Lease]:
    leases: list[task_pb2.Lease] = []
    while len(leases) < number:
        request = task_pb2.LeaseTasksRequest(
            actor_id="bench", max_leases=min(1024, number - len(leases))
        )
        leases += (await stub.LeaseTasks(request, timeout=30)).leases
    return leases


def _field_head(number: int, num_bytes: int) -> bytes:
    """What stands before a field that is a message, on protobuf's wire."""
    head = bytearray()
    for value in (number << 3 | 2, num_bytes):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head)


def make_payload(num_bytes: int) -> bytes:
    """A valid trajectory of the suite's task 0 of about this compressed size: log-probabilities do
    not compress, token ids do by half."""
    rng = np.random.default_rng(0)
    num_tokens = num_bytes // 6
    num_sampled = num_tokens - 1
    segment = Segment(
        token_ids=rng.integers(VOCAB_SIZE, size=num_tokens, dtype="i4"),
        loss_mask=np.arange(num_tokens) > 0,
        logprobs=-rng.exponential(0.5, num_sampled).astype("f4"),
        version_spans=(VersionSpan(version=1, start=0, end=num_sampled),),
    )
    return encode_trajectory(
        Trajectory(
            suite="slow-tool",
            split="train",
            task_ordinal=0,
            task_id="task",
            level=1,
            outcome=trajectory_pb2.OUTCOME_COMPLETED,
            detail="",
            segments=(segment,),
            turns=(),
            reward=1.0,
            temperature=1.0,
            duration_seconds=1.0,
        )
    )


def _config(folder: Path) -> Config:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    listen = free_address()
    return Config.model_validate(
        {
            "run": {"name": "bench", "directory": folder},
            "model": {"path": folder / "model", "dtype": "float32"},
            "network": {"learner": listen},
            "inference": {"max_model_len": 2**20},
            "learner": {
                "listen": listen,
                "metrics_listen": free_address(),
                # One task, so that all records are of the same payload; one batch that never fills.
                "tasks": {
                    "suite": "slow-tool",
                    "num_tasks": 1,
                    "groups_per_batch": 1_000_000,
                    "max_tokens": 2**20,
                    "lease_seconds": 3600.0,
                },
            },
        }
    )


if __name__ == "__main__":
    main()
