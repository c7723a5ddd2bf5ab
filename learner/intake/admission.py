"""Admission: how far ahead of the trainer episodes may be played, in one derived number.

    step:     0         1         2         3        batch b is trained at step b
    version:  1 ------> 2 ------> 3 ------> 4        newest while step b is trained

The trainer publishes before its first step and after each one; a publication names the steps that
it has behind it. With `version` and `step` of the newest one, and one publication a step:

    version at batch b  =  version + max(b - step, 0)
    staleness in b      =  version at batch b - oldest version of a trajectory's tokens
    min_version for b   =  version at batch b - max_staleness

A task for batch b is worth playing once min_version exists, that is when b - step <= max_staleness.
Groups fill batches in the order of their issue, so that the groups that may be open or assigned are

    group limit         =  (step + 1 + max_staleness) * groups_per_batch

Example: max_staleness 0 plays exactly one batch, then waits for the weights that come of it;
max_staleness 1 plays the next batch while one is trained.
"""

from dataclasses import dataclass, replace
from typing import Self

from understudy.config import TasksConfig


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The newest publication and the limits that follow from it."""

    tasks: TasksConfig
    steps: int
    """Steps of the run."""
    version: int = 0
    """Newest policy version; 0 before the first: nothing is admitted yet."""
    step: int = 0
    """Steps behind that version."""

    def advanced(self, version: int, step: int) -> Self:
        """Admission after a publication."""
        return replace(self, version=version, step=step)

    @property
    def group_limit(self) -> int:
        """Most groups ever issued, without those that were dropped."""
        if not self.version:
            return 0
        batches = min(self.step + 1 + self.tasks.max_staleness, self.steps)
        return batches * self.tasks.groups_per_batch

    def version_at(self, batch: int) -> int:
        """Version that is newest when a batch is trained."""
        return self.version + max(batch - self.step, 0)

    def min_version(self, batch: int) -> int:
        """Lowest version that may play for a batch."""
        return max(self.version_at(batch) - self.tasks.max_staleness, 1)

    def staleness(self, batch: int, oldest_version: int | None) -> int:
        """Versions that a trajectory is behind when a batch is trained; 0 if none sampled it."""
        return 0 if oldest_version is None else self.version_at(batch) - oldest_version

    def too_stale(self, batch: int, oldest_version: int | None) -> bool:
        """Whether a trajectory may not be trained in a batch, nor in any later one."""
        return self.staleness(batch, oldest_version) > self.tasks.max_staleness
