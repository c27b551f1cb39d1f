"""The shared filesystem without asyncio: what `corral.files` has, blocking, from any thread."""

import os
from typing import final

from corral import files as asynchronous
from corral.api.gfs import Attributes, FilesystemUsage
from corral.base.world import Buffer
from corral.files.paths import Listed, Path
from corral.sync.loop import Closing, LoopThread


@final
class File(Closing):
    """As `corral.files.File`; close it, or use it in a `with`."""

    def __init__(self, loop: LoopThread, file: asynchronous.File) -> None:
        self._loop = loop
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        return self._loop.call(self._file.pread(size, offset))

    def pwrite(self, data: Buffer, offset: int) -> int:
        return self._loop.call(self._file.pwrite(data, offset))

    def append(self, data: Buffer) -> int:
        return self._loop.call(self._file.append(data))

    def truncate(self, size: int) -> None:
        self._loop.call(self._file.truncate(size))

    def stat(self) -> Attributes:
        return self._loop.call(self._file.stat())

    def fsync(self) -> None:
        self._loop.call(self._file.fsync())

    def flock(self, *, exclusive: bool = True, wait: bool = True) -> None:
        self._loop.call(self._file.flock(exclusive=exclusive, wait=wait))

    def unlock(self) -> None:
        self._loop.call(self._file.unlock(), goes_on=True)

    def close(self) -> None:
        self._loop.call(self._file.close(), goes_on=True)


@final
class Files(Closing):
    """As `corral.files.Files`; close it, or use it in a `with`: until then this process is part of the cluster."""

    def __init__(self, loop: LoopThread, opening: asynchronous.Opening, files: asynchronous.Files) -> None:
        self._loop = loop
        self._opening = opening
        self._files = files

    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> File:
        async def opened() -> asynchronous.File:
            return await self._files.open(path, flags, mode)

        loop = self._loop
        return File(loop, loop.call(opened(), lambda file: loop.begin(file.close())))

    def read(self, path: Path) -> bytes:
        return self._loop.call(self._files.read(path))

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        self._loop.call(self._files.mkdir(path, mode))

    def symlink(self, target: Path, path: Path) -> None:
        self._loop.call(self._files.symlink(target, path))

    def link(self, existing: Path, path: Path) -> None:
        self._loop.call(self._files.link(existing, path))

    def unlink(self, path: Path) -> None:
        self._loop.call(self._files.unlink(path))

    def rmdir(self, path: Path) -> None:
        self._loop.call(self._files.rmdir(path))

    def rename(self, path: Path, new: Path, flags: int = 0) -> None:
        self._loop.call(self._files.rename(path, new, flags))

    def readlink(self, path: Path) -> str:
        return self._loop.call(self._files.readlink(path))

    def scandir(self, path: Path = "/") -> list[Listed]:
        return self._loop.call(self._files.scandir(path))

    def listdir(self, path: Path = "/") -> list[str]:
        return self._loop.call(self._files.listdir(path))

    def stat(self, path: Path, *, follow: bool = True) -> Attributes:
        return self._loop.call(self._files.stat(path, follow=follow))

    def chmod(self, path: Path, mode: int) -> None:
        self._loop.call(self._files.chmod(path, mode))

    def chown(self, path: Path, uid: int, gid: int) -> None:
        self._loop.call(self._files.chown(path, uid, gid))

    def utime(self, path: Path, atime_ns: int, mtime_ns: int, *, follow: bool = True) -> None:
        self._loop.call(self._files.utime(path, atime_ns, mtime_ns, follow=follow))

    def truncate(self, path: Path, size: int) -> None:
        self._loop.call(self._files.truncate(path, size))

    def statfs(self) -> FilesystemUsage:
        return self._loop.call(self._files.statfs())

    def close(self) -> None:
        """Everything durable, the journal clean, the cluster left."""
        try:
            self._loop.call(self._opening.__aexit__(None, None, None))
        finally:
            self._loop.close()


def open_filesystem(device: str | os.PathLike[str], socket: str | os.PathLike[str] | None = None) -> Files:
    """As `corral.open_filesystem`."""
    loop = LoopThread()
    try:
        opening = asynchronous.open_filesystem(device, socket)
        return Files(loop, opening, loop.call(opening.__aenter__()))
    except BaseException:
        loop.close()
        raise
