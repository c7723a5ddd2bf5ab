"""Agents of several parts, played against a real environment server and a scripted engine."""

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor.agents.opening import agent_policy
from actor.agents.part import GO_ON, SUMMARISE, shorten
from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.tokens import TokenPolicy
from understudy.chat import ChatFormat
from understudy.client import Lease
from understudy.config import Config, load_config
from understudy.errors import ConfigError
from understudy.trajectory import Segment, Trajectory, decode_payload, encode_trajectory
from understudy.v1 import common_pb2, trajectory_pb2

from test_actor import engine, environments, make_lease  # isort: skip

ROOT = Path(__file__).parents[1]
PLANNER: dict[str, Any] = {"system": "You plan.", "sub_agents": ["helper"], "tools": []}
HELPER: dict[str, Any] = {"description": "Finds things out.", "system": "You help."}
AGENTS = {"planner": PLANNER, "helper": HELPER}


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


ASK = call("helper", request="What is it?")
ECHO = call("echo", text="hi")


@asynccontextmanager
async def player(
    chat: ChatFormat,
    bundle: Path,
    replies: Sequence[str],
    agents: Mapping[str, Mapping[str, Any]],
    others: Sequence[str] = (),
) -> AsyncIterator[Player]:
    """Plays the first of the agents; `others` are replies of the policy "other"."""
    async with environments() as environment, engine(bundle, replies) as inference:
        async with engine(bundle, others or ["-"], version=77) as other:
            config = Config.model_validate(
                {
                    "model": {"path": bundle},
                    "network": {"inference": [inference], "envservers": [environment]},
                    "actor": {"agent": next(iter(agents))},
                    "agents": agents,
                    "policies": {"other": {"inference": [other], "model": bundle}}
                    if others
                    else {},
                }
            )
            pool = InferencePool(config.network, timeout_seconds=5.0)
            servers = EnvironmentPool(config.network, step_timeout_seconds=5.0)
            async with agent_policy(config, TokenPolicy(chat, pool)) as policy:
                yield Player(policy, servers)
            await pool.close()
            await servers.close()


async def play(
    chat: ChatFormat,
    bundle: Path,
    replies: Sequence[str],
    agents: Mapping[str, Mapping[str, Any]] = AGENTS,
    lease: Lease | None = None,
    others: Sequence[str] = (),
) -> Trajectory:
    sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=300)
    lease = lease or make_lease("echo", 7, max_turns=9, sampling=sampling)
    async with player(chat, bundle, replies, agents, others) as plays:
        trajectory = await plays.play(lease)
    assert decode_payload(encode_trajectory(trajectory), common_pb2.ENCODING_ZSTD).segments
    assert_covered(trajectory)
    return trajectory


def assert_covered(trajectory: Trajectory) -> None:
    """Every sampled token is in exactly one turn."""
    for index, segment in enumerate(trajectory.segments):
        turns = sorted((t.start, t.end) for t in trajectory.turns if t.segment == index)
        assert [start for start, _ in turns] == [0, *(end for _, end in turns[:-1])]
        assert turns[-1][1] == len(segment.logprobs)


def sampled(chat: ChatFormat, segment: Segment) -> str:
    return chat.decode(segment.token_ids[segment.loss_mask])


def text(chat: ChatFormat, segment: Segment) -> str:
    return chat.decode(segment.token_ids)


# --- Calls ---


async def test_a_sub_agent_is_a_tool(chat: ChatFormat, bundle: Path) -> None:
    trajectory = await play(chat, bundle, [ASK, ECHO, "It is 7.", "7"])
    assert (trajectory.outcome, trajectory.reward) == (trajectory_pb2.OUTCOME_COMPLETED, 1.0)
    planner, helper = trajectory.segments
    assert (planner.part, helper.part) == ("planner", "helper")
    assert sampled(chat, planner) == f"{ASK}<|im_end|>7<|im_end|>"
    assert sampled(chat, helper) == f"{ECHO}<|im_end|>It is 7.<|im_end|>"
    assert "<tool_response>\nIt is 7.\n</tool_response>" in text(chat, planner)
    assert "<tool_response>\nhi\n</tool_response>" in text(chat, helper)
    # Each sees its own prompt, its own tools and its own task.
    assert "You plan." in text(chat, planner)
    assert "echo" not in text(chat, planner).partition("Say 7.")[0]
    assert "Say 7." not in text(chat, helper)
    assert "What is it?" in text(chat, helper)
    assert "You help." in text(chat, helper)
    places = [(turn.segment, turn.reward) for turn in trajectory.turns]
    assert places == [(0, 0.0), (1, 0.0), (1, 0.0), (0, 1.0)]


