"""Bugs planted into recovery control, each with the invariant that must catch it within 50 seeds.

A plant is a function that patches and is undone by pytest's monkeypatch; `test_lift.py` runs the seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from corral.api.cman import FENCE_GROUP
from corral.base.ids import MemberId, NodeIncarnation
from corral.base.time import Instant
from corral.base.view import Round
from corral.base.world import ProcessId
from corral.cman import lift
from corral.cman.groups import Entry, Group
from corral.cman.lift import LiftEngine
from corral.cman.lift_events import Installed, LiftEvent, Promised
from corral.cman.lift_wire import Begin, Done, Finish, Join, LiftState

Patch = Callable[[Any, str, Any], None]


def gives_a_slot_of_the_dead_away(patch: Patch) -> None:
    """A joiner gets the slot of a member whose failure is not recovered."""

    def free_slot(self: Group) -> int | None:
        taken = {entry.slot for entry in self.members}
        return next((slot for slot in range(self.slots) if slot not in taken), None)

    patch(Group, "free_slot", free_slot)
    patch(Group, "check", lambda self: None)


def forgets_a_joiner_that_died(patch: Patch) -> None:
    """`failed` counts members of the last finished round only."""
    right = Group.without

    def without(self: Group, gone: frozenset[MemberId], *, clean: bool) -> Group:
        return msgspec.structs.replace(right(self, gone, clean=clean), baseline=self.baseline)

    patch(Group, "without", without)


def owes_the_last_view_only(patch: Patch) -> None:
    """What an abandoned view should have fenced is forgotten."""

    def owed(self: LiftEngine, event: Installed) -> set[NodeIncarnation]:
        last = set(event.accepted[-1].members) if event.accepted else set()
        return last - set(event.left) - set(event.view.members) - set(self.state.fenced)

    patch(LiftEngine, "_owed", owed)


def writes_nothing(patch: Patch) -> None:
    """A round starts without having been written down."""

    def save(self: LiftEngine, state: LiftState) -> None:
        self._state = state

    patch(LiftEngine, "_save", save)


def _done_at_once(patch: Patch, *, fence: bool) -> None:
    right = LiftEngine._count

    def count(self: LiftEngine, now: Instant, peer: MemberId, message: Done) -> None:
        run = self._running.get(message.group)
        if run is not None and run.round.id == message.round and (message.group == FENCE_GROUP) == fence:
            run.waiting.intersection_update({peer.node})
        right(self, now, peer, message)

    patch(LiftEngine, "_count", count)


def passes_fence_at_the_first_done(patch: Patch) -> None:
    """A view is active when its first member has passed FENCE."""
    _done_at_once(patch, fence=True)


def finishes_at_the_first_done(patch: Patch) -> None:
    """A round finishes when its first node has started it."""
    _done_at_once(patch, fence=False)


def starts_all_levels_at_once(patch: Patch) -> None:
    """No group waits for those below it."""
    patch(lift, "_stack_below", lambda table, group: [])


def goes_on_after_its_promise(patch: Patch) -> None:
    """What comes from the old view after a promise is taken in."""
    right = LiftEngine.step

    def step(self: LiftEngine, now: int, event: LiftEvent) -> None:
        active = self.active
        right(self, now, event)
        if isinstance(event, Promised):
            self._promised = False
            self.active = active

    patch(LiftEngine, "step", step)


def hears_its_own_rounds_late(patch: Patch) -> None:
    """The coordinator's own Begin comes back when it has ordered more, and takes its plan back."""

    def broadcast(self: LiftEngine, message: Begin | Finish) -> None:
        assert self.view is not None
        self._ready.then_send.extend((member.corrald(), message) for member in self.view.members)

    right = LiftEngine._begun_group

    def begun_group(self: LiftEngine, message: Begin, group: Group, round: Round) -> None:
        right(self, message, group, round)
        if self.coordinating:
            self._plan[group.name] = group

    patch(LiftEngine, "_broadcast", broadcast)
    patch(LiftEngine, "_begun_group", begun_group)


def lets_a_member_return_at_once(patch: Patch) -> None:
    """Who leaves and joins again is a member before a round with its departure has finished, and cannot fail."""

    def with_member(self: Group, member: MemberId, address: str, ticket: bytes, process: ProcessId) -> Group | None:
        slot = self.free_slot()
        if slot is None:
            return None
        members = (*self.members, Entry(member, slot, address, ticket, process))
        return msgspec.structs.replace(self, members=tuple(sorted(members, key=lambda entry: entry.member)))

    def join(self: LiftEngine, message: Join, since: Instant) -> None:
        group = self._plan.get(message.group)
        if group is None or message.member not in group.left:
            right(self, message, since)
            return
        added = group.with_member(message.member, message.address, message.ticket, message.process)
        if added is not None:
            self._change(added)
            self._advance()

    right = LiftEngine._join
    patch(Group, "with_member", with_member)
    patch(LiftEngine, "_join", join)


def tells_each_its_own_round(patch: Patch) -> None:
    """Only the coordinator hears who has failed."""

    def broadcast(self: LiftEngine, message: Begin | Finish) -> None:
        right(self, message)
        if isinstance(message, Begin):
            other = msgspec.structs.replace(message, round=msgspec.structs.replace(message.round, failed=()))
            self._ready.then_send[:] = [
                (peer, other if sent is message else sent) for peer, sent in self._ready.then_send
            ]

    right = LiftEngine._broadcast
    patch(LiftEngine, "_broadcast", broadcast)


def asks_only_once(patch: Patch) -> None:
    """What was asked in a view that ended is not asked again in the next."""
    right = LiftEngine._finish_fence

    def finish_fence(self: LiftEngine, round: Round) -> None:
        joins, departs, self._joins, self._departs = self._joins, self._departs, {}, {}
        right(self, round)
        self._joins, self._departs = joins, departs

    patch(LiftEngine, "_finish_fence", finish_fence)


class Plant(NamedTuple):
    """A bug and the number of the invariant that names it."""

    plant: Callable[[Patch], None]
    caught_by: str


PLANTS = (
    Plant(gives_a_slot_of_the_dead_away, "LIFT-1"),
    Plant(forgets_a_joiner_that_died, "LIFT-2"),
    Plant(owes_the_last_view_only, "LIFT-2"),
    Plant(writes_nothing, "LIFT-3"),
    Plant(passes_fence_at_the_first_done, "LIFT-4"),
    Plant(starts_all_levels_at_once, "LIFT-5"),
    Plant(finishes_at_the_first_done, "LIFT-6"),
    Plant(goes_on_after_its_promise, "LIFT-7"),
    Plant(hears_its_own_rounds_late, "LIFT-8"),
    Plant(lets_a_member_return_at_once, "LIFT-8"),
    Plant(tells_each_its_own_round, "LIFT-9"),
    Plant(asks_only_once, "LIFT-10"),
)
