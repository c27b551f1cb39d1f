"""What the kernel did each time alike, played against our engine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from corral.api.dlm import VALNOTVALID, VALUE_SIZE, Request
from corral.dlm.events import Blocked, Submit
from corral.dlm.replay import CLIENT, UNDEFINED, Mismatch, Parting, equal, replay
from corral.dlm.resource import Lock
from tests.unit.dlm.members import Members

Step = list[Any]


class Pair:
    """The members of a lockspace: lock n with member n modulo their number. Does not tell of blocking callbacks."""

    def __init__(self, nodes: int) -> None:
        self.members = Members(*range(1, nodes + 1), value_size=VALUE_SIZE)
        self.value_size = VALUE_SIZE

    def of(self, handle: int) -> int:
        return (handle - 1) % len(self.members.engines) + 1

    def submit(self, handle: int, cookie: int, request: Request) -> list[object]:
        self.members.heard.clear()
        self.members.step(self.of(handle), Submit(CLIENT, ((handle, cookie, request),)))
        return [event for _, event in self.members.heard if not isinstance(event, Blocked)]

    def find(self, handle: int) -> Lock | None:
        return self.members.engines[self.of(handle)].space.find(CLIENT << 32 | handle)


class Outcome(NamedTuple):
    run: dict[str, Any]  # what is stable of it, in the form of a recording
    unstable: bool  # something was not, and the run ends before it
    mismatches: list[Mismatch]
    parting: Parting | None


def agreed(steps: Sequence[Step]) -> Step | None:
    """One step, recorded several times: what is the same in all, or None. A value that differs is nobody's."""
    (operation, first), *others = steps
    if any(other[0] != operation for other in others):
        return None
    ordered = [[result[0], *sorted(result[1:], key=lambda event: repr(event[:4]))] for _, result in steps]
    merged: list[Any] = [first[0]]
    if any(result[0] != first[0] or len(result) != len(first) for result in ordered):
        return None
    for events in zip(*(result[1:] for result in ordered), strict=True):
        event = list(events[0])
        if any(other[:4] != event[:4] for other in events):
            return None
        if any(other != event for other in events):
            event[4] = UNDEFINED
        merged.append(event)
    return [operation, merged]


def stable(recordings: Sequence[Sequence[Step]]) -> tuple[list[Step], bool]:
    """The steps up to the first that was not the same each time, and whether that was before the end."""
    steps: list[Step] = []
    for step in zip(*recordings, strict=False):
        same = agreed(step)
        if same is None:
            return steps, True
        steps.append(same)
    return steps, any(len(recording) != len(steps) for recording in recordings)


def compare(record: dict[str, Any], nodes: int = 1) -> Outcome:
    recordings = record["recordings"]
    if nodes > 1:
        recordings = [[[operation, settled(operation, result)] for operation, result in steps] for steps in recordings]
    steps, unstable = stable(recordings)
    run = {"seed": record["seed"], "steps": steps}
    mismatches, parting = replay(run, Pair(nodes) if nodes > 1 else None)
    if nodes > 1:
        mismatches = [each for each in mismatches if differs(each)]
    return Outcome(run, unstable, mismatches, parting)


def settled(operation: Sequence[Any], result: Sequence[Any]) -> list[Any]:
    """What of a step does not depend on who was quicker: blocking callbacks do.

    Linux does not wait for another node's answer to a conversion downwards, which is not told of an invalid value then.
    """
    events = [list(event) for event in result[1:] if event[1] != "bast"]
    if operation[0] == "convert":
        for event in events:
            if event[0] == operation[1]:
                event[3] &= ~VALNOTVALID
    return [result[0], *events]


def differs(mismatch: Mismatch) -> bool:
    return not equal(mismatch.expected, settled(mismatch.operation, mismatch.got))
