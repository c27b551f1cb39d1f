"""The sequential objects that histories are held against: lock, counter, semaphore, queue.

A client that died or lost its locks releases them some time later: the recorder adds that as an operation without a
return (`release`, `give_back`), called at the last moment at which the client still counted on what it held.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

from tests.linear.checker import Operation


class LockState(NamedTuple):
    holder: str | None  # the acquisition that holds it
    token: int  # the largest that anybody saw


class Lock:
    """acquire(id) -> token, release(id). One holder at a time; tokens rise from each acquisition to the next."""

    def start(self) -> LockState:
        return LockState(None, -1)

    def step(self, state: LockState, operation: Operation) -> LockState | None:
        if operation.kind == "acquire":
            if state.holder is not None:
                return None
            if operation.returned is None:
                return LockState(operation.argument, state.token)
            return LockState(operation.argument, operation.result) if operation.result > state.token else None
        assert operation.kind == "release"
        return state._replace(holder=None) if state.holder == operation.argument else None

    def same(self, operation: Operation) -> Hashable:
        return operation.kind, operation.argument


class Counter:
    """add(n) -> the value after it, read() -> the value."""

    def start(self) -> int:
        return 0

    def step(self, state: int, operation: Operation) -> int | None:
        if operation.kind == "add":
            after = state + int(operation.argument)
            return after if operation.returned is None or operation.result == after else None
        assert operation.kind == "read"
        return state if operation.returned is None or operation.result == state else None

    def same(self, operation: Operation) -> Hashable:
        return operation.kind, operation.argument


class Semaphore:
    """acquire(id), release(id): never more than `permits` at once."""

    def __init__(self, permits: int) -> None:
        self.permits = permits

    def start(self) -> frozenset[str]:
        return frozenset()

    def step(self, state: frozenset[str], operation: Operation) -> frozenset[str] | None:
        if operation.kind == "acquire":
            return state | {operation.argument} if len(state) < self.permits else None
        assert operation.kind == "release"
        return state - {operation.argument} if operation.argument in state else None

    def same(self, operation: Operation) -> Hashable:
        return operation.kind, operation.argument


class Entry(NamedTuple):
    element: Any
    taker: str | None = None
    returned: bool = False  # was taken, and given back


class Queue:
    """put(x), take(id) -> x, done(id): first in, first out; who took an element has it alone until `done` removes it or
    `give_back` puts it back into its place. Every element is put once. Who looks from front to back may pass one that
    comes back behind him, so only what was never given back must be taken in order."""

    def start(self) -> tuple[Entry, ...]:
        return ()

    def step(self, state: tuple[Entry, ...], operation: Operation) -> tuple[Entry, ...] | None:
        if operation.kind == "put":
            return (*state, Entry(operation.argument))
        if operation.kind == "take":
            return self._take(state, operation)
        mine = next((place for place, entry in enumerate(state) if entry.taker == operation.argument), None)
        if mine is None:
            return None
        if operation.kind == "done":
            return (*state[:mine], *state[mine + 1 :])
        assert operation.kind == "give_back"
        return (*state[:mine], Entry(state[mine].element, None, True), *state[mine + 1 :])

    def _take(self, state: tuple[Entry, ...], operation: Operation) -> tuple[Entry, ...] | None:
        """One without a return takes the first: whoever passed over an element that came back has returned."""
        for place, entry in enumerate(state):
            if entry.taker is None:
                if operation.returned is None or entry.element == operation.result:
                    return (*state[:place], entry._replace(taker=operation.argument), *state[place + 1 :])
                if not entry.returned:
                    return None
        return None

    def same(self, operation: Operation) -> Hashable:
        return operation.kind, operation.argument
