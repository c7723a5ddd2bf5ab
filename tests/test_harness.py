"""Commands that lead the conversation: what comes of them, and what is left of them."""

import asyncio
import json
import random
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.tokens import TokenPolicy
from adapter_helpers import failing
from conftest import serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from envserver.suites.practice.demonstrate import demonstrate
from envserver.suites.practice.expert import Expert
from envserver.suites.practice.suite import PracticeSuite
from recording_helpers import EXAMPLE, HARNESS, call, config_of, harnesses, play_harness, player
from test_actor import engine, make_lease
from test_actor import play as play_natively
from understudy.chat import ChatFormat
from understudy.client import EnvironmentClient
from understudy.config import EnvserverConfig
from understudy.errors import ConfigError
from understudy.rpc import RoleControl, Service
from understudy.trajectory import Trajectory
from understudy.v1 import environment_pb2_grpc, trajectory_pb2

ECHO = "suites:EchoSuite"
ASK = """
import os, openai
client = openai.OpenAI(max_retries=0)
def ask(text="hi"):
    messages = [{"role": "user", "content": text}]
    completion = client.chat.completions.create(model="m", messages=messages)
    return completion.choices[0].message.content
"""


def outcome_of(trajectory: Trajectory) -> str:
    return trajectory_pb2.Outcome.Name(trajectory.outcome).removeprefix("OUTCOME_")


def script(*lines: str) -> dict[str, Any]:
    """A suite whose command is a few lines of Python that can `ask`."""
    return {"command": (sys.executable, "-c", "\n".join((ASK, *lines))), "tasks": ECHO}


def assert_same(one: Trajectory, other: Trajectory) -> None:
    """Token by token; sampled by the same script, so that log-probabilities are equal, too."""
    assert len(one.segments) == len(other.segments)
    for a, b in zip(one.segments, other.segments, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert a.version_spans == b.version_spans
    spans = [[(t.segment, t.start, t.end, t.num_tool_calls) for t in x.turns] for x in (one, other)]
    assert spans[0] == spans[1]
    assert (one.reward, one.outcome, one.task_id) == (other.reward, other.outcome, other.task_id)


async def test_a_plain_client_records_what_the_native_path_does(
    chat: ChatFormat, bundle: Path
) -> None:
    replies = [call("echo", '{"text": "hi"}'), "7"]
    lease = make_lease("echo", 7)
    table: dict[str, Any] = {"command": EXAMPLE, "tasks": ECHO}
    trajectory = await play_harness(chat, bundle, replies, lease, table)
    assert (outcome_of(trajectory), trajectory.detail, trajectory.reward) == ("COMPLETED", "", 1.0)
    (segment,) = trajectory.segments
    assert chat.decode(segment.token_ids[segment.loss_mask]) == "<|im_end|>".join((*replies, ""))
    assert_same(trajectory, await play_natively(chat, bundle, replies, lease))


def _as_written(message: dict[str, Any]) -> str:
    """An expert's action as the policy would write it."""
    calls = message.get("tool_calls", [])
    written = [call(entry["name"], json.dumps(entry["arguments"])) for entry in calls]
    return "\n".join(written) or message["content"]


async def test_practice_is_the_same_through_a_harness(chat: ChatFormat, bundle: Path) -> None:
    suite = PracticeSuite()
    control = RoleControl("envserver")
    control.serving()
    tables = {"practice": {"adapter": "envserver.suites.practice:PracticeSuite"}}
    native = Service(
        name="understudy.v1.EnvironmentService",
        add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
        servicer=EnvironmentServicer(load_suites(tables), EnvserverConfig(), control),
    )
    harness = {"command": EXAMPLE, "tasks": "envserver.suites.practice:PracticeSuite"}
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(serving(native)),
            await stack.enter_async_context(harnesses({"practice": harness})),
        ]
        for ordinal in (1, 2):  # of levels 2 and 3
            environment = suite.open("train", ordinal)
            expert = Expert(environment.task, random.Random(ordinal), carelessness=0.5)
            said = demonstrate(environment, expert)["messages"]
            replies = [_as_written(m) for m in said if m["role"] == "assistant"]
            lease = make_lease("practice", ordinal, max_turns=20, max_tokens=8000)
            played = []
            for server in servers:
                async with engine(bundle, replies) as inference:
                    async with player(chat, bundle, inference, server) as play:
                        played.append(await play(lease))
            assert outcome_of(played[0]) == "COMPLETED"
            assert_same(*played)


