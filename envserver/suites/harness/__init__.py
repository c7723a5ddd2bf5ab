"""Somebody's own agent as an environment: a command that calls the policy over an endpoint.

command(task of another suite) --OpenAI's interface--> actor
        --MCP--> the task's tools                             answer --> the task's grader
"""

from envserver.suites.harness.suite import HarnessSuite

__all__ = ["HarnessSuite"]
