"""A participant: a process of this node that takes part in service groups itself (DESIGN 4).

It attaches to corrald over the Unix socket, opens a comm endpoint of its own, registers services, and is told when to
stop, start and finish. Its peers are the other members of its groups, which it reaches directly.

A round is started here once there is a session to every other member. A session that breaks is reported to corrald; the
coordinator then begins a new round of that group, in which engines send again whatever they have no answer to.

When corrald's socket breaks the participant freezes at once and is lost for good: it never attaches to another
incarnation (the owner of the process ends it at `lost`).
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, final

from corral.api.cman import Peer, Recoverable
from corral.api.comm import Comm, PeerDown, PeerUp
from corral.base.errors import ClusterError, NotMember, PeerError
from corral.base.ids import MemberId
from corral.base.time import Instant
from corral.base.view import Round, View
from corral.base.world import Connection, World
from corral.comm.gate import DELIVER, OVERFLOW, RoundGate
from corral.providers.ipc_wire import (
    FROM_CORRALD,
    IPC_VERSION,
    PARTICIPANT,
    TO_CORRALD,
    Answer,
    Attach,
    Attached,
    Deregister,
    FinishRound,
    FromCorrald,
    JoinRefused,
    LeftGroup,
    Reach,
    Refusal,
    Register,
    StartDone,
    StartRound,
    StopGroups,
    ToCorrald,
    ViewNow,
    Waits,
)
from corral.providers.page import PAGE_SIZE, PageReader

TICKET_SIZE: Final = 32


class Endpoint(Comm, Protocol):
    """The comm provider a participant opens for itself."""

    async def start(self, address: str, *, datagrams: bool = True) -> None: ...

    def listen_rest(self, deliver: Callable[[MemberId, int, int, list[bytes]], None]) -> None: ...

    def end_session(self, peer: MemberId, reason: str) -> None: ...

    def close(self) -> None: ...


MakeEndpoint = Callable[[World, Attached, bytes], Endpoint]
"""(world, what corrald said of us, our ticket) -> an endpoint that is not started yet."""

GATES_MAX: Final = 256  # ports for which frames are held before this process has heard of the group


class StartFailed(ClusterError):
    """A service cannot take part in its group here; the message says why and what to do."""


class Service(Recoverable, Protocol):
    """A service whose members speak to each other: it gets the messages of its current round, FIFO per peer.

    Its `start` may raise StartFailed. In the first round `register` then raises it, and the member stays one until it
    leaves the group or its process ends, which counts as a failure. Later it is the end of this participant.
    """

    def deliver(self, peer: MemberId, payloads: list[bytes]) -> None: ...

    def blocked_by(self) -> str:
        """What a start under way here waits for, so that its length is not this process's fault: other members, the
        operator, or work that advances. Empty: nothing of that kind."""


@final
class _Membership:
    """One group this participant is in or wants to be in."""

    __slots__ = (
        "joined",
        "left",
        "level",
        "name",
        "number",
        "peers",
        "reported",
        "round",
        "service",
        "started",
        "task",
        "told_waits",
    )

    def __init__(self, name: str, level: int, service: Service, joined: "asyncio.Future[None]") -> None:
        self.name = name
        self.level = level
        self.service = service
        self.joined = joined
        self.left: asyncio.Future[None] | None = None
        self.number = 0
        self.round: Round | None = None
        self.peers: dict[MemberId, Peer] = {}
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.reported: set[MemberId] = set()
        self.told_waits = ""


@final
class Participant:
    """Implements `api.cman.Membership` for one process, on the event loop that opened it."""

    def __init__(
        self, world: World, socket: str, enlistment: str, make_endpoint: MakeEndpoint, *, purpose: str
    ) -> None:
        self._world = world
        self._socket = socket
        self._enlistment_path = enlistment
        self._make_endpoint = make_endpoint
        self._purpose = purpose
        self._connection: Connection | None = None
        self._attached: asyncio.Future[Attached] = world.future()
        self._groups: dict[str, _Membership] = {}
        self._sessions: set[MemberId] = set()
        self._known: set[MemberId] = set()  # peers given to comm
        self._gates: dict[int, RoundGate] = {}  # by group number
        self._by_number: dict[int, _Membership] = {}
        self._session_changed: asyncio.Event = asyncio.Event()
        self._page: PageReader | None = None
        self._view: View | None = None
        self._active = False
        self._closing = False
        self._ticket = world.random_bytes(TICKET_SIZE)
        self.comm: Endpoint
        self.identity: Attached
        self.lost: asyncio.Future[str] = world.future()
        """Resolves with the reason when this participant may never act again."""

    # -- opening and closing

    async def open(self) -> None:
        """Raises ClusterError when corrald is not there or refuses."""
        self._enlistment = await self._world.process.enlist(self._enlistment_path)
        try:
            self._connection = await self._world.local.connect(self._socket, self)
        except OSError as error:
            self._enlistment.release()
            raise ClusterError(
                f"no corrald answers at {self._socket} ({error.strerror or error}); start it, or name another socket"
            ) from None
        self._tell(Attach(IPC_VERSION, PARTICIPANT, self._purpose))
        self.identity = await self._attached
        if self.lost.done():
            raise ClusterError(self.lost.result())
        self._page = PageReader(self._world.page(self.identity.page, PAGE_SIZE, create=False), self.identity.page_slot)
        self.comm = self._make_endpoint(self._world, self.identity, self._ticket)
        self.comm.watch(self._session)
        self.comm.listen_rest(self._frames)
        await self.comm.start(f"{self.identity.host}:0", datagrams=False)
        self._tick()

    def close(self) -> None:
        """Leaves without ceremony: call `leave` on the groups first, else this counts as a failure."""
        self._closing = True
        for group in self._groups.values():
            if group.task is not None:
                group.task.cancel()
        if self._connection is not None:
            self._connection.close()
        if hasattr(self, "comm"):
            self.comm.close()
        if hasattr(self, "_enlistment"):
            self._enlistment.release()

    def _tick(self) -> None:
        if self._page is not None and not self._closing:
            blocked = False
            for name in sorted(self._groups):
                group = self._groups[name]
                waits = self._waits_for(group) if group.task is not None and not group.started else ""
                blocked = blocked or bool(waits)
                if waits != group.told_waits:
                    group.told_waits = waits
                    self._tell(Waits(name, waits))
            self._page.tick(blocked=blocked)
            self._world.call_at(self._world.now() + self.identity.detect_ns // 4, self._tick)

    def _waits_for(self, group: _Membership) -> str:
        missing = sorted(set(group.peers) - self._sessions)
        if missing:
            return f"a connection to {', '.join(map(str, missing))}"
        return group.service.blocked_by()

    # -- what services ask

    @property
    def me(self) -> MemberId:
        return self.identity.me

    @property
    def view(self) -> View | None:
        return self._view

    @property
    def active(self) -> bool:
        return self._active

    def lease_until(self) -> Instant:
        """Up to when this process may act; 0 when frozen or lost."""
        page = self._page
        return 0 if page is None else page.lease_until()

    def may_act(self) -> bool:
        return self._world.now() < self.lease_until()

    async def register(self, group: str, level: int, service: Service, *, slots: int = 4096) -> None:
        """Returns when this member's first round has finished. Raises ClusterError when it is refused, StartFailed when
        the service could not start, NotMember when this process may not act any more."""
        while (before := self._groups.get(group)) is not None:
            if before.left is None:
                raise ClusterError(f"this process is already in group {group}; leave it first")
            await asyncio.shield(before.left)  # what is told of it must not be taken for an answer to this
        if self.lost.done():
            raise NotMember(self.lost.result())
        joined: asyncio.Future[None] = self._world.future()
        membership = self._groups[group] = _Membership(group, level, service, joined)
        self._tell(Register(group, level, slots, self.comm.address, self._ticket))
        try:
            await joined
        except BaseException:
            # Once a round has begun here there may be something to recover: it stays a member until it leaves or ends.
            if self._groups.get(group) is membership and membership.round is None and not self.lost.done():
                self._leave(membership)
            raise

    async def leave(self, group: str) -> None:
        """Returns when it is ordered: others may count on it. Raises NotMember when this process is lost before."""
        membership = self._groups.get(group)
        if membership is None or self.lost.done():
            return
        self._stop(membership)
        await asyncio.shield(self._leave(membership))
        if self.lost.done():
            raise NotMember(self.lost.result())

    def _leave(self, membership: _Membership) -> "asyncio.Future[None]":
        if membership.left is None:
            membership.left = self._world.future()
            self._tell(Deregister(membership.name))
        return membership.left

    def send(self, group: str, peer: MemberId, payload: bytes) -> None:
        """To another member of the group, in its present round."""
        membership = self._groups[group]
        assert membership.round is not None
        self.comm.send(peer, membership.number, membership.round.id, payload)

    def round_begun(self, group: str, round_id: int) -> None:
        """The service is ready for messages of this round: called from within its `start`, before it awaits."""
        membership = self._groups[group]
        for peer, payloads in self._gates[membership.number].advance(round_id):
            membership.service.deliver(peer, payloads)

    # -- corrald speaks

    def received(self, messages: list[bytes]) -> None:
        for payload in messages:
            if self.lost.done():
                return  # everybody who waited was told so
            try:
                message = FROM_CORRALD.decode(payload)
            except PeerError as error:
                self._lose(
                    f"corrald sent what this version does not understand ({error}); use the same version of both"
                )
                return
            self._handle(message)

    def broken(self, reason: str) -> None:
        if not self._closing:
            self._lose(f"the connection to corrald broke ({reason}): this process may not act any more")

    def _tell(self, message: ToCorrald) -> None:
        if self._connection is not None:
            self._connection.send([TO_CORRALD.encode(message)])

    def _handle(self, message: FromCorrald) -> None:
        if isinstance(message, StartRound):
            self._start(message)
        elif isinstance(message, FinishRound):
            self._finish(message)
        elif isinstance(message, StopGroups):
            self._stop_groups(message.groups)
        elif isinstance(message, ViewNow):
            self._view, self._active = message.view, message.active
        elif isinstance(message, Attached):
            if not self._attached.done():
                self._attached.set_result(message)
        elif isinstance(message, JoinRefused):
            refused = self._end(message.group)
            if refused is not None and not refused.joined.done():
                refused.joined.set_exception(ClusterError(f"cannot join {message.group}: {message.reason}"))
        elif isinstance(message, LeftGroup):
            self._end(message.group)
        elif isinstance(message, Refusal):
            self._lose(message.reason)
        else:
            assert isinstance(message, Answer)  # participants ask nothing

    def _end(self, group: str) -> _Membership | None:
        """It is no member of that group any more, or never was."""
        membership = self._groups.pop(group, None)
        if membership is not None:
            self._by_number.pop(membership.number, None)
            self._gates.pop(membership.number, None)
            if membership.left is not None:
                membership.left.set_result(None)
        self._forget_strangers()
        return membership

    def _lose(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        self._page = None  # from now on there is no lease
        self._stop_groups(())
        if not self._attached.done():
            self._attached.set_exception(ClusterError(reason))
        for group in self._groups.values():
            if not group.joined.done():
                group.joined.set_exception(NotMember(reason))
            if group.left is not None and not group.left.done():
                group.left.set_result(None)

    # -- rounds

    def _stop(self, group: _Membership) -> None:
        if group.task is not None:
            group.task.cancel()
            group.task = None
        group.started = False
        group.service.stop()

    def _stop_groups(self, names: tuple[str, ...]) -> None:
        chosen = names or sorted(self._groups, key=lambda name: (-self._groups[name].level, name))
        for name in chosen:
            group = self._groups.get(name)
            if group is not None:
                self._stop(group)

    def _start(self, message: StartRound) -> None:
        group = self._groups.get(message.round.group)
        if group is None or group.left is not None or self.lost.done():
            return
        self._stop(group)
        group.round = message.round
        group.number = message.number
        self._by_number[group.number] = group
        self._gates.setdefault(group.number, RoundGate())
        group.peers = {peer.member: peer for peer in message.peers if peer.member != self.me}
        for peer in group.peers.values():
            self.comm.set_peer(peer.member, peer.address, peer.ticket)
        self._forget_strangers()
        group.reported &= self._sessions  # who is still out of reach is reported anew: the coordinator may be new
        group.task = self._world.spawn(self._run(group, message.round), f"start {group.name} round {message.round.id}")

    async def _run(self, group: _Membership, round: Round) -> None:
        await self._wait_sessions(group)
        try:
            await group.service.start(round)
        except StartFailed as error:
            if not group.joined.done():
                group.joined.set_exception(error)
            elif group.joined.exception() is None:
                self._lose(str(error))
            return
        group.started = True
        self._tell(StartDone(group.name, round.id))

    async def _wait_sessions(self, group: _Membership) -> None:
        """Until every peer of the group can be reached; after `detect` those who cannot are reported."""
        patience = self._world.now() + self.identity.detect_ns
        while missing := sorted(set(group.peers) - self._sessions):
            if self._world.now() >= patience:
                for member in missing:
                    self._report(group, member)
            self._session_changed.clear()
            wake = self._world.call_at(
                max(patience, self._world.now() + self.identity.detect_ns), self._session_changed.set
            )
            try:
                await self._session_changed.wait()
            finally:
                wake.cancel()

    def _finish(self, message: FinishRound) -> None:
        group = self._groups.get(message.group)
        if group is None or group.round is None or group.round.id != message.round or not group.started:
            return
        group.service.finish(group.round)
        if not group.joined.done():
            group.joined.set_result(None)

    # -- sessions

    def _frames(self, peer: MemberId, port: int, round_id: int, payloads: list[bytes]) -> None:
        gate = self._gates.get(port)
        if gate is None:
            if len(self._gates) >= GATES_MAX:
                self.comm.end_session(peer, f"it speaks to more than {GATES_MAX} groups that are unknown here")
                return
            gate = self._gates[port] = RoundGate()
        verdict = gate.receive(peer, round_id, payloads)
        if verdict == DELIVER:
            group = self._by_number.get(port)
            if group is not None:
                group.service.deliver(peer, payloads)
        elif verdict == OVERFLOW:
            self.comm.end_session(peer, "it is too far ahead: more is held of its newer round than the bound allows")

    def _session(self, change: PeerUp | PeerDown) -> None:
        if isinstance(change, PeerUp):
            self._sessions.add(change.peer)
        else:
            self._sessions.discard(change.peer)
            for number in sorted(self._gates):
                self._gates[number].forget(change.peer)
        self._session_changed.set()
        for name in sorted(self._groups):
            group = self._groups[name]
            if change.peer not in group.peers:
                continue
            if isinstance(change, PeerDown):
                self._report(group, change.peer)
            elif change.peer in group.reported:
                group.reported.discard(change.peer)
                self._tell(Reach(group.name, change.peer, False))

    def _report(self, group: _Membership, peer: MemberId) -> None:
        if peer not in group.reported:
            group.reported.add(peer)
            self._tell(Reach(group.name, peer, True))

    def _forget_strangers(self) -> None:
        """Sessions to processes that share no group with this one any more are given up."""
        wanted = {member for group in self._groups.values() for member in group.peers}
        for member in sorted(self._known - wanted):
            self.comm.drop_peer(member)
        self._known = wanted
        for group in self._groups.values():
            group.reported &= set(group.peers)
