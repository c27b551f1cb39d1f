"""Runs the fence engine of this node: its driver, its agents, and who is told what (DESIGN 5, fence)."""

from collections.abc import Callable
from typing import Any, Final, final

from corral.api.fence import (
    ANY_INCARNATION,
    POWERED,
    PROOF_NAMES,
    FenceConfig,
    FenceDeferred,
    FenceFailed,
    FenceStarted,
    FenceStatus,
    NodeFenced,
)
from corral.base.engine import Received
from corral.base.errors import ClusterError, PeerError
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.view import View
from corral.base.world import ProcessId, World
from corral.driver import Driver, each
from corral.fence.engine import FenceEngine
from corral.fence.events import (
    CancelAttempt,
    ExpelNode,
    FenceRequest,
    ManualAck,
    Refused,
    RoundDone,
    RunAttempt,
    Start,
    Stop,
)
from corral.fence.wire import CODEC
from corral.node.chronicle import Chronicle
from corral.providers.agents.service import FenceAgents
from corral.wire.frame import PORT_FENCE

Transmit = Callable[[MemberId, int, bytes], None]


@final
class Fencing:
    """`done(round_id)`: the fence part of this node's start is over. `cut_off(victim, proven)`: that incarnation is no
    danger any more; `proven` when nothing on that machine can act, so that its lease need not be waited for. KILLED is
    not enough: light clients outlive their node, and count on their locks as long as the lease runs.
    `fencing(nodes)`: on these an agent works, here or elsewhere; none may join meanwhile. `expel(member)`: leave that
    member out of the next view, so that it can be fenced."""

    def __init__(
        self,
        world: World,
        me: NodeIncarnation,
        config: FenceConfig,
        chronicle: Chronicle,
        *,
        transmit: Transmit,
        view: Callable[[], View | None],
        identities: Callable[[NodeIncarnation], list[ProcessId] | None],
        done: Callable[[int], None],
        cut_off: Callable[[NodeIncarnation, bool], None],
        fencing: Callable[[frozenset[NodeId]], None],
        expel: Callable[[NodeIncarnation], None],
        machine_id: str = "",
    ) -> None:
        self._world = world
        self._me = me
        self._chronicle = chronicle
        self._view = view
        self._done = done
        self._cut_off = cut_off
        self._fencing = fencing
        self._expel = expel
        self._worked_on: frozenset[NodeId] = frozenset()  # as last told
        self._last_refusal = ""
        self.engine: Final = FenceEngine(me.node, config)
        self.dropped = 0
        self._driver: Driver[Any] = Driver(
            world,
            self.engine,
            "fence",
            transmit=each(lambda peer, message: transmit(peer, PORT_FENCE, CODEC.encode(message))),
            emit=self._emitted,
        )
        self._config = config
        self._agents = FenceAgents(
            world, config, self._feed, identities=identities, machine_id=machine_id, wanted=self._is_wanted
        )

    def start(self, event: Start) -> None:
        self._feed(event)

    def stop(self) -> None:
        self._feed(Stop())

    def _feed(self, event: Any) -> None:
        self._driver.feed(event)
        self._tell_fencing()

    def _tell_fencing(self) -> None:
        worked_on = frozenset(node for node in self._config.nodes if self.engine.fencing(node))
        if worked_on != self._worked_on:
            self._worked_on = worked_on
            self._fencing(worked_on)

    async def close(self) -> None:
        self._driver.stop()
        await self._agents.close()

    def deliver(self, peer: MemberId, _round_id: int, payloads: list[bytes]) -> None:
        for payload in payloads:
            try:
                message = CODEC.decode(payload)
            except PeerError:
                self.dropped += 1
                continue
            self._feed(Received(peer, message))

    def status(self) -> FenceStatus:
        return self.engine.status(self._world.now())

    async def check(self) -> list[dict[str, Any]]:
        """Every way to fence every node, after asking the agents' programs for what they need. Raises ClusterError."""
        await self._agents.registry.check()
        return [
            {
                "node": node,
                "method": method.name,
                "action": method.action,
                "devices": [use.device for group in method.groups for use in group],
                "proof": PROOF_NAMES[self._config.proof_of(method)],
            }
            for node in sorted(self._config.nodes)
            for method in self._config.nodes[node].methods
        ]

    def acknowledge(self, node: NodeId, operator: str) -> None:
        """Raises ClusterError when nobody waits for that node to be fenced."""
        self._last_refusal = ""
        self._feed(ManualAck(NodeIncarnation(node, ANY_INCARNATION), operator, self._world.wall_seconds()))
        if self._last_refusal:
            raise ClusterError(self._last_refusal)

    def request(self, node: NodeId, reason: str) -> None:
        """Have a node fenced that is a member, or ends its delay. Raises ClusterError when that makes no sense."""
        self._last_refusal = ""
        self._feed(FenceRequest(NodeIncarnation(node, ANY_INCARNATION), reason))
        if self._last_refusal:
            raise ClusterError(self._last_refusal)

    def _is_wanted(self, victim: NodeIncarnation) -> bool:
        view = self._view()
        return view is None or victim not in view.members

    def _emitted(self, event: object) -> None:
        self._tell_fencing()
        if isinstance(event, RunAttempt | CancelAttempt):
            self._agents.handle(event)
        elif isinstance(event, RoundDone):
            self._done(event.round)
        elif isinstance(event, NodeFenced):
            self._chronicle.note("fence", str(event))
            self._cut_off(event.victim, event.proof == POWERED)
        elif isinstance(event, FenceStarted):
            self._chronicle.note("fence", f"fencing node {event.victim.node} by method {event.method}")
        elif isinstance(event, FenceFailed):
            self._chronicle.note(
                "fence", f"fencing node {event.victim.node} by {event.method} failed ({event.repeats}): {event.text}"
            )
        elif isinstance(event, FenceDeferred):
            self._chronicle.note("fence", f"fencing node {event.victim.node} is up to node {event.to}")
        elif isinstance(event, ExpelNode):
            self._chronicle.note("fence", f"node {event.member.node} is expelled to be fenced: {event.reason}")
            self._expel(event.member)
        elif isinstance(event, Refused):
            self._last_refusal = event.text
