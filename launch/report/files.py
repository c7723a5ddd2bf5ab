"""The files of a run, read as far as they go."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from launch.report.scores import MEASUREMENTS

Line = dict[str, Any]
Decode = Callable[[list[int]], str]
_UNREADABLE = "(tokens of another model, whose tokenizer is not here)"


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run wrote. All of it may be missing."""

    name: str
    result: dict[str, Any]
    steps: list[Line]
    """Trainer steps in order; of a step that was repeated after a restart, the last."""
    evaluations: list[Line]
    """Accuracy on held-out tasks, by step; of a step that was evaluated again, the last."""
    replicas: list[Line]
    """What inference replicas said about each version they took."""
    warmup: list[Line]
    samples: list[Line]
    """Trajectories to read, each with `text`; those of agents of parts with `pieces` of it too: the
    part's name, and what it heard and said in a turn."""
    missing: tuple[str, ...]
    """What the report cannot show, in words."""


def read_run(run_path: Path) -> RunFiles:
    """Read a run's folder; unreadable lines, as an interrupted writer leaves them, are skipped."""
    result = _read_object(run_path / "result.json")
    metrics = _read_lines(run_path / "metrics.jsonl")
    steps = _by_step(metrics, "step")
    evaluations = _by_step(metrics, "evaluation")
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
        steps=steps,
        evaluations=evaluations,
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


def _by_step(lines: list[Line], kind: str) -> list[Line]:
    """Lines of a kind in the order of their steps, the last of each step."""
    last = {line["step"]: line for line in lines if _is(line, kind) and "step" in line}
    return [last[step] for step in sorted(last)]


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
    decoders = _Decoders(run_path)
    texts = [_text(sample, decoders) for sample in samples]
    return [
        {**sample, **text} for sample, text in zip(samples, texts, strict=True) if text is not None
    ]


def _text(sample: Line, decoders: "_Decoders") -> Line | None:
    if "text" in sample:
        return {}
    if "turns" in sample:
        pieces = _pieces(sample, decoders)
        return {"pieces": pieces, "text": "".join(text for _, text in pieces)} if pieces else None
    # A later segment repeats the conversation so far, as the chat template rewrote it.
    segments = sample.get("segments") or [sample]
    token_ids = segments[-1].get("token_ids")
    decode = decoders.of("")
    return {"text": decode(token_ids)} if decode and token_ids else None


def _pieces(sample: Line, decoders: "_Decoders") -> list[tuple[str, str]]:
    """Of each turn the part, and the text of what was new in its prompt and of its reply."""
    pieces, ends = [], dict.fromkeys(range(len(sample["segments"])), 0)
    for index, start, end in sample["turns"]:
        segment = sample["segments"][index]
        sampled = [place for place, mask in enumerate(segment["loss_mask"]) if mask]
        first, ends[index] = ends[index], sampled[end - 1] + 1 if end > start else ends[index]
        part = segment.get("part", "")
        decode = decoders.of(part)
        text = decode(segment["token_ids"][first : ends[index]]) if decode else _UNREADABLE
        pieces.append((part, text))
    return pieces


class _Decoders:
    """Decoders of the run's own tokenizer, or of the model that it started from; and those of other
    models for parts of an agent that are of such."""

    def __init__(self, run_path: Path) -> None:
        config = _read_object(run_path / "config.json")
        model_path = config.get("model", {}).get("path")
        self._own = [run_path / "model", *([Path(model_path)] if model_path else [])]
        policies = config.get("policies", {})
        self._others = {
            part: [Path(policies[agent["policy"]]["model"])]
            for part, agent in config.get("agents", {}).items()
            if agent.get("policy")
        }
        self._found: dict[tuple[Path, ...], Decode | None] = {}

    def of(self, part: str) -> Decode | None:
        """What decodes a part's tokens."""
        folders = tuple(self._others.get(part, self._own))
        if folders not in self._found:
            files = [folder / "tokenizer.json" for folder in folders]
            self._found[folders] = next((_load(file) for file in files if file.exists()), None)
        return self._found[folders]


def _load(file: Path) -> Decode:
    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
