"""Actions of a policy, as an environment server reads them."""

import contextlib

from google.protobuf.message import DecodeError

from envserver.messages import decode_action
from tests.fuzz import reply
from tests.fuzz.mutation import mutate_as
from understudy.rpc import ServiceError
from understudy.v1 import environment_pb2

MAX_LEN = 1024
_mutate = mutate_as(environment_pb2.StepRequest)


def seeds() -> list[bytes]:
    """Steps with a text, with calls, and with JSON of other kinds."""
    texts = ("", "{}", '{"a": [1, {"b": null}]}', "[]", '{"a": NaN}', "{" * 20, "[" * 900)
    steps = [
        environment_pb2.StepRequest(
            tool_calls=[environment_pb2.ToolCall(name="add", arguments_json=text)]
        )
        for text in texts
    ]
    return [step.SerializeToString() for step in (environment_pb2.StepRequest(text="42"), *steps)]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a call's JSON, another field, or bytes."""
    if seed % 2:
        with contextlib.suppress(DecodeError):
            step = environment_pb2.StepRequest.FromString(data)
            for call in step.tool_calls[-1:]:
                changed = reply.mutate(call.arguments_json.encode(), max_size, seed)
                call.arguments_json = changed.decode("utf-8", "ignore")
            changed = step.SerializeToString()
            if len(changed) <= max_size:
                return changed
    return _mutate(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Decode an action; its arguments are objects."""
    try:
        request = environment_pb2.StepRequest.FromString(data)
    except DecodeError:
        return
    with contextlib.suppress(ServiceError):
        action = decode_action(request)
        assert len(action.tool_calls) == len(request.tool_calls)
        assert all(isinstance(call.arguments, dict) for call in action.tool_calls)
