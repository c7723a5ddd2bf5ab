"""TransferSuite: the practice suite's tasks in another domain, to be measured and never trained."""

from envserver.suites.practice.suite import DomainSuite, PracticeEnvironment
from envserver.suites.practice.tasks import Task
from envserver.suites.transfer.tools import Instruments
from envserver.suites.transfer.waters import WATERS


class TransferSuite(DomainSuite):
    """Atlas, sightings, readings and sums: the practice suite's skills, unseen words and tools."""

    name = WATERS.name
    domain = WATERS
    prompt = "Consult the instruments; finish by stating nothing but what was asked."

    def open(self, split: str, task_ordinal: int) -> PracticeEnvironment:
        """Make the environment of one task. Raises KeyError for any split but `test`."""
        if split not in WATERS.splits:
            raise KeyError("it measures what was learned elsewhere and has the split test only")
        return super().open(split, task_ordinal)

    def make_tools(self, task: Task) -> Instruments:
        """Over the task's world."""
        return Instruments(task.world, task.attachment)
