"""vLLM with weights that change under it, against transformers. One engine for all tests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from conftest import serving
from inference.engine import EngineError, Generation, GenerationRequest, WeightLoadError
from inference.servicer import InferenceServicer
from inference.subscriber import WeightSubscriber
from inference.vllm_engine import VllmEngine
from inference_helpers import WeightStore, fill_shadow, pack, upstream_of
from practice_agents import play_practice
from recording_helpers import client_of, recordings
from test_actor import make_lease
from understudy.chat import ChatFormat
from understudy.config import InferenceConfig, ModelConfig
from understudy.rpc import RoleControl, Service
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import common_pb2, inference_pb2_grpc, weight_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

VOCAB_SIZE = 320
PROMPT = (np.arange(40, dtype=np.int32) * 7) % VOCAB_SIZE
TOLERANCE = 1e-4


def make_model(seed: int, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        architectures=["Qwen3ForCausalLM"],
    )
    return Qwen3ForCausalLM(config).float().eval()


def checkpoint(model: Qwen3ForCausalLM) -> dict[str, np.ndarray]:
    """Tensors as a checkpoint has them: a tied output layer is not written."""
    tied = model.config.tie_word_embeddings
    return {
        name: value.detach().numpy()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def reference_logprobs(
    model: Qwen3ForCausalLM, token_ids: IntArray, temperature: float = 1.0
) -> FloatArray:
    """[N-1] log-probability of each token but the first, by transformers."""
    ids = torch.tensor(token_ids, dtype=torch.long)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0] / temperature, -1)
    return logprobs[:-1].gather(1, ids[1:, None])[:, 0].numpy()


async def start_engine(folder: Path, model: Qwen3ForCausalLM, kv_on_update: str) -> VllmEngine:
    model.config.save_pretrained(folder)
    config = InferenceConfig(
        max_model_len=1024, max_running=16, enforce_eager=True, cpu_kv_cache_gib=0.25,
        kv_on_update=kv_on_update,
    )  # fmt: skip
    engine = VllmEngine(config, ModelConfig(path=folder, dtype="float32"))
    await engine.start(folder)
    return engine


class Served:
    """The engine and the model whose weights it has."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self.model = make_model(0)
        self._calls = 0

    async def load(self, seed: int) -> float:
        self.model = make_model(seed)
        shadow = fill_shadow(checkpoint(self.model))
        return await self.engine.load_weights(shadow, self.engine.version + 1)

    def request(self, max_new_tokens: int = 24, temperature: float = 1.0, **more: object) -> object:
        self._calls += 1
        return GenerationRequest(
            request_id=f"test-{self._calls}", prompt_token_ids=PROMPT,
            temperature=temperature, max_new_tokens=max_new_tokens, **more,
        )  # fmt: skip

    async def generate(self, *arguments: object, **more: object) -> Generation:
        return await self.engine.generate(self.request(*arguments, **more))

    async def idle(self) -> bool:
        """Whether the core holds no request: only then can all its KV blocks be dropped."""
        return await self.engine._llm.reset_prefix_cache()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    engine = await start_engine(tmp_path_factory.mktemp("tied"), make_model(0), "refresh")
    found = Served(engine)
    await found.load(0)
    yield found
    await engine.stop()


@asynccontextmanager
async def serve_engine(engine: VllmEngine) -> AsyncIterator[str]:
    """An inference server of an engine that runs."""
    control = RoleControl("inference")
    control.serving()
    service = Service(
        name="understudy.v1.InferenceService",
        add=inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        servicer=InferenceServicer(engine, InferenceConfig(), control),
    )
    async with serving(service, role="inference") as address:
        yield address


async def test_greedy_reply_takes_the_likeliest_token(served: Served) -> None:
    reply = await served.generate(temperature=0.0)
    tokens = np.concatenate([PROMPT, reply.token_ids])
    with torch.no_grad():
        logits = served.model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]
    expected = logits.argmax(-1)[len(PROMPT) - 1 : -1].numpy()
    np.testing.assert_array_equal(reply.token_ids, expected)
    assert (len(reply.token_ids), reply.finish_reason) == (24, "length")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_those_of_the_sampled_distribution(
    served: Served, temperature: float
) -> None:
    reply = await served.generate(temperature=temperature)
    tokens = np.concatenate([PROMPT, reply.token_ids])
    expected = reference_logprobs(served.model, tokens, temperature)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(reply.logprobs, expected, atol=TOLERANCE)


