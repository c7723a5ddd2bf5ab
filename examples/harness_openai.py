"""An agent that knows nothing of Understudy: the plain `openai` client, and tools over MCP.

The suite `harness` starts it once an episode; what it needs to know is in the environment:

    OPENAI_BASE_URL, OPENAI_API_KEY     read by the client itself
    UNDERSTUDY_MCP_URL                  an MCP server with the task's tools, if it has any

The task is on standard input, the answer is the last line of standard output. See docs/harness.md.
"""

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

import openai
from mcp import Client


async def answer(messages: list[dict[str, Any]], tools: Client | None) -> str:
    """Talk with the model, and call what it asks for, until it replies without a call."""
    policy: Any = openai.AsyncOpenAI()
    model = os.environ.get("OPENAI_MODEL", "understudy")
    offered = [_as_function(tool) for tool in (await tools.list_tools()).tools] if tools else None
    while True:
        completion = await policy.chat.completions.create(
            model=model, messages=messages, **({"tools": offered} if offered else {})
        )
        message = completion.choices[0].message
        if not message.tool_calls or not tools:
            return str(message.content)
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result: Any = await tools.call_tool(
                call.function.name, json.loads(call.function.arguments)
            )
            text = "\n".join(block.text for block in result.content)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})


def _as_function(tool: Any) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


async def main() -> None:
    """Play one task."""
    task = json.load(sys.stdin)
    url = os.environ.get("UNDERSTUDY_MCP_URL")
    async with contextlib.AsyncExitStack() as stack:
        tools = await stack.enter_async_context(Client(url)) if url else None
        print(await answer(task["messages"], tools))


if __name__ == "__main__":
    asyncio.run(main())
