"""The saved model: whole under its name at any time, and together with its adapters."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.trainer import model_folder
from learner.trainer.model import Policy, load_policy
from learner.trainer.model_folder import save_model
from learner.trainer.ranks import Ranks, joined
from understudy import files

from trainer_helpers import config_of, tiny_bundle  # isort: skip

LAYER = "model.layers.0.self_attn.q_proj"
RANK, ALPHA = 2, 6


class Saving:
    """A policy whose adapters change from save to save."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.bundle, self.out = tiny_bundle(folder / "bundle"), folder / "model"
        lora = {"rank": RANK, "alpha": ALPHA, "target_modules": ["q_proj"]}
        self.policy: Policy = load_policy(config_of(self.bundle, lora=lora), ranks)
        self._ranks = ranks

    @torch.no_grad()
    def save(self, value: float) -> None:
        for _, parameter in self.policy.trained_parameters():
            parameter.to_local().fill_(value)
        save_model(self.policy, self.bundle, self.out, "float32", self._ranks)

    def read(self) -> float:
        """The value that a reader finds, in the model and in the adapters."""
        assert json.loads((self.out / "config.json").read_text())["model_type"] == "qwen3"
        model = load_file(self.out / "model.safetensors")
        adapter = load_file(self.out / "adapter" / "adapter_model.safetensors")
        low, high = (adapter[f"base_model.model.{LAYER}.lora_{half}.weight"] for half in "AB")
        before = load_file(self.bundle / "model.safetensors")[f"{LAYER}.weight"]
        torch.testing.assert_close(
            model[f"{LAYER}.weight"], before + ALPHA / RANK * high @ low, rtol=0, atol=1e-5
        )
        return float(low[0, 0])


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saving]:
    with joined() as ranks:
        yield Saving(tmp_path_factory.mktemp("saving"), ranks)


class DiedError(Exception):
    """The process ends here."""


@pytest.fixture(params=["exchanged", "renamed"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange names."""
    if request.param == "renamed":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param == "exchanged"


def test_whenever_a_save_dies_model_and_adapters_belong_together(
    saving: Saving, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = files.sync, [-1]

    def dying(path: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise DiedError
        sync(path)

    monkeypatch.setattr(files, "sync", dying)
    monkeypatch.setattr(model_folder, "sync", dying)
    saving.save(0.25)
    old, found = 0.25, set()
    for place in range(1, 100):
        left[0], new = place, 0.25 + place / 64
        try:
            saving.save(new)
        except DiedError:
            value = saving.read()
            assert value in (old, new)
            found.add(value == new)
            old = value
        else:
            break
    assert saving.read() == new
    assert place > 5  # of the model's files, the adapter's, and their folders
    assert found == {False, True}  # deaths before the change of names, and after it
    assert [path.name for path in saving.out.parent.glob("model*")] == ["model"]


def test_a_reader_never_finds_a_folder_missing(tmp_path: Path) -> None:
    """Names are exchanged where the file system can, which those of tests do."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    assert files._exchange(one, other)
    assert (one / "other").exists()
    assert (other / "one").exists()
    with pytest.raises(FileNotFoundError, match="three"):
        files._exchange(tmp_path / "three", other)
