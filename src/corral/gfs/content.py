"""The content of files: read, write, truncate, fallocate, seek.

Data rules (DESIGN 5): a write is complete when it returns, with its blocks allocated; the bytes are written behind,
before the commit that makes them reachable. While a file is open for writing here, its pages are cached under EX only,
so that an invalidation never has to wait for a page that waits for us (stricter than RDWR alone: see `Notifier`).
"""

from errno import (
    EBADF,
    EFBIG,
    EINVAL,
    EISDIR,
    ENOSPC,
    ENXIO,
    EOPNOTSUPP,
)
from typing import Any, Final, final

from corral.base.world import Buffer
from corral.gfs import format as fmt
from corral.gfs.data import FileData
from corral.gfs.extent import ExtentTree
from corral.gfs.format import BLOCK
from corral.gfs.glock import EX, IO, SH
from corral.gfs.inode import Inode
from corral.gfs.listing import Listing

SIZE_MAX: Final = 1 << 44  # bytes
READ_AHEAD: Final = 256  # blocks: 1 MiB
STEP_EXTENTS: Final = 512  # extents freed in one transaction step

SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4
S_ISUID: Final = 0o4000
S_ISGID: Final = 0o2000
S_IXGRP: Final = 0o010
FALLOC_KEEP_SIZE: Final = 1

_NOTHING: Final[list[memoryview]] = []


@final
class Handle:
    """An open file or directory."""

    __slots__ = ("flags", "inode", "writable")

    def __init__(self, inode: Inode, flags: int, writable: bool) -> None:
        self.inode = inode
        self.flags = flags
        self.writable = writable


