"""An environment on OpenEnv's own server, run by the Python that has openenv.

`openenv_server.py HOST PORT`: say a number; `boom` fails, `long` says much.
"""

import sys
from typing import Any
from uuid import uuid4

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field


class Say(Action):
    text: str = Field(description="What to say.", max_length=20)


class Heard(Observation):
    text: str


class Guess(Environment[Say, Heard, State]):
    """The right answer is the seed; three tries."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.seed = 0
        self.num_tries = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Heard:
        self.seed = seed or 0
        return Heard(text=f"Say {self.seed}.")

    def step(self, action: Say, timeout_s: float | None = None, **_: Any) -> Heard:
        if action.text == "boom":
            raise RuntimeError("secret")
        if action.text == "long":
            return Heard(text="x" * 20_000_000)
        self.num_tries += 1
        right = action.text == str(self.seed)
        done = right or self.num_tries == 3
        return Heard(text=f"try {self.num_tries}", reward=float(right), done=done)

    @property
    def state(self) -> State:
        return State(episode_id=str(uuid4()), step_count=self.num_tries)


if __name__ == "__main__":
    app = create_fastapi_app(Guess, Say, Heard, max_concurrent_envs=4)
    uvicorn.run(app, host=sys.argv[1], port=int(sys.argv[2]), log_level="warning")
