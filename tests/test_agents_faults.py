"""What can go wrong among the parts of an agent: limits, floods, circles, a peer that is gone."""

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from actor.agents.opening import agent_policy
from actor.agents.part import GO_ON, Part, lease_of
from actor.agents.plan import Plan
from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.policy import Policy, Said, Speaker
from actor.tokens import TokenPolicy
from understudy.chat import Call, ChatFormat, Reply
from understudy.client import Lease, Opening
from understudy.config import AgentConfig, Config, load_config
from understudy.errors import ConfigError
from understudy.v1 import common_pb2, trajectory_pb2

from test_actor import engine, environments, make_lease  # isort: skip
from test_agents import (  # isort: skip
    AGENTS,
    ASK,
    HELPER,
    PLANNER,
    assert_covered,
    call,
    play,
    player,
    sampled,
    text,
)

LONG = call("echo", text="z" * 400)


def short_lease(max_new_tokens: int = 500, **fields: Any) -> Lease:
    """Segments of 1500 tokens, which one LONG and its result bring near the limit."""
    sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=max_new_tokens)
    return make_lease("echo", 7, max_tokens=1500, sampling=sampling, **{"max_turns": 9, **fields})


# --- Calls ---


async def test_whom_a_sub_agent_hands_over_to_sees_the_request_and_not_the_task(
    chat: ChatFormat, bundle: Path
) -> None:
    agents = {**AGENTS, "helper": {**HELPER, "hand_off": ["expert"]}, "expert": {"system": "Know."}}
    replies = [ASK, call("hand_off_to_expert", request="Your turn."), "It is 7.", "7"]
    trajectory = await play(chat, bundle, replies, agents)
    assert trajectory.reward == 1.0
    assert [segment.part for segment in trajectory.segments] == ["planner", "helper", "expert"]
    said = text(chat, trajectory.segments[2])
    assert said.index("Know.") < said.index("What is it?") < said.index("Your turn.")
    assert "Say 7." not in said
    assert "<tool_response>\nIt is 7.\n</tool_response>" in text(chat, trajectory.segments[0])


async def test_the_conversation_may_be_handed_round_until_the_turns_end(
    chat: ChatFormat, bundle: Path
) -> None:
    agents = {"a": {"hand_off": ["b"]}, "b": {"hand_off": ["a"]}}
    replies = [call("hand_off_to_b", request="b?"), call("hand_off_to_a")] * 2
    lease = make_lease("echo", 7, max_turns=4)
    trajectory = await play(chat, bundle, replies, agents, lease)
    assert trajectory.outcome == trajectory_pb2.OUTCOME_TRUNCATED
    assert [segment.part for segment in trajectory.segments] == ["a", "b", "a", "b"]
    asked = [text(chat, s).partition("<|im_start|>assistant")[0] for s in trajectory.segments]
    assert ["b?" in prompt for prompt in asked] == [False, True, False, True]


async def test_a_call_that_comes_to_no_reply_takes_no_turn(chat: ChatFormat, bundle: Path) -> None:
    agents = {"planner": PLANNER, "helper": {**HELPER, "system": "y" * 1990}}
    lease = make_lease("echo", 7, max_turns=2)
    sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=300)
    lease.sampling.CopyFrom(sampling)
    trajectory = await play(chat, bundle, [ASK * 2, "7"], agents, lease)
    assert (trajectory.outcome, trajectory.reward) == (trajectory_pb2.OUTCOME_COMPLETED, 1.0)
    assert text(chat, trajectory.segments[0]).count("The agent was cut short") == 2


async def test_every_turn_has_the_time_that_it_took(chat: ChatFormat, bundle: Path) -> None:
    trajectory = await play(chat, bundle, [ASK, "It is 7.", "7"])
    assert all(turn.generate_seconds > 0 for turn in trajectory.turns)
    spent = sum(turn.generate_seconds + turn.step_seconds for turn in trajectory.turns)
    assert spent <= trajectory.duration_seconds


ENVIRONMENT = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]


@pytest.mark.parametrize(
    ("names", "answers", "results"),
    [
        ("ts", ENVIRONMENT, ["one\n\ntwo", "agent"]),
        ("ts", [{"role": "user", "content": "hear!"}], ["hear!", "agent"]),
        ("tst", ENVIRONMENT[:1], ["one", "agent", "Answered with the first call."]),
        ("tst", ENVIRONMENT, ["one", "agent", "two"]),
        ("tt", ENVIRONMENT[:1], ["one"]),
        ("t", ENVIRONMENT, ["one", "two"]),
    ],
)
def test_every_call_keeps_its_place_among_results(
    names: str, answers: list[dict[str, Any]], results: list[str]
) -> None:
    calls = [Call(name=name, arguments={"request": "?"}) for name in names]
    plan = Plan(calls, AgentConfig(sub_agents=("s",)), ["t"])
    plan.answer_environment(answers)
    if plan.next_agent():
        plan.answer_agent("agent")
    assert [message["content"] for message in plan.results()] == results


# --- A peer that is gone ---


