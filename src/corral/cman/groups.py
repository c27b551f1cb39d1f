"""Service groups: who is in them, under which number and slot, and what has happened since they last ran.

Every corrald of a view holds the same table. Only the view's coordinator changes it, and each change travels with the
round it causes (`lift_wire.Begin`), so a new coordinator finds the newest table among the members it collects.

Invariants
  LIFT-1  the slots of a group's members, and of members whose failure it has not finished recovering, are distinct
  LIFT-2  `failed` of a round = members at or since the last finished round that are not members now and did not leave
          cleanly: a joiner may have written before the round that brought it in finished
"""

import msgspec

from corral.base.ids import MemberId, NodeIncarnation
from corral.base.view import Round, Slotted
from corral.base.world import ProcessId
from corral.wire.frame import GROUP_PORT_MIN, PORT_MAX


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A member of a group, as announced in its ordered join."""

    member: MemberId
    slot: int
    address: str
    ticket: bytes
    process: ProcessId


class Group(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One service group. `number` is its port on the wire; `baseline` the members of its last finished round and those
    that joined and failed since (and their slots), from which `failed`, `joined` and `left` of the next round are
    counted; `left` who left cleanly since."""

    name: str
    level: int
    number: int
    slots: int
    members: tuple[Entry, ...]
    baseline: tuple[Slotted, ...]
    left: tuple[MemberId, ...]

    @property
    def stack(self) -> str:
        """Groups of one stack share what follows the colon: `dlm:home` and `gfs:home`."""
        return self.name.partition(":")[2]

    def entry(self, member: MemberId) -> Entry | None:
        for entry in self.members:
            if entry.member == member:
                return entry
        return None

    def failed(self) -> tuple[Slotted, ...]:
        here = {entry.member for entry in self.members}
        gone = set(self.left)
        return tuple(entry for entry in self.baseline if entry.member not in here and entry.member not in gone)

    def round(self, round_id: int) -> Round:
        before = {entry.member for entry in self.baseline}
        return Round(
            id=round_id,
            group=self.name,
            members=tuple(Slotted(entry.member, entry.slot) for entry in self.members),
            failed=self.failed(),
            joined=tuple(entry.member for entry in self.members if entry.member not in before),
            left=self.left,
        )

    def free_slot(self) -> int | None:
        """The lowest that neither a member has nor one that failed and is not recovered yet."""
        taken = {entry.slot for entry in self.members} | {entry.slot for entry in self.failed()}
        return next((slot for slot in range(self.slots) if slot not in taken), None)

    def with_member(self, member: MemberId, address: str, ticket: bytes, process: ProcessId) -> "Group | None":
        """The group with this member added in the lowest free slot; None when there is none."""
        assert member not in self.left, "LIFT-8"
        slot = self.free_slot()
        if slot is None:
            return None
        entry = Entry(member, slot, address, ticket, process)
        members = tuple(sorted((*self.members, entry), key=lambda e: e.member))
        group = msgspec.structs.replace(self, members=members)
        group.check()
        return group

    def without(self, gone: frozenset[MemberId], *, clean: bool) -> "Group":
        members = tuple(entry for entry in self.members if entry.member not in gone)
        known = {entry.member for entry in self.baseline}
        baseline, left = self.baseline, self.left
        if clean:
            known |= {entry.member for entry in self.members}
            left = tuple(sorted({*left, *(gone & known)}))
        else:
            new = [Slotted(e.member, e.slot) for e in self.members if e.member in gone and e.member not in known]
            baseline = tuple(sorted((*baseline, *new), key=_by_member))
        return msgspec.structs.replace(self, members=members, baseline=baseline, left=left)

    def of_nodes(self, nodes: frozenset[NodeIncarnation]) -> "Group":
        """Without the members of nodes that are not in the view: they failed with it."""
        gone = frozenset(
            entry.member
            for entry in self.members
            if NodeIncarnation(entry.member.node, entry.member.incarnation) not in nodes
        )
        return self.without(gone, clean=False) if gone else self

    def finished(self, round: Round) -> "Group":
        """After that round finished. Members may have changed since it began; what they count from is the round."""
        left = tuple(member for member in self.left if member not in round.left)
        done = {entry.member for entry in (*round.members, *round.failed)} | set(round.left)
        since = [entry for entry in self.baseline if entry.member not in done]  # joined and failed since it began
        baseline = tuple(sorted((*round.members, *since), key=_by_member))
        return msgspec.structs.replace(self, baseline=baseline, left=left)

    def check(self) -> None:
        slots = [entry.slot for entry in self.members] + [entry.slot for entry in self.failed()]
        assert len(slots) == len(set(slots)), "LIFT-1"


def _by_member(entry: Slotted) -> MemberId:
    return entry.member


def free_number(groups: "dict[str, Group]", last: int) -> int:
    """The next port number after `last` that no group has: numbers come back only after all others were used."""
    taken = {group.number for group in groups.values()}
    span = PORT_MAX - GROUP_PORT_MIN + 1
    for step in range(1, span + 1):
        number = GROUP_PORT_MIN + (last - GROUP_PORT_MIN + step) % span
        if number not in taken:
            return number
    raise AssertionError("fewer groups than ports")
