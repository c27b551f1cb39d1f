"""Notifications: what the filesystem tells the kernel's caches (implements `corral.api.gfs.Notifier`).

Each is a write to /dev/fuse that the kernel carries out before `write` returns, taking locks which a request of ours
may hold until we answer it. Measured on Linux 6.18, a notification sent in place of the reply deadlocks for:

    INVAL_INODE (pages) of the inode of a READ or WRITE that is being answered: it waits for the locked page
    INVAL_ENTRY on the directory of a LOOKUP, CREATE or UNLINK that is being answered: it waits for the directory's lock
    dirty mapped pages: INVAL_INODE first has them written back, by WRITE requests that we must answer meanwhile

Hence FUSE-5: no notification is ever written by the thread that answers requests. Threads here do it and complete a
future; a handler must not await that future before its own reply unless none of the above applies to it. The order is:
finish the request, then invalidate, and keep the cluster lock until the pass has served no READ (else repeat it, for
that READ may have cached again what was just dropped).

A thread that is stuck behind one inode must not delay the others, so another is started when all are busy, up to
`THREADS_MAX`. INC_EPOCH (protocol 7.44) takes no inode lock; without it entry timeouts stay zero (FUSE-6).
"""

import asyncio
import errno
import os
import threading
from collections import deque
from typing import Final, final

from corral.base.errors import ClusterError
from corral.fuse import device, protocol, replies

THREADS_MAX: Final = 8
QUEUE_MAX: Final = 65536

# The kernel does not have what was to be dropped: as good as dropped.
_UNKNOWN: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY})


class NotifierOverrun(ClusterError):
    """More notifications wait than can be sensible: something above invalidates in a loop."""


@final
class KernelNotifier:
    """Before `attach` and after `detach` there is no kernel cache of ours: every call completes at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.has_epoch = False
        self.sent = 0
        self.failed = 0
        self._loop = loop
        self._fd = -1
        self._lock = threading.Condition()
        self._queue: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._done: list[tuple[asyncio.Future[None], int]] = []
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def attach(self, fd: int, minor: int) -> None:
        self._fd = fd
        self.has_epoch = minor >= protocol.SINCE_INC_EPOCH

    async def invalidate_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        if self._fd >= 0:
            await self._send(replies.inval_inode(ino, offset, length))

    async def invalidate_entry(self, parent: int, name: bytes) -> None:
        if self._fd >= 0:
            await self._send(replies.inval_entry(parent, name))

    async def invalidate_all_entries(self) -> bool:
        if self._fd >= 0 and self.has_epoch:
            await self._send(replies.inc_epoch())
        return self.has_epoch

    def detach(self) -> None:
        """The mount is gone (its file must still be open): waiting calls complete, threads end by themselves."""
        with self._lock:
            self._fd = -1
            waiting, self._queue = self._queue, deque()
            self._lock.notify_all()
        for _, future in waiting:
            if not future.done():
                future.set_result(None)

    def join(self, timeout_s: float) -> bool:
        """Called off the loop, after `detach`: False when a thread is still inside the kernel."""
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    # --- loop side -----------------------------------------------------------------------------------------------

    def _send(self, message: bytes) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            if len(self._queue) >= QUEUE_MAX:
                raise NotifierOverrun(f"{QUEUE_MAX} cache notifications wait for the kernel; is a reader stuck?")
            self._queue.append((message, future))
            if self._idle >= len(self._queue):
                self._lock.notify()
            elif len(self._threads) < THREADS_MAX:
                thread = threading.Thread(target=self._run, name="fuse-notify", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _complete(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for future, error in done:
            self.sent += 1
            if error and error not in _UNKNOWN and error not in device.GONE:
                self.failed += 1
                if not future.done():
                    future.set_exception(OSError(error, os.strerror(error)))
            elif not future.done():
                future.set_result(None)

    # --- thread side ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                while not self._queue and self._fd >= 0:
                    self._lock.wait()
                self._idle -= 1
                if not self._queue:
                    return
                message, future = self._queue.popleft()
                fd = self._fd
            error = 0
            try:
                os.write(fd, message)
            except OSError as failure:
                error = failure.errno or errno.EIO
            with self._lock:
                first = not self._done
                self._done.append((future, error))
            if first:
                try:
                    self._loop.call_soon_threadsafe(self._complete)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return
