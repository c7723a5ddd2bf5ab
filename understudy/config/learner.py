"""[learner]: sections of the intake and of the trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from understudy.config.algorithm import AlgorithmConfig
from understudy.config.base import Section
from understudy.config.lora import LoraConfig
from understudy.config.shared import Address, HostPort, Positive, ProcessConfig

_OTHER_SAMPLING = (
    *("top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "min_tokens", "bad_words"),
)
"""Settings of samplers that people look for and that cannot be: a learner does not follow them."""


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
    task_order: Literal["in_order", "success_rate"] = "in_order"
    """Which task is next: the next in order, or the next in order that is not passed over, as tasks
    are that came out well or badly of late; those near a success rate of one half are not."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Episodes of one task (GRPO's G)."""
    groups_per_batch: PositiveInt = 32
    """Tasks a batch."""
    max_staleness: NonNegativeInt = 1
    """Most versions that a trained token may be behind; admission is derived from it."""
    max_resample: PositiveInt = 1
    """Groups that a batch may take in while it looks for groups_per_batch whose rewards differ
    (DAPO's dynamic sampling), as a multiple of groups_per_batch; 1 takes groups as they come."""
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
    overlong_tokens: NonNegativeInt = 0
    """Tokens before max_new_tokens, and before max_tokens, over which the penalty of a reply or a
    segment rises from 0 to overlong_penalty (DAPO's overlong shaping); 0 has no penalty."""
    overlong_penalty: Positive = 1.0
    """What is taken off the reward of an episode that came to such a limit."""
    shuffle_rewards: bool = False
    """Control experiment: permute rewards among the episodes of a batch. Nothing can be learned."""

    @model_validator(mode="before")
    @classmethod
    def _sampling_can_be_reproduced(cls, values: Any) -> Any:
        for name in _OTHER_SAMPLING:
            if isinstance(values, Mapping) and name in values:
                raise ValueError(
                    f"{name} = {values[name]!r} would sample from another distribution than the "
                    "one whose log-probabilities the learner computes; leave it out: only "
                    "temperature can be set"
                )
        return values

    @model_validator(mode="after")
    def _policies_fit(self) -> Self:
        if self.max_resample > 1 and self.shuffle_rewards:
            raise ValueError(
                f"max_resample = {self.max_resample} looks for groups whose rewards differ, which "
                "shuffle_rewards decides anew once the batch is closed; set max_resample = 1"
            )
        limit = min(self.max_new_tokens, self.max_tokens)
        if self.overlong_tokens >= limit:
            raise ValueError(
                f"overlong_tokens = {self.overlong_tokens} is not below max_new_tokens and "
                f"max_tokens, the least of which is {limit}: every episode would be penalised"
            )
        return self


class EvaluationConfig(Section):
    """[learner.evaluation]: accuracy on held-out tasks, measured while the run goes on."""

    every_steps: NonNegativeInt = 0
    """Evaluate the version that has so many steps behind it, or a multiple, the first one
    included, and the run's last version; 0 evaluates none."""
    split: str = "test"
    """Split of the suite that tasks are taken from, always the same ones."""
    first_ordinal: NonNegativeInt = 0
    """First task of the split."""
    num_tasks: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    """Tasks, each played once."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """Sampling temperature; 0 is greedy; not set, it is that of learner.tasks."""


class PhaseConfig(Section):
    """[[learner.supervised.phases]]: a stretch of the stage, on demonstrations or a run's log."""

    data: Path | None = None
    """Chat JSON lines: {"messages": [...], "tools": [...]} a line."""
    run: Path | None = None
    """Folder of a run whose recorded episodes are learned from instead."""
    min_reward: float = 1.0
    """Lowest reward of a recorded episode that is learned from."""
    max_per_task: NonNegativeInt = 0
    """Most recorded episodes of one task, so that easy tasks do not outweigh others; 0: all."""
    steps: PositiveInt
    """Optimizer steps."""
    learning_rate: Positive | None = None
    """Highest rate of a schedule that begins here and lasts until the next phase that names one;
    the first phase must."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.data is None) == (self.run is None):
            raise ValueError("a phase needs either data, a file, or run, a run's folder")
        return self


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
    updates_per_batch: PositiveInt = 1
    """Optimizer steps that one batch is divided into."""
    tokens_per_microbatch: PositiveInt = 16_384
    """Most tokens of one forward pass, unless a single episode has more."""
    activation_checkpointing: bool = False
    """Compute activations again for the backward pass, layer by layer, rather than keep them."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    offload: bool = False
    """Keep parameters and the optimizer's state in host memory while a GPU does not need them."""
    tensor_parallel: PositiveInt = 1
    """Trainer ranks that share each pass, every one with a part of every layer. Divides
    `learner.ranks`, and the model's attention heads and feed-forward width."""
    min_effective_sample_size: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the tokens under which the importance weights' effective sample size is taken for a
    sign of collapse; 0 never is."""
    small_sample: Literal["skip", "shrink"] = "shrink"
    """What becomes of a step whose effective sample size is under that: it is skipped, or its
    learning rate shrinks in proportion."""
    max_skipped_updates: PositiveInt = 3
    """Updates in a row that are skipped as their loss or gradient is not finite, before the trainer
    stops and saves the batch."""


class LogConfig(Section):
    """[learner.log]: the run's log of trajectories and ledger events."""

    segment_bytes: PositiveInt = 64 * 2**20
    """Size at which a segment is sealed and the next begins."""
    buffer_bytes: PositiveInt = 64 * 2**20
    """Most payload bytes in memory that are not on the disk yet; credits are shares of it."""
    quota_bytes: PositiveInt = 256 * 2**30
    """Most bytes on the disk; at the quota, actors get no credits and no leases until there is
    room."""
    retention: Literal["all", "checkpoint"] = "all"
    """Payloads that are kept: all, so that the run can be replayed, or those that a trainer may
    still ask for after a restart from the oldest checkpoint. Events are kept for ever."""


