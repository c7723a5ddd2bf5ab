"""What people and peers get wrong: one clear line, and nobody else is harmed.

Each entry of the list is tested once; those that are tested elsewhere:

    unknown key, wrong value, file that is missing or no TOML   test_config (parsing; here: command)
    missing model                                               test_intake_process (here: command)
    environment that raises or hangs, in the middle of a step   test_envserver, test_actor
    reply cut off at its token limit, malformed call            test_actor
    message above the limit                                     test_envserver, test_rpc
    unknown suite or task in a lease                            test_actor, test_envserver
    garbage on the wire, deadline that passed                   test_rpc
    TLS files, plaintext beyond this machine                    test_tls
"""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.evaluation.evaluate import evaluate
from actor.evaluation.plan import EvaluationPlan
from actor.inference_pool import InferencePool
from actor.server import act
from actor.tokens import TokenPolicy
from actor.worker import LearnerRefusedError
from conftest import serving
from envserver.environment import Action, Environment, Step
from envserver.servicer import EnvironmentServicer
from inference.scripted import ScriptedEngine
from inference.servicer import InferenceServicer
from intake_rig import make_config as make_intake_config
from intake_rig import running
from processes import ANY_PORT, finish, read_until, started, understudy
from suites import EchoEnvironment, EchoSuite, FaultySuite
from understudy.chat import ChatFormat
from understudy.client import EnvironmentClient, Lease, PushRefusedError
from understudy.config import Config, EnvserverConfig, InferenceConfig, NetworkConfig
from understudy.errors import ConfigError, PeerUnreachableError
from understudy.rpc import RoleControl, Service, error_reason
from understudy.v1 import (
    common_pb2,
    environment_pb2_grpc,
    inference_pb2_grpc,
    trajectory_pb2,
)

NOWHERE = "127.0.0.1:9"


def errors_of(output: str) -> list[str]:
    """Messages of level error; the rest of the output holds no traceback."""
    assert "Traceback" not in output, output
    assert "Exception ignored" not in output, output
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if line["level"] == "error"]


def run_to_its_end(*words: str) -> tuple[int, str]:
    with started(*understudy(*words)) as process:
        output = finish(process)
        return process.returncode, output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run's TOML with ports of the test's own and a model folder without weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = tmp_path / "run.toml"
    path.write_text(
        f"[model]\npath = '{tmp_path}/model'\n[run]\ndirectory = '{tmp_path}/runs'\n"
        f"[network]\nlearner = '{NOWHERE}'\nconnect_timeout_seconds = 1.5\n"
        "[inference]\nengine = 'scripted'\n"
    )
    return path


@contextmanager
def taken_port() -> Iterator[str]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield f"127.0.0.1:{holder.getsockname()[1]}"


# --- Commands ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["actor", "--set", "actor.concurency=3"],
            "actor.concurency: unknown key; did you mean 'concurrency'?",
        ),
        (["envserver", "--set", "envserver.suites=['nope']"], "envserver.suites: 'nope'"),
        (
            ["learner", "--part", "intake", "--set", "model.path=/no"],
            "model.path = '/no': no",
        ),
    ],
)
def test_a_wrong_value_ends_the_command_with_one_line(
    config: Path, words: list[str], said: str
) -> None:
    code, output = run_to_its_end(*words, "--config", str(config), *ANY_PORT)
    assert code == 1
    plain = [line for line in output.splitlines() if line.startswith("understudy ")]
    (message,) = errors_of(output) or plain
    assert said in message


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (["envserver"], "envserver.listen"),
        (["inference"], "inference.listen"),
        (["actor"], "actor.listen"),
        (["learner", "--part", "intake"], "learner.listen"),
        (["envserver"], "envserver.metrics_listen"),
        (["actor"], "actor.metrics_listen"),
    ],
)
def test_a_port_in_use_is_named(config: Path, command: list[str], field: str) -> None:
    with taken_port() as address:
        words = [*command, "--config", str(config), *ANY_PORT, "--set", f"{field}={address}"]
        code, output = run_to_its_end(*words)
    assert code == 1
    (message,) = errors_of(output)
    role, _, key = field.partition(".")
    assert role in message
    assert f"{key} = '{address}'" in message
    assert "choose a" in message  # "choose another", "choose a free port"


