"""What the two cman engines are told and what they report. Messages are in `wire.py`.

HeartbeatEngine  in:  PeerUp, PeerDown (api.comm), Received, Accepted, Installed, RecordChanged, FlagsChanged, Proved,
                      TICK
                 out: LinkUp, LinkDown, ConnectivityChanged, LeaseExtended, LeaseLapsed
MembershipEngine in:  PeerUp, PeerDown, Received, ConnectivityChanged, Attach, Active, Leave, ServicesStopped,
                      KnownElsewhere, FencingNow, Expel, TICK
                 out: Stop, Accepted, Installed, RecordChanged, FlagsChanged, Excluded, Outdated, Left, CleanlyStopped
Whoever runs them passes ConnectivityChanged to the MembershipEngine, and Accepted, Installed, RecordChanged and
FlagsChanged to the HeartbeatEngine, in the same loop turn.
"""

from typing import NamedTuple

from corral.base.ids import Incarnation, NodeId, NodeIncarnation, ViewId
from corral.base.time import Instant
from corral.base.view import QuorumRecord, View


class Row(NamedTuple):
    """One node as it describes itself: one line of the connectivity matrix."""

    incarnation: Incarnation
    up: frozenset[NodeId]
    flags: int


class ConnectivityChanged(NamedTuple):
    """Rows of this node and of every node whose link is up."""

    rows: dict[NodeId, Row]


class LinkUp(NamedTuple):
    node: NodeId
    incarnation: Incarnation


class LinkDown(NamedTuple):
    node: NodeId
    incarnation: Incarnation
    reason: str


class LeaseExtended(NamedTuple):
    """This node may act until then, on its own clock."""

    until: Instant


class LeaseLapsed(NamedTuple):
    """`until` has passed without an extension."""

    until: Instant


class Proved(NamedTuple):
    """POWERED: neither that incarnation nor a client of it can do anything any more, so its lease need not be waited
    for."""

    node: NodeId
    incarnation: Incarnation


class FlagsChanged(NamedTuple):
    """WILLING, FORGOTTEN, STATEFUL as the MembershipEngine sees them; QUIET is the HeartbeatEngine's own."""

    flags: int


class Attach(NamedTuple):
    """The answer to Stop: everything of the view before has stopped, and this is what the promise `id` brings along,
    opaque to cman's agreement. The promise leaves now."""

    id: ViewId
    data: bytes


class Active(NamedTuple):
    """The round of this view has passed FENCE on every member."""

    id: ViewId


class Leave(NamedTuple):
    """Every participant of this node is gone: leave the cluster cleanly."""


class ServicesStopped(NamedTuple):
    """After Left(clean): corrald's own services stopped and `HeartbeatEngine.echoes_end()` has passed."""


class KnownElsewhere(NamedTuple):
    """comm: a node of the cluster refuses this one, because it has met this higher incarnation of it."""

    known: Incarnation


class FencingNow(NamedTuple):
    """The nodes that an agent works on, as far as is known here: none of them joins meanwhile (WAIT of DESIGN 5)."""

    nodes: frozenset[NodeId]


class Expel(NamedTuple):
    """This member is to be fenced: leave that incarnation out from now on. Told to every member."""

    member: NodeIncarnation


class Stop(NamedTuple):
    """A promise is durable: everything stops at once, and Attach answers. Only Installed ends it."""

    id: ViewId


class Accepted(NamedTuple):
    """Durable here. From now on only its members are echoed."""

    view: View


class Installed(NamedTuple):
    """Every member has accepted. Everything below is the same on every member."""

    view: View
    record: QuorumRecord
    attachments: tuple[tuple[NodeIncarnation, bytes], ...]  # by node
    accepted: tuple[View, ...]  # quorate views any member accepted before, from the newest active one on, oldest first
    active: ViewId  # newest active view any member knew
    left: tuple[NodeIncarnation, ...]  # clean leavers since then: no victims
    unclean: tuple[NodeIncarnation, ...]  # members that avert no fence: stateful, or without memory


class RecordChanged(NamedTuple):
    record: QuorumRecord


class Excluded(NamedTuple):
    """A quorate view goes on without this incarnation: kill the participants, start again as a new one."""

    view: View


class Outdated(NamedTuple):
    """Others know this incarnation or a later one of this node: start again above `known`, without memory."""

    known: Incarnation


class Left(NamedTuple):
    """The removal is installed (clean), or nobody ordered it in time."""

    clean: bool


class CleanlyStopped(NamedTuple):
    """The clean stop is on disk; the process may end."""
