"""The files of a run, read as far as they go."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from launch.report.scores import MEASUREMENTS

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run wrote. All of it may be missing."""

    name: str
    result: dict[str, Any]
    steps: list[Line]
    """Trainer steps in order; of a step that was repeated after a restart, the last."""
    replicas: list[Line]
    """What inference replicas said about each version they took."""
    warmup: list[Line]
    samples: list[Line]
    """Trajectories to read, each with `text`."""
    missing: tuple[str, ...]
    """What the report cannot show, in words."""


def read_run(run_path: Path) -> RunFiles:
    """Read a run's folder; unreadable lines, as an interrupted writer leaves them, are skipped."""
    result = _read_object(run_path / "result.json")
    metrics = _read_lines(run_path / "metrics.jsonl")
    steps = {line["step"]: line for line in metrics if _is(line, "step") and "step" in line}
    stored = _read_lines(run_path / "samples.jsonl")
    samples = _with_text(stored, run_path)
    missing = {
        **_unmeasured(result),
        "metrics.jsonl: no step was taken": not steps,
        "samples.jsonl: no trajectory was kept": not stored,
        "tokenizer.json: trajectories cannot be read without it": len(samples) < len(stored),
    }
    return RunFiles(
        name=run_path.resolve().name,
        result=result,
        steps=[steps[step] for step in sorted(steps)],
        replicas=[line for line in metrics if _is(line, "replica")],
        warmup=[line for line in _read_lines(run_path / "warmup.jsonl") if "loss" in line],
        samples=samples,
        missing=tuple(what for what, is_missing in missing.items() if is_missing),
    )


def _unmeasured(result: Line) -> dict[str, bool]:
    policies = [policy for pair in MEASUREMENTS.values() for policy in pair]
    if not any(result.get(policy) for policy in policies):
        return {"result.json: no accuracy was measured": True}
    return {
        f"accuracy of {policy.replace('_', ', ')}": not result.get(policy) for policy in policies
    }


def _is(line: Line, kind: str) -> bool:
    return bool(line.get("kind") == kind)


def _read_object(path: Path) -> Line:
    value = _parse(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
    return value or {}


def _read_lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [value for value in map(_parse, file) if value]


def _parse(text: str) -> Line | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _with_text(samples: list[Line], run_path: Path) -> list[Line]:
    """Those samples whose text is there or can be decoded."""
    decode = None if all("text" in sample for sample in samples) else _decoder(run_path)
    texts = [_text(sample, decode) for sample in samples]
    return [
        {**sample, "text": text}
        for sample, text in zip(samples, texts, strict=True)
        if text is not None
    ]


def _text(sample: Line, decode: Callable[[list[int]], str] | None) -> str | None:
    if "text" in sample or not decode:
        return sample.get("text")
    # A later segment repeats the conversation so far, as the chat template rewrote it.
    segments = sample.get("segments") or [sample]
    token_ids = segments[-1].get("token_ids")
    return decode(token_ids) if token_ids else None


def _decoder(run_path: Path) -> Callable[[list[int]], str] | None:
    """Decoder of the run's own tokenizer, or of the model that it started from."""
    model_path = _read_object(run_path / "config.json").get("model", {}).get("path")
    folders = [run_path / "model", *([Path(model_path)] if model_path else [])]
    for folder in folders:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
    return None
