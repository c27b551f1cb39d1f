"""One node: the composition of comm, cman, fence and recovery control over a World (DESIGN 4, 7).

    world.network -- NativeComm --+-- Agreement   heartbeats, lease, views
                                  +-- LiftEngine  rounds of the service groups
                                  +-- Fencing     victims, agents
    Unix socket  -- Door -- Warden                participants, callers
    shared page  <- lease, round

The same class runs under `corrald` and, in virtual time, in the simulator.
"""

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple, final

from corral.api.cman import FENCE_GROUP
from corral.base.engine import Received
from corral.base.errors import ClusterError, ConfigurationError, PeerError
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.time import Instant
from corral.base.view import View
from corral.base.world import Listener, ProcessId, Store, StoreDamaged, World
from corral.cman.events import (
    Active,
    Attach,
    CleanlyStopped,
    Excluded,
    Installed,
    LeaseExtended,
    LeaseLapsed,
    Left,
    Outdated,
    Stop,
)
from corral.cman.lift import LiftEngine
from corral.cman.lift_events import (
    EvictLocal,
    Fenced,
    FinishGroup,
    LiftEvent,
    LocalDone,
    Promised,
    Refused,
    StartFence,
    StartGroup,
    StopAll,
    Stopped,
    ViewActive,
)
from corral.cman.lift_events import Installed as LiftInstalled
from corral.cman.lift_events import Left as LeftGroup
from corral.cman.lift_wire import ATTACHMENT_CODEC, CODEC, STATE_CODEC, Attachment, LiftState
from corral.cman.timing import Timing
from corral.driver import Driver, each
from corral.fence.events import Start as FenceStart
from corral.node.agreement import Agreement, begin_life
from corral.node.chronicle import Chronicle
from corral.node.config import ClusterConfig
from corral.node.door import Door
from corral.node.fencing import Fencing
from corral.node.status import Answers
from corral.node.warden import Warden
from corral.providers.ipc_wire import Attached, ViewNow
from corral.providers.native_comm import Limits, NativeComm, Rejected
from corral.providers.page import PAGE_SIZE, PageWriter
from corral.wire.frame import PORT_FENCE, PORT_LIFT

LIFT_COMPACT_AT: Final = 512


class Paths(NamedTuple):
    """Where a node's files are. The stores `cman` and `lift` are the World's, in the state directory."""

    socket: str
    lock_socket: str
    page: str
    participants: str
    certificates: str = ""


class Ended(NamedTuple):
    """Why a node's life is over. `again`: start another incarnation."""

    reason: str
    again: bool
    clean: bool = False


