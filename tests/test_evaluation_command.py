"""The command `understudy eval`: killed and started again, refused, read by the demo."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actor.cli import run_eval
from endpoint_server import Answer, Request, endpoint
from evaluation_helpers import (
    TaggedSuite,
    lines_of,
    says_the_number,
    serve_suites,
)
from launch.result import Evaluations
from processes import finish, started, understudy


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a run's TOML whose environment server is elsewhere."""

    def write(environment: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(
            f"[model]\npath = '{tmp_path}/none'\n[run]\nname = 'e'\ndirectory = '{tmp_path}'\n"
            f"[network]\nenvservers = ['{environment}']\nconnect_timeout_seconds = 30\n"
            "[actor]\nconcurrency = 2\n"
        )
        return path

    return write


async def test_a_killed_evaluation_goes_on_by_the_same_command(
    tmp_path: Path, write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(request: Request) -> Answer:
        time.sleep(0.02)
        return says_the_number(request)

    attempts = tmp_path / "eval.attempts.jsonl"
    monkeypatch.setenv("THE_KEY", "s3cret")
    with endpoint(slowly) as server:
        async with serve_suites(TaggedSuite()) as environment:
            command = understudy(
                *("eval", "--config", str(write_config(environment)), "--suite", "echo"),
                *("--split", "train", "--num-tasks", "50", "--k", "2"),
                *("--endpoint", server.url, "--model", "scripted", "--key-variable", "THE_KEY"),
                *("--out", str(tmp_path / "eval.json")),
            )
            with started(*command) as process:
                while not attempts.exists() or attempts.read_bytes().count(b"\n") < 12:
                    assert process.poll() is None
                    await asyncio.sleep(0.02)
                process.kill()
            kept = attempts.read_bytes().count(b"\n") - 1
            with started(*command) as process:
                output = await asyncio.to_thread(finish, process)
                assert process.returncode == 0, output
    result = json.loads((tmp_path / "eval.json").read_text())
    assert (result["num_resumed"], result["num_attempts"]) == (kept, 100)
    assert result["accuracy"]["all"]["accuracy"] == 1.0
    assert len(lines_of(attempts)) == 1 + 100
    assert set(server.keys) == {"Bearer s3cret"}
    names = ("eval.json", "eval.html", "eval.attempts.jsonl")
    assert "s3cret" not in "".join([output, *((tmp_path / name).read_text() for name in names)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--k", "0"), "--k 0: at least 1"),
        (("--num-tasks", "-1"), "--num-tasks -1: at least 1"),
        (("--endpoint", "http://127.0.0.1:9/v1"), "--endpoint and --model belong together"),
        (("--out", "eval"), "--out eval: give a name that ends in .json"),
        (("--out", "missing/eval.json"), "the folder missing does not exist"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(
    write_config: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_eval(["--config", str(write_config("127.0.0.1:9")), *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_demo_takes_levels_and_no_tags_from_an_evaluation(tmp_path: Path) -> None:
    figures = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 10, "tasks": 10, "pass_at_k": []}
    nothing = {"accuracy": None, "ci95": None, "n": 0}
    accuracy = {"all": figures, "level1": figures, "level2": nothing, "tag:lookup": figures}
    (tmp_path / "eval.json").write_text(json.dumps({"versions": [1], "accuracy": accuracy}))
    evaluations = Evaluations()
    evaluations.read("base", tmp_path / "eval.json", 1)
    kept = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 10}
    assert evaluations.accuracies() == {"base": {"all": kept, "level1": kept}}
