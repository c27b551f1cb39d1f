"""The filesystem from an application: as `os` on a plain directory, and silent while the node may not act."""

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from corral.api.gfs import Caller
from corral.base.time import MILLISECOND
from corral.cli.demo.plain import PlainFiles
from corral.cli.demo.trees import Differs, compare, copy
from corral.files import Files
from corral.files.gate import Gate
from corral.gfs import fsck, mkfs
from corral.gfs.mount import mount
from corral.real.world import RealWorld

CREATE = os.O_RDWR | os.O_CREAT


def alone(directory: Path, story: Callable[[Files], Awaitable[None]], gate: Gate | None = None) -> None:
    """On a fresh filesystem that nobody else mounts; fsck has the last word."""

    async def run() -> None:
        world = RealWorld(str(directory), guest=True)
        try:
            image = directory / "image"
            with image.open("wb") as file:
                file.truncate(64 << 20)
            disk = await world.disk(str(image))
            await mkfs.format(world, disk, cluster="test", name="files", journals=1)
            filesystem = await mount(world, disk, None, slot=0)
            await filesystem.start(None)
            filesystem.finish(None)
            await filesystem.go_live()
            known = {number for number, inode in filesystem.inodes.items() if inode.lookups}
            caller = Caller(os.geteuid(), os.getegid(), os.getpid())
            await story(Files(filesystem, caller, gate or Gate(lambda: True, MILLISECOND)))
            assert {number for number, inode in filesystem.inodes.items() if inode.lookups} == known
            assert not filesystem.handles
            await filesystem.destroy()
            assert not (await fsck.check(world, disk)).findings
        finally:
            await world.close()

    asyncio.run(asyncio.wait_for(run(), 30))


async def outcome(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except OSError as error:
        return errno.errorcode[error.errno or 0]


async def both(one: Any, other: PlainFiles, call: str, *arguments: Any, **named: Any) -> None:
    """The same call has the same result on both."""
    results = []
    for files in (one, other):
        result = await outcome(getattr(files, call)(*arguments, **named))
        if call == "stat" and not isinstance(result, str):
            result = (oct(result.mode), result.nlink if stat.S_ISREG(result.mode) else 0, result.mtime_ns)
        results.append(sorted(map(tuple, result)) if call == "scandir" and not isinstance(result, str) else result)
    assert results[0] == results[1], (call, arguments)


def test_paths_mean_what_they_mean_to_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()

    async def story(files: Files) -> None:
        plain = PlainFiles(tmp_path / "plain")

        async def same(call: str, *arguments: Any, **named: Any) -> None:
            await both(files, plain, call, *arguments, **named)

        await same("mkdir", "a")
        await same("mkdir", "/a/b")
        await same("mkdir", "a")
        await same("mkdir", "nowhere/c")
        await same("symlink", "b", "a/to-b")
        await same("symlink", "../a/to-b", "a/to-to-b")
        await same("symlink", "loop", "loop")
        await same("symlink", "nothing", "dangling")
        for target in (files, plain):
            async with target.open("a/to-to-b/file", CREATE, 0o640) as file:
                assert await file.pwrite(b"x" * 5000, 100) == 5000
            async with target.open("a/b/other", CREATE) as file:
                assert await file.pread(10, 0) == b""
        await same("utime", "a/b/file", 7, 1_234_567_890_123_456_789)
        await same("chmod", "a/b/file", 0o4711)
        for path in ("a/b/file", "/a//./to-b/file", "a/b/../b/file", "a/to-to-b/../b/file", "a/b/file/x", "loop"):
            await same("read", path)
        await same("stat", "a/to-b/file")
        await same("stat", "dangling")
        await same("readlink", "a/to-b")
        await same("readlink", "a/b")
        await same("read", "a")
        await same("scandir", "a")
        await same("scandir", "a/b/file")
        await same("scandir", "/")
        assert await outcome(files.open("a/b/file", CREATE | os.O_EXCL)) == "EEXIST"
        assert await outcome(files.open("a/to-b", os.O_NOFOLLOW)) == "ELOOP"
        assert await outcome(files.mkdir("/")) == "EEXIST"
        await files.rename("a/b/file", "moved")
        await files.link("moved", "a/again")
        await files.unlink("moved")
        assert (await files.stat("a/again")).size == 5100
        assert await outcome(files.rmdir("a")) == "ENOTEMPTY"

    alone(tmp_path, story)


def test_a_file_is_read_and_written_as_it_was_opened(tmp_path: Path) -> None:
    async def story(files: Files) -> None:
        async with files.open("f", os.O_WRONLY | os.O_CREAT) as writing, files.open("f") as reading:
            assert await outcome(writing.pread(1, 0)) == "EBADF"
            assert await outcome(reading.pwrite(b"1", 0)) == "EBADF"
            assert await outcome(reading.truncate(0)) == "EBADF"
            data = os.urandom(3 << 20)
            assert await writing.pwrite(data, 0) == len(data)
            assert await writing.append(b"end") == 3
            assert await reading.pread(4 << 20, 0) == data + b"end"
            await writing.flock()
            assert await outcome(reading.flock(exclusive=False, wait=False)) == "EAGAIN"
            await writing.unlock()
            await reading.flock(exclusive=False, wait=False)
            await writing.truncate(5)
            assert await files.read("f") == data[:5]
            await files.unlink("f")  # what is open stays whole
            assert await reading.pread(9, 0) == data[:5]
        assert await outcome(writing.pwrite(b"1", 0)) == "EBADF"
        await writing.close()
        assert await files.listdir() == []

    alone(tmp_path, story)


def test_trees_are_copied_and_a_difference_is_found(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    for number in range(30):
        (source / "sub" / f"{number}.bin").write_bytes(os.urandom(number * 1000))
    (source / "link").symlink_to("sub/3.bin")
    os.utime(source / "sub", ns=(5, 1_000_000_007))

    async def story(files: Files) -> None:
        here = PlainFiles(Path("/"))
        await files.mkdir("tree")
        assert await copy(here, str(source), files, "tree") == 31
        assert await compare(here, str(source), files, "tree") == 31
        async with files.open("tree/sub/9.bin", os.O_RDWR) as file:
            (last,) = await file.pread(1, 8999)
            await file.pwrite(bytes([last ^ 0xFF]), 8999)
        with pytest.raises(Differs, match=r"9\.bin has other bytes"):
            await compare(here, str(source), files, "tree")
        await files.unlink("tree/sub/9.bin")
        with pytest.raises(Differs, match=r"other names.*9\.bin"):
            await compare(here, str(source), files, "tree")

    alone(tmp_path, story)


def test_no_answer_leaves_while_the_node_may_not_act(tmp_path: Path) -> None:
    may_act = True
    gate = Gate(lambda: may_act, MILLISECOND)

    async def story(files: Files) -> None:
        nonlocal may_act
        async with files.open("f", CREATE) as file:
            may_act = False
            answers = [asyncio.create_task(outcome(work)) for work in (file.pwrite(b"1", 0), files.stat("absent"))]
            await asyncio.sleep(0.05)
            assert not any(answer.done() for answer in answers)
            may_act = True
            assert [await answer for answer in answers] == [1, "ENOENT"]

            may_act = False
            lost = asyncio.create_task(outcome(file.fsync()))
            cancelled = asyncio.create_task(file.fsync())
            await asyncio.sleep(0.01)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            gate.lose("fenced")
            assert await lost == "EIO"
            may_act = True
            assert await outcome(files.listdir()) == "EIO"

    alone(tmp_path, story, gate)
