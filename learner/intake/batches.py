"""Batches: from complete groups to what each trainer rank gets."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from learner.intake.admission import Admission
from learner.intake.tasks import Group, Sample, State, TaskKey
from learner.log.segments import Location
from understudy.config import TasksConfig
from understudy.trajectory import FloatArray
from understudy.v1 import log_pb2
from understudy.v1.log_pb2 import EpisodeSummary


@dataclass(frozen=True, kw_only=True)
class BatchItem:
    """One trajectory of a batch."""

    key: TaskKey
    group_index: int
    """Index of its group in the batch."""
    reward_index: int
    """Index of its reward in the group."""
    summary: EpisodeSummary
    staleness: int
    """Steps that its oldest token is behind when the batch is trained."""
    location: Location
    """Where the log has it."""


@dataclass(frozen=True, kw_only=True)
class BatchGroup:
    """The rewards of one task's episodes, for example [0, 1, 1, 0]."""

    ordinal: int
    rewards: FloatArray
    """By sample index; samples without a trajectory are left out."""
    uniform: bool
    """All rewards are equal."""
    penalties: FloatArray
    """What was taken off the rewards for the length of the episodes; empty where nothing was."""


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
    keeps_uniform: bool
    """Uniform groups are trained like others."""

    @property
    def items(self) -> list[BatchItem]:
        """The trajectories that are sent: those of uniform groups only if they are trained."""
        return [
            item
            for item in self.episodes
            if self.keeps_uniform or not self.groups[item.group_index].uniform
        ]

    @property
    def num_uniform(self) -> int:
        """Number of uniform groups."""
        return sum(group.uniform for group in self.groups)


def overlong_penalty(summary: EpisodeSummary, tasks: TasksConfig) -> float:
    """What an episode loses for its length: DAPO's soft overlong punishment (arXiv 2503.14476), of
    the reply or the segment that came nearest to the limit at which it is cut off.

        excess  = length - (limit - overlong_tokens)
        penalty = overlong_penalty * min(max(excess / overlong_tokens, 0), 1)

    Example: with limit 100, overlong_tokens 20 and overlong_penalty 1, a length of 90 costs 0.5.
    """
    if not tasks.overlong_tokens:
        return 0.0
    excess = tasks.overlong_tokens + max(
        summary.longest_reply - tasks.max_new_tokens, summary.longest_segment - tasks.max_tokens
    )
    return tasks.overlong_penalty * min(max(excess / tasks.overlong_tokens, 0.0), 1.0)


def is_uniform(group: Group, tasks: TasksConfig) -> bool:
    """Whether a group is known to teach nothing: it is complete, and all rewards are equal."""
    return group.complete and _all_equal(_shaped(group.in_state(State.STORED), tasks)[0])


def assignment(
    step: int,
    groups: Sequence[Group],
    admission: Admission,
    *,
    keeps_uniform: bool = False,
    shuffle_seed: int | None = None,
) -> log_pb2.BatchAssigned:
    """Make the batch of a step from complete groups, as the log keeps it.

    With a shuffle seed, rewards are permuted among all episodes of the batch before groups are
    judged: the control experiment in which nothing can be learned.
    """
    members = [group.in_state(State.STORED) for group in groups]
    rewards, penalties = _shaped([s for samples in members for s in samples], admission.tasks)
    if shuffle_seed is not None:
        rewards = np.random.default_rng((shuffle_seed % 2**32, step)).permutation(rewards)
    ends = np.cumsum([len(samples) for samples in members])[:-1]
    parts = zip(groups, members, np.split(rewards, ends), np.split(penalties, ends), strict=True)
    return log_pb2.BatchAssigned(
        step=step,
        head_version=admission.version,
        trained_version=admission.version_at(step),
        last=step == admission.steps - 1,
        groups=[_assign(*part) for part in parts],
        keeps_uniform=keeps_uniform,
    )


def _shaped(samples: Sequence[Sample], tasks: TasksConfig) -> tuple[FloatArray, FloatArray]:
    """Rewards that samples are trained with, and what was taken off them."""
    summaries = [_summary(sample) for sample in samples]
    penalties = np.array([overlong_penalty(summary, tasks) for summary in summaries], np.float32)
    return np.array([summary.reward for summary in summaries], np.float32) - penalties, penalties


def _assign(
    group: Group, samples: Sequence[Sample], rewards: FloatArray, penalties: FloatArray
) -> log_pb2.AssignedGroup:
    return log_pb2.AssignedGroup(
        ordinal=group.ordinal,
        sample_indices=[sample.key.sample_index for sample in samples],
        rewards=rewards.astype("<f4", copy=False).tobytes(),
        uniform=_all_equal(rewards),
        penalties=penalties.astype("<f4", copy=False).tobytes() if penalties.any() else b"",
    )


def _all_equal(rewards: FloatArray) -> bool:
    return bool((rewards == rewards[0]).all())


def batch_of(event: log_pb2.BatchAssigned, groups: Sequence[Group]) -> Batch:
    """The batch that an event of the log describes, of groups that hold its samples."""
    return Batch(
        step=event.step,
        head_version=event.head_version,
        trained_version=event.trained_version,
        last=event.last,
        groups=tuple(
            BatchGroup(
                ordinal=assigned.ordinal,
                rewards=np.frombuffer(assigned.rewards, "<f4"),
                uniform=assigned.uniform,
                penalties=np.frombuffer(assigned.penalties, "<f4"),
            )
            for assigned in event.groups
        ),
        keeps_uniform=event.keeps_uniform,
        episodes=tuple(
            _item(event.step, group.samples[sample_index], group_index, reward_index)
            for group_index, (group, assigned) in enumerate(zip(groups, event.groups, strict=True))
            for reward_index, sample_index in enumerate(assigned.sample_indices)
        ),
    )


def _item(step: int, sample: Sample, group_index: int, reward_index: int) -> BatchItem:
    summary = _summary(sample)
    assert sample.location is not None
    return BatchItem(
        key=sample.key,
        group_index=group_index,
        reward_index=reward_index,
        summary=summary,
        staleness=max(step - summary.oldest_step, 0) if summary.HasField("oldest_step") else 0,
        location=sample.location,
    )


def _summary(sample: Sample) -> EpisodeSummary:
    summary = sample.summary
    assert summary is not None
    return summary


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
        "groups": len(batch.groups),
        "uniform_groups": batch.num_uniform,
        "reward_mean": _mean([summary.reward for summary in summaries]),
        **_penalties(batch),
        **_rewards_by_level(summaries),
        "staleness_mean": _mean(staleness),
        "staleness_max": max(staleness, default=0),
        "turns_mean": _mean([summary.num_turns for summary in summaries]),
        "tokens_mean": _mean([summary.num_tokens for summary in summaries]),
        "sampled_tokens": sum(item.summary.num_sampled_tokens for item in batch.items),
        "truncated_share": _mean([summary.truncated for summary in summaries]),
    }


def _penalties(batch: Batch) -> Mapping[str, float]:
    """Mean over all episodes of what was taken off for length, if anything was."""
    total = float(sum(group.penalties.sum() for group in batch.groups))
    return {"overlong_penalty_mean": total / len(batch.episodes)} if total else {}


def _rewards_by_level(summaries: Sequence[EpisodeSummary]) -> Mapping[str, float]:
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
