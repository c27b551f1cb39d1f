"""ExHash directories against a dictionary: from dinode to leaves to table blocks to chains, through bytes and back."""

from random import Random

import pytest
from tests.unit.gfs.world import World

from corral.gfs import directory as module
from corral.gfs import format as fmt
from corral.gfs.directory import Directory, Dirents, Leaf, TableBlock, dirent_length
from corral.gfs.format import BlockDamaged, name_hash
from corral.gfs.glock import INODE, Glock
from corral.gfs.meta import Meta


class Space:
    """Blocks without end; remembers what was changed, as a disk would."""

    def __init__(self) -> None:
        self.next = 1000
        self.changed: dict[int, Meta] = {}

    def allocate_block(self, glock: Glock) -> int:
        self.next += 1
        return self.next

    def free_block(self, meta: Meta) -> None:
        del self.changed[meta.number]

    def add(self, meta: Meta) -> None:
        self.changed[meta.number] = meta

    async def read(self, number: int) -> bytearray:
        return bytearray(self.changed[number].seal())


class Owner(Meta):
    __slots__ = ()


class Tree:
    def __init__(self) -> None:
        self.space = Space()
        self.directory = Directory(Owner(77, Glock(INODE, 77)))
        self.model: dict[bytes, int] = {}
        self.world = World()

    def add(self, name: bytes, number: int) -> None:
        self.directory.add(self.space, name, name_hash(name), number + 5, number, 8)
        self.model[name] = number

    def remove(self, name: bytes) -> None:
        self.directory.remove(self.space, name, name_hash(name))
        del self.model[name]

    def reload(self) -> None:
        old = self.directory
        fresh = Directory(old.owner)
        payload = bytearray(old.pack_payload()).ljust(fmt.PAYLOAD, b"\0")
        self.world.run(
            fresh.load(
                payload,
                stuffed=old.area is not None,
                items=old.items,
                depth=old.depth,
                entries=old.entries,
                leaf_count=old.leaf_count,
                read=self.space.read,
            )
        )
        self.directory = fresh

    def listed(self) -> dict[bytes, int]:
        out: dict[bytes, int] = {}
        cookie, last = 3, 2
        while cookie:
            listing, cookie = self.world.run(self.directory.listing_at(cookie, self.space.read))
            for entry in listing:
                assert entry.cookie > last, "readdir order"
                last = entry.cookie
                out[entry.name] = entry.number
        return out

    def check(self) -> None:
        assert self.listed() == self.model
        assert self.directory.entries == len(self.model)
        for name in list(self.model)[:50]:
            self.world.run(self.directory.prepare(name_hash(name), self.space.read))
            found = self.directory.find(name, name_hash(name))
            assert found is not None
            assert (found.number, found.formal) == (self.model[name], self.model[name] + 5)


def test_random_names_come_and_go() -> None:
    rng = Random(1)
    tree = Tree()
    for step in range(6000):
        if rng.random() < 0.6 or not tree.model:
            name = b"%d" % rng.randrange(100_000) + b"x" * rng.randrange(100)
            if name not in tree.model:
                tree.add(name, step + 1)
        else:
            tree.remove(rng.choice(sorted(tree.model)))
        if step in (50, 300, 2000):
            tree.check()
            tree.reload()
            for name in tree.model:
                tree.world.run(tree.directory.prepare(name_hash(name), tree.space.read))
    tree.check()
    assert tree.directory.depth >= 4


def test_the_table_leaves_the_dinode_and_chains_end_the_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small table limit the same code reaches table blocks and chains."""
    monkeypatch.setattr(module, "DEPTH_MAX", 9)
    tree = Tree()
    for number in range(30_000):
        tree.add(b"name-%d" % number + b"y" * 100, number + 1)
    assert tree.directory.depth == 9
    assert len(tree.directory.tables) == 2
    assert any(leaf.next for leaf in tree.directory.leaves.values())
    tree.reload()
    tree.check()
    blocks = tree.world.run(tree.directory.blocks(tree.space.read))
    assert len(blocks) == len(tree.space.changed)
    assert {type(block) for block in blocks} == {Leaf, TableBlock}


def test_growth_says_how_many_blocks_an_add_may_take() -> None:
    tree = Tree()
    for number in range(3000):
        name = b"n%d" % number
        allowed = tree.directory.growth(name, name_hash(name))
        before = tree.space.next
        tree.add(name, number + 1)
        assert tree.space.next - before <= allowed


def test_holes_are_used_again() -> None:
    area = Dirents(bytearray(fmt.PAYLOAD), 0, fmt.PAYLOAD)
    names = [b"%04d" % number + b"z" * 60 for number in range(fmt.PAYLOAD // dirent_length(b"z" * 64))]
    for name in names:
        area.add(name, name_hash(name), 1, 1, 8)
    assert not area.has_room(dirent_length(b"z" * 64))
    for name in names[::2]:
        area.remove(name)
    for name in names[::2]:
        area.add(name[::-1], name_hash(name[::-1]), 3, 3, 8)
    again = Dirents(area.buffer, 0, fmt.PAYLOAD)
    again.parse(area.used, 1)
    assert set(again.names) == {*names[1::2], *(name[::-1] for name in names[::2])}


@pytest.mark.parametrize("at", range(0, 400, 3))
def test_no_damaged_dirent_is_believed(at: int) -> None:
    area = Dirents(bytearray(fmt.PAYLOAD), 0, fmt.PAYLOAD)
    for number in range(10):
        name = b"name%d" % number
        area.add(name, name_hash(name), number + 1, number + 1, 8)
    area.buffer[at] ^= 0x41
    again = Dirents(area.buffer, 0, fmt.PAYLOAD)
    try:
        again.parse(area.used, 1)
    except BlockDamaged:
        return
    for name in again.names:  # formal numbers and types are checked against the inode, not here
        assert name_hash(name) == fmt.DIRENT.unpack_from(area.buffer, again.names[name])[2]
