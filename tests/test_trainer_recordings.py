"""What the supervised stage takes from a run's log."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from audit_story import healthy
from learner.trainer.recordings import read_recordings
from understudy.chat import ChatFormat
from understudy.config import PhaseConfig
from understudy.errors import ConfigError

from test_export import play, write_run  # isort: skip

VOCAB_SIZE = 100_000


def phase(run: Path, **changes: object) -> PhaseConfig:
    raw = {"run": run, "steps": 1, "learning_rate": 1e-3, **changes}
    return PhaseConfig.model_validate(raw)


async def test_segments_are_taken_as_they_were_sampled(tmp_path: Path, chat: ChatFormat) -> None:
    trajectory = replace(play(chat), reward=1.0)
    run = await write_run(tmp_path, trajectory, None)
    found = read_recordings(phase(run), VOCAB_SIZE)
    stored = [entry for entry in healthy().values() if entry.HasField("trajectory_stored")]
    heldout = [e for e in stored if e.trajectory_stored.task_key.ordinal >= 2**32]
    assert heldout, "the story has an evaluation, whose episodes are not learned from"
    assert len(found) == len(stored) - len(heldout)
    for sequence in found:
        np.testing.assert_array_equal(sequence.token_ids, trajectory.segments[0].token_ids)
        np.testing.assert_array_equal(sequence.loss_mask, trajectory.segments[0].loss_mask)


async def test_a_task_gives_no_more_than_asked_for(tmp_path: Path, chat: ChatFormat) -> None:
    """All of the story's episodes are of one task here."""
    run = await write_run(tmp_path, replace(play(chat), reward=1.0), None)
    assert len(read_recordings(phase(run, max_per_task=2), VOCAB_SIZE)) == 2


async def test_what_was_not_rewarded_is_left_out(tmp_path: Path, chat: ChatFormat) -> None:
    run = await write_run(tmp_path, replace(play(chat), reward=0.5), None)
    with pytest.raises(ConfigError, match=r"no episode with a reward of at least min_reward = 1.0"):
        read_recordings(phase(run), VOCAB_SIZE)
    assert read_recordings(phase(run, min_reward=0.5), VOCAB_SIZE)


async def test_a_run_with_other_tokens_is_refused(tmp_path: Path, chat: ChatFormat) -> None:
    run = await write_run(tmp_path, replace(play(chat), reward=1.0), None)
    with pytest.raises(ConfigError, match=r"and the model 5 tokens; name a run of a model with"):
        read_recordings(phase(run), 5)


@pytest.mark.parametrize("sources", [{}, {"data": "a.jsonl", "run": "runs/a"}])
def test_a_phase_has_one_source(sources: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="either data, a file, or run, a run's folder"):
        PhaseConfig.model_validate({"steps": 1, **sources})
