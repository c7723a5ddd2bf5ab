"""Reinforcement learning, one step after another:

    intake --NextBatch--> samples with advantages --GRPO--> gradients --AdamW--> weights
      ^                                                                            |
      +--- trajectories <--- actors <--- inference <--PublishWeights-- each rank's shard

A step waits for its batch and for nothing else: actors play on while it computes, so that tokens
are a few versions old at most, which the loss corrects for. It is unblocked by NextBatch's answer
and produces one version; the first version, of the weights as loaded, comes before any batch.
"""

from learner.trainer.calls import connect
from learner.trainer.checkpoint import save_model
from learner.trainer.epoch import next_epoch
from learner.trainer.experience import samples_of
from learner.trainer.intake_client import IntakeClient
from learner.trainer.model import load_policy, load_reference
from learner.trainer.optimizer import Optimizer
from learner.trainer.publish import Publisher
from learner.trainer.ranks import Ranks
from learner.trainer.report import Clock, export, uniform_share
from learner.trainer.update import Updater
from understudy import metrics
from understudy.config import Config


def train_reinforce(config: Config, ranks: Ranks) -> None:
    """Take steps until the configured number or the run's last batch, and save the model."""
    policy = load_policy(config.model.path, config.model.dtype, config.learner.attention, ranks)
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    updater = Updater(policy, optimizer, load_reference(config, ranks), config, ranks)
    if ranks.rank == 0:
        metrics.start_exporter(
            config.learner.trainer_metrics_listen, "trainer", "learner.trainer_metrics_listen"
        )
    with connect(config.network) as channel:
        intake = IntakeClient(channel, config.network, ranks)
        publisher = Publisher(policy, channel, next_epoch(config.run, ranks), config, ranks)
        version = publisher.publish(step=0)
        for step in range(config.learner.train.steps):
            clock = Clock()
            with clock.phase("wait"):
                share = intake.next_batch(step)
            with clock.phase("decode"):
                samples = samples_of(share)
            figures = updater.update(samples, share.header, version, clock)
            with clock.phase("publish"):
                publisher.probe_with(samples)
                version = publisher.publish(step + 1)
            if ranks.rank == 0:
                figures["uniform_group_share"] = uniform_share(share.header)
                figures |= clock.figures(figures["tokens"])
                intake.complete_step(step, figures)
                export(share.header, figures, clock)
            last = share.header.last or step + 1 == config.learner.train.steps
            every = config.learner.save_every_steps
            if last or (every and (step + 1) % every == 0):
                save_model(
                    policy, config.model.path, config.run.path / "model", config.model.dtype, ranks
                )
            if last:
                break
