"""A shared block device or image, read and written past the page cache (World.disk; DESIGN 3 and 4).

Every transfer is one synchronous `preadv` or `pwritev` in a thread, never io_uring: when this process is *gone* no I/O
of its is left. O_DIRECT wants aligned memory: each thread has one aligned buffer that transfers pass through; a write
whose buffers are aligned already goes out of them as they are, without a copy.

*Whose are the buffers of a write?* The disk's until the write has ended. When the task awaiting it is cancelled the
write still runs; its buffers must then not change before `wait_quiet` returned, and an error nobody waited for is
raised by the next `flush`: what flush calls durable was written.
"""

import asyncio
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final, final

from corral.base.world import Buffer
from corral.real.workers import Workers

BLOCK: Final = 4096
THREADS: Final = 8  # measured.md: random reads 4 times, writes 3 times the rate of one thread
BOUNCE_SIZE: Final = 1 << 20  # bytes of each thread's buffer; longer transfers pass through it in pieces
VECTORS_MAX: Final = 1024  # IOV_MAX

BLKGETSIZE64: Final = 0x80081272
BLKDISCARD: Final = 0x1277
PUNCH_HOLE_KEEP_SIZE: Final = 0x03  # FALLOC_FL_*
NO_DISCARD: Final = frozenset((errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM))

log = logging.getLogger("corral.disk")

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_thread: Final = threading.local()


def _bounce() -> memoryview:
    """This thread's aligned buffer."""
    view: memoryview | None = getattr(_thread, "bounce", None)
    if view is None:
        view = _thread.bounce = memoryview(mmap.mmap(-1, BOUNCE_SIZE))
    return view


def is_aligned(view: memoryview) -> bool:
    """May O_DIRECT transfer this memory as it is? Read-only memory does not tell its address and counts as not."""
    if view.nbytes % BLOCK or view.readonly or not view.contiguous:
        return False
    return view.nbytes > 0 and ctypes.addressof(ctypes.c_char.from_buffer(view)) % BLOCK == 0


