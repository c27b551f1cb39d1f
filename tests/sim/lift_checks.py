"""The invariants of recovery control, as seen from outside the engines: from what leaves them, from what participants
asked and did, and from who may still act.

LIFT-1  slots of members and of failed members whose recovery has not finished are distinct, and a member keeps its own
LIFT-2  who began to serve in a group is a member of each later round, or has failed or left in it, until one finishes
        that says so; nobody alive in the view has failed; a view is active when all who served before are dealt with
LIFT-3  what starts here has its round on this disk; ids only rise
LIFT-4  no group starts before every node of the view has passed FENCE
LIFT-5  a group starts when all below it in its stack have done their newest round of this view, and stops before them
LIFT-6  what finishes is the newest round started here, and all its members have started
LIFT-7  what goes on after a promise is what was attached to it
LIFT-8  a member that departed in a round of a group is in no later round of that group, unless it joined again after a
        round with its departure had finished
LIFT-9  a round is the same on every member
LIFT-10 after the faults end everything asked for is settled and every group has finished, within a bound

Nothing is asked that nobody can know: a member, or a departure, counts while a node of the view had a round with it, or
ordered one, or was in a view with a node that had. (A total loss of power loses the groups and keeps what FENCE owes.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from corral.api.cman import FENCE_GROUP
from corral.base.ids import MemberId, NodeIncarnation, ViewId
from corral.base.view import Round, View
from corral.cman.lift_events import FinishGroup, StartFence, StartGroup
from corral.cman.lift_wire import Begin, LiftState

if TYPE_CHECKING:
    from tests.sim.lift_cluster import Cluster, Life


class Violation(AssertionError):
    """An invariant does not hold; the message begins with its number."""


Membership = tuple[str, MemberId, int]  # of that member in that group, having asked to join so often


class Served(NamedTuple):
    """A member that was told to start: from then on it may have written."""

    first: int  # the round
    slot: int
    joined: int  # with which of its joins


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Violation(what)


def departed_in(round: Round) -> list[MemberId]:
    gone = {entry.member for entry in round.failed} | set(round.left)
    return sorted(gone.difference(round.member_ids))


def stack_of(group: str) -> str:
    return group.partition(":")[2]


class Checks:
    """Watches one cluster. What it keeps is the truth that no engine sees."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.rounds: dict[tuple[ViewId, int], Round] = {}
        self.joins: dict[tuple[ViewId, int], dict[MemberId, int]] = {}  # by which of its joins each is named there
        self.views: dict[ViewId, View] = {}
        self.levels: dict[str, int] = {}
        self.told: set[tuple[str, MemberId]] = set()  # who was ever told to start
        self.served: dict[str, dict[MemberId, Served]] = {}
        self.named: dict[tuple[str, MemberId], int] = {}
        self.departed: dict[tuple[str, MemberId], int] = {}
        self.done: dict[tuple[ViewId, int], set[MemberId]] = {}
        self.fence_passed: set[tuple[ViewId, NodeIncarnation]] = set()
        self.finished_high: dict[str, int] = {}
        self.finished_rounds: set[tuple[ViewId, int]] = set()
        self.owed: set[NodeIncarnation] = set()  # members of active views that no fence or clean leave has settled
        self.left: set[NodeIncarnation] = set()
        self.active_views: set[ViewId] = set()

    # --- rounds --------------------------------------------------------------------------------------------------

    def begun(self, life: Life, message: Begin) -> None:
        """A coordinator orders a round."""
        round = message.round
        view = self.views[message.view]
        key = (view.id, round.id)
        if key not in self.rounds:
            self.cluster.count("rounds")
            high = self.finished_high.get(round.group, 0)
            require(round.id > high, f"LIFT-3: {describe(round)} begins after round {high} finished")
            self.rounds[key] = round
            self.joins[key] = self.joined(round)
            self.done[key] = set()
        require(self.rounds[key] == round, f"LIFT-9: {describe(round)} and {describe(self.rounds[key])}")
        if message.group is not None:
            self.levels[round.group] = message.group.level
            self.learn(life, round, view)

    def learn(self, life: Life, round: Round, view: View) -> None:
        group = round.group
        joins = self.joins[view.id, round.id]
        for member in [*round.member_ids, *(entry.member for entry in round.failed)]:
            life.known.add((group, member, joins[member]))
        for member in departed_in(round):
            life.known_out.setdefault((group, member, joins[member]), round.id)
        life.known_left.update((group, m, joins[m]) for m in round.left if m in joins and m not in round.member_ids)

    def joined(self, round: Round) -> dict[MemberId, int]:
        """By which of its joins each is named: who left, by the one it left with; else by the first since it departed
        last, when this round is ordered. (A member may have asked to join again before its leave is everywhere.)"""
        group = round.group
        joins: dict[MemberId, int] = {}
        failed = [entry.member for entry in round.failed]
        for member in [*round.member_ids, *failed]:
            key = group, member
            if self.named.get(key, 0) <= self.departed.get(key, 0) and member in self.cluster.participants:
                self.named[key] = self.cluster.participants[member].joins.get(group, 0)
            joins[member] = self.named.get(key, 0)
        for member in failed:
            self.departed[group, member] = joins[member]
        for member in round.left:
            if member not in joins and member in self.cluster.participants:
                joins[member] = self.cluster.participants[member].asked_to_leave.get(group, 0)
                self.departed[group, member] = max(joins[member], self.departed.get((group, member), 0))
        return joins

    def knows(self, view: View, membership: Membership) -> bool:
        return any(membership in self.cluster.lives[member].known for member in view.members)

    def departed_before(self, view: View, membership: Membership, round_id: int) -> int:
        """The round in which it departed, as far as the view can know; 0 when it did not."""
        known = (self.cluster.lives[member].known_out.get(membership, round_id) for member in view.members)
        first = min(known)
        return first if first < round_id else 0

    def view_of(self, life: Life, round: Round) -> View:
        """Where that round was ordered: what starts may have waited for the disk for longer than its view."""
        ids = [view for view, number in self.rounds if number == round.id and self.rounds[view, number] == round]
        here = [view for view in ids if life.me in self.views[view].members]
        require(bool(here), f"LIFT-9: node {life.me.node} starts {describe(round)}, which nobody ordered")
        return self.views[max(here)]

    def starts(self, life: Life, round: Round, view: View) -> None:
        where = f"node {life.me.node} starts {describe(round)}"
        durable = life.machine.lift_state().round
        require(durable >= round.id, f"LIFT-3: {where} with {durable} on its disk")
        require(round.id > life.machine.started_high, f"LIFT-3: {where} after {life.machine.started_high}")
        life.machine.started_high = round.id
        require(not life.stopped or round.group == FENCE_GROUP, f"LIFT-7: {where} and is stopped")
        if life.promised > view.id:
            attached = life.attached_round
            require(attached >= round.id, f"LIFT-7: {where} though it attached {attached} to {life.promised}")

    def fence_started(self, life: Life, decision: StartFence) -> None:
        round = decision.round
        view = self.view_of(life, round)
        self.starts(life, round, view)
        failed = {NodeIncarnation(entry.member.node, entry.member.incarnation) for entry in round.failed}
        wrong = failed.intersection(view.members) or failed & self.left
        require(not wrong, f"LIFT-2: {sorted(wrong)} are here or left, and {describe(round)}")

    def group_started(self, life: Life, decision: StartGroup) -> None:
        round = decision.round
        view = self.view_of(life, round)
        self.starts(life, round, view)
        where = f"node {life.me.node} starts {describe(round)} of {view}"
        behind = [member for member in view.members if (view.id, member) not in self.fence_passed]
        require(not behind, f"LIFT-4: {where} before {behind} passed FENCE")
        slots = [entry.slot for entry in (*round.members, *round.failed)]
        require(len(slots) == len(set(slots)), f"LIFT-1: {where}")
        self.check_members(round, view, where)
        self.check_below(life, decision, view, where)
        self.learn(life, round, view)
        life.newest[round.group] = round.id
        served = self.served.setdefault(round.group, {})
        for entry in round.members:
            if entry.member not in decision.local:
                continue
            joined = self.joins[view.id, round.id][entry.member]
            before = served.get(entry.member)
            again = before is not None and before.joined != joined
            require(not again, f"LIFT-8: {where}: {entry.member} joined again before its departure had finished")
            self.told.add((round.group, entry.member))
            if before is None:
                served[entry.member] = Served(round.id, entry.slot, joined)
                if joined > 1:
                    self.cluster.count("joined again")

    def check_members(self, round: Round, view: View, where: str) -> None:
        group = round.group
        joins = self.joins[view.id, round.id]
        for member, served in sorted(self.served.get(group, {}).items()):
            if served.first >= round.id or not self.knows(view, (group, member, served.joined)):
                continue
            failed = {entry.member for entry in round.failed}
            named = member in round.member_ids or member in failed or member in round.left
            require(named, f"LIFT-2: {where}, and {member} served since round {served.first}")
            if member in round.member_ids:
                require(round.slot_of(member) == served.slot, f"LIFT-1: {where}: {member} had slot {served.slot}")
        for entry in round.failed:
            participant = self.cluster.participants[entry.member]
            alive = participant.alive and participant.life.me in view.members
            require(not alive, f"LIFT-2: {where}: {entry.member} lives")
            joined = joins[entry.member]
            left = participant.left.get(group) == joined
            lives = [self.cluster.lives[member] for member in view.members]
            known = any((group, entry.member, joined) in life.known_left for life in lives)
            require(not (left and known), f"LIFT-2: {where}: {entry.member} left cleanly")
        for member in round.left:
            participant = self.cluster.participants[member]
            wanted = group not in participant.asked_to_leave and (group, member) in self.told
            require(not wanted, f"LIFT-2: {where}: {member} did not leave")
            last = self.served.get(group, {}).get(member)
            again = last is not None and last.joined > joins[member] and member not in round.member_ids
            again = again and self.knows(view, (group, member, last.joined))
            require(not again, f"LIFT-2: {where}: {member} served again and did not leave")
        for member in round.member_ids:
            joined = joins[member]
            require(joined > 0, f"LIFT-8: {where}: {member} never asked")
            departed = self.departed_before(view, (group, member, joined), round.id)
            require(not departed, f"LIFT-8: {where}: {member} departed in round {departed}")

    def check_below(self, life: Life, decision: StartGroup, view: View, where: str) -> None:
        round = decision.round
        stack = stack_of(round.group)
        if not stack:
            return
        level = self.levels[round.group]
        for name in sorted(self.levels):
            if name == round.group or stack_of(name) != stack:
                continue
            if self.levels[name] > level:
                runs = name in life.running()
                require(not runs or name in decision.stops, f"LIFT-5: {where} while {name} runs above it")
            elif self.levels[name] < level:
                self.check_one_below(name, round, view, where)
        above = [self.levels[name] for name in decision.stops]
        require(above == sorted(above, reverse=True), f"LIFT-5: {where}, stopping {decision.stops}")

    def check_one_below(self, name: str, round: Round, view: View, where: str) -> None:
        before = [key for key in self.rounds if self.rounds[key].group == name and key[1] < round.id]
        mine = [key for key in before if key[0] == view.id]
        if mine:
            newest = self.rounds[max(mine)]
            missing = set(newest.member_ids) - self.done[view.id, newest.id]
            require(not missing, f"LIFT-5: {where} before {sorted(missing)} did {describe(newest)}")
            return
        there = [
            member
            for member, served in sorted(self.served.get(name, {}).items())
            if served.first < round.id
            and NodeIncarnation(member.node, member.incarnation) in view.members
            and self.knows(view, (name, member, served.joined))
        ]
        require(not there, f"LIFT-5: {where} before any round of {name}, where {there} serve")

    def finished(self, life: Life, decision: FinishGroup) -> None:
        round = decision.round
        view = self.view_of(life, round)
        where = f"node {life.me.node} finishes {describe(round)}"
        require(not life.stopped, f"LIFT-7: {where} and is stopped")
        require(life.newest.get(round.group) == round.id, f"LIFT-6: {where} in {life.newest.get(round.group)}")
        missing = set(round.member_ids) - self.done[view.id, round.id]
        require(not missing, f"LIFT-6: {where} before {sorted(missing)} did it")
        life.finished[round.group] = round.id
        if (view.id, round.id) in self.finished_rounds:
            return
        self.finished_rounds.add((view.id, round.id))
        high = self.finished_high.get(round.group, 0)
        require(round.id > high, f"LIFT-3: {where} after round {high}")
        self.finished_high[round.group] = round.id
        self.cluster.count("finished")
        served = self.served.get(round.group, {})
        for member in departed_in(round):
            if member in served and served[member].first < round.id:
                del served[member]
                self.cluster.count("settled")

    # --- FENCE ---------------------------------------------------------------------------------------------------

    def active(self, life: Life, view: View) -> None:
        where = f"{view} is active on node {life.me.node}"
        require(not life.stopped, f"LIFT-7: {where} and is stopped")
        require(life.promised <= view.id, f"LIFT-7: {where}, which promised {life.promised}")
        behind = [member for member in view.members if (view.id, member) not in self.fence_passed]
        require(not behind, f"LIFT-4: {where} before {behind} passed FENCE")
        if view.id in self.active_views:
            return
        self.active_views.add(view.id)
        self.cluster.count("active views")
        owed = self.owed.difference(view.members)
        require(not owed, f"LIFT-2: {where} and nobody dealt with {sorted(owed)}")
        for other in self.cluster.lives.values():
            require(not other.acts or other.me in view.members, f"LIFT-2: {where} while {other.me} acts")
        self.owed.update(member for member in view.members if member not in self.left)  # it may hear of it late

    def settled(self, node: NodeIncarnation) -> None:
        """Fenced, averted, or left cleanly."""
        self.owed.discard(node)

    # --- disks and ends ------------------------------------------------------------------------------------------

    def written(self, before: LiftState, after: LiftState, node: int) -> None:
        require(after.round >= before.round, f"LIFT-3: node {node} had {before.round} on its disk, now {after.round}")

    def check_settled(self) -> None:
        """LIFT-10, and what everybody should agree on by now."""
        unsettled = self.cluster.unsettled()
        require(not unsettled, f"LIFT-10: {unsettled}")
        tables = {life.me.node: life.lift.groups for life in self.cluster.running()}
        first = min(tables)
        for node in sorted(tables):
            require(tables[node] == tables[first], f"LIFT-9: nodes {first} and {node} hold different tables")


def describe(round: Round) -> str:
    members = " ".join(f"{entry.member}@{entry.slot}" for entry in round.members)
    failed = " ".join(f"{entry.member}@{entry.slot}" for entry in round.failed)
    left = " ".join(map(str, round.left))
    return f"round {round.id} of {round.group} {{{members}}} failed [{failed}] left [{left}]"
