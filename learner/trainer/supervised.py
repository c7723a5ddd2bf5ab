"""The warm-up on demonstrations.

    phases of the config -> batches of conversations -> token loss -> step -> model folder

Every rank draws the same batches and takes its share of each, so that any number of ranks takes
the same steps. Progress is one JSON line every few steps on rank 0.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from learner.trainer.conversations import read_conversations
from learner.trainer.microbatches import TokenSequence, cut, microbatches, padding_share
from learner.trainer.model import Policy, defer_gradients, load_policy
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer, cosine
from learner.trainer.ranks import Ranks
from understudy.chat import ChatFormat
from understudy.config import Config, SupervisedConfig
from understudy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step learns from, and how fast."""

    sequences: Sequence[TokenSequence]
    """Conversations of all ranks."""
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step in numbers, over all ranks."""

    loss: float
    """Mean over the tokens that counted."""
    num_tokens: int
    num_padded_tokens: int


def train_supervised(config: Config, out: Path, ranks: Ranks) -> None:
    """Train on the configured phases and write the model folder to `out`."""
    chat = ChatFormat.load(config.model.path, config.model.tools)
    policy = load_policy(config.model.path, config.model.dtype, config.learner.attention, ranks)
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    progress = Progress(config.learner.supervised, ranks)
    for batch in batches(config.learner.supervised, chat, config.run.seed):
        measured = accumulate(policy, batch, config.learner.train.tokens_per_microbatch, ranks)
        optimizer.step(batch.learning_rate)
        progress.report(measured, batch.learning_rate)
    save_model(policy, config.model.path, out, config.model.dtype, ranks)


def batches(config: SupervisedConfig, chat: ChatFormat, seed: int) -> Iterator[Batch]:
    """All batches of all phases: each phase goes through its file in random order, repeatedly."""
    if not config.phases:
        raise ConfigError("learner.supervised.phases is empty; name a file of demonstrations")
    rates = learning_rates(config)
    for index, phase in enumerate(config.phases):
        conversations = read_conversations(phase.data, chat)
        order = _endless(conversations, Random(f"{seed}/{index}"))
        for _ in range(phase.steps):
            sequences = [next(order) for _ in range(config.batch_size)]
            yield Batch(sequences=sequences, learning_rate=next(rates))


def learning_rates(config: SupervisedConfig) -> Iterator[float]:
    """The rate of every step; a phase that names a rate begins a schedule of its own."""
    schedules: list[tuple[float, int]] = []
    for phase in config.phases:
        if phase.learning_rate is not None:
            schedules.append((phase.learning_rate, phase.steps))
        else:
            peak, steps = schedules.pop()
            schedules.append((peak, steps + phase.steps))
    for peak, steps in schedules:
        for step in range(steps):
            yield cosine(step, steps, peak, config.warmup_steps, config.final_rate_share)


def accumulate(policy: Policy, batch: Batch, max_tokens: int, ranks: Ranks) -> Measured:
    """Add up the gradient of a batch's mean token loss, and measure it."""
    num_targets = sum(sequence.num_targets for sequence in batch.sequences)
    share = batch.sequences[ranks.rank :: ranks.world_size]
    num = max(
        len(cut(batch.sequences[rank :: ranks.world_size], max_tokens))
        for rank in range(ranks.world_size)
    )
    total, num_padded = 0.0, 0
    for index, micro in enumerate(microbatches(share, max_tokens, num, ranks.device)):
        defer_gradients(policy, last=index == num - 1)
        loss = -policy(micro).sum() / num_targets
        (loss * ranks.world_size).backward()  # FSDP takes the mean of gradients over the ranks
        total += loss.item()
        num_padded += micro.num_padded_tokens
    total, all_padded = ranks.sum([total, num_padded])
    return Measured(
        loss=total,
        num_tokens=sum(len(sequence.token_ids) for sequence in batch.sequences),
        num_padded_tokens=int(all_padded),
    )


class Progress:
    """Prints a JSON line every few steps, on rank 0."""

    def __init__(self, config: SupervisedConfig, ranks: Ranks) -> None:
        self._num_steps = sum(phase.steps for phase in config.phases)
        self._every = config.report_every_steps
        self._silent = ranks.rank > 0
        self._step = 0
        self._since: list[Measured] = []
        self._start = time.perf_counter()

    def report(self, measured: Measured, learning_rate: float) -> None:
        """Take a step's figures; print the mean of those since the last line when it is time."""
        self._step += 1
        self._since.append(measured)
        if self._step % self._every and self._step != self._num_steps:
            return
        num_tokens = sum(m.num_tokens for m in self._since)
        line = {
            "stage": "supervised",
            "step": self._step,
            "steps": self._num_steps,
            "loss": round(math.fsum(m.loss for m in self._since) / len(self._since), 5),
            "lr": round(learning_rate, 8),
            "tokens_per_s": round(num_tokens / (time.perf_counter() - self._start)),
            "padding_share": round(
                padding_share(num_tokens, sum(m.num_padded_tokens for m in self._since)), 4
            ),
        }
        if not self._silent:
            print(json.dumps(line), flush=True)
        self._since.clear()
        self._start = time.perf_counter()


def _endless(sequences: Sequence[TokenSequence], random: Random) -> Iterator[TokenSequence]:
    while True:
        yield from random.sample(sequences, len(sequences))
