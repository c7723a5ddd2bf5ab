"""Transfers past the weight store: their control plane alone, as NCCL needs GPUs."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from conftest import serving
from inference.receiver import Info, ReceivingEngine
from inference.reporter import Reporter
from inference.scripted import ScriptedEngine
from inference.server import make_engine
from inference.transfer_servicer import TransferServicer
from learner.trainer.direct import DirectPublisher
from learner.trainer.model import Policy
from learner.trainer.nccl import CheckpointSource
from learner.trainer.publish import make_publisher
from learner.trainer.ranks import Ranks, joined
from learner.trainer.replicas import Replicas
from learner.trainer.watchdog import Watchdog
from understudy.config import Config, load_config
from understudy.errors import ConfigError, UnderstudyError
from understudy.rpc import error_reason, open_channel
from understudy.v1 import transfer_pb2, transfer_pb2_grpc

from intake_rig import Rig, make_config, running  # isort: skip
from publishing import CASES, Case, Published, words  # isort: skip
from trainer_helpers import load, run_python  # isort: skip

CASE = CASES[0]
SECONDS = 1.0
Steps = list[tuple[str, Any]]


class Recorder(ScriptedEngine, ReceivingEngine):
    """Writes down what it is told, and hangs or fails where it is told to."""

    num_workers = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config.inference)
        self._vocab_size = 1000
        self.steps: Steps = []
        self.hangs_in = self.fails_in = ""

    async def _note(self, name: str, value: object = None) -> None:
        self.steps.append((name, value))
        if name == self.fails_in:
            raise RuntimeError("no such tensor")
        if name == self.hangs_in:
            await asyncio.Event().wait()

    async def init_transfer(self, info: Info) -> None:
        await self._note("init", info["rank_offset"])

    async def start_update(self) -> None:
        await self._note("start")

    async def receive_weights(self, info: Info) -> None:
        await self._note("receive", info)

    async def finish_update(self, version: int) -> float:
        await self._note("finish", version)
        self._version = version
        return 0.25

    def fail(self, cause: str) -> None:
        self.steps.append(("fail", cause))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.steps]


class ControlOnly:
    """The calls of vLLM's trainer engine, in its order, and no values: no NCCL runs here."""

    def __init__(self, policy: Policy, config: Config, ranks: Ranks, replicas: Replicas) -> None:
        self.replicas = replicas
        self.meta = CheckpointSource(policy, torch.float32).metadata()
        self.num_workers = replicas.wait_ready()
        replicas.init_weight_transfer_engine({"rank_offset": 1})

    def send_weights(self) -> None:
        self.replicas.start_weight_update()
        self.replicas.update_weights({"names": [meta.name for meta in self.meta]})
        self.replicas.finish_weight_update()


class Scene:
    """An intake, two replicas and a trainer of one rank."""

    def __init__(self, rig: Rig, config: Config, publisher: DirectPublisher) -> None:
        self.rig = rig
        self.config = config
        self.publisher = publisher
        self.engines: list[Recorder] = []

    async def submit(self, step: int) -> None:
        await asyncio.to_thread(self.publisher.submit, step)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Policy:
    return load(CASE.make_bundle(tmp_path_factory.mktemp("transfer")), ranks)


def direct(config: Config, **changes: Mapping[str, Any]) -> Config:
    """The config with NCCL for its transport."""
    raw = json.loads(config.model_dump_json())
    raw["learner"]["weights"] |= {"transport": "nccl", "transfer_seconds": SECONDS}
    for section, values in changes.items():
        raw[section] |= values
    return Config.model_validate(raw)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


@asynccontextmanager
async def replica(engine: Recorder, learner: grpc.aio.Channel) -> AsyncIterator[str]:
    servicer = TransferServicer(engine, SECONDS)
    servicer.started(Reporter(engine, learner, f"replica-{id(engine)}"))
    async with serving(servicer.service, role="inference") as address:
        yield address