SAYS_7 = 'print("7")'


@pytest.mark.parametrize(
    ("table", "lease", "outcome", "reward", "detail"),
    [
        (script("ask()", SAYS_7), {}, "COMPLETED", 1.0, ""),
        (script("ask()", 'print("7\\n8\\n")'), {}, "COMPLETED", 0.0, ""),
        (
            script("ask()", "open(os.environ['UNDERSTUDY_ANSWER'], 'w').write('7'); print(8)"),
            *({}, "COMPLETED", 1.0, ""),
        ),
        (script("ask()", "print('x' * 30_000_000)", SAYS_7), {}, "COMPLETED", 1.0, ""),
        (script(SAYS_7), {}, "ENVIRONMENT_FAILED", 1.0, "without a reply of the policy's"),
        (
            script("ask()", "raise SystemExit('no ' + os.environ['OPENAI_BASE_URL'])"),
            *({}, "ENVIRONMENT_FAILED", 0.0, "HARNESS_FAILED"),
        ),
        (script("ask()", "os.kill(os.getpid(), 9)"), {}, "ENVIRONMENT_FAILED", 0.0, "with -9"),
        (
            {"command": ("no-such-program",), "tasks": ECHO},
            *({}, "ENVIRONMENT_FAILED", 0.0, "cannot be started"),
        ),
        (script("while True: ask()"), {}, "TRUNCATED", 0.0, "max_turns = 4"),
        (script("ask('x' * 9000)"), {}, "TRUNCATED", 0.0, "max_tokens = 2000"),
        (
            script("try: ask()", "except openai.OpenAIError: pass", SAYS_7),
            *({"min_version": 9}, "INFERENCE_FAILED", 0.0, "VERSION_NOT_REACHED"),
        ),
        (
            {**script("ask()", "import time; time.sleep(600)"), "timeout_seconds": 5},
            *({}, "TRUNCATED", 0.0, "the environment cut"),
        ),
    ],
)
async def test_every_ending_is_attributed_once(
    chat: ChatFormat,
    bundle: Path,
    table: dict[str, Any],
    lease: dict[str, Any],
    outcome: str,
    reward: float,
    detail: str,
) -> None:
    trajectory = await play_harness(chat, bundle, ["a"], make_lease("mine", 7, **lease), table)
    assert (outcome_of(trajectory), trajectory.reward) == (outcome, reward), trajectory.detail
    assert detail in trajectory.detail
    assert "127.0.0.1" not in trajectory.detail


async def test_nothing_of_a_command_is_left(chat: ChatFormat, bundle: Path, tmp_path: Path) -> None:
    """It ends at once and leaves a child behind that holds its pipes open."""
    file = tmp_path / "pid"
    fork = (
        "import subprocess",
        "child = subprocess.Popen(['sleep', '600'])",
        f"open({str(file)!r}, 'w').write(str(child.pid))",
        "ask()",
        "print(7)",
    )
    trajectory = await play_harness(chat, bundle, ["a"], make_lease("mine", 7), script(*fork))
    assert (outcome_of(trajectory), trajectory.reward) == ("COMPLETED", 1.0)
    await _gone(int(file.read_text()))


