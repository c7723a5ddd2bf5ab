"""Examples do what they say, against real servers."""

import asyncio
import json
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from conftest import ROOT, serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from examples import talk_to_services
from examples.word_count import Note
from test_actor import CALL, engine, environments, intake, make_config
from understudy.client import BatchClient, EnvironmentClient, WeightClient
from understudy.config import EnvserverConfig, write_config
from understudy.rpc import RoleControl, Service, error_reason
from understudy.v1 import environment_pb2_grpc


def word_count_service() -> Service:
    """The example's suite, named as a run's configuration would name it."""
    control = RoleControl("envserver")
    control.serving()
    suites = load_suites(["examples.word_count:WordCount"])
    return Service(
        name="understudy.v1.EnvironmentService",
        add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
        servicer=EnvironmentServicer(suites, EnvserverConfig(), control),
    )


@pytest.mark.parametrize(("error", "reward"), [(0, 1.0), (1, 0.0)])
async def test_the_example_environment_is_played_over_grpc(error: int, reward: float) -> None:
    async with serving(word_count_service()) as address:
        async with EnvironmentClient.connect(address) as client, client.session() as session:
            opening = await session.reset("word_count", "train", 7)
            assert [tool["name"] for tool in opening.tools] == ["read"]
            read = await session.step([("read", {})])
            assert not read.terminated
            count = len(read.messages[0]["content"].split())
            answered = await session.step(text=f"{count + error}\n")
            assert (answered.reward, answered.terminated) == (reward, True)


async def test_the_example_environment_refuses_tasks_that_it_lacks() -> None:
    async with serving(word_count_service()) as address:
        async with EnvironmentClient.connect(address) as client:
            for split, ordinal in (("train", 9000), ("test", 0)):
                async with client.session() as session:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await session.reset("word_count", split, ordinal)
                assert error_reason(caught.value) == "UNKNOWN_TASK"


def test_the_example_environment_is_the_same_every_time() -> None:
    assert Note(7).note == Note(7).note
    assert len({Note(ordinal).note for ordinal in range(100)}) == 100


async def reflect(*words: str) -> tuple[int | None, str, str]:
    """Exit code, output and errors of examples/reflect.py."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "examples" / "reflect.py"), *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, output.decode(), errors.decode()


def test_reflect_knows_no_generated_code_of_ours() -> None:
    assert "understudy" not in [
        line.split()[1].partition(".")[0]
        for line in (ROOT / "examples" / "reflect.py").read_text().splitlines()
        if line.startswith(("import ", "from "))
    ]


async def test_reflect_lists_services_and_calls_methods() -> None:
    async with serving(word_count_service()) as address:
        code, output, errors = await reflect(address)
        assert code == 0, errors
        lines = output.splitlines()
        assert "understudy.v1.EnvironmentService" in lines
        assert "  Sessions(stream SessionsRequest) -> stream SessionsResponse" in lines
        assert "  GetStatus(GetStatusRequest) -> GetStatusResponse" in lines

        code, output, _ = await reflect(address, "understudy.v1.ControlService/GetStatus")
        assert code == 0
        assert json.loads(output)["state"] == "ROLE_STATE_SERVING"

        describe = "understudy.v1.EnvironmentService/DescribeSuite"
        code, output, _ = await reflect(address, describe, '{"suite": "word_count"}')
        assert json.loads(output)["splits"] == [{"name": "train", "numTasks": "9000"}]

        code, _, errors = await reflect(address, describe, '{"suite": "nope"}')
        assert code == 1
        assert errors.startswith("NOT_FOUND UNKNOWN_SUITE: suite 'nope' is not served here")


@pytest.mark.parametrize(
    ("method", "request_json"),
    [
        ("understudy.v1.EnvironmentService/Nope", "{}"),
        ("understudy.v1.EnvironmentService/Sessions", '{"stepp": {}}'),
        ("understudy.v1.EnvironmentService/DescribeSuite", '{"suit": 1}'),
    ],
)
async def test_reflect_says_what_it_cannot_call(method: str, request_json: str) -> None:
    async with serving(word_count_service()) as address:
        code, _, errors = await reflect(address, method, request_json)
        assert code == 2
        assert "Traceback" not in errors


async def test_reflect_calls_every_service(tmp_path: Path, bundle: Path) -> None:
    async with environments() as environment, engine(bundle, ["7"]) as inference:
        async with intake(make_config(tmp_path, bundle)) as (_, learner):
            calls = [
                (learner, "ControlService/GetStatus", ["{}"], '"role": "learner"'),
                (learner, "TaskService/LeaseTasks", ['{"actorId": "a", "maxLeases": 1}'], "echo"),
                (
                    learner,
                    "TrajectoryService/PushTrajectories",
                    ['{"hello": {"actorId": "a"}}'],
                    '"maxPayloadBytes"',
                ),
                (
                    learner,
                    "BatchService/NextBatch",
                    ['{"step": 9, "worldSize": 1, "epoch": 1}'],
                    "step 0 is",
                ),
                (learner, "WeightService/FetchModelBundle", [], '"tokenizer.json"'),
                (inference, "InferenceService/DescribeModel", [], '"engine": "scripted"'),
                (
                    environment,
                    "EnvironmentService/Sessions",
                    [
                        '{"requests": [{"reset": {"task": {"suite": "echo", "split": "train"}}}]}',
                        '{"requests": [{"step": {"text": "0"}}]}',
                    ],
                    '"terminated": true',
                ),
            ]
            for address, method, requests, said in calls:
                _, output, errors = await reflect(address, f"understudy.v1.{method}", *requests)
                assert said in output + errors, method


async def test_the_tour_plays_an_episode_that_the_learner_keeps(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with environments() as environment, engine(bundle, [CALL, "0"]) as inference:
        async with intake(make_config(tmp_path, bundle), published=False) as (server, learner):
            async with BatchClient.connect(learner) as batches:
                epoch = await batches.start_training("run")
            async with WeightClient.connect(learner) as weights:
                await weights.publish({"w": np.ones(4, "f4")}, step=0, epoch=epoch, run_id="run")
            network = {"learner": learner, "inference": [inference], "envservers": [environment]}
            file = write_config(make_config(tmp_path, bundle, network=network), tmp_path)
            await talk_to_services.tour(talk_to_services.load_config(file))
            figures = server.intake.balance().figures()
            assert (figures["stored"], figures["leased"]) == (1, 0)
    said = capsys.readouterr().out
    assert f"learner at {learner}: SERVING" in said
    assert "echo-0: 2 turns, reward 1.0" in said
    assert "version 1 has 0 steps behind it" in said
    assert "tokens sent and acked" in said
    assert "FAILED_PRECONDITION (OLD_EPOCH): epoch 0; the present trainer's is 1" in said
