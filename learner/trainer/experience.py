"""From a share of a batch to token sequences with advantages."""

from dataclasses import dataclass

import numpy as np

from learner.trainer.advantages import group_advantages
from learner.trainer.intake_client import BatchShare
from learner.trainer.microbatches import TokenSequence
from understudy.trajectory import FloatArray, IntArray, Segment, decode_record


@dataclass(frozen=True, kw_only=True)
class Sample(TokenSequence):
    """One segment of an episode; G of its tokens were sampled and count."""

    behaviour_logprobs: FloatArray
    """[G] log-probabilities under the policy that sampled them."""
    versions: IntArray
    """[G] that policy's version."""
    advantage: float
    """The episode's."""


def samples_of(share: BatchShare) -> list[Sample]:
    """Decode a share's trajectories; advantages come from the header's groups, all samples in.

    Raises:
        TrajectoryError: for a record that breaks the format; the intake has checked them before.
    """
    advantages = [
        group_advantages(np.frombuffer(group.rewards, "<f4")) for group in share.header.groups
    ]
    samples = []
    for message in share.trajectories:
        advantage = float(advantages[message.group_index][message.reward_index])
        for segment in decode_record(message.record).segments:
            if len(segment.logprobs):
                samples.append(_sample(segment, advantage))
    return samples


def _sample(segment: Segment, advantage: float) -> Sample:
    versions = [span.version for span in segment.version_spans]
    lengths = [span.end - span.start for span in segment.version_spans]
    return Sample(
        token_ids=segment.token_ids,
        loss_mask=segment.loss_mask,
        behaviour_logprobs=segment.logprobs,
        versions=np.repeat(np.asarray(versions, np.int64), lengths),
        advantage=advantage,
    )
