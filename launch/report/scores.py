"""Accuracy before and after training, as rows and as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

MEASUREMENTS = {
    "sampled, temperature 1": ("base", "trained"),
    "greedy": ("base_greedy", "trained_greedy"),
}
"""Keys of result.json by how replies were drawn: before and after training."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy of one policy on one set of tasks."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    num: int | None
    """Tasks."""

    def __str__(self) -> str:
        return f"{_percent(self.value)} [{_percent(self.low)}, {_percent(self.high)}]"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row: tasks of one level, before and after."""

    level: str
    before: Score | None
    after: Score | None

    @property
    def change(self) -> str:
        """Difference in percentage points."""
        if not self.before or not self.after:
            return "-"
        return f"{100 * (self.after.value - self.before.value):+.1f}"

    @property
    def num(self) -> str:
        """Number of tasks, or of both measurements where they differ."""
        nums = [str(score.num) for score in (self.before, self.after) if score and score.num]
        return " / ".join(dict.fromkeys(nums)) or "-"


def compare(result: Result) -> dict[str, list[Comparison]]:
    """Rows by how replies were drawn: all tasks first, then level by level; empty if unmeasured."""
    tables = {}
    for drawn, (before, after) in MEASUREMENTS.items():
        old, new = result.get(before) or {}, result.get(after) or {}
        levels = sorted({*old, *new}, key=lambda level: (level != "all", level))
        rows = [
            Comparison(level=name_of(level), before=_score(old, level), after=_score(new, level))
            for level in levels
        ]
        if rows:
            tables[drawn] = rows
    return tables


def format_table(result: Result) -> str:
    """The result for a terminal: accuracy in percent with 95 % intervals."""
    tables = compare(result)
    if not tables:
        return "no accuracy was measured"
    lines = [f"{'accuracy, % [95 % CI]':<24}{'tasks':>6}  {'base':<20}{'trained':<20}change"]
    for drawn, rows in tables.items():
        lines.append(drawn)
        for row in rows:
            before, after = row.before or "-", row.after or "-"
            lines.append(
                f"  {row.level:<22}{row.num:>6}  {before!s:<20}{after!s:<20}{row.change:>6}"
            )
    lines += _token_budget(result)
    if result.get("control"):
        lines.append("control: rewards were shuffled among episodes, so no gain is expected")
    if result.get("interrupted"):
        lines.append("interrupted: what is missing was not measured")
    return "\n".join(lines)


def _token_budget(result: Result) -> list[str]:
    budget = result.get("token_budget") or {}
    return [
        f"{policy}: {means['tokens_mean']:.0f} tokens an episode, of which "
        f"{means['sampled_tokens_mean']:.0f} sampled, in {means['turns_mean']:.1f} turns"
        for policy, means in budget.items()
    ]


def name_of(level: str) -> str:
    """A level's name for people: `all` -> `all levels`, `level1` -> `level 1`."""
    return "all levels" if level == "all" else level.replace("level", "level ")


def _score(measured: Result, level: str) -> Score | None:
    value = measured.get(level)
    if not isinstance(value, dict) or "accuracy" not in value:
        return None
    low, high = value.get("ci95") or (value["accuracy"],) * 2
    return Score(value=value["accuracy"], low=low, high=high, num=value.get("n"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
