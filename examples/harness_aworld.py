"""An AWorld agent as a harness: pip install aworld pydantic==2.11.7, in an environment of its own.

Nothing here is Understudy's but the names of variables; see docs/harness.md and harness_openai.py.
"""

import json
import os
import sys

from aworld.agents.llm_agent import Agent
from aworld.config.conf import AgentConfig
from aworld.runner import Runners

SERVER = "task"


def main() -> None:
    """Play one task: its messages are on standard input, its tools at UNDERSTUDY_MCP_URL."""
    messages = json.load(sys.stdin)["messages"]
    url = os.environ.get("UNDERSTUDY_MCP_URL")
    servers = {"mcpServers": {SERVER: {"type": "streamable-http", "url": url}}} if url else {}
    agent = Agent(
        name="solver",
        conf=AgentConfig(
            llm_provider="openai",
            llm_model_name=os.environ["OPENAI_MODEL"],
            llm_base_url=os.environ["OPENAI_BASE_URL"],
            llm_api_key=os.environ["OPENAI_API_KEY"],
        ),
        system_prompt="\n".join(m["content"] for m in messages if m["role"] == "system"),
        mcp_servers=[SERVER] if url else [],
        mcp_config=servers,
    )
    question = "\n".join(m["content"] for m in messages if m["role"] == "user")
    response = Runners.sync_run(question, agent=agent)
    with open(os.environ["UNDERSTUDY_ANSWER"], "w", encoding="utf-8") as file:
        file.write(str(response.answer))


if __name__ == "__main__":
    main()
