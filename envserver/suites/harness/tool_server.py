"""The tools of one task as an MCP server of its own, over streamable HTTP on loopback.

Tools are called where the task is, in the environment server, as in any other episode.
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import mcp_types
import uvicorn
from mcp.server.lowlevel import Server

from envserver.environment import ToolSpec

Call = Callable[[str, dict[str, Any]], Awaitable[str]]
_LOOPBACK = "127.0.0.1"


@contextlib.asynccontextmanager
async def serve_tools(tools: Sequence[ToolSpec], call: Call) -> AsyncIterator[str]:
    """Serve tools until the block ends, and yield their URL; empty if there are none."""
    if not tools:
        yield ""
        return
    path = f"/{secrets.token_urlsafe(24)}/mcp"
    app = _mcp_server(tools, call).streamable_http_app(
        streamable_http_path=path, json_response=True, stateless_http=True
    )
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    server = _HttpServer(config)
    with socket.create_server((_LOOPBACK, 0)) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://{_LOOPBACK}:{listener.getsockname()[1]}{path}"
        finally:
            server.should_exit = True
            await asyncio.wait([serving], timeout=5.0)
            serving.cancel()


class _HttpServer(uvicorn.Server):
    """Leaves the process's signals to the environment server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _mcp_server(tools: Sequence[ToolSpec], call: Call) -> Server[Any]:
    listed = [
        mcp_types.Tool(name=tool.name, description=tool.description, input_schema=tool.parameters)
        for tool in tools
    ]

    async def list_tools(context: object, params: object) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=listed)

    async def call_tool(
        context: object, params: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        text = await call(params.name, params.arguments or {})
        return mcp_types.CallToolResult(content=[mcp_types.TextContent(type="text", text=text)])

    return Server("understudy", on_list_tools=list_tools, on_call_tool=call_tool)
