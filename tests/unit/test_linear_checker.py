"""The checker of histories, tried on histories whose answer is known: every planted wrong one is found, no right one.

Random right histories are made by running the model itself and drawing each operation's call and return around its
moment; a dumb second checker that tries all orders decides small random ones, right or wrong.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.linear import models
from tests.linear.checker import Model, NotLinearizable, Operation, Undecided, check


def op(client: str, kind: str, argument: Any, called: int, returned: int | None, result: Any = None) -> Operation:
    return Operation(client, "k", kind, argument, called, returned, result)


GOOD: dict[str, tuple[Model, list[Operation]]] = {
    "locks one after the other": (
        models.Lock(),
        [
            op("a", "acquire", "a1", 0, 10, 5),
            op("b", "acquire", "b1", 1, 30, 6),
            op("a", "release", "a1", 20, 25),
            op("b", "release", "b1", 31, 32),
        ],
    ),
    "a lock of the dead passes on": (
        models.Lock(),
        [op("a", "acquire", "a1", 0, 10, 5), op("a", "release", "a1", 12, None), op("b", "acquire", "b1", 20, 30, 9)],
    ),
    "an acquisition nobody heard of": (
        models.Lock(),
        [
            op("a", "acquire", "a1", 0, None),
            op("a", "release", "a1", 0, None),
            op("b", "acquire", "b1", 20, 30, 9),
        ],
    ),
    "concurrent increments in either order": (
        models.Counter(),
        [op("a", "add", 1, 0, 10, 2), op("b", "add", 1, 0, 10, 1), op("c", "read", None, 5, 6, 1)],
    ),
    "an increment without an answer happened late": (
        models.Counter(),
        [
            op("a", "add", 1, 0, None),
            op("b", "read", None, 10, 11, 0),
            op("b", "read", None, 20, 21, 1),
            op("b", "add", 1, 30, 31, 2),
        ],
    ),
    "two permits": (
        models.Semaphore(2),
        [
            op("a", "acquire", "a1", 0, 1),
            op("b", "acquire", "b1", 2, 3),
            op("a", "release", "a1", 5, 9),
            op("c", "acquire", "c1", 4, 8),
        ],
    ),
    "first in, first out, and back from the dead": (
        models.Queue(),
        [
            op("a", "put", "x", 0, 1),
            op("a", "put", "y", 2, 3),
            op("b", "take", "b1", 4, 5, "x"),
            op("b", "give_back", "b1", 6, None),
            op("c", "take", "c1", 7, 8, "x"),
            op("c", "done", "c1", 9, 10),
            op("c", "take", "c2", 11, 12, "y"),
        ],
    ),
    "a removal without an answer": (
        models.Queue(),
        [
            op("a", "put", "x", 0, 1),
            op("a", "put", "y", 2, 3),
            op("b", "take", "b1", 4, 5, "x"),
            op("b", "done", "b1", 6, None),
            op("b", "give_back", "b1", 6, None),
            op("c", "take", "c1", 7, 8, "y"),
        ],
    ),
}

BAD: dict[str, tuple[Model, list[Operation]]] = {
    "a double grant": (
        models.Lock(),
        [
            op("a", "acquire", "a1", 0, 10, 5),
            op("b", "acquire", "b1", 1, 11, 6),
            op("a", "release", "a1", 20, 25),
            op("b", "release", "b1", 21, 26),
        ],
    ),
    "a grant before the dead had given up": (
        models.Lock(),
        [op("a", "acquire", "a1", 0, 10, 5), op("a", "release", "a1", 40, None), op("b", "acquire", "b1", 20, 30, 9)],
    ),
    "tokens that fall": (
        models.Lock(),
        [
            op("a", "acquire", "a1", 0, 10, 7),
            op("a", "release", "a1", 12, 13),
            op("b", "acquire", "b1", 20, 30, 6),
        ],
    ),
    "a token that comes twice": (
        models.Lock(),
        [
            op("a", "acquire", "a1", 0, 10, 7),
            op("a", "release", "a1", 12, 13),
            op("b", "acquire", "b1", 20, 30, 7),
        ],
    ),
    "a lost increment": (
        models.Counter(),
        [op("a", "add", 1, 0, 10, 1), op("b", "add", 1, 11, 12, 1)],
    ),
    "an increment that was acknowledged and is gone": (
        models.Counter(),
        [op("a", "add", 1, 0, 10, 1), op("b", "read", None, 20, 21, 0)],
    ),
    "an increment without an answer that happened twice": (
        models.Counter(),
        [op("a", "add", 1, 0, None), op("b", "read", None, 20, 21, 2)],
    ),
    "an increment before it was asked for": (
        models.Counter(),
        [op("b", "read", None, 20, 21, 1), op("a", "add", 1, 30, None)],
    ),
    "a stale read": (
        models.Counter(),
        [op("a", "add", 1, 0, 10, 1), op("b", "read", None, 11, 12, 1), op("c", "read", None, 13, 14, 0)],
    ),
    "a read that goes back, the increment without an answer": (
        models.Counter(),
        [op("a", "add", 1, 0, None), op("b", "read", None, 11, 12, 1), op("c", "read", None, 13, 14, 0)],
    ),
    "one permit too many": (
        models.Semaphore(2),
        [
            op("a", "acquire", "a1", 0, 1),
            op("b", "acquire", "b1", 2, 3),
            op("c", "acquire", "c1", 4, 8),
            op("a", "release", "a1", 9, 10),
        ],
    ),
    "an element taken twice": (
        models.Queue(),
        [
            op("a", "put", "x", 0, 1),
            op("b", "take", "b1", 4, 9, "x"),
            op("c", "take", "c1", 5, 8, "x"),
            op("b", "done", "b1", 10, 11),
        ],
    ),
    "an element taken again after it was done": (
        models.Queue(),
        [
            op("a", "put", "x", 0, 1),
            op("b", "take", "b1", 4, 5, "x"),
            op("b", "done", "b1", 6, 7),
            op("c", "take", "c1", 8, 9, "x"),
        ],
    ),
    "the second before the first": (
        models.Queue(),
        [op("a", "put", "x", 0, 1), op("a", "put", "y", 2, 3), op("b", "take", "b1", 4, 5, "y")],
    ),
    "an element that was put and is lost": (
        models.Queue(),
        [
            op("a", "put", "x", 0, 1),
            op("a", "put", "y", 2, 3),
            op("b", "take", "b1", 4, 5, "y"),
            op("b", "take", "b2", 6, 7, "x"),
        ],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_right_history_passes(name: str) -> None:
    model, history = GOOD[name]
    assert check(model, history).operations == len(history)


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_history_is_found(name: str) -> None:
    model, history = BAD[name]
    with pytest.raises(NotLinearizable, match="not explained"):
        check(model, history)


def test_keys_are_independent_and_the_wrong_one_is_named() -> None:
    right = [o._replace(key="fine") for o in GOOD["concurrent increments in either order"][1]]
    wrong = [o._replace(key="wrong") for o in BAD["a stale read"][1]]
    with pytest.raises(NotLinearizable, match=r"^wrong:"):
        check(models.Counter(), right + wrong)


def test_what_was_not_decided_does_not_pass() -> None:
    with pytest.raises(Undecided):
        check(models.Counter(), GOOD["concurrent increments in either order"][1], steps_max=2)


# --- many histories ---------------------------------------------------------------------------------------------------


def lock_story(rng: random.Random, number: int) -> list[tuple[str, Any, Any]]:
    story: list[tuple[str, Any, Any]] = []
    for turn in range(number // 2):
        story += [("acquire", str(turn), turn * 2 + rng.randrange(2)), ("release", str(turn), None)]
    return story


def counter_story(rng: random.Random, number: int) -> list[tuple[str, Any, Any]]:
    story: list[tuple[str, Any, Any]] = []
    value = 0
    for _ in range(number):
        if rng.random() < 0.6:
            value += 1
            story.append(("add", 1, value))
        else:
            story.append(("read", None, value))
    return story


def queue_story(rng: random.Random, number: int) -> list[tuple[str, Any, Any]]:
    story: list[tuple[str, Any, Any]] = []
    waiting: list[str] = []
    taken: list[str] = []
    for turn in range(number):
        choice = rng.randrange(3)
        if choice == 0 and waiting:
            element = waiting.pop(0)
            story.append(("take", f"t{element}", element))
            taken.append(element)
        elif choice == 1 and taken:
            story.append(("done", f"t{taken.pop()}", None))
        elif len(waiting) < 3:  # a wrong order of two puts shows when they are taken: in a long queue, late
            waiting.append(str(turn))
            story.append(("put", str(turn), None))
    return story


STORIES: list[tuple[Model, Callable[[random.Random, int], list[tuple[str, Any, Any]]]]] = [
    (models.Lock(), lock_story),
    (models.Counter(), counter_story),
    (models.Queue(), queue_story),
]


def spread(rng: random.Random, story: list[tuple[str, Any, Any]], width: int, unknown: float) -> list[Operation]:
    """Calls and returns around the true moments; some returns unknown, and some unknown ones that never happened."""
    history = []
    for place, (kind, argument, result) in enumerate(story):
        moment = place * 10
        called, returned = moment - rng.randrange(width), moment + rng.randrange(width)
        ended = None if rng.random() < unknown else returned
        history.append(op(f"c{place}", kind, argument, called, ended, result))
    return history


@pytest.mark.parametrize(("model", "story"), STORIES, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_random_right_histories_pass(model: Model, story: Callable[[random.Random, int], Any]) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        history = spread(rng, story(rng, 200), 40, 0.05)
        check(model, history)


def dumb(model: Model, history: list[Operation]) -> bool:
    """Every order of every choice of the operations without a return."""
    known = [o for o in history if o.returned is not None]
    unknown = [o for o in history if o.returned is None]
    for count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, count):
            for order in itertools.permutations([*known, *chosen]):
                if all(
                    not (later.returned is not None and later.returned < earlier.called)
                    for place, earlier in enumerate(order)
                    for later in order[place + 1 :]
                ):
                    state: Any = model.start()
                    for operation in order:
                        state = model.step(state, operation)
                        if state is None:
                            break
                    else:
                        return True
    return False


@pytest.mark.parametrize(("model", "story"), STORIES, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_small_histories_right_or_wrong_as_a_dumb_checker_has_it(
    model: Model, story: Callable[[random.Random, int], Any]
) -> None:
    answers = set()
    for seed in range(250):
        rng = random.Random(seed)
        history = spread(rng, story(rng, 5), 14, 0.2)
        victim = rng.randrange(len(history))
        if history[victim].result is not None and rng.random() < 0.7:
            wrong = rng.choice([o.result for o in history if o.result is not None])
            history[victim] = history[victim]._replace(result=wrong)
        if rng.random() < 0.3:
            history[victim] = history[victim]._replace(called=history[victim].called + 20, returned=60)
        try:
            check(model, history)
            answer = True
        except NotLinearizable:
            answer = False
        assert answer == dumb(model, history), "\n".join(map(str, history))
        answers.add(answer)
    assert answers == {True, False}
