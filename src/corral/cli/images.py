"""Making and checking filesystems on images and devices, from the command line."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from corral.base.errors import ClusterError
from corral.gfs import fsck
from corral.gfs.fsck import Report
from corral.gfs.mkfs import Made
from corral.gfs.mkfs import format as make
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused
from corral.real.world import RealWorld


def mkfs(path: Path, size: int | None, *, cluster: str, name: str, journals: int) -> Made:
    """Makes a filesystem; an image that does not exist is made `size` bytes long. Raises ClusterError."""

    async def body() -> Made:
        world = RealWorld("/nonexistent")
        try:
            disk = await world.disk(str(path))
            try:
                return await make(world, disk, cluster=cluster, name=name, journals=journals)
            finally:
                disk.close()
        finally:
            await world.close()

    made_here = False
    try:
        if not path.exists():
            if size is None:
                raise ClusterError(f"{path} does not exist; give --size to make an image")
            with path.open("xb") as file:
                made_here = True
                os.truncate(file.fileno(), size)
        return asyncio.run(body())
    except OSError as error:
        if made_here:
            path.unlink(missing_ok=True)  # half an image would be taken for a whole one the next time
        raise ClusterError(f"no filesystem could be made on {path}: {error.strerror or error}") from None


def check(path: Path, *, repair: bool = False, progress: Callable[[str, int, int], None] | None = None) -> Report:
    """Checks a filesystem that is mounted nowhere. Raises ClusterError when it cannot be checked at all."""

    async def body() -> Report:
        world = RealWorld("/nonexistent")
        try:
            disk = await world.disk(str(path))
            try:
                return await fsck.check(world, disk, repair=repair, progress=progress)
            finally:
                disk.close()
        finally:
            await world.close()

    try:
        return asyncio.run(body())
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
