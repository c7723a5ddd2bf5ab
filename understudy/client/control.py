"""Client of ControlService, which every role serves."""

from understudy.client.base import Client
from understudy.config import NetworkConfig
from understudy.v1 import control_pb2, control_pb2_grpc


class ControlClient(Client):
    """Asks one process for its status, and pauses, resumes or drains it."""

    peer = "process"

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = control_pb2_grpc.ControlServiceStub(self.channel)

    async def status(self) -> control_pb2.GetStatusResponse:
        """Role, state and figures."""
        return await self._stub.GetStatus(control_pb2.GetStatusRequest(), timeout=10)

    async def pause(self) -> None:
        """Stop new work; running work finishes."""
        await self._stub.Pause(control_pb2.PauseRequest(), timeout=10)

    async def resume(self) -> None:
        """Take new work again."""
        await self._stub.Resume(control_pb2.ResumeRequest(), timeout=10)

    async def drain(self) -> None:
        """Finish running work and end the process."""
        await self._stub.Drain(control_pb2.DrainRequest(), timeout=10)
