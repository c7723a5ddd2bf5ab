"""A log's folder with two segments of any bytes, as a process sees it that audits a run."""

import contextlib
import tempfile
from pathlib import Path

from learner.log.errors import BadEntryError
from learner.log.reader import LogReader
from learner.log.segments import Location, segment_path
from tests.fuzz import frames

MAX_LEN = frames.MAX_LEN
mutate = frames.mutate
_folder = Path(tempfile.mkdtemp())


def seeds() -> list[bytes]:
    """As for frames."""
    return frames.seeds()


def TestOneInput(data: bytes) -> None:
    """Read all entries, each again by its location, and one where there is none."""
    middle = len(data) // 2 if len(data) % 2 else len(data)
    for segment, part in enumerate((data[:middle], data[middle:]), 1):
        segment_path(_folder, segment).write_bytes(part)
    reader = LogReader(_folder)
    try:
        num_entries = 0
        for entry, location in reader:
            again, payload = reader.read(location)
            assert again == entry
            assert len(payload) <= location.num_bytes
            num_entries += 1
        assert reader.findings.num_entries == num_entries
        for bad in reader.findings.bad_ranges:
            with contextlib.suppress(BadEntryError):
                reader.read(bad)
        with contextlib.suppress(BadEntryError):
            reader.read(Location(1, len(data), 20))
    finally:
        reader.close()
