"""Rows of a user's copy of GAIA: `metadata.parquet` or `metadata.jsonl`, attachments beside it.

    COPY/2023/validation/metadata.parquet   rows: task_id, Question, Level, Final answer, file_name
    COPY/2023/validation/<file_name>        attachments
    COPY/2023/test/...                      the same, with `?` for every answer

The folders `validation` and `test` may also lie in COPY itself. Where both formats lie side by
side, the parquet file is read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("validation", "test")
LEVELS = (1, 2, 3)
UNKNOWN = "?"
"""The answer of a task of the test split."""
_FILES = ("metadata.parquet", "metadata.jsonl")
_COLUMNS = ("task_id", "Question", "Level", "Final answer", "file_name")


@dataclass(frozen=True, kw_only=True)
class GaiaTask:
    """One row."""

    task_id: str
    question: str
    level: int
    answer: str
    """UNKNOWN in the test split."""
    attachment: Path | None

    @property
    def is_scored(self) -> bool:
        """Whether its answer is known."""
        return self.answer != UNKNOWN


def read_copy(path: Path) -> dict[str, list[GaiaTask]]:
    """Tasks by split, in the order of the file.

    Raises:
        FileNotFoundError: there is no metadata where it should be, or an attachment is missing.
        ValueError: a row is not as GAIA's are; names file, row and column.
    """
    files = {split: file for split in SPLITS if (file := _find(path, split))}
    if not files:
        raise FileNotFoundError(
            f"no {' or '.join(_FILES)} in {path}/2023/validation or {path}/validation (nor in "
            "test); path is the folder of your copy of gaia-benchmark/GAIA"
        )
    return {split: _tasks(file) for split, file in files.items()}


def _find(path: Path, split: str) -> Path | None:
    places = [folder / name for folder in (path / "2023" / split, path / split) for name in _FILES]
    return next((place for place in places if place.exists()), None)


def _tasks(file: Path) -> list[GaiaTask]:
    rows = _read_parquet(file) if file.suffix == ".parquet" else _read_lines(file)
    tasks = [_task(file, number, row) for number, row in enumerate(rows, 1)]
    if not tasks:
        raise ValueError(f"{file}: no rows")
    _check(file, tasks)
    return tasks


def _read_parquet(file: Path) -> Iterable[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"{file}: {error}; install the extra: pip install 'understudy[gaia]'"
        ) from None
    try:
        table = parquet.read_table(file)
    except ArrowException as error:
        raise ValueError(f"{file}: no parquet file: {error}{_pointer_hint(file)}") from None
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{file}: no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(table.column_names)}"
        )
    rows: list[Mapping[str, Any]] = table.select(list(_COLUMNS)).to_pylist()
    return rows


def _read_lines(file: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                hint = _pointer_hint(file)
                raise ValueError(f"{file}: line {number} is not JSON{hint}") from None


def _pointer_hint(file: Path) -> str:
    with file.open("rb") as opened:
        is_pointer = opened.read(30).startswith(b"version https://git-lfs")
    return "; it is a pointer of Git LFS: run `git lfs pull`" if is_pointer else ""


def _task(file: Path, number: int, row: object) -> GaiaTask:
    place = f"{file}: row {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no object")
    for name in _COLUMNS:
        if name not in row:
            raise ValueError(f"{place} has no {name!r}; it has {', '.join(map(str, row))}")
    for name in ("task_id", "Question", "Final answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{place}: {name} = {row[name]!r} is no text")
    if str(row["Level"]) not in map(str, LEVELS):
        raise ValueError(f"{place}: Level = {row['Level']!r} is none of {LEVELS}")
    return GaiaTask(
        task_id=row["task_id"],
        question=row["Question"],
        level=int(row["Level"]),
        answer=row["Final answer"],
        attachment=_attachment(place, file.parent, row["file_name"]),
    )


def _attachment(place: str, folder: Path, name: object) -> Path | None:
    if not name:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{place}: file_name = {name!r} is no plain file name")
    return folder / name


def _check(file: Path, tasks: list[GaiaTask]) -> None:
    ids = [task.task_id for task in tasks]
    if twice := sorted({task_id for task_id in ids if ids.count(task_id) > 1}):
        raise ValueError(f"{file}: task_id {twice[0]!r} occurs more than once")
    attached = [task.attachment for task in tasks if task.attachment]
    missing = [path.name for path in attached if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(attached)} attachments are not in {file.parent}, the first is "
            f"{missing[0]!r}; download the whole data set"
        )
