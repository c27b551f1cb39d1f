"""Every story beside this file must go as it is told."""

import os
from pathlib import Path

import pytest

from tests.scenario.dlm.runner import Story

RULE = "----"
STORIES = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path):
    story, _, expected = path.read_text().partition(RULE + "\n")
    got = "\n".join(Story().play(story)) + "\n"
    if os.environ.get("CORRAL_REWRITE"):
        path.write_text(story + RULE + "\n" + got)
        return
    assert got == expected


def test_there_are_stories():
    assert STORIES
