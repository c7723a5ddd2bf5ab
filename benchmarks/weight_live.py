"""What an update costs those who generate: pause, freshness, and tokens lost.

    this process   a trainer's rank: real steps of Adam, the Publisher; and a client of Generate
    intake         with the weight store, its log on a real disk
    inference      vLLM with the model, on one thread

Nothing else runs: with two cores the replica has one, all others share the second.
"""

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.adam_steps import SIZES
from benchmarks.rollout import free_address
from benchmarks.slow_link import slow_link
from envserver.suites.practice.demonstrate import demonstrations
from learner.trainer.calls import connect
from learner.trainer.intake_client import IntakeClient
from learner.trainer.model import Policy, load_policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.packing import TokenSequence, pack
from learner.trainer.publish import Publisher
from learner.trainer.ranks import Ranks, joined
from learner.trainer.scratch import make_bundle
from understudy.client import InferenceClient
from understudy.config import Config, write_config
from understudy.supervisor import Supervisor
from understudy.v1 import common_pb2

LEARNING_RATE = 1e-6
WARMUP_UPDATES, UPDATES = 2, 10
"""Updates that are not counted, and that are."""
WINDOW_SECONDS, WINDOWS = 5.0, 6
"""Length of a window, one update long or without one, and how many there are of each kind."""
CONCURRENCY, REPLY_TOKENS, PROMPT_TOKENS = 16, 48, 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is updated."""

    dtype: str
    megabytes: int = 0
    """One of adam_steps.SIZES; 0 for the demo's model."""
    loaded: bool = True
    """Whether to measure what is lost under load; a large model is too slow for it on a CPU."""


SLOW_LINK_MB_PER_S = 1.0
"""Of the fetch that is to take long."""
MODELS = {
    "demo": Model(dtype="float32"),
    "34 MB": Model(dtype="bfloat16", megabytes=34),
    "135 MB": Model(dtype="bfloat16", megabytes=135, loaded=False),
}


def measure(
    name: str, kv_on_update: str = "refresh", link_mb_per_s: float | None = None
) -> dict[str, object]:
    """One model, on a disk that keeps what is written: the folder is here, not in /tmp.

    Args:
        name: of MODELS.
        kv_on_update: the replica's setting.
        link_mb_per_s: most that weights come by; what is lost under load is then not measured.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir=Path.cwd()) as folder:
        config = _config(Path(folder), MODELS[name], kv_on_update)
        config_file = str(write_config(config, config.run.path))
        with contextlib.ExitStack() as stack:
            supervisor = stack.enter_context(Supervisor(config.run.path / "logs"))
            ranks = stack.enter_context(joined())
            words = [sys.executable, "-m", "learner.intake", "--config", config_file]
            supervisor.start("intake", words)
            supervisor.wait_serving("intake", config.learner.listen, config.network, 60)
            rank = stack.enter_context(trainer(config, ranks))
            rank.publish()
            rank.flush()
            words = [sys.executable, "-m", "understudy.cli", "inference", "--config", config_file]
            if link_mb_per_s:
                link = stack.enter_context(slow_link(config.learner.listen, link_mb_per_s))
                words.append(f"--set=inference.weights.upstream={link}")
            supervisor.start("inference", words)
            supervisor.wait_serving("inference", config.inference.listen, config.network, 180)
            loaded = MODELS[name].loaded and not link_mb_per_s
            figures = uvloop.run(_measure(config, rank, loaded))
    what = {"model": name, "dtype": config.model.dtype, "kv_on_update": kv_on_update}
    return what | {"link_mb_per_s": link_mb_per_s} | figures


async def _measure(config: Config, rank: "Trainer", loaded: bool) -> dict[str, object]:
    async with InferenceClient.connect(config.inference.listen, config.network) as client:
        for _ in range(WARMUP_UPDATES):
            await _fresh_after(client, rank)
        before = await _pauses(config)
        fresh = [await _fresh_after(client, rank) for _ in range(UPDATES)]
        pause = await _pauses(config) - before
        assert pause[1] == UPDATES, "an update was left out"
        lost = await _throughput(client, rank) if loaded else {}
    return {
        "weights_mb": round(rank.num_bytes / 1e6, 1),
        "pause_ms": round(1000 * pause[0] / pause[1], 1),
        "fresh_after_ms": round(1000 * statistics.median(fresh)),
        **lost,
    }


async def _fresh_after(client: InferenceClient, rank: "Trainer") -> float:
    """Seconds from the end of a step to the first token of its version."""
    await asyncio.to_thread(rank.step)
    before, ended = await asyncio.to_thread(rank.flush), time.perf_counter()
    publishing = asyncio.create_task(asyncio.to_thread(rank.publish))
    rng = np.random.default_rng()
    sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=1)
    while True:
        prompt = rng.integers(rank.vocab_size, size=8, dtype="i4")
        reply = await client.generate(prompt, sampling)
        if reply.version_spans[-1].version > before:
            break
    fresh = time.perf_counter() - ended
    await publishing
    return fresh


async def _throughput(client: InferenceClient, rank: "Trainer") -> dict[str, float]:
    """Tokens a second with one update a window, and without; windows take turns.

    Both kinds have the trainer's step in them: what is compared is the update alone.
    """
    counted = {True: 0, False: 0}
    async with _load(client, rank.vocab_size) as count:
        await asyncio.sleep(WINDOW_SECONDS)
        for window in range(2 * WINDOWS):
            updates = window % 2 == 0
            first, end = count[0], time.perf_counter() + WINDOW_SECONDS
            await asyncio.to_thread(rank.step)
            if updates:
                await asyncio.to_thread(rank.publish)
            await asyncio.sleep(end - time.perf_counter())
            counted[updates] += count[0] - first
            await asyncio.to_thread(rank.flush)
    seconds = WINDOWS * WINDOW_SECONDS
    return {
        "tokens_per_s": round(counted[False] / seconds),
        "tokens_per_s_with_updates": round(counted[True] / seconds),
        "throughput_lost": round(1 - counted[True] / counted[False], 4),
    }


@contextlib.asynccontextmanager
async def _load(client: InferenceClient, vocab_size: int) -> AsyncIterator[list[int]]:
    """Keep slots busy with replies; yields a counter of their tokens."""
    count = [0]
    rng = np.random.default_rng(0)

    async def slot() -> None:
        while True:
            prompt = rng.integers(vocab_size, size=PROMPT_TOKENS, dtype="i4")
            length = int(rng.integers(1, 2 * REPLY_TOKENS))
            sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=length)
            reply = await client.generate(prompt, sampling)
            count[0] += len(reply.token_ids)

    slots = [asyncio.create_task(slot()) for _ in range(CONCURRENCY)]
    try:
        yield count
    finally:
        for each in slots:
            each.cancel()
        await asyncio.gather(*slots, return_exceptions=True)


class Trainer:
    """One rank that takes steps on made-up sequences and publishes them."""

    def __init__(self, policy: Policy, publisher: Publisher, config: Config, ranks: Ranks) -> None:
        self._policy = policy
        self._publisher = publisher
        self._ranks = ranks
        self._optimizer = Optimizer(list(policy.parameters()), config.learner.train)
        self._rng = np.random.default_rng(0)
        self._num_steps = 0
        self.vocab_size = int(policy.language_model.config.vocab_size)
        item = {"float32": 4, "bfloat16": 2}[config.model.dtype]
        self.num_bytes = item * sum(each.numel() for each in policy.parameters())
        """Of the served weights."""

    def step(self) -> None:
        """One step of Adam on a few random sequences."""
        rows = self._rng.integers(self.vocab_size, size=(4, 32), dtype="i4")
        mask = np.arange(32) > 0
        sequences = [TokenSequence(token_ids=row, loss_mask=mask) for row in rows]
        loss = -self._policy(pack(sequences, self._ranks.device)).logprobs_N.mean()
        loss.backward()
        self._optimizer.step(LEARNING_RATE)
        self._num_steps += 1

    def publish(self) -> None:
        """Hand the weights to the Publisher's thread."""
        self._publisher.submit(self._num_steps)

    def flush(self) -> int:
        """Wait for the commit; returns its version."""
        self._publisher.flush()
        return self._publisher.version


