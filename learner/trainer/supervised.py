"""The supervised stage: demonstrations, or what a run recorded.

    phases of the config -> batches of sequences -> token loss -> step -> model folder

Every rank draws the same batches and takes its data rank's share of each, so that any number of
ranks takes the same steps. Checkpoints are saved beside the loop, in `<out>.checkpoints` until the
model is there; a start takes up the newest one. Progress is one JSON line every few steps on rank
0.
"""

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from learner.trainer.checkpoints import Checkpoints, TrainerState, load_latest
from learner.trainer.conversations import read_conversations
from learner.trainer.losses.tokens import Outputs
from learner.trainer.model import Policy, defer_gradients, load_policy
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer, cosine
from learner.trainer.packing import TokenSequence, fill, pack
from learner.trainer.ranks import Ranks
from learner.trainer.recordings import read_recordings
from understudy.chat import ChatFormat
from understudy.config import Config, PhaseConfig, SupervisedConfig
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


def train_supervised(config: Config, out: Path, ranks: Ranks) -> None:
    """Train on the configured phases and write the model folder to `out`."""
    chat = ChatFormat.load(config.model.path, config.model.tools)
    policy = load_policy(config, ranks)
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    supervised, vocab_size = config.learner.supervised, policy.language_model.config.vocab_size
    data = [_read(phase, chat, vocab_size) for phase in supervised.phases]
    digest = _digest(config, data, ranks)
    folder = out.with_name(f"{out.name}.checkpoints")
    checkpoints = Checkpoints(folder, ranks, config.learner.keep_checkpoints)
    step = _resume(folder, digest, policy, optimizer, ranks)
    progress = Progress(supervised, ranks, step)
    # What is behind a checkpoint is drawn all the same: the rest is in its order then.
    drawn = batches(supervised, data, config.run.seed)
    for batch in itertools.islice(drawn, step, None):
        measured = accumulate(policy, batch, config.learner.train.tokens_per_microbatch, ranks)
        optimizer.step(batch.learning_rate)
        progress.report(measured, batch.learning_rate)
        step += 1
        checkpoints.poll()
        if (every := config.learner.checkpoint_every_steps) and step % every == 0:
            state = TrainerState(
                num_updates=step,
                num_failures=0,
                last_version=0,
                trainer_epoch=0,
                run=config.run.name,
                ledger_digest=digest,
            )
            checkpoints.save(step, policy, optimizer, state)
    checkpoints.finish()
    save_model(policy, config.model.path, out, config.model.dtype, ranks)
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(config: Config, data: Sequence[Sequence[TokenSequence]], ranks: Ranks) -> str:
    """Of all that decides which batches come, in hexadecimal; the same on all ranks.

    Raises:
        ConfigError: ranks have read different data.
    """
    decides = config.learner.supervised.model_dump_json() + str(config.run.seed)
    digest = hashlib.sha256(decides.encode())
    for sequence in itertools.chain.from_iterable(data):
        digest.update(sequence.token_ids.tobytes() + sequence.loss_mask.tobytes())
    start = int.from_bytes(digest.digest()[:6], "little")  # which a float64 holds
    highest, lowest = ranks.max([start, -start])
    if highest != -lowest:
        raise ConfigError(
            "learner.supervised.phases: ranks have read different data; name files that are not "
            "written to, and runs that have ended"
        )
    return digest.hexdigest()


def _resume(folder: Path, digest: str, policy: Policy, optimizer: Optimizer, ranks: Ranks) -> int:
    """Load the newest checkpoint, and return the steps behind it; 0 without one."""
    found = load_latest(folder, policy, optimizer, ranks)
    if found is None:
        return 0
    if found.manifest.state.ledger_digest != digest:
        raise ConfigError(
            f"{folder} is of a stage with another learner.supervised, run.seed or data; set them "
            "back to go on with it, or remove the folder to begin anew"
        )
    return found.manifest.step


def batches(
    config: SupervisedConfig, data: Sequence[Sequence[TokenSequence]], seed: int
) -> Iterator[Batch]:
    """All batches of all phases: each phase goes through its data in random order, repeatedly."""
    if not config.phases:
        raise ConfigError("learner.supervised.phases is empty; name a file of demonstrations")
    rates = learning_rates(config)
    for index, (phase, sequences_of_phase) in enumerate(zip(config.phases, data, strict=True)):
        order = _endless(sequences_of_phase, Random(f"{seed}/{index}"))
        for _ in range(phase.steps):
            sequences = [next(order) for _ in range(config.batch_size)]
            yield Batch(sequences=sequences, learning_rate=next(rates))


def _read(phase: PhaseConfig, chat: ChatFormat, vocab_size: int) -> list[TokenSequence]:
    return (
        read_conversations(phase.data, chat) if phase.data else read_recordings(phase, vocab_size)
    )


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
    size = ranks.data_size
    shares = [batch.sequences[rank::size] for rank in range(size)]
    filled = [fill([len(s.token_ids) for s in share], max_tokens) for share in shares]
    num = max(len(bins) for bins in filled)  # ranks run as many passes as each other
    share, bins = shares[ranks.data_rank], filled[ranks.data_rank]
    total = 0.0
    for index, inside in enumerate([*bins, *[[]] * (num - len(bins))]):
        defer_gradients(policy, last=index == num - 1)
        output: Outputs = policy(pack([share[i] for i in inside], ranks.device))
        loss = -output.logprobs_N.sum() / num_targets
        (loss * size).backward()  # FSDP takes the mean of gradients over data ranks
        total += loss.item()
    [total] = ranks.sum([total])
    num_tokens = sum(len(sequence.token_ids) for sequence in batch.sequences)
    return Measured(loss=total, num_tokens=num_tokens)


class Progress:
    """Prints a JSON line every few steps, on rank 0."""

    def __init__(self, config: SupervisedConfig, ranks: Ranks, step: int) -> None:
        self._num_steps = sum(phase.steps for phase in config.phases)
        self._every = config.report_every_steps
        self._silent = ranks.rank > 0
        self._step = step
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
        }
        if not self._silent:
            print(json.dumps(line), flush=True)
        self._since.clear()
        self._start = time.perf_counter()


def _endless(sequences: Sequence[TokenSequence], random: Random) -> Iterator[TokenSequence]:
    while True:
        yield from random.sample(sequences, len(sequences))
