"""Batches: from complete groups to what each trainer rank gets."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from learner.intake.admission import Admission
from learner.intake.tasks import Group, State, Summary, TaskKey
from understudy.trajectory import FloatArray


@dataclass(frozen=True, kw_only=True)
class BatchItem:
    """One trajectory of a batch."""

    key: TaskKey
    group_index: int
    """Index of its group in the batch."""
    reward_index: int
    """Index of its reward in the group."""
    summary: Summary
    staleness: int
    """Versions that its oldest token is behind when the batch is trained."""


@dataclass(frozen=True, kw_only=True)
class BatchGroup:
    """The rewards of one task's episodes, for example [0, 1, 1, 0]."""

    ordinal: int
    rewards: FloatArray
    """By sample index; samples without a trajectory are left out."""
    uniform: bool
    """All rewards are equal: no gradient, nothing is sent."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step learns from."""

    step: int
    head_version: int
    """Newest version when the batch was closed."""
    trained_version: int
    """Version that is newest when the batch is trained."""
    last: bool
    """No step follows."""
    groups: tuple[BatchGroup, ...]
    episodes: tuple[BatchItem, ...]
    """Every trajectory of every group."""

    @property
    def items(self) -> list[BatchItem]:
        """The trajectories that are sent: those of groups that are not uniform."""
        return [item for item in self.episodes if not self.groups[item.group_index].uniform]

    @property
    def uniform(self) -> list[int]:
        """Ordinals of the uniform groups."""
        return [group.ordinal for group in self.groups if group.uniform]


def assemble(
    step: int, groups: Sequence[Group], admission: Admission, shuffle_seed: int | None = None
) -> Batch:
    """Make the batch of a step from complete groups.

    With a shuffle seed, rewards are permuted among all episodes of the batch before groups are
    judged: the control experiment in which nothing can be learned.
    """
    episodes: list[BatchItem] = []
    for group_index, group in enumerate(groups):
        for reward_index, sample in enumerate(group.in_state(State.STORED)):
            assert sample.summary is not None
            item = BatchItem(
                key=sample.key,
                group_index=group_index,
                reward_index=reward_index,
                summary=sample.summary,
                staleness=admission.staleness(step, sample.summary.oldest_version),
            )
            episodes.append(item)
    rewards = np.array([item.summary.reward for item in episodes], np.float32)
    if shuffle_seed is not None:
        rewards = np.random.default_rng((shuffle_seed % 2**32, step)).permutation(rewards)
    group_of = np.array([item.group_index for item in episodes])
    return Batch(
        step=step,
        head_version=admission.version,
        trained_version=admission.version_at(step),
        last=step == admission.steps - 1,
        groups=tuple(
            _group(group.ordinal, rewards[group_of == index]) for index, group in enumerate(groups)
        ),
        episodes=tuple(episodes),
    )


def _group(ordinal: int, rewards: FloatArray) -> BatchGroup:
    return BatchGroup(ordinal=ordinal, rewards=rewards, uniform=bool((rewards == rewards[0]).all()))


def split(items: Sequence[BatchItem], world_size: int) -> list[list[BatchItem]]:
    """Divide items over ranks so that their tokens balance: longest first, each to the rank that
    has least. Deterministic: ties go by task key and by rank."""
    shares: list[list[BatchItem]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for item in sorted(items, key=lambda item: (-item.summary.num_tokens, item.key)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(item)
        heapq.heappush(loads, (load + item.summary.num_tokens, rank))
    return shares


def statistics(batch: Batch) -> dict[str, float]:
    """Figures of a batch for its line in metrics.jsonl. Rewards are over all episodes, as the
    environments gave them; staleness is over the trajectories that are trained."""
    summaries = [item.summary for item in batch.episodes]
    staleness = [item.staleness for item in batch.items]
    return {
        "version": batch.trained_version,
        "episodes": len(summaries),
        "trajectories": len(staleness),
        "uniform_groups": len(batch.uniform),
        "reward_mean": _mean([summary.reward for summary in summaries]),
        **_rewards_by_level(summaries),
        "staleness_mean": _mean(staleness),
        "staleness_max": max(staleness, default=0),
        "turns_mean": _mean([summary.num_turns for summary in summaries]),
        "tokens_mean": _mean([summary.num_tokens for summary in summaries]),
        "sampled_tokens": sum(item.summary.num_sampled_tokens for item in batch.items),
        "truncated_share": _mean([summary.truncated for summary in summaries]),
    }


def _rewards_by_level(summaries: Sequence[Summary]) -> Mapping[str, float]:
    levels: dict[int, list[float]] = defaultdict(list)
    for summary in summaries:
        levels[summary.level].append(summary.reward)
    return {f"reward_level{level}": _mean(levels[level]) for level in sorted(levels)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def choose_samples(batch: Batch, number: int) -> list[BatchItem]:
    """A few episodes to read: best and worst rewards in turn."""
    ranked = sorted(batch.episodes, key=lambda item: (item.summary.reward, item.key))
    chosen: list[BatchItem] = []
    while ranked and len(chosen) < number:
        chosen.append(ranked.pop(-1 if len(chosen) % 2 == 0 else 0))
    return chosen
