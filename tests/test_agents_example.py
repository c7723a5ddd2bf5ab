"""The shipped agent of two parts plays the practice suite."""

from pathlib import Path

from conftest import ROOT
from envserver.suites.practice import PracticeEnvironment, PracticeSuite
from understudy.chat import ChatFormat
from understudy.config import load_config

from practice_agents import play_practice  # isort: skip
from test_actor import engine, make_lease  # isort: skip
from test_agents import call, text  # isort: skip


async def test_the_shipped_agent_plays(chat: ChatFormat, bundle: Path) -> None:
    config = load_config(ROOT / "configs" / "agents.toml")
    agents = {name: agent.model_dump() for name, agent in config.agents.items()}
    assert next(iter(agents)) == config.actor.agent
    task = PracticeSuite().open("train", 3)
    assert isinstance(task, PracticeEnvironment)
    lease = make_lease("practice", 3, max_turns=20, max_tokens=config.learner.tasks.max_tokens)
    replies = [
        call("searcher", request="How old is Ann?"),
        call("lookup", entity="Ann", field="age"),
        "I cannot find her.",
        call("calculate", expression="1 + 1"),
        task.task.answer,
    ]
    async with engine(bundle, replies) as inference:
        trajectory = await play_practice(chat, bundle, inference, agents, lease)
    assert (trajectory.detail, trajectory.reward) == ("", 1.0)
    planner, searcher = (text(chat, segment) for segment in trajectory.segments)
    told, heard = (said.partition("<|im_start|>assistant")[0] for said in (planner, searcher))
    for tool in ("calculate(", "searcher("):
        assert tool in told
    for tool in ("lookup(", "search(", "read_csv("):
        assert tool in heard
        assert tool not in told
    assert "<tool_response>\nI cannot find her.\n</tool_response>" in planner
    assert "<tool_response>\n2\n</tool_response>" in planner
