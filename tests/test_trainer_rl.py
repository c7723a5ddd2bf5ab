"""The RL stage as torchrun starts it, against a learner's services of a few lines."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from safetensors.numpy import load_file

from learner.intake.batches import Batch, statistics
from learner.trainer import intake_client
from learner.trainer.checkpoints import list_checkpoints, read_checkpoint
from learner.trainer.intake_client import IntakeClient
from learner.trainer.ranks import joined
from understudy.config import Config
from understudy.trajectory import Segment, Trajectory, VersionSpan, encode_trajectory
from understudy.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    common_pb2,
    trajectory_pb2,
    weight_pb2,
    weight_pb2_grpc,
)

from trainer_helpers import run_python, samples, tiny_bundle, torchrun  # isort: skip

NUM_STEPS, NUM_GROUPS, GROUP_SIZE, VOCAB_SIZE = 2, 4, 3, 300
EPOCH = 7


class Store(weight_pb2_grpc.WeightServiceServicer):
    """Commits a version when all parts are there; fails one call of step 1 on the way."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.versions: list[dict[str, np.ndarray]] = []
        self.headers: list[weight_pb2.PartHeader] = []
        self._parts: dict[int, tuple[weight_pb2.PartHeader, bytes]] = {}
        self._condition = threading.Condition()
        self._failures = 1

    def PublishWeights(
        self, requests: Iterator[weight_pb2.PublishWeightsRequest], context: grpc.ServicerContext
    ) -> weight_pb2.PublishWeightsResponse:
        header = next(requests).header
        chunks = [request.chunk for request in requests]
        assert all(0 < len(chunk) <= 2**20 for chunk in chunks)
        with self._condition:
            if header.step == 1 and self._failures:
                self._failures -= 1
                self._parts.clear()
                context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            goal = len(self.versions) + 1
            self._parts[header.part_index] = header, b"".join(chunks)
            if len(self._parts) == header.num_parts:
                self._commit(header.step)
            elif not self._condition.wait_for(lambda: len(self.versions) >= goal, timeout=2):
                self._parts.clear()
                context.abort(grpc.StatusCode.ABORTED, "discarded")
        return weight_pb2.PublishWeightsResponse(version=goal)

    def _commit(self, step: int) -> None:
        tensors: dict[str, np.ndarray] = {}
        covered: dict[str, np.ndarray] = {}
        for header, payload in self._parts.values():
            assert header.step == step
            for item in header.slices:
                raw, payload = payload[: item.num_bytes], payload[item.num_bytes :]
                assert hashlib.sha256(raw).digest() == item.digest
                assert item.dtype == "F32"
                tensor = tensors.setdefault(item.name, np.zeros(item.shape, "<f4"))
                count = covered.setdefault(item.name, np.zeros(tensor.size, int))
                here = slice(item.start, item.start + item.num_elements)
                tensor.reshape(-1)[here] = np.frombuffer(raw, "<f4")
                count[here] += 1
            assert payload == b""
        assert all((count == 1).all() for count in covered.values())
        self.headers.append(self._parts[0][0])
        self.versions.append(tensors)
        self.log.append(f"publish {step}")
        self._parts.clear()
        self._condition.notify_all()


