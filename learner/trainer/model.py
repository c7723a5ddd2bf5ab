"""The policy: a Hugging Face causal language model, sharded by FSDP2, with or without a value head.

All of it learns, or its adapters do (lora.py).

Shapes as in packing.py: T tokens a pack, S sequences, N positions whose next token counts; D width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.trainer import attention
from learner.trainer.architectures import mapping_of
from learner.trainer.logprobs import chosen_logprobs
from learner.trainer.lora import (
    Adapter,
    add_adapter,
    digest_base,
    published_name,
    without_adapter,
)
from learner.trainer.losses.tokens import Outputs
from learner.trainer.packing import Pack
from learner.trainer.ranks import Ranks
from learner.trainer.router_replay import RouterReplay
from learner.trainer.tensor_parallel import divided_logprobs, parallelize, sharding
from learner.weights.bundle import refuse_adapter
from understudy.config import Config
from understudy.errors import ConfigError

_PREFIX = "language_model."
Reference = Callable[[Pack[Any], float], Tensor]
"""Log-probabilities [N] of the model that the run began with, of a pack at a temperature."""


class Policy(nn.Module):
    """A language model that answers with log-probabilities of given tokens, never with logits.

    Args:
        language_model: of transformers.
        critic: whether to add a value head; every state is worth 0 to it at the start.
        tensor_mesh: this rank's tensor group, over which the language model is cut; None if not.
        adapter: what it has where its adapters learn; None where all of it does.
        replay: where routers are told where tokens went; None leaves all of them to the model.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        *,
        critic: bool = False,
        tensor_mesh: DeviceMesh | None = None,
        adapter: Adapter | None = None,
        replay: RouterReplay | None = None,
    ) -> None:
        super().__init__()
        self._replay = replay
        self.language_model = language_model
        self.adapter = adapter
        self._chosen_logprobs = (
            chosen_logprobs if tensor_mesh is None else partial(divided_logprobs, tensor_mesh)
        )
        self.value_head: nn.Linear | None = None
        if critic:
            self.value_head = nn.Linear(language_model.config.hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self, packed: Pack[Any], temperature: float = 1.0, *, with_entropy: bool = False
    ) -> Outputs:
        """Pass over a pack."""
        if self._replay:
            self._replay.set(packed.routes_LTK)
        hidden_TD = self.language_model.base_model(
            input_ids=packed.tokens_1T,
            position_ids=packed.places_1T,
            use_cache=False,
            **attention.extent_of(packed.lengths, packed.tokens_1T.device),
        ).last_hidden_state[0]
        hidden_ND = hidden_TD[packed.positions_N]
        head = self.language_model.get_output_embeddings()
        logprobs_N, entropies_N = self._chosen_logprobs(
            hidden_ND, head.weight, packed.targets_N, temperature, with_entropy=with_entropy
        )
        if self.value_head is None:
            return Outputs(logprobs_N=logprobs_N, entropies_N=entropies_N)
        return Outputs(
            logprobs_N=logprobs_N,
            entropies_N=entropies_N,
            values_N=self._values(hidden_ND),
            end_values_E=self._values(hidden_TD[packed.ends_E]),
        )

    def _values(self, hidden_MD: Tensor) -> Tensor:
        """[M] float32, whatever the passes compute in."""
        assert self.value_head is not None
        weight_D, bias_1 = self.value_head.weight[0].float(), self.value_head.bias.float()
        return hidden_MD.float() @ weight_D + bias_1

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that learn, under their published names if they have one; tied ones once."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield self._published(name), parameter

    def checkpoint_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the language model under their published names; tied ones once.

        Those are the names in the checkpoint, and adapters' in peft's files.
        """
        for name, parameter in self.named_parameters():
            if name.startswith(_PREFIX):
                yield self._published(name), parameter

    def _published(self, name: str) -> str:
        plain = name.removeprefix(_PREFIX)
        return published_name(plain) if self.adapter and plain != name else plain

    def checkpoint_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that the checkpoint has, under their names there; each rank holds all of them.

        Raises:
            ConfigError: for one that is not of floating point numbers.
        """
        for path, module in self.named_modules():
            for name, buffer in module.named_buffers(path, recurse=False):
                # Which nothing public tells.
                if name.rpartition(".")[2] in module._non_persistent_buffers_set:
                    continue
                if not buffer.is_floating_point():
                    raise ConfigError(
                        f"buffer {name.removeprefix(_PREFIX)} is {buffer.dtype}; only floating "
                        "point numbers can be published"
                    )
                yield name.removeprefix(_PREFIX), buffer

    @property
    def model_type(self) -> str:
        """Architecture, as config.json names it."""
        return str(self.language_model.config.model_type)


