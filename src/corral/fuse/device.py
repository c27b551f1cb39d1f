"""One open /dev/fuse: requests in, answers out, and the buffers WRITE data lies in.

A request is read with `readv` into an 80-byte header buffer and a page-aligned mapping, so the data of a WRITE starts
on a page and an O_DIRECT write can take it from there. Invariant FUSE-2: the mapping a handler may still look at is
never read into again. `detach` takes it out of use (the next request gets another), `attach` brings it back when the
handler is done. Most requests finish at once and share one mapping.

Bounded: `DETACHED_MAX` mappings may be out at a time; a WRITE beyond that gets a copy of its data, of its own size, and
the kernel bounds how many requests it has out (one a thread, plus max_background).
"""

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Final, final

from corral.base.world import Buffer
from corral.fuse import protocol

DETACHED_MAX: Final = 32
SPARES_MAX: Final = 4
IOV_MAX: Final = 1024

# The connection is gone: unmounted, aborted, or closed by us.
GONE: Final = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EBADF, errno.EPERM})
_AGAIN: Final = frozenset({errno.ENOENT, errno.EINTR})  # the request was taken back before we had read it


@final
class Device:
    __slots__ = ("_buffers", "_map", "_max_write", "_out", "_spares", "closed", "data", "fd", "header")

    def __init__(self, fd: int, max_write: int) -> None:
        self.fd = fd
        self.closed = False
        self.header = bytearray(protocol.HEADER_BUFFER)
        self._max_write = max_write
        self._out = 0
        self._spares: list[mmap.mmap] = []
        self._use(self._mapping())

    def _mapping(self) -> mmap.mmap:
        # One page more than the largest WRITE: the kernel refuses a reader with less room than header + max_write.
        return mmap.mmap(-1, self._max_write + mmap.PAGESIZE)

    def _use(self, mapping: mmap.mmap) -> None:
        self._map = mapping
        self.data = memoryview(mapping)
        self._buffers: list[bytearray | memoryview] = [self.header, self.data]

    def receive(self) -> int:
        """The length of the request now in `header` and `data`; 0 when none waits. OSError with an errno of `GONE`
        when the connection has ended."""
        while True:
            try:
                return os.readv(self.fd, self._buffers)
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno not in _AGAIN:
                    raise

    def detach(self) -> mmap.mmap | None:
        """The current mapping, whose WRITE is still being worked on; None when too many are out."""
        if self._out >= DETACHED_MAX:
            return None
        self._out += 1
        taken = self._map
        self._use(self._spares.pop() if self._spares else self._mapping())
        return taken

    def attach(self, mapping: mmap.mmap) -> None:
        self._out -= 1
        if len(self._spares) < SPARES_MAX:
            self._spares.append(mapping)  # else it goes with its last reference

    @property
    def crowded(self) -> bool:
        return self._out >= DETACHED_MAX

    def send(self, message: bytes) -> None:
        os.write(self.fd, message)

    def send_gathered(self, buffers: Sequence[Buffer]) -> None:
        if len(buffers) > IOV_MAX:
            buffers = [buffers[0], b"".join(buffers[1:])]
        os.writev(self.fd, buffers)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            fd, self.fd = self.fd, -1  # a late answer must not meet a reused number
            os.close(fd)
