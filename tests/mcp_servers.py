"""MCP servers of the official SDK, one of them misbehaving. `mcp_servers.py KIND [HOST PORT]`."""

import asyncio
import os
import sys

from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from pydantic import AnyHttpUrl

TOKEN = "secret-7"
server = MCPServer("test", log_level="ERROR")
notes: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def remember(note: str) -> str:
    """Keep a note; answers all notes of this process."""
    notes.append(note)
    return f"{os.getpid()} {notes}"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no luck")


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def much(characters: int) -> str:
    """Say much."""
    return "x" * characters


@server.tool()
def die() -> str:
    """End the process."""
    os._exit(1)


def lie(kind: str) -> None:
    """Make what the server says of itself untrue, too much or nonsense."""
    tool = server._tool_manager._tools["add"]
    match kind:
        case "bad_schema":
            tool.parameters = {"type": "object", "properties": {"a": {"type": 12}}}
        case "big_schema":
            tool.parameters = {"type": "object", "description": "x" * 100_000}
        case "wrong_schema":
            tool.parameters = {"type": "object", "properties": {"c": {"type": "string"}}}
        case "bad_name":
            tool.name = "a b\n"
        case "many":
            for number in range(200):
                server.add_tool(add, name=f"add{number}")
        case "mute":
            sys.stdin.read()
            os._exit(0)
        case "garbage":
            print("This is no JSON.\n" * 3, flush=True)
            os._exit(0)
        case "flood":
            sys.stdout.write("x" * 50_000_000)
            sys.stdout.flush()
            sys.stdin.read()
            os._exit(0)


class Lock:
    """Lets in who brings the token."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="c", scopes=[]) if token == TOKEN else None


def lock() -> MCPServer:
    """A server that asks for a token, as the SDK does it."""
    here = AnyHttpUrl("http://127.0.0.1:1/")
    auth = AuthSettings(issuer_url=here, resource_server_url=here)
    locked = MCPServer("locked", log_level="ERROR", token_verifier=Lock(), auth=auth)
    locked.add_tool(add)
    locked.add_tool(fail)
    return locked


if __name__ == "__main__":
    lie(sys.argv[1])
    if sys.argv[1] == "locked":
        server = lock()
    if len(sys.argv) == 2:
        server.run("stdio")
    else:
        json_response = sys.argv[1] == "json"
        host, port = sys.argv[2:]
        server.run("streamable-http", host=host, port=int(port), json_response=json_response)
