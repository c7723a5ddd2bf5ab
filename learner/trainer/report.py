"""What a step measured: sums over tokens on every rank, one collective, figures by name."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from learner.trainer.algorithm import Loss
from learner.trainer.losses.kl import kl_values
from learner.trainer.losses.tokens import Outputs, Tokens
from learner.trainer.ranks import Ranks
from understudy import metrics
from understudy.v1 import batch_pb2

_SUMS = (
    "episodes",
    "tokens",
    "passes",
    "trained_tokens",
    "loss",
    "logprobs",
    "kl",
    "clipped",
    "importance",
    "importance_squared",
    "capped",
    "masked",
    "staleness",
    "current_tokens",
    "difference",
    "kl_reference",
    "reference_tokens",
    "advantages",
    "advantages_squared",
    "steps",
    "value_errors",
    "value_errors_squared",
    "targets",
    "targets_squared",
)
_LARGEST = ("importance", "difference", "staleness")

QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}
MAX_LOG_RATIO, NUM_BINS = 5.0, 400
"""Ratios are counted in bins of 2.5 % from e^-5 to e^5, for quantiles over all ranks."""
STALENESS_BOUNDS = (0, 1, 2, 4, 8, 16)
"""Steps behind: a token counts under the first bound that it is not above, or none."""


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
    """Sums over the tokens that a rank trained on. Every rank has its own and adds its packs."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._largest = dict.fromkeys(_LARGEST, 0.0)
        self._ratios = np.zeros(NUM_BINS)
        self._staleness = np.zeros(len(STALENESS_BOUNDS) + 1)

    @torch.no_grad()
    def add(self, loss: Loss, old: Outputs, tokens: Tokens, num_tokens: int) -> None:
        """Add one pack.

        Args:
            loss: of it.
            old: the policy's outputs at the start of the batch.
            tokens: N tokens that were sampled.
            num_tokens: all tokens that the pass computed.
        """
        self._sums["tokens"] += num_tokens
        self._sums["passes"] += 1
        self._sums["episodes"] += tokens.num_episodes
        if not tokens.num_episodes:
            return
        log_ratios = old.logprobs_N - tokens.behaviour_logprobs_N
        is_current = tokens.staleness_N == 0
        values = {
            "trained_tokens": torch.ones_like(log_ratios),
            "loss": loss.losses_N,
            "logprobs": old.logprobs_N,
            "kl": kl_values(log_ratios),
            "clipped": loss.clipped_N,
            "importance": loss.importance_N,
            "importance_squared": loss.importance_N.square(),
            "capped": (loss.weights_N < loss.importance_N) & (loss.weights_N > 0),
            "masked": loss.weights_N == 0,
            "staleness": tokens.staleness_N,
            "current_tokens": is_current,
            "difference": log_ratios.abs() * is_current,
            "advantages": loss.advantages_N,
            "advantages_squared": loss.advantages_N.square(),
        }
        self._add(values)
        for name in _LARGEST:
            self._largest[name] = max(self._largest[name], float(values[name].max()))
        self._ratios += _histogram(log_ratios)
        places = np.searchsorted(STALENESS_BOUNDS, tokens.staleness_N.cpu().numpy())
        self._staleness += np.bincount(places, minlength=len(self._staleness))
        if loss.value_errors_K is not None and loss.targets_K is not None:
            errors, targets = loss.value_errors_K, loss.targets_K
            self._add(
                {
                    "steps": torch.ones_like(errors),
                    "value_errors": errors,
                    "value_errors_squared": errors.square(),
                    "targets": targets,
                    "targets_squared": targets.square(),
                }
            )

    @torch.no_grad()
    def add_reference(self, old_logprobs_N: Tensor, reference_logprobs_N: Tensor) -> None:
        """Add the distance of N tokens from the reference policy."""
        values = kl_values(reference_logprobs_N - old_logprobs_N)
        self._add({"kl_reference": values, "reference_tokens": torch.ones_like(values)})

    @property
    def importance(self) -> np.ndarray:
        """Sum of pi_old / mu, of its square, and number of tokens, on this rank so far."""
        names = ("importance", "importance_squared", "trained_tokens")
        return np.array([self._sums[name] for name in names])

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] += float(value.sum(dtype=torch.float64))

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Means and shares over all ranks' tokens, by metric name. Every rank calls it."""
        columns = [*self._sums.values(), *self._ratios, *self._staleness]
        summed = ranks.sum(columns)
        sums = dict(zip(_SUMS, summed, strict=False))
        ratios = np.array(summed[len(_SUMS) : len(_SUMS) + NUM_BINS])
        staleness = summed[len(_SUMS) + NUM_BINS :]
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
            "mask_share": sums["masked"] / num,
            "effective_sample_size": effective_sample_size(
                sums["importance"], sums["importance_squared"], num
            ),
            "advantage_deviation": _deviation(sums, "advantages", num),
            "token_staleness_mean": sums["staleness"] / num,
            "token_staleness_max": largest["staleness"],
            "trained_tokens": sums["trained_tokens"],
            "tokens": sums["tokens"],
            "passes": sums["passes"],
            "length_mean": sums["tokens"] / max(sums["episodes"], 1.0),
            **_quantiles(ratios),
            **staleness_shares(staleness),
        }
        if sums["current_tokens"]:
            figures["logprob_difference_mean"] = sums["difference"] / sums["current_tokens"]
            figures["logprob_difference_max"] = largest["difference"]
        if sums["reference_tokens"]:
            figures["kl_reference"] = sums["kl_reference"] / sums["reference_tokens"]
        if sums["steps"]:
            figures |= _of_values(sums)
        return figures


