"""The log against a model, in any order of appends, flushes, crashes, rewrites and lost indices.

A crash keeps what was flushed and any part of what was not: whole frames, then a torn one.
"""

import asyncio
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from learner.log.index import NAME
from learner.log.retention import trim_segment
from learner.log.segments import Location, segment_path
from learner.log.writer import DurableLog
from log_helpers import SMALL, Entries, numbers, open_log, read, stored

LIMITS = replace(SMALL, segment_bytes=400)


class LogMachine(RuleBasedStateMachine):
    """Appends numbered entries; the model is the list of their payloads."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp(prefix="understudy-log-"))
        self.num_crashes = 0
        self.payloads: list[bytes] = []
        self.locations: list[Location] = []
        self.trimmed: set[int] = set()
        self.num_flushed = 0
        self.log = self.open()

    @property
    def folder(self) -> Path:
        return self.root / str(self.num_crashes)

    def open(self) -> DurableLog:
        self.entries: Entries = []
        log = self.loop.run_until_complete(open_log(self.folder, LIMITS, self.entries))
        # Nothing may be on its way to the disk between two rules: a run would not be repeatable.
        self.loop.run_until_complete(log.flush())
        return log

    def teardown(self) -> None:
        self.loop.run_until_complete(self.log.close())
        self.loop.close()
        shutil.rmtree(self.root)

    @rule(payload=st.binary(max_size=150), count=st.integers(1, 5))
    def append(self, payload: bytes, count: int) -> None:
        for _ in range(count):
            self.locations.append(self.log.append(stored(len(self.payloads)), payload))
            self.payloads.append(payload)

    @rule()
    def flush(self) -> None:
        self.loop.run_until_complete(self.log.flush())
        self.num_flushed = len(self.payloads)

    @rule()
    def reopen(self) -> None:
        self.loop.run_until_complete(self.log.close())
        self.num_flushed = len(self.payloads)
        self.log = self.open()
        self.check_recovered()

    @rule()
    def lose_index(self) -> None:
        (self.folder / NAME).unlink(missing_ok=True)

    @rule(share=st.floats(0, 1))
    def crash(self, share: float) -> None:
        # The loop does not run between calls: what was not flushed is in no file yet.
        unsynced = dict(self.log._committer._buffer)
        crashed = self.root / str(self.num_crashes + 1)
        shutil.copytree(self.folder, crashed)
        left = round(share * sum(location.num_bytes for location in unsynced))
        for location, parts in unsynced.items():
            if left <= 0:
                break
            frame = b"".join(parts)[:left]
            path = segment_path(crashed, location.segment)
            path.touch()
            with path.open("r+b") as file:
                file.seek(location.offset)
                file.write(frame)
            left -= len(frame)
        self.loop.run_until_complete(self.log.close())
        self.num_crashes += 1
        self.log = self.open()
        self.check_recovered()

    @precondition(lambda self: self.log.num_segments > 1)
    @rule(place=st.integers(0, 20))
    def trim(self, place: int) -> None:
        self.flush()
        segment = 1 + place % (self.log.num_segments - 1)
        moved = self.loop.run_until_complete(
            trim_segment(
                self.log, segment, lambda entry: entry.trajectory_stored.origin.sequence % 3 != 0
            )
        )
        for number, location in enumerate(self.locations):
            if location.segment == segment and moved:
                self.locations[number] = moved[location.offset]
                if number % 3 and self.payloads[number]:
                    self.trimmed.add(number)

    def check_recovered(self) -> None:
        """What was flushed is there; what was not, up to some entry."""
        found = numbers(self.entries)
        assert found == list(range(len(found)))
        assert self.num_flushed <= len(found) <= len(self.payloads)
        assert [entry.index for entry, _ in self.entries] == list(range(len(self.entries)))
        findings = self.log.findings
        assert (findings.bad_ranges, findings.num_missing) == ([], 0)
        kept = [location for _, location in self.entries]
        self.locations = [at for at in self.locations[: len(found)] if at in kept]
        assert len(self.locations) == len(found)
        del self.payloads[len(found) :]
        self.num_flushed = len(found)

    @invariant()
    def every_entry_can_be_read(self) -> None:
        for number, location in enumerate(self.locations):
            entry, payload = self.log.read(location)
            assert entry.trajectory_stored.origin.sequence == number
            assert payload == (b"" if number in self.trimmed else self.payloads[number])

    @invariant()
    def the_reader_finds_what_is_flushed(self) -> None:
        entries, findings = read(self.folder)
        assert self.num_flushed <= len(numbers(entries)) <= len(self.payloads)
        assert (findings.bad_ranges, findings.num_missing) == ([], 0)


TestLog = LogMachine.TestCase
TestLog.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
