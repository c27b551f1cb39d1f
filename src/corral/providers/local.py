"""The local provider's locks: one process, nothing to start, the same engine. Conflicts still conflict.

    manager = LocalLocks(world)
    space = await manager.lockspace("orders")

The smallest complete example of a backend: an engine with one member, driven from here, no messages.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, final

from corral.api.dlm import ECANCEL, EUNLOCK, VALUE_SIZE, WARN_NS, Completion, LockWaits, Request
from corral.base.engine import TICK
from corral.base.errors import Busy, ClusterError, LockLost
from corral.base.ids import NAME_MAX
from corral.base.time import FOREVER, Instant
from corral.base.world import Timer, World
from corral.dlm.events import Blocked, ClientGone, Done, Submit, Waiting
from corral.dlm.solo import solo
from corral.providers.locks import Blocking, Completed, LockSpace

CLIENT: Final = 0  # the process itself


@final
class LocalBackend:
    """Implements `locks.FastBackend`."""

    suspended: Final = False  # alone there is nothing to recover

    def __init__(self, world: World, name: str, value_size: int = VALUE_SIZE) -> None:
        self.name: Final = name
        self.value_size: Final = value_size
        self.engine: Final = solo(world.now(), name, value_size, warn_ns=WARN_NS)
        self.lost: asyncio.Future[str] = world.future()
        self.lease_until: Callable[[], Instant] = _for_ever
        self.closed: Callable[[], None] = _nothing
        self.told: Callable[[LockWaits | None], None] = _unheard
        self._world = world
        self._timer: Timer | None = None
        self._timer_at = FOREVER
        self._handle = 0
        self._cookie = 0
        self._waiting: dict[int, Completed] = {}
        self._blocking: dict[int, Blocking] = {}
        self._delivering = False
        self._loop = asyncio.get_running_loop()

    def submit(
        self, requests: Sequence[Request], completed: Completed | None, blocking: Blocking | None = None
    ) -> list[int]:
        if self.lost.done():
            raise LockLost(self.lost.result())
        handles: list[int] = []
        operations: list[tuple[int, int, Request]] = []
        for request in requests:
            handle = request.lock
            if request.op == "lock":
                handle = self._enter(blocking)
            self._cookie += 1
            if completed is not None:
                self._waiting[self._cookie] = completed
            handles.append(handle)
            operations.append((handle, self._cookie, request))
        self.engine.step(self._world.now(), Submit(CLIENT, operations))
        self._pump()
        return handles

    def submit_now(self, request: Request, blocking: Blocking | None) -> tuple[int, Completion] | None:
        """Completes within the call what concerns nobody else; None: nothing has happened, `submit` it."""
        if self.lost.done():
            return None
        handle = request.lock
        if request.op == "lock":
            handle = self._handle + 1
        completion = self.engine.complete_now(self._world.now(), CLIENT, handle, request)
        if completion is None:
            return None
        if request.op == "lock":
            self._enter(blocking)
        if self._timer is None:
            self._arm()
        return handle, completion

    def forget(self, handle: int) -> None:
        self._blocking.pop(handle, None)

    async def release(self, force: int) -> None:
        """Raises Busy when the lockspace is in use for that force."""
        if self.engine.busy(force):
            raise Busy(f"lockspace {self.name} has locks; end them, or release it by force")
        await self.close()

    async def close(self) -> None:
        if self.lost.done():
            return
        self.engine.step(self._world.now(), ClientGone(CLIENT))
        self._deliver()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.lost.set_result("the lockspace was closed")
        self.lease_until = _no_lease
        self.closed()

    # --- leaves ------------------------------------------------------------------------------------------------------

    def _enter(self, blocking: Blocking | None) -> int:
        self._handle += 1
        if blocking is not None:
            self._blocking[self._handle] = blocking
        return self._handle

    def _pump(self) -> None:
        """What the engine decided is delivered in the next loop turn, never from within `submit`."""
        if not self._delivering:
            self._delivering = True
            self._loop.call_soon(self._deliver)
        self._arm()

    def _deliver(self) -> None:
        self._delivering = False
        for event in self.engine.ready().emit:
            if isinstance(event, Done):
                completed = self._waiting.pop(event.cookie, None)
                if event.completion.status in (EUNLOCK, ECANCEL) and event.completion.mode < 0:
                    self._blocking.pop(event.handle, None)
                if completed is not None:
                    completed(event.handle, event.completion)
            elif isinstance(event, Blocked):
                blocking = self._blocking.get(event.handle)
                if blocking is not None:
                    blocking(event.handle, event.mode)
            elif isinstance(event, Waiting):
                self.told(event.waits)

    def _arm(self) -> None:
        deadline = self.engine.deadline
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline < FOREVER:
            self._timer_at = deadline
            self._timer = self._world.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self.lost.done():
            self.engine.step(self._world.now(), TICK)
            self._pump()


@final
class LocalLocks:
    """Implements `api.dlm.LockManager`. A lockspace of one name is one engine, however often it is opened."""

    local: Final = True

    def __init__(self, world: World) -> None:
        self._world = world
        self._spaces: dict[str, LockSpace] = {}

    async def lockspace(self, name: str, *, value_size: int = VALUE_SIZE, exclusive: bool = False) -> LockSpace:
        if not 0 < len(name.encode()) <= NAME_MAX:
            raise ValueError(f"a lockspace name is 1 to {NAME_MAX} bytes")
        if value_size % 8 or not 8 <= value_size <= 4096:
            raise ValueError(f"a value block is 8 to 4096 bytes, in steps of 8, not {value_size}")
        space = self._spaces.get(name)
        if space is not None and exclusive:
            raise ClusterError(f"lockspace {name} exists already; open it without `exclusive`, or release it first")
        if space is not None:
            backend = space.backend
            assert isinstance(backend, LocalBackend)
            if backend.value_size != value_size:
                raise ClusterError(f"lockspace {name} is open with value blocks of {backend.value_size} bytes")
            return space
        backend = LocalBackend(self._world, name, value_size)
        backend.closed = lambda: self._forget(name)
        space = self._spaces[name] = LockSpace(self._world, backend)
        return space

    def _forget(self, name: str) -> None:
        self._spaces.pop(name, None)


def _for_ever() -> Instant:
    """The lease of who has nobody to agree with."""
    return FOREVER


def _no_lease() -> Instant:
    """Of a lockspace that is closed."""
    return 0


def _unheard(_event: LockWaits | None) -> None:
    """Nobody watches."""


def _nothing() -> None:
    """Nobody wants to know."""
