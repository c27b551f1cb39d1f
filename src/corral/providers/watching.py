"""What a lockspace tells its watchers: the states of DESIGN 5 as they come and go, and waits that last too long.

    async for event in space.watch():
        ...                                 # SpaceState("running", ""), SpaceState("lapsed", ...), LockWaits(...)

A lease that lapses sends no message. So while somebody watches, a timer looks at it when it should end, and while it
has lapsed every so often; without watchers nothing runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol, final

from corral.api.dlm import LockWaits, SpaceEvent, SpaceState
from corral.base.errors import Busy
from corral.base.time import FOREVER, MILLISECOND, Instant
from corral.base.world import Timer, World

EVENTS_MAX: Final = 1024  # events a slow watcher may be behind
LAPSED_LOOK: Final = 50 * MILLISECOND  # how often a lapsed lease is looked at

RUNNING: Final = SpaceState("running", "")


class Watched(Protocol):
    """What is watched of a `locks.Backend`."""

    told: Callable[[LockWaits | None], None]

    @property
    def lost(self) -> "asyncio.Future[str]": ...
    @property
    def suspended(self) -> bool: ...
    def lease_until(self) -> Instant: ...


@final
class Watching:
    def __init__(self, world: World, backend: Watched) -> None:
        self._world = world
        self._backend = backend
        self._watchers: list[asyncio.Queue[SpaceEvent | None]] = []
        self._last = RUNNING
        self._timer: Timer | None = None
        backend.told = self._told
        backend.lost.add_done_callback(lambda _: self._look())

    @property
    def state(self) -> SpaceState:
        backend = self._backend
        if backend.lost.done():
            return SpaceState("lost", backend.lost.result())
        if self._world.now() >= backend.lease_until():
            return SpaceState("lapsed", "this node has not heard from a quorum for the length of its lease")
        if backend.suspended:
            return SpaceState("suspended", "the lockspace recovers from a change of its members")
        return RUNNING

    async def watch(self) -> AsyncIterator[SpaceEvent]:
        """Begins with the present state, ends with "lost"."""
        queue: asyncio.Queue[SpaceEvent | None] = asyncio.Queue(EVENTS_MAX)
        self._look()
        queue.put_nowait(self._last)
        self._watchers.append(queue)
        self._arm()
        try:
            while (event := await queue.get()) is not None:
                yield event
                if isinstance(event, SpaceState) and event.state == "lost":
                    return
            raise Busy(f"this watcher was more than {EVENTS_MAX} events behind; read faster")
        finally:
            if queue in self._watchers:
                self._watchers.remove(queue)

    # --- leaves ------------------------------------------------------------------------------------------------------

    def _told(self, waits: LockWaits | None) -> None:
        if waits is not None:
            self._tell(waits)
        self._look()

    def _look(self) -> None:
        state = self.state
        if state != self._last:
            self._last = state
            self._tell(state)
        self._arm()

    def _tell(self, event: SpaceEvent) -> None:
        for queue in list(self._watchers):
            if queue.qsize() >= EVENTS_MAX - 1:
                self._watchers.remove(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._watchers or self._last.state == "lost":
            return
        until = self._backend.lease_until()
        when = self._world.now() + LAPSED_LOOK if self._last.state == "lapsed" else until
        if when < FOREVER:
            self._timer = self._world.call_at(when, self._due)

    def _due(self) -> None:
        self._timer = None
        self._look()
