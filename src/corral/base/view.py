"""Views and rounds: what cman tells everybody above it."""

import msgspec

from corral.base.ids import Incarnation, MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.time import Nanoseconds


class View(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An agreed set of nodes.

    `members` is sorted by node. `quorate` is by votes over the quorum record in force; whether the view is *active*
    (its round has passed FENCE) is a later fact and not part of it.
    """

    id: ViewId
    members: tuple[NodeIncarnation, ...]
    quorate: bool

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(member.node for member in self.members)

    def incarnation_of(self, node: NodeId) -> Incarnation | None:
        for member in self.members:
            if member.node == node:
                return member.incarnation
        return None

    def __str__(self) -> str:
        nodes = ",".join(str(node) for node in self.nodes)
        return f"view {self.id} {{{nodes}}} {'quorate' if self.quorate else 'inquorate'}"


class QuorumRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What quorum is counted over. Persisted on every member, changed only by a quorum of the previous record.

    `version` is the id of the view that installed it; the newest that any member present holds decides.
    `voters` maps node to votes as sorted pairs. A set of nodes is quorate iff its votes are >= expected // 2 + 1.
    """

    version: ViewId
    voters: tuple[tuple[NodeId, int], ...]
    expected: int
    lease_ns: Nanoseconds
    tie_breaker: tuple[NodeId, ...] = ()

    def votes_of(self, nodes: "set[NodeId] | frozenset[NodeId]") -> int:
        return sum(votes for node, votes in self.voters if node in nodes)

    @property
    def quorum(self) -> int:
        return self.expected // 2 + 1

    def quorate(self, nodes: "set[NodeId] | frozenset[NodeId]") -> bool:
        return self.votes_of(nodes) >= self.quorum


class Slotted(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A member of a service group with its small stable number (gfs: the journal id)."""

    member: MemberId
    slot: int


class Round(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One run of recovery of one service group (DESIGN 5, recovery control).

    `id` is persisted by every member before it starts; it only rises over the life of the cluster.
    `failed` = every member since this group's last *finished* round that is not here in the same incarnation and did
    not leave cleanly. `joined` and `left` are counted from the same round. All three are sorted.
    For the global group FENCE members are corralds (serial 0), `failed` its victims' corralds.
    """

    id: int
    group: str
    members: tuple[Slotted, ...]
    failed: tuple[Slotted, ...]
    joined: tuple[MemberId, ...]
    left: tuple[MemberId, ...]

    @property
    def member_ids(self) -> tuple[MemberId, ...]:
        return tuple(entry.member for entry in self.members)

    def slot_of(self, member: MemberId) -> int:
        for entry in self.members:
            if entry.member == member:
                return entry.slot
        raise KeyError(member)
