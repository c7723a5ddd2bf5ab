"""The status code of each reason for which weights, or a request for them, are refused."""

import contextlib
from collections.abc import Iterator

import grpc

from understudy.rpc import ServiceError
from understudy.weights.errors import WeightsRefusedError

_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
CODES = {
    "BAD_DIGEST": _ARGUMENT,
    "BAD_MANIFEST": _ARGUMENT,
    "BAD_PAYLOAD": _ARGUMENT,
    "BAD_REQUEST": _ARGUMENT,
    "BAD_SHAPE": _ARGUMENT,
    "DOUBLED_TENSOR": _ARGUMENT,
    "DRAINING": _UNAVAILABLE,
    "LOG_FAILED": _UNAVAILABLE,
    "MISSING_TENSOR": _ARGUMENT,
    "NON_FINITE": _ARGUMENT,
    "OLD_EPOCH": _PRECONDITION,
    "PART_CONFLICT": _PRECONDITION,
    "PUBLICATION_DISCARDED": grpc.StatusCode.ABORTED,
    "RUN_MISMATCH": _PRECONDITION,
    "STORE_FAILED": _UNAVAILABLE,
    "UNKNOWN_TENSOR": _ARGUMENT,
    "UNKNOWN_VERSION": grpc.StatusCode.NOT_FOUND,
    "WRONG_BASE": _PRECONDITION,
}
"""Status code by reason, as the comments of the rpcs list them."""


def draining() -> WeightsRefusedError:
    """The refusal of everything once the process ends."""
    return WeightsRefusedError(
        "DRAINING", "the weight store is stopping; try again once it is back"
    )


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turn a refusal into the status that its rpc documents."""
    try:
        yield
    except WeightsRefusedError as error:
        raise ServiceError(CODES[error.reason], error.reason, error.detail) from error
