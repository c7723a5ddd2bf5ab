"""vLLM as the engine: AsyncLLM in this process, its core (scheduler and model) in one child.

The order of a weight update, while requests run:

    pause(keep) -> reload from the shadow, or patch -> adapters -> stamp the version -> resume

On GPUs what changed is patched in place where vLLM can do that (found out by looking for it, not by
version; **not run yet**); everywhere else, and after a patch that failed, the model is reloaded.
Requests stay in the scheduler. With `kv_on_update = "refresh"` the pause drops all keys and values,
so running requests read their tokens again under the new weights; with "keep" they go on with the
old ones. New requests never meet old keys and values either way: the prefix cache is salted by the
version that a request began under, a number that is never used again. What a request that goes on
adds to the cache stays under its own salt, which no later request gets.

Where the model bundle describes adapters, vLLM gets them as such, by files that are written before
the pause, and every request names them. The model itself is loaded with the first version, and
again only if its values are others.

A reload that fails is healed by reloading the shadow of the version before; if that fails too, the
engine refuses to serve.
"""

import asyncio
import functools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.adapter import AdapterFolder, adapter_request
from inference.engine import Engine, EngineError, Generation, GenerationRequest, WeightLoadError
from inference.patch import Patch, make_patch
from inference.vllm_settings import (
    can_patch,
    engine_args,
    is_reproducible,
    set_vllm_environment,
)
from inference.weights import Shadow
from understudy.config import InferenceConfig, ModelConfig
from understudy.trajectory import FloatArray, IntArray, VersionSpan
from understudy.weights.adapter import is_adapter, read_adapter

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_log = logging.getLogger(__name__)