async def test_replies_in_one_batch_have_right_logprobs(served: Served) -> None:
    for reply in await asyncio.gather(*(served.generate() for _ in range(16))):
        tokens = np.concatenate([PROMPT, reply.token_ids])
        expected = reference_logprobs(served.model, tokens)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(reply.logprobs, expected, atol=TOLERANCE)


async def test_what_the_recording_endpoint_records_is_what_was_sampled(
    served: Served, chat: ChatFormat, bundle: Path
) -> None:
    """A plain client's conversation of three turns, and one that forks off after the first."""
    async with serve_engine(served.engine) as inference:
        async with recordings(chat, bundle, inference) as endpoint:
            lease = make_lease("echo", 0, max_tokens=500, max_turns=9)
            lease.sampling.max_new_tokens = 24
            with endpoint.session(lease) as session:
                client = client_of(session.url)
                first = await _turns(client, [{"role": "user", "content": "Say 7."}], 3)
                await _turns(client, [*first[:2], {"role": "user", "content": "Or 8."}], 1)
    segments = session.recorder.segments()
    assert [len(segment.logprobs) for segment in segments] == [72, 24]
    np.testing.assert_array_equal(  # a fork has the very tokens that were sampled before it
        segments[1].token_ids[: len(chat.encode("<|im_start|>user\nSay 7.")) + 24],
        segments[0].token_ids[: len(chat.encode("<|im_start|>user\nSay 7.")) + 24],
    )
    for segment in segments:
        expected = reference_logprobs(served.model, segment.token_ids)[segment.loss_mask[1:]]
        np.testing.assert_allclose(segment.logprobs, expected, atol=TOLERANCE)
        replayed = await served.engine.prompt_logprobs(segment.token_ids)
        again = replayed[segment.loss_mask[1:]]
        np.testing.assert_allclose(segment.logprobs, again, atol=TOLERANCE)


