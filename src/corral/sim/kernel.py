"""The kernel's FUSE client for one mount: its caches, its locks, its notifications.

`SimKernel` stands between simulated applications (`syscalls`) and a `corral.api.gfs.Filesystem` that a simulated
process serves; it is that filesystem's `Notifier`. It models what Linux 6.18 was measured to do with
EXPLICIT_INVAL_DATA and without the writeback cache:

    dentries    believed for `entry_valid_ns` and while their epoch is the current one; negative ones too
    attributes  believed for `attr_valid_ns`; an answer older than an invalidation is used once and not kept
    pages       filled by READ (with read-ahead) and by WRITE; dropped by notifications, opens without `keep`, and where
                the size shrinks; dirtied without any request by `map_write`

Locks, the ones that make notifications deadlock: a page is locked while a READ or WRITE of it is unanswered, and
INVAL_INODE waits for each page it drops; a directory is locked, shared by LOOKUP and exclusively by what changes names,
until the answer, and INVAL_ENTRY takes it exclusively. INC_EPOCH takes none. So a handler that awaits the wrong
notification before it answers hangs here as it would there.

System calls and notifications run in the kernel (`in_kernel`): they end, and give their locks back, whatever becomes of
the process that called. A handler is started outside any task and continued in one if it does not end at once, as by
the real door. A server that dies leaves its requests and all later ones ENOTCONN; pages cached stay readable through
open descriptors.
"""

import asyncio
import contextlib
import errno
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from os import strerror
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar

from corral.api.gfs import ROOT, Attributes, Entry, Filesystem
from corral.base.time import MICROSECOND, MILLISECOND, SECOND, Instant
from corral.sim.knobs import skewed

if TYPE_CHECKING:
    from corral.sim.process import Process

T = TypeVar("T")

PAGE: Final = 4096
REQUEST_MAX: Final = 1 << 20
REQUEST_LOW: Final = 4 * MICROSECOND  # a request's way from the application to the server, or back
REQUEST_HIGH: Final = 400 * MICROSECOND
HELD_POLL: Final = 5 * MILLISECOND


def fail(number: int) -> OSError:
    return OSError(number, strerror(number))


