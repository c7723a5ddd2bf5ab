"""Launching: what people see while a run goes on, role scripts, and the result of a run."""

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from intake_rig import make_config, running
from launch.progress import Progress
from launch.result import Evaluations, collect_result
from launch.roles import LocalRoles
from launch.tail import Tail
from processes import ANY_PORT, finish, read_until, started, understudy
from understudy.config import Config, NetworkConfig, load_config, write_config
from understudy.errors import UnderstudyError
from understudy.supervisor import ProcessEndedError, Supervisor

# --- Tail ---


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_whole_lines_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert tail.new_lines() == []  # nobody has written yet
    append(path, '{"step": 0}\n{"step": 1}\n{"st')
    assert [line["step"] for line in tail.new_lines()] == [0, 1]
    assert tail.new_lines() == []
    append(path, 'ep": 2}\n')
    assert [line["step"] for line in tail.new_lines()] == [2]


def test_what_is_no_json_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, "warning: something\n\n{'a': 'dict, printed'}\n[1]\n" + '{"step": 0}\n')
    assert Tail(path).new_lines() == [{"step": 0}]


def test_a_file_that_was_begun_again_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    append(path, '{"step": 0}\n{"step": 1}\n')
    assert len(tail.new_lines()) == 2
    path.write_text('{"step": 7}\n')
    assert tail.new_lines() == [{"step": 7}]


# --- Progress ---


def step_line(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "time": 100.0 + step,
        "episodes": 8,
        "tokens_mean": 50.0,
        "reward_mean": 0.25 * step,
        "version": step + 1,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        **fields,
    }


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    append(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_lines_are_printed_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with Progress({"start": 10.0, "reinforce": 100.0, "report": 5.0}) as progress:
        with progress.stage("start"):
            progress.poll()
        with progress.stage("reinforce", path, num_steps=4):
            write_lines(path, step_line(0), step_line(1))
            progress.poll(force=True)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[") and " left ~" in line for line in lines)
    assert "start" in lines[0]
    assert "left ~115 s" in lines[0]
    newest = lines[-1]
    assert "reinforce" in newest
    for figure in ("step 2/4", "reward 0.125", "trajectories/s 8", "version 2", "staleness 0.50"):
        assert figure in newest
    assert "left ~5 s" in newest  # two of four steps took no time: only the report is left
    assert list(progress.seconds) == ["start", "reinforce"]


def test_polling_often_prints_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({"start": 10.0}) as progress, progress.stage("start"):
        for _ in range(1000):
            progress.poll()
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_warm_up_and_unknown_lines_are_shown_or_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "warmup.jsonl"
    with Progress({"warmup": 20.0}) as progress, progress.stage("warmup", path):
        line = {"stage": "supervised", "step": 5, "steps": 20, "loss": 1.5, "tokens_per_s": 12345}
        write_lines(path, {"kind": "replica"}, line, {"something": "else"})
        progress.poll(force=True)
    assert "step 5/20  loss 1.500  tokens/s 12,345" in capsys.readouterr().err


# --- Results ---

EVALUATION = {
    "accuracy": {
        "all": {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 100},
        "level1": {"accuracy": 0.75, "ci95": [0.6, 0.9], "n": 50},
    },
    "tokens_mean": 101.234,
    "sampled_tokens_mean": 30.0,
    "turns_mean": 2.5,
    "versions": [3],
}


@pytest.fixture
def config() -> Config:
    """The demo's configuration."""
    return load_config(ROOT / "configs" / "demo.toml", ["run.seed=7"])


def test_a_run_is_put_into_numbers(tmp_path: Path, config: Config) -> None:
    write_lines(
        tmp_path / "metrics.jsonl",
        {"kind": "version", "version": 1},
        {"kind": "replica", "version": 1, "mismatch_mean": 0.001, "mismatch_max": 0.02},
        step_line(0, staleness_mean=0.0, staleness_max=0),
        {"kind": "version", "version": 2},
        {"kind": "replica", "version": 2, "mismatch_mean": 0.003, "mismatch_max": 0.01},
        {"kind": "replica", "version": 2, "mismatch_mean": None, "mismatch_max": None},
        step_line(1, staleness_mean=0.5, staleness_max=1),
    )
    evaluations = Evaluations()
    for name in ("base", "trained"):
        (tmp_path / f"{name}.json").write_text(json.dumps(EVALUATION))
        evaluations.read(name, tmp_path / f"{name}.json", version=3)
    progress = Progress({})
    progress.seconds["reinforce"] = 12.5
    result = collect_result(tmp_path, evaluations, progress, config, interrupted=False)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["seed"], result["control"], result["interrupted"]) == (7, False, False)
    assert result["base"]["level1"] == {"accuracy": 0.75, "ci95": [0.6, 0.9], "n": 50}
    assert (result["episodes"], result["steps"], result["versions_published"]) == (16, 2, 2)
    assert result["staleness"] == {"mean": 0.25, "max": 1}
    assert result["logprob_mismatch"] == {"mean": pytest.approx(0.002), "max": 0.02}
    assert result["token_budget"]["trained"]["tokens_mean"] == 101.23
    assert result["wall_seconds"]["reinforce"] == 12.5
    assert result["machine"]["cores"] >= 1


def test_an_evaluation_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trained.json"
    path.write_text(json.dumps(EVALUATION))
    with pytest.raises(UnderstudyError, match=r"versions \[3\] played, not 4"):
        Evaluations().read("trained", path, version=4)


def test_a_run_that_was_interrupted_early_has_a_result_too(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "not made yet"
    result = collect_result(folder, Evaluations(), Progress({}), config, interrupted=True)
    assert result["interrupted"]
    assert (result["steps"], result["episodes"]) == (0, 0)
    assert result["staleness"] is result["logprob_mismatch"] is None
    assert (folder / "result.json").exists()


# --- Commands and scripts ---


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ("--seed", "--minutes", "--control", "--config", "--set", "--name")),
        ("run", ("--config", "--set", "--insecure")),
    ],
)
def test_help_lists_the_options(command: str, options: tuple[str, ...]) -> None:
    with started(*understudy(command, "--help")) as process:
        output = finish(process)
        assert process.returncode == 0
    assert output.startswith(f"usage: understudy {command}")
    assert [option for option in options if option not in output] == []


SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_without_a_config_says_how_it_is_used(script: Path) -> None:
    with started(str(script), cwd=Path("/")) as process:
        output = finish(process)
        assert process.returncode == 1
    assert f"usage: {script} RUN.toml [--set section.key=value]..." in output
    assert len(output.splitlines()) == 1


def test_there_is_a_script_for_every_role() -> None:
    names = {script.stem for script in SCRIPTS}
    assert names == {"actor", "envserver", "inference", "learner", "local"}


def test_a_script_starts_its_role_and_passes_signals_on(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[model]\npath = 'model'\n")
    script = str(ROOT / "launch" / "envserver.sh")
    with started(script, str(config), *ANY_PORT, cwd=tmp_path) as process:
        read_until(process, "envserver is serving")
        process.send_signal(signal.SIGTERM)
        assert "envserver stopped" in finish(process)
        assert process.returncode == 0


def test_a_local_run_whose_role_cannot_start_says_why(tmp_path: Path, config: Config) -> None:
    broken = config.model_copy(
        update={"envserver": config.envserver.model_copy(update={"suites": ("nope",)})}
    )
    config_file = write_config(broken, tmp_path)
    with Supervisor(tmp_path / "logs") as supervisor:
        roles = LocalRoles(supervisor, config_file, broken)
        roles.start("envserver")
        with pytest.raises(ProcessEndedError) as caught:
            supervisor.wait("envserver")
    assert "envserver ended with code 1" in str(caught.value)
    assert "envserver.suites: 'nope' is not registered" in str(caught.value)


# --- The end of a run that is evaluated ---


async def test_the_launcher_waits_until_nothing_is_left_to_evaluate(tmp_path: Path) -> None:
    evaluation = {"every_steps": 1, "num_tasks": 2}
    config = make_config(tmp_path, steps=1, max_staleness=0, evaluation=evaluation)
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        await rig.publish(1)
        await rig.complete(0)
        address = f"127.0.0.1:{rig.server._server.port}"
        with Supervisor(tmp_path / "logs") as supervisor:
            supervisor.start("intake", [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
            wait = supervisor.wait_figure, "intake", address, NetworkConfig(), "evaluating"
            waiting = asyncio.create_task(asyncio.to_thread(*wait))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            await rig.play(await rig.lease(), versions=(2,))
            await asyncio.wait_for(waiting, 5)


def test_the_launcher_does_not_wait_for_an_intake_that_has_ended(tmp_path: Path) -> None:
    for code in (0, 1):
        with Supervisor(tmp_path / "logs") as supervisor:
            supervisor.start("intake", [sys.executable, "-S", "-c", f"raise SystemExit({code})"])
            ending = pytest.raises(ProcessEndedError) if code else contextlib.nullcontext()
            with ending:
                supervisor.wait_figure("intake", "127.0.0.1:9", NetworkConfig(), "evaluating")


def test_held_out_accuracy_is_in_the_result(tmp_path: Path) -> None:
    lines = [
        {"kind": "evaluation", "step": step, "heldout_accuracy": accuracy}
        for step, accuracy in ((5, 0.25), (0, 0.125), (5, 0.5))
    ]
    append(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    config = load_config(ROOT / "configs" / "demo.toml")
    result = collect_result(tmp_path, Evaluations(), Progress({}), config, interrupted=False)
    assert result["heldout_accuracy"] == {"step 0": 0.125, "step 5": 0.5}
