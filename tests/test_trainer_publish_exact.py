"""What the store makes of parts is the trainer's state, bit for bit. This file is also the program
of two gloo ranks, started by torchrun: of two shares of the data, or of one tensor group.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from learner.trainer.main import leave
from learner.trainer.model_folder import save_model
from learner.trainer.ranks import Ranks, joined
from understudy.v1 import weight_pb2

from publishing import CASES, Case, Published, words  # isort: skip
from trainer_helpers import torchrun  # isort: skip
from trainer_store import Store, StoredRun, StoreServer  # isort: skip

NUM_STEPS = 10


def publish_steps(folder: Path, case: Case, address: str, ranks: Ranks) -> None:
    """Publish the start and each of some steps; leaves every state, and the model, in `folder`."""
    bundle = folder.parent / "bundles" / case.name
    run = Published(bundle, case, address, ranks)
    for step in range(NUM_STEPS + 1):
        if step:
            run.step(step)
        run.publisher.submit(step)
        state = run.state()
        if ranks.rank == 0:
            np.savez(folder / f"{case.name}-{step}.npz", **state)
    run.publisher.flush()
    assert run.publisher.version == NUM_STEPS + 1
    assert_no_gather(run)
    run.publisher.close()
    save_model(run.policy, bundle, folder / case.name, case.dtype, ranks)


def assert_no_gather(run: Published) -> None:
    """Publishing issues no more collectives than the probe by itself.

    But that a tensor group exchanges columns for rows: on CPUs, where gloo has no all-to-all, by as
    many gathers within the group.
    """
    with CommDebugMode() as by_probe:
        run.publisher._probe.take(run.policy, run.ranks)
    with CommDebugMode() as by_publishing:
        run.publisher.submit(NUM_STEPS)
        run.publisher.flush()
    num_cut = sum(by_columns(p) for _, p in run.policy.checkpoint_parameters())
    assert (num_cut > 0) == (run.ranks.tensor_size > 1)
    expected = dict(by_probe.get_comm_counts())
    if num_cut:
        gather = torch.ops.c10d_functional.all_gather_into_tensor
        expected[gather] = expected.get(gather, 0) + num_cut
    assert by_publishing.get_comm_counts() == expected
    assert run.ranks.world_size == 1 or by_probe.get_total_counts() > 0


def by_columns(parameter: torch.Tensor) -> bool:
    """Whether tensor ranks have columns of it."""
    assert isinstance(parameter, DTensor)
    return len(parameter.placements) > 1 and not parameter.placements[1].is_shard(0)


@pytest.fixture(
    scope="module", params=["1x1", "2x1", "1x2"], ids=["one_rank", "two_ranks", "tensor_group"]
)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, StoreServer]]:
    """Folder with what each case's states were, and the store that they were published to."""
    root = tmp_path_factory.mktemp("publish")
    folder = root / "states"
    folder.mkdir()
    for case in CASES:
        case.make_bundle(root / "bundles")
    server = StoreServer(Store())
    data, tensor = map(int, request.param.split("x"))
    torchrun(data * tensor, __file__, str(folder), server.address, str(tensor))
    yield folder, server
    server.close()


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_every_version_is_the_trainers_state(
    published: tuple[Path, StoreServer], case: Case
) -> None:
    folder, server = published
    versions = server.store.runs[case.name].versions
    assert len(versions) == NUM_STEPS + 1
    for step, version in enumerate(versions):
        expected = np.load(folder / f"{case.name}-{step}.npz")
        assert version.tensors.keys() == set(expected.files)
        for name, found in version.tensors.items():
            np.testing.assert_array_equal(found, expected[name], err_msg=f"{name} of step {step}")


def test_only_the_first_version_is_a_full_copy(
    published: tuple[Path, StoreServer], case: Case
) -> None:
    versions = published[1].store.runs[case.name].versions
    bases = [{header.base_version for header, _ in v.parts.values()} for v in versions]
    assert bases == [{version} for version in range(NUM_STEPS + 1)]
    assert all(version.num_bytes < versions[0].num_bytes for version in versions[1:])


def test_only_the_first_part_has_a_probe(published: tuple[Path, StoreServer], case: Case) -> None:
    for version in published[1].store.runs[case.name].versions:
        for index, (header, _) in version.parts.items():
            assert header.HasField("probe") == (index == 0)


def test_the_saved_model_loads_as_what_was_published(
    published: tuple[Path, StoreServer], case: Case, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, server = published
    model = AutoModelForCausalLM.from_pretrained(
        folder / case.name, dtype=getattr(torch, case.dtype)
    )
    model.save_pretrained(tmp_path / "again")
    saved = load_file(folder / case.name / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    newest = server.store.runs[case.name].versions[-1].tensors
    assert newest.keys() == saved.keys() == again.keys()
    for name, found in newest.items():
        np.testing.assert_array_equal(found, words(saved[name]), err_msg=name)
        np.testing.assert_array_equal(found, words(again[name]), err_msg=name)


def test_another_number_of_ranks_begins_with_a_full_copy(
    published: tuple[Path, StoreServer], case: Case
) -> None:
    folder, server = published
    store = Store()
    versions = list(server.store.runs[case.name].versions)
    store.runs[case.name] = StoredRun(versions=versions, num_issued=len(versions))
    second = StoreServer(store)
    with joined() as ranks:
        run = Published(folder / case.name, case, second.address, ranks, epoch=2)
        run.publisher.submit(NUM_STEPS)
        run.step(NUM_STEPS)
        run.publisher.submit(NUM_STEPS + 1)
        run.publisher.flush()
        state = run.state()
        run.publisher.close()
    second.close()
    before, full, delta = store.runs[case.name].versions[-3:]
    assert [v.header.base_version for v in (full, delta)] == [0, NUM_STEPS + 2]
    assert {piece.encoding for piece in full.header.slices} == {weight_pb2.TENSOR_ENCODING_DENSE}
    for name, found in full.tensors.items():
        np.testing.assert_array_equal(found, before.tensors[name], err_msg=name)
        np.testing.assert_array_equal(delta.tensors[name], state[name], err_msg=name)


if __name__ == "__main__":
    torch.manual_seed(0)
    with joined(int(sys.argv[3])) as these_ranks:
        for each in CASES:
            publish_steps(Path(sys.argv[1]), each, sys.argv[2], these_ranks)
    leave(0)
