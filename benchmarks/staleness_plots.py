"""What `make bench-staleness` found, as a figure and a table.

    python -m benchmarks.staleness_plots --out docs/staleness.svg

writes the figure and prints the table in Markdown, of the runs that began with the same model as
the last one. It needs matplotlib (`pip install matplotlib`), which nothing else here does.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.demo_runs import read_lines
from benchmarks.staleness import ALGORITHMS, RESULTS, STALENESS

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "staleness"  # equal results, equal file

from matplotlib import pyplot  # noqa: E402  after the backend is chosen

Line = dict[str, Any]
"""What one run came to."""
Runs = dict[tuple[str, int], list[Line]]
Axis = Callable[[Line], list[float]]


def main() -> None:
    """Read the results, write the figure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the figure, an SVG file")
    arguments = parser.parse_args()
    runs: Runs = defaultdict(list)
    lines = list(read_lines(RESULTS))
    for line in lines:
        if line["base"] == lines[-1]["base"]:
            runs[line["algorithm"], line["staleness"]].append(line)
    draw(runs, arguments.out)
    print(table(runs))


def draw(runs: Runs, path: Path) -> None:
    """Held-out accuracy, a panel for each staleness: above against episodes, below against wall
    time. Every run thin, the mean of an algorithm's runs thick."""
    figure, rows = pyplot.subplots(
        2, len(STALENESS), figsize=(3 * len(STALENESS), 6), sharey=True, layout="constrained"
    )
    for panels, axis in zip(rows, (_episodes, _minutes), strict=True):
        for staleness, panel in zip(STALENESS, panels, strict=True):
            for index, algorithm in enumerate(ALGORITHMS):
                _draw(panel, runs[algorithm, staleness], axis, f"C{index}", algorithm)
            panel.set_ylim(0, 1)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("held-out accuracy")
    for staleness, above, below in zip(STALENESS, *rows, strict=True):
        above.set_title(f"{staleness} steps behind", fontsize=10)
        above.set_xlabel("episodes")
        below.set_xlabel("minutes")
    rows[0][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def _draw(panel: Any, lines: Sequence[Line], axis: Axis, color: str, label: str) -> None:
    curves = [(axis(line), [accuracy for _, accuracy in line["heldout"]]) for line in lines]
    for x, y in curves:
        panel.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
    if curves:
        xs, ys = zip(*curves, strict=True)
        panel.plot(_means(xs), _means(ys), color=color, linewidth=2, label=label)


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def _episodes(line: Line) -> list[float]:
    """Episodes that were trained on by each evaluation."""
    steps = [step for step, _ in line["heldout"]]
    return [step * line["episodes"] / steps[-1] for step in steps]


def _minutes(line: Line) -> list[float]:
    """Minutes from the first version to each evaluation."""
    return [seconds / 60 for seconds in line["heldout_seconds"]]


def table(runs: Runs) -> str:
    """Accuracy at the end: mean over the runs, lowest and highest."""
    rows = ["| correction | " + " | ".join(f"{s} behind" for s in STALENESS) + " |"]
    rows.append("|---" * (len(STALENESS) + 1) + "|")
    for algorithm in ALGORITHMS:
        cells = [_cell(runs[algorithm, staleness]) for staleness in STALENESS]
        rows.append(f"| {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(lines: Sequence[Line]) -> str:
    final = [100 * line["heldout"][-1][1] for line in lines]
    if not final:
        return "not run"
    mean = f"{statistics.fmean(final):.1f}"
    return mean if len(final) == 1 else f"{mean} ({min(final):.1f} - {max(final):.1f})"


if __name__ == "__main__":
    main()