async def test_what_was_said_before_inference_failed_is_told(
    chat: ChatFormat, bundle: Path
) -> None:
    helper = {**HELPER, "trainable": False, "policy": "other"}
    async with AsyncExitStack() as stack, AsyncExitStack() as gone:
        environment = await stack.enter_async_context(environments())
        inference = await stack.enter_async_context(engine(bundle, [ASK, "7"]))
        other = await gone.enter_async_context(engine(bundle, ["-"], version=77))
        config = Config.model_validate(
            {
                "model": {"path": bundle},
                "network": {"inference": [inference], "envservers": [environment]},
                "actor": {"agent": "planner", "generate_timeout_seconds": 0.5},
                "agents": {"planner": PLANNER, "helper": helper},
                "policies": {"other": {"inference": [other], "model": bundle}},
            }
        )
        pool = InferencePool(config.network, timeout_seconds=5.0)
        servers = EnvironmentPool(config.network, step_timeout_seconds=5.0)
        async with agent_policy(config, TokenPolicy(chat, pool)) as policy:
            await gone.aclose()
            lease = make_lease("echo", 7, max_turns=9)
            trajectory = await Player(policy, servers).play(lease)
        await pool.close()
        await servers.close()
    assert trajectory.outcome == trajectory_pb2.OUTCOME_INFERENCE_FAILED
    assert "no replica answered" in trajectory.detail
    assert [segment.part for segment in trajectory.segments] == ["planner"]
    assert_covered(trajectory)


# --- Summaries ---


async def test_a_summary_that_is_cut_off_is_gone_on_from(chat: ChatFormat, bundle: Path) -> None:
    agents = {"one": {"context": "summarise"}}
    replies = [LONG, "w" * 600, "7"]
    trajectory = await play(chat, bundle, replies, agents, short_lease())
    assert (trajectory.outcome, trajectory.reward) == (trajectory_pb2.OUTCOME_COMPLETED, 1.0)
    before, after = trajectory.segments
    assert sampled(chat, before).endswith("w" * 100)
    assert "w" * 300 in text(chat, after)


async def test_a_summary_of_nothing_but_a_call_is_not_lost(chat: ChatFormat, bundle: Path) -> None:
    agents = {"one": {"context": "summarise"}}
    trajectory = await play(
        chat, bundle, [LONG, call("echo", text="seen z"), "7"], agents, short_lease()
    )
    assert trajectory.reward == 1.0
    assert "seen z" in text(chat, trajectory.segments[1]).partition(GO_ON.strip())[2]


@pytest.mark.parametrize(("limit", "turns"), [({"max_turns": 2}, 2), ({"max_turns": 9}, 1)])
async def test_no_last_turn_is_spent_on_a_summary(
    chat: ChatFormat, bundle: Path, limit: dict[str, int], turns: int
) -> None:
    agents = {"one": {"context": "summarise", "max_turns": turns}}
    trajectory = await play(chat, bundle, [LONG, "7"], agents, short_lease(**limit))
    assert len(trajectory.segments) == 1
    assert len(trajectory.turns) == turns
    assert trajectory.reward == turns - 1


async def test_a_flood_is_not_tokenised_to_see_whether_it_fits(
    chat: ChatFormat, bundle: Path
) -> None:
    lease = make_lease("faulty", 7, max_turns=9)
    agents = {"one": {"context": "summarise"}}
    trajectory = await play(chat, bundle, ["long", "much"], agents, lease)
    assert trajectory.outcome == trajectory_pb2.OUTCOME_TRUNCATED
    assert "an observation has 500000 characters" in trajectory.detail
    assert len(trajectory.turns) == 1


async def test_a_conversation_that_goes_on_has_random_numbers_of_its_own(
    chat: ChatFormat, bundle: Path
) -> None:
    begun: list[Lease] = []

    class Watched(TokenPolicy):
        def begin(self, lease: Lease, opening: Opening) -> Any:
            begun.append(lease)
            return super().begin(lease, opening)

    lease = make_lease("echo", 7)
    lease.sampling.seed = 11
    policy: Policy[Speaker] = Watched(chat, None)  # type: ignore[arg-type]
    for number in range(2):
        config = AgentConfig()
        opening = Opening(task_id="t", level=1, messages=[], tools=[])
        part = Part("one", config, policy, lease_of(config, lease, number), opening)
        part._num_summaries = 1
        said = Said(reply=Reply(text="a"), message={}, cut_off=False, segment=0, start=0, end=1)
        part.go_on(said, [])
    assert begun[0].sampling.seed == 11
    assert len({lease.sampling.seed for lease in begun}) == 4


# --- Definitions ---


async def test_what_does_not_fit_a_task_is_said_before_anybody_speaks(
    chat: ChatFormat, bundle: Path
) -> None:
    agents = {**AGENTS, "helper": {**HELPER, "tools": ["nope"]}}
    async with player(chat, bundle, ["7"], agents) as plays:
        trajectory = await plays.play(make_lease("echo", 7))
    assert trajectory.outcome == trajectory_pb2.OUTCOME_ACTOR_FAILED
    assert "agents.helper.tools: 'nope' is no tool of task echo-7" in trajectory.detail
    assert not trajectory.turns


@pytest.mark.parametrize(
    ("agents", "more", "said"),
    [
        ({"a": {"sub_agents": ["b"]}, "b": {"hand_off": ["a"]}}, {}, "leads back to a"),
        ({"a": {"sub_agents": ["hand_off_to_b"]}, "hand_off_to_b": {}}, {}, "rename it"),
        (
            {"a": {}},
            {"policies": {"other": {"inference": ["127.0.0.1:1"], "model": "m"}}},
            "policies.other is the policy of no agent",
        ),
        (
            {"a": {"context": "summarise"}},
            {"learner": {"tasks": {"max_tokens": 2000, "max_new_tokens": 1000}}},
            "agents.a.context = 'summarise' keeps room for a reply and a summary",
        ),
    ],
)
def test_more_definitions_that_cannot_be_played_are_refused(
    tmp_path: Path, agents: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    path = tmp_path / "run.json"
    values = {"model": {"path": "m"}, "actor": {"agent": "a"}, "agents": agents, **more}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=said):
        load_config(path)
