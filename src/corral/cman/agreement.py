"""The pure leaves of the two-phase agreement: one attempt of a coordinator, and what its promises add up to.

    coordinator                         members
    Prepare(epoch, members)        ->   promise: stop everything, persist, then
                                   <-   Promise(what I accepted, what is active, my record, flags, attachment)
    Propose(view, record, ...)     ->   accept only if this is exactly what I promised: persist, then
                                   <-   Accept
    Install                        ->   installed

A view is installed when every member has accepted. A coordinator that collects a quorate view somebody accepted counts
it as possibly installed: it proposes above it, and who is not in it does not come back in the same incarnation.

Source: Lamport's synod (promise, accept) with the whole view as acceptors, and the quorum record as the guard that two
quorate views share a member.
"""

from collections.abc import Iterable
from typing import Final, final

from corral.base.ids import NO_VIEW, NodeId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, Instant
from corral.base.view import QuorumRecord, View
from corral.cman.quorum import NODES_MAX
from corral.cman.state import ACCEPTED_MAX
from corral.cman.wire import (
    ATTACHMENT_MAX,
    EPOCH_MAX,
    FORGOTTEN,
    QUIET,
    STATEFUL,
    Carried,
    Promise,
    Propose,
)

MEMBERS_MAX: Final = 64 * NODES_MAX  # of a united view
LEFT_MAX: Final = 256  # clean leavers remembered since the newest active view


@final
class Attempt:
    """One proposal of this node as coordinator."""

    __slots__ = ("accepts", "due", "id", "members", "promises", "proposal")

    def __init__(self, view_id: ViewId, members: tuple[NodeIncarnation, ...]) -> None:
        self.id: Final = view_id
        self.members: Final = members
        self.promises: dict[NodeId, Promise] = {}
        self.proposal: Propose | None = None  # set: the second phase runs
        self.accepts: set[NodeId] = set()
        self.due: Instant = FOREVER

    def missing(self) -> list[NodeId]:
        """Members whose answer in this phase has not come."""
        answered = self.promises.keys() if self.proposal is None else self.accepts
        return [member.node for member in self.members if member.node not in answered]


def valid_members(members: tuple[NodeIncarnation, ...]) -> bool:
    nodes = [member.node for member in members]
    return 0 < len(nodes) <= NODES_MAX and nodes == sorted(set(nodes)) and nodes[0] > 0


def valid_id(view_id: ViewId) -> bool:
    return 0 <= view_id.epoch < EPOCH_MAX and view_id.coordinator >= 0


def valid_views(views: tuple[View, ...]) -> bool:
    """Quorate views as a promise tells of them; united ones (state.py) have two lives of a node as members."""
    return all(view.quorate and valid_id(view.id) and 0 < len(view.members) <= MEMBERS_MAX for view in views)


def valid_record(record: QuorumRecord | None) -> bool:
    return record is None or (
        0 < len(record.voters) <= NODES_MAX
        and all(votes >= 0 for _, votes in record.voters)
        and record.expected > 0
        and record.lease_ns > 0
        and valid_id(record.version)
    )


def valid_promise(promise: Promise) -> bool:
    return (
        len(promise.attachment) <= ATTACHMENT_MAX
        and len(promise.accepted) <= ACCEPTED_MAX
        and len(promise.left) <= LEFT_MAX
        and valid_views(promise.accepted)
        and valid_id(promise.active)
        and valid_record(promise.record)
    )


def valid_proposal(proposal: Propose) -> bool:
    view = proposal.view
    return (
        valid_members(view.members)
        and view.incarnation_of(view.id.coordinator) is not None
        and tuple(entry.member for entry in proposal.carried) == view.members
        and all(len(entry.attachment) <= ATTACHMENT_MAX for entry in proposal.carried)
        and len(proposal.accepted) <= ACCEPTED_MAX * NODES_MAX
        and len(proposal.left) <= LEFT_MAX
        and valid_views(proposal.accepted)
        and valid_id(proposal.active)
        and valid_record(proposal.record)
    )


def newest_quorate(views: Iterable[View]) -> View | None:
    return max(views, key=lambda view: view.id, default=None)


def entered(promise: Promise, member: NodeIncarnation) -> bool:
    """Has this incarnation ever accepted a quorate view? Until then it has nothing to lose."""
    return any(view.incarnation_of(member.node) == member.incarnation for view in promise.accepted)


def outsiders(attempt: Attempt, newest: View | None) -> list[NodeIncarnation]:
    """Members of this attempt that a quorate view went on without: they must start again first."""
    if newest is None:
        return []
    return [
        member
        for member in attempt.members
        if member not in newest.members and entered(attempt.promises[member.node], member)
    ]


def newest_record(attempt: Attempt) -> QuorumRecord | None:
    """The newest record any member present holds decides."""
    records = [promise.record for promise in attempt.promises.values() if promise.record is not None]
    return max(records, key=lambda record: record.version, default=None)


def voters(flags: dict[NodeId, int]) -> frozenset[NodeId]:
    """Those of the nodes that may vote: not quiet, and with a memory."""
    return frozenset(node for node in flags if not flags[node] & (QUIET | FORGOTTEN))


def proposal_of(attempt: Attempt, record: QuorumRecord, leaving: frozenset[NodeIncarnation]) -> Propose:
    """The view that these promises add up to."""
    promises = attempt.promises
    active = max((promise.active for promise in promises.values()), default=NO_VIEW)
    accepted = {view.id: view for node in sorted(promises) for view in promises[node].accepted if view.id >= active}
    left = set(leaving)
    for promise in promises.values():
        left.update(promise.left)
    left.difference_update(attempt.members)
    quorate = record.quorate(voters({node: promise.flags for node, promise in promises.items()}))
    return Propose(
        View(attempt.id, attempt.members, quorate),
        record,
        tuple(
            Carried(member, promises[member.node].flags, promises[member.node].attachment) for member in attempt.members
        ),
        tuple(accepted[view_id] for view_id in sorted(accepted)),
        tuple(sorted(left, key=lambda member: (member.incarnation, member.node))[-LEFT_MAX:]),
        active,
    )


def unclean(proposal: Propose) -> tuple[NodeIncarnation, ...]:
    return tuple(entry.member for entry in proposal.carried if entry.flags & (STATEFUL | FORGOTTEN))
