"""Recovery: how fast a start goes through a log, and how fast the log is written.

A log of 64 KiB payloads in 64 MiB segments. It is opened without an index, every byte checked, then
with the index, which leaves the newest segment to be read.

    {"bench": "recovery", "record_kib": 64, "log_mib": ..., "index": false,
     "seconds": ..., "mb_per_s": ..., "entries_per_s": ...}
    {"bench": "append", "record_kib": 64, "records_per_flush": 16, "mb_per_s": ...,
     "records_per_s": ...}

Files are in the page cache: the figures are of the code, not of the disk, but for appends.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import uvloop

from learner.log.index import NAME
from learner.log.writer import DurableLog, LogLimits
from understudy.process import prepare_process
from understudy.v1.common_pb2 import TaskKey
from understudy.v1.log_pb2 import EpisodeSummary, LogEntry, RecordOrigin, TrajectoryStored

RECORD_BYTES = 2**16
LIMITS = LogLimits(segment_bytes=2**26, buffer_bytes=2**26, quota_bytes=2**50)


def main() -> None:
    """Write a log, open it both ways and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="size of the log")
    parser.add_argument("--group", type=int, default=16, help="records a flush")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir=Path.cwd()) as folder:
        uvloop.run(measure(Path(folder), arguments.mib, arguments.group))


async def measure(folder: Path, mib: int, group: int) -> None:
    """Print a line for the appends, then one for each way to open."""
    num_records = mib * 2**20 // RECORD_BYTES
    seconds = await _write(folder, num_records, group)
    append = {"bench": "append", "record_kib": 64, "records_per_flush": group}
    _print(append | _rates(num_records, seconds, "records_per_s"))
    for index in (False, True):
        if not index:
            (folder / NAME).unlink()
        num_entries, seconds = await _open(folder)
        case = {"bench": "recovery", "record_kib": 64, "log_mib": mib, "index": index}
        rates = _rates(num_records, seconds, "entries_per_s")
        _print(case | {"seconds": round(seconds, 3)} | rates)
        assert num_entries >= num_records


async def _write(folder: Path, num_records: int, group: int) -> float:
    log = await DurableLog.open(folder, "bench", LIMITS, lambda entry, location: None)
    payload = os.urandom(RECORD_BYTES)
    start = time.monotonic()
    for number in range(num_records):
        log.append(_entry(number), payload)
        if number % group == 0:
            await log.flush()
    await log.flush()
    seconds = time.monotonic() - start
    await log.close()
    return seconds


async def _open(folder: Path) -> tuple[int, float]:
    start = time.monotonic()
    log = await DurableLog.open(folder, "bench", LIMITS, lambda entry, location: None)
    seconds = time.monotonic() - start
    await log.close()
    return log.findings.num_entries, seconds


def _entry(number: int) -> LogEntry:
    key = TaskKey(ordinal=number // 8, sample_index=number % 8)
    origin = RecordOrigin(actor_id="actor-0", incarnation=1, sequence=number)
    summary = EpisodeSummary(task_id=f"task-{number}", reward=1.0, num_tokens=9600, num_turns=5)
    stored = TrajectoryStored(
        task_key=key, origin=origin, lease_id=number, payload_digest=bytes(32), summary=summary
    )
    return LogEntry(trajectory_stored=stored)


def _rates(num_records: int, seconds: float, name: str) -> dict[str, object]:
    mb_per_s = num_records * RECORD_BYTES / seconds / 1e6
    return {"mb_per_s": round(mb_per_s), name: round(num_records / seconds)}


def _print(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
