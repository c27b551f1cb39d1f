"""Vote arithmetic against a dumb count of what could go wrong."""

from itertools import chain, combinations

import pytest

from corral.base.errors import ConfigurationError
from corral.base.ids import NO_VIEW
from corral.base.view import QuorumRecord
from corral.cman.quorum import check_record, first_record, last_man_standing, quorum, tie_broken

LEASE = 400


def subsets(nodes: list[int]) -> list[frozenset[int]]:
    return [frozenset(c) for c in chain.from_iterable(combinations(nodes, k) for k in range(len(nodes) + 1))]


@pytest.mark.parametrize(
    "votes",
    [{1: 1}, {1: 1, 2: 1}, {1: 1, 2: 1, 3: 1}, {1: 2, 2: 1}, {1: 3, 2: 1, 3: 1, 4: 0}, dict.fromkeys(range(1, 7), 1)],
)
def test_two_quorate_sets_always_share_a_node(votes: dict[int, int]) -> None:
    record = first_record(votes, LEASE)
    quorate = [nodes for nodes in subsets(sorted(votes)) if record.quorate(nodes)]
    assert frozenset(votes) in quorate
    assert all(a & b for a in quorate for b in quorate)


def test_record_and_formula_agree() -> None:
    for expected in range(1, 60):
        assert QuorumRecord(NO_VIEW, ((1, expected),), expected, LEASE).quorum == quorum(expected, 0)


def test_quorum_never_falls_by_itself() -> None:
    assert quorum(5, 5) == 3
    assert quorum(3, 2, current=3) == 3
    assert quorum(3, 2, current=3, decrease_allowed=True) == 2


def test_more_votes_than_expected_raise_the_quorum() -> None:
    assert quorum(3, 6) == 4


@pytest.mark.parametrize(
    ("present", "previous", "broken"),
    [
        ({1, 2}, 4, True),
        ({3, 4}, 4, False),  # the tie-breaker is on the other side
        ({1, 2, 3}, 4, False),  # no tie
        ({1, 2}, 5, False),  # the others had 3 votes: they may be quorate by themselves
    ],
)
def test_auto_tie_breaker(present: set[int], previous: int, broken: bool) -> None:
    record = QuorumRecord(NO_VIEW, tuple((n, 1) for n in range(1, 5)), 4, LEASE, tie_breaker=(1,))
    assert tie_broken(record, previous, frozenset(present)) is broken


def test_last_man_standing_stops_at_two_without_a_tie_breaker() -> None:
    record = first_record(dict.fromkeys(range(1, 9), 1), LEASE)
    assert last_man_standing(record, frozenset({1, 2, 3, 4, 5})) == 5
    five = QuorumRecord(NO_VIEW, record.voters, 5, LEASE)
    assert last_man_standing(five, frozenset({1, 2, 3})) == 3
    two = QuorumRecord(NO_VIEW, record.voters, 2, LEASE)
    assert last_man_standing(two, frozenset({1})) == 2
    assert last_man_standing(five, frozenset({1, 2})) == 5, "a minority decides nothing"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (QuorumRecord(NO_VIEW, (), 1, LEASE), "1 to 32 nodes"),
        (QuorumRecord(NO_VIEW, tuple((n, 1) for n in range(1, 40)), 39, LEASE), "1 to 32 nodes"),
        (QuorumRecord(NO_VIEW, ((2, 1), (1, 1)), 2, LEASE), "different numbers"),
        (QuorumRecord(NO_VIEW, ((0, 1),), 1, LEASE), "from 1 to"),
        (QuorumRecord(NO_VIEW, ((1, -1),), 1, LEASE), "votes"),
        (QuorumRecord(NO_VIEW, ((1, 0),), 0, LEASE), "no node has a vote"),
        (QuorumRecord(NO_VIEW, ((1, 1), (2, 1), (3, 1)), 1, LEASE), "two halves"),
        (QuorumRecord(NO_VIEW, ((1, 1),), 1, 2 * LEASE), "set `detect` back"),
    ],
)
def test_wrong_records_are_refused_with_a_sentence(record: QuorumRecord, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_record(record, LEASE)


def test_two_node_is_refused_for_now() -> None:
    with pytest.raises(ConfigurationError, match="two_node is not supported yet"):
        check_record(first_record({1: 1, 2: 1}, LEASE), LEASE, two_node=True)
