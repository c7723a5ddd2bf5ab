"""The tools of one practice task as an MCP server, for any program that speaks MCP over stdio.

    python -m envserver.suites.practice.mcp_server --split test --task 17

Names, descriptions, schemas and results are those that the suite itself gives; question and grade
are not here. `--question` prints the task's question instead. Needs the extra `mcp`.
"""

import argparse
import asyncio

import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

from envserver.environment import ToolCall
from envserver.suites.practice.tasks import SPLITS, make_task
from envserver.suites.practice.tools import TOOLS, Toolbox


def make_server(toolbox: Toolbox) -> Server:
    """A server of an episode's tools.

    Arguments are checked by the tools alone, and what is wrong with a call is its result (with
    `isError`), so that a policy reads the same sentence as without MCP.
    """
    tools = [
        types.Tool(name=tool.name, description=tool.description, input_schema=tool.parameters)
        for tool in TOOLS
    ]

    async def list_tools(*_: object) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools)

    async def call_tool(_: object, params: types.CallToolRequestParams) -> types.CallToolResult:
        call = ToolCall(name=params.name, arguments=params.arguments or {})
        text, outcome = toolbox.call(call)
        content = [types.TextContent(type="text", text=text)]
        return types.CallToolResult(content=list(content), is_error=not outcome.ok)

    return Server("understudy-practice", on_list_tools=list_tools, on_call_tool=call_tool)


async def serve(toolbox: Toolbox) -> None:
    """Serve over standard input and output until the input ends."""
    server = make_server(toolbox)
    async with stdio_server() as (received, to_send):
        await server.run(received, to_send, server.create_initialization_options())


def main() -> None:
    """Serve the task that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--task", type=int, required=True, help="ordinal of the task, from 0")
    parser.add_argument("--question", action="store_true", help="print the question, and end")
    args = parser.parse_args()
    try:
        task = make_task(args.split, args.task)
    except KeyError as error:
        parser.error(f"--task {args.task}: {error.args[0]}")
    if args.question:
        print(task.question)
        return
    toolbox = Toolbox(task.world, task.attachment)
    try:
        asyncio.run(serve(toolbox))
    finally:
        toolbox.close()


if __name__ == "__main__":
    main()
