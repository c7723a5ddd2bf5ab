"""One batch's update: GRPO's gradient over micro-batches, then a step, as often as configured."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from learner.trainer.experience import Sample
from learner.trainer.losses.grpo import grpo
from learner.trainer.losses.kl import reverse_kl
from learner.trainer.microbatches import Microbatch, cut, microbatches
from learner.trainer.model import (
    Policy,
    defer_gradients,
    frozen_logprobs,
    reference_logprobs,
)
from learner.trainer.optimizer import Optimizer, warmed_up
from learner.trainer.ranks import Ranks
from learner.trainer.report import Clock, TokenSums
from understudy.config import Config
from understudy.v1 import batch_pb2


class Updater:
    """Takes batches, changes the policy. All ranks call it together.

    Args:
        policy: what learns.
        optimizer: of its parameters.
        reference: policy that it must stay near, or None where nothing holds it.
        config: the run's.
        ranks: all trainer ranks.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: Optimizer,
        reference: Policy | None,
        config: Config,
        ranks: Ranks,
    ) -> None:
        self._policy = policy
        self._reference = reference
        self._optimizer = optimizer
        self._config = config.learner.train
        self._temperature = config.learner.tasks.temperature
        self._ranks = ranks
        self.num_updates = 0
        """Optimizer steps taken, which the learning rate goes by."""

    def update(
        self,
        samples: Sequence[Sample],
        header: batch_pb2.BatchHeader,
        current_version: int,
        clock: Clock,
    ) -> dict[str, float]:
        """Learn from a batch and return what was measured, the same on every rank.

        Args:
            samples: this rank's share.
            header: the whole batch in numbers.
            current_version: version of the policy's present weights.
        """
        sums = TokenSums(header.head_version, current_version)
        norm, rate = 0.0, self._learning_rate()
        # A batch whose groups are all uniform has no tokens: nothing moves, not even by momentum.
        if header.num_sampled_tokens:
            with clock.phase("forward_backward"):
                parts = self._divide(samples)
                old_logprobs = self._old_logprobs(parts)
            num_tokens = header.num_sampled_tokens / len(parts)
            for part, old in zip(parts, old_logprobs, strict=True):
                with clock.phase("forward_backward"):
                    self._accumulate(part, old, num_tokens, sums)
                with clock.phase("optimizer"):
                    rate = self._learning_rate()
                    norm = self._optimizer.step(rate)
                self.num_updates += 1
        return sums.figures(self._ranks) | {"grad_norm": norm, "learning_rate": rate}

    def _divide(self, samples: Sequence[Sample]) -> list[list[Microbatch[Sample]]]:
        """The micro-batches of each update; every rank gets as many of them as the others."""
        limit, num_updates = self._config.tokens_per_microbatch, self._config.updates_per_batch
        parts = [samples[index::num_updates] for index in range(num_updates)]
        nums = self._ranks.max([len(cut(part, limit)) for part in parts])
        return [
            list(microbatches(part, limit, int(num), self._ranks.device))
            for part, num in zip(parts, nums, strict=True)
        ]

    def _old_logprobs(
        self, parts: Sequence[Sequence[Microbatch[Sample]]]
    ) -> list[list[Tensor | None]]:
        """log pi_old by update and micro-batch; None where the loss's own forward pass gives it."""
        if len(parts) == 1:
            return [[None] * len(parts[0])]
        return [
            [frozen_logprobs(self._policy, m, self._temperature) for m in part] for part in parts
        ]

    def _accumulate(
        self,
        part: Sequence[Microbatch[Sample]],
        old: Sequence[Tensor | None],
        num_tokens: float,
        sums: TokenSums,
    ) -> None:
        """Add up the gradient of one update's mean token loss."""
        for index, (micro, given) in enumerate(zip(part, old, strict=True)):
            defer_gradients(self._policy, last=index == len(part) - 1)
            logprobs = self._policy(micro, self._temperature)
            old_logprobs = logprobs.detach() if given is None else given
            behaviour = self._column([s.behaviour_logprobs for s in micro.sequences])
            tokens = grpo(
                logprobs=logprobs,
                old_logprobs=old_logprobs,
                behaviour_logprobs=behaviour,
                advantages=self._column(
                    [np.full(s.num_targets, s.advantage, np.float32) for s in micro.sequences]
                ),
                clip_low=self._config.clip_low,
                clip_high=self._config.clip_high,
                importance_cap=self._config.importance_cap,
            )
            losses = tokens.losses
            if self._reference is not None:
                reference = reference_logprobs(self._reference, micro, self._temperature)
                losses = losses + self._config.kl_coefficient * reverse_kl(
                    logprobs=logprobs,
                    reference_logprobs=reference,
                    weights=tokens.importance.clamp(max=self._config.importance_cap),
                )
                sums.add_reference(old_logprobs, reference)
            # FSDP takes the mean of gradients over the ranks; the loss is a sum over them.
            (losses.sum() * self._ranks.world_size / num_tokens).backward()
            sums.add(micro, tokens, old_logprobs, behaviour, self._config.importance_cap)

    def _column(self, values: Sequence[np.ndarray]) -> Tensor:
        column = np.concatenate([np.empty(0, np.float32), *values])
        return torch.from_numpy(column).to(self._ranks.device)

    def _learning_rate(self) -> float:
        return warmed_up(self.num_updates, self._config.learning_rate, self._config.warmup_steps)
