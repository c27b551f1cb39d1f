"""The view that a node would have now: the best set among those it hears, and who would coordinate it."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from corral.base.ids import NodeId, NodeIncarnation
from corral.base.view import QuorumRecord
from corral.cman.agreement import voters
from corral.cman.choice import best_set
from corral.cman.events import Row
from corral.cman.wire import FORGOTTEN

NO_QUORUM: Final = 1 << 30  # a quorum nobody reaches: without a record there is none


class Target(NamedTuple):
    """`coordinator`: the lowest id with a memory."""

    members: tuple[NodeIncarnation, ...]
    coordinator: NodeId
    quorate: bool


def target_of(rows: Mapping[NodeId, Row], record: QuorumRecord | None, kept: frozenset[NodeId]) -> Target | None:
    """`rows`: the candidates, with whom each hears; `kept`: members of the newest quorate view that are linked. None
    when nobody there remembers the cluster."""
    can_vote = voters({node: row.flags for node, row in rows.items()})
    votes = {} if record is None else {node: count for node, count in record.voters if node in can_vote}
    quorum = NO_QUORUM if record is None else record.quorum
    nodes = best_set({node: row.up for node, row in rows.items()}, votes, quorum, kept)
    remembering = [node for node in nodes if not rows[node].flags & FORGOTTEN]
    if not remembering:
        return None
    members = tuple(NodeIncarnation(node, rows[node].incarnation) for node in nodes)
    return Target(members, remembering[0], sum(votes.get(node, 0) for node in nodes) >= quorum)
