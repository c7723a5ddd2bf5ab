"""[actor]: the actor's section."""

from pydantic import PositiveInt

from understudy.config.shared import Address, HostPort, Positive, ProcessConfig


class ActorConfig(ProcessConfig):
    """[actor]: episodes."""

    listen: Address = "127.0.0.1:0"
    """Address of the control server."""
    metrics_listen: HostPort = "127.0.0.1:9300"
    concurrency: PositiveInt = 64
    """Episodes played at one time by one process."""
    generate_timeout_seconds: Positive = 600.0
    """Longest that one reply may take, retries included."""
    step_timeout_seconds: Positive = 330.0
    """Longest that one answer of an environment may take."""
    max_unacked_bytes: PositiveInt = 256 * 2**20
    """Finished trajectories held until the learner acks them; when full, no new episode starts."""