def load_policy(config: Config, ranks: Ranks, *, critic: bool = False) -> Policy:
    """Load the run's model into host memory and shard it over the ranks, on their device.

    Parameters that learn and the optimizer's state are float32; with bfloat16 the passes compute in
    it. A model that stays as it is, with adapters that learn, is held in the type of the passes.

    Raises:
        ConfigError: when the folder holds no model, one of an architecture that is not known, or
            one that needs code of its own; or when what is configured needs a GPU.
    """
    model, train, lora = config.model, config.learner.train, config.learner.lora
    _refuse_foreign(model.path)
    dtype = getattr(torch, model.dtype)
    language_model = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=dtype if lora.rank else torch.float32,
        attn_implementation=attention.NAME,
        trust_remote_code=False,
        local_files_only=True,
    )
    if ranks.tensor_mesh is not None:
        parallelize(language_model, ranks.tensor_mesh)
    replay = RouterReplay(language_model) if model.router_replay else None
    adapter = None
    if lora.rank:
        add_adapter(language_model, lora, config.run.seed)
        adapter = Adapter(config=lora, base_digest=digest_base(model.path, ranks))
    policy = Policy(
        language_model.train(),
        critic=critic,
        tensor_mesh=ranks.tensor_mesh,
        adapter=adapter,
        replay=replay,
    )
    layers = cast("nn.ModuleList", language_model.base_model.layers)
    if train.activation_checkpointing:
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if train.compile:
        for layer in layers:
            layer.compile()
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Whole layers stay between forward and backward on CPUs, where gathering them is what is slow.
    on_gpu = ranks.device.type == "cuda"
    offload = CPUOffloadPolicy() if train.offload else OffloadPolicy()
    if train.offload and not on_gpu:
        raise ConfigError("learner.train.offload = true, but there is no GPU to offload from")
    data_mesh, placement = sharding(ranks)
    for module in (*layers, policy):
        fully_shard(
            module,
            mesh=data_mesh,
            shard_placement_fn=placement,
            mp_policy=precision,
            reshard_after_forward=on_gpu,
            offload_policy=offload,
        )
    return policy


def _refuse_foreign(folder: Path) -> None:
    refuse_adapter(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = '{folder}': {str(error).splitlines()[0]}") from None
    if getattr(config, "auto_map", None):
        raise ConfigError(f"model.path = '{folder}': config.json has auto_map, code of its own")
    mapping_of(config.model_type)  # rather now than when the first version is published
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ConfigError(f"model.path = '{folder}': {name} is not supported")


@torch.no_grad()
def frozen_output(policy: Policy, packed: Pack[Any], temperature: float = 1.0) -> Outputs:
    """The policy's output without gradient, with all gathered parameters let go afterwards."""
    output: Outputs = policy(packed, temperature)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return output


def load_reference(config: Config, policy: Policy, ranks: Ranks) -> Reference | None:
    """The model that the run began with, if the loss has a term for it.

    Where adapters learn, that is the policy without them; else it is loaded a second time, and
    stays gathered on CPUs.
    """
    if not config.learner.algorithm.kl_coefficient:
        return None
    if policy.adapter:
        return partial(_base_logprobs, policy)
    return partial(_logprobs, load_policy(config, ranks).requires_grad_(False))


@torch.no_grad()
def _logprobs(policy: Policy, packed: Pack[Any], temperature: float) -> Tensor:
    output: Outputs = policy(packed, temperature)
    return output.logprobs_N


def _base_logprobs(policy: Policy, packed: Pack[Any], temperature: float) -> Tensor:
    with without_adapter(policy):
        return _logprobs(policy, packed, temperature)


def defer_gradients(policy: Policy, *, last: bool) -> None:
    """Reduce gradients over the ranks at the last micro-batch only, where memory allows it."""
    assert isinstance(policy, FSDPModule)
    on_cpu = next(policy.parameters()).device.type == "cpu"
    policy.set_requires_gradient_sync(last or not on_cpu)
