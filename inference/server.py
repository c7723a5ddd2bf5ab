"""The inference server's process.

bind (NOT_SERVING) -> model bundle -> engine -> first weights -> SERVING
  -> signal, Drain or a broken engine -> NOT_SERVING -> running calls end -> engine stops

What it has of model and weights it passes on to other inference servers, from the start.
"""

import asyncio
import gc
import socket
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import grpc

from inference.engine import Engine, EngineError
from inference.receiver import ReceivingEngine
from inference.reporter import Reporter
from inference.servicer import InferenceServicer
from inference.shelf import Shelf
from inference.subscriber import Upstream, WeightSubscriber
from inference.transfer_servicer import MAX_MESSAGE_BYTES, TransferServicer
from inference.weight_servicer import PassingWeightServicer
from understudy import metrics
from understudy.client.bundle import ModelBundle, read_model_bundle
from understudy.config import Config
from understudy.errors import PeerUnreachableError
from understudy.rpc import (
    RoleControl,
    RoleServer,
    Service,
    open_channel,
    retry_after_seconds,
    wait_ready,
)
from understudy.rpc.channels import MEBIBYTE
from understudy.v1 import inference_pb2_grpc, weight_pb2_grpc

_ENGINE_CHECK_SECONDS = 1.0
_BUNDLE_RETRY_SECONDS = 1.0


async def serve_inference(config: Config) -> int:
    """Serve config.inference until drained. Returns the exit code.

    Raises:
        ConfigError: the address is not usable.
        PeerUnreachableError: no weight store, and so no model.
        EngineError: the engine broke.
    """
    engine = make_engine(config)
    control = RoleControl("inference")
    servicer = InferenceServicer(engine, config.inference, control)
    control.figures = servicer.figures
    shelf = Shelf()
    transfer = None
    if isinstance(engine, ReceivingEngine):
        transfer = TransferServicer(engine, config.learner.weights.transfer_seconds)
    services = (
        Service(
            name="understudy.v1.InferenceService",
            add=inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            servicer=servicer,
        ),
        Service(
            name="understudy.v1.WeightService",
            add=weight_pb2_grpc.add_WeightServiceServicer_to_server,
            servicer=PassingWeightServicer(shelf),
        ),
        *([transfer.service] if transfer else []),
    )
    server = RoleServer(
        "inference",
        config.inference.listen,
        config.network,
        services,
        control,
        MAX_MESSAGE_BYTES if transfer else MEBIBYTE,
    )
    await server.bind()
    metrics.start_exporter(config.inference.metrics_listen, "inference")
    work = asyncio.create_task(_follow_weights(config, engine, servicer, shelf, server, transfer))
    drained = asyncio.create_task(control.draining.wait())
    try:
        await asyncio.wait({work, drained}, return_when=asyncio.FIRST_COMPLETED)
        shelf.close()
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

        return ScriptedEngine(config.inference, router_replay=config.model.router_replay)
    if config.learner.weights.transport != "delta":
        from inference.vllm_receiver import ReceivingVllmEngine

        return ReceivingVllmEngine(config.inference, config.model)
    from inference.vllm_engine import VllmEngine

    return VllmEngine(config.inference, config.model)


async def _follow_weights(
    config: Config,
    engine: Engine,
    servicer: InferenceServicer,
    shelf: Shelf,
    server: RoleServer,
    transfer: TransferServicer | None,
) -> None:
    """Get the model, then stay on its newest weights; ends only by an error."""
    network = config.network
    async with open_channel(network.learner, network) as learner, AsyncExitStack() as stack:
        address = config.inference.weights.upstream or network.weights or network.learner
        channel = learner
        if address != network.learner:
            channel = await stack.enter_async_context(open_channel(address, network))
        patience = network.connect_timeout_seconds
        upstream = Upstream(
            channel=channel, learner=learner, address=address, patience_seconds=patience
        )
        name = "weight store" if channel is not learner else "learner"
        await wait_ready(channel, name, address, patience)
        shelf.bundle = await _fetch_bundle(upstream)
        servicer.bundle_digest = shelf.bundle.digest
        with tempfile.TemporaryDirectory(prefix="understudy-bundle-") as folder:
            shelf.bundle.write(Path(folder))
            await engine.start(Path(folder))
            if config.run.deterministic and not engine.reproducible:
                raise EngineError(
                    "run.deterministic = true: replies of this engine depend on what is batched "
                    "with them; run it on a CPU, or leave the field out"
                )
            # Nothing made so far becomes garbage: spare the collector from walking over it.
            gc.collect()
            gc.freeze()
            replica_id = f"{socket.gethostname()}:{server.port}"[-64:]
            if transfer:
                transfer.started(Reporter(engine, learner, replica_id))
                ready = _serve_once_ready(transfer.ready, server)
                await asyncio.gather(ready, _watch_engine(engine))
                return
            subscriber = WeightSubscriber(upstream, engine, replica_id, shelf)
            ready = _serve_once_ready(subscriber.ready, server)
            await asyncio.gather(subscriber.run(), ready, _watch_engine(engine))


async def _fetch_bundle(upstream: Upstream) -> ModelBundle:
    """Fetch the model; a node that has none yet itself is asked again.

    Raises:
        PeerUnreachableError: there is none within network.connect_timeout_seconds.
    """
    end = time.monotonic() + upstream.patience_seconds
    while True:
        try:
            return await read_model_bundle(upstream.channel)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                raise PeerUnreachableError(
                    f"{upstream.address} did not send its model: {error.code().name} "
                    f"{error.details()}; start this replica again"
                ) from None
            await asyncio.sleep(retry_after_seconds(error) or _BUNDLE_RETRY_SECONDS)


async def _serve_once_ready(ready: asyncio.Event, server: RoleServer) -> None:
    await ready.wait()
    await server.set_serving()


async def _watch_engine(engine: Engine) -> None:
    while engine.failure is None:  # noqa: ASYNC110 - vLLM has no event for it
        await asyncio.sleep(_ENGINE_CHECK_SECONDS)
    raise EngineError(engine.failure)
