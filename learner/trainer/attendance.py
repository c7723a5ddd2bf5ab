"""Tells the intake that this rank is there, whatever it does: a stream that stays open.

gRPC answers the intake's pings on threads of its own, also while a step computes. A process that
stands still answers none, and the intake says so.
"""

import logging
import threading
import time
from collections.abc import Iterator

import grpc

from learner.trainer.calls import RETRY_SECONDS
from learner.trainer.ranks import Ranks
from understudy.rpc import error_reason
from understudy.v1 import batch_pb2, batch_pb2_grpc

_LEAVE_SECONDS = 1.0
_FOR_GOOD = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)
"""A later trainer has taken over, or the intake knows no attendance."""
_log = logging.getLogger(__name__)


class Attendance:
    """One rank's stream, opened again when it breaks. It never holds up training.

    Args:
        channel: to the intake.
        epoch: of this trainer.
        ranks: which of how many this is.
    """

    def __init__(self, channel: grpc.Channel, epoch: int, ranks: Ranks) -> None:
        self._stub = batch_pb2_grpc.BatchServiceStub(channel)
        self._who = batch_pb2.AttendRequest(
            epoch=epoch, rank=ranks.rank, world_size=ranks.world_size
        )
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="attendance", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave in good order; after a second, in whichever."""
        self._leaving.set()
        self._thread.join(_LEAVE_SECONDS)

    def _attend(self) -> None:
        while not self._leaving.is_set():
            broken, opened = threading.Event(), time.monotonic()
            try:
                self._stub.Attend(self._messages(broken))
                reason = "the intake ends"
            except grpc.RpcError as error:
                if error.code() in _FOR_GOOD:
                    return
                reason = error_reason(error)
            finally:
                broken.set()
            if time.monotonic() - opened > RETRY_SECONDS and not self._leaving.is_set():
                _log.info("the intake no longer hears this rank (%s); calling again", reason)
            self._leaving.wait(RETRY_SECONDS)

    def _messages(self, broken: threading.Event) -> Iterator[batch_pb2.AttendRequest]:
        yield self._who
        while not broken.is_set():
            if self._leaving.wait(RETRY_SECONDS):
                yield batch_pb2.AttendRequest(leaving=True)
                return