@pytest.mark.parametrize("command", ["actor", "inference", "eval"])
def test_an_absent_learner_is_waited_for_and_then_named(config: Path, command: str) -> None:
    code, output = run_to_its_end(command, "--config", str(config), *ANY_PORT)
    assert code == 1
    assert f"waiting for the learner at {NOWHERE} (" in output
    (message,) = errors_of(output)
    assert f"the learner at {NOWHERE} did not answer within 2 s" in message
    assert "network.connect_timeout_seconds" in message


def test_a_process_that_waits_for_a_peer_can_be_stopped(config: Path) -> None:
    wait = ("--set", "network.connect_timeout_seconds=600")
    with started(*understudy("actor", "--config", str(config), *ANY_PORT, *wait)) as process:
        read_until(process, "waiting for the learner")
        process.send_signal(signal.SIGTERM)
        assert errors_of(finish(process)) == []
        assert process.returncode == 0


HANGING = """
import time
from envserver.environment import *
from suites import EchoEnvironment, EchoSuite

class Hanging(EchoEnvironment):
    def step(self, action):
        time.sleep(600)

class HangingSuite(EchoSuite):
    def open(self, split, task_ordinal):
        return Hanging(task_ordinal)
"""


async def test_a_hung_environment_does_not_keep_the_process(config: Path) -> None:
    (config.parent / "hanging.py").write_text(f"import sys; sys.path[:0] = {sys.path!r}\n{HANGING}")
    words = ("envserver", "--config", str(config), *ANY_PORT)
    limits = ("--set", "envserver.suites=['hanging:HangingSuite']")
    limits += ("--set", "envserver.step_timeout_seconds=0.2")
    with started(*understudy(*words, *limits), cwd=config.parent) as process:
        line = await asyncio.to_thread(read_until, process, "envserver listens")
        address = f"127.0.0.1:{line.rpartition('(port ')[2].split(')')[0]}"
        async with EnvironmentClient.connect(address) as client:
            await client.wait_ready()
            async with client.session() as session:
                await session.reset("echo", "train", 1)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await session.step(text="x")
                assert error_reason(caught.value) == "STEP_TIMEOUT"
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(finish, process)
        assert process.returncode == 0


# --- Peers ---


@asynccontextmanager
async def environments(*suites: EchoSuite, step_timeout: float = 0.5) -> AsyncIterator[str]:
    control = RoleControl("envserver")
    control.serving()
    servicer = EnvironmentServicer(
        {suite.name: suite for suite in suites},
        EnvserverConfig(step_timeout_seconds=step_timeout, worker_threads=2),
        control,
    )
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    name = "understudy.v1.EnvironmentService"
    async with serving(Service(name=name, add=add, servicer=servicer)) as address:
        yield address


def make_config(bundle: Path, folder: Path, network: dict[str, Any], **tasks: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"directory": folder},
            "model": {"path": bundle},
            "network": {"connect_timeout_seconds": 0.5, **network},
            "actor": {"metrics_listen": "127.0.0.1:0"},
            "learner": {"tasks": {"suite": "echo", "num_tasks": 100, **tasks}},
        }
    )


@pytest.mark.parametrize("absent", ["inference", "envservers"])
async def test_every_absent_peer_is_named(bundle: Path, tmp_path: Path, absent: str) -> None:
    names = {"inference": "inference server", "envservers": "environment server"}
    async with serving() as learner, environments(EchoSuite()) as address:
        peers = {"learner": learner, "inference": [address], "envservers": [address]}
        config = make_config(bundle, tmp_path, {**peers, absent: [NOWHERE]})
        with pytest.raises(PeerUnreachableError, match=f"the {names[absent]} at {NOWHERE}"):
            await act(config)


async def test_a_port_that_is_no_grpc_server_is_an_absent_peer(
    bundle: Path, tmp_path: Path
) -> None:
    with taken_port() as address:
        with pytest.raises(PeerUnreachableError, match=f"the learner at {address}"):
            await act(make_config(bundle, tmp_path, {"learner": address}))


