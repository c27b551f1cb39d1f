"""Making and checking filesystems on images and devices, from the command line."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from corral.base.errors import ClusterError
from corral.base.world import Disk, World
from corral.gfs import fsck
from corral.gfs.fsck import Report
from corral.gfs.mkfs import Made
from corral.gfs.mkfs import format as make
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused
from corral.real.world import RealWorld

T = TypeVar("T")


def _on_disk(path: Path, work: Callable[[World, Disk], Coroutine[Any, Any, T]]) -> T:
    """Runs `work` on the opened device. Raises what it raises, and OSError when the device cannot be opened."""

    async def body() -> T:
        world = RealWorld("/nonexistent")  # no state is kept
        try:
            disk = await world.disk(str(path))
            try:
                return await work(world, disk)
            finally:
                disk.close()
        finally:
            await world.close()

    return asyncio.run(body())


def mkfs(path: Path, size: int | None, *, cluster: str, name: str, journals: int) -> Made:
    """Makes a filesystem; an image that does not exist is made `size` bytes long. Raises ClusterError."""

    made_here = False
    try:
        if not path.exists():
            if size is None:
                raise ClusterError(f"{path} does not exist; give --size to make an image")
            with path.open("xb") as file:
                made_here = True
                os.truncate(file.fileno(), size)
        return _on_disk(path, lambda world, disk: make(world, disk, cluster=cluster, name=name, journals=journals))
    except OSError as error:
        if made_here:
            path.unlink(missing_ok=True)  # half an image would be taken for a whole one the next time
        raise ClusterError(f"no filesystem could be made on {path}: {error.strerror or error}") from None


def check(path: Path, *, repair: bool = False, progress: Callable[[str, int, int], None] | None = None) -> Report:
    """Checks a filesystem that is mounted nowhere. Raises ClusterError when it cannot be checked at all."""

    try:
        return _on_disk(path, lambda world, disk: fsck.check(world, disk, repair=repair, progress=progress))
    except (Refused, JournalDamaged) as error:
        raise ClusterError(f"{path}: {error}") from None
    except OSError as error:
        raise ClusterError(f"{path} cannot be checked: {error.strerror or error}") from None


def summary(report: Report) -> str:
    """One line."""
    if report.clean:
        return f"clean: {report.inodes} inodes, {report.directories} directories, {report.blocks_used} blocks used"
    left = sum(not finding.repaired for finding in report.findings)
    return f"{len(report.findings)} findings, {len(report.findings) - left} repaired, {left} left"
