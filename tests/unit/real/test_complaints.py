"""Strangers must not fill the log, nor our memory."""

import logging

import pytest

from corral.base.time import SECOND
from corral.real.complaints import LINES_MAX, SOURCES_MAX, Complaints


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Complaints:
    caplog.set_level(logging.WARNING)
    return Complaints(logging.getLogger("test.complaints"))


def test_one_line_per_source_and_minute_and_the_rest_is_counted(
    complaints: Complaints, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(61):
        complaints.about(1000 * SECOND + second * SECOND, "10.0.0.7", "10.0.0.7 knocks")
    assert caplog.messages == ["10.0.0.7 knocks", "10.0.0.7 knocks (59 more like it were not shown)"]
    assert complaints.suppressed == 59


def test_sources_are_told_apart(complaints: Complaints, caplog: pytest.LogCaptureFixture) -> None:
    for source in ("a", "b", "a"):
        complaints.about(0, source, source)
    assert caplog.messages == ["a", "b"]


def test_many_sources_fill_neither_log_nor_memory(complaints: Complaints, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10_000):
        complaints.about(1000 * SECOND + number, f"10.0.{number}", "knock")
    assert len(caplog.messages) == LINES_MAX
    assert len(complaints._sources) <= SOURCES_MAX
