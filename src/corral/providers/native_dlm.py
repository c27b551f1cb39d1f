"""The native lock manager: a lockspace engine inside this process, its peers the other members of its service group.

    space = NativeLockspace(world, participant, "orders")
    await space.open()                      # joins group dlm:orders; returns when its first round has finished
    space.submit(client, [(handle, cookie, Request(...))])

Before each step the engine is told how long the lease runs, read from the shared page: while it has lapsed nothing is
granted, and what was decided is held back until it is renewed or the lockspace is lost.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, final

from corral.api.cman import LEVEL_DLM
from corral.api.dlm import MODE_NAMES, VALUE_SIZE, WARN_NS, Completion, LockWaits, Request
from corral.base.engine import Received
from corral.base.errors import ClusterError, NotMember, PeerError
from corral.base.ids import MemberId
from corral.base.view import Round
from corral.base.world import World
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import (
    UNAWAITED,
    Blocked,
    ClientGone,
    Done,
    Finish,
    Lease,
    Lost,
    Misfit,
    RoundDone,
    SpaceLost,
    Start,
    Stop,
    Submit,
    Waiting,
)
from corral.dlm.wire import BATCHES
from corral.driver import Driver
from corral.providers.participant import Participant

log = logging.getLogger("corral.locks")


def group_of(name: str) -> str:
    return f"dlm:{name}"


@final
class NativeLockspace:
    """A `participant.Service`. Whoever serves the clients sets `completed(client, handle, cookie, completion)`,
    `blocked(client, handle, mode)`, `waiting(client, waits)`, `changed()` for `suspended`, and `lost(reason)`."""

    def __init__(
        self, world: World, participant: Participant, name: str, *, value_size: int = VALUE_SIZE, level: int = LEVEL_DLM
    ) -> None:
        self.name: Final = name
        self.group: Final = group_of(name)
        self.completed: Callable[[int, int, int, Completion], None] = _ignore
        self.blocked: Callable[[int, int, int], None] = _ignore
        self.waiting: Callable[[int, LockWaits], None] = _ignore
        self.changed: Callable[[], None] = _ignore
        self.lost: Callable[[str], None] = _ignore
        self.suspended = True  # from a Stop until the next round has finished
        self.rejected = 0
        self._world = world
        self._participant = participant
        self.lease_until: Final = participant.lease_until  # up to when held locks are guaranteed
        self._level = level
        self.engine: Final = LockspaceEngine(participant.me, name, value_size, warn_ns=WARN_NS)
        self._driver: Driver[Any] = Driver(world, self.engine, self.group, transmit=self._transmit, emit=self._emitted)
        self._done: asyncio.Future[None] | None = None
        self._round_id = 0
        self._open = False
        self._lost_reason = ""
        self._misfit: asyncio.Future[str] = world.future()
        participant.lost.add_done_callback(self._participant_lost)

    # -- life

    async def open(self) -> None:
        """Raises ClusterError when the join is refused, or when those in the lockspace have value blocks of another
        length, and NotMember when this process may not act any more."""
        joining = asyncio.ensure_future(self._participant.register(self.group, self._level, self))
        try:
            await asyncio.wait((joining, self._misfit), return_when=asyncio.FIRST_COMPLETED)
            if self._misfit.done():
                await self._participant.leave(self.group)
                raise ClusterError(self._misfit.result())
            await joining
        finally:
            joining.cancel()
        self._open = True
        self._watch_lease()

    async def close(self) -> None:
        """Leaves the group cleanly; every client must be gone before."""
        self._open = False
        if not self._lost_reason:
            await self._participant.leave(self.group)
        self._driver.stop()

    # -- the service contract

    def stop(self) -> None:
        self._feed(Stop())
        self._suspend(True)

    async def start(self, round: Round) -> None:
        done: asyncio.Future[None] = self._world.future()
        self._done = done
        self._round_id = round.id
        self._feed(Start(round))
        self._participant.round_begun(self.group, round.id)
        await done

    def finish(self, round: Round) -> None:
        self._feed(Finish(round.id))
        self._suspend(False)

    def _suspend(self, suspended: bool) -> None:
        if self.suspended != suspended:
            self.suspended = suspended
            self.changed()

    def deliver(self, peer: MemberId, payloads: list[bytes]) -> None:
        events: list[Any] = []
        for payload in payloads:
            try:
                events += [Received(peer, message) for message in BATCHES.decode(payload)]
            except PeerError:
                self.rejected += 1
        self._feed(*events)

    def blocked_by(self) -> str:
        return "the locks of other members" if self._done is not None and not self._done.done() else ""

    # -- clients

    def submit(self, client: int, operations: Sequence[tuple[int, int, Request]]) -> None:
        """(handle, cookie, request) each; completions come later, never from within this call."""
        if self._lost_reason:
            raise NotMember(self._lost_reason)
        self._feed(Submit(client, operations))

    def complete_now(self, client: int, handle: int, request: Request) -> Completion | None:
        """Completes within the call what concerns nobody else; None: nothing has happened, `submit` it."""
        engine, driver = self.engine, self._driver
        if driver.busy or self._lost_reason or engine.lease_until != self.lease_until():
            return None
        completion = engine.complete_now(self._world.now(), client, handle, request)
        if completion is not None:
            driver.arm()
        return completion

    def client_gone(self, client: int) -> None:
        self._feed(ClientGone(client))

    # -- inside

    def _feed(self, *events: Any) -> None:
        until = self.lease_until()
        if until != self.engine.lease_until:
            self._driver.feed(Lease(until), *events)
        else:
            self._driver.feed(*events)

    def _watch_lease(self) -> None:
        """What was held back while the lease had lapsed leaves soon after it runs again, without another event."""
        if not self._open or self._lost_reason:
            return
        if self.engine.lease_until != self.lease_until():
            self._feed()
        self._world.call_at(self._world.now() + self._participant.identity.detect_ns // 20, self._watch_lease)

    def _transmit(self, messages: Sequence[tuple[MemberId, Any]]) -> None:
        """All that one go decided for a member leaves in one frame, or in a few."""
        by_peer: dict[MemberId, list[Any]] = {}
        for peer, message in messages:
            by_peer.setdefault(peer, []).append(message)
        for peer, said in by_peer.items():
            for payload in BATCHES.encode(said):
                self._participant.send(self.group, peer, payload)

    def _emitted(self, event: object) -> None:
        if isinstance(event, Done):
            if event.cookie == UNAWAITED:
                return
            self.completed(event.client, event.handle, event.cookie, event.completion)
        elif isinstance(event, Blocked):
            self.blocked(event.client, event.handle, event.mode)
        elif isinstance(event, Waiting):
            if event.waits.blockers:  # else a recovery is in its way, as in that of all others: corrald tells
                log.warning("%s", told_wait(self.name, event.client, event.waits))
            self.waiting(event.client, event.waits)
        elif isinstance(event, RoundDone):
            if event.round_id == self._round_id and self._done is not None and not self._done.done():
                self._done.set_result(None)
        elif isinstance(event, Misfit):
            self._lost_reason = (
                f"lockspace {self.name} has value blocks of {event.value_size} bytes on node {event.peer.node}, not "
                f"{self.engine.value_size}; open it with that length"
            )
            if not self._misfit.done():
                self._misfit.set_result(self._lost_reason)
        elif isinstance(event, SpaceLost):
            self.lost(self._lost_reason)

    def _participant_lost(self, lost: "asyncio.Future[str]") -> None:
        self._lost_reason = lost.result()
        self._driver.feed(Lost())


def told_wait(space: str, client: int, waits: LockWaits) -> str:
    """One line for the log: who waits for what, and for whom."""
    mode = MODE_NAMES[waits.mode]
    who = f"lockspace {space}: client {client} has waited {waits.waited_ns / 1e9:.1f} s for {waits.resource!r} {mode}"
    held = ", ".join(
        f"node {lock.member.node} client {lock.client} "
        + (MODE_NAMES[lock.granted] if lock.granted >= 0 else f"(waits for {MODE_NAMES[lock.requested]})")
        for lock in waits.blockers
    )
    return f"{who}; in its way: {held}"


def _ignore(*_arguments: Any) -> None:
    """Before anybody serves clients."""
