"""Gymnasium's own environments, and one with text spaces, as suites."""

import json
import re
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from adapter_helpers import failing, served
from envserver.adapters.seeded import as_text
from envserver.registry import load_suites
from understudy.client import EnvironmentClient, Session
from understudy.errors import ConfigError

LAKE = {
    "adapter": "gymnasium",
    "env": "FrozenLake-v1",
    "kwargs": {"render_mode": "ansi", "is_slippery": False, "max_episode_steps": 8},
    "actions": ["left", "down", "right", "up"],
    "prompt": "Walk from S to G; H is a hole.",
}


class Parrot(gymnasium.Env[str, str]):
    """Says it back, loudly; ends at `bye`, fails at `oops`, hangs at nothing."""

    action_space = spaces.Text(max_length=10)
    observation_space = spaces.Text(max_length=10)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def reset(
        self, *, seed: int | None = None, options: object = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"seed {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "oops":
            raise RuntimeError("secret")
        return action.upper(), 0.25, action == "bye", action == "both", {}


gymnasium.register("Parrot-v0", entry_point=Parrot, max_episode_steps=3)
PARROT = {"adapter": "gymnasium", "env": "Parrot-v0", "train_tasks": 5, "test_tasks": 2}


async def walk(client: EnvironmentClient, *ways: str) -> list[Any]:
    async with client.session() as session:
        await session.reset("lake", "train", 0)
        return [await session.step([("act", {"action": way})]) for way in ways]


async def test_frozen_lake_is_won_lost_and_cut_short() -> None:
    async with served({"lake": LAKE}) as client:
        async with client.session() as session:
            opening = await session.reset("lake", "train", 0)
        assert opening.messages[0]["content"] == (
            "Walk from S to G; H is a hole.\n\n[S]FFF\nFHFH\nFFFH\nHFFG"
        )
        assert opening.tools[0]["parameters"]["properties"]["action"]["enum"] == LAKE["actions"]
        won = await walk(client, "down", "down", "right", "right", "down", "right")
        assert [(step.reward, step.terminated, step.truncated) for step in won[-2:]] == [
            (0.0, False, False),
            (1.0, True, False),
        ]
        assert won[0].messages[0]["content"] == "  (Down)\nSFFF\n[F]HFH\nFFFH\nHFFG"
        lost = (await walk(client, "down", "right"))[-1]
        assert (lost.reward, lost.terminated, lost.truncated) == (0.0, True, False)
        late = (await walk(client, *["left"] * 8))[-1]
        assert (late.reward, late.terminated, late.truncated) == (0.0, False, True)


async def test_several_calls_of_a_turn_end_with_the_episode() -> None:
    async with served({"lake": LAKE}) as client:
        async with client.session() as session:
            await session.reset("lake", "train", 0)
            calls = [("act", {"action": way}) for way in ("down", "right", "down")]
            step = await session.step(calls)
            assert (len(step.messages), step.terminated) == (2, True)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("act", {"action": "fly"}, "Give action as one of left, down, right, up."),
        ("act", {"action": ["left"]}, "Give action as one of left, down, right, up."),
        ("act", {"action": 1}, "Give action as one of left, down, right, up."),
        ("act", {}, "Give action as one of left, down, right, up."),
        ("move", {"action": "left"}, "Unknown tool; use act."),
    ],
)
async def test_a_call_that_makes_no_sense_is_answered(
    name: str, arguments: dict[str, object], said: str
) -> None:
    async with served({"lake": LAKE}) as client, client.session() as session:
        await session.reset("lake", "train", 0)
        step = await session.step([(name, arguments)])
        assert step.messages[0]["content"] == said
        told = await session.step(text="I go left.")
        assert told.messages == [{"role": "user", "content": "Call the tool act."}]


async def test_taxi_and_blackjack_have_integers_and_seeds() -> None:
    tables = {
        "taxi": {"adapter": "gymnasium", "env": "Taxi-v4", "reward_range": [-2000, 20]},
        "cards": {"adapter": "gymnasium", "env": "Blackjack-v1", "reward_range": [-1, 1]},
    }
    async with served(tables) as client:
        assert (await client.describe("taxi")).min_reward == -2000

        async def first(suite: str, split: str, ordinal: int) -> str:
            async with client.session() as session:
                opening = await session.reset(suite, split, ordinal)
                return str(opening.messages[0]["content"])

        texts = [await first("taxi", "train", ordinal) for ordinal in range(6)]
        assert texts == [await first("taxi", "train", ordinal) for ordinal in range(6)]
        assert len(set(texts)) > 1
        assert all(0 <= int(text) < 500 for text in texts)
        assert len(json.loads(await first("cards", "test", 999))) == 3
        async with client.session() as session:
            await session.reset("taxi", "train", 0)
            assert (await _act(session, 6)) == "Give action as an integer from 0 to 5."
            assert (await _act(session, True)) == "Give action as an integer from 0 to 5."
            assert int(await _act(session, 0)) < 500
        async with client.session() as session, failing("UNKNOWN_TASK"):
            await session.reset("cards", "test", 1000)


async def _act(session: Session, action: object) -> str:
    step = await session.step([("act", {"action": action})])
    return str(step.messages[0]["content"])


async def test_text_spaces_take_bare_replies_and_faults_are_the_environments() -> None:
    async with served({"parrot": PARROT}) as client:
        async with client.session() as session:
            opening = await session.reset("parrot", "test", 1)
            assert opening.messages[0]["content"] == "seed 6"
            step = await session.step(text="hello")
            assert (step.messages[0]["content"], step.reward) == ("HELLO", 0.25)
            assert (await _act(session, "x" * 11)).startswith("Give action as text of 1 to 10")
            assert await _act(session, "two") == "TWO"
            last = await session.step(text="three")
            assert (last.terminated, last.truncated) == (False, True)
        async with client.session() as session:
            await session.reset("parrot", "train", 0)
            both = await session.step(text="both")
            assert (both.terminated, both.truncated) == (False, True)
        async with client.session() as session:
            await session.reset("parrot", "train", 0)
            async with failing("ENVIRONMENT_FAILED", "RuntimeError"):
                await session.step(text="oops")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": "Nope-v0"}, "env = 'Nope-v0' cannot be made"),
        ({"env": "nomodule:Nope-v0"}, "env = 'nomodule:Nope-v0' cannot be made"),
        ({"env": "FrozenLake-v1", "kwargs": {"depth": 3}}, "cannot be made"),
        ({"env": "FrozenLake-v1", "actions": ["left"]}, "actions names 1 of 4; name all of them"),
        ({"env": "Pendulum-v1"}, "only Discrete and Text can be played"),
        ({"env": "FrozenLake-v1", "envs": 3}, "envs: unknown key; did you mean 'env'?"),
        ({}, "env: missing"),
    ],
)
def test_what_cannot_be_played_is_named_at_the_start(options: dict[str, object], said: str) -> None:
    table = {"adapter": "envserver.adapters.gymnasium:GymnasiumSuite", **options}
    with pytest.raises(ConfigError, match="envserver.suites.mine: .*" + re.escape(said)):
        load_suites({"mine": table})


def test_observations_as_text() -> None:
    assert as_text("plain\ntext") == "plain\ntext"
    assert as_text(np.int64(3)) == "3"
    assert as_text(np.array([[0.1, 1 / 3], [1e10, -2.0]], np.float32)) == (
        "[[0.1, 0.333333], [10000000000.0, -2.0]]"
    )
    assert as_text({"hand": (np.int64(7), 10), "ace": np.bool_(True)}) == (
        '{"hand": [7, 10], "ace": true}'
    )