class WeightsConfig(Section):
    """[learner.weights]: the weight store, and what goes past it."""

    transport: Literal["delta", "nccl"] = "delta"
    """How weights travel: `delta`, what changed, over gRPC; `nccl`, all values, from GPU to GPU by
    vLLM's backend of that name, where learner and inference share a node."""
    transfer_seconds: Positive = 60.0
    """Deadline of each step of a transfer by `nccl`; a process whose step is late ends."""
    keep_deltas: PositiveInt = 32
    """Most deltas that lead from the full copy on disk to the newest version; a longer chain, or
    one of more than half its bytes, is replaced by a new full copy."""
    metrics_listen: HostPort = "127.0.0.1:9020"
    """Prometheus endpoint of the store, where it is a process of its own."""

    @field_validator("transport", mode="before")
    @classmethod
    def _no_ipc(cls, value: object) -> object:
        if value == "ipc":
            raise ValueError(
                "'ipc' is left out, as vLLM pickles the handles that it sends, and there is no "
                "pickle on the wire here; take 'nccl' or 'delta'"
            )
        return value


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
    checkpoint_every_steps: NonNegativeInt = 10
    """Save a checkpoint, from which a run resumes, every so many steps; 0 saves none."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints that are kept; older ones are deleted once a newer one is durable."""
    save_every_steps: NonNegativeInt = 0
    """Save the model, as a Hugging Face folder, every so many steps; 0 saves it at the end only."""
    log: LogConfig = LogConfig()
    weights: WeightsConfig = WeightsConfig()
    tasks: TasksConfig = TasksConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()

    @property
    def keeps_uniform_groups(self) -> bool:
        """Whether groups whose rewards are all equal are trained: if the algorithm learns from
        them, unless a batch looks for others."""
        return self.algorithm.learns_from_uniform_groups and self.tasks.max_resample == 1

    @model_validator(mode="after")
    def _held_out_tasks_are_not_trained(self) -> Self:
        tasks, heldout = self.tasks, self.evaluation
        first, last = tasks.first_ordinal, tasks.first_ordinal + tasks.num_tasks - 1
        apart = heldout.first_ordinal > last or heldout.first_ordinal + heldout.num_tasks <= first
        if heldout.every_steps and heldout.split == tasks.split and not apart:
            raise ValueError(
                f"evaluation.split = {heldout.split!r} from first_ordinal = "
                f"{heldout.first_ordinal} on has tasks that are trained on: learner.tasks plays "
                f"{first} to {last} of the same split; take another split, or other tasks"
            )
        return self

    @model_validator(mode="after")
    def _ranks_form_tensor_groups(self) -> Self:
        size = self.train.tensor_parallel
        if self.ranks % size:
            raise ValueError(
                f"train.tensor_parallel = {size} does not divide ranks = {self.ranks}; set ranks "
                "to a multiple of it"
            )
        for name in ("offload", "compile"):
            if size > 1 and getattr(self.train, name):
                raise ValueError(
                    f"train.tensor_parallel = {size} and train.{name} = true do not go together; "
                    "leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _adapters_go_alone(self) -> Self:
        others = {
            "train.tensor_parallel": (self.train.tensor_parallel, 1),
            "weights.transport": (self.weights.transport, "delta"),
        }
        for name, (value, plain) in others.items():
            if self.lora.rank and value != plain:
                raise ValueError(
                    f"lora.rank = {self.lora.rank} and {name} = {value!r} do not go together; "
                    "leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _rendezvous_for_nodes(self) -> Self:
        if self.nodes > 1 and not self.rendezvous:
            raise ValueError("nodes above 1 need rendezvous = 'host:port'")
        return self
