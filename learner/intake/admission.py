"""Admission: how far ahead of the trainer episodes may be played, in one derived number.

    step:     0         1         2         3        batch b is trained at step b
    version:  1 ------> 2 ------> 3 ------> 4        newest while step b is trained

The trainer publishes when it starts and after each step; a publication names the steps that it
has behind it. Age is counted in steps: that is the same as in versions until a trainer starts again
from a checkpoint, which publishes steps anew under new versions, with the weights of the old ones.

    staleness in b      =  b - fewest steps behind any version that sampled a token
    a version may play for b if it has at least  b - max_staleness  steps behind it

Groups fill batches in the order of their issue; `Lineup` tells which batch the next one belongs to.
It may be issued if that batch is below

    batch limit         =  min(step + 1 + max_staleness, steps)

Example: max_staleness 0 plays exactly one batch, then waits for the weights that come of it;
max_staleness 1 plays the next batch while one is trained. With max_resample r, the groups that may
be open or assigned are between batch limit * groups_per_batch and r times that: for each group that
turns out uniform, another one is issued, until the batch has r * groups_per_batch. Evaluations are
not admitted: they train nothing, and their tasks belong to no batch.
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
    first_version: int = 0
    """First version that the present trainer published."""

    def advanced(self, version: int, step: int) -> Self:
        """Admission after a publication."""
        return replace(self, version=version, step=step)

    @property
    def batch_limit(self) -> int:
        """Batches that groups may be issued for: those below this."""
        if not self._is_open:
            return 0
        return min(self.step + 1 + self.tasks.max_staleness, self.steps)

    def version_at(self, batch: int) -> int:
        """Version that is newest when a batch is trained."""
        return self.version + max(batch - self.step, 0)

    def admits(self, batch: int) -> bool:
        """Whether the newest version may play for a batch."""
        return self._is_open and self.step >= batch - self.tasks.max_staleness

    @property
    def _is_open(self) -> bool:
        """The present trainer has published. Until then it is not known how many steps its first
        version has behind it, and that may be too few for what would be played by it."""
        return self.version >= max(self.first_version, 1)

    def min_version(self, batch: int) -> int:
        """Lowest version that may play for a batch that is admitted."""
        spare = self.step - max(batch - self.tasks.max_staleness, 0)
        return max(self.version - max(spare, 0), self.first_version, 1)

    def staleness(self, batch: int, oldest_step: int | None) -> int:
        """Steps that a trajectory is behind when a batch is trained; 0 if no policy sampled it."""
        return 0 if oldest_step is None else max(batch - oldest_step, 0)

    def too_stale(self, batch: int, oldest_step: int | None) -> bool:
        """Whether a trajectory may not be trained in a batch, nor in any later one."""
        return self.staleness(batch, oldest_step) > self.tasks.max_staleness
