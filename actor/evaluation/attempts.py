"""Attempts on disk: one JSON line each, so that a stopped evaluation goes on where it was.

    {"settings": {...}}                                         first line: Settings
    {"task": 0, "attempt": 0, "reward": 1.0, "messages": [...]} one line an attempt, in any order

A line is on disk before the attempt counts. The last line of a (task, attempt) is the one that
holds. What a crash left of a line at the end is cut off; it was never counted.
"""

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from actor.evaluation.plan import Settings
from understudy.errors import ConfigError

_log = logging.getLogger(__name__)
FAILED = frozenset({"environment_failed", "inference_failed", "actor_failed"})
"""Outcomes for which the infrastructure is to blame, and not the policy."""
Key = tuple[int, int]
"""(task, attempt)."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at one task."""

    task: int
    """Ordinal of the task in its split."""
    attempt: int
    """Index among the attempts at the task, from 0."""
    task_id: str
    level: int
    tags: tuple[str, ...]
    outcome: str
    """completed, truncated, or one of FAILED."""
    detail: str
    """What failed or cut it short."""
    reward: float | None
    """None if it failed, or if the suite does not know the task's answer."""
    tries: int
    """Times it was played; the last is the one that is told of."""
    turns: int
    tokens: int
    sampled_tokens: int
    versions: tuple[int, ...]
    seconds: float
    """Of the last try."""
    answer: str
    """The final answer, as evaluation.final_answer reads it."""
    messages: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """The conversation; left out where attempts are read back for the figures."""

    @property
    def key(self) -> Key:
        """What tells it apart."""
        return self.task, self.attempt

    @property
    def has_failed(self) -> bool:
        """Whether the infrastructure failed it, so that it says nothing about the policy."""
        return self.outcome in FAILED


class AttemptsFile:
    """Attempts by key in memory, without their messages, and on disk if there is a path."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        """Open or begin a file.

        Raises:
            ConfigError: it has attempts under other settings, another evaluation writes it, or
                it is something else.
        """
        self.attempts: dict[Key, Attempt] = {}
        self.num_resumed = 0
        self._places: dict[Key, int] = {}
        """Where in the file each attempt's last line begins."""
        self._waiting: list[Attempt] = []
        self._lock = asyncio.Lock()
        self._file: IO[bytes] | None = None
        if path is None:
            return
        self._file = path.open("ab+")
        try:
            self._take_up(path, self._file, settings)
        except BaseException:
            self._file.close()
            raise

    def _take_up(self, path: Path, file: IO[bytes], settings: Settings) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path}: another evaluation writes it; choose another --out"
            ) from None
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                _log.warning("%s: %d bytes of an unfinished line are cut off", path, len(line))
                file.truncate(end)
                break
            if number == 1:
                _check_settings(path, line, settings)
            else:
                self._take(_parse_line(path, number, line), end)
            end += len(line)
        if not end:
            self._write([{"settings": asdict(settings)}])
        self.num_resumed = len(self.attempts)

    async def add(self, attempt: Attempt) -> None:
        """Have an attempt on disk, then count it.

        Whoever gets the lock writes all that wait for it, with one fsync.
        """
        self._waiting.append(attempt)
        async with self._lock:
            batch, self._waiting = self._waiting, []
            if batch:
                places = await asyncio.to_thread(self._write, [asdict(a) for a in batch])
                for written, place in zip(batch, places, strict=True):
                    self._take(written, place)

    def _take(self, attempt: Attempt, place: int) -> None:
        self.attempts[attempt.key] = replace(attempt, messages=())
        self._places[attempt.key] = place

    def _write(self, values: Sequence[dict[str, Any]]) -> list[int]:
        """Have lines on disk; returns the offsets at which they begin."""
        if self._file is None:
            return [0] * len(values)
        places = [self._file.seek(0, os.SEEK_END)]
        for value in values:
            places.append(places[-1] + self._file.write(json.dumps(value).encode() + b"\n"))
        self._file.flush()
        os.fsync(self._file.fileno())
        return places[:-1]

    def whole(self, attempts: Iterable[Attempt]) -> Iterator[Attempt]:
        """The same attempts with their messages, read from the file one by one."""
        assert self._file is not None
        for attempt in attempts:
            self._file.seek(self._places[attempt.key])
            yield _parse(self._file.readline())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def _check_settings(path: Path, line: bytes, settings: Settings) -> None:
    try:
        written = json.loads(line)["settings"]
        differences = settings.differences(written)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: no attempts of an evaluation; choose another --out") from None
    if differences:
        raise ConfigError(
            f"{path} was played with {'; '.join(differences)}; give the same settings to go on "
            "with it, or another --out"
        )


def _parse_line(path: Path, number: int, line: bytes) -> Attempt:
    try:
        return _parse(line)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: line {number} is no attempt; take the line out and start again"
        ) from None


def _parse(line: bytes) -> Attempt:
    """An attempt from its line. Raises ValueError or TypeError for what is none."""
    value = json.loads(line)
    tuples = {name: tuple(value[name]) for name in ("tags", "versions", "messages")}
    return Attempt(**{**value, **tuples})
