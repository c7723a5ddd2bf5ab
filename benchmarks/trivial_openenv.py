"""The same environment on OpenEnv's own server, run by the Python that has openenv.

`trivial_openenv.py loop | threads HOST PORT`: its server runs coroutines on the event loop, and
plain functions, which every environment has, in a thread a session.
"""

import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Say(Action):  # type: ignore[misc]
    text: str


class Heard(Observation):  # type: ignore[misc]
    text: str


class Trivial(Environment):  # type: ignore[misc]
    """Never ends."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, **_: Any) -> Heard:
        return Heard(text="Speak.")

    def step(self, action: Say, **_: Any) -> Heard:
        return Heard(text=action.text)

    @property
    def state(self) -> State:
        return State()


class LoopTrivial(Trivial):
    """The same in coroutines."""

    async def reset_async(self, seed: int | None = None, **_: Any) -> Heard:
        return self.reset()

    async def step_async(self, action: Say, **_: Any) -> Heard:
        return self.step(action)


if __name__ == "__main__":
    calls, host, port = sys.argv[1:]
    kind = LoopTrivial if calls == "loop" else Trivial
    app = create_fastapi_app(kind, Say, Heard, max_concurrent_envs=10_000)
    uvicorn.run(app, host=host, port=int(port), log_level="warning")
