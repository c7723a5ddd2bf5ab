"""The life of every server: bind, SERVING, signal, NOT_SERVING, stop(grace), close."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from understudy.config import NetworkConfig
from understudy.errors import ConfigError
from understudy.process import stop_on_signals
from understudy.rpc.channels import COMMON_OPTIONS, MEBIBYTE, check_tls, read_pem, require_secure
from understudy.rpc.control import ControlServicer, RoleControl
from understudy.rpc.interceptor import HandlerInterceptor
from understudy.v1 import control_pb2_grpc

_log = logging.getLogger(__name__)
_STATUS = health_pb2.HealthCheckResponse


@dataclass(frozen=True, kw_only=True)
class Service:
    """One service to register."""

    name: str
    """Full name, for example `understudy.v1.TaskService`."""
    add: Callable[[Any, Any], None]
    """Generated function, for example `add_TaskServiceServicer_to_server`."""
    servicer: Any


class RoleServer:
    """A role's gRPC server with health, reflection and ControlService.

        server = RoleServer("learner", "127.0.0.1:7000", network, services, control)
        await server.bind()          # health says NOT_SERVING
        await server.set_serving()   # ready for work
        await control.draining.wait()
        await server.stop()          # NOT_SERVING, running calls get `grace` seconds, then close

    Message size is capped at 1 MiB unless the role needs more.
    """

    def __init__(
        self,
        role: str,
        listen: str,
        network: NetworkConfig,
        services: Sequence[Service],
        control: RoleControl,
        max_message_bytes: int = MEBIBYTE,
        field: str = "",
    ) -> None:
        self.role = role
        self.field = field or f"{role}.listen"
        """Key in the config that `listen` comes from, for messages."""
        self.listen = listen
        self.network = network
        self.control = control
        control_service = Service(
            name="understudy.v1.ControlService",
            add=control_pb2_grpc.add_ControlServiceServicer_to_server,
            servicer=ControlServicer(control),
        )
        self._services = (*services, control_service)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[HandlerInterceptor()],
            options=(
                *COMMON_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", 64 * MEBIBYTE),
            ),
        )
        self.port = 0

    async def bind(self) -> int:
        """Take the port and answer health checks; signals drain from now on. Returns the port.

        Raises:
            ConfigError: port in use, address not usable, or plaintext beyond this machine.
        """
        require_secure(self.listen, self.network, self.field)
        for service in self._services:
            service.add(service.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [service.name for service in self._services]
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        try:
            self.port = self._add_port()
        except RuntimeError:
            raise ConfigError(
                f"{self.field} = {self.listen!r}: cannot bind; the port is in use or the address "
                "is not this machine's; choose another"
            ) from None
        await self._set_health(_STATUS.NOT_SERVING)
        await self._server.start()
        stop_on_signals(self.control.drain)
        _log.info("%s listens on %s (port %d)", self.role, self.listen, self.port)
        return self.port

    async def set_serving(self) -> None:
        """Ready for work: health says SERVING."""
        self.control.serving()
        await self._set_health(_STATUS.SERVING)
        _log.info("%s is serving", self.role)

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new work, give running calls `grace` seconds, close."""
        self.control.drain()
        await self._set_health(_STATUS.NOT_SERVING)
        await self._server.stop(grace)
        _log.info("%s stopped", self.role)

    def _add_port(self) -> int:
        tls = self.network.tls
        if not tls.ca:
            return self._server.add_insecure_port(self.listen)
        check_tls(self.network)
        credentials = grpc.ssl_server_credentials(
            [(read_pem(tls.key, "key"), read_pem(tls.certificate, "certificate"))],
            root_certificates=read_pem(tls.ca, "ca"),
            require_client_auth=True,
        )
        return self._server.add_secure_port(self.listen, credentials)

    async def _set_health(self, status: int) -> None:
        for name in ("", *(service.name for service in self._services)):
            await self._health.set(name, status)
