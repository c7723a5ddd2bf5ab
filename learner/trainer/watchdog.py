"""Ends the process when a step takes too long, whatever it hangs in."""

import logging
import os
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


def end_process() -> None:
    """End at once, without any teardown: that would wait for what hangs."""
    logging.shutdown()
    os._exit(1)


class Watchdog:
    """One deadline at a time. A collective that hangs cannot be called off; the process can.

    Args:
        end: what is done when it is too late, on a thread of its own.
    """

    def __init__(self, end: Callable[[], None] = end_process) -> None:
        self._end = end
        self._timer: threading.Timer | None = None

    def arm(self, step: str, seconds: float) -> None:
        """From now on the step has so long, in place of the one before."""
        self.disarm()
        self._timer = threading.Timer(seconds, self._bark, (step, seconds))
        self._timer.daemon = True
        self._timer.start()

    def disarm(self) -> None:
        """No step is under way."""
        if self._timer:
            self._timer.cancel()

    def _bark(self, step: str, seconds: float) -> None:
        _log.error(
            "%s took more than %g s (learner.weights.transfer_seconds); this trainer ends, and "
            "starts again from its newest checkpoint", step, seconds,
        )  # fmt: skip
        self._end()
