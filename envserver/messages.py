"""Messages of a session: from the wire to what environments take, and back."""

import json
import math
from collections.abc import Sequence

import grpc

from envserver.environment import Action, Message, Reset, Step, ToolCall
from understudy.rpc import ServiceError
from understudy.v1 import common_pb2, environment_pb2

MAX_OBSERVATION_CHARACTERS = 2**20


def decode_action(request: environment_pb2.StepRequest) -> Action:
    """What the policy did. Raises ServiceError (BAD_ACTION) for arguments that are no object."""
    calls: list[ToolCall] = []
    for call in request.tool_calls:
        try:
            arguments = json.loads(call.arguments_json or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BAD_ACTION",
                f"tool_calls[{len(calls)}].arguments_json is no JSON object",
            )
        calls.append(ToolCall(name=call.name, arguments=arguments))
    return Action(tool_calls=tuple(calls), text=request.text)


def encode_reset(reset: Reset, driven: bool) -> environment_pb2.ResetResponse:
    """How an episode begins, on the wire, and whether the environment leads the conversation."""
    return environment_pb2.ResetResponse(
        task_id=reset.task_id,
        level=reset.level,
        messages=_encode_messages(reset.messages),
        tools=[
            common_pb2.ToolDefinition(
                name=tool.name,
                description=tool.description,
                parameters_json=json.dumps(tool.parameters),
            )
            for tool in reset.tools
        ],
        tags=reset.tags,
        unscored=reset.unscored,
        driven=driven,
    )


def _encode_messages(messages: Sequence[Message]) -> list[common_pb2.ChatMessage]:
    # A lone surrogate, which JSON arguments can hold, has no place in protobuf's text.
    return [
        common_pb2.ChatMessage(
            role=message.role, content=message.content.encode("utf-8", "replace").decode()
        )
        for message in messages
    ]


def encode_step(turn: int, step: Step) -> environment_pb2.StepResponse:
    """What the environment answered. Raises ServiceError (ENVIRONMENT_FAILED) for a reward that is
    not finite, or an observation above MAX_OBSERVATION_CHARACTERS."""
    if not math.isfinite(step.reward):
        raise _failed(f"reward {step.reward} is not finite")
    size = sum(len(message.content) for message in step.messages)
    if size > MAX_OBSERVATION_CHARACTERS:
        raise _failed(f"an observation of {size} characters is above {MAX_OBSERVATION_CHARACTERS}")
    return environment_pb2.StepResponse(
        turn=turn,
        messages=_encode_messages(step.messages),
        reward=step.reward,
        terminated=step.terminated,
        truncated=step.truncated,
    )


def encode_failure(error: ServiceError) -> environment_pb2.SessionFailure:
    """What ended a session, on the wire."""
    failure = environment_pb2.SessionFailure(
        code=error.code.value[0], reason=error.reason, message=error.message
    )
    if error.retry_after_seconds is not None:
        failure.retry_after.FromNanoseconds(int(error.retry_after_seconds * 1e9))
    return failure


def _failed(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.INTERNAL, "ENVIRONMENT_FAILED", message)
