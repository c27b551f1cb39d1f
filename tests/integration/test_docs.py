"""Every Python block of README and docs/guide runs, and the shell blocks of getting-started.md, in their order.

Blocks that connect run against one local cluster, whose node 1 is their default; the others stand alone. A block that
begins with a file's name as a comment is that file, for every block of its page. A text block right after a Python
block is what that prints.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from corral.cli.layout import Layout
from corral.cli.localcluster import LocalCluster

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
SECONDS = 120


class Block(NamedTuple):
    name: str
    code: str
    prints: str | None
    files: dict[str, str]


def files(text: str) -> dict[str, str]:
    return {name[1]: match[2] for match in BLOCK.finditer(text) if (name := FILE.match(match[2]))}


def blocks(language: str) -> list[Block]:
    return [
        Block(f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", match[2], match[3], files(text))
        for page in PAGES
        for text in [page.read_text()]
        for match in BLOCK.finditer(text)
        if match[1] == language and not FILE.match(match[2])
    ]


def run(arguments: list[str], directory: Path, **more: str) -> str:
    # The commands of this very interpreter come first, as the guide has it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **more}
    done = subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def run_block(block: Block, directory: Path, **more: str) -> None:
    for name, text in block.files.items():
        (directory / name).write_text(text)
    printed = run([sys.executable, "-W", "error", "-c", block.code], directory, **more)
    assert block.prints is None or printed == block.prints


def give_up(directory: Path) -> None:
    layout = Layout(directory)
    if layout.config.exists():
        LocalCluster(layout, layout.load(), lambda _: None).abandon()


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("docs") / "c"
    try:
        run(["corral", "up", "--nodes=3", f"--dir={directory}"], directory.parent)
        yield str(Layout(directory).node(1).socket)
    finally:
        give_up(directory)


@pytest.mark.parametrize("block", [b for b in blocks("python") if "connect()" in b.code], ids=lambda b: b.name)
def test_examples_that_connect(block: Block, socket: str, tmp_path: Path) -> None:
    run_block(block, tmp_path, CORRAL_SOCKET=socket)


@pytest.mark.parametrize("block", [b for b in blocks("python") if "connect()" not in b.code], ids=lambda b: b.name)
def test_examples_that_stand_alone(block: Block, tmp_path: Path) -> None:
    run_block(block, tmp_path)


@pytest.mark.fuse
def test_the_first_steps(tmp_path: Path) -> None:
    """One shell for all blocks, as a reader's is; it stops at the first command that fails."""
    steps = [block.code for block in blocks("sh") if block.name.startswith("getting-started.md")]
    assert len(steps) > 5
    try:
        run(["bash", "-euo", "pipefail", "-c", "\n".join(steps)], tmp_path)
    finally:
        give_up(tmp_path / "try")
    assert not [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(tmp_path) in line]
