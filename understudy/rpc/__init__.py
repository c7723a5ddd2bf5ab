"""Connections: one way to open a channel, one way to serve, one way to say what went wrong."""

from understudy.rpc.channels import open_channel, open_sync_channel, wait_ready
from understudy.rpc.control import RoleControl
from understudy.rpc.errors import ServiceError, error_reason, retry_after_seconds
from understudy.rpc.server import RoleServer, Service

__all__ = [
    "RoleControl",
    "RoleServer",
    "Service",
    "ServiceError",
    "error_reason",
    "open_channel",
    "open_sync_channel",
    "retry_after_seconds",
    "wait_ready",
]
