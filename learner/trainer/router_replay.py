"""Router replay: tokens go to the experts that they went to when they were sampled.

Weights of the experts are computed anew, so that the router learns:

    scores_TE = softmax(W h);   weights_TK = scores_TE[routes_TK], normalised as the model does

Source: arXiv 2510.11370. The gradient is that of a mixture whose choice of experts is given.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from understudy.errors import ConfigError


class RouterReplay:
    """Sends tokens of a model's passes along given routes.

    Args:
        model: of transformers, before it is sharded.

    Raises:
        ConfigError: it has no routers of a kind known here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers: Any = model.base_model.layers
        self._routers = {
            index: layer.mlp.gate
            for index, layer in enumerate(layers)
            if isinstance(getattr(layer.mlp, "gate", None), Qwen3MoeTopKRouter)
        }
        if not self._routers:
            raise ConfigError(
                f"model.router_replay = true, but a {model.config.model_type} has no routers that "
                "can be told where to send tokens (qwen3_moe has); set it to false"
            )
        for router in self._routers.values():
            router.routes_TK = None
            router.register_forward_hook(_replay)

    def set(self, routes_LTK: Tensor | None) -> None:
        """Take the routes of the next pass, and of its backward pass, which may compute layers
        again. None, and -1 for one token, leave the choice to the model."""
        for index, router in self._routers.items():
            router.routes_TK = None if routes_LTK is None else routes_LTK[index]


def _replay(
    router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    if router.routes_TK is None:
        return output
    logits_TE, weights_TK, chosen_TK = output
    routes_TK = torch.where(router.routes_TK < 0, chosen_TK, router.routes_TK.long())
    scores_TK = logits_TE.softmax(-1, dtype=torch.float32).gather(-1, routes_TK)
    if router.norm_topk_prob:
        scores_TK = scores_TK / scores_TK.sum(-1, keepdim=True)
    return logits_TE, scores_TK.to(weights_TK.dtype), routes_TK
