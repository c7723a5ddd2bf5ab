"""How vLLM is set up: environment and arguments, all in one place."""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.config import InferenceConfig, ModelConfig

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


def engine_args(bundle: Path, config: InferenceConfig, model: ModelConfig) -> "AsyncEngineArgs":
    """vLLM's arguments for this replica."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from inference.plugin import BACKEND

    on_cpu = current_platform.is_cpu()
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
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls="inference.plugin.ShadowWorker",
        **device,
    )


def _has_compiler() -> bool:
    """Whether graphs can be compiled for CPUs: 20 % faster, some seconds later."""
    found = shutil.which(os.environ.get("CXX", "g++")) is not None
    if not found:
        _log.warning("no C++ compiler (g++, or $CXX): running without compiled graphs")
    return found
