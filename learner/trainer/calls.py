"""How the trainer calls the learner's services: synchronously, and patient with a restart."""

import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError, UnderstudyError
from understudy.rpc import error_reason, open_sync_channel

T = TypeVar("T")
RETRY_SECONDS = 0.5
LONG_SECONDS = 2.0
"""A call that failed after this long had reached the peer: its patience begins anew."""
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_log = logging.getLogger(__name__)


def connect(network: NetworkConfig) -> grpc.Channel:
    """Open the channel to the intake and wait until it answers.

    Raises:
        PeerUnreachableError: after network.connect_timeout_seconds.
    """
    channel = open_sync_channel(network.learner, network)
    try:
        grpc.channel_ready_future(channel).result(timeout=network.connect_timeout_seconds)
    except grpc.FutureTimeoutError:
        channel.close()
        raise _unreachable(network) from None
    return channel


def patiently(call: Callable[[], T], network: NetworkConfig) -> T:
    """Call, and call again while the peer is away or its disk is full.

    Patience begins with the first failure; a call that ran for a while before it failed begins it
    anew. A peer that is there but does not answer in time is waited for without end.

    Raises:
        PeerUnreachableError: when it is away for longer than network.connect_timeout_seconds.
        UnderstudyError: for any other status, in one line.
    """
    give_up = math.inf
    while True:
        started = time.monotonic()
        try:
            return call()
        except grpc.RpcError as error:
            now = time.monotonic()
            if error.code() not in _PASSING:
                raise refused(error) from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED or now - started > LONG_SECONDS:
                give_up = math.inf
            give_up = min(give_up, now + network.connect_timeout_seconds)
            if now >= give_up:
                raise _unreachable(network) from None
            _log.warning("the intake does not answer, trying again: %s", error.details())
            time.sleep(RETRY_SECONDS)


def refused(error: grpc.RpcError) -> UnderstudyError:
    """A status as an error that people see."""
    return UnderstudyError(f"{error.code().name} ({error_reason(error)}): {error.details()}")


def _unreachable(network: NetworkConfig) -> PeerUnreachableError:
    return PeerUnreachableError(
        f"the intake at {network.learner} did not answer within "
        f"{network.connect_timeout_seconds:.0f} s; start it or correct network.learner"
    )
