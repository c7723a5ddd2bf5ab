"""The page itself: what the files say, put into the template."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.report.chats import chats_of
from launch.report.files import RunFiles, read_run
from launch.report.plots import charts_of
from launch.report.scores import MEASUREMENTS, Comparison, compare
from understudy.report.page import fact_rows, render_page, words, write_page

_TOTAL = "total_after_setup"
_SHOWN_ELSEWHERE = {"wall_seconds", "control", "interrupted", "machine", "token_budget"} | {
    policy for policies in MEASUREMENTS.values() for policy in policies
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A bar of the run's wall time."""

    name: str
    seconds: float
    share: float
    """Of the longest stage."""


def write_report(run_path: Path) -> Path:
    """Write `report.html` into a run's folder from what the run left there, and return its path."""
    run = read_run(run_path)
    run_path.mkdir(parents=True, exist_ok=True)
    path = run_path / "report.html"
    write_page(path, _render(run))
    return path


def _render(run: RunFiles) -> str:
    tables = compare(run.result)
    wall_seconds = run.result.get("wall_seconds") or {}
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        name=run.name,
        run=run,
        headline=_headline(tables),
        tables=tables,
        sections=charts_of(run),
        stages=_stages(wall_seconds),
        total_seconds=wall_seconds.get(_TOTAL),
        facts=dict(_facts(run)),
        chats=chats_of(run.samples),
    )


def _headline(tables: Mapping[str, list[Comparison]]) -> Comparison | None:
    """All tasks at the training temperature, or greedy if that was not measured."""
    for rows in tables.values():
        if rows[0].before or rows[0].after:
            return rows[0]
    return None


def _stages(wall_seconds: Mapping[str, Any]) -> list[Stage]:
    seconds = {name: value for name, value in wall_seconds.items() if name != _TOTAL}
    longest = max(seconds.values(), default=0) or 1
    return [
        Stage(name=words(name), seconds=value, share=value / longest)
        for name, value in seconds.items()
    ]


def _facts(run: RunFiles) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Everything else in result.json by heading, as names and values."""
    own = {key: value for key, value in run.result.items() if key not in _SHOWN_ELSEWHERE}
    steps = {"steps": len(run.steps)} if run.steps else {}
    groups = {
        "Run": steps | own,
        "Tokens of an episode": run.result.get("token_budget"),
        "Machine": run.result.get("machine"),
    }
    for heading, values in groups.items():
        if rows := fact_rows(values or {}):
            yield heading, rows
