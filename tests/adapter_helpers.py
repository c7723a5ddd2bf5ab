"""An environment server of configured suites, and its client."""

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest

from benchmarks.rollout import free_address
from conftest import serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from understudy.client import EnvironmentClient
from understudy.config import EnvserverConfig
from understudy.rpc import RoleControl, Service, error_reason
from understudy.v1 import environment_pb2_grpc

ADAPTERS = {
    "gymnasium": "envserver.adapters.gymnasium:GymnasiumSuite",
    "mcp": "envserver.adapters.mcp:McpSuite",
    "openenv": "envserver.adapters.openenv:OpenEnvSuite",
}
"""By module, so that the tests need no fresh installation."""


@asynccontextmanager
async def served(
    tables: Mapping[str, Mapping[str, object]], **settings: object
) -> AsyncIterator[EnvironmentClient]:
    """Serve suites from tables like those of `[envserver.suites]`."""
    config = EnvserverConfig(**settings)  # type: ignore[arg-type]
    control = RoleControl("envserver")
    control.serving()
    by_class = {
        name: {**table, "adapter": ADAPTERS.get(str(table["adapter"]), table["adapter"])}
        for name, table in tables.items()
    }
    servicer = EnvironmentServicer(load_suites(by_class), config, control)
    service = Service(
        name="understudy.v1.EnvironmentService",
        add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
        servicer=servicer,
    )
    async with serving(service) as address, EnvironmentClient.connect(address) as client:
        yield client
    await servicer.wait_closed(20)


@asynccontextmanager
async def failing(reason: str, said: str = "") -> AsyncIterator[None]:
    """What is done within ends the episode with this reason, and tells no secret."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert error_reason(caught.value) == reason, caught.value.details()
    assert said in (caught.value.details() or "")
    assert "secret" not in (caught.value.details() or "")


@contextmanager
def http_server(
    command: Sequence[str | Path], ready: str, folder: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that takes host and port as its last arguments, once `ready` answers at all."""
    address = free_address()
    host, _, port = address.partition(":")
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, host, port], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not _answers(f"http://{address}{ready}"):
            said = (folder / "server.log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield f"http://{address}", process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def python(name: str, *words: str) -> list[str]:
    """A command that runs a script beside the tests."""
    return [sys.executable, str(Path(__file__).with_name(name)), *words]
