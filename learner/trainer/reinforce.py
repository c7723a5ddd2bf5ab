"""Reinforcement learning, one step after another:

    intake --NextBatch--> episodes --algorithm--> gradients --AdamW--> weights
      ^                                                                |
      +--- trajectories <-- actors <-- inference <--PublishWeights-- each rank's shard

A step waits for its batch, and for the version of the step before to be committed, which it was
sent for meanwhile: actors play on while it computes, so that tokens are a few versions old at most,
which the loss corrects for. It is unblocked by NextBatch's answer and produces one version; a start
produces one before any batch, of the weights as loaded. A start takes up the run at its newest
checkpoint, and gets the batches from there on once more.

In a deterministic run with a staleness of k, the weights after step s are published only once batch
s + k has been handed out, that is, played to its end. What they admit is batch s + k + 1, so that
each batch is played by one version, whatever the timing. With k = 1:

    train s -> NextBatch(s + 1) -> publish s + 1 -> train s + 1 -> ...
                   played by s       |
                                     +--> batch s + 2 is played by s + 1
"""

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence

import grpc

from learner.trainer.algorithm import Algorithm
from learner.trainer.attendance import Attendance
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
from learner.trainer.experience import Episode, episodes_of
from learner.trainer.intake_client import BatchShare, IntakeClient
from learner.trainer.memory import noting_what_fits, token_limit
from learner.trainer.model import load_policy, load_reference
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer
from learner.trainer.publish import make_publisher
from learner.trainer.ranks import Ranks
from learner.trainer.report import Clock, export, uniform_share
from learner.trainer.untrainable import save_share
from learner.trainer.update import UntrainableBatchError, Updater
from understudy import metrics
from understudy.config import Config
from understudy.errors import ConfigError

_log = logging.getLogger(__name__)


def train_reinforce(config: Config, ranks: Ranks) -> None:
    """Take steps until the configured number or the run's last batch, and save the model."""
    run = _Run(config, ranks)
    if ranks.rank == 0:
        metrics.start_exporter(
            config.learner.trainer_metrics_listen, "trainer", "learner.trainer_metrics_listen"
        )
    with connect(config.network) as channel, run.joined(channel):
        ended = run.step >= config.learner.train.steps
        while not ended:
            ended = run.take_step()
        run.end()


