"""The intake under crashes: nothing that was answered is lost, and the harness finds what is.

`make torture` does the same at length; docs/torture.md says what is checked.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture import intake_cases
from tests.torture.buggy_intake import BUGS
from tests.torture.campaign import Plan, Result
from tests.torture.disks import ImageDisk, images_work

SEED = 20


@pytest.fixture(scope="module")
def images_or_skip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips, loudly, where no image can be mounted."""
    if why := images_work(tmp_path_factory.mktemp("probe")):
        print(f"NOT TESTED, no pulled plugs: {why}", file=sys.stderr)
        pytest.skip(why)


def passed(results: Iterator[Result]) -> list[Result]:
    """All results; each campaign kept its promises."""
    done = []
    for result in results:
        print(result.line())
        assert result.violations == []
        assert result.figures["acked"] > 0
        done.append(result)
    return done


@pytest.mark.timeout(400)
def test_nothing_acked_is_lost_by_random_kills(tmp_path: Path) -> None:
    results = passed(intake_cases.kills(100, SEED, tmp_path))
    assert sum(result.kills for result in results) == 100
    assert sum(result.kills_at_work for result in results) >= 70


@pytest.mark.timeout(200)
def test_nothing_acked_is_lost_at_failpoints(tmp_path: Path) -> None:
    results = passed(intake_cases.failpoints(5, SEED, tmp_path))
    assert [result.kills for result in results] == [5] * len(results)


def test_nothing_acked_is_lost_when_the_plug_is_pulled(
    tmp_path: Path, images_or_skip: None
) -> None:
    [result] = passed(intake_cases.images(8, SEED, tmp_path))
    assert result.kills == 8


def test_nothing_acked_is_lost_on_a_disk_that_grants_no_more_than_posix(tmp_path: Path) -> None:
    [result] = passed(intake_cases.strict(8, SEED, tmp_path))
    assert result.kills == 8


@pytest.mark.parametrize("bug", list(BUGS))
def test_a_seeded_bug_is_found_within_a_minute(bug: str, tmp_path: Path) -> None:
    result = intake_cases.find_bug(bug, SEED, tmp_path)
    print(result.summary())
    assert result.violations
    assert result.seconds < intake_cases.FIND_SECONDS


def test_a_missing_sync_is_found_on_ext4(tmp_path: Path, images_or_skip: None) -> None:
    plan = Plan(name="", disk=ImageDisk)
    assert intake_cases.find_bug("no_fdatasync", SEED, tmp_path, plan).violations
