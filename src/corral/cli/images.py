"""Making and checking filesystems on images and devices, from the command line."""

import asyncio
import os
from pathlib import Path

from corral.base.errors import ClusterError
from corral.gfs.mkfs import Made
from corral.gfs.mkfs import format as make
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

    try:
        if not path.exists():
            if size is None:
                raise ClusterError(f"{path} does not exist; give --size to make an image")
            with path.open("xb") as file:
                os.truncate(file.fileno(), size)
        return asyncio.run(body())
    except OSError as error:
        raise ClusterError(f"no filesystem could be made on {path}: {error.strerror or error}") from None


def fsck(path: Path) -> str:
    """Checks an unmounted filesystem and changes nothing. Raises ClusterError when anything is wrong."""
    raise ClusterError("this version has no fsck yet")
