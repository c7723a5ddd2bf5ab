"""Which task a group gets, where tasks recur: those that the policy neither masters nor fails at.

Tasks come in order, round after round. A task that was played before is passed over in a round, but
for a chance of

    max(4 p (1 - p), 1/16)        p: its recent success rate

so that a task that succeeds half of the time is always played, one that always or never succeeds in
one round of sixteen. The gradient of a group's advantages is largest where its rewards vary most.

What is chosen depends on the log alone: on the groups that were issued, and on the batches that
were closed before; the chances are drawn from the ordinals of group and task.
"""

import random

from understudy.config import TasksConfig

LEAST_CHANCE = 1 / 16
"""Of a task that is mastered, or hopeless: so that it is seen if that changes."""
_NEWEST_SHARE = 0.5
"""Weight of the newest group in a task's rate."""


class Curriculum:
    """Success rates of tasks by their ordinals, from the batches that were closed.

    Args:
        tasks: the tasks, and in which order they are played.
    """

    def __init__(self, tasks: TasksConfig) -> None:
        self._tasks = tasks
        self.rates: dict[int, float] = {}
        """Recent success rate, by task."""
        self._last: int | None = None

    def issued(self, task_ordinal: int) -> None:
        """A group of a task was issued."""
        self._last = task_ordinal

    def ended(self, task_ordinal: int, reward_mean: float) -> None:
        """A group of a task came into a batch. A success is a reward of 1, a failure one of 0."""
        if self._tasks.task_order == "in_order":
            return
        rate = min(max(reward_mean, 0.0), 1.0)
        before = self.rates.get(task_ordinal, rate)
        self.rates[task_ordinal] = before + _NEWEST_SHARE * (rate - before)

    def choose(self, ordinal: int) -> int:
        """The task of the group that is issued next."""
        first, number = self._tasks.first_ordinal, self._tasks.num_tasks
        if self._tasks.task_order == "in_order":
            return first + ordinal % number
        index = 0 if self._last is None else self._last + 1 - first
        for _ in range(number):
            task = first + index % number
            if self._is_taken(ordinal, task):
                break
            index += 1
        return first + index % number  # a whole round was passed over: the task that is due

    def _is_taken(self, ordinal: int, task: int) -> bool:
        rate = self.rates.get(task)
        if rate is None:
            return True
        return random.Random(f"{ordinal}/{task}").random() < max(
            4 * rate * (1 - rate), LEAST_CHANCE
        )
