"""A stand-in for `learner.intake`: the same, with a bug, with its syncs noted, on a slow disk.

    python -m tests.torture.buggy_intake --bug NAME --note-syncs FILE --sync-seconds 0.02 \\
        --config run.toml ...

The product knows nothing of this: classes and functions are replaced before its `main` runs.
"""

import argparse
import asyncio
import contextvars
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUGS: dict[str, Callable[[], None]] = {}


def bug(seed: Callable[[], None]) -> Callable[[], None]:
    """Register a bug by its function's name."""
    BUGS[seed.__name__] = seed
    return seed


def put(owner: object, name: str, value: object) -> None:
    """Replace a function, a method or a constant; fails if there is none of the name."""
    getattr(owner, name)
    setattr(owner, name, value)


def flush_if(wanted: Callable[[bool], bool]) -> None:
    """Have the log's flush do nothing unless wanted, given whether it is for an ack."""
    from learner.intake.uplink import Stream
    from learner.log.writer import DurableLog

    for_ack = contextvars.ContextVar("for_ack", default=False)
    flush, ack = DurableLog.flush, Stream._ack

    async def maybe_flush(self: DurableLog) -> None:
        if wanted(for_ack.get()):
            await flush(self)

    async def marked_ack(self: Stream) -> Any:
        token = for_ack.set(True)
        try:
            return await ack(self)
        finally:
            for_ack.reset(token)

    put(DurableLog, "flush", maybe_flush)
    put(Stream, "_ack", marked_ack)


@bug
def ack_before_flush() -> None:
    """Acks go out before the records that they ack are durable."""
    flush_if(lambda for_ack: not for_ack)


@bug
def answer_before_flush() -> None:
    """Everything but acks goes out before it is durable: leases, batches, steps, epochs."""
    flush_if(lambda for_ack: for_ack)


@bug
def no_fdatasync() -> None:
    """Frames are written and never synced."""
    put(os, "fdatasync", lambda descriptor: None)


@bug
def no_directory_sync() -> None:
    """A new segment's name is not made durable."""
    import learner.log.tail_file as module

    put(module, "sync", lambda folder: None)


@bug
def no_dedupe() -> None:
    """A task key that has its trajectory gets another one."""
    from learner.intake.ledger import Ledger
    from learner.intake.tasks import State, TaskKey

    def has_result(self: Ledger, key: TaskKey) -> bool:
        group = self.state.open.get(key.ordinal)
        return group is None or group.samples[key.sample_index].state is State.DROPPED

    put(Ledger, "has_result", has_result)


@bug
def no_epoch_of_records() -> None:
    """Records are taken whichever intake welcomed their sender."""
    from learner.intake.uplink import Stream

    check = Stream._check_envelope

    def lenient(self: Stream, record: Any, size: int) -> None:
        record.epoch, record.incarnation = self.servicer.epoch, self.incarnation.number
        check(self, record, size)

    put(Stream, "_check_envelope", lenient)


@bug
def no_epoch_of_trainers() -> None:
    """A trainer goes on after another one has started."""
    from learner.intake.ledger import Ledger

    put(Ledger, "require_trainer", lambda self, epoch: None)


@bug
def ids_begin_anew() -> None:
    """Lease ids and incarnations begin anew at each start."""
    import learner.intake.ledger as ledger
    import learner.intake.uplink as uplink

    put(ledger, "IDS_PER_EPOCH", 0)
    put(uplink, "IDS_PER_EPOCH", 0)


@bug
def trim_at_trained() -> None:
    """Payloads go once they are trained, not once a checkpoint has them behind itself."""
    from learner.intake.intake import Intake
    from learner.intake.state import RunState

    oldest_segment = RunState.oldest_segment

    def too_new(self: RunState) -> int | None:
        batches = self.batches
        self.batches = {s: batch for s, batch in batches.items() if s >= self.num_completed}
        try:
            return oldest_segment(self)
        finally:
            self.batches = batches

    put(RunState, "oldest_segment", too_new)
    complete = Intake.complete_step

    async def complete_and_trim(self: Intake, *arguments: Any) -> None:
        await complete(self, *arguments)
        if self._trimming is None:
            self._trimming = asyncio.create_task(self._trim())

    put(Intake, "complete_step", complete_and_trim)


def slow_down(seconds: float) -> None:
    """Be on a slower disk: what a fast one has durable at once, is not for a while."""
    fdatasync = os.fdatasync

    def call(descriptor: int) -> None:
        time.sleep(seconds)
        fdatasync(descriptor)

    put(os, "fdatasync", call)


def note_syncs(path: Path) -> None:
    """Note what each sync made durable: contents by inode and size, names by folder."""
    notes = path.open("a", buffering=1, encoding="ascii")
    fsync, fdatasync = os.fsync, os.fdatasync

    def noting(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            note = _describe(descriptor)  # before: what comes during the call may miss it
            sync(descriptor)
            notes.write(json.dumps(note) + "\n")

        return call

    put(os, "fsync", noting(fsync))
    put(os, "fdatasync", noting(fdatasync))


def _describe(descriptor: int) -> dict[str, Any]:
    status = os.fstat(descriptor)
    if not stat.S_ISDIR(status.st_mode):
        return {"file": status.st_ino, "size": status.st_size}
    folder = os.readlink(f"/proc/self/fd/{descriptor}")
    with os.scandir(folder) as found:
        return {"folder": folder, "names": {entry.name: entry.inode() for entry in found}}


def main() -> int:
    """Seed what is asked for, then be the intake."""
    parser = argparse.ArgumentParser(description="The intake with a seeded bug.")
    parser.add_argument("--bug", choices=BUGS)
    parser.add_argument("--note-syncs", type=Path)
    parser.add_argument("--sync-seconds", type=float, default=0.0)
    arguments, rest = parser.parse_known_args()
    if arguments.sync_seconds:
        slow_down(arguments.sync_seconds)
    if arguments.note_syncs:
        note_syncs(arguments.note_syncs)
    if arguments.bug:
        BUGS[arguments.bug]()
    from learner.intake.__main__ import main as serve

    return serve(rest)


if __name__ == "__main__":
    sys.exit(main())
