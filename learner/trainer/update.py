"""One batch's updates: the algorithm's gradient over packs, then a step, as often as configured."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.trainer.algorithm import Algorithm
from learner.trainer.experience import Episode, Sample, tokens_of
from learner.trainer.losses.tokens import Outputs, Tokens, Totals
from learner.trainer.model import Policy, Reference, defer_gradients, frozen_output
from learner.trainer.optimizer import NonFiniteGradientError, Optimizer, warmed_up
from learner.trainer.packing import Pack, fill, pack
from learner.trainer.ranks import Ranks
from learner.trainer.report import Clock, TokenSums, effective_sample_size
from understudy.config import Config
from understudy.errors import UnderstudyError
from understudy.v1 import batch_pb2

_log = logging.getLogger(__name__)


class UntrainableBatchError(UnderstudyError):
    """Updates were skipped one after another, since none had a finite gradient."""


@dataclass(kw_only=True)
class _Piece:
    """Episodes of one pass."""

    packed: Pack[Sample]
    tokens: Tokens
    advantages_E: Tensor
    old: Outputs | None = None
    """The policy's outputs at the start of the batch; None where the loss's own pass has them."""


@dataclass(kw_only=True)
class _Part:
    """What one optimizer step learns from."""

    pieces: list[_Piece]
    totals: Totals


@dataclass(kw_only=True)
class _Taken:
    """What became of a batch's optimizer steps."""

    grad_norm: float = 0.0
    learning_rate: float = 0.0
    skipped_updates: float = 0.0


