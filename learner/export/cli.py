"""Command `understudy export`: trajectories of a run's log as JSON lines."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run_export(argv: Sequence[str]) -> int:
    """Write a run's trajectories to a file. What had to be left out is said on stderr."""
    parser = argparse.ArgumentParser(
        prog="understudy export",
        description="Write the trajectories of a run's log as JSON lines, compressed by zstd.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, e.g. runs/demo")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl.zst")
    parser.add_argument(
        "--format", choices=("jsonl", "atif"), default="jsonl", help="default: jsonl"
    )
    parser.add_argument(
        "--split",
        choices=("trained", "evaluated", "all"),
        default="trained",
        help="what was trained, held-out tasks, or all that was stored; default: trained",
    )
    arguments = parser.parse_args(argv)

    from learner.export.export import export_run

    summary = export_run(arguments.run, arguments.out, arguments.format, arguments.split)
    for remark in summary.remarks:
        print(f"understudy export: {remark}", file=sys.stderr)
    print(f"{summary.num_written} trajectories in {arguments.out}")
    return 0