async def _gone(pid: int) -> None:
    async with asyncio.timeout(30):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_session_that_is_lost_ends_its_command(
    chat: ChatFormat, bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pid"
    wait = f"ask(); open({str(file)!r}, 'w').write(str(os.getpid())); import time; time.sleep(600)"
    async with AsyncExitStack() as stack:
        inference = await stack.enter_async_context(engine(bundle, ["a"]))
        server = await stack.enter_async_context(harnesses({"mine": script(wait)}))
        play = await stack.enter_async_context(player(chat, bundle, inference, server))
        playing = asyncio.create_task(play(make_lease("mine", 7)))
        async with asyncio.timeout(60):
            while not (file.exists() and file.read_text()):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
        playing.cancel()
        await _gone(int(file.read_text()))


async def test_many_at_one_time_up_to_the_suite_s_limit(chat: ChatFormat, bundle: Path) -> None:
    table = {**script("ask()", "import json, sys", _LAST_WORD), "max_sessions": 2}
    async with AsyncExitStack() as stack:
        inference = await stack.enter_async_context(engine(bundle, ["a"]))
        server = await stack.enter_async_context(harnesses({"mine": table}))
        play = await stack.enter_async_context(player(chat, bundle, inference, server))
        played = await asyncio.gather(*(play(make_lease("mine", n)) for n in range(4)))
    assert [outcome_of(trajectory) for trajectory in played] == ["COMPLETED"] * 4
    assert [trajectory.reward for trajectory in played] == [1.0] * 4


_LAST_WORD = "print(json.load(sys.stdin)['messages'][-1]['content'].split()[-1].strip('.'))"


async def test_without_an_endpoint_the_episode_says_so(chat: ChatFormat, bundle: Path) -> None:
    async with engine(bundle, ["a"]) as inference, harnesses({"mine": script("ask()")}) as server:
        config = config_of(bundle, inference, server)
        pool = InferencePool(config.network, timeout_seconds=5.0)
        servers = EnvironmentPool(config.network, step_timeout_seconds=30.0)
        trajectory = await Player(TokenPolicy(chat, pool), servers).play(make_lease("mine", 7))
        await pool.close()
        await servers.close()
    assert outcome_of(trajectory) == "ENVIRONMENT_FAILED"
    assert trajectory.detail.startswith("NO_ENDPOINT: ")
    assert "set actor.recording_listen" in trajectory.detail


async def test_an_endpoint_that_is_none_is_refused() -> None:
    async with harnesses({"mine": script("ask()")}) as server:
        async with EnvironmentClient.connect(server) as client:
            for wrong in ("file:///etc/passwd", "http://a b", "http://x/" + "y" * 3000):
                async with client.session() as session, failing("BAD_ENDPOINT"):
                    await session.reset("mine", "train", 0, wrong)
            async with client.session() as session:
                opening = await session.reset("mine", "train", 0, "http://127.0.0.1:9/v1")
                assert opening.driven
                async with failing("HARNESS_FAILED", "Connection error"):
                    await session.follow()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "command: missing"),
        ({"command": []}, "command"),
        ({"command": ["x"], "tasks": "nope"}, "'nope' is not registered"),
        ({"command": ["x"], "tasks": ECHO, "task_options": {"a": 1}}, "takes no options"),
        ({"command": ["x"], "tasks": ECHO, "timeout_seconds": 0}, "timeout_seconds"),
    ],
)
def test_options_that_are_wrong_are_named(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_suites({"mine": {**table, "adapter": HARNESS}})


def test_options_of_the_tasks_and_a_digest_of_all() -> None:
    digests = set()
    for size in (3, 4):
        options: dict[str, Any] = {
            "tasks": "suites:SizedSuite",
            "task_options": {"num_tasks": size},
        }
        suites = load_suites({"mine": {**options, "command": ["x"], "adapter": HARNESS}})
        description = suites["mine"].describe()
        assert (description.name, description.splits) == ("mine", {"train": size})
        digests.add(description.digest)
    assert len(digests) == 2
