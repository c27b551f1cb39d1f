"""A few cases of every target, and every canary: `python -m tests.fuzz --seconds N` goes on from there."""

import pytest

from tests.fuzz.target import Finding, Target, run_case
from tests.fuzz.targets import targets

CASES = 80
CANARY_CASES = 400

TARGETS = targets()
NAMES = [target.name for target in TARGETS]


def test_names_differ() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_no_finding_and_both_ways_are_gone(target: Target) -> None:
    words = {run_case(target, number) for number in range(CASES)}
    assert words >= set(target.expected)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_the_canary_fails(target: Target) -> None:
    for number in range(CANARY_CASES):
        try:
            run_case(target, number, canary=True)
        except Finding:
            return
    raise AssertionError(f"{target.name}: {CANARY_CASES} cases do not find the planted bug")
