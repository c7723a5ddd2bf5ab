"""The loss of the value head."""

from torch import Tensor

from learner.trainer.losses.tokens import Totals


def squared_error(*, values_K: Tensor, targets_K: Tensor, totals: Totals) -> Tensor:
    """Half the squared error of values, in the mean over all steps that the totals count.

        sum of (V - target)^2 / 2 over these K steps / num_steps

    Source: arXiv 1802.01561, section 4.2 (the gradient (target - V) dV).

    Args:
        values_K: V of the steps' states, with gradient.
        targets_K: of an estimator, without.
        totals: of all that one optimizer step learns from.
    """
    return (values_K - targets_K).square().sum() / 2 / max(totals.num_steps, 1)
