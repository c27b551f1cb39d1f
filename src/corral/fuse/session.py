"""A mounted filesystem being served: reads requests, drives their handlers, answers, until the mount is gone.

One code path for every request: its handler coroutine is driven by `send(None)`; if it ends at once the answer is
written there and then, else the suspended coroutine is handed to a task which continues it and answers. A handler
therefore starts outside any task: it may await futures, but not ask for the current task (asyncio.timeout does).

States: starting (INIT not answered) → serving → gone (unmounted or aborted), or serving → refusing (withdrawn, or our
own bug: EIO to everybody while the caches are dropped) → gone. `closed` completes when the filesystem's `destroy` has
returned too.

Invariants
    FUSE-1  every request gets exactly one answer, FORGET, BATCH_FORGET and INTERRUPT none
    FUSE-2  the buffer a WRITE's data lies in is not read into before its handler has ended
    FUSE-3  no answer leaves while `may_reply` says no, but "interrupted" (EINTR), which tells nothing of the
            filesystem; held answers leave in order, or become EIO by `withdraw`
    FUSE-4  lookups and handles of an answer the kernel did not take are given back
    FUSE-5  notifications are never written by this thread (see notify.py)
    FUSE-6  without INC_EPOCH every entry timeout is zero

Interrupts: a waiting lock request (SETLKW) is cancelled and answered EINTR. Of the others only those that change
nothing, and only when the caller is being killed: a program does not expect EINTR from stat() because a timer went off,
and it is enough that `kill -9` works while the cluster is suspended.

That goes for held answers too: whatever only looked is given up when its caller is being killed, what the answer
promised (lookups) is taken back. An operation that has changed something, or took a lock, is never reported as
interrupted: the kernel would go on caching what was before it. Its caller waits, killed or not, until the answer may
leave or the mount withdraws.

Caches (measured.md): no writeback cache, no AUTO_INVAL_DATA; pages are dropped by explicit notifications alone.
"""

import asyncio
import contextlib
import errno
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from mmap import mmap
from typing import Any, Final, NamedTuple, final

import msgspec

from corral.api.gfs import Filesystem
from corral.base.errors import ClusterError
from corral.base.time import MICROSECOND, MILLISECOND
from corral.fuse import device as dev
from corral.fuse import protocol as p
from corral.fuse import replies
from corral.fuse.notify import KernelNotifier
from corral.fuse.operations import Operations, Payload

TURN_NS: Final = 2 * MILLISECOND  # of the 5 ms a loop turn may last
TURN_REQUESTS: Final = 64
LINGER_NS: Final = 30 * MICROSECOND
PATIENCE_MAX: Final = 63
SUSPENDED_MAX: Final = 16384
HELD_POLL_S: Final = 0.005
CLOSE_GRACE_S: Final = 30.0
ABORT_GRACE_S: Final = 0.2
FAREWELL_S: Final = 1.0

# Requests that only look: giving them up halfway changes nothing.
_HARMLESS: Final = frozenset(
    {p.LOOKUP, p.GETATTR, p.READLINK, p.READ, p.STATFS, p.READDIR, p.READDIRPLUS, p.GETLK, p.LSEEK, p.FSYNC, p.FSYNCDIR}
)
_UNANSWERED: Final = frozenset({p.FORGET, p.BATCH_FORGET, p.INTERRUPT})
# Never refused for lack of room: the kernel does not ask again, and what they release would leak.
_RELEASING: Final = frozenset({p.RELEASE, p.RELEASEDIR, p.FLUSH})

_WANTED: Final = (
    p.ASYNC_READ
    | p.POSIX_LOCKS
    | p.FLOCK_LOCKS
    | p.BIG_WRITES
    | p.DO_READDIRPLUS
    | p.READDIRPLUS_AUTO
    | p.ASYNC_DIO
    | p.PARALLEL_DIROPS
    | p.ABORT_ERROR
    | p.MAX_PAGES
    | p.EXPLICIT_INVAL_DATA
)


