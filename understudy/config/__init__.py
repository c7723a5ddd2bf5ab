"""One TOML file a run, one section a role."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from understudy.config.actor import ActorConfig
from understudy.config.base import Section, apply_overrides, explain, read_values
from understudy.config.envserver import EnvserverConfig
from understudy.config.inference import InferenceConfig, ScriptedConfig
from understudy.config.learner import LearnerConfig, SupervisedConfig, TasksConfig, TrainConfig
from understudy.config.shared import ModelConfig, NetworkConfig, RunConfig, TlsConfig

__all__ = [
    "ActorConfig",
    "Config",
    "EnvserverConfig",
    "InferenceConfig",
    "LearnerConfig",
    "ModelConfig",
    "NetworkConfig",
    "RunConfig",
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

    @model_validator(mode="after")
    def _segments_fit_the_engine(self) -> Self:
        segment, context = self.learner.tasks.max_tokens, self.inference.max_model_len
        if segment > context:
            raise ValueError(
                f"learner.tasks.max_tokens = {segment} is above inference.max_model_len = "
                f"{context}; lower the one or raise the other"
            )
        return self


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