class Lock:
    """Shared or exclusive, first come first served. Held by kernel code only, which is never cancelled."""

    def __init__(self) -> None:
        self._holders = 0  # -1: one exclusively
        self._waiting: list[tuple[bool, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def held(self, *, exclusive: bool) -> AsyncIterator[None]:
        if self._waiting or (self._holders if exclusive else self._holders < 0):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((exclusive, turn))
            await turn
        else:
            self._holders = -1 if exclusive else self._holders + 1
        try:
            yield
        finally:
            self._holders = 0 if exclusive else self._holders - 1
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            exclusive, turn = self._waiting[0]
            if self._holders if exclusive else self._holders < 0:
                return
            self._waiting.pop(0)
            self._holders = -1 if exclusive else self._holders + 1
            turn.set_result(None)


class CachedPage:
    __slots__ = ("_waiting", "data", "dirty", "dropped", "locked")

    def __init__(self) -> None:
        self.data = bytearray(PAGE)
        self.dirty = False
        self.locked = True
        self.dropped = False  # cut off by a truncation while it was locked
        self._waiting: list[asyncio.Future[None]] = []

    def unlock(self) -> None:
        self.locked = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_unlocked(self) -> None:
        while self.locked:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter


class Dentry:
    """`ino` 0: known not to exist."""

    __slots__ = ("epoch", "ino", "until")

    def __init__(self, ino: int, until: Instant, epoch: int) -> None:
        self.ino = ino
        self.until = until
        self.epoch = epoch


class KernelInode:
    """What the kernel holds of one node id."""

    def __init__(self, entry: Entry) -> None:
        self.ino = entry.ino
        self.generation = entry.generation
        self.attributes = entry.attributes
        self.attr_until: Instant = 0
        self.attr_version = 0  # raised by everything that makes an answer under way old
        self.lookups = 0
        self.bad = False  # its node id belongs to another file now
        self.size = entry.attributes.size
        self.pages: dict[int, CachedPage] = {}
        self.children: dict[bytes, Dentry] = {}
        self.names = Lock()  # the directory's lock
        self.writing = Lock()  # the file's lock: writers one after the other
        self.handles: dict[int, bool] = {}  # open handle -> may write


class SimKernel:
    """`epoch` False: a kernel before INC_EPOCH (its door keeps entry timeouts at zero). `may_reply`: answers wait until
    it says yes, as the real door's do when the lease has lapsed."""

    def __init__(
        self,
        process: "Process",
        *,
        epoch: bool = True,
        may_reply: Callable[[], bool] | None = None,
        read_ahead: int = 4,
    ) -> None:
        self.process = process
        self.has_epoch = epoch
        self.requests: dict[str, int] = {}
        self.withdrawn = False
        self._may_reply = may_reply
        self._read_ahead = read_ahead
        self._filesystem: Filesystem | None = None
        self._scheduler = process.simulation.scheduler
        self._rng = Random(process.simulation.rng.getrandbits(64))
        self._epoch = 0
        self._version = 0  # grows with every invalidation
        self._calls = 0  # under way; each may be about to use an inode that nothing else refers to
        self._now = process.machine.clock.local
        root = Attributes(ROOT, 0o040755, 2, 0, 0, 0, 0, 0, 0, 0, 0)
        self.inodes: dict[int, KernelInode] = {ROOT: KernelInode(Entry(ROOT, 0, root))}

    def attach(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem

    def withdraw(self) -> None:
        """The server gives the mount up: everything waiting and all that follows gets ENOTCONN."""
        self.withdrawn = True

    def now(self) -> Instant:
        return self._now(self._scheduler.now)

    @property
    def version(self) -> int:
        """Read before a request: what its answer says is older than any invalidation that comes later."""
        return self._version

    @property
    def epoch(self) -> int:
        return self._epoch

    async def in_kernel(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs to its end even if the caller is cancelled, paused or killed."""
        outer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        self._calls += 1

        def done(inner: asyncio.Task[T]) -> None:
            self._calls -= 1
            error = inner.exception()
            if error is not None and not isinstance(error, OSError):
                self._scheduler.fail(error)
            if outer.done():
                return
            if error is not None:
                outer.set_exception(error)
            else:
                outer.set_result(inner.result())

        self._scheduler.kernel.create_task(work, name="kernel").add_done_callback(done)
        return await outer

    # --- requests ---

    async def request(self, name: str, start: Callable[[Filesystem], Coroutine[Any, Any, T]]) -> T:
        """One request and its answer. Raises the OSError of the answer, or ENOTCONN."""
        if self.withdrawn or self._filesystem is None or not self.process.alive:
            raise fail(errno.ENOTCONN)
        self.requests[name] = self.requests.get(name, 0) + 1
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        request = Request(self, start(self._filesystem), answer)
        self.process.resources[request] = None
        self.process.loop.deliver(self._scheduler.now + self._trip(), request.begin)
        return await answer

    def _trip(self) -> int:
        return skewed(self._rng, REQUEST_LOW, REQUEST_HIGH)

    def reply(self, request: "Request", finish: Callable[[], None]) -> None:
        """In the server's loop: the answer leaves as soon as it may."""
        if self.withdrawn:
            request.close()
        elif self._may_reply is not None and not self._may_reply():
            self.process.loop.deliver(self._scheduler.now + HELD_POLL, self.reply, request, finish)
        else:
            self.process.resources.pop(request, None)
            self._scheduler.after(self._trip(), finish)

    # --- names ---

    def inode(self, ino: int) -> KernelInode:
        return self.inodes[ino]

    def adopt(self, entry: Entry, version: int = -1) -> KernelInode:
        """An answer carried an entry: one lookup more, and attributes to keep unless they are old."""
        inode = self.inodes.get(entry.ino)
        if inode is not None and inode.generation != entry.generation and entry.ino != ROOT:
            inode.bad = True
            inode = None
        if inode is None:
            inode = self.inodes[entry.ino] = KernelInode(entry)
        inode.lookups += 1
        self.keep_attributes(
            inode, entry.attributes, entry.attr_valid_ns, inode.attr_version if version < 0 else version
        )
        return inode

    async def lookup(
        self, parent: KernelInode, name: bytes, caller: Any, *, locked: bool = False
    ) -> KernelInode | None:
        """From the cache while it is valid, else LOOKUP under the directory's lock. None: there is no such name."""
        known = self._valid(parent, name)
        if known is None:
            if locked:
                return await self._ask(parent, name, caller)
            async with parent.names.held(exclusive=False):
                known = self._valid(parent, name)
                if known is None:
                    return await self._ask(parent, name, caller)
        return self.inodes[known.ino] if known.ino else None

    def _valid(self, parent: KernelInode, name: bytes) -> Dentry | None:
        known = parent.children.get(name)
        if known is None or known.epoch != self._epoch or known.until <= self.now():
            return None
        return known if not known.ino or known.ino in self.inodes else None

    async def _ask(self, parent: KernelInode, name: bytes, caller: Any) -> KernelInode | None:
        epoch, version = self._epoch, self.version
        try:
            entry = await self.request("lookup", lambda fs: fs.lookup(parent.ino, name, caller))
        except FileNotFoundError:
            parent.children.pop(name, None)
            return None
        return self.learn(parent, name, entry, epoch, version)

    def learn(
        self, parent: KernelInode, name: bytes, entry: Entry, epoch: int | None = None, version: int = -1
    ) -> KernelInode | None:
        """Puts what an answer says of a name into the caches."""
        valid_ns = entry.entry_valid_ns if self.has_epoch else 0
        epoch = self._epoch if epoch is None else epoch
        parent.children[name] = Dentry(entry.ino, self.now() + valid_ns, epoch)
        return self.adopt(entry, version) if entry.ino else None

    def forget_name(self, parent: KernelInode, name: bytes) -> None:
        parent.children.pop(name, None)

    def drop_caches(self) -> None:
        """Memory is short: everything clean that nobody has open or is just using is forgotten."""
        for inode in list(self.inodes.values()):
            for index in [index for index, page in inode.pages.items() if not page.dirty and not page.locked]:
                del inode.pages[index]
            inode.children.clear()
            unused = not self._calls and not inode.handles and not inode.pages
            if unused and inode.ino != ROOT and self._filesystem is not None:
                del self.inodes[inode.ino]
                if self.process.alive and not self.withdrawn:
                    self.process.loop.deliver(self._scheduler.now, self._filesystem.forget, inode.ino, inode.lookups)

    # --- attributes ---

    def keep_attributes(self, inode: KernelInode, attributes: Attributes, valid_ns: int, version: int) -> None:
        inode.attributes = attributes
        if inode.attr_version > version:
            inode.attr_until = 0
            return
        inode.attr_until = self.now() + valid_ns
        if attributes.size != inode.size:
            inode.size = attributes.size
            self.cut_pages(inode, attributes.size)

    def outdate(self, inode: KernelInode) -> None:
        self._version += 1
        inode.attr_version = self._version
        inode.attr_until = 0

    async def getattr(self, inode: KernelInode, handle: int | None = None, *, fresh: bool = False) -> Attributes:
        if inode.bad:
            raise fail(errno.ESTALE)
        if fresh or inode.attr_until <= self.now():
            version = self.version
            attributes, valid_ns = await self.request("getattr", lambda fs: fs.getattr(inode.ino, handle))
            self.keep_attributes(inode, attributes, valid_ns, version)
        return inode.attributes

    def cut_pages(self, inode: KernelInode, size: int) -> None:
        """The file ends at `size` now: no page shows anything beyond it."""
        for index in [index for index in inode.pages if index * PAGE >= size]:
            page = inode.pages.pop(index)
            page.dropped = page.locked
            page.dirty = False
        last = inode.pages.get(size // PAGE)
        if last is not None and not last.locked:
            last.data[size % PAGE :] = bytes(PAGE - size % PAGE)

    # --- notifications (api.gfs.Notifier), called in the server's process ---

    async def invalidate_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        await self.in_kernel(self._invalidate_inode(ino, offset, length))

    async def _invalidate_inode(self, ino: int, offset: int, length: int) -> None:
        await self._notify()
        inode = self.inodes.get(ino)
        if inode is None or self.withdrawn:
            return
        self.outdate(inode)
        if offset < 0:
            return
        last = (offset + length - 1) // PAGE if length > 0 else 1 << 62
        cursor = offset // PAGE
        while True:  # pages that come to be behind the cursor are missed, as by the real pass
            index = min((each for each in inode.pages if cursor <= each <= last), default=-1)
            if index < 0:
                return
            page = inode.pages[index]
            await page.wait_unlocked()
            if page.dirty:
                await self.write_back(inode, index)
            elif inode.pages.get(index) is page and not page.locked:
                del inode.pages[index]
                cursor = index + 1

    async def invalidate_entry(self, parent: int, name: bytes) -> None:
        await self.in_kernel(self._invalidate_entry(parent, name))

    async def _invalidate_entry(self, parent: int, name: bytes) -> None:
        await self._notify()
        inode = self.inodes.get(parent)
        if inode is not None and not self.withdrawn:
            async with inode.names.held(exclusive=True):
                inode.children.pop(name, None)
                self.outdate(inode)

    async def invalidate_all_entries(self) -> bool:
        await self.in_kernel(self._notify())
        self._epoch += self.has_epoch
        return self.has_epoch

    async def _notify(self) -> None:
        """A notification is written by another thread: the server runs on meanwhile."""
        await asyncio.sleep(self._trip() / SECOND)

    async def write_back(self, inode: KernelInode, index: int) -> None:
        """A page dirtied through a mapping becomes a WRITE."""
        page = inode.pages[index]
        handle = next((handle for handle, writes in inode.handles.items() if writes), None)
        page.dirty = False
        if handle is None:
            return
        page.locked = True
        data = bytes(page.data[: max(0, min(PAGE, inode.size - index * PAGE))])
        try:
            await self.request(
                "write",
                lambda fs: fs.write(
                    inode.ino, handle, index * PAGE, data, append=False, from_cache=True, kill_suidgid=False
                ),
            )
        finally:
            page.unlock()

    # --- pages ---

    async def page(self, inode: KernelInode, handle: int, index: int) -> CachedPage:
        """This page, read if need be."""
        while True:
            page = inode.pages.get(index)
            if page is None:
                await self._fill(inode, handle, index)
            elif page.locked:
                await page.wait_unlocked()
            else:
                return page

    async def _fill(self, inode: KernelInode, handle: int, index: int) -> None:
        end = max(index + 1, -(-inode.size // PAGE))
        wanted = {}
        for each in range(index, min(end, index + 1 + self._rng.randint(0, self._read_ahead))):
            if each in inode.pages:
                break
            wanted[each] = inode.pages[each] = CachedPage()
        version = self.version
        size = len(wanted) * PAGE
        try:
            parts = await self.request("read", lambda fs: fs.read(inode.ino, handle, index * PAGE, size))
            data = b"".join(parts)
        except BaseException:
            for each, page in wanted.items():
                if inode.pages.get(each) is page:
                    del inode.pages[each]
                page.unlock()
            raise
        for each, page in wanted.items():
            piece = data[(each - index) * PAGE : (each - index + 1) * PAGE]
            page.data[: len(piece)] = piece
            page.unlock()
            if page.dropped and inode.pages.get(each) is page:
                del inode.pages[each]
        if len(data) < size and inode.attr_version <= version and index * PAGE + len(data) < inode.size:
            inode.size = index * PAGE + len(data)  # the file has shrunk elsewhere


class Request:
    """One request in the server; a resource of its process, so that the death of the server is its answer."""

    def __init__(self, kernel: SimKernel, handler: Coroutine[Any, Any, Any], answer: "asyncio.Future[Any]") -> None:
        self._kernel = kernel
        self._handler = handler
        self._answer = answer
        self._begun = False

    def begin(self) -> None:
        """Outside any task: what ends at once is answered at once."""
        self._begun = True
        try:
            first = self._handler.send(None)
        except StopIteration as end:
            self._finish(end.value, None)
        except OSError as error:
            self._finish(None, error)
        else:
            self._kernel.process.spawn(self._go_on(first), "fuse request")

    async def _go_on(self, first: Any) -> None:
        try:
            result = await _rest(self._handler, first)
        except OSError as error:
            self._finish(None, error)
        else:
            self._finish(result, None)

    def _finish(self, result: Any, error: OSError | None) -> None:
        self._kernel.reply(self, lambda: self._complete(result, error))

    def _complete(self, result: Any, error: OSError | None) -> None:
        if self._answer.done():
            return
        if error is not None:
            self._answer.set_exception(error)
        else:
            self._answer.set_result(result)

    def close(self) -> None:
        """The server is gone, or has given up."""
        self._kernel.process.resources.pop(self, None)
        if not self._begun:
            self._handler.close()
        self._complete(None, fail(errno.ENOTCONN))


@types.coroutine
def _rest(handler: Coroutine[Any, Any, Any], first: Any) -> Generator[Any, Any, Any]:
    """Awaits what is left of a coroutine that has been started by hand and waits for `first`."""
    waits_for = first
    while True:
        try:
            value = yield waits_for
        except BaseException as error:
            try:
                waits_for = handler.throw(error)
            except StopIteration as end:
                return end.value
        else:
            try:
                waits_for = handler.send(value)
            except StopIteration as end:
                return end.value