class Withdrawn(ClusterError):
    """The mount was given up because this node can no longer vouch for what it would answer."""


class UnsupportedKernel(ClusterError):
    """The kernel's FUSE protocol is too old."""


class Statistics(NamedTuple):
    requests: dict[str, int]
    inline: int  # answered at once
    suspended: int  # had to wait and were handed to a task
    waiting: int  # of those, now
    held: int  # answers kept back by `may_reply`, now
    interrupted: int
    malformed: int
    unsupported: int
    refused: int  # for lack of room
    undone: int  # answers the kernel did not take
    forgets_excessive: int
    notifications: int
    nodes_known: int
    longest_ns: int  # the longest stretch one request kept the loop
    minor: int


class WaitingRequest(NamedTuple):
    """Somebody who waits for the filesystem, for status displays."""

    request: str
    node: int
    pid: int
    waited_ns: int


class Limits(msgspec.Struct, frozen=True):
    """What INIT agrees on. `minor_max` forces an older protocol, for tests."""

    max_write: int = 1 << 20
    max_background: int = 64
    minor_max: int = p.MINOR


@final
class _Held:
    """An answer that may not leave. `interrupted`: its caller no longer wants to wait."""

    __slots__ = ("error", "interrupted", "node", "opcode", "payload", "pid", "unique")

    def __init__(
        self, unique: int, opcode: int, node: int, pid: int, error: int, payload: Payload, *, interrupted: bool
    ) -> None:
        self.unique = unique
        self.opcode = opcode
        self.node = node
        self.pid = pid
        self.error = error
        # A READ's buffers belong to the filesystem's cache and may change before the answer leaves.
        self.payload = payload if isinstance(payload, bytes) else b"".join(payload)
        self.interrupted = interrupted


@final
class _Waiting:
    """A request whose handler is suspended."""

    __slots__ = ("interrupted", "mapping", "node", "opcode", "pid", "since", "task", "unique")

    def __init__(self, unique: int, opcode: int, node: int, pid: int) -> None:
        self.unique = unique
        self.opcode = opcode
        self.node = node
        self.pid = pid
        self.since = time.monotonic_ns()
        self.interrupted = False
        self.mapping: mmap | None = None
        self.task: asyncio.Task[None] | None = None


