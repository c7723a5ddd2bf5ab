"""Fifty updates of a bfloat16 model: trainer, store, deltas, vLLM.

After each one the engine computes what the learner computes, and replicas that join late answer as
the one that was there throughout.
"""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.engine import GenerationRequest
from inference.shelf import Shelf
from inference.subscriber import WeightSubscriber
from inference.vllm_engine import VllmEngine
from inference_helpers import upstream_of
from learner.intake.server import IntakeServer
from learner.trainer.intake_client import IntakeClient
from learner.trainer.model import frozen_output
from learner.trainer.packing import TokenSequence, pack
from learner.trainer.ranks import Ranks, joined
from understudy.client import InferenceClient, fetch_model_bundle
from understudy.config import Config, LoraConfig, NetworkConfig, write_config
from understudy.rpc import open_sync_channel
from understudy.supervisor import Supervisor
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import common_pb2

from intake_rig import make_config  # isort: skip
from publishing import VOCAB_SIZE, Case, Published  # isort: skip

NUM_UPDATES = 50
LATE = (25, 50)
"""Updates after which a replica joins."""
TOLERANCE = 0.005, 0.05
"""Mean and largest difference of log-probabilities, in nats. Both sides compute in bfloat16, which
knows a logit of 4 to within 0.016."""
NUM_TOKENS = 48
CASE = Case(
    model_type="qwen3",
    tied=True,
    dtype="bfloat16",
    sizes={"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32},
)
PROMPTS = [
    np.random.default_rng(seed).integers(VOCAB_SIZE, size=40, dtype="i4") for seed in range(4)
]
"""Fixed token sequences that are compared after every update."""


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


def learners_logprobs(run: Published, token_ids: IntArray) -> FloatArray:
    """[N-1] what the trainer computes in bfloat16."""
    mask = np.arange(len(token_ids)) > 0
    sequence = TokenSequence(token_ids=token_ids, loss_mask=mask)
    packed = pack([sequence], torch.device("cpu"))
    return frozen_output(run.policy, packed).logprobs_N.numpy()


async def greedy(engine: VllmEngine, prompt: IntArray) -> list[int]:
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=prompt,
        temperature=0.0,
        max_new_tokens=NUM_TOKENS,
    )
    return list((await engine.generate(request)).token_ids)


@contextlib.asynccontextmanager
async def following(config: Config, address: str) -> AsyncIterator[tuple[VllmEngine, Shelf]]:
    """An engine in this process that follows the store."""
    engine, shelf = VllmEngine(config.inference, config.model), Shelf()
    async with upstream_of(address) as upstream:
        bundle = config.run.path / "bundle"
        bundle.mkdir()
        await fetch_model_bundle(upstream.channel, bundle)
        await engine.start(bundle)
        subscriber = asyncio.create_task(WeightSubscriber(upstream, engine, "first", shelf).run())
        yield engine, shelf
        subscriber.cancel()
        await asyncio.gather(subscriber, return_exceptions=True)
    await engine.stop()


async def wait_for_version(engine: VllmEngine, version: int) -> None:
    async with asyncio.timeout(60):
        while engine.version != version:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.005)


async def a_late_replicas_greedy(config: Config, address: str, version: int) -> list[list[int]]:
    """Greedy replies of a replica that starts now, from nothing but the store."""
    folder = config.run.path / f"late-{version}"
    folder.mkdir()
    listen = f"unix:{folder}/socket"
    late = {
        "network": NetworkConfig(learner=address),
        "inference": config.inference.model_copy(update={"listen": listen}),
    }
    file = write_config(config.model_copy(update=late), folder)
    with Supervisor(folder) as supervisor:
        command = ["inference", "--config", str(file)]
        supervisor.start("inference", [sys.executable, "-m", "understudy.cli", *command])
        await asyncio.to_thread(supervisor.wait_serving, "inference", listen, config.network, 120.0)
        sampling = common_pb2.SamplingParameters(temperature=0, max_new_tokens=NUM_TOKENS)
        async with InferenceClient(listen, config.network) as client:
            replies = [await client.generate(prompt, sampling) for prompt in PROMPTS]
    assert all([span.version for span in reply.version_spans] == [version] for reply in replies)
    return [list(reply.token_ids) for reply in replies]


@contextlib.asynccontextmanager
async def publishing(
    case: Case, folder: Path, ranks: Ranks, max_model_len: int = 128
) -> AsyncIterator[tuple[Config, str, Published]]:
    """A learner's intake with its weight store, its address, and a policy that publishes to it."""
    bundle = case.make_bundle(folder)
    config = make_config(folder, max_tokens=64, max_new_tokens=64)
    inference = {"max_model_len": max_model_len, "max_running": 8, "enforce_eager": True}
    updates = {
        "run": config.run.model_copy(update={"name": case.name}),
        "model": config.model.model_copy(update={"path": bundle, "dtype": case.dtype}),
        "inference": config.inference.model_copy(update={**inference, "cpu_kv_cache_gib": 0.25}),
        "learner": config.learner.model_copy(update={"lora": LoraConfig(**case.lora)}),
    }
    config = config.model_copy(update=updates)
    server = await IntakeServer.open(config)
    address = f"127.0.0.1:{await server.start()}"
    with open_sync_channel(address, config.network) as channel:
        intake = IntakeClient(channel, config, ranks)
        epoch = await asyncio.to_thread(intake.start_training, 0, b"")
    run = Published(bundle, case, address, ranks, epoch=epoch)
    try:
        yield config, address, run
    finally:
        run.publisher.close()
        await server.stop()


async def test_the_engine_computes_what_the_learner_does(tmp_path: Path, ranks: Ranks) -> None:
    async with publishing(CASE, tmp_path, ranks) as (config, address, run):
        await serve_updates(config, address, run)


async def serve_updates(config: Config, address: str, run: Published) -> None:
    """Follow fifty updates."""
    worst, moved = [], []
    before = [learners_logprobs(run, prompt) for prompt in PROMPTS]
    async with following(config, address) as (engine, shelf):
        for step in range(NUM_UPDATES + 1):
            if step:
                run.step(step, rate=1e-3)
            run.publisher.submit(step)
            await asyncio.to_thread(run.publisher.flush)
            version = run.publisher.version
            assert version == step + 1
            await wait_for_version(engine, version)
            after = [learners_logprobs(run, prompt) for prompt in PROMPTS]
            for prompt, expected in zip(PROMPTS, after, strict=True):
                gap = np.abs(await engine.prompt_logprobs(prompt) - expected)
                worst.append((gap.mean(), gap.max()))
            if step:
                moved.append(np.abs(np.subtract(after, before)).mean())
            before = after
            if step in LATE:
                replies = [await greedy(engine, prompt) for prompt in PROMPTS]
                assert await a_late_replicas_greedy(config, address, version) == replies
        assert shelf.links.newest.base_version == NUM_UPDATES  # it came as a delta
    means, maxima = zip(*worst, strict=True)
    print(
        f"differences: {np.mean(means):.5f} mean, {max(maxima):.4f} most; {min(moved):.5f} a step"
    )
    assert max(means) < TOLERANCE[0]
    assert max(maxima) < TOLERANCE[1]
    assert min(moved) > 2 * max(means)  # an engine that is one update behind would be seen