@final
class RealDisk:
    """Made by `open_disk`. `direct` is False where the filesystem under an image refuses O_DIRECT (DESIGN 5, gfs:
    good on one host only)."""

    def __init__(self, workers: Workers, fd: int, path: str, *, direct: bool, device: bool) -> None:
        self.path: Final = path
        self.direct: Final = direct
        self._workers = workers
        self._fd = fd
        self._device = device
        self._size = _size_of(fd, device)
        self._under_way = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._closed = False
        self._failed: OSError | None = None  # of a flush, or of a write nobody waited for: no flush succeeds any more

    @property
    def block_size(self) -> int:
        return BLOCK

    @property
    def size(self) -> int:
        self._size = _size_of(self._fd, self._device)
        return self._size

    async def read(self, offset: int, length: int) -> bytearray:
        self._check_range(offset, length)
        content: bytearray = await asyncio.shield(self._submit(self._read, offset, length))
        return content

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length = sum(view.nbytes for view in views)
        self._check_range(offset, length)
        views = [view for view in views if view.nbytes]
        if not views:
            return
        as_they_are = len(views) <= VECTORS_MAX and (not self.direct or all(map(is_aligned, views)))
        job = self._submit(self._write_vector if as_they_are else self._write_copy, offset, views)
        try:
            await asyncio.shield(job)
        except asyncio.CancelledError:
            job.add_done_callback(self._orphaned)
            raise

    async def flush(self) -> None:
        if self._failed is not None:
            raise OSError(self._failed.errno, f"{self._failed.strerror} (and nothing was durable since)")
        await asyncio.shield(self._submit(self._flush))
        if self._failed is not None:  # another flush failed meanwhile: it may have taken our error with it
            raise OSError(self._failed.errno, self._failed.strerror)

    async def discard(self, offset: int, length: int) -> None:
        """Best effort: a device that cannot do it keeps the blocks."""
        self._check_range(offset, length)
        if length:
            await asyncio.shield(self._submit(self._discard, offset, length))

    def close(self) -> None:
        """What is under way runs to its end; then the file is closed."""
        if not self._closed:
            self._closed = True
            if not self._under_way:
                os.close(self._fd)

    async def wait_quiet(self) -> None:
        """Returns when no transfer is under way."""
        await self._quiet.wait()

    # --- in the loop ------------------------------------------------------------------------------------------------

    def _check_range(self, offset: int, length: int) -> None:
        if self._closed:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        if offset % BLOCK or length % BLOCK or offset < 0 or length < 0:
            raise ValueError(f"{self.path}: offset {offset} and length {length} are not multiples of {BLOCK}")
        if offset + length > self._size and offset + length > self.size:
            raise ValueError(f"{self.path}: {length} bytes at {offset} are beyond its end at {self._size}")

    def _submit(self, fn: Any, *args: Any) -> "asyncio.Future[Any]":
        if self._closed:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        job = self._workers.submit(fn, *args)
        self._under_way += 1
        self._quiet.clear()
        job.add_done_callback(self._ended)
        return job

    def _ended(self, _job: "asyncio.Future[Any]") -> None:
        self._under_way -= 1
        if not self._under_way:
            self._quiet.set()
            if self._closed:
                os.close(self._fd)

    def _orphaned(self, job: "asyncio.Future[Any]") -> None:
        error = job.exception()
        if isinstance(error, OSError) and self._failed is None:
            self._failed = error

    # --- in a thread ------------------------------------------------------------------------------------------------

    def _read(self, offset: int, length: int) -> bytearray:
        if not self.direct:
            content = bytearray(length)
            self._fill(memoryview(content), offset)
            return content
        bounce = _bounce()
        if length <= BOUNCE_SIZE:
            self._fill(bounce[:length], offset)
            return bytearray(bounce[:length])
        content = bytearray(length)
        for start in range(0, length, BOUNCE_SIZE):
            piece = bounce[: min(BOUNCE_SIZE, length - start)]
            self._fill(piece, offset + start)
            content[start : start + len(piece)] = piece
        return content

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = os.preadv(self._fd, (view,), offset)
            except OSError as error:
                raise self._error("read", len(view), offset, error) from None
            if not count:
                raise OSError(errno.EIO, f"{self.path} ends at {offset}: it was cut short while in use")
            view = view[count:]
            offset += count

    def _write_vector(self, offset: int, views: list[memoryview]) -> None:
        views = list(views)
        while views:
            try:
                count = os.pwritev(self._fd, views, offset)
            except OSError as error:
                raise self._error("write", sum(map(len, views)), offset, error) from None
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _write_copy(self, offset: int, views: list[memoryview]) -> None:
        bounce = _bounce()
        filled = 0
        for view in views:
            while view:
                count = min(len(view), BOUNCE_SIZE - filled)
                bounce[filled : filled + count] = view[:count]
                filled += count
                view = view[count:]
                if filled == BOUNCE_SIZE:
                    self._write_vector(offset, [bounce])
                    offset += filled
                    filled = 0
        if filled:
            self._write_vector(offset, [bounce[:filled]])

    def _flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # The kernel may have dropped what it could not write, and would call the next flush a success.
            self._failed = OSError(error.errno, f"{self.path}: flush failed: {error.strerror}")
            raise self._failed from None

    def _discard(self, offset: int, length: int) -> None:
        try:
            if self._device:
                fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("=QQ", offset, length))
            elif _libc.fallocate(self._fd, PUNCH_HOLE_KEEP_SIZE, offset, length) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        except OSError as error:
            if error.errno not in NO_DISCARD:
                raise self._error("discard", length, offset, error) from None

    def _error(self, what: str, length: int, offset: int, error: OSError) -> OSError:
        return OSError(error.errno, f"{self.path}: {what} of {length} bytes at {offset} failed: {error.strerror}")


def _size_of(fd: int, device: bool) -> int:
    if device:
        size: int = struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
    else:
        size = os.fstat(fd).st_size
    return size // BLOCK * BLOCK


def _open(path: str) -> tuple[int, bool, bool]:
    """The descriptor, whether it is direct, whether it is a device. In a thread: opening a device may take long."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_DIRECT)
        direct = True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise OSError(error.errno, f"cannot open {path}: {error.strerror}") from None
        fd = os.open(path, flags)
        direct = False
    try:
        kind = os.fstat(fd).st_mode
        device = stat.S_ISBLK(kind)
        if not device and not stat.S_ISREG(kind):
            raise OSError(errno.ENOTBLK, f"{path} is neither a block device nor an image file")
        if direct and not _takes_direct(fd):  # some filesystems take the flag and refuse the transfer
            os.close(fd)
            fd = os.open(path, flags)
            direct = False
    except BaseException:
        os.close(fd)
        raise
    return fd, direct, device


def _takes_direct(fd: int) -> bool:
    try:
        os.preadv(fd, (_bounce()[:BLOCK],), 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


async def open_disk(workers: Workers, path: str) -> RealDisk:
    """Raises OSError with a sentence."""
    fd, direct, device = await workers.submit(_open, path)
    if not direct:
        log.warning(
            "%s does not take O_DIRECT: buffered, with fdatasync; safe only when all nodes are on this host", path
        )
    return RealDisk(workers, fd, path, direct=direct, device=device)