async def _turns(client: Any, messages: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Talk on; an untrained model says anything, and never ends by itself."""
    messages = list(messages)
    for _ in range(number):
        completion = await client.chat.completions.create(model="m", messages=messages)
        content = completion.choices[0].message.content
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "On."}]
    return messages


class Prompted(ChatFormat):
    """Reads the next line of a script in whatever was sampled, which stays as it was sampled."""

    lines: tuple[str, ...] = ()

    def decode(self, token_ids: IntArray) -> str:
        if not self.lines:
            return super().decode(token_ids)
        line, *self.lines = self.lines
        return line


async def test_all_parts_of_an_agent_are_recorded_as_they_were_sampled(
    served: Served, bundle: Path
) -> None:
    """A planner, and a searcher that does not learn. The model is untrained: what it samples is
    taken for their lines, and every twentieth token for the end of a reply."""
    chat = Prompted.load(bundle, "signatures")
    chat.stop_token_ids = tuple(range(0, VOCAB_SIZE, 20))
    chat.stop_texts = dict.fromkeys(chat.stop_token_ids, "<|im_end|>")
    ask = '<tool_call>{"name": "searcher", "arguments": {"request": "Which age?"}}</tool_call>'
    look = '<tool_call>{"name": "lookup", "arguments": {"entity": "A", "field": "age"}}</tool_call>'
    chat.lines = (ask, look, "Nobody.", ask, "Still nobody.", "unknown")
    agents = {
        "planner": {"system": "Plan.", "tools": [], "sub_agents": ["searcher"]},
        "searcher": {"system": "Look it up.", "tools": ["lookup"], "trainable": False},
    }
    lease = make_lease("practice", 3, max_tokens=1000, max_turns=9)
    lease.sampling.MergeFrom(common_pb2.SamplingParameters(max_new_tokens=300, seed=5))
    async with serve_engine(served.engine) as inference:
        trajectory = await play_practice(chat, bundle, inference, agents, lease)
    assert trajectory.detail == ""
    parts = [(segment.part, segment.frozen) for segment in trajectory.segments]
    assert parts == [("planner", False), *[("searcher", True)] * 2]
    assert [turn.segment for turn in trajectory.turns] == [0, 1, 1, 0, 2, 0]
    for segment in trajectory.segments:
        assert {span.version for span in segment.version_spans} == {served.engine.version}
        expected = reference_logprobs(served.model, segment.token_ids)[segment.loss_mask[1:]]
        np.testing.assert_allclose(segment.logprobs, expected, atol=TOLERANCE)
        replayed = await served.engine.prompt_logprobs(segment.token_ids)
        again = replayed[segment.loss_mask[1:]]
        np.testing.assert_allclose(segment.logprobs, again, atol=TOLERANCE)
    assert len({segment.logprobs[0] for segment in trajectory.segments}) == 3  # seeds of their own


async def test_seed_repeats_a_reply(served: Served) -> None:
    first, second, other = [await served.generate(seed=seed) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    assert not np.array_equal(first.token_ids, other.token_ids)


async def test_stop_token_ends_the_reply_and_is_part_of_it(served: Served) -> None:
    whole = await served.generate(temperature=0.0)
    stop = int(whole.token_ids[3])
    reply = await served.generate(temperature=0.0, stop_token_ids=(stop,))
    end = whole.token_ids.tolist().index(stop) + 1
    assert reply.token_ids.tolist() == whole.token_ids[:end].tolist()
    assert (len(reply.logprobs), reply.finish_reason) == (end, "stop")


async def test_cancelled_request_is_gone_from_the_engine(served: Served) -> None:
    running = asyncio.create_task(served.generate(400))
    await asyncio.sleep(0.1)
    assert not await served.idle()
    running.cancel()
    async with asyncio.timeout(10):
        while not await served.idle():  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(0.02)


async def test_new_weights_are_served_exactly(served: Served) -> None:
    for seed in (1, 2):
        await served.load(seed)
        got = await served.engine.prompt_logprobs(PROMPT)
        np.testing.assert_allclose(got, reference_logprobs(served.model, PROMPT), atol=TOLERANCE)
        reply = await served.generate()
        (span,) = reply.version_spans
        assert (span.version, span.start, span.end) == (served.engine.version, 0, 24)


async def test_running_request_goes_on_under_new_weights(served: Served) -> None:
    old = served.model
    running = asyncio.create_task(served.generate(400))
    await asyncio.sleep(0.15)
    await served.load(3)
    reply = await running
    before, after = reply.version_spans
    assert (before.version, after.version) == (served.engine.version - 1, served.engine.version)
    assert (before.start, before.end, after.end) == (0, after.start, 400)
    tokens = np.concatenate([PROMPT, reply.token_ids])
    first = len(PROMPT) - 1
    for span, model in ((before, old), (after, served.model)):
        expected = reference_logprobs(model, tokens)[first + span.start : first + span.end]
        np.testing.assert_allclose(reply.logprobs[span.start : span.end], expected, atol=TOLERANCE)


async def test_many_updates_while_generating_lose_nothing(served: Served) -> None:
    running = [asyncio.create_task(served.generate(200, seed=index)) for index in range(8)]
    first = served.engine.version
    pauses = [await served.load(seed) for seed in range(10, 15)]
    for reply in await asyncio.gather(*running):
        ends = [span.end for span in reply.version_spans]
        assert [0, *ends[:-1]] == [span.start for span in reply.version_spans]
        assert ends[-1] == len(reply.token_ids) == len(reply.logprobs) == 200
        assert all(first <= span.version <= first + 5 for span in reply.version_spans)
    assert max(pauses) < 2.0


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
async def test_incomplete_weights_are_refused_and_the_old_ones_come_back(
    served: Served, lost: str
) -> None:
    tensors = checkpoint(make_model(20))
    del tensors[lost]
    version = served.engine.version
    with pytest.raises(WeightLoadError, match="lacks weights"):
        await served.engine.load_weights(fill_shadow(tensors), version + 1)
    assert served.engine.version == version
    got = await served.engine.prompt_logprobs(PROMPT)
    np.testing.assert_allclose(got, reference_logprobs(served.model, PROMPT), atol=TOLERANCE)
    await served.load(21)
    got = await served.engine.prompt_logprobs(PROMPT)
    np.testing.assert_allclose(got, reference_logprobs(served.model, PROMPT), atol=TOLERANCE)


async def test_patch_that_cannot_be_applied_is_healed_by_loading_everything(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(served.engine, "_patches", True)  # on CPUs linear layers are packed
    model = make_model(22)
    await served.load(22)
    with torch.no_grad():
        for value in model.parameters():
            value.view(-1)[::7] += 0.01
    version = served.engine.version + 1
    await served.engine.load_weights(fill_shadow(checkpoint(model)), version)
    assert "patch of the weights failed half-way" in caplog.text
    served.model = model
    got = await served.engine.prompt_logprobs(PROMPT)
    np.testing.assert_allclose(got, reference_logprobs(model, PROMPT), atol=TOLERANCE)
    (span,) = (await served.generate()).version_spans
    assert span.version == version


async def test_requests_run_on_while_deltas_from_the_store_are_applied(
    served: Served, tmp_path: Path
) -> None:
    model, store = make_model(40), WeightStore(tmp_path)
    tensors, version = checkpoint(model), served.engine.version + 1
    async with upstream_of(await store.start()) as upstream:
        task = asyncio.create_task(WeightSubscriber(upstream, served.engine, "replica").run())
        await store.announce(pack(tensors, version))
        await store.wait_for_report(version)
        running = [asyncio.create_task(served.generate(400, seed=index)) for index in range(4)]
        for _ in range(3):
            await asyncio.sleep(0.1)
            before = {name: value.copy() for name, value in tensors.items()}
            for value in tensors.values():  # these are the model's own
                value.reshape(-1)[::50] += 0.01
            version += 1
            await store.announce(pack(tensors, version, base=(version - 1, before)))
            await store.wait_for_report(version)
        for reply in await asyncio.gather(*running):
            versions = [span.version for span in reply.version_spans]
            assert versions == sorted(versions)
            assert set(versions) <= set(range(version - 3, version + 1))
            assert len(versions) > 1
            assert reply.version_spans[-1].end == 400
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await store.server.stop(0)
    served.model = model
    assert [request.base_version for request in store.requests] == [
        0,
        version - 3,
        version - 2,
        version - 1,
    ]
    got = await served.engine.prompt_logprobs(PROMPT)
    np.testing.assert_allclose(got, reference_logprobs(model, PROMPT), atol=TOLERANCE)


async def test_store_to_engine_agrees_with_the_learner(served: Served, tmp_path: Path) -> None:
    model = make_model(30)
    probe = weight_pb2.LogprobProbe(
        token_ids=PROMPT.astype("<i4").tobytes(),
        logprobs=reference_logprobs(model, PROMPT).astype("<f4").tobytes(),
    )
    store = WeightStore(tmp_path)
    version = served.engine.version + 1
    async with upstream_of(await store.start()) as upstream:
        subscriber = WeightSubscriber(upstream, served.engine, "replica")
        task = asyncio.create_task(subscriber.run())
        await store.announce(pack(checkpoint(model), version, probe=probe))
        report = await store.wait_for_report(version)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await store.server.stop(0)
    served.model = model
    assert report.mismatch_max < TOLERANCE
    assert 0 < report.pause_seconds < report.apply_seconds < 5


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def untied(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    model = make_model(0, tied=False)
    engine = await start_engine(tmp_path_factory.mktemp("untied"), model, "keep")
    yield engine
    await engine.stop()


async def test_untied_model_is_served_exactly(untied: VllmEngine) -> None:
    for version in (1, 2):
        model = make_model(version, tied=False)
        await untied.load_weights(fill_shadow(checkpoint(model)), version)
        got = await untied.prompt_logprobs(PROMPT)
        np.testing.assert_allclose(got, reference_logprobs(model, PROMPT), atol=TOLERANCE)


async def test_kept_keys_and_values_do_not_reach_new_requests(untied: VllmEngine) -> None:
    request = GenerationRequest(
        request_id="running", prompt_token_ids=PROMPT, temperature=1.0, max_new_tokens=400
    )
    running = asyncio.create_task(untied.generate(request))
    await asyncio.sleep(0.1)
    model = make_model(3, tied=False)
    await untied.load_weights(fill_shadow(checkpoint(model)), 3)
    answer = await untied.generate(
        GenerationRequest(
            request_id="new", prompt_token_ids=PROMPT, temperature=1.0, max_new_tokens=8
        )
    )
    tokens = np.concatenate([PROMPT, answer.token_ids])
    expected = reference_logprobs(model, tokens)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(answer.logprobs, expected, atol=TOLERANCE)
    assert [span.version for span in (await running).version_spans] == [2, 3]


async def test_routes_are_refused_on_cpus(tmp_path: Path) -> None:
    make_model(0).config.save_pretrained(tmp_path)
    model = ModelConfig(path=tmp_path, dtype="float32", router_replay=True)
    with pytest.raises(EngineError, match="router_replay = true, but vLLM records routes on GPUs"):
        await VllmEngine(InferenceConfig(), model).start(tmp_path)


async def test_core_that_dies_fails_its_requests_and_is_reported(untied: VllmEngine) -> None:
    request = GenerationRequest(
        request_id="lost", prompt_token_ids=PROMPT, temperature=1.0, max_new_tokens=400
    )
    running = asyncio.create_task(untied.generate(request))
    await asyncio.sleep(0.1)
    assert untied.failure is None
    (core,) = untied._llm.engine_core.resources.engine_manager.processes
    core.kill()
    with pytest.raises(EngineError, match="restart this replica"):
        await running
    assert untied.failure
    with pytest.raises(EngineError):
        await untied.load_weights(fill_shadow(checkpoint(make_model(4, tied=False))), 4)