async def test_calls_of_both_kinds_are_answered_in_their_order(
    chat: ChatFormat, bundle: Path
) -> None:
    agents = {"planner": {**PLANNER, "tools": None}, "helper": HELPER}
    both = ASK + call("echo", text="first") + call("nope") + call("helper") + ASK
    trajectory = await play(chat, bundle, [both, "one", "two", "7"], agents)
    assert trajectory.reward == 1.0
    said = text(chat, trajectory.segments[0])
    places = [said.index(f"<tool_response>\n{answer}") for answer in ("one", "first", "two")]
    assert places[0] < places[1] < places[2]
    assert "there is no tool 'nope'; there are: echo, helper" in said
    assert "'request' is missing" in said
    assert [s.part for s in trajectory.segments] == ["planner", "helper", "helper"]


async def test_a_tool_that_a_part_may_not_use_never_reaches_the_environment(
    chat: ChatFormat, bundle: Path
) -> None:
    trajectory = await play(chat, bundle, [ECHO, "7"])
    said = text(chat, trajectory.segments[0])
    assert "there is no tool 'echo'; there are: helper" in said
    assert "\nhi\n" not in said


async def test_the_conversation_is_handed_over(chat: ChatFormat, bundle: Path) -> None:
    agents = {"first": {"hand_off": ["helper"]}, "helper": HELPER}
    hand = call("hand_off_to_helper", request="Go on, please.")
    trajectory = await play(chat, bundle, [hand + ECHO, hand, ECHO, "7"], agents)
    assert trajectory.reward == 1.0
    first, helper = trajectory.segments
    assert "handing the conversation over goes alone" in text(chat, first)
    assert sampled(chat, helper) == f"{ECHO}<|im_end|>7<|im_end|>"
    said = text(chat, helper)
    assert said.index("You help.") < said.index("Say 7.") < said.index("Go on, please.")


async def test_malformed_calls_stay_with_the_part_that_made_them(
    chat: ChatFormat, bundle: Path
) -> None:
    trajectory = await play(chat, bundle, [ASK, "<tool_call>{", "It is 7.", "7"])
    assert trajectory.reward == 1.0
    assert "Malformed call" in text(chat, trajectory.segments[1])
    assert [turn.malformed_call for turn in trajectory.turns] == [False, True, False, False]


# --- Limits ---


@pytest.mark.parametrize(
    ("helper", "replies", "said"),
    [
        ({"max_turns": 1}, [ASK, ECHO, "7"], "agents.helper.max_turns = 1"),
        ({}, [ASK, "x" * 400, "7"], "a reply was cut off at its token limit"),
        ({"system": "y" * 1990}, [ASK, "7"], "max_tokens = 2000"),
    ],
)
async def test_a_part_at_its_limit_ends_its_own_call_only(
    chat: ChatFormat, bundle: Path, helper: dict[str, Any], replies: list[str], said: str
) -> None:
    agents = {"planner": PLANNER, "helper": {**HELPER, **helper}}
    trajectory = await play(chat, bundle, replies, agents)
    assert (trajectory.outcome, trajectory.reward) == (trajectory_pb2.OUTCOME_COMPLETED, 1.0)
    assert f"The agent was cut short: {said}" in text(chat, trajectory.segments[0])


async def test_the_lease_s_turns_are_those_of_all_parts(chat: ChatFormat, bundle: Path) -> None:
    lease = make_lease("echo", 7, max_turns=4)
    trajectory = await play(chat, bundle, [ASK, "no", ASK, "no", ASK], lease=lease)
    assert trajectory.outcome == trajectory_pb2.OUTCOME_TRUNCATED
    assert trajectory.detail == "max_turns = 4"
    assert len(trajectory.turns) == 4


async def test_long_results_lose_their_middle(chat: ChatFormat, bundle: Path) -> None:
    agents = {"one": {"max_observation_characters": 9}}
    long = call("echo", text="a" * 50 + "b" * 50)
    trajectory = await play(chat, bundle, [long, "7"], agents)
    assert "\naaaaa\n[91 characters left out]\nbbbb\n" in text(chat, trajectory.segments[0])
    assert shorten("123456789", 9) == "123456789"


async def test_a_conversation_near_its_limit_goes_on_from_a_summary(
    chat: ChatFormat, bundle: Path
) -> None:
    agents = {"one": {"context": "summarise"}}
    long = call("echo", text="z" * 400)
    sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=500)
    lease = make_lease("echo", 7, max_turns=9, max_tokens=1500, sampling=sampling)
    trajectory = await play(chat, bundle, [long, "z 400 times", "7"], agents, lease)
    assert (trajectory.outcome, trajectory.reward) == (trajectory_pb2.OUTCOME_COMPLETED, 1.0)
    before, after = trajectory.segments
    assert sampled(chat, before) == f"{long}<|im_end|>z 400 times<|im_end|>"
    assert SUMMARISE in text(chat, before)
    assert sampled(chat, after) == "7<|im_end|>"
    said = text(chat, after)
    assert said.index("Say 7.") < said.index(GO_ON.strip()) < said.index("z 400 times")
    assert "z" * 400 in said  # the result that did not fit before
    # Without the strategy the episode ends there.
    stopped = await play(chat, bundle, [long, long, "7"], {"one": {}}, lease)
    assert stopped.outcome == trajectory_pb2.OUTCOME_TRUNCATED


