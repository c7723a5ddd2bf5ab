"""Patches of single values, applied by vLLM's own function to a model of plain modules."""

import errno
import mmap
import os
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from inference.patch import Patch, make_patch
from inference.plugin import _map, patch_model
from inference_helpers import fill_shadow, nudge

TENSORS = {
    "norm": np.arange(1, 65, dtype=np.float32),
    "head": np.arange(1, 4097, dtype=np.float32).reshape(64, 64),
}


class Model(torch.nn.Module):
    """Loads weights by name, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {name: torch.from_numpy(value.copy()) for name, value in TENSORS.items()}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return {name for name, value in weights if self.values[name].copy_(value) is not None}


def patched(patch: Patch) -> Model:
    model, mapped = Model(), _map(patch.path)
    assert isinstance(mapped, mmap.mmap)
    patch_model(model, mapped, patch.tensors, torch.device("cpu"))
    return model


def test_patch_leads_from_one_shadow_to_the_other() -> None:
    changed = {name: value.copy() for name, value in TENSORS.items()}
    changed["head"][3, 5:9] = 0.0
    changed["head"][63, 63] = -1.0
    changed["norm"][0] = -0.0
    patch = make_patch(fill_shadow(TENSORS), fill_shadow(changed))
    assert patch is not None
    assert [(tensor.name, tensor.num_changed) for tensor in patch.tensors] == [
        ("norm", 1), ("head", 5),
    ]  # fmt: skip
    for name, value in patched(patch).values.items():
        np.testing.assert_array_equal(value.numpy().view("<u4"), changed[name].view("<u4"))
    patch.close()


def test_tensors_without_changes_are_not_in_the_patch() -> None:
    patch = make_patch(fill_shadow(TENSORS), fill_shadow(TENSORS))
    assert patch is not None
    assert patch.tensors == []
    patch.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_where_too_much_changed_there_is_no_patch(seed: int) -> None:
    assert make_patch(fill_shadow(TENSORS), fill_shadow(nudge(TENSORS, seed))) is None


def test_a_patch_for_which_there_is_no_memory_is_none_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = fill_shadow(TENSORS), fill_shadow({**TENSORS, "norm": -TENSORS["norm"]})
    before = os.listdir("/proc/self/fd")

    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    assert make_patch(old, new) is None
    assert os.listdir("/proc/self/fd") == before
