"""Random runs of calls to a lock manager, as the operations of docs/design/dlm-oracle.md: the same seed, the same run.

A generator does not know what becomes of its calls. It draws many and lets the driver leave out those on locks that
have ended. Each run has its own taste in flags, so that some runs combine several rare ones on most calls.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, Final

from corral.api import dlm

Operation = list[Any]

LENGTH: Final = 60
RESOURCES: Final = 2

MODES: Final = ("NL", "CR", "CW", "PR", "PW", "EX")
BOTH: Final = (
    dlm.NOQUEUE,
    dlm.VALBLK,
    dlm.VALBLK,  # the most interesting: twice as likely as the others
    dlm.IVVALBLK,
    dlm.PERSISTENT,
    dlm.NODLCKWT,
    dlm.NODLCKBLK,
    dlm.NOQUEUEBAST,
    dlm.HEADQUE,
    dlm.NOORDER,
    dlm.ALTPR,
    dlm.ALTCW,
)
REQUEST: Final = BOTH
CONVERT: Final = (*BOTH, dlm.QUECVT, dlm.CONVDEADLK, dlm.CONVDEADLK)
UNLOCK: Final = (dlm.VALBLK, dlm.VALBLK, dlm.IVVALBLK, dlm.FORCEUNLOCK)
TASTES: Final = (0.0, 0.03, 0.1, 0.3, 0.6)
WRONG: Final = 0.01  # how often a call has a flag that is not for it
# What a run asks new locks for, and converts to. From modes that let others in to any is how conversions come to wait
# for each other.
REQUESTED: Final = (MODES, MODES[:3], ("CR", "PR", "PR"), ("NL", "CW", "CW"), ("CR", "CW", "PR"))
CONVERTED: Final = (MODES, MODES, MODES[:3], MODES[2:])


class Maker:
    """One run in the making."""

    def __init__(self, seed: int, convert: Sequence[int]) -> None:
        self.rng = Random(seed)
        self.convert = convert  # the flags for it
        self.taste = {flag: self.rng.choice(TASTES) for flag in sorted({*CONVERT, *UNLOCK, dlm.EXPEDITE})}
        self.cancels = self.rng.choice((0.03, 0.1, 0.2))
        self.crowd = self.rng.choice((3, 5, 8))  # about as many locks at a time
        self.requested = self.rng.choice(REQUESTED)
        self.converted = self.rng.choice(CONVERTED)
        self.locks: list[int] = []
        self.count = 0

    def operation(self, number: int) -> Operation:
        rng = self.rng
        draw = rng.random()
        if not self.locks or (draw < 0.3 and len(self.locks) < self.crowd) or draw < 0.12:
            return self.request()
        lock = rng.choice(self.locks)
        draw = rng.random()
        if draw < self.cancels:
            return ["cancel", lock]
        if draw < self.cancels + 0.25:
            self.locks.remove(lock)
            flags = self.flags(UNLOCK, (dlm.NOQUEUE, dlm.QUECVT, dlm.ALTPR))
            return ["unlock", lock, flags, self.value("u", number, flags)]
        flags = self.flags(self.convert, (dlm.EXPEDITE,))
        return ["convert", lock, rng.choice(self.converted), flags, self.value("v", number, flags)]

    def request(self) -> Operation:
        lock, self.count = self.count, self.count + 1
        self.locks.append(lock)
        mode = self.rng.choice(self.requested if self.rng.random() < 0.8 else MODES)
        flags = self.flags(REQUEST, (dlm.QUECVT, dlm.CONVDEADLK, dlm.EXPEDITE))
        if mode == "NL" and self.rng.random() < self.taste[dlm.EXPEDITE]:
            flags |= dlm.EXPEDITE
        return ["lock", lock, int(self.rng.random() < 0.15), mode, flags]

    def flags(self, usual: Sequence[int], wrong: Sequence[int]) -> int:
        flags = 0
        for flag in usual:
            if self.rng.random() < self.taste[flag]:
                flags |= flag
        if self.rng.random() < WRONG:
            flags |= self.rng.choice(wrong)
        return flags

    def value(self, letter: str, number: int, flags: int) -> str | None:
        return f"{letter}{number}" if flags & dlm.VALBLK else None


def run(seed: int, length: int = LENGTH, nodes: int = 1) -> list[Operation]:
    """With several nodes lock n is of node n modulo their number, and each node reads every value at the end.

    No conversion asks for an alternative mode then: where another node grants it at once, Linux takes the lock for what
    was asked.
    """
    maker = Maker(
        seed, CONVERT if nodes == 1 else tuple(flag for flag in CONVERT if flag not in (dlm.ALTPR, dlm.ALTCW))
    )
    operations = [maker.operation(number) for number in range(length)]
    if nodes > 1:
        for resource in range(RESOURCES):
            for number in range(maker.count, maker.count + nodes):
                operations.append(["lock", number, resource, "NL", dlm.EXPEDITE | dlm.VALBLK])
            maker.count += nodes
    return operations
