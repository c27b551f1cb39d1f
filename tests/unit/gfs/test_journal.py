"""The journal alone: what is durable when, what may be replayed, when a block may be used again."""

from random import Random

import pytest
from tests.unit.gfs.world import MemoryDisk, World

from corral.gfs import format as fmt
from corral.gfs import journal as journal_module
from corral.gfs.device import Device
from corral.gfs.glock import INODE, Glock
from corral.gfs.journal import Journal, Ring
from corral.gfs.meta import Meta
from corral.gfs.replay import JournalDamaged, clean_header, put_in_place, scan, write_clean_header

UUID = b"0123456789abcdef"
BLOCK = fmt.BLOCK


class Cell(Meta):
    """A block with one number in it."""

    __slots__ = ("value",)

    kind = fmt.LEAF

    def __init__(self, number: int, glock: Glock) -> None:
        super().__init__(number, glock)
        self.value = 0

    def pack(self) -> bytearray:
        block = bytearray(BLOCK)
        block[64:72] = self.value.to_bytes(8, "little")
        return block


class Bench:
    """A journal in two pieces at the end of a small disk; metadata blocks from 100 on."""

    def __init__(self, blocks: int = 64) -> None:
        self.world = World()
        self.disk = MemoryDisk(self.world, 600)
        self.device = Device(self.world, self.disk)  # type: ignore[arg-type]
        self.ring = Ring([(0, 500, blocks // 2), (blocks // 2, 540, blocks - blocks // 2)])
        self.glock = Glock(INODE, 1)
        self.cells = {number: Cell(number, self.glock) for number in range(100, 140)}
        self.data_written = 0
        self.failures: list[str] = []
        header = clean_header(self.ring, 0, UUID, 0, 1, 0)
        self.run(self.device.write(self.ring.address(0), [header]))
        self.journal = self.open()

    def open(self) -> Journal:
        state = self.run(scan(self.device, self.ring, 0, UUID))

        async def write_data() -> None:
            self.data_written += 1

        return Journal(
            self.world,  # type: ignore[arg-type]
            self.device,
            self.ring,
            slot=0,
            uuid=UUID,
            sequence=state.next_sequence,
            position=state.next_position,
            write_data=write_data,
            failed=self.failures.append,
        )

    def run(self, coroutine):  # type: ignore[no-untyped-def]
        return self.world.run(coroutine)

    def set(self, number: int, value: int) -> None:
        self.cells[number].value = value
        self.journal.add(self.cells[number])

    def commit(self) -> None:
        self.run(self.journal.commit())

    def on_disk(self, number: int) -> int:
        return int.from_bytes(self.disk.content[number * BLOCK + 64 : number * BLOCK + 72], "little")

    def replay(self) -> dict[int, int]:
        """What a recoverer would write, as values by block."""
        state = self.run(scan(self.device, self.ring, 0, UUID))
        return {number: int.from_bytes(image[64:72], "little") for number, image in state.images.items()}


@pytest.fixture
def b() -> Bench:
    return Bench()


def test_a_commit_is_replayable_and_not_yet_in_place(b: Bench) -> None:
    b.set(100, 7)
    b.set(101, 8)
    assert b.replay() == {}
    b.commit()
    assert b.replay() == {100: 7, 101: 8}
    assert b.on_disk(100) == 0
    assert b.data_written == 1


def test_the_newest_image_wins_and_uncommitted_changes_are_not_there(b: Bench) -> None:
    b.set(100, 1)
    b.commit()
    b.set(100, 2)
    b.commit()
    b.set(100, 3)
    assert b.replay() == {100: 2}


def test_a_checkpoint_writes_the_committed_image_not_the_newer_change(b: Bench) -> None:
    b.set(100, 1)
    b.commit()
    b.set(100, 2)
    b.run(b.journal.checkpoint())
    assert b.on_disk(100) == 1
    assert b.replay() == {}
    b.commit()
    assert b.replay() == {100: 2}


def test_a_freed_block_is_not_replayed_and_waits_for_its_commit(b: Bench) -> None:
    b.set(100, 1)
    b.set(101, 1)
    b.commit()
    usable: list[int] = []
    b.journal.free(100, b.cells[100])
    b.journal.when_durable(lambda: usable.append(100))
    b.set(101, 2)
    assert usable == []
    b.commit()
    assert usable == [100]
    assert b.replay() == {101: 2}
    b.run(b.journal.checkpoint())
    assert b.on_disk(100) == 0


def test_a_block_freed_and_used_again_is_replayed_as_the_newer(b: Bench) -> None:
    b.set(100, 1)
    b.commit()
    b.journal.free(100, b.cells[100])
    b.set(101, 9)
    b.commit()
    b.cells[100] = Cell(100, b.glock)
    b.set(100, 5)
    b.commit()
    assert b.replay() == {100: 5, 101: 9}


@pytest.mark.parametrize("together", [0, 100])
def test_handing_over_leaves_nothing_to_replay(b: Bench, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By revokes, or by moving the tail past everything."""
    monkeypatch.setattr(journal_module, "HANDOVER_ALL", together)
    other = Glock(INODE, 2)
    b.cells[110] = Cell(110, other)
    b.set(100, 1)
    b.set(110, 2)
    b.run(b.journal.handover(b.glock))
    assert b.on_disk(100) == 1
    assert not b.glock.dirty
    assert not b.glock.logged
    assert b.replay() == ({} if together else {110: 2})
    # The other node writes the block now; our journal must not bring the old content back.
    b.set(110, 3)
    b.commit()
    assert 100 not in b.replay()


def test_the_ring_goes_round_and_every_prefix_can_be_replayed() -> None:
    b = Bench()
    rng = Random(4)
    placed: dict[int, int] = {}
    for step in range(1, 400):
        for number in rng.sample(range(100, 140), rng.randrange(1, 8)):
            b.set(number, step)
            placed[number] = step
        b.commit()
        assert b.journal.used <= b.ring.blocks
        replayed = b.replay()
        assert all(replayed.get(number, b.on_disk(number)) == value for number, value in placed.items())
    assert b.journal.counts["checkpoints"] > 10


def test_many_waiters_share_one_commit(b: Bench) -> None:
    async def one(number: int) -> None:
        b.set(number, 1)
        await b.journal.commit()

    for number in range(100, 120):
        b.world.spawn(one(number), "waiter")
    b.world.settle()
    assert b.journal.counts["commits"] == 1
    assert len(b.replay()) == 20


def test_a_torn_newest_commit_is_void_and_the_one_before_counts(b: Bench) -> None:
    b.set(100, 1)
    b.commit()
    position = b.journal.position
    b.set(101, 2)
    b.commit()
    for at in (2, 1, 0):  # the image, the descriptor, the header
        b.disk.content[b.ring.address(position + at) * BLOCK + 4000] ^= 1
        assert b.replay() == {100: 1}


def test_numbering_goes_on_above_a_void_commit(b: Bench) -> None:
    b.set(100, 1)
    b.commit()
    position, sequence = b.journal.position, b.journal.sequence
    b.set(101, 2)
    b.commit()
    b.disk.content[b.ring.address(position + 2) * BLOCK + 4000] ^= 1
    state = b.run(scan(b.device, b.ring, 0, UUID))
    assert state.next_sequence == sequence + 1
    b.run(put_in_place(b.device, state))
    b.run(write_clean_header(b.device, b.ring, 0, UUID, state, 0))
    assert b.run(scan(b.device, b.ring, 0, UUID)).clean
    assert b.on_disk(100) == 1


def test_an_older_commit_that_is_damaged_stops_the_replay(b: Bench) -> None:
    position = b.journal.position
    for step in range(4):
        b.set(100 + step, 1)
        b.commit()
    b.disk.content[b.ring.address(position + 2) * BLOCK + 4000] ^= 1
    with pytest.raises(JournalDamaged, match="commit 2 at position 1"):
        b.replay()


def test_a_clean_end_needs_no_replay(b: Bench) -> None:
    b.set(100, 1)
    b.run(b.journal.close())
    state = b.run(scan(b.device, b.ring, 0, UUID))
    assert state.clean
    assert b.on_disk(100) == 1
    b.journal = b.open()
    b.set(100, 2)
    b.commit()
    assert b.replay() == {100: 2}


def test_another_filesystems_journal_in_the_same_place_is_not_ours(b: Bench) -> None:
    b.set(100, 1)
    b.commit()
    with pytest.raises(JournalDamaged):
        b.run(scan(b.device, b.ring, 0, b"another uuid 456"))
    with pytest.raises(JournalDamaged):
        b.run(scan(b.device, b.ring, 1, UUID))


def test_a_write_error_breaks_the_journal_for_good(b: Bench) -> None:
    b.set(100, 1)
    b.disk.fail_writes = lambda offset: True
    with pytest.raises(OSError, match="withdrawn"):
        b.commit()
    b.disk.fail_writes = None
    with pytest.raises(OSError, match="withdrawn"):
        b.commit()
    assert len(b.failures) == 1
