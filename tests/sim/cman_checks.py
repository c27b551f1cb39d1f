"""The invariants of cman, as seen from outside the engines: from disks, from what is emitted, from who serves.

CMAN-1  quorate views have different epochs, and no view id means two views
CMAN-2  when a view is installed anywhere, every member has accepted it on its disk
CMAN-3  what is accepted on a disk is what that disk promised last
CMAN-4  the epoch promised on a disk never falls
CMAN-5  an incarnation left out of an installed quorate view is in no later one
CMAN-9  a member without memory is not needed for the quorum of any view
CMAN-10 at every instant the processes that serve are all in one active view
CMAN-11 after the faults end, one quorate, active view of all nodes serves within a bound
CMAN-12 what Installed says is the same on every member
CMAN-13 every view that was ever active is known to each later installed quorate view
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corral.base.ids import NodeIncarnation
from corral.base.view import View
from corral.cman import wire
from corral.cman.events import Installed
from corral.cman.state import recover

if TYPE_CHECKING:
    from tests.sim.cman_cluster import Node


class Violation(AssertionError):
    """An invariant does not hold; the message begins with its number."""


class Checks:
    """The watching half of `Cluster`."""

    def remembers(self, node: Node) -> bool:
        return recover(map(wire.RECORDS.decode, node.log)).record is not None

    def check_write(self, node: Node, record: Any) -> None:
        if isinstance(record, wire.Promised):
            before = [r for r in map(wire.RECORDS.decode, node.log[:-1]) if isinstance(r, wire.Promised)]
            if before and record.id.epoch <= before[-1].id.epoch:
                raise Violation(f"CMAN-4: node {node.node} promised {before[-1].id}, now {record.id}")
            if self.remembers(node):
                self.promised_with_memory.setdefault(record.id, set()).add(node.node)
        elif isinstance(record, wire.AcceptedView):
            promises = [r for r in map(wire.RECORDS.decode, node.log) if isinstance(r, wire.Promised)]
            if not promises or promises[-1].id != record.view.id:
                raise Violation(f"CMAN-3: node {node.node} accepted {record.view} over another promise")
            member = NodeIncarnation(node.node, record.view.incarnation_of(node.node) or 0)
            self.accepted_on_disk.setdefault(record.view.id, set()).add(member)

    def check_accepted(self, node: Node, view: View) -> None:
        known = self.views.setdefault(view.id, view)
        if known != view:
            raise Violation(f"CMAN-1: {view.id} is both {known} and {view}")
        if view.quorate and not self.record.quorate(self.promised_with_memory.get(view.id, set())):
            raise Violation(f"CMAN-9: {view} has a quorum only with nodes that have no memory")
        if view.quorate:
            other = self.quorate_epochs.setdefault(view.id.epoch, view)
            if other.id != view.id:
                raise Violation(f"CMAN-1: quorate {other} and {view} share an epoch")

    def check_installed(self, node: Node, event: Installed) -> None:
        view = event.view
        self.count("installed")
        missing = set(view.members) - self.accepted_on_disk.get(view.id, set())
        if missing:
            raise Violation(f"CMAN-2: node {node.node} installed {view}, not accepted by {sorted(missing)}")
        said = self.said.setdefault(view.id, event)
        if said != event:
            raise Violation(f"CMAN-12: node {node.node} was told {event}, another {said}")
        if view.quorate:
            self.installed_quorate[view.id.epoch] = view
            self.check_history(event)

    def check_history(self, event: Installed) -> None:
        """What must be fenced is counted from the newest active view: none may be missed."""
        for active in self.active_views.values():
            if event.active < active.id < event.view.id and active not in event.accepted:
                united = {member for view in event.accepted for member in view.members}
                if not united.issuperset(active.members):
                    raise Violation(f"CMAN-13: {event.view} does not know that {active} was active")

    def check_serving(self, node: Node) -> None:
        mine = node.serving()
        if mine is None:
            return
        self.count("service starts")
        for other in self.nodes.values():
            theirs = other.serving()
            if theirs is not None and theirs != mine:
                raise Violation(f"CMAN-10: node {node.node} serves in {mine} while {other.node} serves in {theirs}")
            for zombie in other.zombies:
                if zombie.view != mine and other.clock() < zombie.lease_until:
                    raise Violation(
                        f"CMAN-10: node {node.node} serves in {mine}, a participant of {other.node} in {zombie.view}"
                    )

    def check_sequence(self) -> None:
        lost: set[NodeIncarnation] = set()
        before: View | None = None
        for epoch in sorted(self.installed_quorate):
            view = self.installed_quorate[epoch]
            back = lost.intersection(view.members)
            if back:
                raise Violation(f"CMAN-5: {sorted(back)} came back in {view}")
            if before is not None:
                lost |= set(before.members) - set(view.members)
            before = view
