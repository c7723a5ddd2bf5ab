"""Decoders of what others send, fuzzed: nothing but what they document comes out of them.

Each target runs in a process of its own, two at a time: docs/fuzzing.md. At the end stand faults
that the targets found, or that were found while they were written, and that are not mended.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import ROOT
from learner.trainer.checkpoints.manifest import MANIFEST, DamagedCheckpointError, read_checkpoint
from learner.weights.publication import Upload
from tests.fuzz import TARGETS
from understudy.client.bundle import BundleError, _check, _write
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError

NUM_RUNS = 100_000


def fuzz(name: str, *options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """Run a target, with a fault in the module that it is guided by first."""
    code = (
        "import atheris, importlib, sys\n"
        "from tests.fuzz.__main__ import TARGETS, main\n"
        "with atheris.instrument_imports(include=list(TARGETS[sys.argv[1]])):\n"
        "    module = importlib.import_module(TARGETS[sys.argv[1]][0])\n"
        f"{fault}\nmain(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code] if fault else [sys.executable, "-m", "tests.fuzz"]
    return subprocess.run(
        [*words, name, "-seed=1", "-rss_limit_mb=1024", "-verbosity=0", *options],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=280,
    )


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All targets, begun."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("fuzz")))
    with ThreadPoolExecutor(2) as pool:
        # Slow ones first, so that both ends come at about the same time.
        names = sorted(TARGETS, key=lambda name: name not in ("frames", "log_reader"))
        yield {name: pool.submit(fuzz, name, f"-runs={NUM_RUNS}") for name in names}
        pool.shutdown(cancel_futures=True)
    patch.undo()


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_lets_nothing_undocumented_out(runs: Runs, name: str) -> None:
    run = runs[name].result()
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]


NO_ORDER = """
module.decode_spans = lambda messages, num_sampled, where: tuple(
    module.VersionSpan(version=item.version, start=item.start, end=item.end) for item in messages
)
"""
NO_COVERAGE = "module._check_coverage = lambda parts: None"
NO_NAMES = "module._check = lambda header: None"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("payload_raw", NO_ORDER),
        ("payload_zstd", NO_ORDER),
        ("weights", NO_COVERAGE),
        ("bundle", NO_NAMES),
    ],
)
def test_a_check_that_is_missing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = fuzz(name, f"-runs={NUM_RUNS}", fault=fault)
    assert run.returncode != 0
    assert "Uncaught Python exception" in run.stdout + run.stderr
    assert list(tmp_path.glob("*/crash-*"))


# --- Faults that are known and not mended ---


@pytest.mark.parametrize("name", ["a\0b", "a" * 256])
def test_a_bundle_with_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    digest = hashlib.sha256(b"").digest()
    header = weight_pb2.ModelBundleHeader(files=[weight_pb2.BundleFile(name=name, digest=digest)])
    with pytest.raises(BundleError):
        _check_and_write(header, tmp_path)


def _check_and_write(header: weight_pb2.ModelBundleHeader, folder: Path) -> None:
    _check(header)
    _write(header, memoryview(b""), folder)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"manifest": [], "sha256": hashlib.sha256(b"[]").hexdigest()}),
        "[" * 100_000,
    ],
    ids=["a list under a right seal", "brackets"],
)
def test_a_manifest_of_other_json_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(tmp_path)


def _part(shape: tuple[int, ...], num_elements: int) -> weight_pb2.PartHeader:
    piece = weight_pb2.TensorSlice(
        name="w",
        dtype="F32",
        shape=shape,
        num_elements=num_elements,
        num_bytes=4 * num_elements,
        encoding=weight_pb2.TENSOR_ENCODING_DENSE,
        digest=bytes(32),
    )
    return weight_pb2.PartHeader(num_parts=1, slices=[piece])


def test_a_part_of_300_dimensions_is_refused() -> None:
    with pytest.raises(WeightsRefusedError):
        Upload(_part((2**63,) * 300, 1), None)


@pytest.mark.parametrize("num_elements", [2**44, 2**61])
def test_a_part_that_no_memory_holds_is_refused(num_elements: int) -> None:
    with pytest.raises(WeightsRefusedError):
        Upload(_part((num_elements,), num_elements), None)
