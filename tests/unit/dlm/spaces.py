"""Lockspaces of several members in one simulated process, as applications see them; each message takes a while.

    async def body(world):
        rig = Rig(world, 2)
        held = await rig.space(1).lock("x", EX)

Engine, backend and `LockSpace` are the real ones; only the ways between the members are a list of timers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from corral.api.dlm import WARN_NS, Completion, LockWaits, Request
from corral.base.engine import Received
from corral.base.ids import MemberId
from corral.base.time import FOREVER, MILLISECOND, Instant
from corral.base.view import Round, Slotted
from corral.base.world import World
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import Blocked, ClientGone, Done, Finish, Lease, Lost, SpaceLost, Start, Stop, Submit, Waiting
from corral.dlm.wire import CODEC
from corral.driver import Driver, each
from corral.providers.backends import NativeBackend
from corral.providers.locks import LockSpace
from corral.sim.simulation import Simulation

WAY = MILLISECOND  # from member to member


def simulated(body: Callable[[World], Awaitable[None]], seed: int = 1) -> None:
    """Runs `body(world)` in a process of a simulated machine."""

    async def main(world: World) -> int:
        await body(world)
        return 0

    with Simulation(seed) as sim:
        process = sim.machine(1).start("app", main)

        async def wait() -> None:
            while process.alive:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        sim.run(wait())
        assert process.status == 0


class Native:
    """What `NativeBackend` needs of a `NativeLockspace`; `moment` is called around each completion that is told."""

    def __init__(self, rig: "Rig", node: int) -> None:
        self.name = "rig"
        self.moment: Callable[[], None] = lambda: None
        self.completed: Callable[[int, int, int, Completion], None]
        self.blocked: Callable[[int, int, int], None]
        self.waiting: Callable[[int, LockWaits], None]
        self.changed: Callable[[], None]
        self.lost: Callable[[str], None]
        self.suspended = False
        self.until: Instant = FOREVER
        self.engine = LockspaceEngine(MemberId(node, 1, 1), "rig", warn_ns=WARN_NS)
        self._rig = rig
        self._node = node
        self._driver: Driver[Any] = Driver(rig.world, self.engine, "rig", transmit=each(self._send), emit=self._emitted)
        self._reason = ""

    def lease_until(self) -> Instant:
        return self.until

    def feed(self, *events: object) -> None:
        events = (Lease(self.until), *events) if self.engine.lease_until != self.until else events
        self._driver.feed(*events)

    def submit(self, client: int, operations: Sequence[tuple[int, int, Request]]) -> None:
        self.feed(Submit(client, operations))

    def complete_now(self, client: int, handle: int, request: Request) -> Completion | None:
        if self._driver.busy or self.engine.lease_until != self.until:
            return None
        return self.engine.complete_now(self._rig.world.now(), client, handle, request)

    def client_gone(self, client: int) -> None:
        self.feed(ClientGone(client))

    def lose(self, reason: str) -> None:
        self._reason = reason
        self.feed(Lost())

    def suspend(self, suspended: bool) -> None:
        self.suspended = suspended
        self.changed()

    async def close(self) -> None:
        pass

    def _send(self, peer: MemberId, message: object) -> None:
        wire = CODEC.encode(message)
        world, target, me = self._rig.world, self._rig.natives[peer.node - 1], self.engine.me
        world.call_at(world.now() + WAY, lambda: target.feed(Received(me, CODEC.decode(wire))))

    def _emitted(self, event: object) -> None:
        if isinstance(event, Done):
            self.moment()
            self.completed(event.client, event.handle, event.cookie, event.completion)
            self.moment()
        elif isinstance(event, Blocked):
            self.blocked(event.client, event.handle, event.mode)
        elif isinstance(event, Waiting):
            self.waiting(event.client, event.waits)
        elif isinstance(event, SpaceLost):
            self.lost(self._reason)


class Rig:
    def __init__(self, world: World, members: int) -> None:
        self.world = world
        self.round_id = 0
        self.natives: list[Native] = []
        self.natives += [Native(self, node) for node in range(1, members + 1)]
        self.spaces = [LockSpace(world, NativeBackend(world, native)) for native in self.natives]  # type: ignore[arg-type]

    async def recover(self, stopped_ns: int = 0) -> None:
        """A round over all members, the first one included."""
        self.round_id += 1
        slots = tuple(Slotted(native.engine.me, native.engine.me.node) for native in self.natives)
        for native in self.natives:
            native.feed(Stop())
            native.suspend(True)
        await self.world.sleep_until(self.world.now() + stopped_ns + 2 * WAY)  # what was on its way is gone
        for native in self.natives:
            native.feed(Start(Round(self.round_id, "rig", slots, (), (), ())))
        while any(native.engine.recovery.stage != 4 for native in self.natives):
            await self.world.sleep_until(self.world.now() + WAY)
        for native in self.natives:
            native.feed(Finish(self.round_id))
            native.suspend(False)

    def space(self, node: int) -> LockSpace:
        return self.spaces[node - 1]

    def native(self, node: int) -> Native:
        return self.natives[node - 1]

    def granted(self, node: int, name: bytes) -> list[int]:
        """The modes in which this member holds locks of that name, as its engine knows them."""
        return [lock.granted for lock in self.native(node).engine.space.locks.in_order() if lock.resource.name == name]

    def empty(self) -> bool:
        return not any(native.engine.space.lock_count or native.engine.space.copies for native in self.natives)


def within(world: World, seconds: float, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
    """Bounded: a test must end."""
    return asyncio.wait_for(coroutine, seconds)
