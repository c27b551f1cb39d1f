"""Was a register linearizable? For histories whose writes all differ, by the zones of Gibbons and Korach.

Every value has one *cluster*: its write and the reads that returned it. From the first end of any of these operations
to the last beginning of one, the register must have held the value (a *forward* zone); if all of them overlap in one
moment it may have been any moment between (a *backward* zone). The history is linearizable exactly if no read ended
before its write began, no two forward zones overlap, and no backward zone lies within a forward one.
"""

from itertools import pairwise
from typing import Final, NamedTuple

from corral.base.time import FOREVER, Instant


class Operation(NamedTuple):
    """`began` and `ended` in true time; a write that was never answered ends at FOREVER."""

    began: Instant
    ended: Instant
    value: int
    write: bool
    who: str


class Zone(NamedTuple):
    low: Instant
    high: Instant
    forward: bool
    value: int


INITIAL: Final = 0


def complaint(history: list[Operation]) -> str:
    """What is impossible about it, or nothing. The register holds INITIAL before all."""
    clusters: dict[int, list[Operation]] = {INITIAL: [Operation(-1, -1, INITIAL, True, "the beginning")]}
    for operation in sorted(history):
        clusters.setdefault(operation.value, []).append(operation)
    zones = []
    for value, operations in sorted(clusters.items()):
        writes = [operation for operation in operations if operation.write]
        if len(writes) != 1:
            return f"{operations[0].who} read {value}, which was written {len(writes)} times"
        early = [read for read in operations if read.ended < writes[0].began]
        if early:
            return f"{early[0].who} read {value} before {writes[0].who} began to write it"
        low = min(operation.ended for operation in operations)
        high = max(operation.began for operation in operations)
        if low < FOREVER:  # else never answered and never seen: it may not have happened
            zones.append(Zone(min(low, high), max(low, high), low < high, value))
    forward = sorted(zone for zone in zones if zone.forward)
    for one, other in pairwise(forward):
        if other.low < one.high:
            return f"{one.value} and {other.value} were both there from {other.low} to {min(one.high, other.high)} ns"
    for zone in zones:
        for around in forward:
            if not zone.forward and around.low < zone.low and zone.high < around.high:
                return f"{zone.value} came and went while {around.value} was there ({around.low} to {around.high} ns)"
    return ""
