"""Sections that more than one role reads."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from understudy.config.base import Section

Address = Annotated[str, Field(pattern=r"^(unix:.+|\S+:\d{1,5})$")]
HostPort = Annotated[str, Field(pattern=r"^(\[[\da-fA-F:.]+\]|[^\s:/]+):\d{1,5}$")]
Positive = Annotated[float, Field(gt=0)]


class RunConfig(Section):
    """[run]: the run's identity and place."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "run"
    """Name of the run: its folder below `directory`, and its id on the wire."""
    directory: Path = Path("runs")
    """Folder that holds all runs."""
    seed: int = 0
    """Seed of the trainer: torch's generators, the order of demonstrations, the first probe, and
    permuted rewards; and of `understudy eval` unless it is given one. Episodes that are trained on
    are sampled without a seed, unless the run is deterministic."""
    deterministic: bool = False
    """Two runs with the same seed on one machine give the same weights bit for bit: replies are
    seeded, and each batch is played by one version. CPUs only; see docs/operations.md."""

    @property
    def path(self) -> Path:
        """The run's own folder."""
        return self.directory / self.name


class TlsConfig(Section):
    """[network.tls]: files of one identity, PEM. All three or none."""

    ca: Path | None = None
    """Certificate authority that peers are checked against."""
    certificate: Path | None = None
    """This process's certificate chain."""
    key: Path | None = None
    """This process's private key."""

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        files = (self.ca, self.certificate, self.key)
        if any(files) and not all(files):
            raise ValueError("ca, certificate and key belong together: set all three or none")
        return self


class NetworkConfig(Section):
    """[network]: where the roles find each other."""

    learner: Address = "127.0.0.1:7000"
    """The learner's intake."""
    weights: Address | None = None
    """The weight store, where it is a process of its own; not set: the intake has it."""
    inference: tuple[Address, ...] = ("127.0.0.1:7100",)
    """Inference replicas."""
    envservers: tuple[Address, ...] = ("127.0.0.1:7200",)
    """Environment servers."""
    connect_timeout_seconds: Positive = 60.0
    """How long a role waits for a peer it cannot do without, before it gives up."""
    insecure: bool = False
    """Allow plaintext beyond loopback and Unix sockets. Logged. Prefer `tls`."""
    tls: TlsConfig = TlsConfig()


class ModelConfig(Section):
    """[model]: the policy."""

    path: Path
    """Folder with config.json, tokenizer.json, a chat template and safetensors weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type in which the trainer computes and the engine serves; one setting, so that they agree.
    float32 gives equal log-probabilities on CPUs."""
    tools: Literal["schemas", "signatures"] = "schemas"
    """How the prompt lists tools: full JSON schemas, or one line a tool (small models)."""
    router_replay: bool = False
    """Mixtures of experts: record the experts that each token was sent to when it was sampled, and
    have the trainer send it to the same. vLLM returns them on GPUs only."""


class ProcessConfig(Section):
    """Settings that every role has."""

    metrics_listen: HostPort
    """Prometheus endpoint, host:port; port 0 takes a free one."""
    cpus: tuple[int, ...] = ()
    """CPUs that the process may run on; empty leaves the choice to the kernel."""
