"""Refusals: what the intake's state says no with, and the status code that each becomes."""

import contextlib
from collections.abc import Iterator

import grpc

from learner.log.errors import BadEntryError, LogFailedError
from understudy.rpc import ServiceError

_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
CODES = {
    "BAD_HELLO": _ARGUMENT,
    "BAD_RANK": _ARGUMENT,
    "BAD_REQUEST": _ARGUMENT,
    "CREDITS_EXCEEDED": _PRECONDITION,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "LEDGER_MISMATCH": _PRECONDITION,
    "OLD_EPOCH": _PRECONDITION,
    "OLD_INCARNATION": _PRECONDITION,
    "OUT_OF_ORDER": _PRECONDITION,
    "RUN_MISMATCH": _PRECONDITION,
    "STEP_OUT_OF_ORDER": _PRECONDITION,
    "WEIGHTS_LOST": _PRECONDITION,
}
"""Status code by reason, as the comments of the rpcs list them."""


class RefusedError(Exception):
    """A call that the state does not allow: `reason` in capitals, `detail` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def draining() -> RefusedError:
    """The refusal of everything once the process ends."""
    return RefusedError("DRAINING", "the intake is stopping; try again once it is back")


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turn a refusal, or the log's failure, into the status that its rpc documents."""
    try:
        yield
    except RefusedError as error:
        raise ServiceError(CODES[error.reason], error.reason, error.detail) from error
    except LogFailedError as error:
        code, reason = grpc.StatusCode.UNAVAILABLE, "LOG_FAILED"
        raise ServiceError(code, reason, "the intake's disk failed; it ends") from error
    except BadEntryError as error:
        raise ServiceError(grpc.StatusCode.DATA_LOSS, "LOG_DAMAGED", str(error)) from error
