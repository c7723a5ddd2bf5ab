"""`understudy track`: what the programs that people look at are given."""

import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from launch.cli import run_track
from launch.track import scalars, track

LINES = [
    {"kind": "version", "time": 1.0, "version": 1, "seconds": 0.1},
    {"kind": "step", "time": 2.0, "step": 0, "version": 1, "loss": 0.5, "reward_level1": None},
    {"kind": "step", "time": 3.0, "step": 1, "version": 2, "loss": 0.25, "episodes": 8},
    {"kind": "evaluation", "time": 4.0, "step": 1, "version": 2, "heldout_accuracy": 0.75},
]


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def read_events(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Scalars of TensorBoard's files: records of length, checksum, message, checksum."""
    [path] = folder.iterdir()
    content = path.read_bytes()
    while content:
        (size,) = struct.unpack_from("<Q", content)
        event = Event.FromString(content[12 : 12 + size])
        yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
        content = content[size + 16 :]


def test_tensorboard_gets_steps_and_evaluations(run_path: Path) -> None:
    assert track(run_path, "tensorboard", follow=False) == 3
    assert sorted(read_events(run_path / "tensorboard")) == [
        ("heldout/accuracy", 1, 0.75),
        ("train/episodes", 1, 8.0),
        ("train/loss", 0, 0.5),
        ("train/loss", 1, 0.25),
    ]


def test_wandb_gets_steps_and_evaluations(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        warnings.warn("wandb is not installed: nothing was logged to it", stacklevel=1)
        pytest.skip("pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert track(run_path, "wandb", follow=False) == 3
    assert list((run_path / "wandb").glob("offline-run-*/*.wandb"))


def test_lines_that_are_no_figures_are_left_out() -> None:
    assert scalars(LINES[0]) == {}
    assert scalars({"kind": "step", "step": 1, "last": True, "name": "x", "loss": 1}) == {
        "train/loss": 1.0
    }


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_track([str(tmp_path)])
    assert "name the folder of a run" in capsys.readouterr().err
