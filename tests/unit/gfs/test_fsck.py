"""Every kind of damage: fsck names it, repairs what can be repaired, and the rest of the tree stays as it was."""

from collections.abc import Callable
from random import Random

import pytest
from tests.unit.gfs.mounted import Mounted

from corral.gfs import format as fmt
from corral.gfs.superblock import Refused

BLOCK = fmt.BLOCK


@pytest.fixture
def m() -> Mounted:
    mounted = Mounted()
    mounted.mkdir("d")
    mounted.mkdir("d/sub")
    for number in range(150):
        mounted.touch(f"d/f{number}")
    mounted.write("big", b"b" * 300_000)
    mounted.write("d/sub/small", b"s" * 100)
    mounted.link("big", "d/again")
    mounted.run(mounted.fs.destroy())
    return mounted


def block_of(m: Mounted, path: str) -> int:
    m.mount()
    number = m.fs.number_of(m.ino(path))
    m.run(m.fs.destroy())
    return number


def corrupt(m: Mounted, number: int, at: int = 700, flip: int = 0xFF) -> None:
    m.disk.content[number * BLOCK + at] ^= flip


def rewrite(m: Mounted, number: int, change: Callable[[bytearray], None]) -> None:
    """A wrong block with a right checksum: what a bug writes, not what a disk loses."""
    block = m.disk.content[number * BLOCK : (number + 1) * BLOCK]
    _, kind, _, _, generation = fmt.HEADER.unpack_from(block)
    change(block)
    m.disk.content[number * BLOCK : (number + 1) * BLOCK] = fmt.seal(block, kind, number, generation)


def codes(m: Mounted, *, repair: bool = False) -> set[str]:
    return {finding.code for finding in m.check(repair=repair).findings}


def repaired(m: Mounted) -> None:
    """One repair is enough, and the filesystem can be used."""
    m.check(repair=True)
    m.mount()
    m.touch("after")
    m.unmount_clean()


def test_a_sound_filesystem_has_no_findings(m: Mounted) -> None:
    report = m.check()
    assert report.clean
    assert report.blocks_used + report.blocks_free == sum((8164,))


def test_a_lost_superblock_is_found_in_its_copy(m: Mounted) -> None:
    corrupt(m, fmt.SUPERBLOCK_AT, 40)
    assert codes(m) == {"superblock"}
    m.mount()  # mounting works from the copy
    m.run(m.fs.destroy())
    repaired(m)


def test_without_any_superblock_it_says_so(m: Mounted) -> None:
    corrupt(m, fmt.SUPERBLOCK_AT, 40)
    corrupt(m, 8191, 40)
    with pytest.raises(Refused, match="no superblock found"):
        m.check()


