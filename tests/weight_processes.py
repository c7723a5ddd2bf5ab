"""Real processes of the learner and of inference replicas, and clients of them."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from conftest import ROOT
from intake_rig import make_config, publish_part
from understudy.config import Config, InferenceConfig, NetworkConfig, write_config
from understudy.config.inference import ScriptedConfig
from understudy.rpc import open_channel
from understudy.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    control_pb2_grpc,
    weight_pb2_grpc,
)
from weight_store_helpers import reason_of


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Processes:
    """The intake and, unless it is in there, the weight store; and a client of both."""

    def __init__(self, folder: Path, own: bool, keep_deltas: int = 32) -> None:
        base = make_config(folder)
        intake = f"127.0.0.1:{free_port()}"
        weights = f"127.0.0.1:{free_port()}" if own else None
        self.config: Config = base.model_copy(
            update={
                "network": NetworkConfig(learner=intake, weights=weights),
                "inference": InferenceConfig(
                    metrics_listen="127.0.0.1:0",
                    engine="scripted",
                    scripted=ScriptedConfig(latency_seconds=0.0),
                ),
                "learner": base.learner.model_copy(
                    update={
                        "listen": intake,
                        "weights": base.learner.weights.model_copy(
                            update={"metrics_listen": "127.0.0.1:0", "keep_deltas": keep_deltas}
                        ),
                    }
                ),
            }
        )
        self.file = write_config(self.config, folder)
        self.running: dict[str, asyncio.subprocess.Process] = {}
        self._drains: list[asyncio.Task[bytes]] = []
        self.intake_channel = open_channel(intake, self.config.network)
        self.weight_channel = open_channel(weights or intake, self.config.network)
        self.batches = batch_pb2_grpc.BatchServiceStub(self.intake_channel)
        self.weights = weight_pb2_grpc.WeightServiceStub(self.weight_channel)
        self.control = control_pb2_grpc.ControlServiceStub(self.intake_channel)

    async def start(self, module: str, failpoint: str = "") -> None:
        """A process of the learner, until it serves."""
        process = await self.spawn(module, "-m", module, failpoint=failpoint)
        await self._serves(process)

    async def start_replica(self, address: str, failpoint: str = "") -> None:
        """An inference replica, until it serves; it goes by its address."""
        process = await self.spawn(
            address,
            *("-m", "understudy.cli", "inference", "--set", f"inference.listen={address}"),
            failpoint=failpoint,
        )
        await self._serves(process)

    async def spawn(
        self, name: str, *command: str, failpoint: str = ""
    ) -> asyncio.subprocess.Process:
        """A process under a name, as soon as there is one."""
        process = self.running[name] = await asyncio.create_subprocess_exec(
            *(sys.executable, *command, "--config", str(self.file)),
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "UNDERSTUDY_FAILPOINT": failpoint},
        )
        return process

    async def _serves(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b"is serving" not in await process.stderr.readline():
                assert process.returncode is None
        self._drains.append(asyncio.create_task(process.stderr.read()))

    async def kill(self, module: str) -> None:
        process = self.running.pop(module)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def train(self) -> int:
        request = batch_pb2.StartTrainingRequest(run_id="run")
        call = self.batches.StartTraining(request, timeout=10, wait_for_ready=True)
        return (await call).epoch

    async def publish(self, *part: object, timeout: float = 10.0) -> int:
        return await publish_part(self.weights, *part, timeout=timeout)

    async def ask_batch(self, epoch: int) -> str:
        request = batch_pb2.NextBatchRequest(step=0, rank=0, world_size=1, epoch=epoch)
        call = self.batches.NextBatch(request, timeout=1, wait_for_ready=True)
        return await reason_of(call.read())


@contextlib.asynccontextmanager
async def processes(folder: Path, *, own: bool, keep_deltas: int = 32) -> AsyncIterator[Processes]:
    started = Processes(folder, own, keep_deltas)
    try:
        yield started
    finally:
        for module in list(started.running):
            await started.kill(module)
        await started.intake_channel.close()
        await started.weight_channel.close()
