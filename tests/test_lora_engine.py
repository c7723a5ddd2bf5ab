"""Adapters that learn: trainer, store, deltas, vLLM, which is given them as adapters.

The same tolerance as for whole models in test_weights_engine.py.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.engine import EngineError, Generation, GenerationRequest, WeightLoadError
from inference.vllm_engine import VllmEngine
from inference.weights import Shadow
from learner.trainer.ranks import Ranks, joined
from understudy.config import InferenceConfig, LoraConfig, ModelConfig
from understudy.weights.adapter import CONFIG_FILE, describe_adapter, is_adapter
from understudy.weights.layout import plan_layout

from publishing import Case, Published  # isort: skip
from test_weights_engine import (  # isort: skip
    CASE as WHOLE,
    PROMPTS,
    TOLERANCE,
    a_late_replicas_greedy,
    following,
    greedy,
    learners_logprobs,
    publishing,
    wait_for_version,
)

NUM_UPDATES = 8
NUM_TOKENS = 400
CASE = Case(
    model_type="qwen3",
    tied=True,
    dtype="bfloat16",
    sizes={**WHOLE.sizes, "max_position_embeddings": 512},
    # Part of the fused q, k, v only, as vLLM has them; an alpha that is no multiple of the rank.
    lora={"rank": 4, "alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]},
)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


async def publish(run: Published, step: int, engine: VllmEngine) -> None:
    """Publish the policy as it is and wait until the engine serves it."""
    run.publisher.submit(step)
    await asyncio.to_thread(run.publisher.flush)
    await wait_for_version(engine, run.publisher.version)


async def assert_equal_logprobs(run: Published, engine: VllmEngine) -> None:
    for prompt in PROMPTS:
        gap = np.abs(await engine.prompt_logprobs(prompt) - learners_logprobs(run, prompt))
        assert gap.mean() < TOLERANCE[0]
        assert gap.max() < TOLERANCE[1]


def sampled(engine: VllmEngine) -> asyncio.Task[Generation]:
    """A long reply, under way."""
    request = GenerationRequest(
        request_id="running", prompt_token_ids=PROMPTS[0], temperature=1.0,
        max_new_tokens=NUM_TOKENS,
    )  # fmt: skip
    return asyncio.create_task(engine.generate(request))


def weights(run: Published) -> list[torch.Tensor]:
    return [p.detach().to_local().clone() for _, p in run.policy.trained_parameters()]


def restore(run: Published, saved: list[torch.Tensor]) -> None:
    for (_, parameter), values in zip(run.policy.trained_parameters(), saved, strict=True):
        parameter.detach().to_local().copy_(values)


def assert_spans_are_of_their_versions(
    run: Published, reply: Generation, states: dict[int, list[torch.Tensor]]
) -> None:
    """Each token of a reply has the log-probability that the version in its span gives it."""
    tokens = np.concatenate([PROMPTS[0], reply.token_ids])
    first, now = len(PROMPTS[0]) - 1, weights(run)
    assert len(reply.version_spans) > 1
    for span in reply.version_spans:
        restore(run, states[span.version])
        expected = learners_logprobs(run, tokens)[first + span.start : first + span.end]
        gap = np.abs(reply.logprobs[span.start : span.end] - expected)
        assert gap.mean() < TOLERANCE[0]
        assert gap.max() < TOLERANCE[1]
    restore(run, now)


def assert_private(folder: Path, names: list[str]) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == names


async def refuses_half_an_adapter(engine: VllmEngine) -> None:
    loaded = engine._loaded
    assert loaded is not None
    kept = [e for e in loaded.layout if not e.name.endswith("layers.1.mlp.down_proj.lora_B.weight")]
    half = Shadow(plan_layout((e.name, e.dtype, e.shape) for e in kept))
    for entry, data in half:
        data[:] = loaded.tensor_bytes(entry.name)
    with pytest.raises(WeightLoadError, match=r"layers.1.mlp.down_proj: lora_A \[4, 128\]"):
        await engine.load_weights(half, engine.version + 1)
    half.close()


async def heals_what_vllm_refuses(run: Published, engine: VllmEngine) -> None:
    """vLLM finds an adapter that fits nothing only once the pause has begun."""
    loaded = engine._loaded
    assert loaded is not None
    names = [(e.name.replace("layers.1.", "layers.9."), e) for e in loaded.layout]
    wrong = Shadow(plan_layout((name, e.dtype, (*e.shape,)) for name, e in names))
    version = engine.version
    with pytest.raises(WeightLoadError):
        await engine.load_weights(wrong, version + 1)
    assert (engine.version, engine.failure) == (version, None)
    await assert_equal_logprobs(run, engine)
    wrong.close()


async def test_adapters_are_served_as_what_the_learner_has(tmp_path: Path, ranks: Ranks) -> None:
    reloads: list[int] = []
    states: dict[int, list[torch.Tensor]] = {}
    async with publishing(CASE, tmp_path, ranks, 512) as (config, address, run):
        async with following(config, address) as (engine, shelf):
            reload = engine._reload

            async def counted(shadow: Shadow) -> None:
                reloads.append(shadow.version)
                await reload(shadow)

            engine._reload = counted
            for step in range(NUM_UPDATES + 1):
                if step:
                    run.step(step, rate=1e-2)
                states[step + 1] = weights(run)
                if step == NUM_UPDATES:
                    running = sampled(engine)
                    await asyncio.sleep(0.1)
                await publish(run, step, engine)
                if step == NUM_UPDATES:
                    assert_spans_are_of_their_versions(run, await running, states)
                await assert_equal_logprobs(run, engine)
            assert reloads == [1]  # the model itself, once
            adapters = engine._adapters
            assert adapters is not None
            assert_private(Path(adapters._folder.name), [str(NUM_UPDATES + 1)])
            newest = shelf.links.newest
            changed = {piece.name for piece in newest.manifest.slices if piece.num_bytes}
            assert changed
            assert all(is_adapter(name) for name in changed)
            replies = [await greedy(engine, prompt) for prompt in PROMPTS]
            late = await a_late_replicas_greedy(config, address, engine.version)
            assert late == replies
            await refuses_half_an_adapter(engine)
            await heals_what_vllm_refuses(run, engine)
        assert not adapters.served.exists()


async def test_a_mixture_with_adapters_is_refused_on_cpus(tmp_path: Path) -> None:
    case = Case(model_type="qwen3_moe", tied=False, dtype="bfloat16", num_experts=2)
    folder = case.make_bundle(tmp_path)
    lora = LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    (folder / CONFIG_FILE).write_bytes(describe_adapter(lora))
    engine = VllmEngine(InferenceConfig(), ModelConfig(path=folder, dtype="bfloat16"))
    with pytest.raises(EngineError, match="experts = 2, and a mixture with adapters"):
        await engine.start(folder)
    await engine.stop()
