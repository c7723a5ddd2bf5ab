"""Python in the sandbox; names and files are kept from one call to the next."""

from typing import Any

from envserver.sandbox import Workspace
from envserver.tools.tool import Observation, Tool, describe


class PythonTool(Tool):
    """Runs code and shows what it prints, and the value of a last expression."""

    spec = describe(
        "python",
        "Run Python code. Variables are kept between calls; print what you want to see.",
        code="Python code",
    )

    def __init__(self, workspace: Workspace) -> None:
        """Take the episode's workspace."""
        self._workspace = workspace

    async def call(self, **arguments: Any) -> Observation:
        """The output, the traceback if the code raises, and the limit if one ended it."""
        reply = await self._workspace.call("python", code=arguments["code"])
        text = reply.output
        if reply.ended:
            text = f"{text}\n{self._workspace.pool.limits.explain(reply.outcome)}".lstrip("\n")
        return Observation(text=text or "(no output)", outcome=reply.outcome)
