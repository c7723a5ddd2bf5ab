"""A recorded reply as OpenAI's interface has it: whole, or as events of a stream."""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from actor.recording.recorder import Recorded
from actor.recording.request import ChatRequest, Json
from understudy.chat import ChatFormat

MODEL = "understudy"
"""What the policy is called, whatever name a request uses."""


def error_body(message: str, kind: str, code: str, parameter: str | None = None) -> Json:
    """An error as clients of OpenAI read it."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def model_body() -> Json:
    """The policy as an entry of the list of models."""
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}


def completion_body(recorded: Recorded, request: ChatRequest, chat: ChatFormat) -> Json:
    """The whole reply."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", **_message(recorded), "refusal": None},
        "logprobs": _logprobs(recorded, chat) if request.logprobs else None,
        "finish_reason": _finish_reason(recorded),
    }
    head = _head("chat.completion")
    return {**head, "choices": [choice], "usage": _usage(recorded)}


def completion_events(
    recorded: Recorded, request: ChatRequest, chat: ChatFormat
) -> Iterator[bytes]:
    """The reply as server-sent events: one with all of it, one that ends it, the usage if asked."""
    head = _head("chat.completion.chunk")
    message = _message(recorded)
    for index, call in enumerate(message.get("tool_calls", [])):
        call["index"] = index
    logprobs = _logprobs(recorded, chat) if request.logprobs else None
    for delta, extra in (
        ({"role": "assistant", **message}, {"logprobs": logprobs, "finish_reason": None}),
        ({}, {"logprobs": None, "finish_reason": _finish_reason(recorded)}),
    ):
        yield _event({**head, "choices": [{"index": 0, "delta": delta, **extra}]})
    if request.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(recorded)})
    yield b"data: [DONE]\n\n"


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _head(kind: str) -> Json:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": MODEL,
    }


def _message(recorded: Recorded) -> dict[str, Any]:
    reply = recorded.reply
    message: dict[str, Any] = {"content": reply.text or (None if reply.calls else "")}
    if recorded.thoughts:
        message["reasoning_content"] = recorded.thoughts
    if reply.calls:
        message["tool_calls"] = [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for call in reply.calls
        ]
    return message


def _finish_reason(recorded: Recorded) -> str:
    if recorded.generation.cut_off:
        return "length"
    return "tool_calls" if recorded.reply.calls else "stop"


def _usage(recorded: Recorded) -> Json:
    prompt, sampled = recorded.num_prompt_tokens, len(recorded.generation.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


def _logprobs(recorded: Recorded, chat: ChatFormat) -> Json:
    """Of every sampled token, the stop token too."""
    generation = recorded.generation
    content = []
    for index, logprob in enumerate(generation.logprobs.tolist()):
        token = chat.decode(generation.token_ids[index : index + 1])
        content.append({"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []})
    return {"content": content, "refusal": None}
