"""From what clients recorded to a history: one operation for each call, and what follows from their ends.

A hold that its client did not end by itself ends some time after the client was last sure of it: that is an operation
without a return. One of which it never was sure may have been over before it heard of it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tests.linear.checker import Model, Operation
from tests.linear.client import PERMITS
from tests.linear.models import Counter, Lock, Queue, Semaphore

MODELS: Final[dict[str, Model]] = {
    "lock": Lock(),
    "counter": Counter(),
    "semaphore": Semaphore(PERMITS),
    "queue": Queue(),
}
ENDS: Final = {"acquire": "release", "take": "give_back"}  # how a hold ends that was not ended in good order


class Violation(AssertionError):
    """A client itself saw what must not be."""


def read(paths: Iterable[Path]) -> list[Operation]:
    history: list[Operation] = []
    for path in sorted(paths):
        history += operations([json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")])
    return history


def operations(lines: list[list[Any]]) -> list[Operation]:
    found: dict[str, Operation] = {}
    sure: dict[str, int] = {}
    for line in lines:
        if line[0] == "call":
            _, number, kind, key, argument, called = line
            found[number] = Operation(number.rpartition(".")[0], key, kind, argument, called, None)
        elif line[0] == "return":
            _, number, returned, result = line
            found[number] = found[number]._replace(returned=returned, result=result)
        elif line[0] == "failed":
            del found[line[1]]
        elif line[0] == "sure":
            sure[line[1]] = line[2]
        elif line[0] == "violation":
            raise Violation(line[1])
    ended = {o.argument for o in found.values() if o.kind in ("release", "give_back", "done") and o.returned}
    for number, operation in list(found.items()):
        end = ENDS.get(operation.kind)
        if end is not None and number not in ended:
            since = sure.get(number, operation.called)
            found[f"{number} ends"] = Operation(operation.client, operation.key, end, number, since, None)
    return telling(found.values())


def telling(history: Iterable[Operation]) -> list[Operation]:
    """Without what explains nothing, of the operations that nobody heard the outcome of: a read; and a put of what
    nobody got, for who may have had it in between (a `take` without a return) may as well have had nothing."""
    known = list(history)
    got = {operation.result for operation in known if operation.kind == "take" and operation.returned is not None}
    return [
        operation
        for operation in known
        if operation.returned is not None
        or not (operation.kind == "read" or (operation.kind == "put" and operation.argument not in got))
    ]
