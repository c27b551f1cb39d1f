"""What a round means for fencing: its victims, whose turn comes when, and how long a victim is left time to return."""

from typing import final

from corral.api.fence import ANY_INCARNATION, FenceConfig
from corral.base.ids import NodeId, NodeIncarnation
from corral.base.time import FOREVER, Nanoseconds, from_seconds
from corral.base.view import Round
from corral.fence.events import Start


def round_victims(event: Start, *, startup: bool) -> frozenset[NodeIncarnation]:
    """The failed; and when no active view was ever known, every configured node that is not a clean member: what it did
    before nobody here knows. `startup` False leaves the latter to the operator."""
    victims = {NodeIncarnation(entry.member.node, entry.member.incarnation) for entry in event.round.failed}
    if event.startup and startup:
        victims.update(NodeIncarnation(node, ANY_INCARNATION) for node in event.absent)
        for member in event.round.member_ids:
            # One that did not join clean may have left processes of an earlier life behind.
            if NodeIncarnation(member.node, member.incarnation) not in event.clean:
                victims.add(NodeIncarnation(member.node, ANY_INCARNATION))
    return frozenset(victims)


def turn_order(round: Round) -> tuple[NodeId, ...]:
    """fenced's master first: the lowest id common to the old and the new members; then the other old, then the new."""
    joined = {member.node for member in round.joined}
    nodes = [member.node for member in round.member_ids]
    return tuple(sorted(nodes, key=lambda node: (node in joined, node)))


@final
class Delays:
    __slots__ = ("_config", "_post_fail", "_post_join")

    def __init__(self, config: FenceConfig) -> None:
        self._config = config
        self._post_join = FOREVER if config.post_join_delay < 0 else from_seconds(config.post_join_delay)
        self._post_fail = from_seconds(config.post_fail_delay)

    def of(self, victim: NodeIncarnation, joining: bool) -> Nanoseconds:
        """`joining`: nodes are coming in, so this one may be about to."""
        fencing = self._config.nodes.get(victim.node)
        own = from_seconds(fencing.delay) if fencing is not None else 0
        if victim.incarnation == ANY_INCARNATION:
            return self._post_join + own
        if joining and self._post_join < FOREVER:  # -1 is about nodes never seen: a failed one is not waited for
            return max(self._post_join, self._post_fail) + own
        return self._post_fail + own
