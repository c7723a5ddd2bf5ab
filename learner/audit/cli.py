"""Command `understudy audit`: does the log of a run balance?"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def run_audit(argv: Sequence[str]) -> int:
    """Audit a run and print the report. Returns 0 if it passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="understudy audit",
        description="Check a run's log: every byte, every payload, every change of the accounts.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    from learner.audit.audit import audit_run

    report = audit_run(arguments.run)
    print(json.dumps(report.as_dict()) if arguments.json else report)
    return 0 if report.passed else 1
