"""Episodes of a run's log as sequences to learn from: rejection-sampling fine-tuning.

    log --rewarded, not held out, at most so many a task--> segments as they were sampled

Tokens are those that the policy sampled, never encoded anew. Source: arXiv 2308.01825.
"""

import logging
from collections import Counter

from learner.export.source import Source
from learner.trainer.packing import TokenSequence
from understudy.config import PhaseConfig
from understudy.errors import ConfigError

_log = logging.getLogger(__name__)


def read_recordings(phase: PhaseConfig, vocab_size: int) -> list[TokenSequence]:
    """Segments of the episodes that a phase asks for, in the order in which they were stored.

    Raises:
        ConfigError: the folder has no log, or the log no such episode, or one of a model with
            other tokens.
    """
    assert phase.run is not None
    taken: Counter[tuple[str, str, int]] = Counter()
    sequences = []
    source = Source(phase.run, "all")
    for episode in source:
        trajectory = episode.trajectory
        task = trajectory.suite, trajectory.split, trajectory.task_ordinal
        if episode.evaluation or trajectory.reward < phase.min_reward:
            continue
        if phase.max_per_task and taken[task] >= phase.max_per_task:
            continue
        taken[task] += 1
        sequences += [
            TokenSequence(token_ids=segment.token_ids, loss_mask=segment.loss_mask)
            for segment in trajectory.segments
            if segment.loss_mask.any() and not segment.frozen
        ]
    left_out = f"{source.num_trimmed} trimmed and {len(source.damaged)} damaged were left out"
    if not sequences:
        raise ConfigError(
            f"learner.supervised.phases: the log of {phase.run} has no episode with a reward of "
            f"at least min_reward = {phase.min_reward} ({left_out}); lower it, or name another run"
        )
    _log.info("%d episodes of %s; %s", taken.total(), phase.run, left_out)
    highest = max(int(sequence.token_ids.max()) for sequence in sequences)
    if highest >= vocab_size:
        raise ConfigError(
            f"learner.supervised.phases: the log of {phase.run} has token {highest}, and the model "
            f"{vocab_size} tokens; name a run of a model with the same tokenizer"
        )
    return sequences