class Content(Listing):
    """The part of the filesystem that moves bytes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1

    # --- handles -----------------------------------------------------------------------------------------------------

    def _handle(self, handle: int) -> Handle:
        found = self.handles.get(handle)
        if found is None:
            raise OSError(EBADF, "not an open handle")
        return found

    def _by_handle(self, ino: int, handle: int | None) -> Inode:
        if handle is not None:
            found = self.handles.get(handle)
            if found is not None:
                return found.inode
        return self.known(ino)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(self, ino: int, handle: int, offset: int, size: int) -> list[memoryview]:
        found = self.handles.get(handle)
        inode = found.inode if found is not None else self.known(ino)
        glock = inode.glock
        state = EX if inode.write_opens else SH
        if not self.locks.table.try_hold_io(glock, state):
            await self.hold(inode, state, IO)
        elif not inode.loaded:
            await self._load_held(inode, state)
        try:
            end = min(offset + size, inode.size)
            if offset >= end or offset < 0:
                return _NOTHING
            if inode.extents is None:
                if inode.is_directory:
                    raise OSError(EISDIR, "is a directory")
                return [memoryview(bytes(inode.payload[offset:end]).ljust(end - offset, b"\0"))]
            return await self._read_blocks(inode, offset, end)
        finally:
            self.locks.drop(glock, state)

    async def _load_held(self, inode: Inode, state: int) -> None:
        try:
            await self.load(inode)
        except BaseException:
            self.locks.drop(inode.glock, state)
            raise

    async def _read_blocks(self, inode: Inode, offset: int, end: int) -> list[memoryview]:
        data = self.data_of(inode)
        first, last = offset // BLOCK, (end - 1) // BLOCK
        missing = data.missing(first, last - first + 1)
        sequential = offset == data.next_read
        data.next_read = end
        if missing:
            ahead = last - first + 1
            if sequential:
                total = (inode.size + BLOCK - 1) // BLOCK
                ahead = max(ahead, min(READ_AHEAD, total - first))
                missing = data.missing(first, ahead)
            await self._fetch(inode, data, missing)
            if self.data.bytes > 0:
                self.data.shrink()
                if data.missing(first, last - first + 1):  # a cache smaller than the request
                    await self._fetch(inode, data, data.missing(first, last - first + 1))
        elif sequential:
            self._read_ahead(inode, data, last + 1)
        return data.get(offset, end - offset)

    async def _fetch(self, inode: Inode, data: FileData, missing: list[tuple[int, int]]) -> None:
        """Reads runs of blocks into the cache; the glock is held, so nobody changes the file."""
        extents = inode.extents
        assert extents is not None
        for first, count in missing:
            for logical, physical, length, _ in extents.runs(first, count):
                if physical:
                    _fill(inode, data, logical, await self.device.read(physical, length))
                else:
                    data.fill_zeros(logical, length)

    def _read_ahead(self, inode: Inode, data: FileData, block: int) -> None:
        """A sequential reader is about to need the next megabyte: begin to fetch it."""
        total = (inode.size + BLOCK - 1) // BLOCK
        ahead = (block // READ_AHEAD + 1) * READ_AHEAD
        if block % READ_AHEAD < READ_AHEAD // 4 or ahead >= total or data.ahead == ahead:
            return
        data.ahead = ahead
        count = min(READ_AHEAD, total - ahead)
        if data.missing(ahead, count):
            self.world.spawn(self._fetch_ahead(inode, data, ahead, count), "gfs: read ahead")

    async def _fetch_ahead(self, inode: Inode, data: FileData, first: int, count: int) -> None:
        """Holds no glock while it reads: dropped unless nothing at all has happened to the file meanwhile."""
        extents, version = inode.extents, inode.layout_version
        if extents is None or inode.data is not data:
            return
        try:
            for begin, length in data.missing(first, count):
                for logical, physical, run, _ in extents.runs(begin, length):
                    if not physical:
                        continue
                    content = await self.device.read(physical, run)
                    if inode.layout_version != version or inode.data is not data:
                        return
                    _fill(inode, data, logical, content)
        except OSError:
            return  # whoever really reads it will be told
        self.data.shrink()

    # --- writing -----------------------------------------------------------------------------------------------------

    async def write(
        self, ino: int, handle: int, offset: int, data: Buffer, *, append: bool, from_cache: bool, kill_suidgid: bool
    ) -> int:
        if self.refusal is not None or self.journal.full or self.data.dirty_bytes or self._timer is None:
            await self.throttle()
        found = self.handles.get(handle)
        inode = found.inode if found is not None else self.known(ino)
        glock = inode.glock
        if from_cache:
            assert glock.state == EX, "GFS-12"
        if not self.locks.table.try_hold_io(glock, EX):
            await self.hold(inode, EX, IO)
        elif not inode.loaded:
            await self._load_held(inode, EX)
        try:
            start = inode.size if append else offset
            if start + len(data) > SIZE_MAX or start < 0:
                raise OSError(EFBIG, "file too large")
            written = await self._write_held(inode, start, data) if len(data) else 0
            inode.mtime_ns = inode.ctime_ns = self.world.wall_ns()
            if kill_suidgid:
                clear_suidgid(inode)
            self.touch(inode, times_only=not kill_suidgid)
        finally:
            self.locks.drop(glock, EX)
        if append and start != offset and self.notifier is not None:
            # The kernel has these bytes in its pages where it thought the end was. Never awaited before the reply.
            self.world.spawn(self.notifier.invalidate_inode(ino), "gfs: drop pages of an append")
        if self.data.should_write:
            self.data.start_pass()
        return written

    async def _write_held(self, inode: Inode, start: int, data: Buffer) -> int:
        """Puts the bytes in, in as many steps as there are runs of blocks. A full filesystem after the first step
        makes a short write."""
        if not inode.is_regular:
            raise OSError(EINVAL, "not a regular file")
        if inode.flags & fmt.TRUNCATING:
            await self.free_content(inode, (inode.size + BLOCK - 1) // BLOCK)
        inode.layout_version += 1
        end = start + len(data)
        if inode.extents is None:
            if end <= fmt.PAYLOAD:
                self._write_stuffed(inode, start, data)
                return len(data)
            await self._unstuff(inode)
        if start > inode.size:
            await self._zero_tail(inode)
        assert inode.extents is not None
        cache = self.data_of(inode)
        view = memoryview(data)
        at = start
        while at < end:
            first = at // BLOCK
            logical, physical, count, _ = inode.extents.runs(first, (end - 1) // BLOCK - first + 1)[0]
            upto = min(end, (logical + count) * BLOCK)
            try:
                if physical:
                    await self._fill_edges(inode, cache, at, upto)
                else:
                    upto = await self._allocate(inode, cache, at, upto)
            except OSError as error:
                if error.errno == ENOSPC and at > start:
                    break
                raise
            cache.put(at, view[at - start : upto - start], dirty=True)
            at = upto
            if at > inode.size:
                inode.size = at
                self.touch(inode)
        return at - start

    def _write_stuffed(self, inode: Inode, start: int, data: Buffer) -> None:
        payload = inode.payload
        end = start + len(data)
        if len(payload) < end:
            payload.extend(bytes(end - len(payload)))
        payload[start:end] = data
        if end > inode.size:
            inode.size = end
        self.touch(inode)

    async def _zero_tail(self, inode: Inode) -> None:
        """The file is about to grow past its last block: what lies there behind the end is written as zeros first.
        (A crash may have left bytes of an extension that was never committed.)"""
        extents, size = inode.extents, inode.size
        assert extents is not None
        last = extents.last
        if last is not None and last[0] + last[2] > (size + BLOCK - 1) // BLOCK:
            await self.free_content(inode, (size + BLOCK - 1) // BLOCK)  # kept beyond the end by fallocate
            if inode.extents is None:
                await self._unstuff(inode)
            extents = inode.extents
            assert extents is not None
        block = size // BLOCK
        if size % BLOCK and extents.runs(block, 1)[0][1]:
            cache = self.data_of(inode)
            if cache.missing(block, 1):
                await self._fetch(inode, cache, [(block, 1)])
            cache.mark_dirty(block)

    async def _fill_edges(self, inode: Inode, cache: FileData, at: int, upto: int) -> None:
        """Allocated blocks that are only partly overwritten must be in memory whole."""
        edges = {at // BLOCK} if at % BLOCK else set()
        if upto % BLOCK:
            edges.add(upto // BLOCK)
        for block in sorted(edges):
            if cache.missing(block, 1):
                if block * BLOCK >= inode.size:
                    cache.fill_zeros(block, 1)
                else:
                    await self._fetch(inode, cache, [(block, 1)])

    async def _allocate(self, inode: Inode, cache: FileData, at: int, upto: int) -> int:
        """Blocks for the hole at `at`: as many as one run gives. Returns up to where bytes may be put; the caller puts
        them without waiting, so no block is mapped without its content (GFS-6)."""
        extents = inode.extents
        assert extents is not None
        first = at // BLOCK
        want = (upto - 1) // BLOCK - first + 1
        last = extents.last
        goal = inode.goal_data
        if last is not None and last[0] + last[2] <= first:
            goal = last[1] + last[2]
        space = await self.space(1 + extents.insert_cost, goal or inode.number, inode)
        try:
            spare = extents.insert_cost
            number, count = space.allocate(min(want, space.rgrp.available - spare), goal)
            extents.insert(space, first, number, count)
            inode.goal_data = number + count
            self.touch(inode)
        finally:
            space.done()
        upto = min(upto, (first + count) * BLOCK)
        if at % BLOCK:
            cache.fill_zeros(first, 1)
        if upto % BLOCK:
            cache.fill_zeros(upto // BLOCK, 1)
        return upto

    async def _unstuff(self, inode: Inode) -> None:
        """The content moves from the dinode to a block of its own."""
        extents = ExtentTree(inode.number, inode.glock)
        if inode.size:
            space = await self.space(1, inode.goal_data or inode.number, inode)
            try:
                number, _ = space.allocate(1, inode.goal_data)
                extents.root = [(0, number, 1, 0)]
                inode.goal_data = number + 1
                cache = self.data_of(inode)
                cache.put(0, bytes(inode.payload[: inode.size]).ljust(BLOCK, b"\0"), dirty=True)
                self._become_extents(inode, extents)
            finally:
                space.done()
        else:
            self._become_extents(inode, extents)
        # `_collect` asks for the extents of dirty data: they are set in the same step that made it dirty.

    def _become_extents(self, inode: Inode, extents: ExtentTree) -> None:
        inode.extents = extents
        inode.payload = bytearray()
        inode.flags &= ~fmt.STUFFED
        self.touch(inode)

    # --- size --------------------------------------------------------------------------------------------------------

    async def _set_size(self, inode: Inode, size: int) -> None:
        await self.throttle()
        await self.hold(inode, EX)
        try:
            if inode.is_directory:
                raise OSError(EISDIR, "is a directory")
            if not inode.is_regular:
                raise OSError(EINVAL, "not a regular file")
            if not 0 <= size <= SIZE_MAX:
                raise OSError(EFBIG, "file too large")
            if inode.flags & fmt.TRUNCATING:
                await self.free_content(inode, (inode.size + BLOCK - 1) // BLOCK)
            if size == inode.size:
                pass
            elif inode.extents is None and size <= fmt.PAYLOAD:
                del inode.payload[size:]
                inode.size = size
            elif size > inode.size:
                if inode.extents is None:
                    await self._unstuff(inode)
                await self._zero_tail(inode)
                inode.size = size
            else:
                await self._shrink(inode, size)
            inode.mtime_ns = inode.ctime_ns = self.world.wall_ns()
            self.touch(inode)
        finally:
            self.drop(inode, EX)

    async def _shrink(self, inode: Inode, size: int) -> None:
        """The new end first, with the tail of its block zeroed; then the blocks, step by step (TRUNCATING)."""
        assert inode.extents is not None
        cache = self.data_of(inode)
        end_block = (size + BLOCK - 1) // BLOCK
        inode.layout_version += 1
        if size % BLOCK:
            block = size // BLOCK
            if inode.extents.runs(block, 1)[0][1]:
                if cache.missing(block, 1):
                    await self._fetch(inode, cache, [(block, 1)])
                cache.put(size, bytes(BLOCK - size % BLOCK), dirty=True)
        cache.cut(end_block)
        inode.size = size
        inode.flags |= fmt.TRUNCATING
        self.touch(inode)
        await self.free_content(inode, end_block)

    async def free_content(self, inode: Inode, end_block: int = 0) -> None:
        """Gives back the blocks from `end_block` on, in steps of one group each; of a directory, all leaves."""
        if inode.directory is not None:
            await self._free_directory(inode)
            return
        extents = inode.extents
        if extents is None:
            return
        while True:
            last = extents.last
            if last is None or last[0] + last[2] <= end_block:
                break
            if self.journal.full:
                await self.journal.commit()
            numbers = [max(last[1], last[1] + end_block - last[0]), *extents.last_path()]
            space = await self.space_of(numbers, inode)
            try:
                self._free_step(inode, extents, space, end_block)
            finally:
                space.done()
        if inode.flags & fmt.TRUNCATING or not end_block:
            inode.flags &= ~fmt.TRUNCATING
            if not end_block and not inode.size:
                inode.extents = None
                inode.flags |= fmt.STUFFED
                inode.payload = bytearray()
            self.touch(inode)

    def _free_step(self, inode: Inode, extents: ExtentTree, space: Any, end_block: int) -> None:
        for _ in range(STEP_EXTENTS):
            last = extents.last
            if last is None or last[0] + last[2] <= end_block:
                break
            if not all(
                any(rgrp.contains(number) for rgrp in space.rgrps) for number in (last[1], *extents.last_path())
            ):
                break
            number, count = extents.trim(space, end_block)
            space.free_run(number, count)
        self.touch(inode)

    async def _free_directory(self, inode: Inode) -> None:
        directory = inode.directory
        assert directory is not None
        blocks = await directory.blocks(self.read_block)
        if not blocks:
            return
        # An empty directory: a few leaves and tables, all in one step so that no pointer outlives its leaf.
        space = await self.space_of([meta.number for meta in blocks], inode)
        try:
            for meta in blocks:
                space.free_block(meta)
            directory.reset()
            inode.flags = inode.flags & ~fmt.EXHASH | fmt.STUFFED
            inode.size = fmt.PAYLOAD
            self.touch(inode)
        finally:
            space.done()

    async def fallocate(self, ino: int, handle: int, offset: int, length: int, mode: int) -> None:
        """Allocates by writing zeros into the holes; other modes are not supported."""
        if mode & ~FALLOC_KEEP_SIZE:
            raise OSError(EOPNOTSUPP, "fallocate mode not supported")
        if offset < 0 or length <= 0 or offset + length > SIZE_MAX:
            raise OSError(EINVAL, "impossible range")
        inode = self._handle(handle).inode
        end = offset + length
        at = offset
        while at < end:
            await self.throttle()
            await self.hold(inode, EX)
            try:
                at = await self._reserve(inode, at, end, keep_size=bool(mode & FALLOC_KEEP_SIZE))
            finally:
                self.drop(inode, EX)

    async def _reserve(self, inode: Inode, at: int, end: int, *, keep_size: bool) -> int:
        """One step of fallocate; returns how far it came. The size goes along, so nothing lies behind the end."""
        if not inode.is_regular:
            raise OSError(EINVAL, "not a regular file")
        if inode.extents is None:
            if end <= fmt.PAYLOAD:
                if not keep_size and end > inode.size:
                    inode.size = end
                    self.touch(inode)
                return end
            await self._unstuff(inode)
        if at > inode.size and not keep_size:
            await self._zero_tail(inode)
        assert inode.extents is not None
        first = at // BLOCK
        blocks = min(READ_AHEAD, (end - 1) // BLOCK - first + 1)
        logical, physical, count, _ = inode.extents.runs(first, blocks)[0]
        upto = (logical + count) * BLOCK
        if not physical:
            cache = self.data_of(inode)
            upto = await self._allocate(inode, cache, logical * BLOCK, upto)
            cache.put(logical * BLOCK, bytes(upto - logical * BLOCK), dirty=True)
        if not keep_size and min(upto, end) > inode.size:
            inode.size = min(upto, end)
            self.touch(inode)
        return upto

    async def seek(self, ino: int, handle: int, offset: int, whence: int) -> int:
        inode = self._by_handle(ino, handle)
        await self.hold(inode, SH)
        try:
            if whence not in (SEEK_DATA, SEEK_HOLE):
                raise OSError(EINVAL, "only SEEK_DATA and SEEK_HOLE come here")
            if not 0 <= offset < inode.size:
                raise OSError(ENXIO, "beyond the end of the file")
            if inode.extents is None:
                return offset if whence == SEEK_DATA else inode.size
            first = offset // BLOCK
            for logical, physical, _, _ in inode.extents.runs(first, (inode.size - 1) // BLOCK - first + 1):
                if bool(physical) == (whence == SEEK_DATA):
                    return max(offset, logical * BLOCK)
            if whence == SEEK_HOLE:
                return inode.size
            raise OSError(ENXIO, "no data behind this offset")
        finally:
            self.drop(inode, SH)


def _fill(inode: Inode, data: FileData, first: int, content: bytearray) -> None:
    """Blocks as read from the device; what lies behind the end of the file is zeros, whatever the device has."""
    within = max(0, inode.size - first * BLOCK)
    if within < len(content):
        content[within:] = bytes(len(content) - within)
    data.fill(first, content)


def clear_suidgid(inode: Inode) -> None:
    """What a stranger's write or chown takes from a program."""
    if inode.is_regular:
        inode.mode &= ~S_ISUID
        if inode.mode & S_IXGRP:
            inode.mode &= ~S_ISGID
