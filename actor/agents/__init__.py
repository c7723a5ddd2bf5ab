"""Agents of several parts: definitions, the calls between them, and how they keep to a context.

    environment <--calls, answer-- AgentSpeaker --messages--> Part (planner) --> speaker
                                        |  ^                    a policy's own conversation
                                        v  |
                                   Part (searcher), called as a tool, or handed the conversation

To the episode's loop an agent is one speaker: it hears what the environment says, and replies with
calls of the environment's tools, or with the answer. See docs/agents.md.
"""
