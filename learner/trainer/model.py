"""The policy: a Hugging Face causal language model, sharded by FSDP2.

Shapes: B rows, T tokens a row, N positions whose next token counts, D width, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.trainer.logprobs import chosen_logprobs
from learner.trainer.microbatches import Microbatch
from learner.trainer.ranks import Ranks
from understudy.config import Config
from understudy.errors import ConfigError

_PREFIX = "language_model."


class Policy(nn.Module):
    """A language model that answers with log-probabilities of given tokens, never with logits."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, micro: Microbatch[Any], temperature: float = 1.0) -> Tensor:
        """Log-probability [N] of each target of a micro-batch, in float32.

        Rows are padded on the right, so that causal attention alone keeps padding out of sight:
        no mask is needed, and the fast kernels apply.
        """
        hidden_BTD = self.language_model.base_model(
            input_ids=micro.tokens_BT, use_cache=False
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[micro.positions_N]
        head = self.language_model.get_output_embeddings()
        return chosen_logprobs(hidden_ND, head.weight, micro.targets_N, temperature)

    def checkpoint_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the checkpoint; a tied one comes once."""
        for name, parameter in self.named_parameters():
            yield name.removeprefix(_PREFIX), parameter

    @property
    def model_type(self) -> str:
        """Architecture, as config.json names it."""
        return str(self.language_model.config.model_type)


def load_policy(
    folder: Path, dtype: Literal["float32", "bfloat16"], attention: str, ranks: Ranks
) -> Policy:
    """Load a model into host memory and shard it over the ranks, on their device.

    Parameters and the optimizer's state are float32; with bfloat16 the passes compute in it.

    Raises:
        ConfigError: when the folder holds no model, or one that needs code of its own.
    """
    _refuse_foreign(folder)
    language_model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=False,
        local_files_only=True,
    )
    policy = Policy(language_model.train())
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    # Whole layers stay between forward and backward on CPUs, where gathering them is what is slow.
    reshard = ranks.device.type == "cuda"
    layers = cast("nn.ModuleList", language_model.base_model.layers)
    for module in (*layers, policy):
        fully_shard(module, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=reshard)
    return policy


def _refuse_foreign(folder: Path) -> None:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = '{folder}': {str(error).splitlines()[0]}") from None
    if getattr(config, "auto_map", None):
        raise ConfigError(f"model.path = '{folder}': config.json has auto_map, code of its own")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ConfigError(f"model.path = '{folder}': {name} is not supported")


@torch.no_grad()
def frozen_logprobs(policy: Policy, micro: Microbatch[Any], temperature: float = 1.0) -> Tensor:
    """Log-probabilities without gradient, with all gathered parameters let go afterwards."""
    logprobs_N: Tensor = policy(micro, temperature)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return logprobs_N


def load_reference(config: Config, ranks: Ranks) -> Policy | None:
    """The model that the run began with, without gradients, if the loss has a term for it."""
    if not config.learner.train.kl_coefficient:
        return None
    policy = load_policy(config.model.path, config.model.dtype, config.learner.attention, ranks)
    return policy.requires_grad_(False)


@torch.no_grad()
def reference_logprobs(reference: Policy, micro: Microbatch[Any], temperature: float) -> Tensor:
    """Log-probabilities [N] of a policy that never changes; it stays gathered on CPUs."""
    logprobs_N: Tensor = reference(micro, temperature)
    return logprobs_N


def defer_gradients(policy: Policy, *, last: bool) -> None:
    """Reduce gradients over the ranks at the last micro-batch only, where memory allows it."""
    assert isinstance(policy, FSDPModule)
    on_cpu = next(policy.parameters()).device.type == "cpu"
    policy.set_requires_gradient_sync(last or not on_cpu)