class Batches(batch_pb2_grpc.BatchServiceServicer):
    """Gives each rank half of the same made-up batch; the last one is marked."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.metrics: list[dict[str, float]] = []
        self._has_lost_weights = True

    def StartTraining(
        self, request: batch_pb2.StartTrainingRequest, context: grpc.ServicerContext
    ) -> batch_pb2.StartTrainingResponse:
        self.log.append(f"start {request.step}")
        return batch_pb2.StartTrainingResponse(epoch=EPOCH)

    def NextBatch(
        self, request: batch_pb2.NextBatchRequest, context: grpc.ServicerContext
    ) -> Iterator[batch_pb2.NextBatchResponse]:
        assert request.epoch == EPOCH
        if request.rank == 0 and request.step == 1 and self._has_lost_weights:
            self._has_lost_weights = False
            raise_no_weights(context)
        if request.rank == 0:
            self.log.append(f"batch {request.step}")
        made = [trajectory_of(index) for index in range(NUM_GROUPS * GROUP_SIZE)]
        rewards = np.arange(NUM_GROUPS * GROUP_SIZE, dtype="<f4").reshape(NUM_GROUPS, GROUP_SIZE)
        header = batch_pb2.BatchHeader(
            step=request.step,
            groups=[
                batch_pb2.BatchGroup(ordinal=i, rewards=row.tobytes())
                for i, row in enumerate(rewards)
            ],
            num_trajectories=len(made),
            num_sampled_tokens=sum(trajectory.num_sampled_tokens for trajectory in made),
            head_version=request.step + 1,
            last=request.step + 1 == NUM_STEPS,
            ledger_digest=bytes([request.step]),
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


def raise_no_weights(context: grpc.ServicerContext) -> None:
    """What an intake answers that has just started."""
    info = error_details_pb2.ErrorInfo(reason="WEIGHTS_LOST", domain="understudy")
    status = status_pb2.Status(code=grpc.StatusCode.FAILED_PRECONDITION.value[0])
    status.details.add().Pack(info)
    context.abort_with_status(rpc_status.to_status(status))


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
        self.store, self.batches = Store(self.log), Batches(self.log)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        weight_pb2_grpc.add_WeightServiceServicer_to_server(self.store, self._server)
        batch_pb2_grpc.add_BatchServiceServicer_to_server(self.batches, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture(scope="module")
def learner() -> Iterator[Learner]:
    made = Learner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def run_path(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two ranks."""
    folder = tmp_path_factory.mktemp("rl")
    config = folder / "run.toml"
    config.write_text(
        f"""
        run = {{ name = "short", directory = "{folder}" }}
        model = {{ path = "{tiny_bundle(folder / "bundle")}", dtype = "float32" }}
        network = {{ learner = "{learner.address}" }}
        [learner]
        trainer_metrics_listen = "127.0.0.1:0"
        train = {{ tokens_per_microbatch = 128 }}
        """
    )
    torchrun(2, "-m", "learner.trainer.main", "--stage", "rl", "--config", str(config))
    return folder / "short"


def test_steps_go_publish_batch_publish_complete(run_path: Path, learner: Learner) -> None:
    assert learner.log == [
        *("start 0", "publish 0"),
        *("batch 0", "publish 1", "complete 0"),
        "publish 1",  # once more: the intake had started anew
        *("batch 1", "publish 2", "complete 1"),
        "checkpoint 2",
    ]


def test_the_saved_model_is_what_was_published_last(run_path: Path, learner: Learner) -> None:
    saved = load_file(run_path / "model" / "model.safetensors")
    published = learner.store.versions[-1]
    assert saved.keys() == published.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], published[name])
    assert any((saved[name] != learner.store.versions[0][name]).any() for name in saved)


def test_the_first_part_carries_a_probe_of_the_new_weights(
    run_path: Path, learner: Learner
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    probe = learner.store.headers[-1].probe
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
    batch = Batch(step=0, head_version=1, trained_version=1, last=False, groups=(), episodes=())
    assert not learner.batches.metrics[0].keys() & statistics(batch).keys()


def test_every_part_carries_the_epoch_that_the_intake_gave(
    run_path: Path, learner: Learner
) -> None:
    assert {header.epoch for header in learner.store.headers} == {EPOCH}


def test_the_checkpoint_knows_what_was_learned_from(run_path: Path, learner: Learner) -> None:
    [folder] = list_checkpoints(run_path / "checkpoints")
    manifest = read_checkpoint(folder).manifest
    assert manifest.step == NUM_STEPS
    assert manifest.state.ledger_digest == "01"
    assert manifest.state.trainer_epoch == EPOCH


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
        share = IntakeClient(channel, config, ranks).next_batch(3, lambda: None)
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
