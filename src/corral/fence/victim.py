"""One victim's way through turns, methods and attempts. State only; the engine decides."""

from collections.abc import Container
from typing import Final, final

from corral.base.ids import NodeId, NodeIncarnation
from corral.base.time import Instant

REPEATS_TOLD: Final = 3
REPEATS_BETWEEN: Final = 600


@final
class Victim:
    """`turn` counts fencers tried, `method` the next method of my turn. `gates`: RoundDone waits for it."""

    __slots__ = (
        "deferrals",
        "failures",
        "gates",
        "incarnation",
        "last_error",
        "method",
        "not_before",
        "remote",
        "turn",
        "waits_delay",
    )

    def __init__(self, incarnation: NodeIncarnation, not_before: Instant, *, gates: bool) -> None:
        self.incarnation = incarnation
        self.not_before = not_before
        self.waits_delay = True  # not_before is a configured delay, not a pause between turns
        self.gates = gates
        self.turn = 0
        self.method = 0
        self.remote = ""  # the method another member's agent works by now
        self.deferrals = 0  # turns of which it was told that they are another's
        self.failures = 0
        self.last_error = ""

    @property
    def node(self) -> NodeId:
        return self.incarnation.node


@final
class Repeats:
    """Identical failures by (victim, method): how many in a row, and whether this one is worth a line."""

    __slots__ = ("_count", "_text")

    def __init__(self) -> None:
        self._text: dict[tuple[NodeIncarnation, str], str] = {}
        self._count: dict[tuple[NodeIncarnation, str], int] = {}

    def count(self, victim: NodeIncarnation, method: str, text: str) -> int:
        key = (victim, method)
        if self._text.get(key) != text:
            self._text[key] = text
            self._count[key] = 0
        self._count[key] += 1
        return self._count[key]

    def retain(self, victims: Container[NodeIncarnation]) -> None:
        for victim in [key[0] for key in self._text if key[0] not in victims]:
            self.forget(victim)

    def forget(self, victim: NodeIncarnation) -> None:
        for key in [key for key in self._text if key[0] == victim]:
            del self._text[key]
            del self._count[key]


def worth_telling(count: int) -> bool:
    return count <= REPEATS_TOLD or count % REPEATS_BETWEEN == 0
