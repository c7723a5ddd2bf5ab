"""A checkpoint's manifest.json, as a trainer finds it when it resumes."""

import contextlib
import hashlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from learner.trainer.checkpoints.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    read_checkpoint,
)
from tests.fuzz.mutation import mutate_bytes
from understudy.errors import ConfigError

MAX_LEN = 2048
_folder = Path(tempfile.mkdtemp())
_VALUES = (None, True, 0, -1, 2**63, 1e308, "", "x", "\ud800", [], {}, [[]], {"format": 1}, [0, 1])
_BODY = {
    "format": 1,
    "step": 40,
    "world_size": 1,
    "state": {
        "num_updates": 40,
        "last_version": 41,
        "trainer_epoch": 1,
        "run": "run",
        "ledger_digest": "00" * 32,
    },
    "setup": {
        "architecture": "qwen3",
        "dtype": "float32",
        "betas": [0.9, 0.95],
        "weight_decay": 0.0,
        "parameters": {"model.norm.weight": [4]},
    },
    "files": {"rank-00000.safetensors": {"num_bytes": 16, "sha256": "00" * 32}},
}


def seeds() -> list[bytes]:
    """A sealed manifest, and other JSON."""
    sealed = (_BODY, [], {}, None, {**_BODY, "format": 2})
    return [*map(_seal, sealed), b"{}", b"[]", b"", b"1" * 30, b"[" * 100]


def _seal(body: Any) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"manifest": body, "sha256": digest}).encode()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a value under a right seal, or bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.6:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            sealed = _seal(_change(json.loads(data)["manifest"], rng))
            if len(sealed) <= max_size:
                return sealed
    return mutate_bytes(data, max_size, seed)


def _change(value: Any, rng: random.Random) -> Any:
    """Replace, remove or add one value, at any depth."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            del value[key]
        elif rng.random() < 0.1 and isinstance(value, dict):
            value["x"] = value[key]
        else:
            value[key] = _change(value[key], rng)
        return value
    if isinstance(value, int | float) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 0.5))
    return rng.choice(_VALUES)


def TestOneInput(data: bytes) -> None:
    """Read a manifest: it is one, it is damaged, or it is of another format."""
    (_folder / MANIFEST).write_bytes(data)
    with contextlib.suppress(DamagedCheckpointError, ConfigError):
        checkpoint = read_checkpoint(_folder)
        assert isinstance(checkpoint.manifest, Manifest)
        assert checkpoint.manifest.format == 1
        assert len(checkpoint.digest) == 64
