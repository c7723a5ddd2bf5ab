"""One session with an MCP server: the official SDK over transports with limits.

A session lives in a task of its own, since the SDK's scopes must be left by the task that entered
them, and an episode's calls come from several.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2
import mcp_types
from mcp import Client, MCPError
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage

from envserver.adapters.peer import MAX_PEER_BYTES, Fault
from understudy.errors import ConfigError
from understudy.rpc.channels import is_local

CLOSE_SECONDS = 2.0
"""How long a server may take to end by itself, and then to be gone when killed."""
_CONNECT_SECONDS = 10.0
_READ_SECONDS = 3600.0  # calls have a limit of their own, and event streams are silent for long
_NOT_LET_IN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_Messages = tuple[Any, Any]
"""The SDK's pair of streams, to read and to write."""


class PeerError(Exception):
    """What the server did wrong."""

    def __init__(self, reason: Fault, message: str) -> None:
        super().__init__(message)
        self.reason: Fault = reason


def read_headers(suite: str, url: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Headers by name, their values from environment variables.

    Raises:
        ConfigError: a variable that is not set, or a URL by which values would go in plaintext
            beyond this machine.
    """
    parts = urlsplit(url)
    plain = parts.scheme != "https" and not is_local(f"{parts.hostname}:{parts.port or 80}")
    if variables and plain:
        raise ConfigError(
            f"suite {suite!r}: headers would go to url = {url!r} in plaintext; take https"
        )
    for header, variable in variables.items():
        if not os.environ.get(variable):
            raise ConfigError(
                f"suite {suite!r}: headers.{header}: the environment variable {variable} is not "
                "set; set it where this server is started"
            )
    return {header: os.environ[variable] for header, variable in variables.items()}


class McpPeer:
    """One session. Not to be used by two calls at once."""

    def __init__(self, command: Sequence[str], url: str, headers: Mapping[str, str]) -> None:
        """Take a command to start, or the URL of a server and headers of every request to it."""
        self._flood: list[str] = []
        self._refusals: list[str] = []
        self._transport = (
            _stdio(command, self._flood)
            if command
            else _streamable_http(url, headers, self._flood, self._refusals)
        )
        self._client: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._task = asyncio.create_task(self._hold())

    async def tools(self, max_tools: int) -> list[mcp_types.Tool]:
        """All tools. Raises PeerError, also for more than max_tools."""
        client = await self._connected()
        tools: list[mcp_types.Tool] = []
        cursor: str | None = None
        try:
            while len(tools) <= max_tools:
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if cursor is None or not page.tools:
                    break
        except Exception as error:  # whatever the SDK makes of a peer's nonsense
            raise self._fault(error) from error
        if len(tools) > max_tools:
            raise PeerError("PEER_INVALID", f"the server lists more than {max_tools} tools")
        return tools

    async def call(
        self, name: str, arguments: dict[str, Any], timeout: float
    ) -> mcp_types.CallToolResult:
        """Call a tool; a refusal of the server's is a result with `is_error`, as is a timeout.

        Raises:
            PeerError: if the server is gone, or answered what makes no sense or is too long.
        """
        client = await self._connected()
        try:
            return await client.call_tool(name, arguments, read_timeout_seconds=timeout)
        except MCPError as error:
            if self._flood or error.code == mcp_types.CONNECTION_CLOSED or self._task.done():
                raise self._fault(error) from error
            if error.code in _TRANSPORT_CODES:
                raise PeerError("PEER_INVALID", "the answer to a call was no answer") from error
            late = error.code == mcp_types.REQUEST_TIMEOUT
            text = f"{name} took longer than {timeout:g} s." if late else error.message
            content = [mcp_types.TextContent(type="text", text=text)]
            return mcp_types.CallToolResult(content=content, is_error=True)
        except Exception as error:  # whatever the SDK makes of a peer's nonsense
            raise self._fault(error) from error

    async def close(self) -> None:
        """End the session, and the server's process if it was started for it."""
        self._closing.set()
        if not self._client.done():
            self._task.cancel()
        await asyncio.wait([self._task], timeout=4 * CLOSE_SECONDS)
        self._task.cancel()

    async def _hold(self) -> None:
        try:
            async with Client(self._transport, cache=None) as client:
                self._client.set_result(client)
                await self._closing.wait()
        except BaseException as error:
            if not self._client.done():
                self._client.set_exception(self._fault(error))
                self._client.exception()  # nobody may be waiting any more
            elif isinstance(error, asyncio.CancelledError):
                raise

    async def _connected(self) -> Client:
        return await asyncio.shield(self._client)

    def _fault(self, error: BaseException) -> PeerError:
        if self._flood:
            return PeerError("PEER_INVALID", self._flood[0])
        if self._refusals:
            return PeerError("PEER_UNREACHABLE", self._refusals[0])
        if isinstance(error, OSError):
            return PeerError("PEER_UNREACHABLE", f"the server cannot be started: {error}")
        if not self._client.done():
            return PeerError("PEER_UNREACHABLE", f"no session could be begun ({_name(error)})")
        closed = isinstance(error, MCPError) and error.code == mcp_types.CONNECTION_CLOSED
        if closed or self._task.done():
            return PeerError("PEER_LOST", "the server went away")
        return PeerError("PEER_INVALID", f"the server's answer made no sense ({_name(error)})")


_TRANSPORT_CODES = (mcp_types.PARSE_ERROR, mcp_types.INVALID_REQUEST)


def _name(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return type(error).__name__


@asynccontextmanager
async def _stdio(command: Sequence[str], flood: list[str]) -> AsyncIterator[_Messages]:
    """Start a server and speak lines of JSON with it, none of them above MAX_PEER_BYTES.

    The SDK's own transport keeps a line of any length. The server gets the SDK's short list of
    environment variables, and this process's standard error.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=get_default_environment(),
        start_new_session=True,
        limit=MAX_PEER_BYTES,
    )
    assert process.stdin
    assert process.stdout
    received, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    write, to_send = anyio.create_memory_object_stream[SessionMessage](0)
    pipes = [
        asyncio.create_task(_receive(process.stdout, received, flood)),
        asyncio.create_task(_send(process.stdin, to_send, received)),
    ]
    try:
        yield read, write
    finally:
        process.stdin.close()
        read.close()
        write.close()
        await _end(process)
        for pipe in pipes:
            pipe.cancel()
        # A grandchild may hold the pipes open; nothing public closes our ends of them.
        process._transport.close()  # type: ignore[attr-defined]


async def _receive(stdout: asyncio.StreamReader, received: Any, flood: list[str]) -> None:
    async with received:
        try:
            while line := await stdout.readline():
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError as error:
                    await received.send(error)
                else:
                    await received.send(SessionMessage(message))
        except ValueError:  # of readline: above the limit
            flood.append(f"the server sent a line of more than {MAX_PEER_BYTES} bytes")
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            pass  # the session is over
    while await stdout.read(2**16):  # so that the server can end
        pass


async def _send(stdin: asyncio.StreamWriter, to_send: Any, received: Any) -> None:
    try:
        async for item in to_send:
            line = item.message.model_dump_json(by_alias=True, exclude_unset=True)
            stdin.write(line.encode() + b"\n")
            await stdin.drain()
    except OSError:
        await received.aclose()  # so that nobody waits for an answer


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for a process whose standard input is closed, then kill its group."""
    if not await _ended(process):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        await _ended(process)
    with suppress(ProcessLookupError):  # what it started may have outlived it
        os.killpg(process.pid, signal.SIGKILL)
    await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> bool:
    """Not process.wait(), which also waits for pipes that a grandchild holds."""
    for _ in range(round(CLOSE_SECONDS / 0.02)):
        if process.returncode is not None:
            return True
        await asyncio.sleep(0.02)
    return process.returncode is not None


@asynccontextmanager
async def _streamable_http(
    url: str, headers: Mapping[str, str], flood: list[str], refusals: list[str]
) -> AsyncIterator[_Messages]:
    """The SDK's transport, with a limit on bodies, which it has for events only. It follows no
    redirection: headers go to the server that they are meant for."""
    timeout = httpx2.Timeout(_CONNECT_SECONDS, read=_READ_SECONDS)
    watched = _Watched(flood, refusals)
    async with httpx2.AsyncClient(transport=watched, timeout=timeout, headers=headers) as client:
        transport: AbstractAsyncContextManager[_Messages] = streamable_http_client(
            url, http_client=client, max_sse_event_size=MAX_PEER_BYTES
        )
        async with transport as streams:
            yield streams


class _Watched(httpx2.AsyncHTTPTransport):
    """Ends a body of JSON that is longer than MAX_PEER_BYTES, and notes who was not let in."""

    def __init__(self, flood: list[str], refusals: list[str]) -> None:
        super().__init__()
        self._flood = flood
        self._refusals = refusals

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if response.status_code in _NOT_LET_IN:
            self._refusals.append(
                f"the server lets nobody in with these credentials ({response.status_code}); see "
                "headers"
            )
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _LimitedBody(response.stream, self._flood)
        return response


class _LimitedBody(httpx2.AsyncByteStream):
    def __init__(self, body: httpx2.AsyncByteStream, flood: list[str]) -> None:
        self._body = body
        self._flood = flood

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._body:
            size += len(chunk)
            if size > MAX_PEER_BYTES:
                self._flood.append(f"the server sent a body of more than {MAX_PEER_BYTES} bytes")
                raise httpx2.StreamError(self._flood[0])
            yield chunk

    async def aclose(self) -> None:
        await self._body.aclose()
