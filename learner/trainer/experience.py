"""From a share of a batch to episodes with advantages, and to the tensors that losses take.

Shapes as in losses/tokens.py: N sampled tokens, K steps, E episodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.trainer.intake_client import BatchShare
from learner.trainer.losses.table import Estimator
from learner.trainer.losses.tokens import Steps, Tokens
from learner.trainer.packing import TokenSequence
from understudy.trajectory import (
    FloatArray,
    IntArray,
    Segment,
    Trajectory,
    TrajectoryError,
    decode_record,
)
from understudy.v1 import trajectory_pb2


@dataclass(frozen=True, kw_only=True)
class Sample(TokenSequence):
    """One segment of an episode; G of its tokens were sampled and count."""

    behaviour_logprobs: FloatArray
    """[G] log-probabilities under the policy that sampled them."""
    staleness: IntArray
    """[G] steps between that policy and the one that is trained."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A trajectory that is learned from: n sampled tokens over all its samples, k turns."""

    samples: tuple[Sample, ...]
    """Trainable segments with sampled tokens, in order; they are packed together."""
    advantage: float
    """By the rewards of its group; 0 where a critic decides."""
    token_turns: IntArray
    """[n] each sampled token's turn, of k in order of time. Tokens are in order of samples, whose
    turns may alternate: an agent's part goes on in its sample after another part's turns."""
    turn_rewards: FloatArray
    """[k] they add up to the episode's reward."""
    truncated: bool
    """It was cut short, rather than ended by its environment."""

    @property
    def num_sampled(self) -> int:
        """Sampled tokens: n."""
        return sum(sample.num_targets for sample in self.samples)

    @property
    def last_sample(self) -> int:
        """Index of the sample that the last turn is in, whose last token is the episode's."""
        last = np.flatnonzero(self.token_turns == self.token_turns.max())[-1]
        ends = np.cumsum([sample.num_targets for sample in self.samples])
        return int(np.searchsorted(ends, last, side="right"))

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)


def episodes_of(
    share: BatchShare, estimate: Estimator | None, *, at_the_end: bool = False
) -> list[Episode]:
    """Decode a share's trajectories. Those without a sampled token, or with frozen ones only, teach
    nothing and are left out.

    Args:
        share: the header's groups have the rewards of all episodes, which advantages go by.
        estimate: estimator of advantages; None where a critic's comes later.
        at_the_end: whether the last turn gets all of an episode's reward, as where rewards are
            permuted, since those of the turns before it would give away whose they are.

    Raises:
        TrajectoryError: for a record that breaks the format, or names a version that the header
            does not; the intake has checked them before.
    """
    header = share.header
    # A trainer that went back to an older checkpoint may meet tokens of weights ahead of its own.
    ages = {version: abs(header.step - step) for version, step in header.steps_behind.items()}
    rewards = [np.frombuffer(group.rewards, "<f4").astype(np.float64) for group in header.groups]
    advantages = estimate(rewards) if estimate else [np.zeros(len(group)) for group in rewards]
    episodes = []
    for message in share.trajectories:
        place = message.group_index, message.reward_index
        trajectory = decode_record(message.record)
        if trajectory.num_sampled_tokens:
            reward, advantage = (values[place[0]][place[1]] for values in (rewards, advantages))
            samples = tuple(_sample(s, ages) for s in trajectory.trainable if len(s.logprobs))
            episodes.append(
                _episode(trajectory, samples, float(reward), float(advantage), at_the_end)
            )
    return episodes


def _episode(
    trajectory: Trajectory,
    samples: tuple[Sample, ...],
    reward: float,
    advantage: float,
    at_the_end: bool,
) -> Episode:
    token_turns, rewards = _turns(trajectory)
    if at_the_end:
        rewards[:] = 0
    # The batch's reward is what counts: it may be shaped, or another episode's as a control.
    rewards[-1] += reward - rewards.sum()
    return Episode(
        samples=samples,
        advantage=advantage,
        token_turns=token_turns,
        turn_rewards=rewards,
        truncated=trajectory.outcome == trajectory_pb2.OUTCOME_TRUNCATED,
    )


