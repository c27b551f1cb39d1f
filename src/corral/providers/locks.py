"""What applications hold: `lock()` over any backend that can submit requests.

    space = LockSpace(world, backend)
    async with space.lock("invoice-42", EX, timeout=5) as held:
        held.token, held.value, held.value_valid

One code path for every provider: a backend is the low level of `api.dlm.Lockspace` (`submit`) with a future that tells
when everything is lost. Here are futures, task cancellation, kept locks and LockLost.

- Cancelling a task that waits for a lock cancels the request; a grant on its way is given back (one force unlock does
  both). Cancelling one that waits for a conversion cancels the conversion, and one that was granted meanwhile is
  converted back; what cannot be undone stays: a lowered mode, and PR <-> CW. Until that is settled `mode` is what is
  held in any case, and the next conversion waits. An unlock goes on without its task.
- `keep=True`: leaving the body keeps the lock; the next `lock()` of that name and mode takes it again without a
  message, with the same token, unless the lease has lapsed. It goes when somebody else wants the resource. Who has the
  lock in hand takes it again by `with held:`, which waits for nobody.
- When the guarantee is lost for good, the body is cancelled and `async with` raises LockLost. Closing a lockspace
  while a body holds a lock of it is such a loss.

Everything here belongs to the thread of the loop that opened the lockspace; another one is refused before anything has
happened (`corral.sync` is for threads).
"""

import asyncio
from asyncio import current_task
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Protocol, final

from corral.api.dlm import (
    CR,
    ECANCEL,
    EUNLOCK,
    EX,
    FORCEUNLOCK,
    IV,
    MODE_NAMES,
    NOQUEUE,
    VALBLK,
    Completion,
    LockWaits,
    Request,
    SpaceEvent,
    SpaceState,
)
from corral.base.errors import Busy, Cancelled, ClusterError, Deadlock, LockLost, TimedOut, WouldBlock
from corral.base.ids import NAME_MAX
from corral.base.time import Instant, Seconds, from_seconds, to_seconds
from corral.base.world import World
from corral.dlm.modes import (
    EAGAIN,
    EBUSY,
    EDEADLK,
    EINVAL,
    ENOMEM,
    ENOTCONN,
    ETIMEDOUT,
    VALUE_TRANSFER,
    WRITE,
    is_down,
    least,
)
from corral.providers.watching import Watching

Completed = Callable[[int, Completion], None]
Blocking = Callable[[int, int], None]
Key = tuple[bytes | str, int]  # of a kept lock: its name as the application writes it, and its mode

KEPT_MAX: Final = 65_536  # kept locks of one lockspace; beyond, the one kept longest is given back


class Backend(Protocol):
    """Where requests go. `completed` and `blocking` are never called from within `submit`."""

    @property
    def name(self) -> str: ...
    @property
    def value_size(self) -> int:
        """Bytes of a value block."""

    @property
    def lost(self) -> "asyncio.Future[str]":
        """Resolves with the reason when every lock is lost for good."""

    @property
    def suspended(self) -> bool:
        """A recovery runs."""

    told: Callable[[LockWaits | None], None]
    """Set by who wants to hear of waits that last too long, and (None) that `suspended` changed."""

    def lease_until(self) -> Instant:
        """Up to when held locks are guaranteed, by `World.now`; 0 when they are lost."""

    def submit(
        self, requests: Sequence[Request], completed: Completed | None, blocking: Blocking | None = None
    ) -> list[int]: ...
    def forget(self, handle: int) -> None:
        """The lock of this handle is over."""

    async def close(self) -> None: ...
    async def release(self, force: int) -> None:
        """Raises Busy."""


class FastBackend(Backend, Protocol):
    """A backend that can complete a request within the call when nobody else is concerned."""

    def submit_now(self, request: Request, blocking: Blocking | None) -> tuple[int, Completion] | None: ...


def failure(completion: Completion, what: str) -> BaseException:
    """The error that says what this status means."""
    status = completion.status
    if status == EAGAIN:
        return WouldBlock(f"{what}: somebody holds it, and the request was not to wait")
    if status == ETIMEDOUT:
        return TimedOut(f"{what}: not granted within its timeout")
    if status == EDEADLK:
        return Deadlock(f"{what}: two conversions would wait for each other; unlock or convert down, then try again")
    if status == ECANCEL:
        return Cancelled(f"{what}: cancelled through another handle")
    if status == ENOTCONN:
        return LockLost(f"{what}: the lockspace is lost")
    if status in (EBUSY, ENOMEM):
        return Busy(f"{what}: another operation on this lock is under way, or there are too many locks")
    if status == EINVAL:
        return ValueError(f"{what}: these flags and modes do not go together")
    return ClusterError(f"{what}: failed with status {status}")


