"""Any OpenAI-compatible endpoint as a policy: chat messages and tools, no tokens.

Tool calls are those that the endpoint itself reads out of a reply (`tool_calls`); text that merely
looks like a call is text. Refusals for now (408, 409, 429, 5xx) and broken connections are tried
again by the openai client, which waits ever longer, or as long as Retry-After says.
"""

import asyncio
import json
import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion

from actor.policy import CutShortError, InferenceFailedError, Said
from actor.tokens import turn_seed
from understudy.chat import Call, Reply
from understudy.client import Lease, Opening
from understudy.config import NetworkConfig
from understudy.errors import ConfigError, PeerUnreachableError
from understudy.rpc.channels import is_local

_MAX_RETRIES = 10
"""About a minute of waiting at the client's pace, within the time that a reply may take."""
_CONTEXT_FULL = ("context_length_exceeded", "maximum context length", "context window")
"""How endpoints say in a 400 that a conversation has outgrown the model."""
_NO_KEY = "none"
"""Sent where there is no key: servers of one's own ask for none."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is served, and the key to it."""

    url: str
    """Up to the version, e.g. http://127.0.0.1:8000/v1."""
    model: str
    key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What it is called in settings."""
        return f"{self.model} at {self.url}"


def read_key(variable: str, file: Path | None) -> str | None:
    """The key from a file of mode 0600, or else from an environment variable; None if neither.

    Raises:
        ConfigError: others may read the file, or it cannot be read.
    """
    if file is None:
        return os.environ.get(variable) or None
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"--key-file {file} has mode {mode:04o}: others may read it; chmod 600 {file}"
            )
        return file.read_text().strip() or None
    except OSError as error:
        raise ConfigError(f"--key-file {file}: {error.strerror}") from None


def check_url(url: str, has_key: bool, network: NetworkConfig) -> None:
    """Refuse what is no URL, and to send a key in plaintext beyond this machine.

    Raises:
        ConfigError: naming the URL and the remedy.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--endpoint {url}: give a URL such as http://127.0.0.1:8000/v1")
    plain = parts.scheme == "http" and not is_local(f"{parts.hostname}:{parts.port or 80}")
    if plain and has_key and not network.insecure:
        raise ConfigError(
            f"--endpoint {url} would get the key in plaintext; take https, or pass --insecure"
        )


