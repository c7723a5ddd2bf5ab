"""What `make bench-staleness` found, as a figure and a table.

    python -m benchmarks.staleness_plots --out docs/staleness.svg

writes the figure and prints the table in Markdown. It needs matplotlib (`pip install matplotlib`),
which nothing else here does.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.staleness import ALGORITHMS, RESULTS, RUNS, STALENESS

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "staleness"  # equal results, equal file

from matplotlib import pyplot  # noqa: E402  after the backend is chosen

Runs = dict[tuple[str, int], list[dict[str, Any]]]


def main() -> None:
    """Read the results, write the figure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the figure, an SVG file")
    arguments = parser.parse_args()
    runs: Runs = defaultdict(list)
    for text in (RUNS / RESULTS).read_text().splitlines():
        line = json.loads(text)
        runs[line["algorithm"], line["staleness"]].append(line)
    draw(runs, arguments.out)
    print(table(runs))


def draw(runs: Runs, path: Path) -> None:
    """Held-out accuracy against episodes, a panel for each staleness: every run thin, the mean of
    an algorithm's runs thick."""
    figure, panels = pyplot.subplots(
        1, len(STALENESS), figsize=(3 * len(STALENESS), 3.2), sharey=True, layout="constrained"
    )
    for staleness, panel in zip(STALENESS, panels, strict=True):
        for index, algorithm in enumerate(ALGORITHMS):
            curves = [_curve(line) for line in runs[algorithm, staleness]]
            for x, y in curves:
                panel.plot(x, y, color=f"C{index}", linewidth=0.6, alpha=0.5)
            if curves:
                means = [
                    statistics.fmean(values) for values in zip(*(y for _, y in curves), strict=True)
                ]
                panel.plot(curves[0][0], means, color=f"C{index}", linewidth=2, label=algorithm)
        panel.set_title(f"{staleness} steps behind", fontsize=10)
        panel.set_xlabel("episodes")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def _curve(line: dict[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Episodes that were trained on, and accuracy then."""
    steps, accuracy = zip(*line["heldout"], strict=True)
    episodes_a_step = line["episodes"] / steps[-1]
    return [step * episodes_a_step for step in steps], accuracy


def table(runs: Runs) -> str:
    """Accuracy at the end: mean over the runs, lowest and highest."""
    rows = ["| correction | " + " | ".join(f"{s} behind" for s in STALENESS) + " |"]
    rows.append("|---" * (len(STALENESS) + 1) + "|")
    for algorithm in ALGORITHMS:
        cells = [_cell(runs[algorithm, staleness]) for staleness in STALENESS]
        rows.append(f"| {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(lines: Sequence[dict[str, Any]]) -> str:
    final = [100 * line["heldout"][-1][1] for line in lines]
    if not final:
        return "not run"
    mean = f"{statistics.fmean(final):.1f}"
    return mean if len(final) == 1 else f"{mean} ({min(final):.1f} - {max(final):.1f})"


if __name__ == "__main__":
    main()