class Session:
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        filesystem: Filesystem,
        notifier: KernelNotifier,
        fd: int,
        limits: Limits,
        *,
        may_reply: Callable[[], bool] | None = None,
        abort: Callable[[], None] | None = None,
    ) -> None:
        self.filesystem = filesystem
        self.notifier = notifier
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._limits = limits
        self._may_reply = may_reply
        self._abort = abort
        self._device = dev.Device(fd, limits.max_write)
        self._operations = Operations(filesystem)
        self._table = self._operations.table
        self._serving = True
        self._reading = False
        self._minor = 0
        self._patience = 0
        self._skip = 0
        self._failure: BaseException | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._held: deque[_Held] = deque()
        self._held_timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Task[None] | None = None
        self._counts = [0] * p.OPCODES
        self._inline = self._suspended = self._interrupted = self._malformed = 0
        self._unsupported = self._refused = self._undone = self._longest_ns = 0

    # --- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._reading = True
        self._loop.add_reader(self._device.fd, self._readable)

    async def run(self) -> None:
        """Until the mount is gone and the filesystem destroyed; raises what ended it, if that was not an unmount."""
        await asyncio.shield(self.closed)

    def withdraw(self, reason: str) -> None:
        """Nothing is answered any more but EIO, held and waiting requests included; the kernel's caches are dropped
        (for at most FAREWELL_S), then the connection is aborted."""
        self._end(Withdrawn(reason))

    def thaw(self) -> None:
        """`may_reply` says yes again: answer now instead of at the next look."""
        if self._held and self._serving:
            self._release_held()

    def statistics(self) -> Statistics:
        return Statistics(
            requests={p.OPCODE_NAMES.get(code, str(code)): count for code, count in enumerate(self._counts) if count},
            inline=self._inline,
            suspended=self._suspended,
            waiting=len(self._waiting),
            held=len(self._held),
            interrupted=self._interrupted,
            malformed=self._malformed,
            unsupported=self._unsupported,
            refused=self._refused,
            undone=self._undone,
            forgets_excessive=self._operations.forgets_excessive,
            notifications=self.notifier.sent,
            nodes_known=len(self._operations.known),
            longest_ns=self._longest_ns,
            minor=self._minor,
        )

    def waiting(self) -> list[WaitingRequest]:
        """Longest first. What each waits for, the filesystem knows."""
        now = time.monotonic_ns()
        return [
            WaitingRequest(p.OPCODE_NAMES[waiting.opcode], waiting.node, waiting.pid, now - waiting.since)
            for waiting in self._waiting.values()
        ]

    # --- requests ------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        """Serves what waits, within one loop turn's share, then lingers a moment for the next request.

        Sleeping and being woken on another core costs more than a request does, so a client that asks again within
        `LINGER_NS` is worth waiting for. It is tried as long as it pays; each time it does not, the next `_patience`
        wakeups return at once, twice as many as before. (The loop comes back by itself when there is more.)
        """
        now = time.monotonic_ns()
        until = now + TURN_NS
        if self._skip:
            self._skip -= 1
            if self._receive():
                self._took(now)
            return
        linger = now + LINGER_NS
        served = 0
        while self._reading:
            if self._receive():
                now = self._took(now)
                linger = now + LINGER_NS
                served += 1
                if now > until or served >= TURN_REQUESTS:
                    return
            else:
                now = time.monotonic_ns()
                if now > linger:
                    break
        self._patience = 0 if served > 1 else min(2 * self._patience + 1, PATIENCE_MAX)
        self._skip = self._patience

    def _receive(self) -> bool:
        try:
            received = self._device.receive()
        except OSError as error:
            self._lost(error)
            return False
        if received:
            self._serve(received)
        return received > 0

    def _took(self, since: int) -> int:
        now = time.monotonic_ns()
        if now - since > self._longest_ns:
            self._longest_ns = now - since
        return now

    def _serve(self, received: int) -> None:
        device = self._device
        head: p.Head = p.HEADER.unpack_from(device.header)
        length, opcode, unique, node = head[:4]
        if received < p.HEADER_SIZE or length != received or unique == 0:
            self._malformed += 1
            return
        if not self._serving:
            if opcode not in _UNANSWERED:
                self._refuse(unique)
            return
        if opcode >= p.OPCODES:
            self._unsupported += 1
            self._answer(unique, opcode, node, errno.ENOSYS, b"")
            return
        self._counts[opcode] += 1
        body = p.decode(opcode, length - 8 * head[7], device.header, device.data)
        if body is None:
            self._undecodable(opcode, unique, node)
            return
        handler = self._table[opcode]
        if handler is None or not self._minor:
            self._control(opcode, unique, node, body)
        elif opcode == p.WRITE and device.crowded:
            # No mapping to spare if this one has to wait: work on a copy.
            self._drive(handler(node, head, (*body[:-1], bytes(body[-1]))), unique, opcode, node, head[6], copied=True)
        else:
            self._drive(handler(node, head, body), unique, opcode, node, head[6])

    def _undecodable(self, opcode: int, unique: int, node: int) -> None:
        if p.LAYOUTS[opcode] is None:
            self._unsupported += 1
            self._answer(unique, opcode, node, errno.ENOSYS, b"")
            return
        self._malformed += 1
        if opcode not in _UNANSWERED:
            self._answer(unique, opcode, node, errno.EINVAL, b"")

    def _drive(
        self,
        coroutine: Coroutine[Any, Any, Payload],
        unique: int,
        opcode: int,
        node: int,
        pid: int,
        *,
        copied: bool = False,
    ) -> None:
        try:
            first = coroutine.send(None)
        except StopIteration as end:
            self._inline += 1
            self._answer(unique, opcode, node, 0, end.value, pid)
        except OSError as error:
            self._inline += 1
            self._answer(unique, opcode, node, error.errno or errno.EIO, b"", pid)
        except Exception as bug:
            self._answer(unique, opcode, node, errno.EIO, b"")
            self._end(bug)
        else:
            self._suspend(coroutine, first, _Waiting(unique, opcode, node, pid), copied)

    def _suspend(self, coroutine: Coroutine[Any, Any, Payload], first: Any, waiting: _Waiting, copied: bool) -> None:
        self._suspended += 1
        if waiting.opcode == p.WRITE and not copied:
            waiting.mapping = self._device.detach()
            assert waiting.mapping is not None, "FUSE-2"
        assert waiting.unique not in self._waiting, "FUSE-1"
        self._waiting[waiting.unique] = waiting
        waiting.task = self._loop.create_task(self._finish(coroutine, first, waiting))
        if len(self._waiting) > SUSPENDED_MAX and waiting.opcode not in _RELEASING:
            self._refused += 1
            self._cancel(waiting)

    async def _finish(self, coroutine: Coroutine[Any, Any, Payload], first: Any, waiting: _Waiting) -> None:
        error = 0
        payload: Payload = b""
        bug: BaseException | None = None
        try:
            payload = await _resume(coroutine, first)
        except asyncio.CancelledError:
            error = errno.EINTR if waiting.interrupted else errno.EIO
        except OSError as failure:
            error = failure.errno or errno.EIO
        except Exception as failure:
            error, bug = errno.EIO, failure
        del self._waiting[waiting.unique]
        if waiting.mapping is not None:
            self._device.attach(waiting.mapping)
        if error == errno.EINTR and waiting.interrupted:
            self._send(waiting.unique, waiting.opcode, waiting.node, error, payload)
        else:
            self._answer(
                waiting.unique, waiting.opcode, waiting.node, error, payload, waiting.pid,
                interrupted=waiting.interrupted,
            )  # fmt: skip
        if bug is not None:
            self._end(bug)

    def _cancel(self, waiting: _Waiting) -> None:
        """Behind the task's first step, so that the cancellation always reaches the handler where it waits."""
        assert waiting.task is not None
        self._loop.call_soon(waiting.task.cancel)

    # --- requests that are the session's own ---------------------------------------------------------------------

    def _control(self, opcode: int, unique: int, node: int, body: tuple[Any, ...]) -> None:
        if opcode == p.FORGET:
            self._operations.forget(node, body[0])
        elif opcode == p.BATCH_FORGET:
            for forgotten, lookups in body:
                self._operations.forget(forgotten, lookups)
        elif opcode == p.INTERRUPT:
            self._interrupt(body[0])
        elif opcode == p.INIT:
            self._init(unique, body)
        elif opcode == p.DESTROY:
            self._answer(unique, opcode, node, 0, b"")
        else:  # a request before INIT
            self._malformed += 1
            self._answer(unique, opcode, node, errno.EIO, b"")

    def _init(self, unique: int, body: tuple[Any, ...]) -> None:
        major, minor, max_readahead, offered, _ = body
        if major > p.MAJOR and not self._minor:  # it comes again with our major
            self._answer(unique, p.INIT, 0, 0, replies.init_out(p.MINOR, flags=0, max_readahead=0, max_background=0,
                                                               max_write=0))  # fmt: skip
            return
        if major < p.MAJOR or minor < p.MINOR_OLDEST or self._minor:
            self._answer(unique, p.INIT, 0, errno.EPROTO, b"")
            self._end(UnsupportedKernel(
                f"the kernel speaks FUSE {major}.{minor}, corral needs {p.MAJOR}.{p.MINOR_OLDEST} (Linux 5.4) or newer"
            ))  # fmt: skip
            return
        self._minor = min(minor, self._limits.minor_max)
        wanted = _WANTED
        if self._minor >= p.SINCE_KILLPRIV_V2 and offered & p.HANDLE_KILLPRIV_V2:
            # Without it the kernel clears setuid bits itself, but forgets to when open() truncates in one request.
            wanted |= p.HANDLE_KILLPRIV_V2 | p.ATOMIC_O_TRUNC
        if self._minor >= p.SINCE_INIT_EXT:
            wanted |= p.INIT_EXT
        self._answer(unique, p.INIT, 0, 0, replies.init_out(
            self._minor,
            flags=offered & wanted,
            max_readahead=max_readahead,
            max_background=self._limits.max_background,
            max_write=self._limits.max_write,
        ))  # fmt: skip
        self._operations.entry_timeouts = self._minor >= p.SINCE_INC_EPOCH
        self._operations.parallel_writes = self._minor >= p.SINCE_PARALLEL_DIRECT_WRITES
        self.notifier.attach(self._device.fd, self._minor)
        if not self.ready.done():
            self.ready.set_result(None)

    def _interrupt(self, unique: int) -> None:
        waiting = self._waiting.get(unique)
        if waiting is None:
            for held in self._held:
                if held.unique == unique:
                    held.interrupted = True
                    self._release_interrupted()
                    break
            return  # if it is not there either, it was answered: the two crossed
        if waiting.interrupted:
            return
        if waiting.opcode == p.SETLKW or (waiting.opcode in _HARMLESS and _is_being_killed(waiting.pid)):
            waiting.interrupted = True
            self._interrupted += 1
            self._cancel(waiting)

    # --- answers -------------------------------------------------------------------------------------------------

    def _answer(
        self,
        unique: int,
        opcode: int,
        node: int,
        error: int,
        payload: Payload,
        pid: int = 0,
        *,
        interrupted: bool = False,
    ) -> None:
        if self._may_reply is not None and self._serving and (self._held or not self._may_reply()):
            self._hold(_Held(unique, opcode, node, pid, error, payload, interrupted=interrupted))
        else:
            self._send(unique, opcode, node, error, payload)

    def _send(self, unique: int, opcode: int, node: int, error: int, payload: Payload) -> None:
        if not self._serving:  # withdrawn while this one waited
            self._refuse(unique)
            return
        try:
            if error:
                self._device.send(replies.error(unique, error))
            elif isinstance(payload, bytes):
                self._device.send(replies.reply(unique, payload))
            else:
                size = replies.HEADER_SIZE + sum(map(len, payload))
                self._device.send_gathered([replies.HEADER.pack(size, 0, unique), *payload])
        except OSError as failure:
            self._untaken(failure, unique, opcode, node, error, payload)

    def _untaken(self, failure: OSError, unique: int, opcode: int, node: int, error: int, payload: Payload) -> None:
        """The kernel refused an answer: it is gone, the caller is, or the answer is not one."""
        self._undone += 1
        if not error and isinstance(payload, bytes):
            self._take_back(opcode, node, payload)
        if failure.errno in dev.GONE:
            self._lost(failure)
        elif failure.errno != errno.ENOENT:
            name = p.OPCODE_NAMES.get(opcode, str(opcode))
            self._end(AssertionError(f"FUSE-1: the kernel refused our answer to {name}: {failure}"))

    def _hold(self, held: _Held) -> None:
        self._held.append(held)
        if self._held_timer is None and self._serving:
            self._held_timer = self._loop.call_later(HELD_POLL_S, self._release_held)

    def _release_held(self) -> None:
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
        assert self._may_reply is not None
        while self._held and self._serving and self._may_reply():
            held = self._held.popleft()
            self._send(held.unique, held.opcode, held.node, held.error, held.payload)
        self._release_interrupted()
        if self._held and self._serving:
            self._held_timer = self._loop.call_later(HELD_POLL_S, self._release_held)

    def _release_interrupted(self) -> None:
        """Looked at again with every poll: the kernel says it once, at the first signal, and the one that kills may
        come later."""
        given_up = [held for held in self._held if held.interrupted and self._may_give_up(held)]
        for held in given_up:
            if not self._serving:
                return  # the kernel is gone, and every held answer with it
            self._held.remove(held)
            self._interrupted += 1
            if not held.error:
                self._take_back(held.opcode, held.node, held.payload)
            self._send(held.unique, held.opcode, held.node, errno.EINTR, b"")

    def _may_give_up(self, held: _Held) -> bool:
        return held.opcode in _HARMLESS and _is_being_killed(held.pid)

    def _take_back(self, opcode: int, node: int, payload: bytes) -> None:
        for cleanup in self._operations.undo(opcode, node, payload):
            self._spawn(_quietly(cleanup))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- the end -------------------------------------------------------------------------------------------------

    def _lost(self, error: OSError) -> None:
        if error.errno in (errno.ENODEV, errno.EBADF):
            self._end(None)
        else:
            self._end(Withdrawn(f"the kernel's connection was aborted ({error.strerror})"))
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._device.fd)

    def _end(self, failure: BaseException | None) -> None:
        if not self._serving:
            return
        self._serving = False
        self._failure = failure
        if self._held_timer is not None:
            self._held_timer.cancel()
        while self._held:
            self._refuse(self._held.popleft().unique)
        self._ending = self._loop.create_task(self._close())

    def _refuse(self, unique: int) -> None:
        try:
            self._device.send(replies.error(unique, errno.EIO))
        except OSError:
            self._undone += 1

    async def _close(self) -> None:
        """Looking requests are cancelled, changing ones may end; then the filesystem commits and lets go."""
        tasks = [waiting.task for waiting in self._waiting.values() if waiting.task is not None]
        for waiting in list(self._waiting.values()):
            if waiting.opcode in _HARMLESS or waiting.opcode == p.SETLKW or self._failure is not None:
                self._cancel(waiting)
        if self._failure is not None:
            await self._farewell(tasks)
        self._stop_reading()
        self.notifier.detach()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_GRACE_S)
            for task in late:
                task.cancel()
        try:
            if self._background:
                await asyncio.wait(self._background, timeout=CLOSE_GRACE_S)
            await self.filesystem.destroy()
        except Exception as failure:
            self._failure = self._failure or failure
        # A notifier thread inside the kernel still uses the descriptor; an ended connection lets it go.
        if await self._loop.run_in_executor(None, self.notifier.join, 1.0):
            self._device.close()
        for future in (self.ready, self.closed):
            if not future.done():
                if self._failure is None:
                    future.set_result(None)
                else:
                    future.set_exception(self._failure)
                    future.exception()  # asked for: run() may never be called

    async def _farewell(self, tasks: list[asyncio.Task[None]]) -> None:
        """While everybody hears EIO, the kernel's caches are dropped (open descriptors would go on reading them); then
        the connection is aborted, after which nobody hears anything."""
        if tasks:
            await asyncio.wait(tasks, timeout=ABORT_GRACE_S)
        if self._reading:
            await asyncio.wait([self._loop.create_task(self._drop_known())], timeout=FAREWELL_S)
        if self._abort is not None:
            await self._loop.run_in_executor(None, self._abort)

    async def _drop_known(self) -> None:
        notifications = [self.notifier.invalidate_inode(node) for node in sorted(self._operations.known)]
        await asyncio.gather(*notifications, return_exceptions=True)


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, Payload], first: Any) -> Generator[Any, Any, Payload]:
    """Continues a coroutine that has already been driven to its first wait, on `first`, inside a task."""
    waits_for = first
    while True:
        try:
            try:
                value = yield waits_for
            except BaseException as error:
                waits_for = coroutine.throw(error)
            else:
                waits_for = coroutine.send(value)
        except StopIteration as end:
            result: Payload = end.value
            return result


async def _quietly(cleanup: Any) -> None:
    with contextlib.suppress(OSError):  # given back on behalf of a caller who is gone: nobody to tell
        await cleanup


def _is_being_killed(thread: int) -> bool:
    """Whether SIGKILL waits for this thread; False when it cannot be told (another pid namespace)."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) >> 8 & 1:
                    return True
    except (OSError, ValueError, IndexError):
        pass
    return False
