"""The servicer and the process round it, on real gRPC with the scripted engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from inference.scripted import LOGPROB, ScriptedEngine
from inference.server import serve_inference
from inference.servicer import InferenceServicer
from inference_helpers import VOCABULARY, WeightStore, fill_shadow, pack, write_word_bundle
from understudy.client import ControlClient, InferenceClient
from understudy.config import Config, InferenceConfig, NetworkConfig, ScriptedConfig
from understudy.rpc import RoleControl, RoleServer, Service, error_reason, retry_after_seconds
from understudy.trajectory import VersionSpan
from understudy.v1 import common_pb2, inference_pb2, inference_pb2_grpc

STOP, HELLO, WORLD, OK = (VOCABULARY.index(w) for w in ("<|im_end|>", "hello", "world", "ok"))
PROMPT = np.array([2, 3], np.int32)
SAMPLING = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=8)
WEIGHTS = {"model.norm.weight": np.ones(8, np.float32)}
CONFIG = InferenceConfig(
    max_model_len=64,
    max_queued_tokens=100,
    scripted=ScriptedConfig(latency_seconds=0.0, replies=("hello world", "ok")),
)


class Serving:
    """A served scripted engine and a client of it."""

    engine: ScriptedEngine
    servicer: InferenceServicer
    control: RoleControl
    client: InferenceClient


@contextlib.asynccontextmanager
async def serving(folder: Path, config: InferenceConfig, version: int = 4) -> AsyncIterator[Any]:
    found = Serving()
    found.engine = ScriptedEngine(config)
    await found.engine.start(write_word_bundle(folder / "bundle"))
    if version:
        await found.engine.load_weights(fill_shadow(WEIGHTS), version)
    found.control = RoleControl("inference")
    found.servicer = InferenceServicer(found.engine, config, found.control)
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    service = Service(name="understudy.v1.InferenceService", add=add, servicer=found.servicer)
    server = RoleServer("inference", "127.0.0.1:0", NetworkConfig(), [service], found.control)
    port = await server.bind()
    await server.set_serving()
    async with InferenceClient.connect(f"127.0.0.1:{port}") as found.client:
        yield found
    await server.stop(0)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving(tmp_path, CONFIG) as found:
        yield found


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_script_plays_per_prefix_key(served: Serving) -> None:
    replies = [
        (await served.client.generate(PROMPT, SAMPLING, prefix_key=key)).token_ids.tolist()
        for key in ("a", "a", "b", "a")
    ]
    first, second = [HELLO, WORLD, STOP], [OK, STOP]
    assert replies == [first, second, first, second]


async def test_reply_carries_logprobs_and_spans(served: Serving) -> None:
    reply = await served.client.generate(PROMPT, SAMPLING)
    assert reply.logprobs.tolist() == [LOGPROB] * 3
    assert reply.version_spans == (VersionSpan(version=4, start=0, end=3),)
    assert not reply.cut_off


async def test_reply_is_cut_at_the_context(served: Serving) -> None:
    prompt = np.full(62, HELLO, np.int32)
    reply = await served.client.generate(prompt, SAMPLING)
    assert len(reply.token_ids) == 2
    assert reply.cut_off


async def test_model_is_described(served: Serving) -> None:
    answer = await served.client.describe()
    assert (answer.engine, answer.version, answer.vocab_size, answer.max_model_len) == (
        "scripted", 4, 7, 64,
    )  # fmt: skip


def request(**changes: Any) -> inference_pb2.GenerateRequest:
    sampling = {"temperature": 1.0, "max_new_tokens": 8}
    fields: dict[str, Any] = {"prompt_token_ids": PROMPT.tobytes()}
    for name, value in changes.items():
        (fields if name in ("prompt_token_ids", "prefix_key") else sampling)[name] = value
    return inference_pb2.GenerateRequest(
        sampling=common_pb2.SamplingParameters(**sampling), **fields
    )


def ids(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


@pytest.mark.parametrize(
    ("changes", "reason", "says"),
    [
        ({"prompt_token_ids": b""}, "BAD_PROMPT", "0 bytes"),
        ({"prompt_token_ids": b"12345"}, "BAD_PROMPT", "5 bytes"),
        ({"prompt_token_ids": ids(1, -1)}, "BAD_PROMPT", "-1"),
        ({"prompt_token_ids": ids(7)}, "BAD_PROMPT", "0 to 6"),
        ({"prompt_token_ids": ids(*[1] * 64)}, "BAD_PROMPT", "max_model_len = 64"),
        ({"prefix_key": "k" * 65}, "BAD_PROMPT", "64 bytes"),
        ({"max_new_tokens": 0}, "BAD_SAMPLING", "max_new_tokens = 0"),
        ({"max_new_tokens": 64}, "BAD_SAMPLING", "1 to 63"),
        ({"temperature": float("nan")}, "BAD_SAMPLING", "temperature = nan"),
        ({"temperature": float("inf")}, "BAD_SAMPLING", "temperature = inf"),
        ({"temperature": -0.5}, "BAD_SAMPLING", "temperature = -0.5"),
        ({"temperature": 10.5}, "BAD_SAMPLING", "0 (greedy) to 10"),
        ({"stop_token_ids": [1] * 17}, "BAD_SAMPLING", "at most 16"),
        ({"stop_token_ids": [7]}, "BAD_SAMPLING", "stop token id 7"),
        ({"seed": 2**63}, "BAD_SAMPLING", "seed"),
    ],
)
async def test_bad_input_is_named(
    served: Serving, changes: dict[str, Any], reason: str, says: str
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(served.client.channel)
    error = await refused(stub.Generate(request(**changes)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_reason(error) == reason
    assert says in (error.details() or "")


async def test_call_without_sampling_is_refused(served: Serving) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(served.client.channel)
    error = await refused(
        stub.Generate(inference_pb2.GenerateRequest(prompt_token_ids=PROMPT.tobytes()))
    )
    assert error_reason(error) == "BAD_SAMPLING"


async def test_call_past_the_token_limit_gets_a_retry_hint(tmp_path: Path) -> None:
    slow = CONFIG.model_copy(update={"scripted": ScriptedConfig(latency_seconds=0.3)})
    async with serving(tmp_path, slow) as served:
        first = asyncio.create_task(
            served.client.generate(
                PROMPT, common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=60)
            )
        )
        await asyncio.sleep(0.1)
        large = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=50)
        error = await refused(served.client.generate(PROMPT, large))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_reason(error) == "QUEUE_FULL"
        assert retry_after_seconds(error) == pytest.approx(0.5)
        await first
        await served.client.generate(PROMPT, large)


async def test_call_before_first_weights_is_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG, version=0) as served:
        error = await refused(served.client.generate(PROMPT, SAMPLING))
        assert (error.code(), error_reason(error)) == (grpc.StatusCode.UNAVAILABLE, "NO_WEIGHTS")
        assert error_reason(await refused(served.client.describe())) == "NO_WEIGHTS"


async def test_version_that_is_not_served_yet_is_refused(served: Serving) -> None:
    await served.client.generate(PROMPT, SAMPLING, min_version=4)
    error = await refused(served.client.generate(PROMPT, SAMPLING, min_version=5))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error_reason(error) == "VERSION_NOT_REACHED"


async def test_cancelled_and_late_calls_give_their_tokens_back(tmp_path: Path) -> None:
    slow = CONFIG.model_copy(update={"scripted": ScriptedConfig(latency_seconds=30.0)})
    async with serving(tmp_path, slow) as served:
        call = asyncio.create_task(served.client.generate(PROMPT, SAMPLING))
        await asyncio.sleep(0.1)
        assert (served.servicer.num_requests, served.servicer.num_tokens) == (1, 10)
        call.cancel()
        error = await refused(served.client.generate(PROMPT, SAMPLING, timeout=0.1))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.sleep(0.1)
        assert (served.servicer.num_requests, served.servicer.num_tokens) == (0, 0)


async def test_keys_of_the_script_are_bounded(served: Serving, monkeypatch: Any) -> None:
    monkeypatch.setattr("inference.scripted._MAX_KEYS", 2)
    for key in "abcd":
        await served.client.generate(PROMPT, SAMPLING, prefix_key=key)
    assert list(served.engine._calls) == ["c", "d"]


async def test_process_serves_after_first_weights_and_drains(tmp_path: Path) -> None:
    store = WeightStore(write_word_bundle(tmp_path / "bundle"))
    learner = await store.start()
    address = f"unix:{tmp_path}/inference"
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "network": {"learner": learner},
            "inference": {
                "listen": address,
                "metrics_listen": "127.0.0.1:0",
                "engine": "scripted",
                "scripted": {"latency_seconds": 0.0},
            },
        }
    )
    life = asyncio.create_task(serve_inference(config))
    async with InferenceClient.connect(address) as client, ControlClient.connect(address) as role:
        await client.wait_ready()
        error = await refused(client.generate(PROMPT, SAMPLING))
        assert error_reason(error) == "NO_WEIGHTS"
        await store.announce(pack(WEIGHTS, 1))
        await store.wait_for_report(1)
        assert (await client.generate(PROMPT, SAMPLING)).token_ids.tolist() == [OK, STOP]
        assert (await client.describe()).bundle_digest == "b1"
        assert (await role.status()).figures["version"] == 1
        await role.drain()
        assert await life == 0
    await store.server.stop(0)
