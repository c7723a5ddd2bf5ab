"""A chat completion's request: what is honoured, what is ignored, and what is refused by name.

Replies are sampled as the lease says, whatever a request asks: the learner must reproduce the
distribution. So usual knobs (temperature, top_p, seed, penalties) are ignored; what would change
a reply's form without the harness noticing (stop, n, response_format) is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actor.tokens import MAX_NEW_TOKENS

Json = dict[str, Any]
_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "tool"}
_MEANINGLESS: tuple[object, ...] = (None, [], {}, "", False, 0)
_REFUSED = {
    "stop": "text is not searched for stop sequences; stop reading where it ends",
    "functions": "it is deprecated; use tools",
    "function_call": "it is deprecated; use tool_choice",
    "logit_bias": "it would change the distribution that is learned from",
    "audio": "there is text only",
    "top_logprobs": "only the sampled token's log-probability is known; leave it out",
    "prediction": "replies are sampled by the policy alone",
    "web_search_options": "there is no search here",
}
"""Parameters that say something if they are set, and why they cannot be honoured."""


class RequestError(ValueError):
    """A request that is refused: the parameter, and what to do."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter}: {message}")
        self.parameter = parameter


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What is asked for, in the terms of understudy.chat."""

    messages: tuple[Json, ...]
    """{"role", "content"}; an assistant's with calls has "tool_calls": [{"name", "arguments"}]."""
    tools: tuple[Json, ...]
    """{"name", "description", "parameters"}."""
    reads_calls: bool
    """Calls in the reply are told apart from its text: there are tools, and tool_choice is auto."""
    max_new_tokens: int
    stream: bool
    include_usage: bool
    """A stream ends with a chunk that has the usage."""
    logprobs: bool


def read_request(body: bytes) -> ChatRequest:
    """Read a request. Raises RequestError that names the parameter and the remedy."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("body", "it is no JSON") from None
    if not isinstance(value, dict):
        raise RequestError("body", "it is no JSON object")
    _refuse_unsupported(value)
    choice = value.get("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise RequestError("tool_choice", "the policy cannot be made to call; use auto or none")
    tools = tuple(map(_read_tool, _list(value, "tools")))
    options = value.get("stream_options")
    return ChatRequest(
        messages=_read_messages(value),
        tools=tools,
        reads_calls=bool(tools) and choice == "auto",
        max_new_tokens=min(_limit(value, "max_tokens"), _limit(value, "max_completion_tokens")),
        stream=value.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        logprobs=value.get("logprobs") is True,
    )


def _refuse_unsupported(value: Json) -> None:
    if value.get("n") not in (None, 1):
        raise RequestError("n", f"{value['n']!r}: one reply a request; ask again for another")
    for name, why in _REFUSED.items():
        if value.get(name) not in _MEANINGLESS:
            raise RequestError(name, why)
    form = value.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise RequestError("response_format", "replies are not constrained; ask for it in words")
    if value.get("modalities") not in (None, ["text"]):
        raise RequestError("modalities", "there is text only")


def _list(value: Json, name: str) -> list[Any]:
    items = value.get(name)
    if items is None:
        return []
    if not isinstance(items, list):
        raise RequestError(name, "it is no array")
    return items


def _limit(value: Json, name: str) -> int:
    limit = value.get(name)
    if limit is None:
        return MAX_NEW_TOKENS
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise RequestError(name, "it is no integer from 1")
    return min(limit, MAX_NEW_TOKENS)


def _read_tool(tool: object) -> Json:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise RequestError("tools", "a tool is none of type function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("tools", "a function has no name")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise RequestError("tools", f"{function['name']}: parameters is no JSON schema")
    description = function.get("description") or ""
    return {
        "name": function["name"],
        "description": description if isinstance(description, str) else "",
        "parameters": parameters,
    }


def _read_messages(value: Json) -> tuple[Json, ...]:
    messages = _list(value, "messages")
    if not messages:
        raise RequestError("messages", "there is none")
    return tuple(_read_message(f"messages[{i}]", message) for i, message in enumerate(messages))


def _read_message(place: str, message: object) -> Json:
    if not isinstance(message, dict):
        raise RequestError(place, "it is no object")
    role = message.get("role")
    content = _read_content(f"{place}.content", message.get("content"))
    if role == "assistant":
        calls = [_read_call(place, call) for call in _list(message, "tool_calls")]
        return assistant_message(content, calls)
    if role not in _ROLES:
        raise RequestError(f"{place}.role", f"it is none of {', '.join(_ROLES)}, assistant")
    return {"role": _ROLES[role], "content": content}


def assistant_message(content: str, calls: Sequence[Mapping[str, Any]]) -> Json:
    """An assistant's message, with `tool_calls` only if there are any."""
    message: Json = {"role": "assistant", "content": content}
    return {**message, "tool_calls": list(calls)} if calls else message


def _read_content(place: str, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(place, "it is neither text nor an array of parts")
    return "\n".join(_read_part(place, part) for part in content)


def _read_part(place: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in ("text", "refusal") or not isinstance(text, str):
        raise RequestError(place, f"a part of type {kind!r}: the policy reads text only")
    return text


def _read_call(place: str, call: object) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{place}.tool_calls", "a call is of no function")
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments or "{}")
    except (ValueError, TypeError, RecursionError):
        arguments = str(arguments)  # nothing that was returned: ordinary text
    return {"name": function["name"], "arguments": arguments}
