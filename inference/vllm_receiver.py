"""vLLM's engine with one of vLLM's own weight transfer backends in place of the shadow.

    start_update -> paused -> receive_weights -> finish_update -> stamped with the version, resumed

**Not run yet**: NCCL needs a GPU for the trainer and one for the engine.
"""

import time

from inference.engine import EngineError
from inference.receiver import Info, ReceivingEngine
from inference.vllm_engine import VllmEngine


class ReceivingVllmEngine(VllmEngine, ReceivingEngine):
    """Takes weights from the trainer's GPU; no shadow, and nothing to go back to."""

    _transfer_backend = "nccl"
    _paused_at = 0.0

    @property
    def num_workers(self) -> int:
        """Processes that join the trainer's group."""
        return self._config.tensor_parallel_size

    async def init_transfer(self, info: Info) -> None:
        """Join the trainer's group; the engine stands still meanwhile."""
        await self._call("init_weight_transfer_engine", info)

    async def start_update(self) -> None:
        """Pause generation, keeping its requests; new ones wait."""
        assert self._llm is not None
        self._paused_at = time.perf_counter()
        self._open.clear()
        refresh = self._config.kv_on_update == "refresh"
        await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=refresh)
        await self._call("start_weight_update")

    async def receive_weights(self, info: Info) -> None:
        """Receive all values."""
        await self._call("update_weights", info)

    async def finish_update(self, version: int) -> float:
        """Serve what was received as this version. Returns seconds of pause."""
        assert self._llm is not None
        await self._call("finish_weight_update")
        await self._llm.update_weight_version(str(version))
        self._version = version
        await self._llm.engine_core.resume_scheduler_async()
        self._open.set()
        return time.perf_counter() - self._paused_at

    def fail(self, cause: str) -> None:
        """Serve no more; requests that wait for the end of the pause fail."""
        self._broken = cause
        self._open.set()

    async def _call(self, method: str, *arguments: Info) -> None:
        if self._llm is None or self._broken:
            raise EngineError(self._broken or "the engine is not started")
        await self._llm.collective_rpc(method, args=arguments)
