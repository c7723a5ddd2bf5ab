"""How each architecture's parameters lie in its checkpoint.

One function an architecture turns a run of a parameter's elements into runs of checkpoint tensors.
What is published and what is saved both go through it, so that they cannot differ.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from understudy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ShardSlice:
    """A run of elements of one tensor."""

    name: str
    """Name of a parameter or in the checkpoint, e.g. `model.norm.weight`."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """First element in the flattened tensor."""
    values: Tensor
    """[num_elements] a view of the values, on their device."""


Mapping = Callable[[ShardSlice], Iterator[ShardSlice]]


def mapping_of(model_type: str) -> Mapping:
    """How an architecture's parameters become checkpoint tensors.

    Args:
        model_type: as config.json names it.

    Raises:
        ConfigError: for an architecture whose checkpoint is laid out in a way not known here.
    """
    if model_type not in _MAPPINGS:
        known = ", ".join(sorted(_MAPPINGS))
        raise ConfigError(f"model_type {model_type!r} is not supported; known: {known}")
    return _MAPPINGS[model_type]


def _dense(piece: ShardSlice) -> Iterator[ShardSlice]:
    """Parameters are the checkpoint's tensors, one for one."""
    yield piece


_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Matrices of one expert that lie behind each other in a fused parameter."""


def _qwen3_moe(piece: ShardSlice) -> Iterator[ShardSlice]:
    """Transformers fuses a layer's E experts, where the checkpoint has matrices of each expert:

        mlp.experts.gate_up_proj [E, 2 I, D]  ->  mlp.experts.K.gate_proj.weight [I, D]
                                                  mlp.experts.K.up_proj.weight   [I, D]
        mlp.experts.down_proj    [E, D, I]    ->  mlp.experts.K.down_proj.weight [D, I]

    Ranks hold whole experts.
    """
    experts, fused, kind = piece.name.rpartition(".experts.")
    if not fused:
        yield piece
        return
    matrices = _FUSED[kind]
    _, rows, width = piece.shape
    shape = (rows // len(matrices), width)
    size = math.prod(shape)
    assert piece.start % (size * len(matrices)) == 0
    for index, values in enumerate(piece.values.split(size), piece.start // size):
        expert, matrix = divmod(index, len(matrices))
        name = f"{experts}.experts.{expert}.{matrices[matrix]}.weight"
        yield ShardSlice(name=name, shape=shape, start=0, values=values)


_MAPPINGS: dict[str, Mapping] = {
    "llama": _dense,
    "mistral": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "qwen3_moe": _qwen3_moe,
}
"""By config.json's model_type."""