class _Run:
    """One trainer's part of a run, from a checkpoint or from the base model."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        learner = config.learner
        if config.run.deterministic and ranks.device.type != "cpu":
            raise ConfigError(
                "run.deterministic = true: the trainer computes on a GPU, where two runs need not "
                "agree; hide it (CUDA_VISIBLE_DEVICES=), or leave the field out"
            )
        self._algorithm = Algorithm(learner.algorithm)
        self._policy = load_policy(config, ranks, critic=self._algorithm.has_critic)
        self._optimizer = Optimizer(list(self._policy.parameters()), learner.train)
        self._max_tokens = token_limit(config.run.path, learner.train.tokens_per_microbatch, ranks)
        self._updater = Updater(
            self._policy,
            self._optimizer,
            load_reference(config, self._policy, ranks),
            self._algorithm,
            config,
            ranks,
            self._max_tokens,
        )
        self._folder = config.run.path / "checkpoints"
        self._checkpoints = Checkpoints(self._folder, ranks, learner.keep_checkpoints)
        self.step = 0
        """Steps behind the weights."""
        self._clock = Clock()
        self._num_ahead = learner.tasks.max_staleness if config.run.deterministic else 0
        """Batches that are taken before the weights of a step are published."""
        self._ahead: deque[BatchShare] = deque()
        """Those of the next steps that were taken."""
        self._ledger_digest = b""
        """Of the batches of those steps."""
        checkpoint = load_latest(self._folder, self._policy, self._optimizer, ranks)
        if checkpoint:
            state = checkpoint.manifest.state
            self.step = checkpoint.manifest.step
            self._updater.num_updates = state.num_updates
            self._updater.num_failures = state.num_failures
            self._ledger_digest = bytes.fromhex(state.ledger_digest)
        highest, lowest = ranks.max([self.step, -self.step])
        if highest != -lowest:
            raise ConfigError(
                f"{self._folder}: ranks found checkpoints of steps {-lowest:.0f} to {highest:.0f}; "
                "it has to be on a file system that all of them share"
            )

    @contextlib.contextmanager
    def joined(self, channel: grpc.Channel) -> Iterator[None]:
        """Begin an epoch of the run and publish the weights as they are; stop publishing after."""
        self._intake = IntakeClient(channel, self._config, self._ranks)
        epoch = self._intake.start_training(self.step, self._ledger_digest)
        attendance = Attendance(channel, epoch, self._ranks)
        publisher = make_publisher(self._policy, epoch, self._config, self._ranks)
        with contextlib.closing(attendance), contextlib.closing(publisher) as self._publisher:
            publisher.submit(self.step)
            publisher.flush()
            yield

    def take_step(self) -> bool:
        """Learn from one batch and publish; returns whether it was the last."""
        clock, publisher = self._clock, self._publisher
        with clock.phase("wait"):
            share = self._ahead.popleft() if self._ahead else self._take_batch(self.step)
        with clock.phase("decode"):
            shuffled = self._config.learner.tasks.shuffle_rewards
            episodes = episodes_of(share, self._algorithm.estimate, at_the_end=shuffled)
        figures = self._update(share, episodes)
        ended = self._is_last(share)
        with clock.phase("wait"):
            self._take_ahead(share)
        with clock.phase("publish"):
            publisher.probe_with([sample for e in episodes for sample in e.samples])
            publisher.submit(self.step + 1)
            if ended:
                publisher.flush()  # the intake may go once it knows of the last step
        if self._ranks.rank == 0:
            figures["uniform_group_share"] = uniform_share(share.header)
            figures |= clock.figures(figures["tokens"])
            self._intake.complete_step(self.step, figures)
            export(share.header, figures, clock)
        self.step += 1
        self._ledger_digest = share.header.ledger_digest
        self._clock = Clock()
        with self._clock.phase("checkpoint"):  # of the next step's seconds
            self._keep(ended)
        return ended

    def _update(self, share: BatchShare, episodes: Sequence[Episode]) -> dict[str, float]:
        """Change the policy. What cannot be learned from is kept, for people to look at."""
        run_path = self._config.run.path
        try:
            with noting_what_fits(run_path, self._max_tokens, self._ranks):
                return self._updater.update(episodes, share.header, self._clock)
        except UntrainableBatchError:
            if not self._ranks.tensor_rank:  # all of a tensor group have the same share
                path = save_share(run_path / "untrainable", self._ranks.data_rank, share)
                _log.error("the batch is kept in %s", path)
            raise

    def _take_ahead(self, share: BatchShare) -> None:
        """Take the batches that have to be played before the weights after this one's step are."""
        newest = self._ahead[-1] if self._ahead else share
        while len(self._ahead) < self._num_ahead and not self._is_last(newest):
            newest = self._take_batch(self.step + 1 + len(self._ahead))
            self._ahead.append(newest)

    def _is_last(self, share: BatchShare) -> bool:
        return share.header.last or share.header.step + 1 >= self._config.learner.train.steps

    def _take_batch(self, step: int) -> BatchShare:
        publisher = self._publisher
        return self._intake.next_batch(
            step, publish_again=publisher.publish_again, check=publisher.check
        )

    def _keep(self, ended: bool) -> None:
        """Save what is due."""
        learner = self._config.learner
        self._record(self._checkpoints.poll())
        every = learner.checkpoint_every_steps
        if every and (self.step % every == 0 or ended):
            self._record(self._save_checkpoint())
        if learner.save_every_steps and self.step % learner.save_every_steps == 0:
            self._save_model()

    def _save_checkpoint(self) -> Saved | Failed | None:
        state = TrainerState(
            num_updates=self._updater.num_updates,
            num_failures=self._updater.num_failures,
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