async def test_one_peer_of_several_is_enough() -> None:
    async with serving() as address:
        network = NetworkConfig(
            inference=(NOWHERE, address), envservers=(NOWHERE, address), connect_timeout_seconds=30
        )
        for pool in (InferencePool(network, 1.0), EnvironmentPool(network, 1.0)):
            await pool.wait_ready()
            await pool.close()


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"suite": "nope"}, "suite 'nope' is not served here; served: echo; add it to"),
        ({"split": "nope"}, "of split 'nope' that are asked for; it has 'train' with 100 tasks"),
        ({"num_tasks": 101}, "lacks the 101 tasks of split 'train'"),
        ({"first_ordinal": 1}, "lacks the 101 tasks of split 'train'"),
    ],
)
async def test_tasks_that_no_server_has_are_refused_before_any_is_played(
    bundle: Path, tmp_path: Path, tasks: dict[str, Any], said: str
) -> None:
    async with serving() as peer, environments(EchoSuite()) as address:
        network = {"learner": peer, "inference": [peer], "envservers": [address]}
        config = make_config(bundle, tmp_path, network, **tasks)
        with pytest.raises(ConfigError, match=said):
            await act(config)
        plan = {"suite": "echo", "split": "train", "num_tasks": 101, **tasks}
        plan.pop("first_ordinal", None)
        with pytest.raises(ConfigError, match=said):
            await evaluate(config, EvaluationPlan(temperature=1.0, seed=0, **plan))


async def test_an_evaluation_of_an_unknown_suite_ends_with_one_line(config: Path) -> None:
    async with serving() as peer, environments(EchoSuite()) as address:
        network = {"learner": peer, "inference": f"['{peer}']", "envservers": f"['{address}']"}
        words = []
        for key, value in network.items():
            words += ["--set", f"network.{key}={value}"]
        words += ["--set", "network.connect_timeout_seconds=60", "--suite", "nope"]
        code, output = await asyncio.to_thread(
            run_to_its_end, "eval", "--config", str(config), *words
        )
    assert code == 1
    (message,) = errors_of(output)
    assert "suite 'nope' is not served here; served: echo; add it to envserver.suites" in message


def test_an_evaluation_that_could_not_be_written_is_refused_at_once(config: Path) -> None:
    words = ("--out", str(config.parent / "missing" / "eval.json"))
    code, output = run_to_its_end("eval", "--config", str(config), *words)
    assert code == 2
    assert "missing does not exist" in output
    assert "Traceback" not in output


# --- Environments ---


class Odd(EchoEnvironment):
    """Does what no environment should; the text of a step says what."""

    def step(self, action: Action) -> Step:
        match action.text:
            case "stop":
                return next(iter(()))
            case "exit":
                sys.exit(3)
            case "timeout":
                raise TimeoutError("of its own")
            case "interrupt":
                raise KeyboardInterrupt
            case "none":
                return None  # type: ignore[return-value]
        return super().step(action)


class OddSuite(EchoSuite):
    """Tasks below 3 cannot be opened."""

    name = "odd"

    def open(self, split: str, task_ordinal: int) -> Environment:
        match task_ordinal:
            case 0:
                raise RuntimeError("a secret of the suite")
            case 1:
                time.sleep(5)
        return Odd(task_ordinal)


@pytest.mark.parametrize("text", ["stop", "exit", "timeout", "interrupt", "none"])
async def test_an_environment_that_errs_ends_its_own_episode_only(text: str) -> None:
    async with environments(OddSuite()) as address, EnvironmentClient.connect(address) as client:
        async with client.session() as neighbour:
            await neighbour.reset("odd", "train", 7)
            async with client.session() as session:
                await session.reset("odd", "train", 8)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await session.step(text=text)
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert error_reason(caught.value) == "ENVIRONMENT_FAILED"
            assert (await neighbour.step(text="7")).reward == 1.0


@pytest.mark.parametrize(("ordinal", "reason"), [(0, "ENVIRONMENT_FAILED"), (1, "STEP_TIMEOUT")])
async def test_a_task_that_cannot_be_opened_ends_its_own_episode_only(
    ordinal: int, reason: str
) -> None:
    async with environments(OddSuite()) as address, EnvironmentClient.connect(address) as client:
        for _ in range(3):  # more than there are threads
            async with client.session() as session:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await session.reset("odd", "train", ordinal)
                assert error_reason(caught.value) == reason
                assert "secret" not in (caught.value.details() or "")
        async with client.session() as session:
            assert (await session.reset("odd", "train", 7)).task_id == "echo-7"


async def test_calls_that_wait_behind_hung_ones_are_played() -> None:
    async with environments(FaultySuite(), EchoSuite(), step_timeout=1.0) as address:
        async with EnvironmentClient.connect(address) as client:

            async def hang() -> None:
                async with client.session() as session:
                    await session.reset("faulty", "train", 1)
                    with pytest.raises(grpc.aio.AioRpcError):
                        await session.step(text="hang")

            async def play() -> float:
                await asyncio.sleep(0.75)  # in the middle of the hung calls
                async with client.session() as session:
                    await session.reset("echo", "train", 7)
                    return (await session.step(text="7")).reward

            *_, reward = await asyncio.gather(hang(), hang(), play())
            assert reward == 1.0