# --- Who learns ---


async def test_parts_that_do_not_learn_are_frozen_and_may_be_of_another_policy(
    chat: ChatFormat, bundle: Path
) -> None:
    helper = {**HELPER, "trainable": False, "policy": "other"}
    agents = {"planner": PLANNER, "helper": helper}
    trajectory = await play(chat, bundle, [ASK, "7"], agents, others=[ECHO, "It is 7."])
    assert trajectory.reward == 1.0
    planner, other = trajectory.segments
    assert (planner.frozen, other.frozen) == (False, True)
    assert [span.version for span in other.version_spans] == [77]
    assert trajectory.versions == {1}
    assert trajectory.num_sampled_tokens == len(planner.logprobs)


async def test_parts_have_random_numbers_of_their_own(chat: ChatFormat, bundle: Path) -> None:
    lease = make_lease("echo", 7, max_turns=9)
    lease.sampling.seed = 11
    async with player(chat, bundle, [ASK, "no", "7"], AGENTS) as plays:
        speaker = plays._policy.begin(lease, _opening())
        frames = [speaker._call("helper", request, None) for request in "ab"]  # type: ignore[attr-defined]
        seeds = [frame.part._lease.sampling.seed for frame in frames]
    assert len({11, *seeds}) == 3


def _opening() -> Any:
    from understudy.client import Opening

    return Opening(task_id="t", level=1, messages=[], tools=[])


# --- Definitions ---


@pytest.mark.parametrize(
    ("agents", "said"),
    [
        ({"a": {"sub_agents": ["b"]}}, "agents.b is called and not defined"),
        ({"a": {"sub_agents": ["b"]}, "b": {"sub_agents": ["a"]}}, "leads back to a"),
        ({"a": {"hand_off": ["a"]}}, "agents.a.hand_off names the agent itself"),
        ({"a": {}, "b": {}}, "agents.b is never called by 'a'"),
        ({"a": {"trainable": False}}, "no part of actor.agent = 'a' learns"),
        ({"a": {"policy": "other"}}, "agents.a.policy = 'other' is not under"),
        ({"a": {"sub_agents": ["b"], "hand_off": ["b"]}, "b": {}}, "b twice in"),
        ({"a b": {}}, "String should match pattern"),
    ],
)
def test_definitions_that_cannot_be_played_are_refused(
    tmp_path: Path, agents: dict[str, Any], said: str
) -> None:
    path = tmp_path / "run.json"
    values = {"model": {"path": "m"}, "actor": {"agent": "a"}, "agents": agents}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_a_policy_that_is_not_the_run_s_cannot_learn(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "[model]\npath = 'm'\n[actor]\nagent = 'a'\n[agents.a]\npolicy = 'other'\n"
        "[policies.other]\ninference = ['127.0.0.1:1']\nmodel = 'n'\n"
    )
    with pytest.raises(ConfigError, match=r"'other' cannot learn; set trainable = false"):
        load_config(path)


@pytest.mark.parametrize(
    ("agents", "said"),
    [
        ({"a": {"sub_agents": ["echo"]}, "echo": {}}, "'echo' is an agent's name and a tool's"),
        ({"a": {"tools": ["nope"]}}, "agents.a.tools: 'nope' is no tool of task echo-7"),
    ],
)
async def test_definitions_that_do_not_fit_a_task_fail_its_episode_by_name(
    chat: ChatFormat, bundle: Path, agents: dict[str, Any], said: str
) -> None:
    async with player(chat, bundle, ["7"], agents) as plays:
        trajectory = await plays.play(make_lease("echo", 7))
    assert trajectory.outcome == trajectory_pb2.OUTCOME_ACTOR_FAILED
    assert said in trajectory.detail


def test_the_page_s_agents_can_be_played(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "agents.md").read_text()
    first, checker = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "run.toml"
    called = first.replace('["searcher"]', '["searcher", "checker"]')
    path.write_text(f"{called}\n{checker}\n[model]\npath = 'm'\n")
    config = load_config(path)
    assert set(config.agents) == {"planner", "searcher", "checker"}
    assert config.policies["large"].model == Path("models/large")


def test_segments_of_old_records_have_no_part() -> None:
    segment = Segment(
        token_ids=np.arange(3, dtype=np.int32),
        loss_mask=np.array([False, True, True]),
        logprobs=np.zeros(2, np.float32),
        version_spans=(),
    )
    assert (segment.part, segment.frozen) == ("", False)
