"""The line-up: which batch each open group is meant for, as far as results tell.

Groups fill batches in the order of their issue. The next batch is the shortest stretch of the
oldest groups that is full, once all groups of it are complete; a stretch is full with

    groups_per_batch                  groups that count, or
    groups_per_batch * max_resample   groups

A group counts unless it is known to be uniform, that is complete with equal rewards; if
max_resample is 1, every group counts. Groups that are not complete yet are taken to be mixed, so
that no more are issued than are known to be needed. Example with 2 groups a batch and max_resample
3: u is a uniform group, m a mixed one, ? one that is not complete.

    u m ? | ? ?        the first batch needs a third group, the second has the next two
    u m u ? | ?        the third was uniform: the fourth belongs to the first batch now
    u u u u u u | ?    six groups are full: the first batch closes without any mixed group

What is learned only moves groups into earlier batches: a uniform group ceases to count, a group
that is dropped leaves its place. So a version that was good enough for a group's batch stays so.

Nothing hangs. While admission admits the next batch, which it does once the version before it is
published, one of three holds. A group of it is not complete: its samples are leased or may be, and
each ends by a result or by max_attempts failures, or waits again as its lease expires; a group that
loses too many of them leaves. Or all are complete but the batch is not full: then the next group
that is issued belongs to it, and may be issued. Or it is full, after at most groups_per_batch *
max_resample groups, however many of them are uniform: then it can be closed.
"""

from collections.abc import Iterable

from learner.intake.tasks import Group
from understudy.config import TasksConfig


class Lineup:
    """Batches of open groups, counted from the next one that is closed.

    Args:
        tasks: how many groups a batch has.
    """

    def __init__(self, tasks: TasksConfig) -> None:
        self._wanted = tasks.groups_per_batch
        self._most = tasks.groups_per_batch * tasks.max_resample
        self._batches: dict[int, int] = {}
        self._uniform: set[int] = set()
        self.num_first = 0
        """Groups of the next batch; 0 while it is not full."""
        self.next_batch = 0
        """Batch of the group that is issued next."""
        self._size = self._counted = 0

    @property
    def resamples(self) -> bool:
        """Whether it matters which groups are uniform."""
        return self._most > self._wanted

    def batch_of(self, ordinal: int) -> int:
        """Batch of an open group."""
        return self._batches[ordinal]

    def add(self, ordinal: int) -> None:
        """A group joins at the end."""
        self._batches[ordinal] = self.next_batch
        self._size += 1
        self._counted += ordinal not in self._uniform
        if self._counted == self._wanted or self._size == self._most:
            if not self.next_batch:
                self.num_first = self._size
            self.next_batch += 1
            self._size = self._counted = 0

    def judge(self, ordinal: int, uniform: bool) -> bool:
        """Say whether a group is known to be uniform. If that is news, it returns True: rebuild."""
        if uniform == (ordinal in self._uniform):
            return False
        (self._uniform.add if uniform else self._uniform.discard)(ordinal)
        return True

    def rebuild(self, groups: Iterable[Group]) -> None:
        """Line all open groups up anew, in the order of their issue."""
        ordinals = [group.ordinal for group in groups]
        self._batches.clear()
        self._uniform.intersection_update(ordinals)
        self.num_first = self.next_batch = self._size = self._counted = 0
        for ordinal in ordinals:
            self.add(ordinal)
