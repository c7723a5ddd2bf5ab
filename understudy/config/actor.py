"""[actor]: the actor's section."""

from typing import Annotated

from pydantic import Field, PositiveInt

from understudy.config.shared import Address, HostPort, Positive, ProcessConfig


class ActorConfig(ProcessConfig):
    """[actor]: episodes."""

    listen: Address = "127.0.0.1:0"
    """Address of the control server."""
    metrics_listen: HostPort = "127.0.0.1:9300"
    concurrency: PositiveInt = 64
    """Episodes played at one time by one process."""
    agent: str = ""
    """Agent of several parts that plays, a name under [agents]; empty: the policy by itself."""
    generate_timeout_seconds: Positive = 600.0
    """Longest that one reply may take, retries included."""
    step_timeout_seconds: Positive = 330.0
    """Longest that one answer of an environment may take."""
    max_unacked_bytes: PositiveInt = 256 * 2**20
    """Finished trajectories held until the learner acks them; when full, no new episode starts."""
    recording_listen: HostPort | None = None
    """Where the recording endpoint listens, for suites that lead the conversation themselves
    (`harness`); port 0 takes a free one. Not set: there is none. See docs/harness.md."""
    recording_url: Annotated[str, Field(pattern=r"^(https?://[^\s?#]+)?$")] = ""
    """How the machines of environment servers reach it, e.g. `http://10.0.0.7:9400`; empty:
    `http://` and the address."""
