"""What a node keeps on disk about membership, as a fold over its log.

`State.apply(record)` is the only way state changes, live and at recovery, so that what is in memory is what the log
says. Write order and meaning of the records: `wire.py`. A start goes

    state = recover(records); incarnation = state.next_incarnation(wall_seconds)
    append Started(incarnation), durably, before anything of this life leaves the node

A node *has memory* while it holds a quorum record; `first_state` writes it for a new cluster, else a quorate view does.

CMAN-4   The promised epoch never falls, across crashes too.
"""

from collections.abc import Iterable
from typing import Final, final

from corral.base.ids import NO_VIEW, Incarnation, NodeId, NodeIncarnation, ViewId
from corral.base.view import QuorumRecord, View
from corral.cman.wire import (
    AcceptedView,
    ActiveView,
    CleanStop,
    ExcludedBy,
    Forgotten,
    InstalledView,
    Known,
    Promised,
    Record,
    RecordHeld,
    Started,
)

ACCEPTED_MAX: Final = 16  # quorate views kept since the active one; older ones are united beyond that


@final
class State:
    """The fold. Fields are read freely and changed by `apply` alone."""

    __slots__ = (
        "accepted",
        "accepted_id",
        "active",
        "clean_stop",
        "excluded",
        "incarnation",
        "installed",
        "known",
        "left",
        "promised",
        "record",
        "since",
    )

    def __init__(self) -> None:
        self.incarnation: Incarnation = 0  # of the newest life; 0: never ran
        self.clean_stop = False
        self.record: QuorumRecord | None = None
        self.promised: ViewId = NO_VIEW
        self.accepted_id: ViewId = NO_VIEW  # newest accepted, quorate or not
        self.accepted: list[View] = []  # quorate ones from the newest active on, oldest first
        self.left: tuple[NodeIncarnation, ...] = ()
        self.installed: ViewId = NO_VIEW
        self.active: ViewId = NO_VIEW
        self.excluded = False
        self.known: dict[NodeId, Incarnation] = {}  # highest seen in an accepted view
        self.since: dict[NodeId, int] = {}  # epoch of the first such view

    @property
    def newest(self) -> View | None:
        """The newest quorate view accepted here."""
        return self.accepted[-1] if self.accepted else None

    @property
    def quiet(self) -> bool:
        """Must a life that starts on this state be quiet at first? (Ask before its Started is applied.)"""
        return not self.clean_stop and (self.incarnation != 0 or self.record is None)

    def next_incarnation(self, wall_seconds: int) -> Incarnation:
        return max(self.incarnation + 1, wall_seconds)

    def apply(self, record: Record) -> None:
        if isinstance(record, Promised):
            assert record.id.epoch > self.promised.epoch, "CMAN-4"
            self.promised = record.id
        elif isinstance(record, AcceptedView):
            self._accept(record)
        elif isinstance(record, InstalledView):
            self.installed = record.id
            self.excluded = False
        elif isinstance(record, ActiveView):
            self._activate(record.id)
        elif isinstance(record, RecordHeld):
            self.record = record.record
        elif isinstance(record, Started):
            self.incarnation = record.incarnation
            self.clean_stop = False
        elif isinstance(record, CleanStop):
            self.clean_stop = True
        elif isinstance(record, ExcludedBy):
            self.excluded = True
        elif isinstance(record, Forgotten):
            self.incarnation = max(self.incarnation, record.known)
            self.record = None
        elif isinstance(record, Known):
            self.known = {member.node: member.incarnation for member in record.incarnations}
            self.since = {member.node: epoch for member, epoch in zip(record.incarnations, record.since, strict=False)}

    def _accept(self, record: AcceptedView) -> None:
        view = record.view
        self.accepted_id = view.id
        for member in view.members:
            if member.incarnation > self.known.get(member.node, 0):
                self.known[member.node] = member.incarnation
                self.since[member.node] = view.id.epoch
        self.left = record.left
        if record.active > self.active:
            self._activate(record.active)
            self.left = record.left
        if view.quorate:
            self.accepted.append(view)
            if len(self.accepted) > ACCEPTED_MAX:
                # The first may be the active one and the last is the newest: unite two between them.
                self.accepted[1:3] = [united(self.accepted[1], self.accepted[2])]

    def _activate(self, view_id: ViewId) -> None:
        if view_id > self.active:
            self.active = view_id
            self.accepted = [view for view in self.accepted if view.id >= view_id or view is self.accepted[-1]]
            if view_id == self.accepted_id:
                self.left = ()

    def compact(self) -> list[Record]:
        """The shortest log with the same fold, for `Store.replace`."""
        nodes = sorted(self.known)
        records: list[Record] = [
            Known(tuple(NodeIncarnation(n, self.known[n]) for n in nodes), tuple(self.since[n] for n in nodes))
        ]
        if self.incarnation:
            records.append(Started(self.incarnation))
        if self.clean_stop:
            records.append(CleanStop())
        if self.record is not None:
            records.append(RecordHeld(self.record))
        if self.active != NO_VIEW:
            records.append(ActiveView(self.active))
        for view in self.accepted:
            records.append(AcceptedView(view, self.left))
        if self.accepted_id != (self.accepted[-1].id if self.accepted else NO_VIEW):
            records.append(AcceptedView(View(self.accepted_id, (), False), self.left))
        if self.installed != NO_VIEW:
            records.append(InstalledView(self.installed))
        if self.promised != NO_VIEW:
            records.append(Promised(self.promised))
        if self.excluded:
            records.append(ExcludedBy(self.installed))
        return records


def united(older: View, newer: View) -> View:
    """One entry for two views: whoever was a member of either may have run services."""
    return View(newer.id, tuple(sorted(set(older.members) | set(newer.members))), newer.quorate)


def recover(records: Iterable[Record]) -> State:
    state = State()
    for record in records:
        state.apply(record)
    return state


def first_state(record: QuorumRecord) -> list[Record]:
    """What `corral init` and `corral up` write for each node of a new cluster."""
    return [RecordHeld(record)]
