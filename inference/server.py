"""The inference server's process.

bind (NOT_SERVING) -> model bundle -> engine -> first weights -> SERVING
  -> signal, Drain or a broken engine -> NOT_SERVING -> running calls end -> engine stops
"""

import asyncio
import gc
import socket
import tempfile
from pathlib import Path

import grpc

from inference.engine import Engine, EngineError
from inference.servicer import InferenceServicer
from inference.subscriber import WeightSubscriber
from understudy import metrics
from understudy.client.bundle import fetch_model_bundle
from understudy.config import Config
from understudy.errors import PeerUnreachableError
from understudy.rpc import RoleControl, RoleServer, Service, open_channel, wait_ready
from understudy.v1 import inference_pb2_grpc

_ENGINE_CHECK_SECONDS = 1.0


async def serve_inference(config: Config) -> int:
    """Serve config.inference until drained. Returns the exit code.

    Raises:
        ConfigError: the address is not usable.
        PeerUnreachableError: no learner, and so no model.
        EngineError: the engine broke.
    """
    engine = make_engine(config)
    control = RoleControl("inference")
    servicer = InferenceServicer(engine, config.inference, control)
    control.figures = servicer.figures
    service = Service(
        name="understudy.v1.InferenceService",
        add=inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        servicer=servicer,
    )
    server = RoleServer("inference", config.inference.listen, config.network, [service], control)
    await server.bind()
    metrics.start_exporter(config.inference.metrics_listen, "inference")
    work = asyncio.create_task(_follow_learner(config, engine, servicer, server))
    drained = asyncio.create_task(control.draining.wait())
    try:
        await asyncio.wait({work, drained}, return_when=asyncio.FIRST_COMPLETED)
        await server.stop()
        if work.done():
            work.result()  # raises what ended it
        return 0
    finally:
        work.cancel()
        drained.cancel()
        await asyncio.gather(work, drained, return_exceptions=True)
        await engine.stop()


def make_engine(config: Config) -> Engine:
    """The engine that the config names; vLLM itself is imported at its start."""
    if config.inference.engine == "scripted":
        from inference.scripted import ScriptedEngine

        return ScriptedEngine(config.inference)
    from inference.vllm_engine import VllmEngine

    return VllmEngine(config.inference, config.model)


async def _follow_learner(
    config: Config, engine: Engine, servicer: InferenceServicer, server: RoleServer
) -> None:
    """Get the model, then stay on its newest weights; ends only by an error."""
    network = config.network
    channel = open_channel(network.learner, network)
    try:
        await wait_ready(channel, "learner", network.learner, network.connect_timeout_seconds)
        with tempfile.TemporaryDirectory(prefix="understudy-bundle-") as folder:
            servicer.bundle_digest = await _fetch_bundle(channel, Path(folder), network.learner)
            await engine.start(Path(folder))
            # Nothing made so far becomes garbage: spare the collector from walking over it.
            gc.collect()
            gc.freeze()
            replica_id = f"{socket.gethostname()}:{server.port}"[-64:]
            subscriber = WeightSubscriber(channel, engine, replica_id, network)
            await asyncio.gather(
                subscriber.run(), _serve_once_ready(subscriber, server), _watch_engine(engine)
            )
    finally:
        await channel.close()


async def _fetch_bundle(channel: grpc.aio.Channel, folder: Path, address: str) -> str:
    try:
        return await fetch_model_bundle(channel, folder)
    except grpc.aio.AioRpcError as error:
        raise PeerUnreachableError(
            f"the learner at {address} did not send its model: {error.code().name} "
            f"{error.details()}; start this replica again"
        ) from None


async def _serve_once_ready(subscriber: WeightSubscriber, server: RoleServer) -> None:
    await subscriber.ready.wait()
    await server.set_serving()


async def _watch_engine(engine: Engine) -> None:
    while engine.failure is None:  # noqa: ASYNC110 - vLLM has no event for it
        await asyncio.sleep(_ENGINE_CHECK_SECONDS)
    raise EngineError(engine.failure)
