"""One engine on a bench: rounds made by hand, what it emits sorted by kind."""

from typing import Any

from corral.api.fence import Device, FenceConfig, Method, NodeFencing
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.time import SECOND
from corral.base.view import Round, Slotted
from corral.fence.engine import FenceEngine
from corral.fence.events import AttemptDone, RunAttempt, Start


def corrald(node: NodeId, incarnation: int = 1) -> MemberId:
    return MemberId(node, incarnation, 0)


def life(node: NodeId, incarnation: int = 1) -> NodeIncarnation:
    return NodeIncarnation(node, incarnation)


def make_round(
    id: int,
    members: list[NodeIncarnation],
    failed: list[NodeIncarnation] = [],  # noqa: B006  never changed
    joined: list[NodeIncarnation] = [],  # noqa: B006
) -> Round:
    return Round(
        id,
        "fence",
        tuple(Slotted(member.corrald(), slot) for slot, member in enumerate(sorted(members))),
        tuple(Slotted(victim.corrald(), 0) for victim in sorted(failed)),
        tuple(member.corrald() for member in sorted(joined)),
        (),
    )


def two_methods(nodes: list[NodeId], **settings: Any) -> FenceConfig:
    """Every node: `power` by device pdu, then `storage` by device array."""
    return FenceConfig(
        devices=[
            Device("pdu", "fence_apc", timeout=10, limit=0),
            Device("array", "fence_scsi", proof="keyed", limit=0),
        ],
        nodes={node: NodeFencing([Method("power", ["pdu"]), Method("storage", ["array"])]) for node in nodes},
        **settings,
    )


class Bench:
    def __init__(self, me: NodeId, config: FenceConfig) -> None:
        self.engine = FenceEngine(me, config)
        self.now = 1000 * SECOND
        self.sent: list[tuple[NodeId, Any]] = []
        self.emitted: list[Any] = []
        self.lives: dict[NodeId, NodeIncarnation] = {}

    def step(self, event: Any) -> list[Any]:
        """What this step emitted."""
        self.engine.step(self.now, event)
        ready = self.engine.ready()
        assert not ready.persist
        assert not ready.then_send
        self.sent.extend((peer.node, message) for peer, message in ready.send)
        self.emitted.extend(ready.emit)
        return ready.emit

    def start(
        self,
        id: int,
        members: list[NodeIncarnation],
        failed: list[NodeIncarnation] = [],  # noqa: B006
        joined: list[NodeIncarnation] = [],  # noqa: B006
        *,
        clean: list[NodeIncarnation] | None = None,
        startup: bool = False,
        absent: tuple[NodeId, ...] = (),
    ) -> list[Any]:
        self.lives = {member.node: member for member in members}
        clean_set = frozenset(members if clean is None else clean)
        return self.step(Start(make_round(id, members, failed, joined), clean_set, startup, absent))

    def receive(self, node: NodeId, message: Any) -> list[Any]:
        return self.step(Received(self.lives[node].corrald(), message))

    def answer(self, ok: bool, text: str = "") -> list[Any]:
        """To the newest attempt."""
        attempt = [event for event in self.emitted if isinstance(event, RunAttempt)][-1]
        return self.step(AttemptDone(attempt.attempt, ok, text))

    def sleep(self, seconds: float) -> list[Any]:
        """Time passes; ticks come at the deadlines. Everything emitted meanwhile."""
        end = self.now + round(seconds * SECOND)
        emitted: list[Any] = []
        for _ in range(10_000):
            if self.engine.deadline > end:
                self.now = end
                return emitted
            self.now = max(self.now, self.engine.deadline)
            emitted.extend(self.step(TICK))
        raise AssertionError("the engine's deadline stands still")

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(event, kind) for event in self.emitted)

    def take(self, kind: type[Any]) -> list[Any]:
        """Messages of that kind sent since the last take, with their receivers."""
        taken = [(node, message) for node, message in self.sent if isinstance(message, kind)]
        self.sent = [pair for pair in self.sent if not isinstance(pair[1], kind)]
        return taken


def only(events: list[Any], kind: type[Any]) -> Any:
    found = [event for event in events if isinstance(event, kind)]
    assert len(found) == 1, events
    return found[0]
