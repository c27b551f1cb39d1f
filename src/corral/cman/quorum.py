"""Vote arithmetic: the formulas of OpenVMS as cman and votequorum keep them, as pure functions over a QuorumRecord.

Quorum is counted over the persisted record, never over who happens to be there (DESIGN 5, cman). What this milestone
uses is `check_record`, `first_record` and `votes`; tie-breaking and shrinking are record *changes*, decided here and
made by a view.
"""

from collections.abc import Mapping
from typing import Final

from corral.base.errors import ConfigurationError
from corral.base.ids import NO_VIEW, NODE_MAX, NodeId, ViewId
from corral.base.time import Nanoseconds
from corral.base.view import QuorumRecord

NODES_MAX: Final = 32  # nodes of one cluster; the choice of a view is bounded by it
VOTES_MAX: Final = 1_000


def quorum(highest_expected: int, total_votes: int, current: int = 0, *, decrease_allowed: bool = False) -> int:
    """q1 = (highest_expected + 2) / 2, q2 = (total_votes + 2) / 2, the larger; never below `current` by itself."""
    needed = max((highest_expected + 2) // 2, (total_votes + 2) // 2)
    return needed if decrease_allowed else max(needed, current)


def tie_broken(record: QuorumRecord, previous_votes: int, present: frozenset[NodeId]) -> bool:
    """auto_tie_breaker: exactly half of the expected votes are here, the others could not be quorate by themselves, and
    the first node of the tie-breaker list is here (`previous_votes` = votes of the view before)."""
    votes = record.votes_of(present)
    if not record.tie_breaker or votes * 2 != record.expected:
        return False
    if previous_votes - votes >= record.quorum:
        return False  # the lost part may be quorate: breaking the tie here would make two
    return record.tie_breaker[0] in present


def last_man_standing(record: QuorumRecord, present: frozenset[NodeId]) -> int:
    """The expected votes after a stable quorate view of `present`: its votes, but 2 -> 1 only with a tie-breaker."""
    votes = record.votes_of(present)
    if not record.quorate(present):
        return record.expected
    if votes == 1 and not record.tie_breaker:
        return record.expected
    return min(votes, record.expected)


def first_record(votes: Mapping[NodeId, int], lease_ns: Nanoseconds, version: ViewId = NO_VIEW) -> QuorumRecord:
    """The record `corral init` and `corral up` write: every configured node with its votes, a majority decides."""
    record = QuorumRecord(version, tuple(sorted(votes.items())), sum(votes.values()), lease_ns)
    check_record(record, lease_ns)
    return record


def check_record(record: QuorumRecord, lease_ns: Nanoseconds, *, two_node: bool = False) -> None:
    """The operator's mistakes, as sentences."""
    if two_node:
        raise ConfigurationError(
            "quorum.two_node is not supported yet: two nodes that are both quorate need fencing with proof before "
            "either is active; use three nodes, or give one of the two a second vote"
        )
    nodes = [node for node, _ in record.voters]
    if not nodes or len(nodes) > NODES_MAX:
        raise ConfigurationError(f"a cluster has 1 to {NODES_MAX} nodes; {len(nodes)} are configured")
    if nodes != sorted(set(nodes)) or nodes[0] < 1 or nodes[-1] > NODE_MAX:
        raise ConfigurationError(f"node ids must be different numbers from 1 to {NODE_MAX}; configured are {nodes}")
    for node, votes in record.voters:
        if not 0 <= votes <= VOTES_MAX:
            raise ConfigurationError(f"node {node} has {votes} votes; 0 to {VOTES_MAX} are possible")
    total = sum(votes for _, votes in record.voters)
    if total < 1:
        raise ConfigurationError("no node has a vote; give at least one node `votes = 1`")
    if record.quorum * 2 <= total:
        raise ConfigurationError(
            f"expected votes {record.expected} would let two halves of {total} votes be quorate at once; "
            f"expect at least {total}"
        )
    if record.lease_ns != lease_ns:
        raise ConfigurationError(
            f"this cluster was made with a lease of {record.lease_ns / 1e9:g} s, on which its members rely, and the "
            f"configured `detect` gives {lease_ns / 1e9:g} s; set `detect` back to the value it was made with"
        )
