"""One TOML file a run, one section a role."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from understudy.config.actor import ActorConfig
from understudy.config.agents import (
    AgentConfig,
    PartName,
    PolicyConfig,
    check_agents,
    check_summaries,
)
from understudy.config.algorithm import AlgorithmConfig
from understudy.config.base import Section, apply_overrides, explain, read_values
from understudy.config.envserver import EnvserverConfig, SandboxConfig
from understudy.config.inference import InferenceConfig, ScriptedConfig
from understudy.config.learner import (
    EvaluationConfig,
    LearnerConfig,
    PhaseConfig,
    SupervisedConfig,
    TasksConfig,
    TrainConfig,
)
from understudy.config.lora import LoraConfig
from understudy.config.shared import ModelConfig, NetworkConfig, RunConfig, TlsConfig

__all__ = [
    "ActorConfig",
    "AgentConfig",
    "AlgorithmConfig",
    "Config",
    "EnvserverConfig",
    "EvaluationConfig",
    "InferenceConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "NetworkConfig",
    "PhaseConfig",
    "PolicyConfig",
    "RunConfig",
    "SandboxConfig",
    "ScriptedConfig",
    "SupervisedConfig",
    "TasksConfig",
    "TlsConfig",
    "TrainConfig",
    "load_config",
    "write_config",
]


class Config(Section):
    """A run's whole configuration."""

    model: ModelConfig
    run: RunConfig = RunConfig()
    network: NetworkConfig = NetworkConfig()
    envserver: EnvserverConfig = Field(default_factory=EnvserverConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    actor: ActorConfig = Field(default_factory=ActorConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    agents: dict[PartName, AgentConfig] = Field(default_factory=dict)
    """Parts of agents, by name; `actor.agent` says which plays."""
    policies: dict[PartName, PolicyConfig] = Field(default_factory=dict)
    """Policies other than the run's, by name."""

    @model_validator(mode="after")
    def _segments_fit_the_engine(self) -> Self:
        segment, context = self.learner.tasks.max_tokens, self.inference.max_model_len
        if segment > context:
            raise ValueError(
                f"learner.tasks.max_tokens = {segment} is above inference.max_model_len = "
                f"{context}; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _agent_can_be_played(self) -> Self:
        if not self.actor.agent:
            if unused := sorted(self.agents):
                raise ValueError(f"agents.{unused[0]}: no agent is played; set actor.agent")
            return self
        tasks = self.learner.tasks
        obstacle = check_agents(self.agents, self.policies, self.actor.agent) or check_summaries(
            self.agents, tasks.max_tokens, tasks.max_new_tokens
        )
        if obstacle:
            raise ValueError(obstacle)
        return self

    @model_validator(mode="after")
    def _deterministic_if_asked(self) -> Self:
        if self.run.deterministic and (obstacle := _obstacle(self)):
            raise ValueError(f"run.deterministic = true: {obstacle}")
        return self

    @model_validator(mode="after")
    def _transport_reaches_replicas(self) -> Self:
        transport = self.learner.weights.transport
        if transport == "delta":
            return self
        cause = ""
        if self.network.weights:
            cause = "network.weights is set, but no weight store gets a copy; leave it out"
        elif self.inference.weights.upstream:
            cause = "inference.weights.upstream is set, but replicas pass nothing on; leave it out"
        elif self.inference.engine != "vllm":
            cause = f"inference.engine = '{self.inference.engine}' cannot receive it; take 'vllm'"
        elif not self.network.inference:
            cause = "network.inference is empty; list the replicas that are sent to"
        if cause:
            raise ValueError(f"learner.weights.transport = '{transport}': {cause}")
        return self


def _obstacle(config: Config) -> str:
    """What keeps a run from being deterministic, and the remedy; empty if nothing does."""
    inference, learner = config.inference, config.learner
    if inference.engine != "vllm":
        return f"inference.engine = '{inference.engine}' knows no seeds; take 'vllm'"
    if config.model.dtype != "float32":
        return (
            f"model.dtype = '{config.model.dtype}' rounds by what else is batched; take 'float32'"
        )
    if inference.threads != 1:
        return (
            f"inference.threads = {inference.threads} divides sums by what else is batched; set 1"
        )
    if len(config.network.inference) > 1:
        return (
            f"network.inference lists {len(config.network.inference)} replicas, which need not "
            "compute alike; list one"
        )
    if learner.tasks.max_staleness and learner.tasks.max_resample > 1:
        return (
            f"learner.tasks.max_resample = {learner.tasks.max_resample} takes groups into a batch "
            "whose version was chosen for a later one; set max_staleness = 0"
        )
    if learner.tasks.max_staleness and learner.tasks.task_order != "in_order":
        return (
            f"learner.tasks.task_order = '{learner.tasks.task_order}' depends on when batches are "
            "closed; set max_staleness = 0"
        )
    if learner.train.max_seconds is not None:
        return (
            f"learner.train.max_seconds = {learner.train.max_seconds:g} ends the run by the clock; "
            "leave it out and set learner.train.steps"
        )
    if learner.weights.transport != "delta":
        return (
            f"learner.weights.transport = '{learner.weights.transport}' is for GPUs, which do not "
            "compute alike from run to run; take 'delta'"
        )
    return ""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's TOML (or the JSON of a resolved one) and apply `section.key=value` overrides.

    Raises:
        ConfigError: naming every wrong field with its value and a remedy.
    """
    values = apply_overrides(read_values(path), overrides)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise explain(error, Config, str(path)) from None


def write_config(config: Config, folder: Path) -> Path:
    """Write the resolved configuration as `config.json`, which load_config reads as well."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path