@final
class HeldLock:
    """Implements `api.dlm.Lock`."""

    __slots__ = (
        "_handle",
        "_idle",
        "_keep",
        "_kept",
        "_key",
        "_lost",
        "_on_block",
        "_settling",
        "_space",
        "_task",
        "mode",
        "resource",
        "token",
        "value",
        "value_valid",
    )

    def __init__(self, space: "LockSpace", key: Key, keep: bool, on_block: Callable[[int], None] | None) -> None:
        name = key[0]
        self.resource = name.encode() if isinstance(name, str) else name
        self.mode = -1
        self.value = b""
        self.value_valid = False
        self.token = 0
        self._space = space
        self._handle = 0
        self._keep = keep  # wanted kept, and nobody else has asked for it
        self._key = key
        self._kept = False  # in the table of kept locks, in use or idle
        self._idle = False  # kept, and nobody uses it: whoever takes it compares the lease and makes this False
        self._on_block = on_block
        self._lost = False
        self._task: asyncio.Task[Any] | None = None
        self._settling: asyncio.Future[None] | None = None  # while a cancelled conversion is taken back

    def __repr__(self) -> str:
        mode = MODE_NAMES[self.mode] if self.mode >= 0 else "released"
        return f"<lock {self.resource!r} {mode} token={self.token}>"

    @property
    def valid(self) -> bool:
        return self.mode >= 0 and not self._lost and self._space.valid

    @property
    def kept(self) -> bool:
        """Whether `with` would take it again now."""
        return self._idle and self._space.valid

    def __enter__(self) -> "HeldLock":
        """Takes a kept lock again, at once. Raises WouldBlock when it is in use, has been given back, or the lease has
        lapsed, and LockLost: lock() asks for another."""
        space = self._space
        if not self._idle or space.now() >= space.backend.lease_until() or get_ident() != space.thread:
            raise self._not_kept()
        self._idle = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._kept:
            self._idle = True
        elif self._lost:
            raise LockLost(f"{self.resource!r}: {self._space.lost_reason}") from error
        elif self.mode >= 0:
            self._space.leave(self)

    def _not_kept(self) -> ClusterError:
        self._space.check_thread()
        if self._lost:
            return LockLost(f"{self.resource!r}: {self._space.lost_reason}")
        why = "the lease has lapsed" if self._idle else "is in use" if self.mode >= 0 else "has been given back"
        return WouldBlock(f"{self.resource!r}: {why}; lock() waits for one")

    async def convert(
        self,
        mode: int,
        *,
        wait: bool = True,
        value: bytes | None = None,
        timeout: Seconds | None = None,
        flags: int = 0,
    ) -> None:
        if not 0 <= mode <= EX:
            raise ValueError(f"{mode} is not a lock mode")
        self._check(value)
        timeout_ns = _timeout_ns(timeout)
        if self._settling is not None:
            timeout_ns = await self._space.settled(self._settling, wait, timeout_ns, f"convert {self.resource!r}")
            self._check(value)
        # A conversion that would write the block unasked keeps its hands off.
        writes = VALUE_TRANSFER[self.mode + 1][mode] == WRITE
        flags |= (VALBLK if value is not None or not writes else 0) | (0 if wait else NOQUEUE)
        request = Request("convert", mode=mode, flags=flags, lock=self._handle, value=value, timeout_ns=timeout_ns)
        self._space.unkeep(self)  # it was kept under its old mode
        self._take(await self._space.complete(request, self), flags)
        self._key = (self._key[0], self.mode)

    async def unlock(self, *, value: bytes | None = None) -> None:
        self._check(value)
        self.mode = -1
        self._space.released(self)
        flags = FORCEUNLOCK if value is None else FORCEUNLOCK | VALBLK  # also while a conversion of it is under way
        await self._space.complete(Request("unlock", flags=flags, lock=self._handle, value=value), self)

    def unlock_nowait(self) -> None:
        self._space.give_back(self)

    def _check(self, value: bytes | None = None) -> None:
        self._space.check_thread()
        if self._lost:
            raise LockLost(f"{self.resource!r}: {self._space.lost_reason}")
        if self.mode < 0:
            raise ValueError(f"{self.resource!r} is not held any more")
        if value is not None and len(value) > self._space.backend.value_size:
            raise ValueError(f"{self.resource!r}: a value has at most {self._space.backend.value_size} bytes here")

    def _take(self, completion: Completion, flags: int) -> None:
        self.mode = completion.mode
        self.token = completion.token
        if flags & VALBLK:
            self.value = completion.value
            self.value_valid = completion.value_valid

    def arrived(self, completion: Completion) -> None:
        """What became of a conversion that nobody waits for any more."""
        if self.mode >= 0 and completion.mode >= 0 and not self._lost:
            self.mode = completion.mode
            self.token = completion.token
            self._key = (self._key[0], self.mode)

    def _told(self, _handle: int, mode: int) -> None:
        """Somebody wants `mode`: it is kept no longer."""
        if self._idle:
            self._space.give_back(self)
            return
        self._keep = False
        self._space.unkeep(self)
        if self._on_block is not None:
            self._on_block(mode)


