"""Every story in this directory. CORRAL_REWRITE=1 writes down what happens instead of comparing: read the diff."""

import os
from pathlib import Path

import pytest

from tests.scenario.cman.story import Story

STORIES = sorted(Path(__file__).parent.glob("*.txt"))
DASHES = "----\n"


def test_there_are_stories() -> None:
    assert len(STORIES) >= 8


@pytest.mark.parametrize("path", STORIES, ids=[path.stem for path in STORIES])
def test_story(path: Path) -> None:
    script, _, expected = path.read_text().partition(DASHES)
    happened = Story().tell(script)
    if os.environ.get("CORRAL_REWRITE"):
        path.write_text(script + DASHES + happened)
    else:
        assert happened == expected
