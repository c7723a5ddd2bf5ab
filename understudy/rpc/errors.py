"""Errors on the wire: google.rpc.Status with one ErrorInfo, and RetryInfo where a retry helps."""

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "understudy.v1"


class ServiceError(Exception):
    """Raised by a servicer's code; the server turns it into a status.

    Args:
        code: gRPC status code.
        reason: reason in capitals, as the rpc's comment lists it, e.g. "UNKNOWN_SUITE".
        message: field, value and remedy.
        retry_after_seconds: hint for the caller, if trying again helps.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds

    def to_status(self) -> Any:
        """The error as a status that carries its details."""
        details = [_pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN))]
        if self.retry_after_seconds is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after_seconds * 1e9))
            details.append(_pack(retry))
        number = code_pb2.Code.Value(self.code.name)
        return rpc_status.to_status(
            status_pb2.Status(code=number, message=self.message, details=details)
        )

    def to_rpc_error(self) -> grpc.aio.AioRpcError:
        """The error as a caller sees the status that it becomes."""
        status = self.to_status()
        return grpc.aio.AioRpcError(
            status.code,
            grpc.aio.Metadata(),
            grpc.aio.Metadata.from_tuple(status.trailing_metadata),
            status.details,
        )


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def error_reason(error: grpc.RpcError) -> str:
    """Reason of an RPC's error as its server gave it, else the status code's name."""
    for detail in _details(error):
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return str(error.code().name)


def retry_after_seconds(error: grpc.RpcError) -> float | None:
    """The server's retry hint; None if it gave none."""
    for detail in _details(error):
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return None


def _details(error: grpc.RpcError) -> list[any_pb2.Any]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a status whose code or message differs from the call's: not ours
        return []
    return list(status.details) if status else []
