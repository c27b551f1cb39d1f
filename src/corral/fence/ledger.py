"""What is known to be no danger any more: facts that stay true once they are, and their order for humans.

Invariants
  FENCE-6  a fact never changes: the first one heard of a victim stays (what is said of incarnation 0, any life of a
           node, is no fact for ever: a later request makes it a victim again)
"""

from typing import Final, final

from corral.api.fence import NodeFenced
from corral.base.ids import NodeIncarnation
from corral.fence.wire import VictimDone

HISTORY_MAX: Final = 256


@final
class Ledger:
    """Bounded: the oldest facts go first, but never one that the caller says it still counts on."""

    __slots__ = ("_facts", "_history")

    def __init__(self) -> None:
        self._facts: dict[NodeIncarnation, VictimDone] = {}
        self._history: dict[NodeIncarnation, VictimDone] = {}  # told by others about the time before us

    def __contains__(self, victim: NodeIncarnation) -> bool:
        return victim in self._facts

    def fact(self, victim: NodeIncarnation) -> VictimDone | None:
        return self._facts.get(victim)

    def record(self, fact: VictimDone, keep: frozenset[NodeIncarnation]) -> bool:
        """True when it is news."""
        if fact.victim in self._facts:
            return False  # FENCE-6
        self._facts[fact.victim] = fact
        if len(self._facts) > HISTORY_MAX:
            for victim in list(self._facts):
                if victim not in keep and victim != fact.victim:
                    del self._facts[victim]
                    break
        return True

    def forget(self, victim: NodeIncarnation) -> None:
        """Only of a victim that stands for any life of its node: there may be another by now."""
        self._facts.pop(victim, None)

    def recall(self, facts: list[VictimDone]) -> None:
        """History from before this node came: for humans, decides nothing."""
        for fact in facts:
            if len(self._history) < HISTORY_MAX:
                self._history.setdefault(fact.victim, fact)

    def recent(self, count: int) -> list[VictimDone]:
        """Oldest first."""
        before = [fact for victim, fact in self._history.items() if victim not in self._facts]
        return (before + list(self._facts.values()))[-count:]


def told(fact: VictimDone) -> NodeFenced:
    """The fact as everybody above hears it."""
    return NodeFenced(
        fact.victim,
        fact.how,
        fact.proof,
        fact.method,
        fact.agent,
        fact.by,
        fact.duration_ns,
        fact.text,
        fact.wall_seconds,
    )
