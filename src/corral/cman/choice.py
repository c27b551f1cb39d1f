"""Which nodes the next view should have: the best set of nodes that all hear each other (DESIGN 5, Who is in).

Best is, in this order: quorate before inquorate; as many members of the newest quorate view as possible, so that a
newcomer with bad links never displaces a member (such a newcomer's links are not whole yet); the largest; the one with
the lowest id. That is a maximum clique of at most 32 nodes, searched by Bron and Kerbosch's algorithm with pivot
(CACM 1973) on bit masks, pruned by the best set so far. A step budget bounds the worst matrices to a few milliseconds;
when it is used up the best set found by then is taken, the same on every run.
"""

from collections.abc import Mapping
from typing import Final, final

from corral.base.ids import NodeId

BUDGET: Final = 3_000  # expansions; matrices of real faults need fewer than a hundred


@final
class Search:
    """One run over one matrix; node number i of the sorted list is bit i."""

    __slots__ = ("_adjacent", "_best", "_best_score", "_budget", "_kept", "_quorum", "_votes")

    def __init__(self, adjacent: list[int], votes: list[int], quorum: int, kept: int) -> None:
        self._adjacent: Final = adjacent
        self._votes: Final = votes
        self._quorum: Final = quorum
        self._kept: Final = kept
        self._best = 0
        self._best_score = (False, -1, -1)
        self._budget = BUDGET

    def run(self, candidates: int) -> int:
        self._expand(0, candidates, 0)
        return self._best

    def _score(self, nodes: int) -> tuple[bool, int, int]:
        votes = 0
        rest = nodes
        while rest:
            low = rest & -rest
            votes += self._votes[low.bit_length() - 1]
            rest ^= low
        return votes >= self._quorum, (nodes & self._kept).bit_count(), nodes.bit_count()

    def _expand(self, chosen: int, open_: int, closed: int) -> None:
        if not open_ and not closed:
            self._offer(chosen)
            return
        self._budget -= 1
        if self._budget < 0:
            self._offer(chosen)
            return
        if self._score(chosen | open_) < self._best_score:
            return
        branches = open_ & ~self._adjacent[self._pivot(open_, closed)]
        while branches:
            low = branches & -branches
            branches ^= low
            near = self._adjacent[low.bit_length() - 1]
            self._expand(chosen | low, open_ & near, closed & near)
            open_ ^= low
            closed |= low

    def _pivot(self, open_: int, closed: int) -> int:
        """The node that leaves the fewest branches; ties to the lowest."""
        best, most = 0, -1
        rest = open_ | closed
        while rest:
            low = rest & -rest
            rest ^= low
            node = low.bit_length() - 1
            covered = (open_ & self._adjacent[node]).bit_count()
            if covered > most:
                best, most = node, covered
        return best

    def _offer(self, nodes: int) -> None:
        score = self._score(nodes)
        differ = nodes ^ self._best
        if score > self._best_score or (score == self._best_score and differ & -differ & nodes):
            self._best, self._best_score = nodes, score


def best_set(
    links: Mapping[NodeId, frozenset[NodeId]],
    votes: Mapping[NodeId, int],
    quorum: int,
    kept: frozenset[NodeId],
) -> tuple[NodeId, ...]:
    """`links`: who each candidate hears; two nodes are connected when each hears the other. `votes`: of those that may
    vote. Sorted; empty without candidates."""
    nodes = sorted(links)
    index = {node: i for i, node in enumerate(nodes)}
    adjacent = []
    for node in nodes:
        mask = 0
        for other in links[node]:
            if other != node and other in index and node in links[other]:
                mask |= 1 << index[other]
        adjacent.append(mask)
    kept_mask = sum(1 << index[node] for node in nodes if node in kept)
    search = Search(adjacent, [votes.get(node, 0) for node in nodes], quorum, kept_mask)
    best = search.run((1 << len(nodes)) - 1) if nodes else 0
    return tuple(node for i, node in enumerate(nodes) if best >> i & 1)
