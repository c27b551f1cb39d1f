"""Linearizability of recorded histories, by the search of Wing and Gong with the memory of Lowe.

A history is a list of `Operation`: who, on what, from when to when, and with which result. It is linearizable if every
operation can be given one moment between its call and its return at which it took effect, so that all of them together
are a run of the sequential model. Keys are independent of each other and checked one by one.

An operation without a return (its client was killed, or was told that the outcome is not known) may have taken effect
at any moment after its call, or not at all.

The search takes one operation after the other that may come next, that is, which was called before the first return
still to come; it goes back where the model refuses. A set of operations done, together with the state they led to, is
tried once. Of operations without a return that would do the same, only the first is tried: any order of the others
could be told with it in their place.

Wing, Gong: Testing and Verifying Concurrent Objects, 1993. Lowe: Testing for Linearizability, 2017.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any, Final, NamedTuple, Protocol

STEPS_MAX: Final = 5_000_000  # of one key; a history that needs more is reported, never passed


class Operation(NamedTuple):
    """Times in nanoseconds of one clock. `returned` None: the outcome is not known, and `result` means nothing."""

    client: str
    key: str
    kind: str
    argument: Any
    called: int
    returned: int | None
    result: Any = None

    def __str__(self) -> str:
        end = "?" if self.returned is None else f"{self.returned / 1e9:.6f}"
        result = "" if self.returned is None else f" -> {self.result!r}"
        return f"{self.called / 1e9:.6f} .. {end} {self.client} {self.kind}({self.argument!r}){result}"


class Model(Protocol):
    """A sequential object. States are hashable and never changed."""

    def start(self) -> Hashable: ...
    def step(self, state: Any, operation: Operation) -> Hashable | None:
        """The state after it; None: this operation cannot have this result, or be done at all, in this state."""

    def same(self, operation: Operation) -> Hashable:
        """Equal for operations without a return that do the same in every state."""


class NotLinearizable(AssertionError):
    """There is no order. The message tells how far the best attempt came, and what it could not explain."""


class Undecided(AssertionError):
    """The search was given up: neither right nor wrong was shown."""


class Judged(NamedTuple):
    keys: int
    operations: int
    unknown: int
    steps: int


def check(model: Model, history: Iterable[Operation], *, steps_max: int = STEPS_MAX) -> Judged:
    """Raises NotLinearizable or Undecided."""
    keys: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        assert operation.returned is None or operation.called <= operation.returned, (
            f"returned before called: {operation}"
        )
        keys[operation.key].append(operation)
    steps = 0
    for key in sorted(keys):
        steps += _Search(model, key, keys[key], steps_max).run()
    operations = [operation for known in keys.values() for operation in known]
    unknown = sum(operation.returned is None for operation in operations)
    return Judged(len(keys), len(operations), unknown, steps)


class _Search:
    """One key. Operations are numbered in the order of their calls; a set of them is the bits of an int."""

    def __init__(self, model: Model, key: str, operations: list[Operation], steps_max: int) -> None:
        self.model = model
        self.key = key
        self.operations = sorted(operations, key=lambda operation: operation.called)
        self.steps_max = steps_max
        self.steps = 0
        self.same = [None if operation.returned is not None else model.same(operation) for operation in self.operations]
        self.by_return = sorted(
            (operation.returned, number)
            for number, operation in enumerate(self.operations)
            if operation.returned is not None
        )
        self.best: tuple[int, int, Any] = (-1, 0, None)

    def run(self) -> int:
        """Depth first, with the frames in a list: (done, state, returns passed, first not done, candidates left)."""
        state = self.model.start()
        frames = [(0, state, 0, 0, self._candidates(0, 0, 0))]
        if not self.by_return:
            return 0
        tried = {(0, state)}
        while frames:
            done, state, passed, first, candidates = frames[-1]
            if not candidates:
                frames.pop()
                continue
            number = candidates.pop()
            self.steps += 1
            if self.steps > self.steps_max:
                raise Undecided(f"{self.key}: not decided in {self.steps_max} steps; best attempt:\n{self._story()}")
            after = self.model.step(state, self.operations[number])
            if after is None:
                continue
            now = done | 1 << number
            if (now, after) in tried:
                continue
            tried.add((now, after))
            while passed < len(self.by_return) and now >> self.by_return[passed][1] & 1:
                passed += 1
            if passed == len(self.by_return):
                return self.steps
            while now >> first & 1:
                first += 1
            if passed > self.best[0]:
                self.best = (passed, now, after)
            frames.append((now, after, passed, first, self._candidates(now, passed, first)))
        raise NotLinearizable(f"{self.key}: no order explains this\n{self._story()}")

    def _candidates(self, done: int, passed: int, first: int) -> list[int]:
        """What may come next, the likeliest last: called before the first return still to come. Known outcomes are
        tried before unknown ones, and of those that do the same only the first."""
        if passed == len(self.by_return):
            return []
        limit = self.by_return[passed][0]
        known: list[int] = []
        unknown: dict[Hashable, int] = {}
        for number in range(first, len(self.operations)):
            operation = self.operations[number]
            if operation.called > limit:
                break
            if not done >> number & 1:
                if operation.returned is None:
                    unknown.setdefault(self.same[number], number)
                else:
                    known.append(number)
        known.sort(key=lambda number: self.operations[number].returned or 0)
        return [*reversed(unknown.values()), *reversed(known)]

    def _story(self) -> str:
        """The attempt that explained most: its state, and what came around the first that it could not explain."""
        passed, done, state = self.best
        start = max(passed, 0)
        stuck = [self.operations[number] for _, number in self.by_return[start : start + 6]]
        before = [self.operations[number] for _, number in self.by_return[max(start - 8, 0) : start]]
        open_ = [o for n, o in enumerate(self.operations) if o.returned is None and not done >> n & 1]
        lines = ["explained:", *(f"  {o}" for o in before), f"state: {state if passed >= 0 else self.model.start()!r}"]
        lines += ["not explained, the first return first:", *(f"  {o}" for o in stuck)]
        if open_:
            lines += ["outcome not known, and not used:", *(f"  {o}" for o in open_[-8:])]
        return "\n".join(lines)
