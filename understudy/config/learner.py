"""[learner]: sections of the intake and of the trainer."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from understudy.config.base import Section
from understudy.config.shared import Address, HostPort, Positive, ProcessConfig


class TasksConfig(Section):
    """[learner.tasks]: what is played, and how much of it at a time."""

    suite: str = "practice"
    """Suite that tasks are taken from."""
    split: str = "train"
    """Split that tasks are taken from."""
    first_ordinal: NonNegativeInt = 0
    """First task of the split to play; later ones follow in order, wrapping at num_tasks."""
    num_tasks: PositiveInt = 500_000
    """Tasks of the split to play before the first comes again."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Episodes of one task (GRPO's G)."""
    groups_per_batch: PositiveInt = 32
    """Tasks a batch."""
    max_staleness: NonNegativeInt = 1
    """Most versions that a trained token may be behind; admission is derived from it."""
    temperature: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Sampling temperature; the trainer divides logits by the same."""
    max_new_tokens: PositiveInt = 1024
    """Most tokens of one reply."""
    max_turns: PositiveInt = 16
    """Most turns of one episode."""
    max_tokens: PositiveInt = 4096
    """Most tokens of one segment."""
    lease_seconds: Positive = 30.0
    """A lease that is not renewed for this long goes to somebody else; actors renew every third of
    it."""
    max_attempts: PositiveInt = 3
    """Times that a sample whose episode failed is played before it is dropped."""
    shuffle_rewards: bool = False
    """Control experiment: permute rewards among the episodes of a batch. Nothing can be learned."""


class PhaseConfig(Section):
    """[[learner.supervised.phases]]: a stretch of the warm-up on one file of demonstrations."""

    data: Path
    """Chat JSON lines: {"messages": [...], "tools": [...]} a line."""
    steps: PositiveInt
    """Optimizer steps."""
    learning_rate: Positive | None = None
    """Highest rate of a schedule that begins here and lasts until the next phase that names one;
    the first phase must."""


class SupervisedConfig(Section):
    """[learner.supervised]: the warm-up on demonstrations, one phase after another."""

    phases: tuple[PhaseConfig, ...] = ()
    """What is learned from, in order; easy demonstrations first make hard ones learnable."""
    batch_size: PositiveInt = 32
    """Conversations a step."""
    warmup_steps: NonNegativeInt = 30
    """Steps over which each schedule's rate rises from 0."""
    final_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the highest rate at which each schedule's cosine ends."""
    report_every_steps: PositiveInt = 10
    """A line of progress every so many steps."""

    @model_validator(mode="after")
    def _first_phase_has_rate(self) -> Self:
        if self.phases and self.phases[0].learning_rate is None:
            raise ValueError("phases[0].learning_rate is missing; the first phase needs one")
        return self


class TrainConfig(Section):
    """[learner.train]: the RL stage."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    max_seconds: Positive | None = None
    """Time after which the next batch is the run's last, from the first batch that is asked for."""
    learning_rate: Positive = 5e-4
    """Learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 5
    """Steps over which the rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moments."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the policy ratio: 1 - clip_low."""
    clip_high: Positive = 0.28
    """Upper clip of the policy ratio: 1 + clip_high."""
    importance_cap: Positive = 2.0
    """Cap of the token-level importance weight against the recorded behaviour policy."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the model that the run began with; 0 leaves it out."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps that one batch is divided into."""
    tokens_per_microbatch: PositiveInt = 16_384
    """Padded tokens of one forward pass."""


class LogConfig(Section):
    """[learner.log]: the run's log of trajectories and ledger events."""

    segment_bytes: PositiveInt = 64 * 2**20
    """Size at which a segment is sealed and the next begins."""
    buffer_bytes: PositiveInt = 64 * 2**20
    """Most payload bytes in memory that are not on the disk yet; credits are shares of it."""
    quota_bytes: PositiveInt = 256 * 2**30
    """Most bytes on the disk; at the quota, actors get no credits until there is room."""
    retention: Literal["all", "checkpoint"] = "all"
    """Payloads that are kept: all, so that the run can be replayed, or those that a trainer may
    still ask for after a restart from the oldest checkpoint. Events are kept for ever."""


class LearnerConfig(ProcessConfig):
    """[learner]: intake and trainer."""

    listen: Address = "127.0.0.1:7000"
    """Address of the intake's gRPC server."""
    metrics_listen: HostPort = "127.0.0.1:9000"
    trainer_metrics_listen: HostPort = "127.0.0.1:9010"
    """Prometheus endpoint of trainer rank 0."""
    ranks: PositiveInt = 1
    """Trainer ranks on this node (torchrun's nproc-per-node)."""
    nodes: PositiveInt = 1
    """Trainer nodes; above 1, set `rendezvous`."""
    rendezvous: str = ""
    """host:port at which the trainer nodes meet (torchrun's c10d rendezvous)."""
    trainer_cpus: tuple[int, ...] = ()
    """CPUs of the trainer ranks; empty leaves the choice to the kernel."""
    trainer_threads: PositiveInt = 1
    """OpenMP threads of each trainer rank."""
    max_restarts: NonNegativeInt = 3
    """Times that torchrun restarts a trainer that died."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of the trainer's model."""
    checkpoint_every_steps: NonNegativeInt = 10
    """Save a checkpoint, from which a run resumes, every so many steps; 0 saves none."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints that are kept; older ones are deleted once a newer one is durable."""
    save_every_steps: NonNegativeInt = 0
    """Save the model, as a Hugging Face folder, every so many steps; 0 saves it at the end only."""
    log: LogConfig = LogConfig()
    tasks: TasksConfig = TasksConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _rendezvous_for_nodes(self) -> Self:
        if self.nodes > 1 and not self.rendezvous:
            raise ValueError("nodes above 1 need rendezvous = 'host:port'")
        return self
