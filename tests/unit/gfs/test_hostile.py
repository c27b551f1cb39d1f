"""A damaged or hostile disk under a mount: an error for what is bad, never a traceback, never an endless loop."""

from random import Random

import pytest
from tests.unit.gfs.mounted import ME, Mounted
from tests.unit.gfs.world import MemoryDisk, World

from corral.gfs import format as fmt
from corral.gfs.mount import mount
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused

BLOCK = fmt.BLOCK


def populated() -> Mounted:
    m = Mounted()
    m.mkdir("d")
    for number in range(200):
        m.touch(f"d/file-with-a-longer-name-{number}")
    m.write("big", b"b" * 300_000)
    m.touch("holes")
    _, handle = m.open("holes")
    for number in range(200):
        m.put(handle, number * 8192, b"x")
    m.close(handle)
    m.mkdir("d/sub")
    m.write("d/sub/f", b"small")
    m.sync()
    return m


@pytest.fixture(scope="module")
def images() -> tuple[bytes, bytes]:
    """The same tree, unmounted cleanly and with a journal to replay."""
    m = populated()
    crashed = bytes(m.disk.content)
    m.run(m.fs.destroy())
    return bytes(m.disk.content), crashed


def use_everything(m: Mounted) -> None:
    """Each call may fail with an OSError; the rest goes on."""
    calls = [
        lambda: m.ls("/"),
        lambda: m.ls("d"),
        lambda: m.read("big"),
        lambda: m.read("holes"),
        lambda: m.read("d/sub/f"),
        lambda: [m.rm(f"d/file-with-a-longer-name-{number}") for number in range(0, 200, 3)],
        lambda: m.write("holes", b"y" * 100_000, 3),
        lambda: m.truncate("holes", 5),
        lambda: m.truncate("big", 100_000),
        lambda: [m.touch(f"d/new{number}") for number in range(50)],
        lambda: m.mv("d/sub", "moved"),
        lambda: m.rm("big"),
        lambda: m.run(m.fs.readdir(m.ino("d"), 0, 0, 100_000, plus=True)),
        lambda: m.sync(),
        lambda: m.run(m.fs.statfs()),
        lambda: m.run(m.fs.destroy()),
    ]
    for call in calls:
        try:
            call()
        except OSError:
            continue


def on(image: bytes) -> Mounted:
    m = Mounted.__new__(Mounted)
    m.world = World()
    m.disk = MemoryDisk(m.world, len(image) // BLOCK, bytearray(image))
    return m


def damage(content: bytearray, rng: Random) -> None:
    """A flipped byte, a lost block, a block from elsewhere, or a wrong field under a right checksum."""
    used = [number for number in range(16, len(content) // BLOCK) if any(content[number * BLOCK : number * BLOCK + 64])]
    number = rng.choice(used)
    at = number * BLOCK
    kind = rng.randrange(4)
    block = content[at : at + BLOCK]
    if kind == 0:
        content[at + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[at : at + BLOCK] = bytes(BLOCK)
    elif kind == 2:
        other = rng.choice(used) * BLOCK
        content[at : at + BLOCK] = content[other : other + BLOCK]
    elif fmt.verified(bytes(block)):
        _, type_, _, _, generation = fmt.HEADER.unpack_from(block)
        for _ in range(rng.choice([1, 4])):
            block[32 + rng.randrange(rng.choice([16, 100, 400]))] = rng.randrange(256)
        content[at : at + BLOCK] = fmt.seal(block, type_, number, generation)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_damaged_the_answer_is_an_error(images: tuple[bytes, bytes], seed: int) -> None:
    rng = Random(seed)
    m = on(images[seed % 2])
    for _ in range(rng.choice([1, 2, 8])):
        damage(m.disk.content, rng)
    try:
        m.mount()
    except (Refused, JournalDamaged, OSError):
        return
    use_everything(m)


def test_refusals_say_what_to_do(images: tuple[bytes, bytes]) -> None:
    def refused(change: "list[tuple[int, bytes]]", **named: object) -> str:
        m = on(images[0])
        block = m.disk.content[16 * BLOCK : 17 * BLOCK]
        for at, value in change:
            block[at : at + len(value)] = value
        m.disk.content[16 * BLOCK : 17 * BLOCK] = fmt.seal(block, fmt.SUPERBLOCK, 16, 1)
        with pytest.raises(Refused) as caught:
            m.run(mount(m.world, m.disk, None, slot=int(str(named.get("slot", 0))), cluster=named.get("cluster")))  # type: ignore[arg-type]
        return str(caught.value)

    assert "format version 9" in refused([(32, b"\x09")])
    assert "use a newer corral" in refused([(56, b"\x81")])
    assert "newer corral" in refused([(48, b"\x80")])
    assert "cut off" in refused([(88, (1 << 40).to_bytes(8, "little"))])
    assert "belongs to cluster 'c', not 'other'" in refused([], cluster="other")
    assert "slot 9 has no journal" in refused([], slot=9)


def test_a_journal_that_cannot_be_written_makes_the_mount_withdraw(images: tuple[bytes, bytes]) -> None:
    m = on(images[0])
    m.mount()
    told: list[str] = []
    m.fs.options.withdrawn = told.append
    m.touch("a")
    ring = m.fs.journal.ring
    first, last = ring.address(0) * BLOCK, ring.address(ring.blocks - 1) * BLOCK
    m.disk.fail_writes = lambda offset: first <= offset <= last
    with pytest.raises(OSError, match="withdrawn"):
        m.sync()
    assert len(told) == 1
    for call in (lambda: m.touch("b"), lambda: m.ls("/"), lambda: m.read("big")):
        with pytest.raises(OSError, match="withdrawn"):
            call()
    m.run(m.fs.destroy())
    m.disk.fail_writes = None
    m.mount()  # another node, or this one again
    assert m.read("big") == b"b" * 300_000
    m.unmount_clean()


def test_data_that_cannot_be_written_is_told_by_fsync_once(images: tuple[bytes, bytes]) -> None:
    m = on(images[0])
    m.mount()
    ino, handle = m.open("big")
    extents = m.fs.inodes[ino].extents
    assert extents is not None
    place = extents.extents()[0][1] * BLOCK
    m.put(handle, 0, b"n" * 4096)
    m.disk.fail_writes = lambda offset: offset == place
    with pytest.raises(OSError, match=r"planted|could not"):
        m.run(m.fs.fsync(ino, handle, data_only=True))
    m.disk.fail_writes = None
    m.run(m.fs.fsync(ino, handle, data_only=True))
    assert m.fs.withdrawn is None
    m.touch("still alive")


def test_stale_handles_after_everything_else() -> None:
    m = Mounted()
    ino = m.touch("f")
    with pytest.raises(OSError, match="not an open handle"):
        m.run(m.fs.fallocate(ino, 99, 0, 10, 0))
    with pytest.raises(OSError, match="stale"):
        m.run(m.fs.getattr(1 << 60, None))
    with pytest.raises(OSError, match="stale"):
        m.run(m.fs.lookup(5, b"x", ME))
