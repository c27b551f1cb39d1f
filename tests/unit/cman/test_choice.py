"""The choice of a view against trying every set."""

from itertools import chain, combinations
from random import Random

import pytest

from corral.cman.choice import best_set

Links = dict[int, frozenset[int]]


def dumb_best(links: Links, votes: dict[int, int], quorum: int, kept: frozenset[int]) -> tuple[int, ...]:
    nodes = sorted(links)
    best: tuple[tuple[bool, int, int], tuple[int, ...]] | None = None
    for chosen in chain.from_iterable(combinations(nodes, k) for k in range(len(nodes) + 1)):
        if all(b in links[a] and a in links[b] for a, b in combinations(chosen, 2)):
            score = (sum(votes.get(n, 0) for n in chosen) >= quorum, len(kept & set(chosen)), len(chosen))
            if best is None or score > best[0] or (score == best[0] and chosen < best[1]):
                best = score, chosen
    assert best is not None
    return best[1]


def test_agrees_with_trying_every_set() -> None:
    rng = Random(7)
    for _ in range(400):
        nodes = rng.sample(range(1, 20), rng.randint(1, 7))
        density = rng.choice((0.5, 0.8, 0.95))
        links = {n: frozenset(m for m in nodes if m != n and rng.random() < density) for n in nodes}
        votes = {n: rng.choice((0, 1, 1, 2)) for n in nodes}
        kept = frozenset(n for n in nodes if rng.random() < 0.5)
        quorum = rng.randint(1, len(nodes) + 1)
        assert best_set(links, votes, quorum, kept) == dumb_best(links, votes, quorum, kept)


def whole(*nodes: int) -> Links:
    return {n: frozenset(nodes) - {n} for n in nodes}


def ones(links: Links) -> dict[int, int]:
    return dict.fromkeys(links, 1)


def test_all_who_hear_each_other() -> None:
    links = whole(1, 2, 3)
    assert best_set(links, ones(links), 2, frozenset()) == (1, 2, 3)


def test_one_deaf_ear_splits_and_the_lowest_id_wins_the_tie() -> None:
    links = whole(1, 2, 3)
    links[3] = frozenset({2})  # 3 does not hear 1
    assert best_set(links, ones(links), 2, frozenset()) == (1, 2)


def test_quorate_goes_before_large() -> None:
    links = {**whole(1, 2, 3), **whole(4, 5)}
    votes = {1: 1, 2: 1, 3: 1, 4: 3, 5: 3}
    assert best_set(links, votes, 5, frozenset()) == (4, 5)


def test_a_newcomer_with_a_bad_link_does_not_displace_a_member() -> None:
    links = {1: frozenset({2}), 2: frozenset({1, 3}), 3: frozenset({2})}
    assert best_set(links, ones(links), 2, frozenset({2, 3})) == (2, 3)


def test_nobody() -> None:
    assert best_set({}, {}, 1, frozenset()) == ()


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_matrix_is_bounded(seed: int) -> None:
    """3^(32/3) maximal cliques (Moon and Moser): the budget ends it, the answer is a clique, and the same each time."""
    nodes = list(range(1, 33))
    Random(seed).shuffle(nodes)
    links = {n: frozenset(m for m in nodes if n // 3 != m // 3) for n in nodes}
    first = best_set(links, {}, 1, frozenset())
    assert first == best_set(links, {}, 1, frozenset())
    assert all(b in links[a] for a, b in combinations(first, 2))
    assert len(first) == 11
