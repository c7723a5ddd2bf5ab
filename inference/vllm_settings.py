"""How vLLM is set up: environment and arguments, all in one place."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from understudy.config import InferenceConfig, LoraConfig, ModelConfig

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_log = logging.getLogger(__name__)
_CPU_BATCHED_TOKENS = 8192
"""Most tokens of one step on CPUs."""
_CPU_BLOCK_SIZE = 32
"""Tokens of one KV block on CPUs, whose kernels want multiples of 32."""


def set_vllm_environment(config: InferenceConfig) -> None:
    """Set what vLLM reads from the environment; before its first import.

    The model runs in the core process itself, not in a worker process below it: a hop less for
    every step. On CPUs vLLM would bind threads to cores and take all but one; the process's own
    affinity (`cpus`) and `threads` decide instead.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.tensor_parallel_size == 1 else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(config.threads, 1)),
    }
    os.environ.update(settings)
    # Until vLLM sets up its own loggers, its chatter about missing GPU parts would be ours.
    logging.getLogger("vllm").setLevel(logging.ERROR)


def engine_args(
    bundle: Path,
    config: InferenceConfig,
    model: ModelConfig,
    lora: LoraConfig | None = None,
    transfer_backend: str = "",
) -> "AsyncEngineArgs":
    """vLLM's arguments for this replica; weights come from the shadow if no backend is named.

    Args:
        bundle: folder of the model bundle.
        config: the replica's.
        model: the run's.
        lora: the one adapter that is served; None for none.
        transfer_backend: vLLM's name of what brings weights into the worker.

    Raises:
        ValueError: on CPUs, a mixture of experts with adapters, or one whose routes are wanted.
    """
    from vllm.config import WeightTransferConfig
    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from inference.plugin import BACKEND

    on_cpu = current_platform.is_cpu()
    if on_cpu and model.router_replay:
        raise ValueError(
            "model.router_replay = true, but vLLM records routes on GPUs only; set it to false"
        )
    device: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if on_cpu:
        device = {
            "block_size": _CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * 2**30),
            # A prompt that is read in pieces rewinds its request's random stream, which CPU
            # generators cannot do: one seeded request would end the engine.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.max_model_len, _CPU_BATCHED_TOKENS),
        }
    adapter: dict[str, Any] = {}
    if lora is not None:
        if on_cpu:
            _refuse_experts(bundle)
        adapter = {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank),
            "lora_target_modules": list(lora.target_modules),
        }
    return AsyncEngineArgs(
        model=str(bundle),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=model.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_running,
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager or (on_cpu and not _has_compiler()),
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=on_cpu,  # vLLM's own metrics cost 3 % of a small model's time
        weight_transfer_config=WeightTransferConfig(backend=transfer_backend or BACKEND),
        worker_extension_cls="inference.plugin.ShadowWorker",
        enable_return_routed_experts=model.router_replay,
        **device,
        **adapter,
    )


def _refuse_experts(bundle: Path) -> None:
    """With adapters, wherever they are, vLLM computes experts by kernels that only GPUs have."""
    settings = json.loads((bundle / "config.json").read_bytes())
    for name in ("num_experts", "num_local_experts"):  # as published, and as transformers saves it
        if settings.get(name):
            raise ValueError(
                f"config.json has {name} = {settings[name]}, and a mixture with adapters "
                "(learner.lora.rank above 0) is not served on CPUs; set rank = 0, or use GPUs"
            )


def can_patch() -> bool:
    """Whether this vLLM can change weights in place, which it does on CUDA GPUs only."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return False
    try:
        from vllm.model_executor.model_loader import checkpoint_weight_patch
    except ImportError:
        return False
    return hasattr(checkpoint_weight_patch, "load_checkpoint_weight_patches")


def is_reproducible(config: InferenceConfig) -> bool:
    """Whether a reply depends on nothing but its own request, bit for bit: seen on CPUs with one
    thread in float32, whatever is batched or cached; not expected of GPUs."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and config.threads == 1


def _has_compiler() -> bool:
    """Whether graphs can be compiled for CPUs: 20 % faster, some seconds later."""
    found = shutil.which(os.environ.get("CXX", "g++")) is not None
    if not found:
        _log.warning("no C++ compiler (g++, or $CXX): running without compiled graphs")
    return found
