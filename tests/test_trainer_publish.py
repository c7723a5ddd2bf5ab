"""Publishing beside the training loop, against a store that fails on demand."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from learner.trainer import sender as sender_module
from learner.trainer.ranks import Ranks, joined
from understudy.errors import PeerUnreachableError, UnderstudyError

from publishing import CASES, Published  # isort: skip
from trainer_store import Store, StoredVersion, StoreServer  # isort: skip

CASE = CASES[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.make_bundle(tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    monkeypatch.setattr(sender_module, "RETRY_SECONDS", 0.02)
    made = StoreServer(Store())
    yield made
    made.close()


@pytest.fixture
def run(bundle: Path, server: StoreServer, ranks: Ranks) -> Iterator[Published]:
    """A policy whose start is version 1."""
    made = Published(bundle, CASE, server.address, ranks)
    made.publisher.submit(0)
    made.publisher.flush()
    yield made
    made.publisher.close()


def publish_step(run: Published, step: int) -> dict[str, np.ndarray]:
    """Take a step and publish it; returns the state."""
    run.step(step)
    run.publisher.submit(step)
    run.publisher.flush()
    return run.state()


def check_for_seconds(run: Published, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run.publisher.check()
        time.sleep(0.01)


def versions(server: StoreServer) -> list[StoredVersion]:
    return server.store.runs[CASE.name].versions


def steps(server: StoreServer) -> list[int]:
    return [version.header.step for version in versions(server)]


def bases(server: StoreServer) -> list[int]:
    return [version.header.base_version for version in versions(server)]


def assert_newest(server: StoreServer, state: dict[str, np.ndarray]) -> None:
    version = versions(server)[-1]
    assert version.tensors.keys() == state.keys()
    for name, found in version.tensors.items():
        np.testing.assert_array_equal(found, state[name], err_msg=name)


def test_training_goes_on_while_a_version_is_sent(run: Published, server: StoreServer) -> None:
    server.store.gate.clear()
    run.step(1)
    run.publisher.submit(1)
    state = run.state()
    run.step(2)  # changes the weights that are on their way
    assert run.publisher.version == 1
    server.store.gate.set()
    run.publisher.flush()
    assert run.publisher.version == 2
    assert_newest(server, state)


def test_a_newer_version_waits_for_the_one_before(run: Published, server: StoreServer) -> None:
    server.store.gate.clear()
    run.publisher.submit(1)
    threading.Timer(0.3, server.store.gate.set).start()
    start = time.monotonic()
    run.publisher.submit(2)
    assert time.monotonic() - start > 0.2
    run.publisher.flush()
    assert steps(server) == [0, 1, 2]


@pytest.mark.parametrize("fault", ["unavailable", "PART_CONFLICT"])
def test_a_part_that_was_not_taken_is_sent_again(
    run: Published, server: StoreServer, fault: str
) -> None:
    server.store.faults = [fault]
    publish_step(run, 1)
    assert_newest(server, publish_step(run, 2))
    assert bases(server) == [0, 1, 2]


def test_an_answer_that_was_lost_is_given_again(run: Published, server: StoreServer) -> None:
    server.store.faults = ["lost"]
    publish_step(run, 1)
    assert run.publisher.version == 2
    assert_newest(server, publish_step(run, 2))
    assert bases(server) == [0, 1, 2]


def test_a_store_without_the_base_is_sent_all_values(run: Published, server: StoreServer) -> None:
    server.store.faults = ["WRONG_BASE"]
    assert_newest(server, publish_step(run, 1))
    assert_newest(server, publish_step(run, 2))
    assert bases(server) == [0, 0, 2]


def test_the_base_is_what_was_committed_also_after_a_refusal(
    run: Published, server: StoreServer
) -> None:
    """A version that never came to be is no base, and its changes are in the next delta."""
    server.store.faults = ["OLD_EPOCH"]
    with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
        publish_step(run, 1)
    assert_newest(server, publish_step(run, 2))
    assert bases(server) == [0, 1]
    assert steps(server) == [0, 2]


def test_a_refusal_is_raised_on_the_main_thread(run: Published, server: StoreServer) -> None:
    server.store.faults = ["OLD_EPOCH"]
    run.publisher.submit(1)
    with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
        run.publisher.submit(2)


def test_a_refusal_is_seen_while_waiting_for_a_batch(run: Published, server: StoreServer) -> None:
    server.store.faults = ["OLD_EPOCH"]
    run.publisher.submit(1)
    with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
        check_for_seconds(run, 5)


def test_what_was_lost_is_published_again_whole(run: Published, server: StoreServer) -> None:
    run.step(1)
    run.publisher.submit(1)
    state = run.state()
    run.publisher.flush()
    server.store.forget(CASE.name)
    run.step(2)  # not submitted, not published
    run.publisher.publish_again()
    [version] = versions(server)
    assert version.header.step == 1
    assert version.header.probe.logprobs
    assert_newest(server, state)
    assert_newest(server, publish_step(run, 2))
    assert bases(server) == [0, 3]


def test_a_store_that_stays_away_ends_the_run(bundle: Path, ranks: Ranks) -> None:
    address = "127.0.0.1:9"
    run = Published(bundle, CASE, address, ranks, connect_timeout_seconds=0.3)
    run.publisher.submit(0)
    with pytest.raises(PeerUnreachableError, match=r"step 0 .* to 127.0.0.1:9 within 0 s"):
        run.publisher.flush()
    run.publisher.close()


def test_weights_go_to_the_store_that_is_set(
    bundle: Path, server: StoreServer, ranks: Ranks
) -> None:
    run = Published(bundle, CASE, "127.0.0.1:9", ranks, weights=server.address)
    run.publisher.submit(0)
    run.publisher.flush()
    run.publisher.close()
    assert steps(server) == [0]


def test_closing_ends_a_call_that_hangs(run: Published, server: StoreServer) -> None:
    server.store.gate.clear()
    run.publisher.submit(1)
    while server.store.num_calls < 2:
        time.sleep(0.01)
    start = time.monotonic()
    run.publisher.close()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("reason", ["BAD_DIGEST", "BAD_MANIFEST", "BAD_PAYLOAD"])
def test_a_part_that_was_damaged_is_sent_again_whole(
    run: Published, server: StoreServer, reason: str
) -> None:
    server.store.faults = [reason]
    assert_newest(server, publish_step(run, 1))
    assert bases(server) == [0, 0]


def test_a_part_that_stays_damaged_ends_the_run(run: Published, server: StoreServer) -> None:
    server.store.faults = ["BAD_DIGEST", "BAD_DIGEST"]
    with pytest.raises(UnderstudyError, match="BAD_DIGEST"):
        publish_step(run, 1)


def test_a_store_that_goes_away_now_and_then_is_waited_for(
    bundle: Path, server: StoreServer, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt runs for longer than the patience before it breaks."""
    monkeypatch.setattr(sender_module, "LONG_SECONDS", 0.1)
    run = Published(bundle, CASE, server.address, ranks, connect_timeout_seconds=0.2)
    server.store.faults = ["unavailable"] * 3
    server.store.seconds = 0.3
    publish_step(run, 0)
    run.publisher.close()
    assert server.store.num_calls == 4