@pytest.fixture
async def scene(tmp_path: Path, policy: Policy, ranks: Ranks) -> AsyncIterator[Scene]:
    config = direct(make_config(tmp_path))
    engines = [Recorder(config), Recorder(config)]
    async with running(config, version=False) as rig:
        learner = f"127.0.0.1:{rig.server._server.port}"
        async with (
            open_channel(learner, config.network) as channel,
            replica(engines[0], channel) as first,
            replica(engines[1], channel) as second,
        ):
            network = {"learner": learner, "inference": [first, second]}
            config = direct(config, network=network, model={"dtype": "float32"})
            barks: list[None] = []
            publisher = DirectPublisher(
                policy,
                await rig.train(),
                config,
                ranks,
                join=ControlOnly,
                watchdog=Watchdog(lambda: barks.append(None)),
            )
            made = Scene(rig, config, publisher)
            made.engines = engines
            try:
                yield made
            finally:
                publisher._watchdog.disarm()
                publisher.close()


async def test_all_replicas_take_every_step_in_order_and_serve_the_issued_version(
    scene: Scene,
) -> None:
    await scene.submit(0)
    await scene.submit(1)
    update = ["start", "receive", "finish"]
    for index, engine in enumerate(scene.engines):
        assert engine.names == ["init", *update, *update]
        assert engine.steps[0] == ("init", 1 + 2 * index)  # behind those of the replicas before
        assert [value for name, value in engine.steps if name == "finish"] == [1, 2]
    assert scene.rig.intake.state.steps_behind == [0, 1]
    assert scene.publisher.version == 2
    await until(lambda: scene.rig.server.versions.replicas.versions == [2, 2])