@pytest.mark.parametrize("text", ["\x00\x07", "\ud800", "é" * 1000, "<|im_end|>", "../../etc"])
async def test_odd_text_in_arguments_comes_back_and_harms_nothing(text: str) -> None:
    async with environments(EchoSuite()) as address, EnvironmentClient.connect(address) as client:
        async with client.session() as session:
            await session.reset("echo", "train", 7)
            (message,) = (await session.step([("echo", {"text": text})])).messages
            assert message["content"] == text.encode("utf-8", "replace").decode()
            assert not (await session.step([("\ud800", {})])).terminated
            assert (await session.step(text="7")).reward == 1.0


# --- Replies ---


@pytest.mark.parametrize(
    "token_ids",
    [
        [200, 201, 255, 130],  # bytes that are no UTF-8
        [1, 2, 1, 1, 0],  # special tokens only
        [3, 4, 3, 3],  # calls without a body
        [7, 8, 8, 7],  # thoughts without a text
        [9, 9, 9],  # control characters
    ],
)
async def test_an_answer_that_is_no_text_is_an_answer(
    chat: ChatFormat, bundle: Path, token_ids: list[int]
) -> None:
    settings = InferenceConfig(scripted={"latency_seconds": 0})  # type: ignore[arg-type]
    engine = ScriptedEngine(settings)
    await engine.start(bundle)
    await engine.load_weights(None, 1)  # type: ignore[arg-type]
    engine._replies = [np.array([*token_ids, 2], np.int32)]
    control = RoleControl("inference")
    control.serving()
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    service = Service(
        name="understudy.v1.InferenceService",
        add=add,
        servicer=InferenceServicer(engine, settings, control),
    )
    async with serving(service, role="inference") as inference:
        async with environments(EchoSuite()) as address:
            network = NetworkConfig(inference=(inference,), envservers=(address,))
            pool, servers = InferencePool(network, 5.0), EnvironmentPool(network, 5.0)
            trajectory = await Player(TokenPolicy(chat, pool), servers).play(lease_on("echo"))
            await pool.close()
            await servers.close()
    outcomes = (trajectory_pb2.OUTCOME_COMPLETED, trajectory_pb2.OUTCOME_TRUNCATED)
    assert trajectory.outcome in outcomes, trajectory.detail
    assert trajectory.reward == 0.0
    (segment,) = trajectory.segments
    assert segment.token_ids[segment.loss_mask][: len(token_ids)].tolist() == token_ids


def lease_on(suite: str) -> Lease:
    return Lease(
        lease_id=1,
        ordinal=7,
        sample_index=0,
        suite=suite,
        split="train",
        task_ordinal=7,
        sampling=common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=100),
        max_turns=3,
        max_tokens=2000,
        min_version=0,
        expires_after_seconds=60.0,
    )


# --- Runs ---


@asynccontextmanager
async def learner_of(model: Path, folder: Path) -> AsyncIterator[str]:
    config = make_intake_config(folder)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
    async with running(config) as rig:
        yield f"127.0.0.1:{rig.server._server.port}"


async def test_an_actor_of_another_run_is_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    async with learner_of(bundle, tmp_path) as learner, environments(EchoSuite()) as address:
        network = {"learner": learner, "inference": [address], "envservers": [address]}
        config = make_config(bundle, tmp_path, network)
        mine = config.model_copy(update={"run": config.run.model_copy(update={"name": "mine"})})
        # Leasing and pushing are both refused; which of them comes first is chance.
        refused = (LearnerRefusedError, PushRefusedError)
        with pytest.raises(refused, match="'mine': RUN_MISMATCH|RUN_MISMATCH: run 'mine'"):
            await act(mine)


async def test_a_learner_whose_model_has_no_tokenizer_is_named(tmp_path: Path) -> None:
    model = tmp_path / "bare"
    model.mkdir()
    (model / "config.json").write_text("{}")
    async with learner_of(model, tmp_path) as learner, environments(EchoSuite()) as address:
        network = {"learner": learner, "inference": [address], "envservers": [address]}
        said = f"what the learner at {learner} sent: .*tokenizer.json"
        with pytest.raises(ConfigError, match=said):
            await act(make_config(model, tmp_path, network))