def test_a_wrong_bitmap_and_its_counts(m: Mounted) -> None:
    big = block_of(m, "big")
    rgrp = next(17 + 1025 * index for index in range(8) if 17 + 1025 * index < big <= 17 + 1025 * (index + 1))

    def leak(block: bytearray) -> None:
        block[fmt.BITMAP_AT + 200] = 0x55
        block[fmt.BITMAP_AT + (big - rgrp - 1) // 4] = 0

    rewrite(m, rgrp, leak)
    assert {"resource group", "bitmap"} <= codes(m)
    repaired(m)


def test_a_lost_bitmap_is_built_again(m: Mounted) -> None:
    corrupt(m, 17, 40)
    assert "resource group" in codes(m)
    repaired(m)


def test_a_damaged_file_costs_that_file_only(m: Mounted) -> None:
    corrupt(m, block_of(m, "d/sub/small"))
    m.mount()
    with pytest.raises(OSError, match="checksum"):
        m.stat("d/sub/small")
    assert m.read("big") == b"b" * 300_000
    assert m.fs.statistics()["damaged"] == 1
    m.run(m.fs.destroy())
    assert {"inode", "dirent"} <= codes(m)
    repaired(m)
    m.mount()
    assert m.ls("d/sub") == []


def test_children_of_a_lost_directory_come_to_lost_and_found(m: Mounted) -> None:
    small = block_of(m, "d/sub/small")
    corrupt(m, block_of(m, "d"))
    assert "orphan" in codes(m)
    repaired(m)
    m.mount()
    names = m.ls("lost+found")
    assert len(names) == 151  # the files, and the directory with its content
    sub = next(name for name in names if m.stat(f"lost+found/{name}").mode & 0o40000)
    assert m.fs.number_of(m.ino(f"lost+found/{sub}/small")) == small
    assert m.read("big") == b"b" * 300_000
    assert m.stat("big").nlink == 1


def test_wrong_link_counts_and_parents(m: Mounted) -> None:
    def links(block: bytearray) -> None:
        block[fmt.HEADER_SIZE + 20] += 3

    def parent(block: bytearray) -> None:
        block[fmt.HEADER_SIZE + 96] ^= 1

    rewrite(m, block_of(m, "big"), links)
    rewrite(m, block_of(m, "d/sub"), parent)
    assert codes(m) == {"links", "parent"}
    repaired(m)


def test_two_files_with_the_same_blocks_are_named(m: Mounted) -> None:
    big, small = block_of(m, "big"), block_of(m, "d/f7")
    content = bytes(m.disk.content[big * BLOCK : (big + 1) * BLOCK])

    def steal(block: bytearray) -> None:
        formal = block[32:40]
        block[:] = content
        block[32:40] = formal

    rewrite(m, small, steal)
    assert "double" in codes(m)


def test_wrong_totals(m: Mounted) -> None:
    m.mount()
    statfs = m.fs.system[b"statfs"][1]
    m.run(m.fs.destroy())

    def more(block: bytearray) -> None:
        block[fmt.PAYLOAD_AT + 8] ^= 1

    rewrite(m, statfs, more)
    assert codes(m) == {"statfs"}
    repaired(m)


def test_a_damaged_journal_is_discarded_by_repair_only(m: Mounted) -> None:
    m.mount()
    ring = m.fs.journal.ring
    m.run(m.fs.destroy())
    for position in range(ring.blocks):
        number = ring.address(position)
        m.disk.content[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
    with pytest.raises(Exception, match="fsck"):
        m.mount()
    assert codes(m) == {"journal"}
    repaired(m)


def test_an_unclean_journal_is_replayed_by_repair(m: Mounted) -> None:
    m.mount()
    m.touch("new")
    m.sync()
    m.world.abandon()
    assert "journal" in codes(m)
    assert m.check(repair=True).journals_replayed == [0]
    m.mount()
    assert "new" in m.ls("/")
    m.unmount_clean()


def test_a_damaged_header_of_an_empty_group_is_written_anew(m: Mounted) -> None:
    empty = [rgrp.number for rgrp in m.fs.rgrps if rgrp.number > block_of(m, "big")][-1]
    corrupt(m, empty)
    assert codes(m) == {"resource group"}
    repaired(m)
    assert not codes(m)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_never_ends_in_a_traceback(m: Mounted, seed: int) -> None:
    rng = Random(seed)
    for _ in range(rng.choice([1, 3, 10])):
        number = rng.randrange(17, 2400)
        if rng.random() < 0.5:
            corrupt(m, number, rng.randrange(BLOCK))
        elif fmt.verified(bytes(m.disk.content[number * BLOCK : (number + 1) * BLOCK])):
            rewrite(m, number, lambda block: block.__setitem__(32 + rng.randrange(300), rng.randrange(256)))
    try:
        m.check()
        m.check(repair=True)
        m.check(repair=True)
        again = m.check(repair=True)
    except (Refused, OSError):
        return
    unrepairable = ("double", "inode", "formal number", "size", "hash", "journal", "root")
    assert all(finding.code in unrepairable for finding in again.findings)