class EndpointPolicy:
    """Has a model behind an endpoint play."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout_seconds
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=endpoint.key or _NO_KEY,
            max_retries=_MAX_RETRIES,
            timeout=timeout_seconds,
        )
        self._limit_name = "max_tokens"

    async def wait_ready(self, max_new_tokens: int, timeout_seconds: float) -> None:
        """Have the model say a word, before hundreds of episodes find out that it does not.

        Raises:
            ConfigError: the endpoint refuses: key, model, or what it is asked with.
            PeerUnreachableError: no answer in time.
        """
        hello = [{"role": "user", "content": "Say OK."}]
        place = f"--endpoint {self._endpoint.url} --model {self._endpoint.model}"
        try:
            async with asyncio.timeout(timeout_seconds):
                try:
                    await self._create(hello, {self._limit_name: max_new_tokens})
                except openai.BadRequestError as error:
                    if "max_completion_tokens" not in str(error):
                        raise
                    # Newer models of OpenAI's know the limit by another name only.
                    self._limit_name = "max_completion_tokens"
                    await self._create(hello, {self._limit_name: max_new_tokens})
        except openai.APIStatusError as error:
            raise ConfigError(f"{place}: {self._describe(error)}") from None
        except ValueError as error:  # of the json module
            raise ConfigError(f"{place}: what came back is no JSON: {error}") from None
        except (openai.OpenAIError, TimeoutError) as error:
            raise PeerUnreachableError(
                f"{place} did not answer within {timeout_seconds:g} s: {self._describe(error)}"
            ) from None

    async def complete(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        sampling: dict[str, Any],
    ) -> ChatCompletion:
        """Ask for one reply within the configured time.

        Raises:
            CutShortError: the conversation has outgrown the model.
            InferenceFailedError: no reply, for whatever reason.
        """
        asked = dict(sampling)
        asked[self._limit_name] = asked.pop("max_tokens")
        if tools:
            asked["tools"] = [{"type": "function", "function": tool} for tool in tools]
        try:
            async with asyncio.timeout(self._timeout):
                completion = await self._create(messages, asked)
        except TimeoutError:
            raise InferenceFailedError(f"no reply within {self._timeout:g} s") from None
        except openai.OpenAIError as error:
            text = self._describe(error)
            if isinstance(error, openai.BadRequestError) and any(w in text for w in _CONTEXT_FULL):
                raise CutShortError(text) from None
            raise InferenceFailedError(text) from None
        except ValueError as error:  # of the json module
            raise InferenceFailedError(f"what came back is no JSON: {error}") from None
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            raise InferenceFailedError("what came back is no chat completion")
        return completion

    async def _create(
        self, messages: Sequence[dict[str, Any]], asked: dict[str, Any]
    ) -> ChatCompletion:
        create: Any = self._client.chat.completions.create  # takes our dicts for its TypedDicts
        completion: ChatCompletion = await create(
            model=self._endpoint.model, messages=list(messages), **asked
        )
        return completion

    def begin(self, lease: Lease, opening: Opening) -> "EndpointSpeaker":
        """Start a conversation with the tools of an episode."""
        return EndpointSpeaker(self, lease, opening)

    def record(self, lease: Lease) -> AbstractContextManager[None]:
        """Nothing: a harness can be pointed at that endpoint itself."""
        return nullcontext()

    def _describe(self, error: Exception) -> str:
        """One line; what the endpoint says is kept, but for the key, should it repeat it."""
        text = str(error) or type(error).__name__
        if isinstance(error, openai.APIStatusError):
            text = f"HTTP {error.status_code}: {error.message}"
        return text.replace(self._endpoint.key, "***") if self._endpoint.key else text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class EndpointSpeaker:
    """One conversation, message by message."""

    versions: frozenset[int] = frozenset()

    def __init__(self, policy: EndpointPolicy, lease: Lease, opening: Opening) -> None:
        self._policy = policy
        self._lease = lease
        self._tools = opening.tools
        self._messages: list[dict[str, Any]] = []
        self._pending: list[str] = []
        """Ids of calls that are not answered yet."""
        self._num_replies = 0
        self.num_tokens = 0
        self.num_sampled_tokens = 0

    async def reply(self, messages: Sequence[dict[str, Any]]) -> Said:
        """Ask for one reply. Raises CutShortError and InferenceFailedError as Speaker says."""
        self._observe(messages)
        room = self._lease.max_tokens - self.num_tokens
        if room < 1:
            raise CutShortError(f"max_tokens = {self._lease.max_tokens}")
        completion = await self._policy.complete(self._messages, self._tools, self._sampling(room))
        self._num_replies += 1
        start = self.num_sampled_tokens
        if completion.usage:
            self.num_tokens = completion.usage.total_tokens
            self.num_sampled_tokens += completion.usage.completion_tokens
        choice = completion.choices[0]
        text = choice.message.content or ""
        reply, message = self._read(text, choice.message.tool_calls or [])
        return Said(
            reply=reply,
            message=message,
            cut_off=choice.finish_reason == "length",
            segment=0,
            start=start,
            end=self.num_sampled_tokens,
        )

    def room(self, messages: Sequence[dict[str, Any]]) -> None:
        """Not known before the endpoint has counted."""

    def _sampling(self, room: int) -> dict[str, Any]:
        sampling = self._lease.sampling
        asked: dict[str, Any] = {
            "temperature": round(sampling.temperature, 6),  # which travels as float32
            "max_tokens": min(room, sampling.max_new_tokens),
        }
        if sampling.HasField("seed"):
            asked["seed"] = turn_seed(sampling.seed, self._num_replies)
        return asked

    def _observe(self, messages: Sequence[dict[str, Any]]) -> None:
        """Add what the environment said; every call gets its answer, as the interface demands."""
        observations = [m["content"] for m in messages if m["role"] == "tool"]
        for index, call_id in enumerate(self._pending):
            content = observations[index] if index < len(observations) else "Not executed."
            self._messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        self._messages += [
            {"role": "user", "content": content} for content in observations[len(self._pending) :]
        ]
        self._messages += [message for message in messages if message["role"] != "tool"]
        self._pending = []

    def _read(self, text: str, tool_calls: Sequence[Any]) -> tuple[Reply, dict[str, Any]]:
        """The reply, and the chat message for the transcript; the history is gone on with."""
        calls, malformed = [], ""
        sent = []
        for tool_call in tool_calls:
            call = _parse_call(tool_call)
            if isinstance(call, str):
                malformed = malformed or call
                call = Call(name=_name(tool_call) or "unknown", arguments={})
            calls.append(call)
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            sent.append({"id": tool_call.id, "type": "function", "function": function})
        self._pending = [tool_call.id for tool_call in tool_calls]
        history: dict[str, Any] = {"role": "assistant", "content": text}
        self._messages.append({**history, "tool_calls": sent} if sent else history)
        said = [{"name": call.name, "arguments": call.arguments} for call in calls]
        outside = text.rpartition("</think>")[2].strip()
        reply = Reply(text=outside, calls=() if malformed else tuple(calls), malformed=malformed)
        return reply, {**history, "tool_calls": said} if said else history


def _parse_call(tool_call: Any) -> Call | str:
    """A call, or what is wrong with it."""
    name = _name(tool_call)
    if not name:
        return "the call is of no function"
    try:
        arguments = json.loads(tool_call.function.arguments or "{}")
    except (ValueError, RecursionError):
        return "the arguments are not valid JSON"
    if not isinstance(arguments, dict):
        return "the arguments are no object"
    return Call(name=name, arguments=arguments)


def _name(tool_call: Any) -> str | None:
    function = getattr(tool_call, "function", None)
    return getattr(function, "name", None)
