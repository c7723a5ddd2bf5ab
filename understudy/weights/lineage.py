"""Where weights come from, and what may follow them."""

from dataclasses import dataclass
from typing import Self

from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Run, epoch and version of weights."""

    run_id: str = ""
    """Run; empty before the first version."""
    epoch: int = 0
    """Epoch of the trainer that published them."""
    version: int = 0
    """Policy version; 0 before the first."""

    @classmethod
    def of(cls, manifest: weight_pb2.WeightManifest) -> Self:
        """That of what a link leads to."""
        return cls(run_id=manifest.run_id, epoch=manifest.epoch, version=manifest.version)

    def check_run(self, run_id: str) -> None:
        """Refuse what is of another run. Raises WeightsRefusedError: OTHER_RUN."""
        if self.run_id and run_id != self.run_id:
            raise WeightsRefusedError(
                "OTHER_RUN",
                f"weights of run {run_id!r}, held are those of {self.run_id!r}; start again with "
                "none to follow the other",
            )

    def check_next(self, after: "Lineage") -> None:
        """Refuse what may not follow.

        Raises:
            WeightsRefusedError: OTHER_RUN, OLD_EPOCH, OLD_VERSION.
        """
        self.check_run(after.run_id)
        if after.epoch < self.epoch:
            raise WeightsRefusedError(
                "OLD_EPOCH",
                f"version {after.version} is of epoch {after.epoch}, below {self.epoch}: of a "
                "trainer that was replaced",
            )
        if after.version <= self.version:
            raise WeightsRefusedError(
                "OLD_VERSION", f"version {after.version} is not above {self.version}"
            )