@final
class PendingLock:
    """Implements `api.dlm.Pending`. Nothing is asked before it is awaited or entered."""

    __slots__ = ("_flags", "_held", "_keep", "_key", "_on_block", "_space", "_timeout")

    _held: HeldLock  # while the body runs

    def __init__(
        self,
        space: "LockSpace",
        key: Key,
        flags: int,
        timeout: Seconds | None,
        keep: bool,
        on_block: Callable[[int], None] | None,
    ) -> None:
        self._space = space
        self._key: Key | None = key  # None: used
        self._flags = flags
        self._timeout = timeout
        self._keep = keep
        self._on_block = on_block

    def __await__(self) -> Generator[Any, Any, HeldLock]:
        return self._acquire().__await__()

    async def _acquire(self) -> HeldLock:
        """A kept lock without a message, or one that is asked for."""
        key, self._key = self._key, None
        if key is None:
            raise ValueError("lock() was awaited already; call it again for another lock")
        held = self._space.retake(key, self._on_block) if self._keep else None
        if held is None:
            held = HeldLock(self._space, key, self._keep, self._on_block)
            await self._space.acquire(held, key[1], self._flags, _timeout_ns(self._timeout))
        return held

    async def __aenter__(self) -> HeldLock:
        # A kept lock is taken again here and not by `_acquire`: a coroutine less is a tenth of its cost.
        space, key = self._space, self._key
        if self._keep and key is not None and (held := space.retake(key, self._on_block)) is not None:
            self._key = None
        else:
            held = await self._acquire()
        self._held = held
        held._task = current_task(space.loop)
        return held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._held
        task, held._task = held._task, None
        if held._kept:
            held._idle = True
        elif held._lost:
            await self._lost(held, task, error)
        elif held.mode >= 0:
            self._space.leave(held)

    async def _lost(self, held: HeldLock, task: "asyncio.Task[Any] | None", error: BaseException | None) -> None:
        """Turns the cancellation that the loss caused into LockLost; one that somebody else asked for goes on."""
        others = task is not None and task.uncancel() > 0
        if isinstance(error, asyncio.CancelledError):
            if others:
                return
        elif task is not None:
            try:
                await asyncio.sleep(0)  # the body ended in the very turn of the loss: its cancellation is still to come
            except asyncio.CancelledError:
                if others:
                    raise
        raise LockLost(f"{held.resource!r}: {self._space.lost_reason}") from error


