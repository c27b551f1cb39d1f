"""Rules for all tests: what may be skipped where, and that nobody leaves the machine different from how he found it."""

import os
import re
from pathlib import Path

import pytest

import corral
from tests.integration import netns

SKIPS = Path(__file__).parent / "ci-skips.txt"


def accepted_skips() -> list[re.Pattern[str]]:
    lines = (line.partition("#")[0].strip() for line in SKIPS.read_text().splitlines())
    return [re.compile(line) for line in lines if line]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
    if item.get_closest_marker("fuse") and not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    if item.get_closest_marker("interpreted") and corral.compiled():
        pytest.skip("changes code inside an engine, and the engines are compiled")
    if item.get_closest_marker("netns") and (reason := netns.missing()):
        pytest.skip(reason)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """With CI=true a skip whose reason is not listed is a failure."""
    outcome = yield
    report = outcome.get_result()
    if not report.skipped or os.environ.get("CI") != "true" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(pattern.search(reason) for pattern in accepted_skips()):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI for a reason that tests/ci-skips.txt does not list: {reason}"
