"""Evaluations: held-out tasks that a version plays while the run goes on, and what came of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from learner.intake.tasks import EVALUATION_ORDINALS, Sample, State, Task, TaskKey
from understudy.evaluation import interval_of
from understudy.v1 import log_pb2

ABANDONED = "abandoned"
"""Reason under which the rest of an evaluation is dropped: nobody plays it, or the trainer went
back to a step before its version's."""


@dataclass(kw_only=True, slots=True, eq=False)
class Evaluation:
    """An evaluation and its samples, one a task."""

    number: int
    """From 1."""
    version: int
    """Version that is evaluated: the newest when the evaluation was issued. What is played later
    may have been sampled by later versions."""
    step: int
    """Steps behind that version."""
    suite: str
    split: str
    first_ordinal: int
    temperature: float
    issued_us: int
    """When it was issued, in microseconds since 1970 UTC."""
    samples: list[Sample]
    num_pending: int
    """Samples that still need a trajectory."""

    @property
    def pending(self) -> list[Sample]:
        """The samples that still need a trajectory."""
        return [sample for sample in self.samples if sample.pending]

    def has(self, key: TaskKey) -> bool:
        """Whether a key that has the evaluation's number is one of its samples'."""
        index = key.ordinal - first_key(self.number).ordinal
        return index < len(self.samples) and key.sample_index == 0

    def task(self, key: TaskKey) -> Task:
        """Task of one of the evaluation's keys."""
        index = key.ordinal - first_key(self.number).ordinal
        return Task(self.suite, self.split, self.first_ordinal + index)


def first_key(number: int) -> TaskKey:
    """Task key of the first sample of an evaluation."""
    return TaskKey(number * EVALUATION_ORDINALS, 0)


def evaluation_of(event: log_pb2.EvaluationIssued, issued_us: int) -> Evaluation:
    """The evaluation that an event of the log brings into being."""
    first = first_key(event.number).ordinal
    return Evaluation(
        number=event.number,
        version=event.version,
        step=event.step,
        suite=event.suite,
        split=event.split,
        first_ordinal=event.first_ordinal,
        temperature=event.temperature,
        issued_us=issued_us,
        samples=[Sample(key=TaskKey(first + index, 0)) for index in range(event.num_tasks)],
        num_pending=event.num_tasks,
    )


def figures_of(evaluation: Evaluation, now_us: int) -> dict[str, Any]:
    """Figures of an evaluation that has ended, for its line in metrics.jsonl. Accuracy is the mean
    reward of the episodes that were played to an end; `dropped` says how many were not."""
    summaries = [sample.summary for sample in evaluation.samples]
    played = [summary for summary in summaries if summary]
    rewards = [summary.reward for summary in played]
    levels = sorted({summary.level for summary in played})
    newest = [summary.newest_version for summary in played]
    dropped = [sample for sample in evaluation.samples if sample.state is State.DROPPED]
    return {
        "version": evaluation.version,
        "newest_version": max([evaluation.version, *newest]),
        "heldout_accuracy": _mean(rewards),
        "heldout_ci95": list(interval_of(rewards)),
        **{
            f"heldout_level{level}": _mean([s.reward for s in played if s.level == level])
            for level in levels
        },
        "num_tasks": len(evaluation.samples),
        "dropped": len(dropped),
        "split": evaluation.split,
        "temperature": round(evaluation.temperature, 6),
        "turns_mean": _mean([summary.num_turns for summary in played]),
        "tokens_mean": _mean([summary.num_tokens for summary in played]),
        "seconds": round(max(now_us - evaluation.issued_us, 0) / 1e6, 3),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
