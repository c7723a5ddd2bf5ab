"""Trainer: a step of packed episodes against a plain padded loop, interleaved in one run.

    {"bench": "trainer", "device": "cpu", "model": "demo", "pack_tokens": 4096, "compile": false,
     "tokens_per_s": ..., "baseline_tokens_per_s": ..., "ratio": ..., "ratio_shuffled": ...,
     "non_padding": ..., "baseline_non_padding": ..., "peak_mb": ..., "mfu": ...}

A step is everything from the episodes as arrays to changed weights: packing, passes, loss, AdamW.
The plain loop is what one writes first with transformers: rows as they come, padded to the longest,
the mask handed in, logits of all positions, the same loss and optimizer, as many tokens a
micro-batch. As they come, rows of one task are neighbours, and of like length; `ratio_shuffled` is
against the same loop with rows in random order, which pads more. Both loops depend on the size of a
pass, so that there is a line for learner.train's default and one for a size that fits a core's
cache better. `compile` is learner.train.compile, which the plain loop goes without. Lengths are
those of a batch that the demo recorded (episode_lengths.json).

On a CPU, tokens are counted a second of CPU time of one thread, and mfu is against the speed of one
large matrix product there. With a GPU at hand, shapes of Qwen3 with random weights are measured at
8k and 32k tokens a pack, without the plain loop, and mfu is against the device's own figure for
dense bfloat16; this has not been run.
"""

import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.trainer.algorithm import Algorithm
from learner.trainer.experience import Episode, Sample
from learner.trainer.model import load_policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from learner.trainer.scratch import small_config
from learner.trainer.update import Updater
from understudy.config import Config
from understudy.process import prepare_process
from understudy.v1 import batch_pb2

LENGTHS = Path(__file__).with_name("episode_lengths.json")
DEMO_VOCABULARY = 660
CASES = ((4096, False), (16_384, False), (4096, True))
"""Tokens a pass, and whether layers are compiled."""
ROUNDS = 7
RATE = 1e-4
QWEN3 = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "tie_word_embeddings": False},
}
"""Shapes from the models' own config.json."""
GPU_CASES = tuple((name, num_tokens) for name in QWEN3 for num_tokens in (8192, 32_768))
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Operations a second by NVIDIA's data sheets, without sparsity."""


def main() -> None:
    """Run what the machine can, each case in a process of its own, whose memory is its alone."""
    on_gpu = torch.cuda.is_available()
    spawn = multiprocessing.get_context("spawn")
    for case in GPU_CASES if on_gpu else CASES:
        child = spawn.Process(target=_measure, args=(_on_gpu if on_gpu else _on_cpu, *case))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(child.exitcode)
    if not on_gpu:
        _print({"model": list(QWEN3), "not_measured": "there is no GPU"})


def _measure(function: Callable[..., Mapping[str, object]], *case: object) -> None:
    prepare_process("benchmark", threads=1)
    transformers.logging.disable_progress_bar()
    with joined() as ranks, tempfile.TemporaryDirectory() as folder:
        _print(function(Path(folder), *case, ranks))


def _print(line: Mapping[str, object]) -> None:
    print(json.dumps({"bench": "trainer", **line}), flush=True)


def _on_cpu(folder: Path, num_tokens: int, compiled: bool, ranks: Ranks) -> dict[str, object]:
    if compiled and shutil.which("g++") is None:
        return {"compile": True, "not_measured": "there is no C++ compiler (g++)"}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(DEMO_VOCABULARY)).save_pretrained(folder)
    lengths = json.loads(LENGTHS.read_text())["episodes"]
    episodes = _episodes(lengths, DEMO_VOCABULARY)
    num_real = sum(episode.num_tokens for episode in episodes)
    packed = _Packed(_config(folder, "float32", num_tokens, compiled), episodes, ranks)
    packed.step()
    peak = _peak_mb(packed.step)
    shuffled = [episodes[index] for index in np.random.default_rng(1).permutation(len(episodes))]
    padded = _Padded(folder, episodes, num_tokens)
    loops: list[_Packed | _Padded] = [packed, padded, _Padded(folder, shuffled, num_tokens)]
    seconds: list[list[float]] = [[] for _ in loops]
    for index in range(ROUNDS + 1):
        for loop, measured in zip(loops, seconds, strict=True):
            start = time.process_time()
            loop.step()
            if index:  # the first one warms up
                measured.append(time.process_time() - start)
    ours, theirs, theirs_shuffled = (num_real / statistics.median(values) for values in seconds)
    speed = _matrix_speed(ranks.device, torch.float32, 1024, time.process_time)
    operations = _operations(packed.model, [episode.num_tokens for episode in episodes])
    return {
        "device": "cpu",
        "model": "demo",
        "pack_tokens": num_tokens,
        "compile": compiled,
        "tokens_per_s": round(ours),
        "baseline_tokens_per_s": round(theirs),
        "ratio": round(ours / theirs, 2),
        "ratio_shuffled": round(ours / theirs_shuffled, 2),
        "non_padding": round(num_real / packed.figures["tokens"], 4),
        "baseline_non_padding": round(num_real / padded.num_computed, 4),
        "peak_mb": round(peak),
        "mfu": round(operations / num_real * ours / speed, 3),
    }


def _peak_mb(step: Callable[[], None]) -> float:
    """Most memory of this process while it takes a step: Linux counts anew when asked to."""
    Path("/proc/self/clear_refs").write_text("5")
    step()
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) / 1024


