"""The probe of a version: a sequence, and the learner's log-probabilities of it."""

import numpy as np

from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError


def decode_probe(
    probe: weight_pb2.LogprobProbe, vocab_size: int, max_model_len: int
) -> tuple[IntArray, FloatArray] | None:
    """The probe's token ids [N] and log-probabilities [N-1]; None if there is none.

    Raises:
        WeightsRefusedError: BAD_PROBE.
    """
    if not probe.token_ids:
        return None
    count = len(probe.token_ids) // 4
    if len(probe.token_ids) % 4 or count < 2 or len(probe.logprobs) != 4 * (count - 1):
        raise WeightsRefusedError("BAD_PROBE", "not N token ids and N-1 log-probabilities")
    token_ids = np.frombuffer(probe.token_ids, "<i4")
    if count >= max_model_len or token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise WeightsRefusedError("BAD_PROBE", "tokens beyond the context or the vocabulary")
    return token_ids, np.frombuffer(probe.logprobs, "<f4")
