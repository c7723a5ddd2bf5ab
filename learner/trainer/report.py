"""What a step measured: sums over tokens on every rank, one collective, figures by name."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from learner.trainer.experience import Sample
from learner.trainer.losses.grpo import GrpoTokens
from learner.trainer.losses.kl import kl_values
from learner.trainer.microbatches import Microbatch, padding_share
from learner.trainer.ranks import Ranks
from understudy import metrics
from understudy.v1 import batch_pb2

_SUMS = (
    "sequences",
    "tokens",
    "padded_tokens",
    "trained_tokens",
    "loss",
    "logprobs",
    "kl",
    "clipped",
    "importance",
    "importance_squared",
    "capped",
    "staleness",
    "current_tokens",
    "difference",
    "kl_reference",
    "reference_tokens",
)
_LARGEST = ("importance", "difference")


class Clock:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the body's wall time to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def figures(self, num_tokens: float) -> dict[str, float]:
        """Seconds by phase, and the tokens a second that the passes computed."""
        figures = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        computing = self.seconds.get("forward_backward", 0.0) + self.seconds.get("optimizer", 0.0)
        return figures | {"tokens_per_s": num_tokens / computing if computing else 0.0}


class TokenSums:
    """Sums over the tokens that a rank trained on.

    Args:
        head_version: newest version when the batch was closed.
        current_version: version of the learner's weights before the update.
    """

    def __init__(self, head_version: int, current_version: int) -> None:
        self._head_version = head_version
        self._current_version = current_version
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._largest = dict.fromkeys(_LARGEST, 0.0)

    @torch.no_grad()
    def add(
        self,
        micro: Microbatch[Sample],
        tokens: GrpoTokens,
        old_logprobs: Tensor,
        behaviour_logprobs: Tensor,
        importance_cap: float,
    ) -> None:
        """Add the N tokens of one micro-batch; log-probabilities are [N]."""
        self._sums["sequences"] += len(micro.sequences)
        self._sums["tokens"] += sum(len(s.token_ids) for s in micro.sequences)
        self._sums["padded_tokens"] += micro.num_padded_tokens
        if not micro.sequences:
            return
        versions = np.concatenate([s.versions for s in micro.sequences])
        log_ratio = old_logprobs - behaviour_logprobs
        is_current = torch.from_numpy(versions == self._current_version).to(log_ratio.device)
        difference = log_ratio.abs() * is_current
        values = {
            "trained_tokens": torch.ones_like(log_ratio),
            "loss": tokens.losses,
            "logprobs": old_logprobs,
            "kl": kl_values(log_ratio),
            "clipped": tokens.clipped,
            "importance": tokens.importance,
            "importance_squared": tokens.importance.square(),
            "capped": tokens.importance > importance_cap,
            "current_tokens": is_current,
            "difference": difference,
        }
        for name, value in values.items():
            self._sums[name] += float(value.sum(dtype=torch.float64))
        self._sums["staleness"] += float((self._head_version - versions).sum())
        for name in _LARGEST:
            self._largest[name] = max(self._largest[name], float(values[name].max()))

    @torch.no_grad()
    def add_reference(self, old_logprobs: Tensor, reference_logprobs: Tensor) -> None:
        """Add the distance from the reference policy on N tokens; log-probabilities are [N]."""
        values = kl_values(reference_logprobs - old_logprobs)
        self._sums["kl_reference"] += float(values.sum(dtype=torch.float64))
        self._sums["reference_tokens"] += len(values)

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Means and shares over all ranks' tokens, by metric name. Every rank calls it."""
        sums = dict(zip(_SUMS, ranks.sum(list(self._sums.values())), strict=True))
        largest = dict(zip(_LARGEST, ranks.max(list(self._largest.values())), strict=True))
        num = max(sums["trained_tokens"], 1.0)
        figures = {
            "loss": sums["loss"] / num,
            "entropy": -sums["logprobs"] / num,
            "kl_behaviour": sums["kl"] / num,
            "clip_share": sums["clipped"] / num,
            "importance_mean": sums["importance"] / num,
            "importance_max": largest["importance"],
            "cap_share": sums["capped"] / num,
            "effective_sample_size": effective_sample_size(
                sums["importance"], sums["importance_squared"], num
            ),
            "token_staleness_mean": sums["staleness"] / num,
            "trained_tokens": sums["trained_tokens"],
            "tokens": sums["tokens"],
            "length_mean": sums["tokens"] / max(sums["sequences"], 1.0),
            "padding_share": padding_share(sums["tokens"], sums["padded_tokens"]),
        }
        if sums["current_tokens"]:
            figures["logprob_difference_mean"] = sums["difference"] / sums["current_tokens"]
            figures["logprob_difference_max"] = largest["difference"]
        if sums["reference_tokens"]:
            figures["kl_reference"] = sums["kl_reference"] / sums["reference_tokens"]
        return figures


def effective_sample_size(weight_sum: float, weight_square_sum: float, num: float) -> float:
    """(sum w)^2 / (n sum w^2): 1 for equal weights, near 0 when few tokens outweigh all others."""
    return weight_sum**2 / (num * weight_square_sum) if weight_square_sum else 1.0


def uniform_share(header: batch_pb2.BatchHeader) -> float:
    """Share of groups whose rewards are all equal."""
    return sum(group.uniform for group in header.groups) / max(len(header.groups), 1)


def mean_reward(header: batch_pb2.BatchHeader) -> float:
    """Over all episodes of a batch, those of uniform groups too."""
    rewards = [np.frombuffer(group.rewards, "<f4") for group in header.groups]
    return float(np.concatenate(rewards).mean()) if rewards else 0.0


def export(header: batch_pb2.BatchHeader, figures: Mapping[str, float], clock: Clock) -> None:
    """Set the trainer's Prometheus metrics."""
    for phase, seconds in clock.seconds.items():
        metrics.TRAIN_STEP_SECONDS.labels(phase).observe(seconds)
    metrics.TRAINED_TOKENS.inc(figures["trained_tokens"])
    metrics.LOSS.set(figures["loss"])
    metrics.REWARD.set(mean_reward(header))
    metrics.GRAD_NORM.set(figures["grad_norm"])
    metrics.ENTROPY.set(figures["entropy"])
    metrics.EFFECTIVE_SAMPLE_SIZE.set(figures["effective_sample_size"])
    metrics.LAST_STEP.set_to_current_time()
