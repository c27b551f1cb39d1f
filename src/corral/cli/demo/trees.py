"""Trees of files: copied and compared, whatever each side is reached by."""

from collections.abc import AsyncIterator
from stat import S_IFMT, S_IMODE, S_ISDIR, S_ISLNK
from typing import TYPE_CHECKING, Union

from corral.api.gfs import Attributes
from corral.cli.demo.plain import PlainFiles

if TYPE_CHECKING:
    from corral.files import Files

AnyFiles = Union[PlainFiles, "Files"]

CREATE = 0o101  # O_WRONLY | O_CREAT


class Differs(Exception):
    """Two trees that should be the same are not; the message says where."""


async def walk(files: AnyFiles, top: str) -> AsyncIterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, in a fixed order: (path, names of directories, other names)."""
    pending = [top]
    while pending:
        path = pending.pop()
        names: list[str] = []
        leaves: list[str] = []
        for name, kind in sorted(await files.scandir(path)):
            (names if S_ISDIR(kind) else leaves).append(name)
        yield path, names, leaves
        pending += [f"{path}/{name}" for name in reversed(names)]


async def copy(source: AnyFiles, top: str, target: AnyFiles, there: str) -> int:
    """Files, directories, symbolic links, with modes and times; `there` exists. Returns how many files."""
    copied = 0
    directories: list[str] = []
    async for path, names, leaves in walk(source, top):
        into = there + path.removeprefix(top)
        for name in names:
            await target.mkdir(f"{into}/{name}")
        for name in leaves:
            await _copy_one(source, f"{path}/{name}", target, f"{into}/{name}")
        copied += len(leaves)
        directories.append(path)
    for path in reversed(directories):  # what is made in a directory changes its time
        await _copy_attributes(source, path, target, there + path.removeprefix(top))
    return copied


async def _copy_one(source: AnyFiles, path: str, target: AnyFiles, there: str) -> None:
    if S_ISLNK((await source.stat(path, follow=False)).mode):
        await target.symlink(await source.readlink(path), there)
        return
    data = await source.read(path)
    async with target.open(there, CREATE) as file:
        written = 0
        while written < len(data):
            written += await file.pwrite(data[written:], written)
    await _copy_attributes(source, path, target, there)


async def _copy_attributes(source: AnyFiles, path: str, target: AnyFiles, there: str) -> None:
    found = await source.stat(path)
    await target.chmod(there, S_IMODE(found.mode))
    await target.utime(there, found.atime_ns, found.mtime_ns)


async def compare(source: AnyFiles, top: str, target: AnyFiles, there: str) -> int:
    """Every name, byte, mode and modification time. Returns how many files were the same; raises Differs."""
    compared = 0
    async for path, names, leaves in walk(source, top):
        other = there + path.removeprefix(top)
        found = sorted(name for name, _ in await target.scandir(other))
        if found != sorted([*names, *leaves]):
            odd = sorted(set(found) ^ {*names, *leaves})[:3]
            raise Differs(f"{other} has other names than the source: {', '.join(odd)}")
        for name in leaves:
            await _compare_one(source, f"{path}/{name}", target, f"{other}/{name}")
        compared += len(leaves)
        if _told(await source.stat(path)) != _told(await target.stat(other)):
            raise Differs(f"mode or time of directory {other} differs")
    return compared


def _told(attributes: Attributes) -> tuple[int, int]:
    return S_IMODE(attributes.mode), attributes.mtime_ns


async def _compare_one(source: AnyFiles, path: str, target: AnyFiles, there: str) -> None:
    one, other = await source.stat(path, follow=False), await target.stat(there, follow=False)
    if S_IFMT(one.mode) != S_IFMT(other.mode):
        raise Differs(f"{there} is of another type than its source")
    if S_ISLNK(one.mode):
        if await source.readlink(path) != await target.readlink(there):
            raise Differs(f"{there} points elsewhere than its source")
        return
    if await source.read(path) != await target.read(there):
        raise Differs(f"{there} has other bytes than its source")
    if _told(one) != _told(other):
        raise Differs(f"mode or time of {there} is {_told(other)}, not {_told(one)}")