def _turns(trajectory: Trajectory) -> tuple[IntArray, FloatArray]:
    """Turn of each trainable sampled token, in order of segments; and the turns' rewards.

    A turn without such a token hands its reward to the turn before it, or to the first one if none
    is before it: so what a frozen part earned counts for who called it. A token that is in no turn
    belongs to that of the token before it.
    """
    lengths = [0 if segment.frozen else len(segment.logprobs) for segment in trajectory.segments]
    offsets = np.cumsum([0, *lengths])
    turn_of = np.full(offsets[-1], -1, np.int32)
    rewards = [0.0]
    num_turns = 0
    for turn in trajectory.turns:
        first = int(offsets[turn.segment])
        tokens = turn_of[first : offsets[turn.segment + 1]][turn.start : turn.end]
        if (tokens < 0).any():
            tokens[tokens < 0] = num_turns
            num_turns += 1
            rewards += [0.0] * (num_turns > 1)
        rewards[-1] += turn.reward
    known = np.flatnonzero(turn_of >= 0)
    if len(known):
        nearest = np.searchsorted(known, np.arange(len(turn_of)), side="right") - 1
        turn_of = turn_of[known[nearest.clip(min=0)]]
    return turn_of.clip(min=0), np.array(rewards, np.float32)


def _sample(segment: Segment, ages: Mapping[int, int]) -> Sample:
    try:
        staleness = [ages[span.version] for span in segment.version_spans]
    except KeyError as error:
        raise TrajectoryError(
            "BAD_VERSIONS", f"version {error} is none of the batch's: {sorted(ages)}"
        ) from None
    lengths = [span.end - span.start for span in segment.version_spans]
    return Sample(
        token_ids=segment.token_ids,
        loss_mask=segment.loss_mask,
        behaviour_logprobs=segment.logprobs,
        staleness=np.repeat(np.asarray(staleness, np.int64), lengths),
        routes=segment.routes,
    )


def tokens_of(
    episodes: Sequence[Episode],
    step: Literal["turn", "token"],
    device: torch.device,
) -> Tokens:
    """What losses go by, of the episodes of one pack.

    Args:
        episodes: E of them, in the order in which the pack has their samples.
        step: what one step of a critic's estimator is.
        device: where the tensors go.
    """
    samples = [sample for episode in episodes for sample in episode.samples]
    lengths = np.array([episode.num_sampled for episode in episodes], np.int64)
    num_turns = np.array([len(episode.turn_rewards) for episode in episodes], np.int64)
    rewards = _joined([episode.turn_rewards for episode in episodes], np.float32)
    episode_N = np.repeat(np.arange(len(episodes)), lengths)
    owners = np.repeat(np.arange(len(episodes)), num_turns)
    offsets = np.repeat(np.cumsum(num_turns) - num_turns, lengths)
    step_N = _joined([episode.token_turns for episode in episodes], np.int64) + offsets
    by_time = np.argsort(step_N, kind="stable")  # turns alternate between samples
    ends = np.cumsum(np.bincount(step_N, minlength=len(rewards)))
    firsts = by_time[np.concatenate([[0], ends])[: len(rewards)].astype(np.int64)]
    if step == "token":
        of_turns, firsts, owners = rewards, by_time, episode_N  # which no turn leaves
        rewards = np.zeros(len(episode_N), np.float32)
        rewards[ends - 1] = of_turns  # which come after a turn's last token
        step_N = np.argsort(by_time)
    staleness = _joined([sample.staleness for sample in samples], np.float32)
    behaviour = _joined([sample.behaviour_logprobs for sample in samples], np.float32)
    truncated = np.array([episode.truncated for episode in episodes], bool)

    def place(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Tokens(
        behaviour_logprobs_N=place(behaviour),
        staleness_N=place(staleness),
        step_N=place(step_N),
        episode_N=place(episode_N),
        steps=Steps(
            first_K=place(firsts),
            episode_K=place(owners),
            rewards_K=place(rewards),
            truncated_E=place(truncated),
        ),
    )


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = np.concatenate([np.empty(0, dtype), *arrays])
    return joined.astype(dtype, copy=False)
