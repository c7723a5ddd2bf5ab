"""Tiny models of several architectures that take real Adam steps and are published."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from learner.trainer.model import load_policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.packing import pack
from learner.trainer.publish import Publisher
from learner.trainer.ranks import Ranks
from learner.trainer.shards import checkpoint_tensors
from understudy.config import Config

from trainer_helpers import samples  # isort: skip

VOCAB_SIZE = 97
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model that is published."""

    model_type: str
    tied: bool
    dtype: Literal["float32", "bfloat16"]
    num_experts: int = 0
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the architecture other than the tiny ones."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """[learner.lora]: adapters that learn rather than the model."""

    @property
    def name(self) -> str:
        tied = "tied" if self.tied else "untied"
        return f"{self.model_type}-{tied}-{self.dtype}{'-lora' * bool(self.lora)}"

    def make_bundle(self, folder: Path) -> Path:
        """A folder with random weights."""
        torch.manual_seed(3)
        sizes = {**SIZES, "tie_word_embeddings": self.tied, "dtype": "float32"}
        sizes |= self.sizes
        if self.num_experts:
            sizes |= {
                "num_experts": self.num_experts,
                "num_experts_per_tok": min(2, self.num_experts),
                "moe_intermediate_size": 16,
            }
        config = AutoConfig.for_model(self.model_type, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / self.name)
        return folder / self.name


CASES = (
    Case(model_type="qwen3", tied=True, dtype="float32"),
    Case(model_type="qwen3", tied=False, dtype="bfloat16"),
    Case(model_type="llama", tied=False, dtype="float32"),
    Case(model_type="llama", tied=True, dtype="bfloat16"),
    Case(model_type="qwen2", tied=True, dtype="bfloat16"),
    Case(model_type="mistral", tied=False, dtype="bfloat16"),
    Case(model_type="qwen3_moe", tied=False, dtype="bfloat16", num_experts=5),
    # With one expert the second rank's shards of it are empty.
    Case(model_type="qwen3_moe", tied=True, dtype="float32", num_experts=1),
)


class Published:
    """A policy that takes steps and is published to a store."""

    def __init__(
        self, bundle: Path, case: Case, address: str, ranks: Ranks, epoch: int = 1, **network: Any
    ) -> None:
        raw = {
            "run": {"name": case.name},
            "model": {"path": bundle, "dtype": case.dtype},
            "network": {"learner": address, **network},
            "learner": {"lora": case.lora},
        }
        config = Config.model_validate(raw)
        self.ranks = ranks
        self.policy = load_policy(config, ranks)
        self.optimizer = Optimizer(list(self.policy.parameters()), config.learner.train)
        self.publisher = Publisher(self.policy, epoch, config, ranks)
        self._dtype = getattr(torch, case.dtype)
        self._data = samples(24, VOCAB_SIZE)

    def step(self, index: int, rate: float = 1e-4) -> None:
        """A real gradient and a real Adam step."""
        made = self._data[index % 8 * 3 :][self.ranks.data_rank : 3 : self.ranks.data_size]
        (-self.policy(pack(made, self.ranks.device)).logprobs_N.sum()).backward()
        self.optimizer.step(rate)

    def state(self) -> dict[str, np.ndarray]:
        """The checkpoint's tensors in the served dtype, gathered, as words."""
        found = {}
        for name, parameter in self.policy.checkpoint_parameters():
            assert isinstance(parameter, DTensor)
            whole = parameter.detach().full_tensor().to(self._dtype).contiguous()
            found |= checkpoint_tensors(self.policy, name, whole)
        return {name: words(tensor) for name, tensor in found.items()}


def words(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits, in its shape."""
    kind = torch.uint16 if tensor.dtype is torch.bfloat16 else torch.uint32
    return tensor.contiguous().view(kind).numpy().copy()
