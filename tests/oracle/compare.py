"""What the kernel did each time alike, played against our engine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from corral.dlm.replay import UNDEFINED, Mismatch, Parting, replay

Step = list[Any]


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


def compare(record: dict[str, Any]) -> Outcome:
    steps, unstable = stable(record["recordings"])
    run = {"seed": record["seed"], "steps": steps}
    return Outcome(run, unstable, *replay(run))
