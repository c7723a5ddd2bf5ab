"""Reinforcement learning, one step after another:

    intake --NextBatch--> samples with advantages --GRPO--> gradients --AdamW--> weights
      ^                                                                            |
      +--- trajectories <--- actors <--- inference <--PublishWeights-- each rank's shard

A step waits for its batch and for nothing else: actors play on while it computes, so that tokens
are a few versions old at most, which the loss corrects for. It is unblocked by NextBatch's answer
and produces one version; a start produces one before any batch, of the weights as loaded. A start
takes up the run at its newest checkpoint, and gets the batches from there on once more.
"""

import grpc

from learner.trainer.calls import connect
from learner.trainer.checkpoints import (
    Checkpoints,
    Failed,
    Saved,
    TrainerState,
    list_checkpoints,
    load_latest,
    step_of,
)
from learner.trainer.experience import samples_of
from learner.trainer.intake_client import BatchShare, IntakeClient
from learner.trainer.model import load_policy, load_reference
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer
from learner.trainer.publish import Publisher
from learner.trainer.ranks import Ranks
from learner.trainer.report import Clock, export, uniform_share
from learner.trainer.update import Updater
from understudy import metrics
from understudy.config import Config
from understudy.errors import ConfigError


def train_reinforce(config: Config, ranks: Ranks) -> None:
    """Take steps until the configured number or the run's last batch, and save the model."""
    run = _Run(config, ranks)
    if ranks.rank == 0:
        metrics.start_exporter(
            config.learner.trainer_metrics_listen, "trainer", "learner.trainer_metrics_listen"
        )
    with connect(config.network) as channel:
        run.join(channel)
        ended = run.step >= config.learner.train.steps
        while not ended:
            ended = run.take_step()
        run.end()


class _Run:
    """One trainer's part of a run, from a checkpoint or from the base model."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        learner, model = config.learner, config.model
        self._policy = load_policy(model.path, model.dtype, learner.attention, ranks)
        self._optimizer = Optimizer(list(self._policy.parameters()), learner.train)
        reference = load_reference(config, ranks)
        self._updater = Updater(self._policy, self._optimizer, reference, config, ranks)
        self._folder = config.run.path / "checkpoints"
        self._checkpoints = Checkpoints(self._folder, ranks, learner.keep_checkpoints)
        self.step = 0
        """Steps behind the weights."""
        self._clock = Clock()
        self._ledger_digest = b""
        """Of the batches of those steps."""
        checkpoint = load_latest(self._folder, self._policy, self._optimizer, ranks)
        if checkpoint:
            state = checkpoint.manifest.state
            self.step = checkpoint.manifest.step
            self._updater.num_updates = state.num_updates
            self._ledger_digest = bytes.fromhex(state.ledger_digest)
        highest, lowest = ranks.max([self.step, -self.step])
        if highest != -lowest:
            raise ConfigError(
                f"{self._folder}: ranks found checkpoints of steps {-lowest:.0f} to {highest:.0f}; "
                "it has to be on a file system that all of them share"
            )

    def join(self, channel: grpc.Channel) -> None:
        """Begin an epoch of the run and publish the weights as they are."""
        self._intake = IntakeClient(channel, self._config, self._ranks)
        epoch = self._intake.start_training(self.step, self._ledger_digest)
        self._publisher = Publisher(self._policy, channel, epoch, self._config, self._ranks)
        self._publisher.publish(self.step)

    def take_step(self) -> bool:
        """Learn from one batch and publish; returns whether it was the last."""
        clock = self._clock
        with clock.phase("wait"):
            share = self._intake.next_batch(self.step, lambda: self._publisher.publish(self.step))
        with clock.phase("decode"):
            samples = samples_of(share)
        figures = self._updater.update(samples, share.header, self._publisher.version, clock)
        with clock.phase("publish"):
            self._publisher.probe_with(samples)
            self._publisher.publish(self.step + 1)
        if self._ranks.rank == 0:
            figures["uniform_group_share"] = uniform_share(share.header)
            figures |= clock.figures(figures["tokens"])
            self._intake.complete_step(self.step, figures)
            export(share.header, figures, clock)
        self.step += 1
        self._ledger_digest = share.header.ledger_digest
        self._clock = Clock()
        with self._clock.phase("checkpoint"):  # of the next step's seconds
            return self._keep(share)

    def _keep(self, share: BatchShare) -> bool:
        """Save what is due; returns whether the run has ended."""
        learner = self._config.learner
        ended = share.header.last or self.step >= learner.train.steps
        self._record(self._checkpoints.poll())
        every = learner.checkpoint_every_steps
        if every and (self.step % every == 0 or ended):
            self._record(self._save_checkpoint())
        if learner.save_every_steps and self.step % learner.save_every_steps == 0:
            self._save_model()
        return ended

    def _save_checkpoint(self) -> Saved | Failed | None:
        state = TrainerState(
            num_updates=self._updater.num_updates,
            last_version=self._publisher.version,
            trainer_epoch=self._intake.epoch,
            run=self._config.run.name,
            ledger_digest=self._ledger_digest.hex(),
        )
        return self._checkpoints.save(self.step, self._policy, self._optimizer, state)

    def _record(self, outcome: Saved | Failed | None) -> None:
        """Tell the intake of a checkpoint that is durable."""
        if not isinstance(outcome, Saved) or self._ranks.rank:
            return
        kept = list_checkpoints(self._folder)
        # Before there are enough to fall back on, the base model is what is fallen back on.
        full = len(kept) >= self._config.learner.keep_checkpoints
        oldest_kept = step_of(kept[-1]) if full else 0
        digest = bytes.fromhex(outcome.manifest_digest)
        self._intake.record_checkpoint(outcome.step, oldest_kept, digest)

    def end(self) -> None:
        """Save the model and wait for the last checkpoint."""
        self._save_model()
        self._record(self._checkpoints.finish())

    def _save_model(self) -> None:
        model, out = self._config.model, self._config.run.path / "model"
        save_model(self._policy, model.path, out, model.dtype, self._ranks)
