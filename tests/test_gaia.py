"""The gaia suite over made-up copies: both formats, attachments, and everything that is amiss."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from pyarrow import parquet

from browser_helpers import be_patient, needs_chromium
from envserver.environment import Action, ToolCall
from envserver.registry import load_suites
from envserver.sandbox import Pool
from envserver.suites.gaia import GaiaOptions, GaiaSuite
from envserver.suites.gaia_scoring import is_correct
from envserver.tools import Hit
from sandbox_helpers import needs_bwrap, open_pool
from understudy.errors import ConfigError

ADAPTER = "envserver.suites.gaia:GaiaSuite"
Row = dict[str, Any]


def row(number: int, **fields: Any) -> Row:
    """A made-up row; more columns than are read, as in the real one."""
    return {
        "task_id": f"00000000-0000-4000-8000-{number:012}",
        "Question": f"What is {number} + {number}?",
        "Level": str(1 + number % 3),
        "Final answer": str(2 * number),
        "file_name": "",
        "Annotator Metadata": {"Number of steps": "1"},
        **fields,
    }


ROWS = [row(1), row(2, file_name="prices.csv"), row(3, Level=3)]


def write_copy(folder: Path, rows: list[Row], format: str, split: str = "2023/validation") -> Path:
    """A copy in one of the two formats, with the attachment that ROWS names."""
    place = folder / split
    place.mkdir(parents=True)
    (place / "prices.csv").write_text("item,price\npen,3\n")
    if format == "jsonl":
        lines = [json.dumps(one) for one in rows]
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    else:
        as_text = [{**one, "Level": str(one["Level"])} for one in rows]
        parquet.write_table(pa.Table.from_pylist(as_text), place / "metadata.parquet")
    return folder


def suite_of(folder: Path, pool: Pool | None = None, **options: Any) -> GaiaSuite:
    """The suite, with a pool where a test calls tools that need one."""
    suite = GaiaSuite("gaia", GaiaOptions(path=folder, **options))
    suite.sandbox = cast("Pool", pool)
    return suite


class Almanac:
    """A SearchProvider of one page."""

    async def search(self, query: str, limit: int) -> list[Hit]:
        return [Hit(address="/moon", title="The moon", snippet=query)][:limit]

    async def page(self, address: str) -> str:
        return {"/moon": "It is round."}[address]


both_formats = pytest.mark.parametrize("format", ["jsonl", "parquet"])


@both_formats
@pytest.mark.parametrize("split", ["2023/validation", "validation"])
async def test_rows_become_tasks(tmp_path: Path, format: str, split: str) -> None:
    suite = suite_of(write_copy(tmp_path, ROWS, format, split))
    description = suite.describe()
    assert (description.splits, description.levels) == ({"validation": 3}, (1, 2, 3))
    opening = await suite.open("validation", 1).reset()
    assert (opening.task_id, opening.level) == (ROWS[1]["task_id"], 3)
    assert "FINAL ANSWER: [YOUR FINAL ANSWER]" in opening.messages[0].content
    assert opening.messages[1].content == "What is 2 + 2?\n\nAttached file: prices.csv"
    assert (opening.tags, opening.unscored) == (["file .csv"], False)
    assert (await suite.open("validation", 0).reset()).tags == ["no file"]
    for split, ordinal in (("validation", 3), ("validation", -1), ("test", 0)):
        with pytest.raises(KeyError):
            suite.open(split, ordinal)


def test_the_format_and_the_place_change_no_task_and_no_digest(tmp_path: Path) -> None:
    digests = {
        suite_of(write_copy(tmp_path / format, ROWS, format)).describe().digest
        for format in ("jsonl", "parquet")
    }
    changed = suite_of(write_copy(tmp_path / "c", [*ROWS, row(4)], "jsonl")).describe().digest
    assert len(digests) == 1
    assert changed not in digests


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("I add.\nFINAL ANSWER: 4", 1.0),
        ("FINAL ANSWER: $4.0", 1.0),
        ("4", 1.0),
        ("FINAL ANSWER: 5", 0.0),
        ("It is 4", 0.0),
        ("", 0.0),
    ],
)
async def test_an_answer_is_scored_by_gaia_s_rules(
    tmp_path: Path, text: str, reward: float
) -> None:
    environment = suite_of(write_copy(tmp_path, ROWS, "jsonl")).open("validation", 1)
    await environment.reset()
    step = await environment.step(Action(text=text))
    assert (step.reward, step.terminated) == (reward, True)


@both_formats
async def test_the_test_split_is_played_and_not_scored(tmp_path: Path, format: str) -> None:
    rows = [row(n, **{"Final answer": "?"}) for n in range(2)]
    write_copy(tmp_path, rows, format, "2023/test")
    suite = suite_of(write_copy(tmp_path, ROWS, format))
    assert suite.describe().splits == {"validation": 3, "test": 2}
    environment = suite.open("test", 0)
    assert (await environment.reset()).unscored
    step = await environment.step(Action(text="FINAL ANSWER: ?"))
    assert (step.reward, step.terminated) == (0.0, True)
    assert is_correct("?", "?") is True  # what must not come into it


@needs_bwrap
async def test_the_attachment_lies_in_the_box_of_every_tool(tmp_path: Path) -> None:
    calls = {
        "read_file": ({"file": "prices.csv"}, "item\tprice\npen\t3"),
        "python": ({"code": "open('prices.csv').read()[:4]"}, "'item'"),
        "calculate": ({"expression": "3 * 4"}, "12"),
        "browse": ({}, "Unknown tool; use read_file, python, calculate."),
    }
    async with open_pool() as pool:
        environment = suite_of(write_copy(tmp_path, ROWS, "jsonl"), pool).open("validation", 1)
        opening = await environment.reset()
        assert [tool.name for tool in opening.tools] == list(calls)[:3]
        made = [ToolCall(name=name, arguments=arguments) for name, (arguments, _) in calls.items()]
        step = await environment.step(Action(tool_calls=made))
        await environment.close()
    for message, (_, said) in zip(step.messages, calls.values(), strict=True):
        assert said in message.content
    assert [outcome.ok for outcome in step.tool_outcomes] == [True, True, True, False]
    assert not step.terminated


async def test_pages_of_a_provider_can_be_searched_and_read(tmp_path: Path) -> None:
    folder = write_copy(tmp_path, ROWS, "jsonl")
    environment = suite_of(folder, search=f"{__name__}:Almanac").open("validation", 0)
    assert [tool.name for tool in (await environment.reset()).tools][-2:] == ["search", "open_page"]
    calls = [
        ToolCall(name="search", arguments={"query": "moon"}),
        ToolCall(name="open_page", arguments={"address": "/moon"}),
    ]
    found, page = (await environment.step(Action(tool_calls=calls))).messages
    assert found.content == "/moon | The moon\n  moon"
    assert page.content == "It is round."


@needs_chromium
async def test_the_browser_shows_the_pages_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch)
    folder = write_copy(tmp_path / "copy", ROWS, "jsonl")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text("<title>Prices</title>A pen is 3.")
    environment = suite_of(folder, pages=tmp_path / "pages").open("validation", 0)
    try:
        tools = [tool.name for tool in (await environment.reset()).tools]
        assert tools[-5:] == [
            f"browser_{name}" for name in ("open", "read", "click", "type", "back")
        ]
        call = ToolCall(name="browser_open", arguments={"page": "index.html"})
        (page,) = (await environment.step(Action(tool_calls=[call]))).messages
        assert page.content == "Prices | index.html\nA pen is 3."
    finally:
        await environment.close()


def test_pages_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = write_copy(tmp_path, ROWS, "jsonl")
    table = {"adapter": ADAPTER, "path": str(folder), "pages": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match="none' is no folder"):
        load_suites({"gaia": table})


def test_a_provider_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = str(write_copy(tmp_path, ROWS, "jsonl"))
    for search, said in (("nowhere:Provider", "nowhere"), ("math:pi", "'math:pi' is no class")):
        with pytest.raises(ConfigError, match=said):
            load_suites({"gaia": {"adapter": ADAPTER, "path": folder, "search": search}})


def without(column: str) -> list[Row]:
    return [{key: value for key, value in ROWS[0].items() if key != column}]


@both_formats
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (without("Final answer"), "no 'Final answer'|no column 'Final answer'; it has task_id, Qu"),
        (without("file_name"), "no 'file_name'|no column 'file_name'"),
        ([row(1, Level="4")], "row 1: Level = '4' is none of (1, 2, 3)"),
        ([row(1), row(2, Question=" ")], "row 2: Question = ' ' is no text"),
        ([row(1, **{"Final answer": None})], "row 1: Final answer = None is no text"),
        ([row(1), row(1)], "task_id '00000000-0000-4000-8000-000000000001' occurs more than once"),
        ([row(1, file_name="../secret")], "file_name = '../secret' is no plain file name"),
        ([row(1, file_name="a.pdf"), ROWS[1]], "1 of 2 attachments are not in"),
    ],
)
def test_what_is_not_as_gaia_s_is_named(
    tmp_path: Path, format: str, rows: list[Row], said: str
) -> None:
    write_copy(tmp_path, rows, format)
    tables = {"gaia": {"adapter": ADAPTER, "path": str(tmp_path)}}
    with pytest.raises(ConfigError, match="envserver.suites.gaia: ") as caught:
        load_suites(tables)
    assert any(part in str(caught.value) for part in said.split("|"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", "{", "line 1 is not JSON"),
        ("metadata.jsonl", "[]", "row 1 is no object"),
        ("metadata.jsonl", "\n", "no rows"),
        ("metadata.parquet", "PAR?", "no parquet file"),
        ("metadata.jsonl", "version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        ("metadata.parquet", "version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    ],
)
def test_files_of_something_else_are_named(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    place = tmp_path / "2023" / "validation"
    place.mkdir(parents=True)
    (place / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        suite_of(tmp_path)
    assert name in str(caught.value)


def test_a_copy_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no metadata.parquet or metadata.jsonl in {tmp_path}"):
        load_suites({"gaia": {"adapter": ADAPTER, "path": str(tmp_path)}})
    with pytest.raises(ConfigError, match="envserver.suites.gaia: path: missing"):
        load_suites({"gaia": {"adapter": ADAPTER}})