async def test_an_intake_without_a_copy_has_lost_nothing(scene: Scene) -> None:
    await scene.submit(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scene.rig.batch(0, timeout=0.3)
    assert error_reason(caught.value) == "DEADLINE_EXCEEDED"  # not WEIGHTS_LOST


async def test_a_replica_that_hangs_ends_the_publication_in_time(scene: Scene) -> None:
    await scene.submit(0)
    scene.engines[1].hangs_in = "receive"
    started = time.monotonic()
    with pytest.raises(UnderstudyError, match=r"UpdateWeights at .*TRANSFER_LATE.*more than 1 s"):
        await scene.submit(1)
    assert time.monotonic() - started < 2 * SECONDS + 2
    assert scene.engines[1].names[-1] == "fail"
    assert scene.publisher.version == 1


async def test_a_replica_that_fails_ends_itself_and_the_publication(scene: Scene) -> None:
    scene.engines[0].fails_in = "receive"
    with pytest.raises(UnderstudyError, match=r"TRANSFER_FAILED.*no such tensor"):
        await scene.submit(0)
    assert scene.engines[0].names[-1] == "fail"
    # The other one waits for its FinishUpdate, but not for ever.
    assert scene.engines[1].names[-1] == "receive"
    await asyncio.sleep(1.5 * SECONDS)
    assert scene.engines[1].names[-1] == "fail"


async def test_a_replica_whose_trainer_goes_away_in_a_step_ends(scene: Scene) -> None:
    scene.engines[0].hangs_in = "receive"
    submitted = asyncio.create_task(scene.submit(0))
    await until(lambda: scene.engines[0].names[-1:] == ["receive"])
    scene.publisher.close()
    with pytest.raises(UnderstudyError, match="UpdateWeights"):
        await submitted
    await until(lambda: scene.engines[0].names[-1] == "fail")
    assert "went away" in scene.engines[0].steps[-1][1]


async def test_the_trainer_notices_a_replica_that_left_the_group(scene: Scene) -> None:
    await scene.submit(0)
    await asyncio.to_thread(scene.publisher.check)
    address = scene.config.network.inference[0]
    async with open_channel(address, scene.config.network) as channel:
        other = transfer_pb2.InitTransferRequest(epoch=9, info=b'{"rank_offset": 1}')
        await transfer_pb2_grpc.TransferServiceStub(channel).InitTransfer(other, timeout=5)
    with pytest.raises(UnderstudyError, match=f"{address} has left the group"):
        await asyncio.to_thread(scene.publisher.check)


async def test_steps_out_of_order_and_old_trainers_change_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    engine = Recorder(config)
    learner = open_channel("127.0.0.1:9", config.network)
    async with replica(engine, learner) as address:
        async with open_channel(address, config.network) as channel:
            stub = transfer_pb2_grpc.TransferServiceStub(channel)

            async def reason(name: str, **fields: Any) -> str:
                request = getattr(transfer_pb2, f"{name}Request")(**fields)
                try:
                    await getattr(stub, name)(request, timeout=5)
                except grpc.aio.AioRpcError as error:
                    return error_reason(error)
                return ""

            assert await reason("StartUpdate", epoch=4) == "OUT_OF_ORDER"
            assert await reason("InitTransfer", epoch=4, info=b"[]") == "BAD_INFO"
            assert engine.names == []
            assert await reason("InitTransfer", epoch=4, info=b'{"rank_offset": 1}') == ""
            assert await reason("InitTransfer", epoch=3, info=b"{}") == "OLD_EPOCH"
            assert await reason("StartUpdate", epoch=3) == "OLD_EPOCH"
            assert await reason("StartUpdate", epoch=4) == ""
            assert await reason("DescribeReceiver") == "STARTING"
            assert await reason("FinishUpdate", epoch=4, version=1) == "OUT_OF_ORDER"
            assert await reason("UpdateWeights", epoch=4, info=b"{}") == ""
            assert await reason("FinishUpdate", epoch=4, version=0) == "OLD_VERSION"
            assert await reason("FinishUpdate", epoch=4, version=1) == ""
            assert engine.names == ["init", "start", "receive", "finish"]
    await learner.close()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.model_type.startswith("qwen3")], ids=lambda case: case.name
)
def test_metadata_and_values_are_those_of_the_checkpoint(
    case: Case, tmp_path: Path, ranks: Ranks
) -> None:
    run = Published(case.make_bundle(tmp_path), case, "127.0.0.1:9", ranks)
    dtype = getattr(torch, case.dtype)
    source = CheckpointSource(run.policy, dtype)
    state, sent = run.state(), dict(source)
    described = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    assert described == [(name, dtype, value.shape) for name, value in state.items()]
    assert list(sent) == [name for name, *_ in described]
    assert all((words(sent[name]) == state[name]).all() for name in state)
    run.publisher.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[network]\nweights = '127.0.0.1:7010'", "network.weights is set"),
        ("[network]\ninference = []", "network.inference is empty"),
        ("[inference]\nengine = 'scripted'", "inference.engine = 'scripted' cannot receive"),
        ("[inference.weights]\nupstream = '127.0.0.1:7101'", "inference.weights.upstream is set"),
    ],
)
def test_a_transport_that_cannot_work_is_refused_by_name(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[model]\npath = 'm'\n{text}\n[learner.weights]\ntransport = 'nccl'")
    with pytest.raises(ConfigError, match="learner.weights.transport = 'nccl': " + said):
        load_config(path)


def test_ipc_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\npath = 'm'\n[learner.weights]\ntransport = 'ipc'")
    with pytest.raises(ConfigError, match="learner.weights.transport: 'ipc' is left out, as vLLM"):
        load_config(path)


def test_without_a_gpu_the_trainer_says_so(policy: Policy, ranks: Ranks, tmp_path: Path) -> None:
    config = direct(make_config(tmp_path))
    assert isinstance(make_engine(config), ReceivingEngine)
    publisher = make_publisher(policy, 1, config, ranks)
    with pytest.raises(ConfigError, match="the trainer has no GPU"):
        publisher.submit(0)
    publisher.close()


def test_the_watchdog_ends_a_process_that_hangs() -> None:
    code = (
        "import time; from learner.trainer.watchdog import Watchdog\n"
        "dog = Watchdog(); dog.arm('UpdateWeights', 60.0); dog.arm('UpdateWeights', 0.2)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "UpdateWeights took more than 0.2 s" in done.stderr
    assert time.monotonic() - started < 30
