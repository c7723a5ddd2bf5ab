"""The account of payloads: each as its record declared it, none trimmed that is still needed."""

import hashlib
from array import array

from learner.audit.samples import DROPPED, EVALUATED, Samples, name
from learner.audit.violations import Place, Rule, Violations
from understudy.v1 import common_pb2, log_pb2


class Payloads:
    """What became of the payloads."""

    def __init__(self, samples: Samples, violations: Violations) -> None:
        self.num_verified = 0
        self.num_trimmed = 0
        self._trimmed = array("Q")
        """Ordinal, sample index, entry's index, segment and offset of each in turn."""
        self._samples = samples
        self._violations = violations

    def on_trajectory_stored(
        self, event: log_pb2.TrajectoryStored, payload: memoryview, num_trimmed: int
    ) -> None:
        """Check a trajectory's payload, or remember that it was trimmed."""
        if num_trimmed:
            self.num_trimmed += 1
            assert self._violations.place is not None
            key = event.task_key
            self._trimmed.extend((key.ordinal, key.sample_index, *self._violations.place))
            return
        if hashlib.sha256(payload).digest() == event.payload_digest:
            self.num_verified += 1
        else:
            what = f"the payload of {name(event.task_key)} is not what its record declared"
            self._violations.add(Rule.DIGEST, what)

    def finish(self, oldest_kept_step: int) -> None:
        """Trimmed is what was dropped, evaluated, or trained before the oldest checkpoint."""
        for start in range(0, len(self._trimmed), 5):
            ordinal, sample_index, *place = self._trimmed[start : start + 5]
            task_key = common_pb2.TaskKey(ordinal=ordinal, sample_index=sample_index)
            self._violations.place = Place(*place)
            if self._is_needed(task_key, oldest_kept_step):
                what = f"the payload of {name(task_key)}, which a kept checkpoint may ask for"
                self._violations.add(Rule.TRIM, what)

    def _is_needed(self, task_key: common_pb2.TaskKey, oldest_kept_step: int) -> bool:
        key = self._samples.find(task_key)
        if key is None or self._samples.states[key] in (DROPPED, EVALUATED):
            return False
        step = self._samples.step_of(task_key.ordinal)
        return step is None or step >= oldest_kept_step
