"""An OpenAI-compatible endpoint in front of the run's inference, which records what it samples.

    harness --POST /<token>/v1/chat/completions--> server -> session -> recorder -> InferencePool
                                                      |         |          |
                                            wire, errors   lease's limits  exact tokens, by segment

One token is one episode: its base URL goes to the environment server with the reset, and is gone
when the episode ends.
"""
