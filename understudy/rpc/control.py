"""The state of a role process, and the ControlService that shows and changes it."""

import asyncio
from collections.abc import Callable, Mapping

import grpc

from understudy.rpc.errors import ServiceError
from understudy.v1 import control_pb2, control_pb2_grpc

STARTING = control_pb2.ROLE_STATE_STARTING
SERVING = control_pb2.ROLE_STATE_SERVING
PAUSED = control_pb2.ROLE_STATE_PAUSED
DRAINING = control_pb2.ROLE_STATE_DRAINING


class RoleControl:
    """Owns a role's state: STARTING -> SERVING, both <-> PAUSED, and from any of them DRAINING.

    Loops that make new work call `await control.admitted()`; servicers call `control.admit()`.
    """

    def __init__(self, role: str, figures: Callable[[], Mapping[str, float]] = dict) -> None:
        self.role = role
        self.figures = figures
        self.state = STARTING
        self.draining = asyncio.Event()
        self._ready = False
        self._open = asyncio.Event()

    def serving(self) -> None:
        """The process is ready for work, and takes it from now on unless it is paused."""
        self._ready = True
        if self.state == STARTING:
            self.state = SERVING
            self._open.set()

    def pause(self) -> None:
        """Take no new work until resumed."""
        if self.state != DRAINING:
            self.state = PAUSED
            self._open.clear()

    def resume(self) -> None:
        """End a pause: back to work, or to the start if the process was paused during that.

        Raises:
            ServiceError: DRAINING.
        """
        if self.state == DRAINING:
            raise ServiceError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "DRAINING",
                f"the {self.role} is stopping; start a new one",
            )
        if self.state == PAUSED:
            self.state = STARTING
            if self._ready:
                self.serving()

    def drain(self) -> None:
        """Finish running work and end."""
        self.state = DRAINING
        self.draining.set()
        self._open.set()

    async def admitted(self) -> bool:
        """Wait while paused; True to go on, False when draining."""
        await self._open.wait()
        return self.state != DRAINING

    def admit(self) -> None:
        """Raise UNAVAILABLE unless new work is taken."""
        if self.state != SERVING:
            name = control_pb2.RoleState.Name(self.state).removeprefix("ROLE_STATE_")
            raise ServiceError(
                grpc.StatusCode.UNAVAILABLE,
                name,
                f"the {self.role} is {name.lower()}",
                retry_after_seconds=1.0,
            )


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Maps ControlService onto a RoleControl."""

    def __init__(self, control: RoleControl) -> None:
        self.control = control

    async def GetStatus(
        self, request: control_pb2.GetStatusRequest, context: object
    ) -> control_pb2.GetStatusResponse:
        return control_pb2.GetStatusResponse(
            role=self.control.role, state=self.control.state, figures=dict(self.control.figures())
        )

    async def Pause(
        self, request: control_pb2.PauseRequest, context: object
    ) -> control_pb2.PauseResponse:
        self.control.pause()
        return control_pb2.PauseResponse()

    async def Resume(
        self, request: control_pb2.ResumeRequest, context: object
    ) -> control_pb2.ResumeResponse:
        self.control.resume()
        return control_pb2.ResumeResponse()

    async def Drain(
        self, request: control_pb2.DrainRequest, context: object
    ) -> control_pb2.DrainResponse:
        self.control.drain()
        return control_pb2.DrainResponse()
