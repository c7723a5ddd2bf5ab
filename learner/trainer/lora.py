"""Adapters (LoRA, arXiv 2106.09685), which learn in the place of the model's own weights.

    y = W x + alpha / rank * B A x      W frozen; A [rank, in], B [out, rank] learn; B starts as 0

peft puts them into a model's linear layers. Here is what it takes beyond that: refusing targets by
name, the names under which tensors are published and saved, and the model without its adapters.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.trainer.ranks import Ranks
from understudy.config import LoraConfig
from understudy.errors import ConfigError
from understudy.weights.adapter import PREFIX

_NAME = "default"
"""peft's name of the one adapter that there is; it is part of parameters' names."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a policy has whose adapters learn."""

    config: LoraConfig
    base_digest: str
    """Of the weights that it belongs to, in hexadecimal."""

    def merged(self, name: str, whole: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """A weight with its adapter in it, in float32.

        Args:
            name: in the checkpoint.
            whole: [out, in] the frozen weight.
            tensors: whole adapter tensors by their published names.

        Returns:
            The weight as it is, if it has no adapter.
        """
        stem = PREFIX + name.removesuffix("weight")
        if f"{stem}lora_A.weight" not in tensors:
            return whole
        low, high = tensors[f"{stem}lora_A.weight"], tensors[f"{stem}lora_B.weight"]
        return whole.float() + self.config.alpha / self.config.rank * (high.float() @ low.float())


def add_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freeze a model and give its linear layers float32 adapters, which change nothing yet.

    Args:
        model: of transformers, whole.
        lora: rank above 0.
        seed: of the adapters' first values, which have to be the same on all ranks.

    Raises:
        ConfigError: a target that the model has not, or that is no linear layer; peft is missing.
    """
    try:
        import peft  # takes seconds
    except ImportError as error:
        raise ConfigError(
            f"learner.lora.rank = {lora.rank} needs peft ({error}); install understudy[learner]"
        ) from None
    _check_targets(model, lora)
    model.requires_grad_(False)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # vLLM and peft take fractions
        target_modules=sorted(lora.target_modules),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _check_targets(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuse, by name, targets that cannot have an adapter."""
    linear, others = set[str](), dict[str, str]()
    for path, module in model.base_model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            linear.add(name)
        elif name:
            others[name] = type(module).__name__
    for target in lora.target_modules:
        if target in linear and target not in others:
            continue
        what = f"'{target}' is a {others[target]}" if target in others else f"no '{target}'"
        remedy = f"target_modules may have {', '.join(sorted(linear - others.keys()))}"
        if any("experts" in path for path, _ in model.named_parameters()):
            remedy += "; its experts are fused and cannot have adapters"
        raise ConfigError(
            f"learner.lora.target_modules: {model.config.model_type} has {what}: {remedy}"
        )


def published_name(name: str) -> str:
    """A parameter's name in the checkpoint, or, of an adapter, in peft's files.

    Args:
        name: in the language model into which peft has put adapters.
    """
    if name.endswith(f".{_NAME}.weight"):
        return PREFIX + name.removesuffix(f"{_NAME}.weight") + "weight"
    return name.replace(".base_layer.", ".")


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before: adapters are not computed."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # Not peft's own switch: it turns gradients off and on again, on whatever FSDP has there now.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def digest_base(folder: Path, ranks: Ranks) -> str:
    """BLAKE3 of a model folder's weights, in hexadecimal, by which a checkpoint knows its base.

    Rank 0 reads the files, a second for some gigabytes, and tells the others.

    Raises:
        ConfigError: on all ranks, when there are no safetensors files.
    """
    digest = [0.0] * 32
    if ranks.rank == 0:
        digest = [float(byte) for byte in _digest_files(folder)]
    digest = ranks.sum(digest)
    if not any(digest):
        raise ConfigError(f"model.path = '{folder}': there are no *.safetensors files")
    return bytes(int(byte) for byte in digest).hex()


def _digest_files(folder: Path) -> bytes:
    files = sorted(folder.glob("*.safetensors"))
    over_all = blake3()
    for file in files:
        over_all.update(f"{file.name}\0".encode())
        over_all.update(blake3().update_mmap(file).digest())
    return over_all.digest() if files else bytes(32)
