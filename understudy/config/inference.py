"""[inference]: the inference server's section."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from understudy.config.base import Section
from understudy.config.shared import Address, HostPort, Positive, ProcessConfig


class ScriptedConfig(Section):
    """[inference.scripted]: the engine that plays a script, for tests and benchmarks."""

    latency_seconds: NonNegativeFloat = 0.05
    """Time that every reply takes."""
    replies: tuple[str, ...] = ("ok",)
    """Reply texts; the n-th call with one prefix key gets the n-th, the last one repeats."""


class UpstreamConfig(Section):
    """[inference.weights]: where weights come from."""

    upstream: Address | None = None
    """Inference server that passes on the model and its weights, which spares the learner's network
    where there are many; not set takes them from the weight store itself."""


class InferenceConfig(ProcessConfig):
    """[inference]: batched generation."""

    listen: Address = "127.0.0.1:7100"
    """Address of the gRPC server."""
    metrics_listen: HostPort = "127.0.0.1:9100"
    engine: Literal["vllm", "scripted"] = "vllm"
    """What samples tokens."""
    max_model_len: PositiveInt = 4096
    """Longest prompt plus reply in tokens."""
    max_running: PositiveInt = 256
    """Requests that the engine batches at one time."""
    max_queued_tokens: PositiveInt = 4_000_000
    """Prompt plus reply tokens admitted at one time; past that a call is refused with a hint."""
    kv_on_update: Literal["refresh", "keep"] = "refresh"
    """Running requests at a weight update: `refresh` re-reads their tokens under the new weights,
    `keep` goes on with the old keys and values (no recomputation, slightly off-policy)."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one replica."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of GPU memory that the engine takes."""
    cpu_kv_cache_gib: Positive = 1.0
    """KV cache on a machine without GPU, in GiB."""
    threads: NonNegativeInt = 1
    """OpenMP threads of a CPU engine."""
    enforce_eager: bool = False
    """Do without compiled graphs: starts faster, runs slower on GPUs."""
    scripted: ScriptedConfig = ScriptedConfig()
    weights: UpstreamConfig = UpstreamConfig()