@final
class LockSpace:
    """Implements `api.dlm.Lockspace` over a backend."""

    def __init__(self, world: World, backend: Backend) -> None:
        self.backend: Final = backend
        self.loop: Final = asyncio.get_running_loop()  # asked for once: each time costs a system call
        self.now: Final = world.now
        self.lost_reason = ""
        self._world = world
        self.thread = get_ident()
        self._now: Callable[[Request, Blocking | None], tuple[int, Completion] | None] | None
        self._now = getattr(backend, "submit_now", None)
        self._held: dict[int, HeldLock] = {}
        self._kept: dict[Key, HeldLock] = {}  # in use or idle, longest kept first
        self._waiting: set[asyncio.Future[Completion]] = set()
        self._watching = Watching(world, backend)
        backend.lost.add_done_callback(self._lose)

    @property
    def name(self) -> str:
        return self.backend.name

    def lock(
        self,
        resource: bytes | str,
        mode: int = EX,
        *,
        wait: bool = True,
        timeout: Seconds | None = None,
        keep: bool = False,
        flags: int = 0,
        on_block: Callable[[int], None] | None = None,
    ) -> PendingLock:
        key = (resource, mode)
        if key not in self._kept:
            _check_key(resource, mode)
        return PendingLock(self, key, flags if wait else flags | NOQUEUE, timeout, keep, on_block)

    def submit(
        self, requests: Sequence[Request], completed: Completed | None, blocking: Blocking | None = None
    ) -> list[int]:
        self.check_thread()
        return self.backend.submit(requests, completed, blocking)

    @property
    def state(self) -> SpaceState:
        return self._watching.state

    def watch(self) -> AsyncIterator[SpaceEvent]:
        self.check_thread()
        return self._watching.watch()

    async def release(self, force: int = 0) -> None:
        """This node leaves the lockspace; every client of it here loses it. Raises Busy: with `force` 0 while there
        are locks of clients here or of other nodes mastered here, with 1 while clients here have locks. Kept locks
        that nobody uses are given back first."""
        self.check_thread()
        for held in list(self._kept.values()):
            if held._idle:
                self.give_back(held)
        await self.backend.release(force)

    async def close(self) -> None:
        """Every lock of this lockspace is given back; who still holds one has lost it (LockLost)."""
        self.check_thread()
        await self.backend.close()

    # --- for HeldLock and PendingLock --------------------------------------------------------------------------------

    async def acquire(self, held: HeldLock, mode: int, flags: int, timeout_ns: int) -> None:
        self.check_thread()
        request = Request("lock", held.resource, mode, flags | VALBLK, timeout_ns=timeout_ns)
        if self._now is not None and (done := self._now(request, held._told)) is not None:
            held._handle, completion = done
        else:
            completion = await self.complete(request, held)
        held._take(completion, VALBLK)
        self._held[held._handle] = held
        if self.lost_reason:
            self._lose_one(held)
            held._check()

    async def complete(self, request: Request, held: HeldLock) -> Completion:
        """Submits and waits. Raises what the status means."""
        if self.lost_reason:
            raise LockLost(f"{_what(request, held)}: {self.lost_reason}")
        if self._now is not None and request.op != "lock" and (done := self._now(request, None)) is not None:
            return done[1]
        answer: asyncio.Future[Completion] = self._world.future()

        def completed(_handle: int, completion: Completion) -> None:
            if not answer.done():
                answer.set_result(completion)

        (handle,) = self.backend.submit([request], completed, held._told)
        held._handle = handle
        self._waiting.add(answer)
        try:
            completion = await (asyncio.shield(answer) if request.op == "convert" else answer)
        except asyncio.CancelledError:
            if request.op == "lock":
                self._drop(handle)
            elif request.op == "convert":
                self._take_back(held, request, answer)
            raise
        finally:
            self._waiting.discard(answer)
        if completion.status in (0, EUNLOCK):
            return completion
        if request.op == "lock":
            self.backend.forget(handle)
        elif request.op == "convert":
            held.arrived(completion)  # the old mode, or what a recovery could save of it
        raise failure(completion, _what(request, held))

    async def settled(self, settling: "asyncio.Future[None]", wait: bool, timeout_ns: int, what: str) -> int:
        """Waits until a cancelled conversion is taken back; returns what is left of the timeout."""
        if not wait:
            raise WouldBlock(f"{what}: a conversion that was cancelled is still being taken back")
        began = self._world.now()
        await asyncio.wait((settling,), timeout=to_seconds(timeout_ns) if timeout_ns else None)
        left = timeout_ns - (self._world.now() - began)
        if timeout_ns and (left <= 0 or not settling.done()):
            raise TimedOut(f"{what}: a conversion that was cancelled was not taken back within its timeout")
        return max(left, 0)

    @property
    def valid(self) -> bool:
        """Whether held locks are guaranteed now: the lease runs."""
        return self.now() < self.backend.lease_until()

    def retake(self, key: Key, on_block: Callable[[int], None] | None) -> HeldLock | None:
        """A kept lock that is idle, while its guarantee holds."""
        self.check_thread()
        held = self._kept.get(key)
        if held is None or not held._idle or self.now() >= self.backend.lease_until():
            return None
        held._idle = False
        held._on_block = on_block
        return held

    def leave(self, held: HeldLock) -> None:
        """The body is over for a lock that is not kept yet: keep it from now on, or give it back."""
        kept = self._kept
        if not held._keep or held._key in kept or held._settling is not None:
            self.give_back(held)
            return
        held._kept = held._idle = True
        kept[held._key] = held
        while len(kept) > KEPT_MAX:
            oldest = next(iter(kept.values()))
            if oldest._idle:
                self.give_back(oldest)
            else:
                self.unkeep(oldest)  # its body gives it back, or keeps it anew

    def unkeep(self, held: HeldLock) -> None:
        """Takes it out of the table; it stays held."""
        if held._kept:
            held._kept = held._idle = False
            del self._kept[held._key]

    def give_back(self, held: HeldLock) -> None:
        """Unlocks without waiting for the answer."""
        if held.mode < 0 or held._lost:
            return
        held.mode = -1
        self.released(held)
        self._drop(held._handle)

    def released(self, held: HeldLock) -> None:
        self.unkeep(held)
        self._held.pop(held._handle, None)
        self.backend.forget(held._handle)

    # --- leaves ------------------------------------------------------------------------------------------------------

    def check_thread(self) -> None:
        if get_ident() != self.thread:
            raise RuntimeError("a lockspace belongs to the thread that opened it; corral.sync is for several threads")

    def _take_back(self, held: HeldLock, request: Request, answer: "asyncio.Future[Completion]") -> None:
        """Whoever waited for this conversion was cancelled; `answer` may be there already, and not looked at."""
        if held.mode < 0 or self._over:
            return
        before = held.mode
        if not answer.done():
            certain = least(before, request.mode, request.flags)
            held.mode = CR if certain == IV else certain  # what both PR and CW allow
            self.backend.submit([Request("cancel", lock=held._handle)], None)
        elif answer.exception() is None:
            held.arrived(answer.result())
        held._settling = self._world.spawn(self._settle(held, request.mode, before, answer), "take a conversion back")

    async def _settle(self, held: HeldLock, asked: int, before: int, answer: "asyncio.Future[Completion]") -> None:
        try:
            held.arrived(await self._unless_lost(answer))
            if held.mode == asked != before and is_down(asked, before):  # it was granted before the cancel came
                held.mode = before
                back: asyncio.Future[Completion] = self._world.future()
                self.backend.submit(
                    [Request("convert", mode=before, lock=held._handle)],
                    lambda _handle, completion: None if back.done() else back.set_result(completion),
                )
                held.arrived(await self._unless_lost(back))
        except LockLost:
            pass  # and so is the lock
        finally:
            held._settling = None

    async def _unless_lost(self, answer: "asyncio.Future[Completion]") -> Completion:
        if self._over:
            raise LockLost(self.lost_reason)
        self._waiting.add(answer)
        try:
            return await answer
        finally:
            self._waiting.discard(answer)

    @property
    def _over(self) -> bool:
        """Also in the loop turn in which it became so, before `_lose`."""
        return self.backend.lost.done()

    def _drop(self, handle: int) -> None:
        """Ends a lock in whatever state it is: held, asked for, or granted while nobody looked."""
        self.backend.forget(handle)
        if self._over:
            return
        request = Request("unlock", flags=FORCEUNLOCK, lock=handle)
        if self._now is None or self._now(request, None) is None:  # at once, or the next lock would wait behind it
            self.backend.submit([request], None)

    def _lose(self, lost: "asyncio.Future[str]") -> None:
        self.lost_reason = lost.result() or "the lockspace is lost"
        for held in list(self._held.values()):
            self._lose_one(held)
        self._held.clear()
        for answer in list(self._waiting):
            if not answer.done():
                answer.set_exception(LockLost(self.lost_reason))

    def _lose_one(self, held: HeldLock) -> None:
        self.unkeep(held)
        held._lost = True
        held.value_valid = False
        if held._task is not None:
            held._task.cancel("the lock is lost")


def _what(request: Request, held: HeldLock) -> str:
    """For errors: what was asked for."""
    mode = "" if request.op == "unlock" else f" {'to ' if request.op == 'convert' else ''}{MODE_NAMES[request.mode]}"
    return f"{request.op} {held.resource!r}{mode}"


def _check_key(resource: bytes | str, mode: int) -> None:
    if not 0 <= mode <= EX:
        raise ValueError(f"{mode} is not a lock mode")
    length = len(resource.encode() if isinstance(resource, str) else resource)
    if not 0 < length <= NAME_MAX:
        raise ValueError(f"a lock name is 1 to {NAME_MAX} bytes, not {length}")


def _timeout_ns(timeout: Seconds | None) -> int:
    if timeout is None:
        return 0
    if timeout <= 0:
        raise ValueError("a timeout is above zero; use wait=False for not waiting at all")
    return from_seconds(timeout)