@contextlib.contextmanager
def trainer(config: Config, ranks: Ranks) -> Iterator[Trainer]:
    """Begin an epoch with the run's model."""
    policy = load_policy(config, ranks)
    with connect(config.network) as channel:
        epoch = IntakeClient(channel, config, ranks).start_training(0, b"")
        with contextlib.closing(Publisher(policy, epoch, config, ranks)) as publisher:
            yield Trainer(policy, publisher, config, ranks)


async def _pauses(config: Config) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """[seconds, number] of pauses so far; a first token may be there before its update counts."""
    await asyncio.sleep(0.5)
    return await asyncio.to_thread(_read_pauses, config)


def _read_pauses(config: Config) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    with urlopen(f"http://{config.inference.metrics_listen}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    name = "understudy_generation_pause_seconds"
    samples = {
        s.name: s.value for family in families if family.name == name for s in family.samples
    }
    return np.array([samples[f"{name}_sum"], samples[f"{name}_count"]])


def _config(folder: Path, model: Model, kv_on_update: str) -> Config:
    _write_model(folder / "model", model)
    listen = {role: free_address() for role in ("intake", "inference")}
    return Config.model_validate(
        {
            "run": {"name": "bench", "directory": folder},
            "model": {"path": folder / "model", "dtype": model.dtype, "tools": "signatures"},
            "network": {"learner": listen["intake"], "inference": [listen["inference"]]},
            "inference": {
                "listen": listen["inference"],
                "metrics_listen": free_address(),
                "cpus": [0],
                "threads": 1,
                "max_model_len": 512,
                "max_running": 64,
                "enforce_eager": True,
                "kv_on_update": kv_on_update,
                "cpu_kv_cache_gib": 0.5,
            },
            "learner": {
                "listen": listen["intake"],
                "metrics_listen": free_address(),
                "tasks": {"suite": "practice", "max_tokens": 400},
            },
        }
    )


def _write_model(folder: Path, model: Model) -> None:
    """The demo's model, or its tokenizer with a larger model."""
    from transformers import Qwen3ForCausalLM

    make_bundle(list(demonstrations(64, seed=1)), folder, seed=1)
    if not model.megabytes:
        return
    torch.manual_seed(0)
    larger = Qwen3ForCausalLM(SIZES[model.megabytes].config())
    larger.generation_config.eos_token_id = json.loads(
        (folder / "generation_config.json").read_text()
    )["eos_token_id"]
    larger.save_pretrained(folder)
