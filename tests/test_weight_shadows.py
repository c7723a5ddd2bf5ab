"""What a replica does for a version, and what it need not do: for bytes that nothing wrote to."""

from pathlib import Path

import numpy as np
import pytest

from inference.fetch import Fetcher, HeldVersion
from inference.weights import Shadow
from understudy.v1 import weight_pb2
from understudy.weights import manifest as manifest_module
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ByteArray
from understudy.weights.manifest import check_slices, digest_of
from understudy.weights.transfer import LinkWriter, check_written, copy_values

from intake_rig import Rig, make_config, make_part, running  # isort: skip
from weight_store_helpers import moved, tensors_of  # isort: skip

MODEL, ADAPTER = "model.layers.0.weight", "base_model.model.model.layers.0.lora_A.weight"
WEIGHTS = {
    MODEL: np.random.default_rng(0).normal(size=(256, 64)).astype("f4"),
    ADAPTER: np.random.default_rng(1).normal(size=(4, 64)).astype("f4"),
}
LAYOUT = check_slices(make_part(WEIGHTS)[0].slices, None, based=False)


def learned(tensors: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The adapter moved, the model did not."""
    return {**tensors, ADAPTER: moved(tensors, seed)[ADAPTER]}


class Replica:
    """Follows a store; the version before is what the engine has."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._fetcher = Fetcher(rig.weights)
        self.num_bytes = 0
        """Digested by the last fetch."""

    def digest(self, values: ByteArray) -> bytes:
        self.num_bytes += len(values)
        return digest_of(values)

    async def fetch(self) -> HeldVersion:
        served = self._fetcher.held
        self.num_bytes = 0
        version = await self._fetcher.fetch(served and served.shadow)
        assert version is not None
        self._fetcher.hold(version)
        return version


async def test_the_model_beside_adapters_is_checked_once_in_each_shadow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = (WEIGHTS[name].nbytes for name in (MODEL, ADAPTER))
    async with running(make_config(tmp_path), version=False) as rig:
        replica, tensors = Replica(rig), WEIGHTS
        await rig.publish_part(*make_part(tensors, epoch=rig.epoch))
        monkeypatch.setattr(manifest_module, "digest_of", replica.digest)
        shadows, checked = [], []
        for version in range(1, 7):
            held = await replica.fetch()
            checked.append(replica.num_bytes)
            shadows.append(held.shadow)
            found = {entry.name: data.tobytes() for entry, data in held.shadow}
            assert found == tensors_of(tensors)
            before, tensors = tensors, learned(tensors, version)
            part = make_part(tensors, version, epoch=rig.epoch, base=before, base_version=version)
            await rig.publish_part(*part)
    assert len(set(map(id, shadows))) == 2  # which take turns
    assert checked == [model + adapter, model + adapter, *[adapter] * 4]


def link(
    tensors: dict[str, np.ndarray], base: dict[str, np.ndarray] | None = None
) -> tuple[weight_pb2.WeightManifest, bytes]:
    header, payload = make_part(tensors, base=base)
    return weight_pb2.WeightManifest(slices=header.slices, payload_bytes=len(payload)), payload


def filled(tensors: dict[str, np.ndarray]) -> Shadow:
    """A shadow that was checked."""
    shadow = Shadow(LAYOUT)
    manifest, payload = link(tensors)
    LinkWriter(manifest, shadow).write([payload])
    check_written(manifest.slices, shadow)
    return shadow


def test_a_shadow_that_was_left_half_written_is_filled_again() -> None:
    """A transfer may end anywhere in a tensor; what it touched is not known any more."""
    served, spare, after = filled(WEIGHTS), filled(WEIGHTS), learned(WEIGHTS, 1)
    manifest, payload = link({name: -tensor for name, tensor in WEIGHTS.items()})
    LinkWriter(manifest, spare).write([payload[:1000]])
    copy_values(served, spare)
    manifest, payload = link(after, WEIGHTS)
    LinkWriter(manifest, spare).write([payload])
    check_written(manifest.slices, spare)
    assert {entry.name: data.tobytes() for entry, data in spare} == tensors_of(after)


def test_a_tensor_that_is_said_to_be_unchanged_has_to_be_what_it_is_said_to_be() -> None:
    """Its digest is another: of other values than those that are there."""
    shadow = filled(WEIGHTS)
    manifest, payload = link(learned(WEIGHTS, 1), WEIGHTS)
    [model] = [piece for piece in manifest.slices if piece.name == MODEL]
    assert model.num_changed == 0
    model.digest = digest_of(np.zeros(4, np.uint8))
    LinkWriter(manifest, shadow).write([payload])
    with pytest.raises(WeightsRefusedError, match=f"{MODEL}: values from 0 on are not those"):
        check_written(manifest.slices, shadow)


def test_what_was_checked_in_other_slices_is_checked_again() -> None:
    shadow = filled(WEIGHTS)
    halves = [make_part(WEIGHTS, rows=rows)[0] for rows in (slice(2), slice(2, None))]
    slices = [piece for half in halves for piece in half.slices]
    check_written(slices, shadow)
    shadow.tensor_bytes(MODEL)[-1] ^= 1
    with pytest.raises(WeightsRefusedError, match="BAD_DIGEST"):
        check_written(make_part(WEIGHTS)[0].slices, shadow)