def _deviation(sums: Mapping[str, float], name: str, num: float) -> float:
    variance = sums[f"{name}_squared"] / num - (sums[name] / num) ** 2
    return float(max(variance, 0.0) ** 0.5)


def _of_values(sums: Mapping[str, float]) -> dict[str, float]:
    """How well the value head knows its targets: 1 - Var(V - target) / Var(target)."""
    num = sums["steps"]
    error, spread = (_deviation(sums, name, num) for name in ("value_errors", "targets"))
    return {
        "value_loss": sums["value_errors_squared"] / num / 2,
        "value_target_mean": sums["targets"] / num,
        "value_explained": 1 - (error / spread) ** 2 if spread else 0.0,
    }


def _histogram(log_ratios_N: Tensor) -> np.ndarray:
    bounded = log_ratios_N.float().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).cpu()
    counts: Tensor = torch.histc(bounded, NUM_BINS, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return counts.numpy().astype(np.float64)


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    """Quantiles of the importance ratio, at the middle of their bin."""
    cumulated = counts.cumsum()
    if not cumulated[-1]:
        return {}
    width = 2 * MAX_LOG_RATIO / NUM_BINS
    places = {
        q: np.searchsorted(cumulated, share * cumulated[-1]) for q, share in QUANTILES.items()
    }
    return {q: float(np.exp((i + 0.5) * width - MAX_LOG_RATIO)) for q, i in places.items()}


def staleness_shares(counts: Sequence[float]) -> dict[str, float]:
    """Shares of the trained tokens by steps behind, without those of none."""
    names = [*STALENESS_BOUNDS, "more"]
    num = max(sum(counts), 1.0)
    return {
        f"tokens_behind_{name}": count / num
        for name, count in zip(names, counts, strict=True)
        if count
    }


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
    for name, share in figures.items():
        if name.startswith("tokens_behind_"):
            bound = name.removeprefix("tokens_behind_")
            metrics.TOKENS_BY_STALENESS.labels(bound).inc(share * figures["trained_tokens"])
    metrics.SKIPPED_UPDATES.inc(figures["skipped_updates"])
    metrics.LOSS.set(figures["loss"])
    metrics.REWARD.set(mean_reward(header))
    metrics.GRAD_NORM.set(figures["grad_norm"])
    metrics.ENTROPY.set(figures["entropy"])
    metrics.EFFECTIVE_SAMPLE_SIZE.set(figures["effective_sample_size"])
    metrics.LAST_STEP.set_to_current_time()
