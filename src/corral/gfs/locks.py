"""The shell around the glock table: submits to the lock manager, runs demotions, wakes holders.

`demote(glock, target)` is the volume's: it writes back and invalidates, and returns the mode that may be kept.
"""

from collections.abc import Callable, Coroutine, Sequence
from errno import EIO
from typing import Any, Final, final

from corral.api.dlm import Completion, Lockspace
from corral.base.time import FOREVER, Instant
from corral.base.world import Timer, World
from corral.gfs.glock import INVALIDATING, JOURNAL, NOEXP, REQUEST, TRY, Glock, GlockTable, Holder

Demote = Callable[[Glock, int], Coroutine[Any, Any, None]]


@final
class Locks:
    """`lockspace` None: no other member can exist, every mode is had at once (table.local)."""

    __slots__ = (
        "_armed_at",
        "_by_handle",
        "_demote",
        "_drained",
        "_fresh",
        "_lockspace",
        "_pumping",
        "_timer",
        "stopped",
        "table",
        "wanted",
        "world",
    )

    def __init__(self, world: World, lockspace: Lockspace | None, demote: Demote, **settings: Any) -> None:
        self.world: Final = world
        self.table: Final = GlockTable(local=lockspace is None, **settings)
        self.stopped = False  # withdrawn: nothing is asked for or given up any more
        self.wanted: list[Glock] = []  # what holders that pass the gate wait for
        self._lockspace = lockspace
        self._demote = demote
        self._by_handle: dict[int, Glock] = {}
        self._fresh: set[int] = set()  # handles whose first lock has not completed
        self._drained: dict[tuple[int, int], Any] = {}
        self._pumping = False
        self._timer: Timer | None = None
        self._armed_at: Instant = FOREVER

    async def hold(self, glock: Glock, state: int, flags: int = 0) -> bool:
        """Waits for the glock in `state`. False only with TRY. Raises OSError(EIO) when the lock manager gave up."""
        assert not flags & NOEXP or glock.kind == JOURNAL, "GFS-13"
        table = self.table
        if table.try_hold(glock, state):
            return True
        if flags & TRY and glock.holders and (state == 3 or glock.holders < 0):
            return False
        holder = Holder(state, flags, self.world.future())
        table.enqueue(self.world.now(), glock, holder)
        self.pump()
        if flags & NOEXP:
            self.wanted.append(glock)
        try:
            await holder.future
        except BaseException:
            table.cancel(self.world.now(), glock, holder)
            self.pump()
            raise
        finally:
            if flags & NOEXP:
                self.wanted.remove(glock)
        if holder.failed:
            if flags & TRY:
                return False
            raise OSError(EIO, f"the lock manager refused glock {glock.name.decode()}")
        return True

    def fetch(self, glock: Glock, state: int) -> Any:
        """Asks for a glock without keeping it: a future that completes when it was granted and let go again, so that it
        is cached; None when it is cached already. Never held while others are waited for: that would make a circle of
        waits possible. `pump` sends what was asked for."""
        if self.table.is_cached(glock, state):
            return None
        holder = Holder(state, 0, self.world.future())

        def granted(_future: Any) -> None:
            if holder.granted:
                self.drop(glock, state)

        holder.future.add_done_callback(granted)
        self.table.enqueue(self.world.now(), glock, holder)
        return holder.future

    def drop(self, glock: Glock, state: int) -> None:
        """Ends a hold; whoever waits goes on."""
        # The common case, nobody waits, is kept free of calls.
        if not glock.queue and not glock.blocked and glock.phase == 0:
            glock.holders = 0 if state == 3 else glock.holders - 1
            return
        self.table.release(self.world.now(), glock, state)
        if glock.phase == INVALIDATING and not glock.holders:
            drained = self._drained.pop((glock.kind, glock.number), None)
            if drained is not None and not drained.done():
                drained.set_result(None)
        self.pump()

    async def wait_drained(self, glock: Glock) -> None:
        """Until the reads and writes served during an invalidation are done."""
        while glock.holders:  # another may have been served before this task ran again
            drained = self._drained[glock.kind, glock.number] = self.world.future()
            await drained

    def give_up(self, glock: Glock) -> None:
        self.table.give_up(self.world.now(), glock)
        self.pump()

    def synced(self, glock: Glock, target: int) -> None:
        self.table.synced(self.world.now(), glock, target)
        self.pump()

    def open_gate(self) -> None:
        self.table.open_gate(self.world.now())
        self.pump()

    def asked(self) -> Glock | None:
        """A glock that recovery waits for and the lock manager has not granted yet; None when there is none."""
        return next((glock for glock in self.wanted if glock.phase == REQUEST), None)

    # --- effects -----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Acts on what the table decided."""
        if self._pumping or self.stopped:
            return
        self._pumping = True
        table = self.table
        try:
            while table.requests or table.syncs or table.grants:
                if table.requests:
                    requests, table.requests = table.requests, []
                    self._submit(requests)
                if table.syncs:
                    syncs, table.syncs = table.syncs, []
                    for glock, target in syncs:
                        self.world.spawn(self._demote(glock, target), "gfs: demote")
                if table.grants:
                    grants, table.grants = table.grants, []
                    for holder in grants:
                        self._wake(holder)
        finally:
            self._pumping = False
        if table.deadline < self._armed_at:
            self._arm()

    def _wake(self, holder: Holder) -> None:
        if not holder.future.done():
            holder.future.set_result(None)

    def _submit(self, requests: Sequence[tuple[Glock, Any]]) -> None:
        assert self._lockspace is not None
        handles = self._lockspace.submit([request for _, request in requests], self._completed, self._blocking)
        for (glock, request), handle in zip(requests, handles, strict=True):
            if request.op == "lock":
                glock.handle = handle
                self._by_handle[handle] = glock
                self._fresh.add(handle)

    def _completed(self, handle: int, completion: Completion) -> None:
        glock = self._by_handle.get(handle)
        if glock is None or self.stopped:
            return
        fresh = handle in self._fresh
        self._fresh.discard(handle)
        if completion.status != 0 and (fresh or (glock.drop and glock.target == 0)):
            glock.handle = 0
            del self._by_handle[handle]
        self.table.completed(self.world.now(), glock, completion)
        self.pump()

    def _blocking(self, handle: int, mode: int) -> None:
        glock = self._by_handle.get(handle)
        if glock is None or self.stopped:
            return
        self.table.blocking(self.world.now(), glock, mode)
        self.pump()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_at = self.table.deadline
        self._timer = self.world.call_at(self._armed_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._armed_at = FOREVER
        if not self.stopped:
            self.table.tick(self.world.now())
            self.pump()
            if self.table.deadline < FOREVER and self._timer is None:
                self._arm()

    def stop(self) -> None:
        """The mount has withdrawn or ended."""
        self.stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
