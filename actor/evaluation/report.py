"""An evaluation as one HTML page: scores, the pass@k curve, conversations to read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from actor.evaluation.attempts import Attempt
from actor.evaluation.result import TAG, passes
from understudy.report.charts import Chart, Points, Series, line_chart
from understudy.report.chats import Chat, bubbles_of_messages
from understudy.report.page import fact_rows, render_page, write_page

Group = Mapping[str, Any]
"""A group's figures, as result.py has them."""

_EACH = 3
"""Conversations shown of each verdict."""
_SETTINGS = ("temperature", "seed", "k", "num_tasks", "passing_reward")
_COUNTS = (
    *("num_attempts", "num_failed", "num_unscored", "num_retried", "num_resumed", "turns_mean"),
    *("tokens_mean", "sampled_tokens_mean", "seconds_mean", "wall_seconds"),
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group of tasks."""

    name: str
    tasks: int
    n: int
    failed: int
    accuracy: Score | None
    pass_at_k: Score | None
    """At the largest k."""
    pass_hat_k: Score | None


def write_report(result: Mapping[str, Any], attempts: Iterable[Attempt], path: Path) -> None:
    """Write the page.

    Args:
        result: as result.json has it.
        attempts: with their messages; each is looked at once.
    """
    groups: Mapping[str, Group] = result["accuracy"]
    page = render_page(
        Path(__file__).with_name("report.html.jinja"),
        name=f"{result['suite']} / {result['split']}",
        result=result,
        headline=_row("all", groups["all"]) if "all" in groups else None,
        sections={
            "Levels": [_row(name, g) for name, g in groups.items() if not name.startswith(TAG)],
            "Tags": [_row(name, g) for name, g in groups.items() if name.startswith(TAG)],
        },
        charts=_charts(groups) if result["k"] > 1 and groups else [],
        is_share=_is_share(result["reward_range"]),
        facts={
            "Settings": fact_rows({name: result[name] for name in _SETTINGS}),
            "Attempts": fact_rows({name: result[name] for name in _COUNTS}),
            "Outcomes": fact_rows(result["outcomes"]),
        },
        chats=_chats(attempts, result["passing_reward"]),
    )
    write_page(path, page)


def _is_share(reward_range: Sequence[float | None]) -> bool:
    """Whether a mean reward reads as a percentage."""
    worst, best = reward_range
    return worst is not None and best is not None and worst >= 0 and best <= 1


def _row(name: str, group: Group) -> Row:
    interval = group["ci95"]
    return Row(
        name=_name(name),
        tasks=group["tasks"],
        n=group["n"],
        failed=group["failed"],
        accuracy=Score(value=group["accuracy"], low=interval[0], high=interval[1])
        if interval
        else None,
        pass_at_k=_last(group["pass_at_k"]),
        pass_hat_k=_last(group["pass_hat_k"]),
    )


def _name(group: str) -> str:
    if group.startswith(TAG):
        return group.removeprefix(TAG)
    return "all tasks" if group == "all" else group.replace("level", "level ")


def _last(points: list[dict[str, Any]]) -> Score | None:
    if not points:
        return None
    return Score(value=points[-1]["value"], low=points[-1]["ci95"][0], high=points[-1]["ci95"][1])


def _charts(groups: Mapping[str, Group]) -> list[Chart]:
    levels = [name for name in groups if name.startswith("level")]
    at, hat = "pass_at_k", "pass_hat_k"
    charts = [
        _chart("pass@k", "At least one of k attempts passes, %.", [groups["all"]], ["all"], at),
        _chart("pass^k", "All of k attempts pass, %.", [groups["all"]], ["all"], hat),
    ]
    if len(levels) > 1:
        some = [groups[name] for name in levels]
        charts += [
            _chart("pass@k by level", "At least one of k attempts passes, %.", some, levels, at),
            _chart("pass^k by level", "All of k attempts pass, %.", some, levels, hat),
        ]
    return [chart for chart in charts if chart]


def _chart(
    title: str, help: str, groups: list[Group], names: list[str], curve: str
) -> Chart | None:
    """Percent over k; the interval is drawn where there is one line."""
    lines = []
    for name, group in zip(names, groups, strict=True):
        points = group[curve]
        low, high = (
            [(p["k"], 100 * p["ci95"][end]) for p in points if len(groups) == 1] for end in (0, 1)
        )
        values: Points = [(p["k"], 100 * p["value"]) for p in points]
        lines.append(Series(label=_name(name), points=values, smooth=False, low=low, high=high))
    return line_chart(title, help, lines, "k")


def _chats(attempts: Iterable[Attempt], passing_reward: float | None) -> dict[str, list[Chat]]:
    """A few conversations of each verdict, of different tasks, and levels if there are."""
    found: dict[str, dict[int, list[Attempt]]] = {}
    for attempt in attempts:
        levels = found.setdefault(_verdict(attempt, passing_reward), {})
        kept = levels.setdefault(attempt.level, [])
        is_new = all(attempt.task != other.task for other in kept)
        if attempt.messages and is_new and len(kept) < _EACH:
            kept.append(attempt)
    chosen = {}
    for verdict in ("passed", "not passed", "played", "unscored", "failed"):
        levels = found.get(verdict, {})
        in_turn = zip_longest(*(levels[level] for level in sorted(levels)))
        some = [attempt for of_levels in in_turn for attempt in of_levels if attempt][:_EACH]
        if some:
            chosen[verdict] = [_chat(attempt, verdict) for attempt in some]
    return chosen


def _verdict(attempt: Attempt, passing_reward: float | None) -> str:
    if attempt.has_failed:
        return "failed"
    if attempt.reward is None:
        return "unscored"
    if passing_reward is None:
        return "played"
    return "passed" if passes(attempt.reward, passing_reward) else "not passed"


def _chat(attempt: Attempt, verdict: str) -> Chat:
    facts = [f"attempt {attempt.attempt}", f"turns {attempt.turns}", attempt.outcome]
    if attempt.reward is not None:
        facts.append(f"reward {attempt.reward:g}")
    if attempt.detail:
        facts.append(attempt.detail)
    return Chat(
        title=f"{attempt.task_id} - level {attempt.level}",
        is_right={"passed": True, "not passed": False}.get(verdict),
        verdict=verdict,
        facts=", ".join(facts),
        bubbles=bubbles_of_messages(attempt.messages),
    )