def _on_gpu(folder: Path, name: str, num_tokens: int, ranks: Ranks) -> dict[str, object]:
    sizes = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, **QWEN3[name]}
    config = AutoConfig.for_model("qwen3", dtype="bfloat16", **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    lengths = [(num_tokens // 8, num_tokens // 24)] * 16
    episodes = _episodes(lengths, 151_936)
    packed = _Packed(_config(folder, "bfloat16", num_tokens, False), episodes, ranks)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        packed.step()
        torch.cuda.synchronize()
        if index:
            seconds.append(time.perf_counter() - start)
    speed = packed.figures["tokens"] / statistics.median(seconds)
    operations = _operations(packed.model, [length for length, _ in lengths])
    device = torch.cuda.get_device_name()
    peak = next((value for key, value in DENSE_BF16.items() if key in device), 0.0)
    return {
        "device": device,
        "model": name,
        "pack_tokens": num_tokens,
        "tokens_per_s": round(speed),
        "non_padding": 1.0,
        "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20),
        "mfu": round(operations / packed.figures["tokens"] * speed / peak, 3) if peak else None,
    }


def _config(folder: Path, dtype: str, max_tokens: int, compiled: bool) -> Config:
    train = {
        "tokens_per_microbatch": max_tokens,
        "learning_rate": RATE,
        "warmup_steps": 0,
        "activation_checkpointing": dtype == "bfloat16",
        "compile": compiled,
    }
    raw = {"model": {"path": folder, "dtype": dtype}, "learner": {"train": train}}
    return Config.model_validate(raw)


def _episodes(lengths: list[tuple[int, int]], vocab_size: int) -> list[Episode]:
    """Episodes of random tokens of which so many were sampled, at their end."""
    rng = np.random.default_rng(0)
    made = []
    for length, num_sampled in lengths:
        sample = Sample(
            token_ids=rng.integers(vocab_size, size=length, dtype="i4"),
            loss_mask=np.arange(length) >= length - num_sampled,
            behaviour_logprobs=-rng.exponential(1.0, num_sampled).astype("f4"),
            staleness=np.zeros(num_sampled, np.int64),
        )
        made.append(
            Episode(
                samples=(sample,),
                advantage=float(rng.normal()),
                token_turns=np.zeros(num_sampled, "i4"),
                turn_rewards=np.zeros(1, "f4"),
                truncated=False,
            )
        )
    return made


class _Packed:
    """The trainer's own step."""

    def __init__(self, config: Config, episodes: list[Episode], ranks: Ranks) -> None:
        policy = load_policy(config, ranks)
        self.model: PreTrainedModel = policy.language_model
        train = config.learner.train
        self._updater = Updater(
            policy,
            Optimizer(list(policy.parameters()), train),
            None,
            Algorithm(config.learner.algorithm),
            config,
            ranks,
            train.tokens_per_microbatch,
        )
        self._episodes = episodes
        num_sampled = sum(episode.num_sampled for episode in episodes)
        self._header = batch_pb2.BatchHeader(num_sampled_tokens=num_sampled)
        self.figures: dict[str, float] = {}

    def step(self) -> None:
        self.figures = self._updater.update(self._episodes, self._header, Clock())


class _Padded:
    """A plain loop: padded rows, all logits."""

    def __init__(self, folder: Path, episodes: list[Episode], max_tokens: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=RATE, fused=True)
        self._num_sampled = sum(episode.num_sampled for episode in episodes)
        self._batches: list[list[Episode]] = [[]]
        for episode in episodes:
            longest = max(e.num_tokens for e in (*self._batches[-1], episode))
            if longest * (len(self._batches[-1]) + 1) > max_tokens:
                self._batches.append([])
            self._batches[-1].append(episode)
        self.num_computed = sum(
            len(batch) * max(e.num_tokens for e in batch) for batch in self._batches
        )

    def step(self) -> None:
        for batch in self._batches:
            loss = self._loss(batch) / self._num_sampled
            loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, batch: list[Episode]) -> Tensor:
        shape = len(batch), max(episode.num_tokens for episode in batch)
        tokens_BT = torch.zeros(shape, dtype=torch.long)
        mask_BT, counts_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        behaviour_BT = torch.zeros(shape)
        for row, episode in enumerate(batch):
            [sample] = episode.samples
            here = slice(0, episode.num_tokens)
            tokens_BT[row, here] = torch.from_numpy(sample.token_ids.astype(np.int64))
            mask_BT[row, here] = 1
            counts_BT[row, here] = torch.from_numpy(sample.loss_mask).float()
            behaviour_BT[row, counts_BT[row].bool()] = torch.from_numpy(sample.behaviour_logprobs)
        advantages_B1 = torch.tensor([[episode.advantage] for episode in batch])
        logits = self._model(input_ids=tokens_BT, attention_mask=mask_BT).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
        old = chosen.detach()
        ratio = torch.exp(chosen - old)
        weight = torch.exp(old - behaviour_BT[:, 1:]).clamp(max=2.0)
        surrogate = torch.minimum(ratio * advantages_B1, ratio.clamp(0.8, 1.28) * advantages_B1)
        return -(weight * surrogate * counts_BT[:, 1:]).sum()


def _operations(model: PreTrainedModel, lengths: list[int]) -> float:
    """Floating point operations of forward and backward passes over causal sequences.

    6 a weight of a matrix and token, and 6 layers width a pair of tokens; the embedding's look-up
    has none, and the output's matrix is counted for every token. Source: arXiv 2204.02311, B.
    """
    config = model.config
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    num_embedded = config.vocab_size * config.hidden_size
    num_weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        num_weights -= num_embedded
    width = config.num_attention_heads * config.head_dim
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    attention: float = 12.0 * config.num_hidden_layers * width * pairs
    return 6.0 * num_weights * sum(lengths) + attention


def _matrix_speed(
    device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float]
) -> float:
    """Operations a second of one large matrix product, the best of some."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start = clock()
        torch.mm(left, right)
        best = max(best, 2 * size**3 / (clock() - start))
    return best


if __name__ == "__main__":
    main()
