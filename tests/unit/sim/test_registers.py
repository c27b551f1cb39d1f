"""The register checker against a search through every order, and what it says of stories told by hand."""

from itertools import permutations
from random import Random

from corral.base.time import FOREVER
from tests.sim.registers import INITIAL, Operation, complaint


def write(began: int, ended: int, value: int) -> Operation:
    return Operation(began, ended, value, True, "w")


def read(began: int, ended: int, value: int) -> Operation:
    return Operation(began, ended, value, False, "r")


def by_search(history: list[Operation]) -> bool:
    """Is there an order that respects time and in which every read returns the newest write?"""
    optional = [op for op in history if op.ended == FOREVER]
    for absent in range(1 << len(optional)):
        gone = [op for bit, op in enumerate(optional) if absent >> bit & 1]
        for order in permutations([op for op in history if op not in gone]):
            held = INITIAL
            for at, operation in enumerate(order):
                if any(later.ended < operation.began for later in order[at + 1 :]):
                    break
                if operation.write:
                    held = operation.value
                elif operation.value != held:
                    break
            else:
                return True
    return False


def test_it_agrees_with_a_search_through_every_order() -> None:
    rng = Random(7)
    verdicts = {True: 0, False: 0}
    for _ in range(1500):
        times = list(range(1, 13))
        rng.shuffle(times)
        history = []
        written = [INITIAL]
        for number in range(5):
            began, ended = sorted((times.pop(), times.pop()))
            if rng.random() < 0.5:
                written.append(number + 1)
                history.append(write(began, FOREVER if rng.random() < 0.2 else ended, number + 1))
            else:
                history.append(read(began, ended, -1))
        history = [op._replace(value=rng.choice(written)) if not op.write else op for op in history]
        verdict = by_search(history)
        verdicts[verdict] += 1
        assert (complaint(history) == "") == verdict, history
    assert min(verdicts.values()) > 200


def test_what_it_says() -> None:
    assert complaint([write(1, 2, 5), read(3, 4, INITIAL)]).startswith("0 and 5") or complaint(
        [write(1, 2, 5), read(3, 4, INITIAL)]
    ).startswith("5 came and went")
    assert complaint([read(1, 2, 5), write(3, 4, 5)]) == "r read 5 before w began to write it"
    assert complaint([write(1, FOREVER, 5), read(2, 3, 5), read(4, 5, 5)]) == ""
