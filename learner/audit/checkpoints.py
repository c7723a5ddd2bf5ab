"""The checkpoints of a run, as far as the log has to agree with them. Reads JSON only: no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.audit.violations import Rule, Violations


@dataclass(frozen=True, kw_only=True)
class ManifestFact:
    """What a manifest says about the log."""

    folder: str
    step: int = 0
    ledger_digest: str = ""
    """In hexadecimal; empty for step 0."""
    wrong: str = ""
    """Why it cannot be read; empty if it can."""
    silent: bool = False
    """It says nothing about the log."""


def read_manifests(run: Path) -> list[ManifestFact]:
    """Manifests of a run's checkpoints. Read them before the log: what they have behind them was
    durable there first."""
    folders = sorted((run / "checkpoints").glob("step-*[0-9]"))
    facts = (_read(folder) for folder in folders if folder.is_dir())
    return [fact for fact in facts if fact]


def check_manifests(
    facts: list[ManifestFact], digests: Mapping[int, bytes], violations: Violations
) -> int:
    """Compare with the log's digests by step; returns how many agree."""
    violations.place = None
    num_agreed = 0
    for fact in facts:
        if wrong := _compare(fact, digests):
            violations.add(Rule.CHECKPOINT, f"{fact.folder}: {wrong}")
        elif not fact.silent:
            num_agreed += 1
    return num_agreed


def _compare(fact: ManifestFact, digests: Mapping[int, bytes]) -> str:
    if fact.wrong or fact.silent:
        return fact.wrong
    if fact.step not in digests:
        return f"it has {fact.step} steps behind it, which the log does not have"
    if fact.ledger_digest != digests[fact.step].hex():
        return "it learned from other batches than the log has"
    return ""


def _read(folder: Path) -> ManifestFact | None:
    """None if the checkpoint was removed meanwhile."""
    name = f"checkpoints/{folder.name}"
    try:
        sealed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        body = sealed["manifest"]
        if _digest(body) != sealed["sha256"]:
            return ManifestFact(folder=name, wrong="manifest.json is damaged")
        step, digest = int(body["step"]), body["state"].get("ledger_digest")
    except FileNotFoundError:
        missing = ManifestFact(folder=name, wrong="manifest.json is missing")
        return missing if folder.exists() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return ManifestFact(folder=name, wrong=f"manifest.json cannot be read ({error!r})")
    return ManifestFact(folder=name, step=step, ledger_digest=digest or "", silent=digest is None)


def _digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
