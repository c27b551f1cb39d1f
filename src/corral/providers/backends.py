"""Where lock requests of this process go: the low level of `api.dlm.Lockspace` over the two ways to a lock manager.

    SocketBackend   to this node's lock service, for light clients
    NativeBackend   to a lockspace engine in this process, for participants

Both keep the books of one client: a handle per lock, a cookie per request, and who is to be called. What is submitted
in one loop turn goes on together at its end: in one message, or in one step of the engine.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, final

from corral.api.dlm import Completion, LockWaits, Request
from corral.base.errors import Busy, ClusterError, LockLost, NotMember, PeerError
from corral.base.time import Instant
from corral.base.world import Connection, World
from corral.dlm.events import UNAWAITED
from corral.providers.ipc_wire import (
    FROM_LOCK_SERVICE,
    TO_LOCK_SERVICE,
    BlockingBatch,
    CloseSpace,
    CompletedBatch,
    Opened,
    OpenSpace,
    Released,
    ReleaseSpace,
    SpaceGone,
    SpaceSuspended,
    SubmitBatch,
    WaitingTold,
    in_messages,
)
from corral.providers.native_dlm import NativeLockspace
from corral.providers.page import PageReader

Completed = Callable[[int, Completion], None]
Blocking = Callable[[int, int], None]
Operation = tuple[int, int, Request]  # handle, cookie, what is asked

BATCH: Final = 1024  # requests in one message


@final
class Books:
    """Handles and cookies of one client in one lockspace."""

    __slots__ = ("_blocking", "_cookie", "_handle", "_waiting", "ended")

    def __init__(self) -> None:
        self._handle = 0
        self._cookie = 0
        self._waiting: dict[int, tuple[int, Completed]] = {}
        self._blocking: dict[int, Blocking] = {}
        self.ended = ""

    def enter(
        self,
        requests: Sequence[Request],
        completed: Completed | None,
        blocking: Blocking | None,
        operations: list[Operation],
    ) -> list[int]:
        """Appends to `operations`; returns the handles."""
        handles: list[int] = []
        for request in requests:
            handle = self.add(blocking) if request.op == "lock" else request.lock
            cookie = UNAWAITED
            if completed is not None:
                self._cookie = cookie = self._cookie + 1
                self._waiting[cookie] = (handle, completed)
            handles.append(handle)
            operations.append((handle, cookie, request))
        return handles

    def next_handle(self) -> int:
        """What `add` will give."""
        return self._handle + 1

    def add(self, blocking: Blocking | None) -> int:
        """A handle for a new lock."""
        self._handle += 1
        if blocking is not None:
            self._blocking[self._handle] = blocking
        return self._handle

    def complete(self, handle: int, cookie: int, completion: Completion) -> None:
        waiting = self._waiting.pop(cookie, None)
        if waiting is not None and waiting[0] == handle:
            waiting[1](handle, completion)

    def block(self, handle: int, mode: int) -> None:
        blocking = self._blocking.get(handle)
        if blocking is not None:
            blocking(handle, mode)

    def forget(self, handle: int) -> None:
        self._blocking.pop(handle, None)


@final
class SocketBackend:
    """One lockspace over one connection to the lock service. Implements `ConnectionHandler`."""

    def __init__(
        self, world: World, socket: str, name: str, value_size: int, page: memoryview, exclusive: bool = False
    ) -> None:
        self.name: Final = name
        self.value_size: Final = value_size
        self.lost: asyncio.Future[str] = world.future()
        self.lease_until: Callable[[], Instant] = _no_lease  # before it is open
        self._page = page
        self.told: Callable[[LockWaits | None], None] = _nothing
        self.suspended = False
        self._exclusive = exclusive
        self._released: asyncio.Future[str] | None = None
        self._world = world
        self._socket = socket
        self._books = Books()
        self._outgoing: list[Operation] = []
        self._connection: Connection | None = None
        self._opened: asyncio.Future[None] = world.future()

    async def open(self) -> None:
        """Raises ClusterError when the lock service is not there or refuses."""
        try:
            self._connection = await self._world.local.connect(self._socket, self)
        except OSError as error:
            raise ClusterError(
                f"the lock service does not answer at {self._socket} ({error.strerror or error}); "
                "is corrald of this node running?"
            ) from None
        self._connection.send([TO_LOCK_SERVICE.encode(OpenSpace(1, self.name, self.value_size, self._exclusive))])
        await self._opened

    def submit(
        self, requests: Sequence[Request], completed: Completed | None, blocking: Blocking | None = None
    ) -> list[int]:
        if self.lost.done() or self._connection is None:
            raise LockLost(self.lost.result() if self.lost.done() else "the lockspace is not open")
        outgoing = self._outgoing
        if not outgoing:
            self._world.at_turn_end(self._flush)
        return self._books.enter(requests, completed, blocking, outgoing)

    def forget(self, handle: int) -> None:
        """The lock of this handle is over."""
        self._books.forget(handle)

    async def close(self) -> None:
        if self._connection is not None and not self.lost.done():
            self._flush()
            self._connection.send([TO_LOCK_SERVICE.encode(CloseSpace(1))])
            self._end("the lockspace was closed")

    async def release(self, force: int) -> None:
        """Raises Busy when the lockspace is in use for that force, LockLost when it is lost already."""
        if self._connection is None or self.lost.done():
            raise LockLost(self.lost.result() if self.lost.done() else "the lockspace is not open")
        self._released = self._world.future()
        self._flush()
        self._connection.send([TO_LOCK_SERVICE.encode(ReleaseSpace(1, force))])
        if error := await self._released:
            raise Busy(error)
        self._end("the lockspace was released")

    def _flush(self) -> None:
        operations, self._outgoing = self._outgoing, []
        if self._connection is None:
            return
        for start in range(0, len(operations), BATCH):  # none: `close` was faster
            batch = operations[start : start + BATCH]
            self._connection.send(in_messages(TO_LOCK_SERVICE, partial(SubmitBatch, 1), batch))

    # -- ConnectionHandler

    def received(self, messages: list[bytes]) -> None:
        for payload in messages:
            try:
                message = FROM_LOCK_SERVICE.decode(payload)
            except PeerError as error:
                self._end(f"the lock service sent what this version does not understand ({error})")
                return
            if isinstance(message, CompletedBatch):
                for handle, cookie, completion in message.completions:
                    self._books.complete(handle, cookie, completion)
            elif isinstance(message, BlockingBatch):
                for handle, mode in message.blocked:
                    self._books.block(handle, mode)
            elif isinstance(message, Opened):
                self._open_answer(message)
            elif isinstance(message, SpaceSuspended):
                self.suspended = message.suspended
                self.told(None)
            elif isinstance(message, WaitingTold):
                self.told(message.waits)
            elif isinstance(message, Released):
                if self._released is not None and not self._released.done():
                    self._released.set_result(message.error)
            else:
                assert isinstance(message, SpaceGone)
                self._end(message.reason)

    def broken(self, reason: str) -> None:
        self._end(f"the connection to the lock service broke: {reason}")

    def _open_answer(self, answer: Opened) -> None:
        if self._opened.done():
            return
        if answer.error:
            self._opened.set_exception(ClusterError(answer.error))
            return
        try:
            self.lease_until = PageReader(self._page, answer.page_slot, answer.serial).lease_until
        except ValueError as error:
            self._opened.set_exception(ClusterError(f"the lock service of this node cannot be used: {error}"))
            return
        self._opened.set_result(None)

    def _end(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
            self.lease_until = _no_lease
        self._open_answer(Opened(1, reason))
        if self._released is not None and not self._released.done():
            self._released.set_result(reason)
        if self._connection is not None:
            self._connection.close()


@final
class NativeBackend:
    """One client of a lockspace engine in this process. Implements `locks.FastBackend`."""

    def __init__(self, world: World, native: NativeLockspace, client: int = 1) -> None:
        self.name: Final = native.name
        self.value_size: Final = native.engine.value_size
        self.lost: asyncio.Future[str] = world.future()
        self.lease_until: Callable[[], Instant] = native.lease_until
        self._native = native
        self._world = world
        self._client = client
        self._books = Books()
        self._submitted: list[Operation] = []  # in this loop turn
        self.told: Callable[[LockWaits | None], None] = _nothing
        native.completed = self._completed
        native.blocked = self._blocked
        native.waiting = self._waits
        native.changed = self._changed
        native.lost = self._lost

    def submit(
        self, requests: Sequence[Request], completed: Completed | None, blocking: Blocking | None = None
    ) -> list[int]:
        if self.lost.done():
            raise LockLost(self.lost.result())
        submitted = self._submitted
        if not submitted:
            self._world.at_turn_end(self._flush)
        return self._books.enter(requests, completed, blocking, submitted)

    def _flush(self) -> None:
        submitted, self._submitted = self._submitted, []
        if submitted and not self.lost.done():  # none: `close` was faster
            with suppress(NotMember):  # then `lost` tells
                self._native.submit(self._client, submitted)

    def submit_now(self, request: Request, blocking: Blocking | None) -> tuple[int, Completion] | None:
        """Completes within the call what concerns nobody else; None: nothing has happened, `submit` it."""
        if self._submitted:
            return None  # nothing overtakes what was asked before
        books = self._books
        handle = books.next_handle() if request.op == "lock" else request.lock
        completion = self._native.complete_now(self._client, handle, request)
        if completion is None:
            return None
        if request.op == "lock":
            books.add(blocking)
        return handle, completion

    @property
    def suspended(self) -> bool:
        return self._native.suspended

    def forget(self, handle: int) -> None:
        self._books.forget(handle)

    async def release(self, force: int) -> None:
        """Raises Busy when the lockspace is in use for that force."""
        self._flush()
        if self._native.engine.busy(force):
            raise Busy(f"lockspace {self.name} has locks; end them, or release it by force")
        await self.close()

    async def close(self) -> None:
        self._flush()
        self._native.client_gone(self._client)
        self._lost("the lockspace was closed")
        await self._native.close()

    def _completed(self, _client: int, handle: int, cookie: int, completion: Completion) -> None:
        self._books.complete(handle, cookie, completion)

    def _blocked(self, _client: int, handle: int, mode: int) -> None:
        self._books.block(handle, mode)

    def _waits(self, _client: int, waits: LockWaits) -> None:
        self.told(waits)

    def _changed(self) -> None:
        self.told(None)

    def _lost(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
            self.lease_until = _no_lease


def _nothing(_event: LockWaits | None) -> None:
    """Nobody listens."""


def _no_lease() -> Instant:
    """Of a lockspace that is lost."""
    return 0
