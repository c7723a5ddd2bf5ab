"""Lists what a running process serves, and calls its methods, without generated code.

    python examples/reflect.py 127.0.0.1:7200
    python examples/reflect.py 127.0.0.1:7200 understudy.v1.ControlService/GetStatus
    python examples/reflect.py 127.0.0.1:7200 \\
        understudy.v1.EnvironmentService/DescribeSuite '{"suite": "practice"}'
    python examples/reflect.py 127.0.0.1:7000 \\
        understudy.v1.TrajectoryService/PushTrajectories '{"hello": {"actorId": "me"}}'

Everything it knows of the messages comes from the server's reflection service. Requests and
responses are JSON as protobuf maps it: `bytes` are base64. A method to which the client streams
takes as many requests as are given, and the next one once the one before is answered, if answers
stream too. Needs grpcio, grpcio-reflection and
grpcio-status.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status


def main() -> int:
    """List services, or call one method. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port on this machine")
    parser.add_argument("method", nargs="?", help="Service/Method; left out, services are listed")
    parser.add_argument("requests", nargs="*", metavar="request", help="as JSON; left out: {}")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds")
    arguments = parser.parse_args()
    with grpc.insecure_channel(arguments.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        try:
            if arguments.method is None:
                for service in database.get_services():
                    print("\n".join(describe(pool, service)))
            else:
                service, _, name = arguments.method.rpartition("/")
                method = pool.FindServiceByName(service).FindMethodByName(name)
                for line in call(channel, method, arguments.requests, arguments.timeout):
                    print(line, flush=True)
        except grpc.RpcError as error:
            print(f"{error.code().name} {reason(error)}: {error.details()}", file=sys.stderr)
            return 1
        except (KeyError, json_format.ParseError) as error:
            print(f"no such method, or no such request: {error}", file=sys.stderr)
            return 2
    return 0


def describe(pool: DescriptorPool, service: str) -> Iterator[str]:
    """A service and its methods, a line each."""
    yield service
    for method in pool.FindServiceByName(service).methods:
        asked = "stream " * method.client_streaming + method.input_type.name
        answered = "stream " * method.server_streaming + method.output_type.name
        yield f"  {method.name}({asked}) -> {answered}"


def call(
    channel: grpc.Channel, method: MethodDescriptor, requests: Sequence[str], timeout: float
) -> Iterator[str]:
    """Call a method and give each of its responses as JSON."""
    messages = [
        json_format.Parse(request, GetMessageClass(method.input_type)())
        for request in requests or ["{}"]
    ]
    if len(messages) > 1 and not method.client_streaming:
        raise KeyError(f"{method.full_name} takes one request, {len(messages)} were given")
    kind = (method.client_streaming, method.server_streaming)
    open_call: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[kind]
    stub = open_call(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    answered: SimpleQueue[None] = SimpleQueue()
    asked = paced(messages, answered) if all(kind) else iter(messages)
    answer = stub(asked if method.client_streaming else messages[0], timeout=timeout)
    try:
        for response in answer if method.server_streaming else [answer]:
            yield json_format.MessageToJson(response, always_print_fields_with_no_presence=True)
            answered.put(None)
    finally:
        answered.put(None)


def paced(messages: Sequence[Message], answered: "SimpleQueue[None]") -> Iterator[Message]:
    """One message after the other, the next once the one before is answered."""
    for index, message in enumerate(messages):
        if index:
            answered.get()
        yield message


def reason(error: grpc.RpcError) -> str:
    """The reason in capitals that a server of this project sends with every error."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status and any(detail.Unpack(info) for detail in status.details):
        return str(info.reason)
    return ""


if __name__ == "__main__":
    sys.exit(main())
