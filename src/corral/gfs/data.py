"""File data in memory: chunks of 256 KiB per inode, dirty until written back, clean while there is room.

`FileData` is one inode's chunks; `DataCache` bounds them all, writes dirty ones back in passes and drops clean ones.
Valid and dirty blocks of a chunk are bits of an int, so a megabyte is a few slice copies and mask operations.

One pass at a time: a block is never in two writes at once, whose order on the device nobody would know. A pass takes
everything dirty, sorts it by place on the device and writes neighbours together, across files.

Invariant GFS-11: a dirty block of a file lies below its end rounded up to a block and is allocated.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, final

from corral.base.world import Buffer, World
from corral.gfs.device import Device
from corral.gfs.format import BLOCK

if TYPE_CHECKING:
    from corral.gfs.inode import Inode

CHUNK_BLOCKS: Final = 64
CHUNK: Final = CHUNK_BLOCKS * BLOCK
DIRTY_START: Final = 4 << 20  # bytes: a background pass begins
DIRTY_MAX: Final = 48 << 20  # bytes: writers wait
CLEAN_MAX: Final = 96 << 20  # bytes of all chunks before clean ones are dropped


def mask_of(first: int, count: int) -> int:
    return (1 << count) - 1 << first


def mask_runs(mask: int) -> Iterable[tuple[int, int]]:
    """(first bit, length) of each run of ones."""
    first = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        first += skip
        length = (~mask & mask + 1).bit_length() - 1
        yield first, length
        mask >>= length
        first += length


@final
class Chunk:
    """`data` is as long as its last valid block needs; a write that reads it now has `lent`, which nobody changes: what
    comes meanwhile goes into a copy, so that a block on the device is never half of one write and half of the next."""

    __slots__ = ("data", "dirty", "lent", "valid", "writing")

    def __init__(self) -> None:
        self.data = bytearray()
        self.valid = 0
        self.dirty = 0
        self.writing = 0  # writes that read `lent` now
        self.lent: bytearray | None = None

    def lend(self) -> bytearray:
        self.writing += 1
        self.lent = self.data
        return self.data

    def give_back(self) -> None:
        self.writing -= 1
        if not self.writing:
            self.lent = None

    def own(self) -> None:
        """Before `data` is changed."""
        if self.lent is self.data:
            self.data = bytearray(self.data)

    def reach(self, length: int) -> None:
        if len(self.data) < length:
            grown = bytearray(min(CHUNK, max(length, 2 * len(self.data) if len(self.data) >= 4 * BLOCK else length)))
            grown[: len(self.data)] = self.data
            self.data = grown


@final
class FileData:
    """Chunks by index. Offsets are bytes of the file; ranges passed here are whole blocks unless said otherwise."""

    __slots__ = ("ahead", "cache", "chunks", "dirty_blocks", "inode", "next_read")

    def __init__(self, cache: "DataCache", inode: "Inode") -> None:
        self.cache = cache
        self.inode = inode
        self.chunks: dict[int, Chunk] = {}
        self.dirty_blocks = 0
        self.ahead = -1  # block where the newest read-ahead began
        self.next_read = 0  # where a sequential reader would go on

    @property
    def is_clean(self) -> bool:
        return not self.dirty_blocks and not any(chunk.writing for chunk in self.chunks.values())

    def chunk(self, index: int) -> Chunk:
        chunk = self.chunks.get(index)
        if chunk is None:
            chunk = self.chunks[index] = Chunk()
        self.cache.touch(self, index)
        return chunk

    def missing(self, first: int, count: int) -> list[tuple[int, int]]:
        """Runs of blocks in [first, first + count) that are not in memory."""
        out: list[tuple[int, int]] = []
        end = first + count
        while first < end:
            index, at = divmod(first, CHUNK_BLOCKS)
            take = min(CHUNK_BLOCKS - at, end - first)
            chunk = self.chunks.get(index)
            wanted = mask_of(at, take)
            absent = wanted & ~chunk.valid if chunk is not None else wanted
            for begin, length in mask_runs(absent):
                block = index * CHUNK_BLOCKS + begin
                if out and out[-1][0] + out[-1][1] == block:
                    out[-1] = (out[-1][0], out[-1][1] + length)
                else:
                    out.append((block, length))
            first += take
        return out

    def put(self, offset: int, data: Buffer, *, dirty: bool) -> None:
        """Copies bytes in at any offset; the blocks they touch become valid (the caller filled partial ones)."""
        view = memoryview(data)
        at = 0
        while at < len(view):
            index, within = divmod(offset + at, CHUNK)
            take = min(CHUNK - within, len(view) - at)
            chunk = self.chunk(index)
            first, last = within // BLOCK, (within + take - 1) // BLOCK
            before = len(chunk.data)
            chunk.reach((last + 1) * BLOCK)
            self.cache.bytes += len(chunk.data) - before
            chunk.own()
            chunk.data[within : within + take] = view[at : at + take]
            mask = mask_of(first, last - first + 1)
            chunk.valid |= mask
            if dirty:
                self._dirty(chunk, mask)
            at += take

    def fill(self, first: int, content: Buffer) -> None:
        """Whole blocks read from the device; what is valid already (written meanwhile) stays."""
        view = memoryview(content)
        for begin, length in self.missing(first, len(view) // BLOCK):
            at = (begin - first) * BLOCK
            self.put(begin * BLOCK, view[at : at + length * BLOCK], dirty=False)

    def fill_zeros(self, first: int, count: int) -> None:
        for begin, length in self.missing(first, count):
            self.put(begin * BLOCK, bytes(length * BLOCK), dirty=False)

    def mark_dirty(self, block: int) -> None:
        """A block that is valid here must be written (again)."""
        chunk = self.chunk(block // CHUNK_BLOCKS)
        mask = 1 << block % CHUNK_BLOCKS
        assert chunk.valid & mask
        self._dirty(chunk, mask)

    def _dirty(self, chunk: Chunk, mask: int) -> None:
        added = (mask & ~chunk.dirty).bit_count()
        chunk.dirty |= mask
        if added:
            self.dirty_blocks += added
            self.cache.dirtied(self, added)

    def get(self, offset: int, size: int) -> list[memoryview]:
        """Views of bytes that are all in memory: to be used before anything else runs."""
        out: list[memoryview] = []
        end = offset + size
        while offset < end:
            index, within = divmod(offset, CHUNK)
            take = min(CHUNK - within, end - offset)
            out.append(memoryview(self.chunks[index].data)[within : within + take])
            self.cache.touch(self, index)
            offset += take
        return out

    def cut(self, end_block: int) -> None:
        """Blocks from `end_block` on are gone from the file."""
        index, at = divmod(end_block, CHUNK_BLOCKS)
        for number in [number for number in self.chunks if number >= index]:
            chunk = self.chunks[number]
            gone = mask_of(0, CHUNK_BLOCKS) if number > index else mask_of(at, CHUNK_BLOCKS - at)
            lost = (chunk.dirty & gone).bit_count()
            chunk.dirty &= ~gone
            chunk.valid &= ~gone
            if lost:
                self.dirty_blocks -= lost
                self.cache.undirtied(self, lost)
            if not chunk.valid and not chunk.writing:
                self.cache.drop(self, number)

    def drop_all(self) -> None:
        """The glock is going; nothing is dirty."""
        assert not self.dirty_blocks, "GFS-2"
        for index in list(self.chunks):
            self.cache.drop(self, index)


@final
class DataCache:
    """All file data of a mount."""

    __slots__ = ("_pass", "bytes", "device", "dirty", "dirty_bytes", "lru", "passes", "world")

    def __init__(self, world: World, device: Device) -> None:
        self.world = world
        self.device = device
        self.bytes = 0
        self.dirty_bytes = 0
        self.dirty: dict[int, FileData] = {}  # inode number -> data with dirty blocks
        self.lru: dict[tuple[int, int], FileData] = {}
        self.passes = 0
        self._pass: Any = None  # future of the pass under way

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def touch(self, data: FileData, index: int) -> None:
        key = (data.inode.number, index)
        self.lru.pop(key, None)
        self.lru[key] = data

    def dirtied(self, data: FileData, blocks: int) -> None:
        self.dirty_bytes += blocks * BLOCK
        self.dirty[data.inode.number] = data

    def undirtied(self, data: FileData, blocks: int) -> None:
        self.dirty_bytes -= blocks * BLOCK
        if not data.dirty_blocks:
            self.dirty.pop(data.inode.number, None)

    def drop(self, data: FileData, index: int) -> None:
        chunk = data.chunks.pop(index)
        self.bytes -= len(chunk.data)
        if self.lru.get((data.inode.number, index)) is data:
            del self.lru[data.inode.number, index]

    def shrink(self) -> None:
        """Drops the clean chunks used least recently while there is too much."""
        if self.bytes <= CLEAN_MAX:
            return
        for key, data in list(self.lru.items()):
            chunk = data.chunks.get(key[1])
            if chunk is None:
                self.lru.pop(key, None)
            elif not chunk.dirty and not chunk.writing:
                self.drop(data, key[1])
                if self.bytes <= CLEAN_MAX * 3 // 4:
                    return

    # --- writing back ------------------------------------------------------------------------------------------------

    @property
    def should_write(self) -> bool:
        return self.dirty_bytes >= DIRTY_START and self._pass is None

    async def write_all(self) -> None:
        """What is dirty now is on the device (not flushed) on return, and so are writes that were under way."""
        await self._write(None)

    async def write_clean(self, data: FileData) -> None:
        """Nothing of this file is dirty or under way on return, if nobody writes to it meanwhile."""
        while not data.is_clean:
            await self._write(data)

    async def _write(self, only: FileData | None) -> None:
        while self._pass is not None:
            await self._pass
        files = [only] if only is not None else [data for _, data in sorted(self.dirty.items())]
        files = [data for data in files if data.dirty_blocks]
        if files:
            done = self._pass = self.world.future()
            # A task of its own: a cancelled fsync must not let the next pass overtake writes under way.
            self.world.spawn(self._run_pass(files, done), "gfs: write back")
            await done

    def start_pass(self) -> None:
        """Begins to write back what is dirty, in the background."""
        if self._pass is None and self.dirty:
            done = self._pass = self.world.future()
            self.world.spawn(self._run_pass([data for _, data in sorted(self.dirty.items())], done), "gfs: write back")

    async def _run_pass(self, files: list[FileData], done: Any) -> None:
        try:
            await self._write_pass(files)
        finally:
            self._pass = None
            if not done.done():
                done.set_result(None)
            self.shrink()

    async def _write_pass(self, files: list[FileData]) -> None:
        runs: list[tuple[int, Buffer]] = []
        chunks: list[Chunk] = []
        for data in files:
            self._collect(data, runs, chunks)
        if not runs:
            return
        self.passes += 1
        runs.sort(key=_place)
        try:
            await self.device.write_runs(runs)
        except OSError as error:
            for data in files:
                data.inode.error = error.errno or 5
        finally:
            for chunk in chunks:
                chunk.give_back()

    def _collect(self, data: FileData, runs: list[tuple[int, Buffer]], chunks: list[Chunk]) -> None:
        """Takes the dirty marks off and notes where each block goes."""
        extents = data.inode.extents
        assert extents is not None, "GFS-11"
        for index in sorted(data.chunks):
            chunk = data.chunks[index]
            if not chunk.dirty:
                continue
            view = memoryview(chunk.lend())
            base = index * CHUNK_BLOCKS
            for first, length in mask_runs(chunk.dirty):
                for logical, physical, count, _ in extents.runs(base + first, length):
                    assert physical, "GFS-11"
                    at = (logical - base) * BLOCK
                    runs.append((physical, view[at : at + count * BLOCK]))
            blocks = chunk.dirty.bit_count()
            chunk.dirty = 0
            chunks.append(chunk)
            data.dirty_blocks -= blocks
            self.undirtied(data, blocks)


def _place(run: tuple[int, Buffer]) -> int:
    return run[0]
