"""Files of a directory by plain system calls, under the same names as `corral.files.Files`, so that an application of
the demo is written once. Nothing of corral's is between it and the kernel."""

import fcntl
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import final

from corral.api.gfs import Attributes


@final
class PlainFiles:
    """Paths are relative to `root`, with or without a leading slash."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _at(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    @asynccontextmanager
    async def open(self, path: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> AsyncIterator["PlainFile"]:
        descriptor = os.open(self._at(path), flags, mode)
        try:
            yield PlainFile(descriptor)
        finally:
            os.close(descriptor)  # gives an flock back

    async def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    async def mkdir(self, path: str, mode: int = 0o755) -> None:
        os.mkdir(self._at(path), mode)

    async def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._at(path))

    async def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    async def scandir(self, path: str = "/") -> list[tuple[str, int]]:
        with os.scandir(self._at(path)) as entries:
            return [(entry.name, _type(entry)) for entry in entries]

    async def stat(self, path: str, *, follow: bool = True) -> Attributes:
        found = os.stat(self._at(path), follow_symlinks=follow)
        return Attributes(
            found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, found.st_size,
            found.st_blocks, found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns,
        )  # fmt: skip

    async def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    async def utime(self, path: str, atime_ns: int, mtime_ns: int, *, follow: bool = True) -> None:
        os.utime(self._at(path), ns=(atime_ns, mtime_ns), follow_symlinks=follow)


@final
class PlainFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    async def pwrite(self, data: bytes, offset: int) -> int:
        return os.pwrite(self._descriptor, data, offset)

    async def append(self, data: bytes) -> int:
        """The file was opened O_APPEND."""
        return os.write(self._descriptor, data)

    async def fsync(self) -> None:
        os.fsync(self._descriptor)

    async def flock(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)


def _type(entry: "os.DirEntry[str]") -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
