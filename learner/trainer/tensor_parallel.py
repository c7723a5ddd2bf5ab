"""Tensor parallelism: the ranks of a tensor group compute one pass together, a part of each layer.

Attention heads and the inner width of feed-forward layers are divided by the model's own plan, as
transformers has it: matrices cut by rows, then one cut by columns, whose outputs are added up over
the group. Each rank then goes on with the same hidden states. What the plan leaves whole, norms,
embeddings and routers, is no rank's own: FSDP cuts it over all ranks, data and tensor alike, and
takes the mean of its gradient over all of them. That is right where tensor ranks have the same
gradient, as they have by themselves. Where each has but a part of it, `whole_gradient` says so.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_common import (  # which nothing public has
    FSDPMeshInfo,
    ShardPlacementFnResult,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import (
    apply_tensor_parallelism,
    replace_layer_number_by_wildcard,
)

from learner.trainer.logprobs import chosen_logprobs
from learner.trainer.ranks import Ranks
from understudy.errors import ConfigError

_CUT = ("colwise", "rowwise", "packed_colwise", "moe_tp_experts")
"""Styles of transformers' plans that are applied as they are."""
_PARTIAL = "replicated_with_grad_allreduce"
"""A norm within heads: whole on each rank, but it sees the rank's own heads only."""
_WHOLE = ("colwise_gather_output", "embedding_rowwise")
"""Embeddings. They stay whole; of the output, positions are divided instead."""
_DIVIDED = {
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 8,
}
"""Sizes of a model that are divided -> what a part has to be a multiple of; torch's grouped matrix
products take experts' rows of whole 16 bytes only."""


def parallelize(language_model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut the layers of a whole model over a tensor group, each rank keeping its part.

    Raises:
        ConfigError: the model has no plan that is known here, or a size that cannot be divided.
    """
    plan: dict[str, str] = language_model.tp_plan
    _refuse_unfit(language_model, plan, mesh.size())
    apply_tensor_parallelism(
        language_model, mesh, {name: style for name, style in plan.items() if style in _CUT}
    )
    for name, module in language_model.named_modules():
        if plan.get(replace_layer_number_by_wildcard(name)) == _PARTIAL:
            _sees_its_own_heads(module, mesh.size())


def sharding(
    ranks: Ranks,
) -> tuple[DeviceMesh, Callable[[nn.Parameter], ShardPlacementFnResult] | None]:
    """The mesh of fully_shard, and where it puts parameters that no tensor group has cut."""
    if ranks.grid is None:
        return ranks.mesh, None
    everywhere = ShardPlacementResult(
        placement=Shard(0), mesh_info=FSDPMeshInfo(mesh=ranks.mesh, shard_mesh_dim=0)
    )
    return ranks.grid["data"], lambda p: None if isinstance(p, DTensor) else everywhere


def _refuse_unfit(language_model: PreTrainedModel, plan: dict[str, str], size: int) -> None:
    field = f"learner.train.tensor_parallel = {size}"
    config = language_model.config
    unknown = {*plan.values()} - {*_CUT, *_WHOLE, _PARTIAL}
    if "colwise" not in plan.values() or unknown:
        what = f"styles not known here ({', '.join(sorted(unknown))})" if unknown else "no layers"
        raise ConfigError(
            f"{field}: transformers' plan for {config.model_type} has {what}; set it to 1"
        )
    for name, unit in _DIVIDED.items():
        if (value := getattr(config, name, 0)) % (size * unit):
            into = f" into multiples of {unit}" if unit > 1 else ""
            raise ConfigError(
                f"{field} does not divide the model's {name} = {value}{into}; set it to 1, or to "
                "what does"
            )
    for name, module in language_model.named_modules():
        cut = plan.get(replace_layer_number_by_wildcard(name))
        if cut == "rowwise" and getattr(module, "bias", None) is not None:
            raise ConfigError(f"{field}: {name} has a bias, which is not supported; set it to 1")


class _WholeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, size: int) -> Tensor:
        ctx.size = size
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient * ctx.size, None


def whole_gradient(weight: Tensor, size: int) -> Tensor:
    """A weight of which each of `size` tensor ranks gets a part of the gradient; parts add up.

    Its gradient is multiplied by `size`, as FSDP takes the mean over the tensor ranks too.
    """
    whole: Tensor = _WholeGradient.apply(weight, size)
    return whole


def _sees_its_own_heads(norm: nn.Module, size: int) -> None:
    original = norm.forward

    def forward(hidden: Tensor) -> Tensor:
        with _replaced(norm, whole_gradient(norm.get_parameter("weight"), size)):
            normed: Tensor = original(hidden)
        return normed

    norm.forward = forward


@contextlib.contextmanager
def _replaced(module: nn.Module, weight: Tensor) -> Iterator[None]:
    parameter = module._parameters["weight"]
    module._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters["weight"] = parameter


def divided_logprobs(
    mesh: DeviceMesh,
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `chosen_logprobs`, of which each rank of a tensor group computes some of the positions.

    All of them have the same arguments and get the whole of the result, and of the gradient with
    respect to the hidden states.
    """
    hidden, targets = (
        DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        .redistribute(placements=[Shard(0)])
        .to_local()
        for whole in (hidden_ND, targets_N)
    )
    head_VD = whole_gradient(head_VD, mesh.size())
    logprobs, entropies = chosen_logprobs(
        hidden, head_VD, targets, temperature, with_entropy=with_entropy
    )

    def gathered(part: Tensor) -> Tensor:
        layout: dict[str, Any] = {"shape": targets_N.shape, "stride": (1,)}
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, **layout).full_tensor()

    return gathered(logprobs), None if entropies is None else gathered(entropies)
