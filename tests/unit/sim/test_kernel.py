"""The model of the kernel's FUSE client: its caches believe what they may, its locks hang where the real ones do."""

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from corral.api.gfs import Attributes, Caller, Entry
from corral.base.time import SECOND
from corral.base.world import Buffer, World
from corral.sim.kernel import PAGE, SimKernel
from corral.sim.simulation import Simulation
from corral.sim.syscalls import Syscalls
from tests.integration.memfs import MemoryFilesystem

from .rig import simulate

RDWR = os.O_RDWR | os.O_CREAT
DAY = 86_400 * SECOND


class Mount:
    """A kernel, a filesystem in memory served by an attached process, and one application."""

    def __init__(self, sim: Simulation, filesystem: MemoryFilesystem | None = None, **options: Any) -> None:
        machine = sim.machines["n1"]
        self.server = machine.attach("mount")
        self.kernel = SimKernel(self.server, **options)
        self.filesystem = filesystem or MemoryFilesystem(self.kernel, entry_valid_ns=DAY, attr_valid_ns=DAY)
        self.kernel.attach(self.filesystem)
        self.calls = Syscalls(self.kernel, machine.attach("application"))

    def asked(self, name: str) -> int:
        return self.kernel.requests.get(name, 0)


def on_mount(body: Callable[[Mount], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def prepared(sim: Simulation) -> None:
        await body(Mount(sim, **options))

    simulate(prepared)


async def hangs(work: Coroutine[Any, Any, Any]) -> bool:
    try:
        await asyncio.wait_for(work, 60)
    except TimeoutError:
        return True
    return False


def test_files_and_names_behave_as_posix_says() -> None:
    async def body(mount: Mount) -> None:
        calls = mount.calls
        await calls.mkdir("/d")
        file = await calls.open("/d/f", RDWR, 0o666)
        assert await calls.write(file, b"hello ") == 6
        assert await calls.write(file, b"world") == 5
        assert await calls.pread(file, 100, 6) == b"world"
        assert (await calls.fstat(file)).size == 11
        await calls.fsync(file)
        await calls.close(file)
        assert (await calls.stat("/d/f")).mode & 0o777 == 0o644
        with pytest.raises(FileExistsError):
            await calls.open("/d/f", RDWR | os.O_EXCL)
        await calls.symlink(b"d/f", "/s")
        await calls.symlink(b"/s", "/t")
        await calls.symlink(b"loop", "/loop")
        reader = await calls.open("/t")
        assert await calls.read(reader, 5) == b"hello"
        assert await calls.read(reader, 100) == b" world"
        with pytest.raises(OSError, match="symbolic") as loop:
            await calls.stat("/loop")
        assert loop.value.errno == errno.ELOOP
        await calls.link("/d/f", "/hard")
        assert (await calls.stat("/hard")).nlink == 2
        await calls.rename("/d/f", "/g")
        with pytest.raises(FileNotFoundError):
            await calls.stat("/d/f")
        await calls.unlink("/hard")
        with pytest.raises(OSError):
            await calls.unlink("/d")
        await calls.rmdir("/d")
        assert sorted(await calls.listdir("/")) == [b"g", b"loop", b"s", b"t"]
        await calls.truncate("/g", 3)
        assert await calls.pread(reader, 100, 0) == b"hel"
        await calls.open("/g", os.O_WRONLY | os.O_TRUNC)
        assert await calls.pread(reader, 100, 0) == b""

    on_mount(body)


def test_names_attributes_and_pages_are_believed_until_they_are_invalidated() -> None:
    async def body(mount: Mount) -> None:
        calls, kernel, filesystem = mount.calls, mount.kernel, mount.filesystem
        filesystem.keep = True
        file = await calls.open("/f", RDWR)
        await calls.write(file, b"old")
        await calls.pread(file, 3, 0)
        await calls.stat("/f")
        before = dict(kernel.requests)
        for _ in range(3):
            await calls.stat("/f")
            assert await calls.pread(file, 3, 0) == b"old"
        assert kernel.requests == before
        node = filesystem.at("/f")
        node.data[:] = b"newer"  # another node of the cluster
        assert await calls.pread(file, 9, 0) == b"old"
        await kernel.invalidate_inode(node.ino, -1)
        assert (await calls.stat("/f")).size == 5
        assert (await calls.pread(file, 9, 0))[:3] == b"old"  # attributes only: the page stays
        await kernel.invalidate_inode(node.ino)
        assert await calls.pread(file, 9, 0) == b"newer"
        del filesystem.root.children[b"f"]
        assert (await calls.stat("/f")).size == 5
        await kernel.invalidate_entry(1, b"f")
        with pytest.raises(FileNotFoundError):
            await calls.stat("/f")

    on_mount(body)


def test_an_epoch_ends_all_names_at_once_where_the_kernel_has_it() -> None:
    async def body(mount: Mount) -> None:
        await mount.calls.mkdir("/d")
        await mount.calls.stat("/d")
        asked = mount.asked("lookup")
        assert await mount.kernel.invalidate_all_entries() is mount.kernel.has_epoch
        await mount.calls.stat("/d")
        assert mount.asked("lookup") == asked + 1

    on_mount(body)
    on_mount(body, epoch=False)  # there every name is asked for every time


def test_an_open_without_keep_drops_the_pages() -> None:
    async def body(mount: Mount) -> None:
        file = await mount.calls.open("/f", RDWR)
        await mount.calls.write(file, b"old")
        await mount.calls.pread(file, 3, 0)
        mount.filesystem.at("/f").data[:] = b"new"
        assert await mount.calls.pread(file, 3, 0) == b"old"
        await mount.calls.open("/f")
        assert await mount.calls.pread(file, 3, 0) == b"new"

    on_mount(body)


def test_an_append_lands_at_the_end_the_filesystem_knows_and_leaves_a_wrong_page() -> None:
    async def body(mount: Mount) -> None:
        calls = mount.calls
        file = await calls.open("/f", RDWR | os.O_APPEND)
        await calls.write(file, b"one")
        await calls.pread(file, 3, 0)
        node = mount.filesystem.at("/f")
        node.data += b"TWO"  # another node appended; this kernel's size is stale
        await calls.write(file, b"end")
        assert node.data == b"oneTWOend"
        assert (await calls.pread(file, 9, 0))[:6] == b"oneend"
        await mount.kernel.invalidate_inode(node.ino)
        assert await calls.pread(file, 9, 0) == b"oneTWOend"

    on_mount(body)


def test_a_dirty_mapped_page_is_written_back_before_it_is_dropped() -> None:
    async def body(mount: Mount) -> None:
        calls = mount.calls
        file = await calls.open("/f", RDWR)
        await calls.write(file, bytes(2 * PAGE))
        await calls.map_write(file, b"mapped", PAGE + 5)
        node = mount.filesystem.at("/f")
        assert bytes(node.data) == bytes(2 * PAGE)
        assert await calls.pread(file, 6, PAGE + 5) == b"mapped"
        await mount.kernel.invalidate_inode(node.ino)
        assert node.data[PAGE + 5 : PAGE + 11] == b"mapped"
        assert mount.kernel.inode(node.ino).pages == {}
        await calls.map_write(file, b"again", 0)
        await calls.msync(file)
        assert node.data[:5] == b"again"

    on_mount(body)


class Notifying(MemoryFilesystem):
    """Awaits a notification before it answers, which is where the real kernel deadlocks."""

    kernel: SimKernel
    notify: Callable[[int], Coroutine[Any, Any, Any]] | None = None

    async def _told(self, ino: int) -> None:
        if self.notify is not None:
            await self.notify(ino)

    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry:
        await self._told(parent)
        return await super().lookup(parent, name, caller)

    async def read(self, ino: int, handle: int, offset: int, size: int) -> Sequence[Buffer]:
        await self._told(ino)
        return await super().read(ino, handle, offset, size)

    async def write(self, ino: int, handle: int, offset: int, data: Buffer, **how: bool) -> int:
        await self._told(ino)
        return await super().write(ino, handle, offset, data, **how)

    async def getattr(self, ino: int, handle: int | None) -> tuple[Attributes, int]:
        await self._told(ino)
        return await super().getattr(ino, handle)


def test_a_handler_that_awaits_the_wrong_notification_hangs() -> None:
    async def body(sim: Simulation) -> None:
        async def fresh() -> tuple[Mount, Notifying, Any]:
            filesystem = Notifying(attr_valid_ns=DAY)
            mount = Mount(sim, filesystem)
            file = await mount.calls.open("/f", RDWR)
            await mount.calls.write(file, b"data")
            mount.kernel.drop_caches()
            return mount, filesystem, file

        mount, filesystem, file = await fresh()
        filesystem.notify = mount.kernel.invalidate_inode
        assert await hangs(mount.calls.pread(file, 4, 0))
        mount, filesystem, file = await fresh()
        filesystem.notify = mount.kernel.invalidate_inode
        assert await hangs(mount.calls.pwrite(file, b"DATA", 0))
        mount, filesystem, file = await fresh()
        filesystem.notify = lambda parent: mount.kernel.invalidate_entry(parent, b"f")
        assert await hangs(mount.calls.stat("/f"))
        mount, filesystem, file = await fresh()
        filesystem.notify = lambda _: mount.kernel.invalidate_all_entries()
        assert not await hangs(mount.calls.stat("/f"))
        mount, filesystem, file = await fresh()
        filesystem.notify = lambda ino: mount.kernel.invalidate_inode(ino, -1)
        assert not await hangs(mount.calls.pread(file, 4, 0))

    simulate(body)


def test_an_answer_older_than_an_invalidation_is_not_kept() -> None:
    async def body(mount: Mount) -> None:
        file = await mount.calls.open("/f", RDWR)
        node = mount.filesystem.at("/f")
        await mount.kernel.invalidate_inode(node.ino)
        mount.filesystem.gate("getattr")
        stat = asyncio.create_task(mount.calls.fstat(file))
        await mount.filesystem.arrived["getattr"].wait()
        await mount.kernel.invalidate_inode(node.ino)
        mount.filesystem.open_gate("getattr")
        await stat
        asked = mount.asked("getattr")
        await mount.calls.fstat(file)
        assert mount.asked("getattr") == asked + 1

    on_mount(body)


def test_a_server_that_dies_leaves_cached_pages_and_enotconn() -> None:
    filesystem = MemoryFilesystem(attr_valid_ns=DAY)

    async def serve(world: World) -> None:
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        server = sim.machines["n1"].start("mount", serve)
        kernel = SimKernel(server)
        kernel.attach(filesystem)
        calls = Syscalls(kernel, sim.machines["n1"].attach("application"))
        file = await calls.open("/f", RDWR)
        await calls.write(file, bytes(PAGE) + b"tail")
        await calls.pread(file, PAGE, 0)
        filesystem.gate("getattr")
        await kernel.invalidate_inode(filesystem.at("/f").ino, -1)
        waiting = asyncio.create_task(calls.fstat(file))
        await asyncio.sleep(1)
        assert not waiting.done()
        server.kill()
        with pytest.raises(OSError, match="not connected"):
            await waiting
        with pytest.raises(OSError, match="not connected"):
            await calls.open("/f")
        assert await calls.pread(file, PAGE, 0) == bytes(PAGE)

    simulate(body)


def test_a_killed_application_waits_for_its_answer_and_gives_its_locks_back() -> None:
    async def body(sim: Simulation) -> None:
        mount = Mount(sim)

        async def creates(world: World) -> None:
            await Syscalls(mount.kernel, process).open("/f", RDWR)

        mount.filesystem.gate("create")
        process = sim.machines["n1"].start("creates", creates)
        await mount.filesystem.arrived["create"].wait()
        process.kill()
        other = asyncio.create_task(mount.calls.stat("/f"))
        await asyncio.sleep(5)
        assert not process.gone
        assert not other.done()
        mount.filesystem.open_gate("create")
        assert (await other).size == 0
        await process.wait_gone()

    simulate(body)


def test_answers_wait_for_the_lease() -> None:
    async def body(sim: Simulation) -> None:
        may = True
        mount = Mount(sim, may_reply=lambda: may)
        await mount.calls.mkdir("/d")
        may = False
        waiting = asyncio.create_task(mount.calls.mkdir("/e"))
        await asyncio.sleep(3)
        assert not waiting.done()
        may = True
        await waiting
        may = False
        waiting = asyncio.create_task(mount.calls.mkdir("/g"))
        await asyncio.sleep(3)
        mount.kernel.withdraw()
        with pytest.raises(OSError, match="not connected"):
            await waiting

    simulate(body)


def test_locks_reach_the_filesystem_and_end_with_their_holders() -> None:
    async def body(mount: Mount) -> None:
        calls = mount.calls
        one, other = await calls.open("/f", RDWR), await calls.open("/f", RDWR)
        await calls.flock(one, 1, wait=True)
        with pytest.raises(BlockingIOError):
            await calls.flock(other, 1, wait=False)
        waiting = asyncio.create_task(calls.flock(other, 1, wait=True))
        await asyncio.sleep(1)
        assert not waiting.done()
        await calls.close(one)
        await waiting

    on_mount(body)


def test_lookups_are_given_back_exactly() -> None:
    async def body(mount: Mount) -> None:
        calls = mount.calls
        for name in ("/a", "/b"):
            await calls.close(await calls.open(name, RDWR))
        await calls.listdir("/")
        await calls.stat("/a")
        held = mount.filesystem.at("/a").lookups + mount.filesystem.at("/b").lookups
        assert held >= 4
        mount.kernel.drop_caches()
        mount.kernel.drop_caches()
        await asyncio.sleep(1)
        assert mount.filesystem.at("/a").lookups == mount.filesystem.at("/b").lookups == 0

    on_mount(body)
