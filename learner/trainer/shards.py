"""Which slices of the checkpoint's tensors this rank's FSDP2 shard holds.

FSDP2 cuts parameters along dimension 0 into equal pieces, the last ones smaller or empty, as
torch.chunk does. Rows of a row-major tensor are contiguous, so that a piece is one run of elements.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from learner.trainer.model import Policy
from learner.trainer.ranks import Ranks
from understudy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ShardSlice:
    """A run of elements of one checkpoint tensor."""

    name: str
    """Name in the checkpoint, e.g. `model.norm.weight`."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """First element in the flattened tensor."""
    values: Tensor
    """[num_elements] the values, float32, on the rank's device."""


def shard_slices(policy: Policy, ranks: Ranks) -> Iterator[ShardSlice]:
    """Slices of this rank; those of all ranks cover each tensor of the checkpoint exactly once.

    Raises:
        ConfigError: for an architecture whose checkpoint is laid out in a way not known here.
    """
    if policy.model_type not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError(f"model_type {policy.model_type!r} cannot be published; known: {known}")
    return _ARCHITECTURES[policy.model_type](policy, ranks)


def _dense(policy: Policy, ranks: Ranks) -> Iterator[ShardSlice]:
    """Parameters are the checkpoint's tensors, one for one; a tied one is stored once."""
    for name, parameter in policy.checkpoint_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Shard(0),)
        shape = tuple(parameter.shape)
        local: Tensor = parameter.to_local().detach()
        piece = -(-shape[0] // ranks.world_size)
        first_row = min(ranks.rank * piece, shape[0])
        assert local.shape[0] == min(piece, shape[0] - first_row)
        if local.numel():
            row = local[0].numel()
            yield ShardSlice(
                name=name, shape=shape, start=first_row * row, values=local.reshape(-1)
            )


_ARCHITECTURES: dict[str, Callable[[Policy, Ranks], Iterator[ShardSlice]]] = {
    "llama": _dense,
    "mistral": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
}
"""By config.json's model_type. None with mixed experts, which transformers alone fuses."""
