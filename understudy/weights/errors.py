"""What is said of weights that are not taken."""

from understudy.errors import UnderstudyError


class WeightsRefusedError(UnderstudyError):
    """Weights, or a request for them, that break a rule: `reason` in capitals, `detail` for people.

    Reasons: BAD_MANIFEST, UNKNOWN_TENSOR, MISSING_TENSOR, DOUBLED_TENSOR, BAD_SHAPE, BAD_PAYLOAD,
    BAD_DIGEST, NON_FINITE, WRONG_BASE, UNKNOWN_VERSION, BAD_REQUEST, and those of the rooms that
    raise it too.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
