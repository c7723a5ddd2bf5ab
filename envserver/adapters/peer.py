"""A program of others that an adapter talks to: what it does wrong, by reason.

A peer's fault ends the episode that meets it, with one of these reasons, which
`understudy_environment_failures_total` counts. One that is slow meets the limit of every
environment (STEP_TIMEOUT). What the peer said stays in the server's log.
"""

import logging
from typing import Literal

import grpc

from understudy.rpc import ServiceError

_log = logging.getLogger(__name__)
MAX_PEER_BYTES = 4 * 2**20
"""Longest message that is taken from a peer; what is longer is refused unread."""
FULL_RETRY_SECONDS = 0.5

Fault = Literal["PEER_UNREACHABLE", "PEER_LOST", "PEER_INVALID", "PEER_FAILED", "HARNESS_FAILED"]
"""It never answered; it went away; it sent what makes no sense or is too long; it said that its
environment failed; a command ended with an error."""


def peer_fault(reason: Fault, suite: str, message: str, detail: object = "") -> ServiceError:
    """The error that ends the episode; `detail`, of the peer's own making, is only logged."""
    _log.error("suite %s: %s: %s: %.500s", suite, reason, message, detail)
    return ServiceError(grpc.StatusCode.INTERNAL, reason, f"suite {suite!r}: {message}")


def peer_full(suite: str, message: str) -> ServiceError:
    """All sessions that the peer can have are open; the caller tries again."""
    return ServiceError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "SESSIONS_FULL",
        f"suite {suite!r}: {message}",
        retry_after_seconds=FULL_RETRY_SECONDS,
    )
