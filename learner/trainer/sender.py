"""Brings one rank's part to the weight store, as often as that takes.

Each rank does so by itself, on a thread of its own: the store alone knows when all parts are there,
and tells every rank.
"""

import logging
import math
import threading
import time

import grpc

from learner.trainer.calls import LONG_SECONDS, RETRY_SECONDS, refused
from learner.trainer.part import FrozenSlices, Part, make_part
from learner.trainer.snapshot import HostCopy
from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError, UnderstudyError
from understudy.rpc import error_reason, open_sync_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc

PUBLISH_SECONDS = 600.0
"""Deadline of one publication; a store that lacks a part discards it then."""
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
_NEEDS_ALL = ("WRONG_BASE", "BAD_MANIFEST", "BAD_PAYLOAD", "BAD_DIGEST")
"""Refusals that all values may heal: of a base, or of what was damaged on the way or here."""
_log = logging.getLogger(__name__)


class PartSender:
    """Sends parts to the store at `network.weights`, else at `network.learner`.

    Args:
        network: where the store is.
        frozen: slices of every part that never change.
    """

    def __init__(self, network: NetworkConfig, frozen: FrozenSlices) -> None:
        self._frozen = frozen
        self._address = network.weights or network.learner
        self._patience = network.connect_timeout_seconds
        self._channel = open_sync_channel(self._address, network)
        self._stub = weight_pb2_grpc.WeightServiceStub(self._channel)
        self._closed = threading.Event()

    def close(self) -> None:
        """End a call or a wait that is under way."""
        self._closed.set()
        self._channel.close()

    def deliver(
        self, header: weight_pb2.PartHeader, new: HostCopy, base: HostCopy, base_version: int
    ) -> int:
        """Send a part until it is committed; returns the version that it became part of.

        A store that has not what the part is based on, or says that the part is damaged, is sent
        all values, once. Patience begins with the first failure; a store that went away after a
        while begins it anew, as in `calls.patiently`, but not one that lacks a part until the
        deadline.

        Args:
            header: all of it but base and slices.
            new: the values that may change.
            base: those of the base version.
            base_version: newest version that was committed; 0 to send all values.

        Raises:
            PeerUnreachableError: when the store went away and stayed away.
            UnderstudyError: when it refuses, or the sender was closed.
        """
        part = make_part(header, new, base if base_version else None, base_version, self._frozen)
        give_up, sent_all = math.inf, False
        while True:
            started = time.monotonic()
            try:
                return self._send(part)
            except grpc.RpcError as error:
                reason = error_reason(error)
                if reason in _NEEDS_ALL and not sent_all:
                    _log.warning("%s; sending all values", error.details())
                    part, sent_all = make_part(header, new, None, 0, self._frozen), True
                    continue
                # PART_CONFLICT: the store has not noticed yet that the last attempt broke.
                if error.code() not in _TRANSIENT and reason != "PART_CONFLICT":
                    raise refused(error) from None
                _log.warning("step %d is not published yet: %s", header.step, error.details())
                why, late = error.details(), error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            now = time.monotonic()
            if now - started > LONG_SECONDS and not late:
                give_up = math.inf
            give_up = min(give_up, now + self._patience)
            self._wait(header.step, give_up, why)

    def _send(self, part: Part) -> int:
        response = self._stub.PublishWeights(part.messages(), timeout=PUBLISH_SECONDS)
        return int(response.version)

    def _wait(self, step: int, give_up: float, why: str | None) -> None:
        """Wait before the next attempt."""
        if time.monotonic() >= give_up:
            raise PeerUnreachableError(
                f"the weights of step {step} could not be published to {self._address} within "
                f"{self._patience:.0f} s: {why}"
            )
        if self._closed.wait(RETRY_SECONDS):
            raise UnderstudyError(f"closed before step {step} was published")
