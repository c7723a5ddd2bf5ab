"""AWorld's own agent against the endpoint: what is recorded is what it exchanged."""

import warnings
from pathlib import Path

import pytest

from benchmarks.other_venv import PackageMissingError, other_python
from conftest import ROOT
from recording_helpers import call, play_harness
from test_actor import make_lease
from understudy.chat import ChatFormat
from understudy.v1 import trajectory_pb2

PACKAGES = ("aworld==0.3.2", "pydantic==2.11.7")  # with a newer pydantic it cannot be imported


@pytest.fixture(scope="module")
def aworld() -> Path:
    """An interpreter that has it; the first time takes minutes, 600 MB and a registry."""
    try:
        return other_python(ROOT / ".venv-aworld", PACKAGES, "import aworld.runner")
    except PackageMissingError as error:
        warnings.warn(f"AWorld's agent was not tested: {error}", stacklevel=1)
        pytest.skip(f"AWorld's agent was not tested: {error}")


@pytest.mark.timeout(1200)
async def test_an_aworld_agent_is_recorded(chat: ChatFormat, bundle: Path, aworld: Path) -> None:
    replies = [call("echo", '{"text": "hi"}'), "7"]
    table = {
        "command": (str(aworld), str(ROOT / "examples" / "harness_aworld.py")),
        "tasks": "suites:EchoSuite",
    }
    lease = make_lease("mine", 7, max_tokens=30_000)
    trajectory = await play_harness(chat, bundle, replies, lease, table)
    assert trajectory.outcome == trajectory_pb2.OUTCOME_COMPLETED, trajectory.detail
    assert trajectory.reward == 1.0
    (segment,) = trajectory.segments
    assert chat.decode(segment.token_ids[segment.loss_mask]) == "<|im_end|>".join((*replies, ""))
    text = chat.decode(segment.token_ids)
    assert "Say 7." in text
    assert "<tool_response>\nhi\n</tool_response>" in text
    assert [turn.num_tool_calls for turn in trajectory.turns] == [1, 0]
