"""Environments that people already have, each as a suite; docs/adapters.md has their options.

gymnasium.py  environments of Gymnasium, in process
openenv.py    an OpenEnv server, over its WebSocket
mcp.py        the tools of any MCP server, with tasks and a grader of one's own
mcp_peer.py   one session with an MCP server: transports with limits, attribution of faults
peer.py       what a peer does wrong, by reason
seeded.py     tasks that are seeds
"""
