"""What runs inside vLLM's workers: new weights come from the shadow.

vLLM loads `register` through the entry point group `vllm.general_plugins`; importing this module
for the worker extension registers too, so that a source tree works without being installed.

A shadow holds whole checkpoints, because vLLM can only reload whole modules: its linear layers are
fused (q, k, v are one) and, on CPUs, packed when loaded. On GPUs weights lie there as they are, and
vLLM can change single values in place: there a patch suffices. The order of one update is

    start_weight_update -> update_weights(ShadowUpdate) -> finish_weight_update

in one call, and generation is paused around it. An update that failed is ended by
`abandon_weight_update`; the weights are then undefined until the next whole update.

vLLM's processes end with the one that started them, however that ended: an engine that outlived a
replica that was killed would keep its memory, of which a GPU has none to spare for the next one.
"""

import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from inference.patch import TensorPatch

BACKEND = "understudy-shadow"
"""Name of the weight-transfer backend."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass
class ShadowInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ShadowUpdate(WeightTransferUpdateInfo):
    """Where the new weights lie."""

    path: str = ""
    """File to map: a shadow or a patch."""
    tensors: list[tuple[str, str, list[int], int]] = field(default_factory=list)
    """(name, dtype, shape, offset in bytes) of each tensor of a shadow."""
    patches: list[list[Any]] | None = None
    """TensorPatch of each tensor of a patch; None for a shadow."""


class ShadowTransfer(WeightTransferEngine[ShadowInit, ShadowUpdate]):
    """Reloads the whole model from a mapped shadow, or patches it in place."""

    init_info_cls = ShadowInit
    update_info_cls = ShadowUpdate

    def init_transfer_engine(self, init_info: ShadowInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """What there is to begin depends on the update."""

    def receive_weights(self, update_info: ShadowUpdate) -> None:
        """Load or patch all tensors. Raises when a module lacks part of its weights."""
        if update_info.patches is None:
            self._reload(update_info)
        elif update_info.patches:
            mapped = _map(update_info.path)
            patches = (TensorPatch(*item) for item in update_info.patches)
            patch_model(self.model, mapped, patches, self.device)

    def _reload(self, update_info: ShadowUpdate) -> None:
        # Every module is taken apart into what the checkpoint has, and put together again at last.
        initialize_layerwise_reload(self.model)
        model: Any = self.model
        model.load_weights(_tensors(_map(update_info.path), update_info.tensors))
        missing = list(_incomplete_modules(self.model))
        if missing:
            raise ValueError(f"the checkpoint lacks weights of {', '.join(missing[:8])}")
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        _refresh_output_layer(self.model)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def abandon(self) -> None:
        """End an update that failed: drop what was buffered, so that the next one starts clean."""
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        """Nothing is held."""


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        # Private pages: torch wants a writable buffer, and a bug here must not reach others.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def patch_model(
    model: torch.nn.Module,
    mapped: mmap.mmap,
    patches: Iterable[TensorPatch],
    device: torch.device,
) -> None:
    """Change single values in place. Half of them are changed if this fails."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    def read(dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).to(device)

    load_checkpoint_weight_patches(
        model,
        [
            CheckpointWeightPatch(
                name=patch.name,
                shape=tuple(patch.shape),
                dtype=_DTYPES[patch.dtype],
                values=read(_DTYPES[patch.dtype], patch.num_changed, patch.values_offset),
                indices=read(
                    torch.int32 if patch.position_bytes == 4 else torch.int64,
                    patch.num_changed,
                    patch.positions_offset,
                ),
            )
            for patch in patches
        ],
        validate_unique_indices=False,
    )


def _tensors(
    mapped: mmap.mmap, tensors: list[tuple[str, str, list[int], int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype, shape, offset in tensors:
        count = int(torch.Size(shape).numel())
        flat = torch.frombuffer(mapped, dtype=_DTYPES[dtype], count=count, offset=offset)
        yield name, flat.reshape(shape)


def _incomplete_modules(model: torch.nn.Module) -> Iterator[str]:
    """Modules that wait for weights: silent garbage if served.

    Vocabulary layers are padded, so part of them is never loaded; they must have something. A tied
    output layer has its weights from the embedding.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if not info.can_load() or is_deferred_attention_layer(module):
            continue
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if isinstance(module, VocabParallelEmbedding):
            if not info.load_numel and not (tied and name.endswith("lm_head")):
                yield name
        elif info.load_numel < (info.load_numel_total or 0):
            yield name


def _refresh_output_layer(model: torch.nn.Module) -> None:
    # On CPUs the output layer computes with a packed copy. Tied to the embedding it has no weights
    # of its own to load, so the reload passes it by and the copy stays old.
    head = getattr(model, "lm_head", None)
    if head is not None and current_platform.is_cpu():
        head.quant_method.process_weights_after_loading(head)


class ShadowWorker:
    """Methods that every vLLM worker gets."""

    def replace_weights(self: Any, update_info: dict[str, Any]) -> None:
        """A whole update in one call: each further one would wait for the core once more."""
        self.start_weight_update()
        self.update_weights(update_info)
        self.finish_weight_update()

    def abandon_weight_update(self: Any) -> None:
        """End an update that failed in this or another worker."""
        if self._weight_update_active or any(
            get_layerwise_info(module).can_load() for module in self.model_runner.model.modules()
        ):
            self.weight_transfer_engine.abandon()
        self._weight_update_active = False


def register() -> None:
    """Make the backend known to vLLM. Idempotent."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ShadowTransfer)


def _end_with_parent() -> None:
    """Follow the process that started this one, if it is one of multiprocessing's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), name="follow", daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


register()
_end_with_parent()
