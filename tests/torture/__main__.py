"""Entry point: `python -m tests.torture [CASE ...] --kills 1000`. Exit code 0 if all is well.

A JSON line a campaign goes to standard output, a line for people to standard error.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture import flood, intake_cases, real, stops, system
from tests.torture.campaign import Result
from tests.torture.disks import images_work

CASES = ("kills", "failpoints", "images", "strict", "bugs", "system", "stops", "flood", "real")


def main() -> int:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all")
    parser.add_argument("--kills", type=int, default=1000, help="random kills of the intake")
    parser.add_argument("--failpoints", type=int, default=50, help="kills at each failpoint")
    parser.add_argument("--plugs", type=int, default=100, help="crashes on each kind of disk")
    parser.add_argument("--seconds", type=float, default=600, help="length of `system`")
    parser.add_argument("--stop-seconds", type=float, default=30, help="length of a SIGSTOP")
    parser.add_argument("--flood-seconds", type=float, default=600, help="length of `flood`")
    parser.add_argument("--real-seconds", type=float, default=1200, help="length of `real`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    arguments = parser.parse_args()
    cases = arguments.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="understudy-torture-"))
    all_well = True
    for case in cases:
        all_well &= _report(case, _results(case, arguments, folder / case), folder)
    if all_well and not arguments.folder:
        shutil.rmtree(folder)
    return 0 if all_well else 1


def _results(case: str, arguments: argparse.Namespace, folder: Path) -> Iterator[Result]:
    seed = arguments.seed
    makers: dict[str, Callable[[], Iterator[Result]]] = {
        "kills": lambda: intake_cases.kills(arguments.kills, seed, folder),
        "failpoints": lambda: intake_cases.failpoints(arguments.failpoints, seed, folder),
        "images": lambda: intake_cases.images(arguments.plugs, seed, folder),
        "strict": lambda: intake_cases.strict(arguments.plugs, seed, folder),
        "bugs": lambda: intake_cases.find_bugs(seed, folder),
        "system": lambda: iter([system.torture(arguments.seconds, seed, folder)]),
        "stops": lambda: stops.torture(arguments.stop_seconds, folder),
        "flood": lambda: iter([flood.torture(arguments.flood_seconds, folder)]),
        "real": lambda: iter([real.torture(arguments.real_seconds, seed, folder)]),
    }
    if case == "images" and (why := images_work(folder)):
        print(f"torture: SKIPPED images: {why}", file=sys.stderr)
        return iter(())
    return makers[case]()


def _report(case: str, results: Iterator[Result], folder: Path) -> bool:
    """Print what comes; whether it is what should: sound code passes, seeded bugs are found."""
    all_well, kills, seconds = True, 0, 0.0
    for result in results:
        well = result.ok != (case == "bugs")
        all_well &= well
        kills += result.kills
        seconds += result.seconds
        print(result.line(), flush=True)
        print(f"torture: {'' if well else 'FAILED '}{result.summary()}", file=sys.stderr)
    verdict = "as it should be" if all_well else f"FAILED, see {folder}"
    print(f"torture: {case}: {kills} crashes in {seconds:.0f} s, {verdict}", file=sys.stderr)
    return all_well


if __name__ == "__main__":
    sys.exit(main())
