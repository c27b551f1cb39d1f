"""Where FUSE tests get their mounts from, and what cleans up after them whatever happens."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from corral import fuse
from corral.fuse.mounting import FUSERMOUNT
from tests.integration.memfs import MemoryFilesystem

ROOT_DIRECTORY = Path(__file__).parents[2]


def why_no_fuse() -> str | None:
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse (modprobe fuse, or pass --device /dev/fuse to the container)"
    if os.geteuid() != 0 and shutil.which(FUSERMOUNT) is None:
        return "mounting as an ordinary user needs fusermount3 (apt-get install fuse3)"
    return None


needs_fuse = [pytest.mark.fuse, pytest.mark.skipif(why_no_fuse() is not None, reason=str(why_no_fuse()))]


def mountpoint_in(directory: Path) -> Iterator[Path]:
    """A mountpoint that is unmounted at the end, also when the test failed or its server was killed."""
    path = directory / "mnt"
    path.mkdir()
    yield path
    while fuse.mounted_at(str(path)) is not None:
        fuse.unmount(str(path), lazy=True)
    path.rmdir()


class Server:
    """A process that serves an empty filesystem; its client is the test itself, with plain system calls."""

    def __init__(self, mountpoint: Path, *options: str, serves: str = "memfs") -> None:
        self.mountpoint = mountpoint
        self.serves = serves
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"tests.integration.{serves}_server", str(mountpoint), *options],
            cwd=ROOT_DIRECTORY,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"mounted\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def unmount(self) -> dict[str, Any]:
        """The statistics of its session."""
        fuse.unmount(str(self.mountpoint), lazy=False)
        output, _ = self.process.communicate(timeout=10)
        assert self.process.returncode == 0
        return json.loads(output)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


def serve(
    mountpoint: Path,
    story: Callable[[fuse.Mount, MemoryFilesystem], Awaitable[None]],
    *,
    entry_valid_ns: int = 0,
    attr_valid_ns: int = 0,
    may_reply: Callable[[], bool] | None = None,
    limits: fuse.Limits | None = None,
) -> None:
    """Mounts in this process and runs the story beside the server; system calls of the story go through threads (only
    those that let go of the interpreter) or through another process (`python`)."""

    async def run() -> None:
        made: list[MemoryFilesystem] = []

        def make(notifier: Any) -> MemoryFilesystem:
            made.append(MemoryFilesystem(notifier, entry_valid_ns=entry_valid_ns, attr_valid_ns=attr_valid_ns))
            return made[0]

        options = fuse.Options(limits=limits or fuse.Limits())
        async with await fuse.mount(make, str(mountpoint), options, may_reply=may_reply) as mounted:
            await asyncio.wait_for(story(mounted, made[0]), 20)
        assert made[0].destroyed

    uvloop.run(run())


async def python(code: str, *arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *map(str, arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )


async def ended(process: asyncio.subprocess.Process) -> bytes:
    """Closes its input, waits for its end and returns what it printed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    output = await process.stdout.read()
    await process.wait()
    return output