class VllmEngine(Engine):
    """Continuous batching with in-flight weight updates."""

    name = "vllm"
    _transfer_backend = ""
    """vLLM's name of what brings weights into the worker; the shadow's own if empty."""

    def __init__(self, config: InferenceConfig, model: ModelConfig) -> None:
        self._config = config
        self._model = model
        self.returns_routes = model.router_replay
        self._llm: AsyncLLM | None = None
        self._vocab_size = 0
        self._version = 0
        self._open = asyncio.Event()
        self._patches = False
        """Whether weights can be changed in place."""
        self._adapters: AdapterFolder | None = None
        """Adapters on their way into vLLM; None if the model has none."""
        self._loaded: Shadow | None = None
        """Weights that are served; an update that fails is healed from them."""
        self._broken: str | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows; valid after start."""
        return self._vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus reply in tokens."""
        return self._config.max_model_len

    @property
    def version(self) -> int:
        """Policy version that new requests get; 0 before the first weights."""
        return self._version

    @property
    def failure(self) -> str | None:
        """Why the engine cannot serve any more; None while it can."""
        if self._broken is None and self._llm is not None and self._llm.errored:
            self._broken = "vLLM's core process died; restart this replica"
        return self._broken

    async def start(self, bundle: Path) -> None:
        """Start vLLM with made-up weights and let it compile its kernels."""
        set_vllm_environment(self._config)
        if lora := read_adapter(bundle):
            self._adapters = AdapterFolder(lora)
        # Takes many seconds; in a thread, so that health checks and signals are answered.
        try:
            await asyncio.to_thread(self._make_llm, bundle)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM does not start with this model and config: {error}") from error
        assert self._llm is not None
        self._open.set()
        self._patches = can_patch()
        self.reproducible = is_reproducible(self._config)
        self._vocab_size = self._llm.model_config.get_vocab_size()
        await self._llm.update_weight_version("0")
        await self._warm_up()

    def _make_llm(self, bundle: Path) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        lora = self._adapters.lora if self._adapters else None
        settings = engine_args(bundle, self._config, self._model, lora, self._transfer_backend)
        self._llm = AsyncLLM.from_engine_args(settings)

    async def _warm_up(self) -> None:
        # The first requests compile kernels, which takes seconds: do it before anybody waits.
        length = min(64, self.max_model_len - 2)
        prompt = np.arange(length, dtype=np.int32) % self._vocab_size
        await asyncio.gather(
            *(
                self.generate(
                    GenerationRequest(
                        request_id=f"warm-up-{index}",
                        prompt_token_ids=prompt,
                        temperature=float(index % 2),
                        max_new_tokens=2,
                        seed=0 if index == 3 else None,
                    )
                )
                for index in range(4)
            )
        )
        await self.prompt_logprobs(prompt)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample one reply. Cancelling the task aborts the request in vLLM."""
        output = await self._run(
            request.request_id, request.prompt_token_ids, _sampling_params(request)
        )
        return _generation(output.outputs[0], with_routes=request.routes_from is not None)

    async def prompt_logprobs(self, token_ids: IntArray) -> FloatArray:
        """[N-1] log-probability of token 1..N-1 given those before it, at temperature 1."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(f"probe-{time.monotonic_ns()}", token_ids, params)
        # vLLM writes nothing for the first token, which nothing predicts.
        flat: Any = output.prompt_logprobs
        return np.asarray(flat.logprobs, np.float32)

    async def _run(
        self, request_id: str, prompt_token_ids: IntArray, params: "SamplingParams"
    ) -> "RequestOutput":
        await self._open.wait()
        if self._llm is None or self._broken:
            raise EngineError(self._broken or "the engine is not started")
        prompt: Any = {
            "type": "token",
            "prompt_token_ids": prompt_token_ids.tolist(),
            "cache_salt": str(self._version),
        }
        final: RequestOutput | None = None
        try:
            # To its end, although the first output is the last: a generator left early would send
            # an abort for the finished request.
            served = self._adapters.served if self._adapters else None
            adapter = adapter_request(served) if served else None
            async for output in self._llm.generate(
                prompt, params, request_id, lora_request=adapter
            ):
                final = output
        except _engine_dead_error() as error:
            self._broken = f"vLLM died: {error}; restart this replica"
            raise EngineError(self._broken) from error
        if final is None or not final.finished:
            raise EngineError(f"vLLM ended request {request_id} without an output")
        return final

    async def load_weights(self, shadow: Shadow, version: int) -> float:
        """Serve the shadow's weights as this version from now on."""
        if self._llm is None or self._broken:
            raise EngineError(self._broken or "the engine is not started")
        patch, adapter = None, await self._write_adapter(shadow, version)
        if self._patches and self._loaded is not None and adapter is None:
            patch = await asyncio.to_thread(make_patch, self._loaded, shadow)
        start = time.perf_counter()
        self._open.clear()  # a request that came now would be salted with the old version
        try:
            await self._replace_or_heal(shadow, version, patch, adapter)
            await self._llm.engine_core.resume_scheduler_async()
        except WeightLoadError:
            await self._llm.engine_core.resume_scheduler_async()
            raise
        except asyncio.CancelledError:
            self._broken = "a weight update was cancelled half-way; restart this replica"
            raise
        finally:
            self._open.set()
            if patch is not None:
                patch.close()
        return time.perf_counter() - start

    async def _write_adapter(self, shadow: Shadow, version: int) -> Path | None:
        """Write the version's adapters for vLLM; None if the model has none."""
        if self._adapters is None:
            if any(is_adapter(entry.name) for entry in shadow.layout):
                raise WeightLoadError(f"version {version} has adapters, the model bundle has none")
            return None
        try:
            return await asyncio.to_thread(self._adapters.write, shadow, version)
        except (ValueError, OSError) as error:
            raise WeightLoadError(f"version {version}: {error}") from error

    async def _replace_or_heal(
        self, shadow: Shadow, version: int, patch: Patch | None, adapter: Path | None
    ) -> None:
        assert self._llm is not None
        refresh = self._config.kv_on_update == "refresh"
        try:
            # AsyncLLM.pause_generation adds 20 ms of sleep that correctness does not need.
            await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=refresh)
            if not self._has_base_of(shadow) and (
                patch is None or not await self._try_patch(patch)
            ):
                await self._reload(shadow)
            if adapter is not None:
                await self._load_adapter(adapter)
            await self._llm.update_weight_version(str(version))
        except Exception as error:  # whatever the worker raised, in vLLM's or torch's words
            await self._heal(error)
            raise WeightLoadError(f"version {version}: {error}") from error
        self._loaded, self._version = shadow, version
        if self._adapters is not None and adapter is not None:
            self._adapters.keep(adapter)

    def _has_base_of(self, shadow: Shadow) -> bool:
        """Whether adapters are all that is new in a shadow."""
        if self._adapters is None or self._loaded is None or not shadow.base_digest:
            return False
        return shadow.base_digest == self._loaded.base_digest

    async def _load_adapter(self, path: Path) -> None:
        """Put adapters in the place of those before, for running requests too."""
        assert self._llm is not None
        if not await self._llm.add_lora(adapter_request(path, load=True)):
            raise ValueError("vLLM did not load the adapters")

    async def _try_patch(self, patch: Patch) -> bool:
        """Change weights in place; False if they are undefined now."""
        assert self._llm is not None
        try:
            await self._replace({"path": patch.path, "patches": [list(t) for t in patch.tensors]})
            return True
        except Exception as error:  # as in _replace_or_heal
            _log.error("a patch of the weights failed half-way (%s); loading all of them", error)
            await self._llm.collective_rpc("abandon_weight_update")
            return False

    async def _reload(self, shadow: Shadow) -> None:
        tensors = [
            [entry.name, entry.dtype, list(entry.shape), entry.offset]
            for entry in shadow.layout
            if not is_adapter(entry.name)
        ]
        await self._replace({"path": shadow.path, "tensors": tensors})

    async def _replace(self, update_info: dict[str, Any]) -> None:
        assert self._llm is not None
        await self._llm.collective_rpc("replace_weights", args=(update_info,))

    async def _heal(self, cause: Exception) -> None:
        """Bring back the version that was served, if there was one."""
        assert self._llm is not None
        try:
            await self._llm.collective_rpc("abandon_weight_update")
            if self._loaded is not None:
                await self._reload(self._loaded)
                if self._adapters is not None and self._adapters.served is not None:
                    await self._load_adapter(self._adapters.served)
                await self._llm.update_weight_version(str(self._version))
        except Exception as error:  # as above
            self._broken = (
                f"weights are undefined: an update failed ({cause}) and version {self._version} "
                f"could not be brought back ({error}); restart this replica"
            )
            raise EngineError(self._broken) from error

    async def stop(self) -> None:
        """End vLLM's process; running requests fail."""
        llm, self._llm = self._llm, None
        if llm is not None:
            self._broken = "the engine was stopped"
            self._open.set()
            await asyncio.to_thread(llm.shutdown)
        if self._adapters is not None:
            self._adapters.close()


def _sampling_params(request: GenerationRequest) -> "SamplingParams":
    params_cls, final_only = _sampling_types()
    params: SamplingParams = params_cls(
        temperature=request.temperature,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,
        seed=request.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=final_only,
        skip_clone=True,
        routed_experts_prompt_start=request.routes_from or 0,
    )
    return params


@functools.cache
def _engine_dead_error() -> type[Exception]:
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


@functools.cache
def _sampling_types() -> tuple[Any, Any]:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams, RequestOutputKind.FINAL_ONLY


def _generation(output: "CompletionOutput", *, with_routes: bool) -> Generation:
    token_ids = np.asarray(output.token_ids, np.int32)
    logprobs: Any = output.logprobs
    return Generation(
        token_ids=token_ids,
        logprobs=np.asarray(logprobs.logprobs, np.float32),
        version_spans=tuple(
            VersionSpan(version=int(span.version), start=span.start, end=span.end)
            for span in output.weight_versions or ()
        ),
        finish_reason="stop" if output.finish_reason == "stop" else "length",
        routes=output.routed_experts if with_routes else None,
    )
