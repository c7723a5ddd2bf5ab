"""The RL stage as torchrun starts it, against a learner's services of a few lines."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from learner.intake.batches import Batch, statistics
from learner.trainer import intake_client
from learner.trainer.checkpoints import list_checkpoints, read_checkpoint
from learner.trainer.intake_client import IntakeClient
from learner.trainer.ranks import joined
from learner.trainer.reinforce import train_reinforce
from learner.trainer.update import UntrainableBatchError
from understudy.config import Config
from understudy.errors import UnderstudyError
from understudy.trajectory import Segment, Trajectory, VersionSpan, encode_trajectory
from understudy.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    common_pb2,
    trajectory_pb2,
    weight_pb2_grpc,
)

from trainer_helpers import run_python, samples, tiny_bundle, torchrun  # isort: skip
from trainer_store import Store, StoredVersion, refuse  # isort: skip

NUM_STEPS, NUM_GROUPS, GROUP_SIZE, VOCAB_SIZE = 2, 4, 3, 300
EPOCH = 7
RUN = "short"


class Batches(batch_pb2_grpc.BatchServiceServicer):
    """Gives each rank half of the same made-up batch; the last one is marked."""

    def __init__(self, log: list[str], store: Store) -> None:
        self.log = log
        self._store = store
        self.metrics: list[dict[str, float]] = []
        self.asked: list[tuple[int, int, int]] = []
        """Step, rank and number of ranks of each request that was answered."""
        self.loses_weights = True
        self.reward = 1.0
        """Factor of all rewards."""
        self.num_steps = NUM_STEPS
        self.num_left = 99
        """Batches that are still given; who asks for more is refused for good."""

    def StartTraining(
        self, request: batch_pb2.StartTrainingRequest, context: grpc.ServicerContext
    ) -> batch_pb2.StartTrainingResponse:
        self.log.append(f"start {request.step}")
        return batch_pb2.StartTrainingResponse(epoch=EPOCH)

    def NextBatch(
        self, request: batch_pb2.NextBatchRequest, context: grpc.ServicerContext
    ) -> Iterator[batch_pb2.NextBatchResponse]:
        assert request.epoch == EPOCH
        if not self.num_left:
            refuse(context, "OUT_OF_ORDER")
        self.num_left -= request.rank == 0
        if request.rank == 0 and request.step == 1 and self.loses_weights:
            self.loses_weights = False
            self.log.append("lost")
            self._store.forget(RUN)
            refuse(context, "WEIGHTS_LOST")
        if request.rank == 0:
            self.log.append(f"batch {request.step}")
        self.asked.append((request.step, request.rank, request.world_size))
        made = [trajectory_of(index) for index in range(NUM_GROUPS * GROUP_SIZE)]
        rewards = np.arange(NUM_GROUPS * GROUP_SIZE, dtype="<f4").reshape(NUM_GROUPS, GROUP_SIZE)
        header = batch_pb2.BatchHeader(
            step=request.step,
            groups=[
                batch_pb2.BatchGroup(ordinal=i, rewards=(row * self.reward).tobytes())
                for i, row in enumerate(rewards)
            ],
            num_trajectories=len(made),
            num_sampled_tokens=sum(trajectory.num_sampled_tokens for trajectory in made),
            head_version=request.step + 1,
            last=request.step + 1 == self.num_steps,
            ledger_digest=bytes([request.step]),
            steps_behind={1: 0},
        )
        yield batch_pb2.NextBatchResponse(header=header)
        for index in range(request.rank, len(made), request.world_size):
            group, member = divmod(index, GROUP_SIZE)
            payload = encode_trajectory(made[index])
            record = trajectory_pb2.TrajectoryRecord(
                encoding=common_pb2.ENCODING_ZSTD,
                payload=payload,
                payload_digest=hashlib.sha256(payload).digest(),
            )
            yield batch_pb2.NextBatchResponse(
                trajectory=batch_pb2.BatchTrajectory(
                    group_index=group, reward_index=member, record=record
                )
            )

    def CompleteStep(
        self, request: batch_pb2.CompleteStepRequest, context: grpc.ServicerContext
    ) -> batch_pb2.CompleteStepResponse:
        self.log.append(f"complete {request.step}")
        self.metrics.append(dict(request.metrics))
        return batch_pb2.CompleteStepResponse()

    def RecordCheckpoint(
        self, request: batch_pb2.RecordCheckpointRequest, context: grpc.ServicerContext
    ) -> batch_pb2.RecordCheckpointResponse:
        self.log.append(f"checkpoint {request.step}")
        assert len(request.manifest_digest) == 32
        return batch_pb2.RecordCheckpointResponse()


def trajectory_of(index: int) -> Trajectory:
    """An episode of one segment, sampled under version 1."""
    sample = samples(index + 1, VOCAB_SIZE)[index]
    spans = (VersionSpan(version=1, start=0, end=sample.num_targets),)
    segment = Segment(
        token_ids=sample.token_ids,
        loss_mask=sample.loss_mask,
        logprobs=sample.behaviour_logprobs,
        version_spans=spans,
    )
    return Trajectory(
        suite="made-up",
        split="train",
        task_ordinal=index // GROUP_SIZE,
        task_id=f"task-{index}",
        level=1,
        outcome=trajectory_pb2.OUTCOME_COMPLETED,
        detail="",
        segments=(segment,),
        turns=(),
        reward=float(index),
        temperature=1.0,
        duration_seconds=1.0,
    )


class Learner:
    """Both services on a port of their own, with a log of what was asked in which order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.store = Store(lambda step: self.log.append(f"publish {step}"))
        self.store.faults = ["", "", "unavailable"]  # a part of step 1
        self.batches = Batches(self.log, self.store)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        weight_pb2_grpc.add_WeightServiceServicer_to_server(self.store, self._server)
        batch_pb2_grpc.add_BatchServiceServicer_to_server(self.batches, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @property
    def versions(self) -> list[StoredVersion]:
        return self.store.runs[RUN].versions

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture(scope="module")
def learner() -> Iterator[Learner]:
    made = Learner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def run_path(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two ranks, each with its share of the batches."""
    return run(learner, tmp_path_factory.mktemp("rl"))


def run(learner: Learner, folder: Path, tensor_parallel: int = 1) -> Path:
    config = folder / "run.toml"
    config.write_text(
        f"""
        run = {{ name = "{RUN}", directory = "{folder}" }}
        model = {{ path = "{tiny_bundle(folder / "bundle")}", dtype = "float32" }}
        network = {{ learner = "{learner.address}" }}
        [learner]
        trainer_metrics_listen = "127.0.0.1:0"
        ranks = 2
        train = {{ tokens_per_microbatch = 128, tensor_parallel = {tensor_parallel} }}
        """
    )
    torchrun(2, "-m", "learner.trainer.main", "--stage", "rl", "--config", str(config))
    return folder / RUN


def test_steps_go_batch_complete_with_publishing_beside_them(
    run_path: Path, learner: Learner
) -> None:
    """Nothing is asked for before the start is published, and the end is when all is."""
    log = learner.log
    assert [line for line in log if "publish" not in line] == [
        *("start 0", "batch 0", "complete 0", "lost", "batch 1", "complete 1", "checkpoint 2")
    ]
    assert log[:3] == ["start 0", "publish 0", "batch 0"]
    assert "publish 1" in log[log.index("lost") : log.index("batch 1")]
    assert log.index("publish 2") < log.index("complete 1")


def test_the_saved_model_is_what_was_published_last(run_path: Path, learner: Learner) -> None:
    saved = load_file(run_path / "model" / "model.safetensors")
    first, published = (learner.versions[index].tensors for index in (0, -1))
    assert saved.keys() == published.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name].view("<u4"), published[name])
    assert any((published[name] != first[name]).any() for name in saved)


def test_a_tensor_group_learns_from_one_share_what_two_ranks_do_from_theirs(
    run_path: Path, learner: Learner, tmp_path: Path
) -> None:
    group = Learner()
    saved = load_file(run(group, tmp_path, tensor_parallel=2) / "model" / "model.safetensors")
    group.close()
    assert sorted(group.batches.asked) == [(0, 0, 1)] * 2 + [(1, 0, 1)] * 2
    assert sorted(learner.batches.asked) == [(s, rank, 2) for s in (0, 1) for rank in (0, 1)]
    for name in ("trained_tokens", "loss", "grad_norm", "effective_sample_size"):
        theirs, ours = (
            [figures[name] for figures in one.batches.metrics] for one in (learner, group)
        )
        assert ours == pytest.approx(theirs, rel=1e-4), name
    assert {len(version.parts) for version in group.versions} == {2}
    expected = load_file(run_path / "model" / "model.safetensors")
    for name, tensor in group.versions[-1].tensors.items():
        np.testing.assert_array_equal(saved[name].view("<u4"), tensor)
        np.testing.assert_allclose(saved[name], expected[name], rtol=1e-3, atol=1e-6)


def test_the_first_part_carries_a_probe_of_the_new_weights(
    run_path: Path, learner: Learner
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    probe = learner.versions[-1].header.probe
    tokens = torch.tensor(np.frombuffer(probe.token_ids, "<i4").astype("i8"))
    np.testing.assert_array_equal(tokens, trajectory_of(0).segments[0].token_ids)
    model = AutoModelForCausalLM.from_pretrained(run_path / "model", dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    np.testing.assert_allclose(np.frombuffer(probe.logprobs, "<f4"), expected, atol=1e-4)


def test_completed_steps_tell_what_was_measured(run_path: Path, learner: Learner) -> None:
    first, second = learner.batches.metrics
    assert first["token_staleness_mean"] == 0
    assert second["token_staleness_mean"] == 1
    assert "logprob_difference_mean" in first
    assert "logprob_difference_mean" not in second
    assert 0 < second["effective_sample_size"] < 1
    for phase in ("wait", "decode", "forward_backward", "optimizer", "publish"):
        assert first[f"seconds_{phase}"] > 0


def test_what_is_measured_has_names_of_its_own(run_path: Path, learner: Learner) -> None:
    """The intake writes its own figures of the batch to the same line of metrics.jsonl."""
    batch = Batch(
        step=0,
        head_version=1,
        trained_version=1,
        last=False,
        keeps_uniform=False,
        groups=(),
        episodes=(),
    )
    assert not learner.batches.metrics[0].keys() & statistics(batch).keys()


def test_every_part_carries_the_epoch_that_the_intake_gave(
    run_path: Path, learner: Learner
) -> None:
    headers = [header for v in learner.versions for header, _ in v.parts.values()]
    assert {header.epoch for header in headers} == {EPOCH}


def test_the_checkpoint_knows_what_was_learned_from(run_path: Path, learner: Learner) -> None:
    [folder] = list_checkpoints(run_path / "checkpoints")
    manifest = read_checkpoint(folder).manifest
    assert manifest.step == NUM_STEPS
    assert manifest.state.ledger_digest == "01"
    assert manifest.state.trainer_epoch == EPOCH


def test_updates_that_were_skipped_before_a_crash_count(tmp_path: Path) -> None:
    """No life of the trainer is long enough to skip three updates, the checkpoint's among them."""
    learner = Learner()
    batches = learner.batches
    batches.loses_weights = False
    batches.reward, batches.num_steps, batches.num_left = float("nan"), 9, 2
    config = Config.model_validate(
        {
            "run": {"name": RUN, "directory": tmp_path},
            "model": {"path": tiny_bundle(tmp_path / "bundle"), "dtype": "float32"},
            "network": {"learner": learner.address},
            "learner": {
                "trainer_metrics_listen": "127.0.0.1:0",
                "checkpoint_every_steps": 1,
                "train": {"max_skipped_updates": 3},
            },
        }
    )
    with joined() as ranks:
        with pytest.raises(UnderstudyError, match="OUT_OF_ORDER"):
            train_reinforce(config, ranks)
        batches.num_left = 2
        with pytest.raises(UntrainableBatchError, match="3 updates in a row were skipped"):
            train_reinforce(config, ranks)
    learner.close()
    assert [m["skipped_updates"] for m in batches.metrics] == [1, 1, 1]
    assert [line for line in learner.log if "start" in line] == ["start 0", "start 1"]
    assert (config.run.path / "untrainable" / "step-00000002-rank-0.pb").exists()


def test_a_batch_is_asked_for_again_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Slow(batch_pb2_grpc.BatchServiceServicer):
        def NextBatch(
            self, request: batch_pb2.NextBatchRequest, context: grpc.ServicerContext
        ) -> Iterator[batch_pb2.NextBatchResponse]:
            asked.append(request.step)
            if len(asked) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
            if len(asked) == 2:
                threading.Event().wait(0.5)
            yield batch_pb2.NextBatchResponse(header=batch_pb2.BatchHeader(step=request.step))

    config = Config.model_validate({"model": {"path": "unused"}})
    monkeypatch.setattr(intake_client, "ASK_SECONDS", 0.2)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    batch_pb2_grpc.add_BatchServiceServicer_to_server(Slow(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, joined() as ranks:
        share = IntakeClient(channel, config, ranks).next_batch(
            3, publish_again=lambda: None, check=lambda: None
        )
    server.stop(None)
    assert share.header.step == 3
    assert asked == [3, 3, 3]


def test_an_intake_that_is_not_there_ends_the_trainer_with_one_line(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
        run = {{ directory = "{tmp_path}" }}
        model = {{ path = "{tiny_bundle(tmp_path / "bundle")}", dtype = "float32" }}
        network = {{ learner = "127.0.0.1:9", connect_timeout_seconds = 0.3 }}
        learner = {{ trainer_metrics_listen = "127.0.0.1:0" }}
        """
    )
    done = run_python("-m", "learner.trainer.main", "--stage", "rl", "--config", str(config))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if '"level": "error"' in line]
    assert "the intake at 127.0.0.1:9 did not answer within 0 s" in line
    assert "Traceback" not in done.stderr