class Updater:
    """Takes batches, changes the policy. All ranks call it together.

    Args:
        policy: what learns.
        optimizer: of its parameters.
        reference: of the model that it must stay near, or None where nothing holds it.
        algorithm: what is learned from a batch.
        config: the run's.
        ranks: all trainer ranks.
        max_tokens: most tokens of one pass.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: Optimizer,
        reference: Reference | None,
        algorithm: Algorithm,
        config: Config,
        ranks: Ranks,
        max_tokens: int,
    ) -> None:
        self._policy = policy
        self._reference = reference
        self._optimizer = optimizer
        self._algorithm = algorithm
        self._config = config.learner.train
        self._temperature = config.learner.tasks.temperature
        self._ranks = ranks
        self._max_tokens = max_tokens
        self.num_updates = 0
        """Optimizer steps taken, which the learning rate goes by."""
        self.num_failures = 0
        """Updates in a row, up to now, without a finite gradient."""

    def update(
        self,
        episodes: Sequence[Episode],
        header: batch_pb2.BatchHeader,
        clock: Clock,
    ) -> dict[str, float]:
        """Learn from a batch and return what was measured, the same on every rank.

        Args:
            episodes: this rank's share.
            header: the whole batch in numbers.

        Raises:
            UntrainableBatchError: too many updates in a row had no finite gradient.
        """
        sums, taken = TokenSums(), _Taken(learning_rate=self._learning_rate())
        # A batch whose groups are all uniform may have no tokens: nothing moves then, not even by
        # momentum.
        if header.num_sampled_tokens:
            with clock.phase("forward_backward"):
                parts = self._divide(episodes)
                if len(parts) > 1:
                    self._look_ahead(parts)
            # With several updates, one may have got no episode on any rank.
            for part in (part for part in parts if part.totals.num_tokens):
                before = sums.importance
                with clock.phase("forward_backward"):
                    self._accumulate(part, sums)
                with clock.phase("optimizer"):
                    self._step(self._rate(sums.importance - before), taken)
        return sums.figures(self._ranks) | vars(taken)

    def _divide(self, episodes: Sequence[Episode]) -> list[_Part]:
        """The packs of each update; every rank gets as many of them as the others."""
        num_updates = self._config.updates_per_batch
        shares = [episodes[index::num_updates] for index in range(num_updates)]
        filled = [fill([e.num_tokens for e in share], self._max_tokens) for share in shares]
        nums = self._ranks.max([len(bins) for bins in filled])
        parts = []
        for share, bins, num in zip(shares, filled, nums, strict=True):
            all_bins = [*bins, *[[]] * (int(num) - len(bins))]
            pieces = [self._piece([share[i] for i in inside]) for inside in all_bins]
            parts.append(_Part(pieces=pieces, totals=self._totals(pieces)))
        return parts

    def _totals(self, pieces: Sequence[_Piece]) -> Totals:
        tokens, steps, episodes = self._ranks.sum(
            [
                sum(piece.tokens.num_tokens for piece in pieces),
                sum(piece.tokens.num_steps for piece in pieces),
                sum(piece.tokens.num_episodes for piece in pieces),
            ]
        )
        return Totals(num_tokens=tokens, num_steps=steps, num_episodes=episodes)

    def _piece(self, episodes: Sequence[Episode]) -> _Piece:
        device = self._ranks.device
        samples = [sample for episode in episodes for sample in episode.samples]
        advantages = [episode.advantage for episode in episodes]
        starts = np.cumsum([0, *(len(episode.samples) for episode in episodes)]).tolist()
        last = [s + e.last_sample for s, e in zip(starts, episodes, strict=False)]
        return _Piece(
            packed=pack(samples, device, last),
            tokens=tokens_of(episodes, self._algorithm.config.step, device),
            advantages_E=torch.tensor(advantages, dtype=torch.float32, device=device),
        )

    def _look_ahead(self, parts: Sequence[_Part]) -> None:
        """Take the policy's outputs on all packs before the first step changes it."""
        for part in parts:
            for piece in part.pieces:
                piece.old = frozen_output(self._policy, piece.packed, self._temperature)

    def _accumulate(self, part: _Part, sums: TokenSums) -> None:
        """Add up the gradient of one update."""
        for index, piece in enumerate(part.pieces):
            defer_gradients(self._policy, last=index == len(part.pieces) - 1)
            reference = None
            if self._reference is not None:
                # Before the policy's own pass: it may be the same model, and leave it gathered.
                reference = self._reference(piece.packed, self._temperature)
            with_entropy = self._algorithm.config.entropy_coefficient > 0
            new: Outputs = self._policy(piece.packed, self._temperature, with_entropy=with_entropy)
            old = piece.old or new.detached()
            if reference is not None:
                sums.add_reference(old.logprobs_N, reference)
            loss = self._algorithm.loss(
                new, old, piece.tokens, piece.advantages_E, part.totals, reference
            )
            # FSDP takes the mean of gradients over the data ranks; the loss is a sum over them.
            (loss.total * self._ranks.data_size).backward()
            sums.add(loss, old, piece.tokens, piece.packed.num_tokens)

    def _rate(self, importance: np.ndarray) -> float:
        """Learning rate of an update by its tokens' importance; 0 where it is to be skipped."""
        rate, least = self._learning_rate(), self._config.min_effective_sample_size
        if not least:
            return rate
        size = effective_sample_size(*self._ranks.sum(list(importance)))
        if size >= least:
            return rate
        _log.warning("effective sample size %.3f is under %.3f", size, least)
        return 0.0 if self._config.small_sample == "skip" else rate * size / least

    def _step(self, rate: float, taken: _Taken) -> None:
        """Take an optimizer step, unless its rate is 0 or its gradient not finite."""
        if not rate:
            self._optimizer.clear()
            taken.skipped_updates += 1
            return
        try:
            taken.grad_norm = self._optimizer.step(rate)
        except NonFiniteGradientError as error:
            taken.skipped_updates += 1
            self.num_failures += 1
            _log.error("update skipped: %s", error)
            if self.num_failures >= self._config.max_skipped_updates:
                raise UntrainableBatchError(
                    f"{self.num_failures} updates in a row were skipped "
                    f"(learner.train.max_skipped_updates): {error}"
                ) from None
            return
        self.num_failures = 0
        taken.learning_rate = rate
        self.num_updates += 1

    def _learning_rate(self) -> float:
        return warmed_up(self.num_updates, self._config.learning_rate, self._config.warmup_steps)
