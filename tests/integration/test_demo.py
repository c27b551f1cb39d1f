"""`corral demo`: its whole story without FUSE, and what is left when it is interrupted.

Many moments of interruption, with and without FUSE: `make interrupts`.
"""

import json
import subprocess
import sys

import pytest

from tests.integration.fuse_support import needs_fuse
from tests.integration.interrupted import interrupt

MOMENTS = [("[1/6]", 0.5), ("[3/6]", 3.0)]  # while daemons start; while files are written


def test_without_fuse_the_same_is_done_through_the_library() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "corral.cli.main", "demo", "--no-fuse", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {row["what"]: row["result"] for row in document["results"]}
    assert not document["failed"]
    assert rows["without FUSE, through the library"] == "--no-fuse was given"
    assert "applications reach the files through corral's library" in done.stderr
    for node in (2, 3):
        assert "files the same" in rows[f"compared through node {node}"]
    for phase in ("failure detected", "new view", "fenced", "locks recovered", "journal replayed"):
        assert rows[phase].endswith("ms after the kill")
    assert rows["fsck"].startswith("clean")
    assert [line[:5] for line in done.stderr.splitlines() if line.startswith("[")] == [f"[{n}/6]" for n in range(1, 7)]


@pytest.mark.parametrize(("step", "at"), MOMENTS)
@pytest.mark.parametrize("options", [["--no-fuse"], pytest.param([], marks=needs_fuse)], ids=["library", "fuse"])
def test_sigint_leaves_nothing(options: list[str], step: str, at: float) -> None:
    ended = interrupt(options, at, again=0.1, once_said=step)
    assert not ended.left
    assert ended.status == 1
    assert "interrupted" in ended.said
    assert "Traceback" not in ended.said
