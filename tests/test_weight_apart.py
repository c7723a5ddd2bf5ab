"""Two ranks that are a step apart when they publish: no version has parts of two steps, the one
before goes on serving, and the ranks meet again, or the trainer that is started next publishes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from learner.trainer import sender
from understudy.errors import PeerUnreachableError

from weight_history import (  # isort: skip
    Follower,
    History,
    Rank,
    Trainer,
    following,
    look,
    training,
    until_taken,
)
from weight_processes import Processes, processes  # isort: skip
from weight_proxy import WeightProxy  # isort: skip
from weight_store_helpers import LOWER, moved, tensors_of  # isort: skip

PATIENCE_SECONDS = 0.5
"""Of the rank that is behind and must not get through."""


@contextlib.asynccontextmanager
async def published(
    folder: Path, history: History
) -> AsyncIterator[tuple[Processes, Trainer, Follower]]:
    """A store, a trainer of two ranks that has published version 1, and who follows."""
    async with processes(folder, own=False, keep_deltas=32) as running:
        await running.start("learner.intake")
        async with (
            following(running, history) as follower,
            training(running, history) as trainer,
        ):
            assert await trainer.publish() == 1
            yield running, trainer, follower


def take_step(trainer: Trainer) -> None:
    trainer.step += 1
    trainer.tensors = moved(trainer.tensors, seed=trainer.step)


async def store_serves(running: Processes, history: History, version: int) -> None:
    """What the store gives out is this version, whole."""
    assert await look(running.config.network.learner, history, "the store") == version


async def test_a_rank_that_lost_its_answer_meets_the_one_that_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_SECONDS", 0.02)
    history = History()
    async with published(tmp_path, history) as (running, trainer, follower):
        proxy = WeightProxy(running.config.network.learner)
        network = running.config.network.model_copy(update={"learner": await proxy.start()})
        trainer.ranks[1].close()
        ahead, behind = trainer.ranks[0], Rank(network, 1, LOWER)  # which has no base: all values
        proxy.loses_answers = True
        take_step(trainer)
        late = asyncio.create_task(trainer.publish_part(behind))
        assert await trainer.publish_part(ahead) == 2
        history.publishes(2, tensors_of(trainer.tensors))
        take_step(trainer)
        early = asyncio.create_task(trainer.publish_part(ahead))
        await until_taken(running, trainer.epoch, taken=True)
        lost = proxy.num_answers_lost
        async with asyncio.timeout(30):
            while proxy.num_answers_lost < lost + 3:  # noqa: ASYNC110 - as seen from outside
                await asyncio.sleep(0.01)
        await follower.serves(2)
        await store_serves(running, history, 2)
        proxy.loses_answers = False
        # The step before is answered while the next one is under way, of which it becomes no part.
        assert await late == 2
        assert not early.done()
        assert await trainer.publish_part(behind) == 3
        assert await early == 3
        history.publishes(3, tensors_of(trainer.tensors))
        await follower.serves(3)
        await store_serves(running, history, 3)
        await asyncio.to_thread(behind.close)
        await proxy.stop()
    assert follower.version == 3
    history.check()


@pytest.mark.parametrize("ahead", [0, 1], ids=["rank 0 ahead", "rank 1 ahead"])
async def test_ranks_whose_steps_differ_are_refused_and_the_next_trainer_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """As if one of them had been restored from another checkpoint."""
    monkeypatch.setattr(sender, "RETRY_SECONDS", 0.02)
    history = History()
    async with published(tmp_path, history) as (running, trainer, follower):
        patience = {"connect_timeout_seconds": PATIENCE_SECONDS}
        network = running.config.network.model_copy(update=patience)
        trainer.ranks[1 - ahead].close()
        behind = Rank(network, 1 - ahead, trainer.ranks[1 - ahead].rows)
        take_step(trainer)
        take_step(trainer)
        early = asyncio.create_task(trainer.publish_part(trainer.ranks[ahead]))
        await until_taken(running, trainer.epoch, taken=True)
        trainer.step -= 1
        with pytest.raises(PeerUnreachableError, match="epoch 1, step 2 in 2 parts is under way"):
            await trainer.publish_part(behind)
        assert not early.done()
        await store_serves(running, history, 1)
        # torchrun ends all ranks when one has failed, and starts them again.
        await asyncio.to_thread(behind.close)
        trainer.ranks[ahead].close()
        with pytest.raises(Exception, match="CANCELLED|closed before step 2"):
            await early
        await until_taken(running, trainer.epoch, taken=False)
        assert follower.version == 1
        async with training(running, history) as restarted:
            assert await restarted.publish() == 2
            await follower.serves(2)
            await store_serves(running, history, 2)
    history.check()
