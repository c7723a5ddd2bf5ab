"""A service that fails as its requests say, served over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpc import StatusCode

from conftest import serving
from understudy.config import NetworkConfig
from understudy.rpc import Service, ServiceError, open_channel
from understudy.v1 import environment_pb2, environment_pb2_grpc

NETWORK = NetworkConfig()
SERVICE = "understudy.v1.EnvironmentService"


class Faults(environment_pb2_grpc.EnvironmentServiceServicer):
    """Ends its calls as DescribeSuite's request says; counts sessions that were closed."""

    def __init__(self) -> None:
        self.closed = 0
        self.entered = asyncio.Event()

    async def DescribeSuite(self, request: Any, context: Any) -> Any:
        match request.suite:
            case "refuse":
                raise ServiceError(StatusCode.NOT_FOUND, "UNKNOWN_SUITE", "no such suite", 2.5)
            case "fail":
                raise RuntimeError("a secret of the server")
            case "abort":
                await context.abort(StatusCode.DATA_LOSS, "as the test asked")
            case "slow":
                self.entered.set()
                await asyncio.sleep(0.5)
            case "hang":
                self.entered.set()
                await asyncio.sleep(600)
        return environment_pb2.DescribeSuiteResponse(suite=request.suite)

    async def Sessions(self, stream: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in stream:
                self.entered.set()
                for request in message.requests:
                    if request.HasField("step"):
                        raise RuntimeError("a secret of the server")
                    if request.reset.task.suite == "hang":
                        await asyncio.sleep(600)
                yield environment_pb2.SessionsResponse()
        finally:
            self.closed += 1


def as_service(servicer: Any) -> Service:
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    return Service(name=SERVICE, add=add, servicer=servicer)


@asynccontextmanager
async def faults() -> AsyncIterator[tuple[Faults, environment_pb2_grpc.EnvironmentServiceStub]]:
    servicer = Faults()
    async with serving(as_service(servicer)) as address, open_channel(address, NETWORK) as channel:
        yield servicer, environment_pb2_grpc.EnvironmentServiceStub(channel)


def describe(suite: str) -> environment_pb2.DescribeSuiteRequest:
    return environment_pb2.DescribeSuiteRequest(suite=suite)
