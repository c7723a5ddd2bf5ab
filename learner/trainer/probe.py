"""A token sequence and what the trainer makes of it, by which replicas check their weights."""

from collections.abc import Sequence

import numpy as np

from learner.trainer.model import Policy, frozen_output
from learner.trainer.packing import TokenSequence, pack
from learner.trainer.ranks import Ranks
from understudy.config import Config
from understudy.trajectory import IntArray
from understudy.v1 import weight_pb2

PROBE_TOKENS, MAX_PROBE_TOKENS = 64, 512
"""Length of the random probe before there is any experience, and limit of a real one."""


class Probe:
    """The run's probe: random tokens, until there is a sequence that was really played."""

    def __init__(self, vocab_size: int, config: Config) -> None:
        generator = np.random.default_rng(config.run.seed)
        # A replica reads the probe as a prompt, which has to be shorter than its context.
        self._max_tokens = min(MAX_PROBE_TOKENS, config.inference.max_model_len - 1)
        num_tokens = min(PROBE_TOKENS, self._max_tokens)
        self._tokens: IntArray = generator.integers(vocab_size, size=num_tokens, dtype="i4")
        self._is_real = False

    def use(self, samples: Sequence[TokenSequence]) -> None:
        """Take the first sequence that was really played as the probe from now on."""
        if samples and not self._is_real:
            self._tokens = samples[0].token_ids[: self._max_tokens]
            self._is_real = True

    def take(self, policy: Policy, ranks: Ranks) -> weight_pb2.LogprobProbe:
        """The policy's log-probabilities now: a forward pass, in which every rank takes part."""
        mask = np.arange(len(self._tokens)) > 0
        sequence = TokenSequence(token_ids=self._tokens, loss_mask=mask)
        logprobs = frozen_output(policy, pack([sequence], ranks.device)).logprobs_N
        return weight_pb2.LogprobProbe(
            token_ids=self._tokens.astype("<i4").tobytes(),
            logprobs=logprobs.cpu().numpy().astype("<f4").tobytes(),
        )
