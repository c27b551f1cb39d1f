"""What the kernel may keep: a glock leaves only when a pass of invalidation has met no read, and nothing deadlocks.

Two mounts of one disk; the second one's wishes take the locks of the first, whose kernel is played by the notifier.
"""

from random import Random
from typing import Any

import pytest
from tests.sim.gfs_nodes import ME, Cluster
from tests.unit.gfs.world import World

from corral.api.gfs import ROOT
from corral.gfs.glock import EX, INODE, INVALIDATING, IOPEN, SH, UN

O_RDONLY, O_RDWR = 0, 2


class Kernel:
    """Plays one kernel's caches: during an invalidation it does what `during` says, as often as it says."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.during: list[Any] = []
        self.inodes: list[int] = []
        self.entries = 0

    async def invalidate_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        self.inodes.append(ino)
        if self.during:
            await self.during.pop(0)()

    async def invalidate_entry(self, parent: int, name: bytes) -> None:
        raise AssertionError("not used")

    async def invalidate_all_entries(self) -> bool:
        self.entries += 1
        return True


class Pair:
    def __init__(self) -> None:
        self.world = World()
        self.cluster = Cluster(self.world, Random(1))
        self.cluster.min_hold_ns = 0
        self.world.run(self.cluster.begin(2))
        self.one, self.two = (node.filesystem for node in self.cluster.nodes)
        self.kernel = Kernel(self.world)
        self.one.notifier = self.kernel  # type: ignore[assignment]

    def run(self, coroutine: Any) -> Any:
        return self.world.run(coroutine)

    def file(self, content: bytes) -> int:
        entry, opened = self.run(self.one.create(ROOT, b"file", 0o644, O_RDWR, ME))
        self.run(self.write(self.one, opened.handle, content))
        self.run(self.one.release(entry.ino, opened.handle, None))
        return int(entry.ino)

    @staticmethod
    def write(filesystem: Any, handle: int, data: bytes, *, from_cache: bool = False) -> Any:
        return filesystem.write(0, handle, 0, data, append=False, from_cache=from_cache, kill_suidgid=False)

    def state(self, ino: int) -> int:
        return self.one.locks.table.get(INODE, ino).state

    def read(self, filesystem: Any, ino: int) -> bytes:
        opened = self.run(filesystem.open(ino, O_RDONLY, ME))
        content = b"".join(bytes(part) for part in self.run(filesystem.read(ino, opened.handle, 0, 1 << 20)))
        self.run(filesystem.release(ino, opened.handle, None))
        return content

    def overwrite_by_two(self, data: bytes) -> None:
        ino = self.run(self.two.lookup(ROOT, b"file", ME)).ino
        opened = self.run(self.two.open(ino, O_RDWR, ME))
        self.run(self.write(self.two, opened.handle, data))
        self.run(self.two.release(ino, opened.handle, None))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_reading_elsewhere_keeps_our_pages_and_writing_elsewhere_drops_them(pair: Pair) -> None:
    ino = pair.file(b"old")
    assert pair.read(pair.two, ino) == b"old"
    assert pair.state(ino) == SH
    assert ino not in pair.kernel.inodes
    pair.overwrite_by_two(b"new")
    assert ino in pair.kernel.inodes
    assert pair.state(ino) == UN
    assert pair.read(pair.one, ino) == b"new"


def test_a_pass_that_met_a_read_is_repeated(pair: Pair) -> None:
    ino = pair.file(b"old")
    opened = pair.run(pair.one.open(ino, O_RDONLY, ME))
    seen: list[bytes] = []

    async def read_during() -> None:
        assert pair.one.locks.table.get(INODE, ino).phase == INVALIDATING
        seen.append(b"".join(bytes(part) for part in await pair.one.read(ino, opened.handle, 0, 100)))

    pair.kernel.during = [read_during, read_during]
    pair.overwrite_by_two(b"new")
    assert seen == [b"old", b"old"]
    assert pair.kernel.inodes.count(ino) == 3
    assert b"".join(bytes(p) for p in pair.run(pair.one.read(ino, opened.handle, 0, 100))) == b"new"


def test_dirty_mapped_pages_are_taken_while_the_lock_is_still_held(pair: Pair) -> None:
    ino = pair.file(b"old")
    opened = pair.run(pair.one.open(ino, O_RDWR, ME))
    pair.run(pair.one.read(ino, opened.handle, 0, 100))
    assert pair.state(ino) == EX  # open for writing: pages under EX only

    async def write_back() -> None:
        await pair.write(pair.one, opened.handle, b"map", from_cache=True)

    pair.kernel.during = [write_back]
    assert pair.read(pair.two, ino) == b"map"


def test_open_for_writing_goes_straight_to_unlocked(pair: Pair) -> None:
    ino = pair.file(b"old")
    pair.run(pair.one.open(ino, O_RDWR, ME))
    assert pair.read(pair.two, ino) == b"old"  # asks for SH only
    assert pair.kernel.inodes == [ino]
    assert pair.state(ino) == UN


def test_a_write_from_the_cache_without_the_lock_is_our_bug(pair: Pair) -> None:
    ino = pair.file(b"old")
    opened = pair.run(pair.one.open(ino, O_RDWR, ME))
    pair.overwrite_by_two(b"new")
    with pytest.raises(AssertionError, match="GFS-12"):
        pair.run(pair.write(pair.one, opened.handle, b"x", from_cache=True))


def test_a_directory_drops_its_entries(pair: Pair) -> None:
    pair.file(b"x")
    before = pair.kernel.entries
    pair.run(pair.two.mkdir(ROOT, b"made elsewhere", 0o755, ME))
    assert pair.kernel.entries == before + 1
    assert pair.run(pair.one.lookup(ROOT, b"made elsewhere", ME)).ino


def test_the_last_to_close_an_unlinked_file_frees_it_wherever_it_was_unlinked(pair: Pair) -> None:
    ino = pair.file(b"x" * 50_000)
    opened = pair.run(pair.one.open(ino, O_RDONLY, ME))
    pair.run(pair.two.unlink(ROOT, b"file", ME))
    pair.world.settle()
    content = b"".join(bytes(part) for part in pair.run(pair.one.read(ino, opened.handle, 0, 100)))
    assert content == b"x" * 100
    pair.run(pair.one.release(ino, opened.handle, None))
    for _ in range(200):
        pair.world.step()
    assert pair.one.counts["reclaimed"] + pair.two.counts["reclaimed"] == 1
    pair.run(pair.cluster.unmount())
    pair.run(pair.cluster.check())


def test_a_node_that_only_cached_the_open_lets_go_of_it(pair: Pair) -> None:
    ino = pair.file(b"x" * 50_000)
    pair.read(pair.two, ino)  # opened and closed there: its iopen stays cached
    pair.run(pair.one.unlink(ROOT, b"file", ME))
    for _ in range(400):
        pair.world.step()
    assert pair.one.counts["reclaimed"] + pair.two.counts["reclaimed"] == 1
    pair.run(pair.cluster.unmount())
    pair.run(pair.cluster.check())


def test_an_open_file_is_shown_to_others_only_when_its_glock_goes(pair: Pair) -> None:
    ino = pair.file(b"x")
    opened = pair.run(pair.one.open(ino, O_RDONLY, ME))
    again = pair.run(pair.one.open(ino, O_RDONLY, ME))
    iopen = pair.one.locks.table.get(IOPEN, ino)
    assert (iopen.state, iopen.holders) == (UN, 0)
    pair.read(pair.two, ino)  # both read: whoever wants to free it needs the inode from us too
    assert (pair.state(ino), iopen.holders) == (SH, 0)
    pair.overwrite_by_two(b"y")
    assert (pair.state(ino), iopen.state, iopen.holders) == (UN, SH, 1)
    pair.run(pair.one.release(ino, opened.handle, None))
    assert iopen.holders == 1
    pair.run(pair.one.release(ino, again.handle, None))
    assert iopen.holders == 0
    pair.run(pair.cluster.unmount())
    pair.run(pair.cluster.check())


def test_a_file_closed_while_its_glock_goes_is_shown_no_longer(pair: Pair) -> None:
    ino = pair.file(b"x")
    opened = pair.run(pair.one.open(ino, O_RDONLY, ME))
    iopen = pair.one.locks.table.get(IOPEN, ino)
    pair.world.spawn(pair.two.unlink(ROOT, b"file", ME), "unlink")
    while not iopen.queue:
        pair.world.step()
    pair.run(pair.one.release(ino, opened.handle, None))
    pair.world.settle()
    for _ in range(400):
        pair.world.step()
    assert iopen.holders == 0
    assert pair.one.counts["reclaimed"] + pair.two.counts["reclaimed"] == 1
    pair.run(pair.cluster.unmount())
    pair.run(pair.cluster.check())


def test_names_found_are_believed_until_told_otherwise_names_listed_are_not(pair: Pair) -> None:
    pair.file(b"x")
    assert pair.run(pair.one.lookup(ROOT, b"file", ME)).entry_valid_ns > 0
    opened = pair.run(pair.one.opendir(ROOT, O_RDONLY, ME))
    entries = [dirent.entry for dirent in pair.run(pair.one.readdir(ROOT, opened.handle, 2, 1 << 16, plus=True))]
    assert [(entry.entry_valid_ns, entry.attr_valid_ns > 0) for entry in entries if entry] == [(0, True)]
