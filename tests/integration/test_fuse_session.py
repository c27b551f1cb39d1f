"""The session with the real kernel: waiting, signals, locks, freezing, death, unmounting.

The server runs in this process. Its clients are threads (for system calls that let go of the interpreter) and other
processes. A server must not start a process while it has a file open on its own mount: closing the child's copy asks
the server, which stands still until the child has started.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from corral import fuse
from corral.fuse.mounting import FUSERMOUNT
from tests.integration.fuse_support import Server, ended, mountpoint_in, needs_fuse, python, serve
from tests.integration.memfs import MemoryFilesystem

pytestmark = needs_fuse

T = TypeVar("T")
MINUTE = 60 * 1_000_000_000


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    yield from mountpoint_in(tmp_path)


async def call(function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def start(function: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
    return asyncio.ensure_future(call(function, *arguments))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(0.002)


async def open_file(path: Path, flags: int = os.O_CREAT | os.O_RDWR) -> int:
    return await call(os.open, path, flags)


# --- waiting -------------------------------------------------------------------------------------------------------


def test_a_waiting_request_holds_up_no_other(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        filesystem.gate("mkdir")
        making = start(os.mkdir, mountpoint / "slow")
        await filesystem.arrived["mkdir"].wait()
        assert (await call(os.statvfs, mountpoint)).f_bsize == 4096
        assert (await call(os.stat, mountpoint)).st_ino == 1
        assert not making.done()
        filesystem.open_gate("mkdir")
        await making
        assert filesystem.at("slow").is_dir()

    serve(mountpoint, story)


def test_waiting_direct_writes_keep_their_data(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        files = [await open_file(mountpoint / str(number)) for number in range(6)]
        filesystem.gate("write")
        contents = [os.urandom(1 << 20) for _ in files]
        writing = [start(os.pwrite, fd, content, 0) for fd, content in zip(files, contents, strict=True)]
        await until(lambda: mounted.session.statistics().waiting == 6)
        filesystem.open_gate("write")
        assert await asyncio.gather(*writing) == [1 << 20] * 6
        assert [bytes(filesystem.at(str(number)).data) for number in range(6)] == contents
        for fd in files:
            await call(os.close, fd)

    serve(mountpoint, story)


def test_synchronous_writes_are_followed_by_fsync(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        for flag, kind in ((os.O_SYNC, "fsync"), (os.O_DSYNC, "fdatasync")):
            for direct in (0, os.O_DIRECT):
                before = filesystem.hits[kind]
                fd = await open_file(mountpoint / "file", os.O_CREAT | os.O_WRONLY | flag | direct)
                await call(os.write, fd, bytes(4096))
                await call(os.close, fd)
                assert filesystem.hits[kind] == before + 1

    serve(mountpoint, story)


# --- locks and signals ---------------------------------------------------------------------------------------------

TAKE_LOCK = """
import errno, fcntl, signal, sys
def stop(*_): raise InterruptedError(errno.EINTR, "by the handler")
signal.signal(signal.SIGUSR1, stop)
file = open(sys.argv[1], "rb+")
try:
    (fcntl.lockf if sys.argv[2] == "lockf" else fcntl.flock)(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("how", ["lockf", "flock"])
def test_a_blocked_lock_is_interrupted_by_a_signal(mountpoint: Path, how: str) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        holder, waiter = await two_lockers(mountpoint / "file", how, filesystem)
        waiter.send_signal(signal.SIGUSR1)
        assert (await ended(waiter)) == b"EINTR\n"
        assert mounted.session.statistics().interrupted == 1
        await ended(holder)

    serve(mountpoint, story)


@pytest.mark.parametrize("how", ["lockf", "flock"])
def test_a_blocked_lock_is_granted_when_its_holder_dies(mountpoint: Path, how: str) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        holder, waiter = await two_lockers(mountpoint / "file", how, filesystem)
        holder.kill()
        assert (await ended(waiter)) == b"locked\n"
        await ended(holder)

    serve(mountpoint, story)


async def two_lockers(path: Path, how: str, filesystem: MemoryFilesystem) -> list[asyncio.subprocess.Process]:
    """The first holds the lock, the second waits for it."""
    await call(path.touch)
    holder = await python(TAKE_LOCK, path, how)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"locked\n"
    waiter = await python(TAKE_LOCK, path, how)
    await until(lambda: filesystem.hits["lock waits"] == 1)
    return [holder, waiter]


STAT_UNDER_ALARM = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
print(os.stat(sys.argv[1]).st_size)
"""


def test_a_handled_signal_does_not_break_stat(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        await call((mountpoint / "file").write_bytes, b"12345")
        filesystem.gate("lookup")
        client = await python(STAT_UNDER_ALARM, mountpoint / "file")
        await filesystem.arrived["lookup"].wait()
        client.send_signal(signal.SIGUSR1)
        await until(lambda: mounted.session.statistics().requests.get("INTERRUPT", 0) > 0)
        filesystem.open_gate("lookup")
        output = await ended(client)
        assert output.split() == [b"handled", b"5"]
        assert mounted.session.statistics().interrupted == 0

    serve(mountpoint, story)


def test_kill_9_ends_a_process_that_waits_for_the_filesystem(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        await call((mountpoint / "file").write_bytes, b"12345")
        filesystem.gate("lookup")
        client = await python(STAT_UNDER_ALARM, mountpoint / "file")
        await filesystem.arrived["lookup"].wait()
        client.kill()
        assert await client.wait() == -signal.SIGKILL
        assert mounted.session.statistics().interrupted == 1
        filesystem.open_gate("lookup")

    serve(mountpoint, story)


# --- freezing and withdrawing --------------------------------------------------------------------------------------


def test_frozen_answers_leave_when_thawed(mountpoint: Path) -> None:
    may = [True]

    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        await call((mountpoint / "file").write_bytes, b"12345")
        fd = await open_file(mountpoint / "file", os.O_RDONLY)
        may[0] = False
        reading = start(os.pread, fd, 5, 0)
        await until(lambda: mounted.session.statistics().held > 0)
        filesystem.at("file").data[:] = b"other"  # what was read before the freeze is what is answered
        assert not reading.done()
        may[0] = True
        mounted.session.thaw()
        assert await reading == b"12345"
        await call(os.close, fd)

    serve(mountpoint, story, may_reply=lambda: may[0])


def test_withdrawal_answers_eio_and_leaves_nothing_mounted(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        fd = await open_file(mountpoint / "file")
        filesystem.gate("mkdir")
        making = start(os.mkdir, mountpoint / "slow")
        await filesystem.arrived["mkdir"].wait()
        mounted.session.withdraw("the lease lapsed")
        with pytest.raises(OSError) as failed:
            await making
        assert failed.value.errno == errno.EIO
        with pytest.raises(fuse.Withdrawn, match="the lease lapsed"):
            await mounted.run()
        with pytest.raises(OSError) as failed:
            await call(os.fstat, fd)
        assert failed.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        assert fuse.mounted_at(str(mountpoint)) is None
        assert filesystem.destroyed
        with contextlib.suppress(OSError):  # it says ENOTCONN and closes
            os.close(fd)

    serve(mountpoint, story)


# --- mounting, unmounting, death -----------------------------------------------------------------------------------


def test_a_killed_server_leaves_a_dead_mount_that_the_next_one_clears(mountpoint: Path) -> None:
    server = Server(mountpoint)
    (mountpoint / "file").touch()
    server.kill()
    assert fuse.is_dead(str(mountpoint))
    with pytest.raises(OSError) as failed:
        os.stat(mountpoint)
    assert failed.value.errno == errno.ENOTCONN
    again = Server(mountpoint)
    assert not fuse.is_dead(str(mountpoint))
    assert os.listdir(mountpoint) == []
    again.unmount()
    assert not fuse.clear_dead(str(mountpoint))


def test_a_mount_in_use_is_not_unmounted_unless_lazily(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        fd = await open_file(mountpoint / "file")
        with pytest.raises(fuse.MountError, match="is in use; see by whom with: fuser -vm"):
            await mounted.unmount()
        gone = asyncio.ensure_future(mounted.unmount(lazy=True))
        await until(lambda: fuse.mounted_at(str(mountpoint)) is None)
        assert await call(os.write, fd, b"still here") == 10
        assert not gone.done()
        await call(os.close, fd)
        await gone
        assert filesystem.destroyed

    serve(mountpoint, story)


def test_what_cannot_be_mounted_says_why(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        with pytest.raises(fuse.MountError, match=r"already a mountpoint \(fuse.corral from corral\)"):
            await fuse.mount(MemoryFilesystem, str(mountpoint))

    serve(mountpoint, story)


def test_an_unmount_from_outside_ends_the_session(mountpoint: Path) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        await call(lambda: fuse.unmount(str(mountpoint), lazy=False))
        await mounted.run()
        assert filesystem.destroyed

    serve(mountpoint, story)


AS_NOBODY = """
import asyncio, concurrent.futures.thread, os, sys
from corral import fuse
from tests.integration.memfs import MemoryFilesystem
path = sys.argv[1]
if os.stat("/dev/fuse").st_mode & 0o006 == 0o006:
    os.chown(path, 65534, 65534)
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
else:  # no udev has opened the device to everybody: only walk the ordinary user's way
    os.geteuid = lambda: 65534
async def main():
    async with await fuse.mount(MemoryFilesystem, path) as mounted:
        def use():
            with open(path + "/file", "w") as file:
                file.write("hello")
            return open(path + "/file").read()
        print(await asyncio.get_running_loop().run_in_executor(None, use), flush=True)
        mine = fuse.mounted_at(path)
        print(mine.type)
    print(fuse.mounted_at(path))
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user")
def test_an_ordinary_user_mounts_through_fusermount3(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which(FUSERMOUNT) is None:
        pytest.skip("fusermount3 is missing (apt-get install fuse3)")
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own directories are closed to others
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, directory],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=20,
        )
        fuse.unmount(directory, lazy=True)
    assert done.stdout.split() == ["hello", "fuse.corral", "None"], done.stderr


@pytest.mark.parametrize("told", [True, False])
def test_a_close_is_told_only_where_the_filesystem_wants_it(mountpoint: Path, told: bool) -> None:
    async def story(mounted: fuse.Mount, filesystem: MemoryFilesystem) -> None:
        if mounted.session.statistics().minor < 35:
            pytest.skip("this kernel always tells (before Linux 5.16)")
        filesystem.tell_close = told
        await call((mountpoint / "file").write_bytes, b"x")
        await call((mountpoint / "file").read_bytes)
        assert filesystem.hits["flush"] == (2 if told else 0)

    serve(mountpoint, story)