@final
class Node:
    """`machine_id`: which machine this is, for agents that reach only their own. `loop_statistics`: how punctual the
    loop that runs this node has been, which only its world can know."""

    def __init__(
        self,
        world: World,
        config: ClusterConfig,
        node: NodeId,
        paths: Paths,
        *,
        uid: int,
        log: Callable[[str], None],
        machine_id: str = "",
        loop_statistics: Callable[[], dict[str, int]] | None = None,
    ) -> None:
        self.world: Final = world
        self.config: Final = config
        self.node: Final = node
        self.paths: Final = paths
        self.chronicle: Final = Chronicle(world.now, log)
        self.timing: Final = Timing(config.detect_ns, config.recover_ns)
        self.ended: asyncio.Future[Ended] = world.future()
        self.me: NodeIncarnation
        self.comm: NativeComm
        self.agreement: Agreement
        self.lift: LiftEngine
        self.fencing: Fencing
        self.warden: Warden
        self.door: Door
        self.view: View | None = None
        self.active = False
        self.lapses = 0
        self.loop_statistics: Final = loop_statistics or dict
        self._machine_id = machine_id
        self._uid = uid
        self._closing = False
        self._listener: Listener | None = None
        self._lift_driver: Driver[LiftEvent]
        self._leaving = False

    # -- life

    async def start(self) -> None:
        """Raises ClusterError (also ConfigurationError) with a sentence when this node cannot run."""
        world, config = self.world, self.config
        entry = config.node(self.node)
        stateful = not await self._end_earlier_participants()
        cman_store, lift_store = world.store("cman"), world.store("lift")
        try:
            state, quiet = await begin_life(cman_store, world.wall_seconds(), self.timing.lease_ns)
            lift_state = await _read_lift(lift_store)
        except (StoreDamaged, PeerError) as error:
            raise ClusterError(
                f"the state of this node is damaged ({error}); remove its state directory: "
                "the node then joins without memory, once the others have fenced what it was"
            ) from None
        except OSError as error:
            raise ClusterError(
                f"the state of this node cannot be kept: {error}; free space or repair the disk"
            ) from None
        self.me = NodeIncarnation(self.node, state.incarnation)
        self._page = PageWriter(world.page(self.paths.page, PAGE_SIZE, create=True))
        self.comm = NativeComm(
            world,
            self.me.corrald(),
            cluster=config.name,
            cluster_uuid=_uuid_bytes(config.uuid),
            limits=Limits.for_detect(config.detect_ns, config.recover_ns),
            rejected=self._rejected,
            outdated=lambda known: self.agreement.outdated(known),
        )
        self.lift = LiftEngine(self.me, world.process.me, config.node_ids, config.recover_ns, lift_state)
        self._lift_driver = Driver(
            world,
            self.lift,
            "lift",
            transmit=each(lambda peer, message: self.comm.send(peer, PORT_LIFT, 0, CODEC.encode(message))),
            emit=self._lifted,
            store=lift_store,
            encode=STATE_CODEC.encode,
            failed=self._cannot_persist,
        )
        self.fencing = Fencing(
            world,
            self.me,
            config.fence,
            self.chronicle,
            transmit=lambda peer, port, payload: self.comm.send(peer, port, 0, payload),
            view=lambda: self.view,
            identities=self._identities,
            done=self._fence_done,
            cut_off=self._cut_off,
            fencing=lambda nodes: self.agreement.fencing(nodes),
            expel=self._expel,
            machine_id=self._machine_id,
        )
        self.warden = Warden(
            world,
            self.me,
            self._page,
            config.recover_ns,
            lambda event: self._lift_driver.feed(event),
            lambda sentence: self.chronicle.note("participant", sentence),
            self.end,
        )
        self.agreement = Agreement(
            world,
            self.comm,
            self.me,
            config.node_ids,
            self.timing,
            state,
            cman_store,
            self.chronicle,
            quiet=quiet,
            stateful=stateful,
            told=self._told,
            failed=self._cannot_persist,
        )
        self.door = Door(
            world,
            self._uid,
            self.warden,
            self,
            Answers(self),
            lambda sentence: self.chronicle.note("participant", sentence),
        )
        self.comm.listen(PORT_LIFT, self._lift_messages)
        self.comm.listen(PORT_FENCE, self.fencing.deliver)
        self.agreement.start()
        self._lift_driver.start()
        try:
            await self.comm.start(entry.address)
        except OSError as error:
            raise ClusterError(
                f"cannot listen at {entry.address} ({error.strerror or error}); "
                f"end what uses that address, or give node {self.node} another one in the configuration"
            ) from None
        try:
            self._listener = await world.local.listen(self.paths.socket, self.door.accept)
        except OSError as error:
            raise ClusterError(f"cannot listen at {self.paths.socket}: {error.strerror or error}") from None
        for other in config.nodes:
            if other.id != self.node:
                self.comm.add_node(other.id, other.address)
        self.chronicle.note(
            "node", f"node {self.node} of cluster {config.name} is up, incarnation {self.me.incarnation}"
        )

    async def _end_earlier_participants(self) -> bool:
        """DESIGN 4, corrald dies: whether nobody of an earlier life is left, killing those who are."""
        deadline = self.world.now() + self.config.recover_ns
        while True:
            left = await self.world.process.muster(self.paths.participants)
            if left is None:
                return True
            for process in left:
                self.world.process.kill(process)
            if self.world.now() >= deadline:
                return False
            await self.world.sleep_until(self.world.now() + self.config.detect_ns // 20)

    async def leave(self) -> None:
        """Leaves the cluster cleanly: `ended` resolves when it is over, cleanly or not."""
        if self._leaving:
            return
        self._leaving = True
        if await self.warden.end_all("this node leaves the cluster"):
            self.agreement.leave()
        else:
            self.end("this node ends without leaving the cluster: it counts as failed until it is fenced")

    async def close(self) -> None:
        """Ends everything of this life. Participants are killed, and gone when it returns unless that took longer than
        `recover`: the next life then waits for them, or joins as one that averts no fence."""
        if self._closing:
            return
        self._closing = True
        if hasattr(self, "warden"):
            await self.warden.end_all("corrald ends")
        if self._listener is not None:
            self._listener.close()
        if hasattr(self, "door"):
            self.door.close()
            self.agreement.stop()
            self._lift_driver.stop()
            await self.fencing.close()
            self.comm.close()

    def end(self, reason: str, *, again: bool = False, clean: bool = False) -> None:
        if not self.ended.done():
            self.chronicle.note("node", reason)
            self.ended.set_result(Ended(reason, again, clean))

    def _cannot_persist(self, error: OSError) -> None:
        self.end(f"the state of this node cannot be kept ({error}): it stops, and the others fence it")

    # -- the door asks

    def attached(self, member: MemberId | None, page_slot: int) -> Attached:
        entry = self.config.node(self.node)
        return Attached(
            me=member or self.me.corrald(),
            cluster=self.config.name,
            page=self.paths.page,
            page_slot=page_slot,
            lock_socket=self.paths.lock_socket,
            host=entry.host,
            detect_ns=self.config.detect_ns,
            recover_ns=self.config.recover_ns,
            cluster_uuid=_uuid_bytes(self.config.uuid),
        )

    def lease_until(self) -> Instant:
        return self.agreement.heartbeat.lease_until

    def fence(self, node: NodeId, reason: str) -> None:
        """Have a node fenced; a member is left out first. Raises ClusterError when that cannot or must not be."""
        view = self.view
        member = None if view is None else next((m for m in view.members if m.node == node), None)
        if member is not None and node != self.node and not self.agreement.membership.can_spare(member):
            raise ClusterError(f"without node {node} there is no quorum, and so nobody who may fence: add a node first")
        self.fencing.request(node, reason)

    # -- cman speaks

    def _told(self, event: object) -> None:
        if isinstance(event, LeaseExtended):
            self._page.publish(event.until, self.lift.state.round)
        elif isinstance(event, LeaseLapsed):
            self.lapses += 1
            self.chronicle.note("lease", "the lease has lapsed: services of this node are suspended")
        elif isinstance(event, Stop):
            self.active = False
            self._lift_driver.feed(Promised(event.id))
            self.fencing.stop()
        elif isinstance(event, Installed):
            self._installed(event)
        elif isinstance(event, Excluded):
            self.end(f"this node was left out of {event.view}: it starts again as a new incarnation", again=True)
        elif isinstance(event, Outdated):
            self.end(f"others know incarnation {event.known} of this node: it starts again above it", again=True)
        elif isinstance(event, Left):
            self._left(event)
        elif isinstance(event, CleanlyStopped):
            self.end("this node left the cluster", clean=True)

    def _installed(self, event: Installed) -> None:
        self.view = event.view
        self.active = False
        attachments: dict[NodeIncarnation, Attachment] = {}
        for member, data in event.attachments:
            try:
                attachments[member] = ATTACHMENT_CODEC.decode(data)
            except PeerError:
                self.chronicle.note("view", f"node {member.node} brought an attachment that cannot be read")
        self.chronicle.note("view", str(event.view))
        self._lift_driver.feed(
            LiftInstalled(
                event.view,
                attachments,
                event.accepted,
                first=event.active.epoch == 0,
                left=event.left,
                unclean=event.unclean,
            )
        )
        self.door.view_changed(ViewNow(event.view, False))

    def _left(self, event: Left) -> None:
        if not event.clean:
            self.end("this node left the cluster, but nobody could order it: it counts as failed until it is fenced")
            return
        wait = max(self.agreement.heartbeat.echoes_end(), self.world.now())
        self.world.call_at(wait, self.agreement.services_stopped)

    # -- the lift speaks

    def _lift_messages(self, peer: MemberId, _round_id: int, payloads: list[bytes]) -> None:
        for payload in payloads:
            try:
                message = CODEC.decode(payload)
            except PeerError:
                self.lift.dropped += 1
                continue
            self._lift_driver.feed(Received(peer, message))

    def _lifted(self, event: object) -> None:
        if isinstance(event, Stopped):
            self.agreement.attach(Attach(event.id, ATTACHMENT_CODEC.encode(event.attachment)))
        elif isinstance(event, StopAll):
            self.warden.stop_all()
        elif isinstance(event, StartFence):
            self.fencing.start(FenceStart(event.round, event.clean, event.startup, event.absent))
        elif isinstance(event, StartGroup):
            self._start_group(event)
        elif isinstance(event, FinishGroup):
            self.warden.finish_group(event)
            self.chronicle.note("round", f"{event.group} has recovered (round {event.round.id})")
        elif isinstance(event, ViewActive):
            self._view_active(event.view)
        elif isinstance(event, LeftGroup):
            self.warden.left(event)
        elif isinstance(event, Refused):
            self.warden.refused(event)
        elif isinstance(event, EvictLocal):
            self.warden.evict_local(event)

    def _start_group(self, event: StartGroup) -> None:
        failed = ", ".join(str(entry.member) for entry in event.round.failed)
        self.chronicle.note(
            "round", f"{event.group.name} recovers (round {event.round.id})" + (f" without {failed}" if failed else "")
        )
        self.warden.start_group(event)

    def _view_active(self, view: View) -> None:
        self.active = True
        self.chronicle.note("active", f"{view} is active")
        self.agreement.active(Active(view.id))
        self.door.view_changed(ViewNow(view, True))

    # -- fence speaks

    def _fence_done(self, round_id: int) -> None:
        """Every victim is dealt with; what is left is the lease guard of this node."""
        assert self.view is not None
        guard = self.agreement.heartbeat.guard_until(self.view.members)
        done = LocalDone(self.me.corrald(), FENCE_GROUP, round_id)
        if guard <= self.world.now():
            self._lift_driver.feed(done)
        else:
            self.world.call_at(guard, lambda: self._lift_driver.feed(done))

    def _cut_off(self, victim: NodeIncarnation, proven: bool) -> None:
        if proven:
            self.agreement.proved(victim)
        self._lift_driver.feed(Fenced(victim))

    def _expel(self, member: NodeIncarnation) -> None:
        self.agreement.expel(member)

    def _identities(self, victim: NodeIncarnation) -> list[ProcessId] | None:
        """None when nothing is known of it. Incarnation 0: everything known of lives of that node that are over."""
        if victim.incarnation:
            return self.lift.identities(victim) or None
        here = set(self.view.members) if self.view is not None else set()
        found = [
            process
            for identity in self.lift.state.identities
            if identity.node.node == victim.node and identity.node not in here
            for process in identity.processes
        ]
        return found or None

    # -- others

    def _rejected(self, event: Rejected) -> None:
        self.chronicle.note("comm", str(event))


def _uuid_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))


async def _read_lift(store: Store) -> LiftState:
    payloads = await store.read()
    if not payloads:
        return LiftState()
    state = STATE_CODEC.decode(payloads[-1])
    if len(payloads) > LIFT_COMPACT_AT:
        await store.replace(payloads[-1:])
    return state


__all__ = ["ConfigurationError", "Ended", "Node", "Paths"]
