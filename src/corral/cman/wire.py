"""Messages of cman, and the records it keeps (docs/format/wire.md).

`HEARTBEATS` travel as datagrams between HeartbeatEngines, `MESSAGES` over PORT_CMAN between MembershipEngines,
`RECORDS` go to the log of the MembershipEngine. Tags are append-only, fields are only appended.
"""

from typing import Final

import msgspec

from corral.base.ids import NO_VIEW, Incarnation, NodeId, NodeIncarnation, ViewId
from corral.base.view import QuorumRecord, View
from corral.wire.codec import Codec

# Flags of a node, in heartbeats and promises.
WILLING: Final = 1  # wants to be a member
QUIET: Final = 2  # neither votes nor echoes: an earlier life may have echoed less than L(1 + rho) ago
FORGOTTEN: Final = 4  # has no memory: neither votes nor echoes until a quorate view has given it one
STATEFUL: Final = 8  # participants of an earlier incarnation may still be there: never averts a fence

# Why a Prepare was answered by Nack.
PROMISED: Final = 1  # a higher epoch, which the Nack carries
UNWILLING: Final = 2  # leaving or excluded
UNREACHABLE: Final = 3  # the link to another member of the proposal is not up from here
DISPLACING: Final = 4  # a newcomer's proposal leaves out a member of a quorate view that is well
OUTDATED: Final = 5  # a later incarnation of the proposer is known
WAIT: Final = 6  # a fence agent works on a node that this proposal would let in

EPOCH_MAX: Final = 1 << 60  # a larger one is a peer's mistake: at a million views a second it takes 36,000 years
EPOCH_JUMP_MAX: Final = 1 << 32  # nor does an epoch rise by this much between two meetings
ATTACHMENT_MAX: Final = 64 << 10


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """`ack`: I hear you (links). `echo`: I count you as a living member of the newest view I accepted (the lease)."""

    counter: int
    to: Incarnation
    ack: int
    echo: int
    up: tuple[NodeId, ...]
    accepted: ViewId
    installed: ViewId
    flags: int


HEARTBEATS: Final[Codec[Heartbeat]] = Codec([Heartbeat])


class Status(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """First on every session, and to those left out when a view was installed."""

    promised: ViewId
    installed: ViewId
    newest: View | None  # newest quorate view the sender knows to have been accepted by anybody
    known: Incarnation  # highest incarnation of the receiver in any view the sender accepted
    since: int = 0  # epoch of the first view in which the sender accepted that incarnation


class Prepare(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    epoch: int
    members: tuple[NodeIncarnation, ...]


class Promise(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    epoch: int
    accepted: tuple[View, ...]  # quorate views accepted, the newest active one and all since, oldest first
    left: tuple[NodeIncarnation, ...]  # clean leavers since the newest active view
    installed: ViewId
    active: ViewId
    record: QuorumRecord | None
    flags: int
    attachment: bytes


class Nack(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    epoch: int
    promised: ViewId
    reason: int


class Carried(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one member brings into a view."""

    member: NodeIncarnation
    flags: int
    attachment: bytes


class Propose(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    view: View
    record: QuorumRecord
    carried: tuple[Carried, ...]
    accepted: tuple[View, ...]  # what the members' promises told, united
    left: tuple[NodeIncarnation, ...]
    active: ViewId  # newest active view any member knows


class Accept(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    id: ViewId


class Install(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    id: ViewId


class Reform(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """To the coordinator: I am stopped at this promise, or (`broken`) a session between two members of it broke."""

    promised: ViewId
    broken: bool


class Leaving(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """My participants are gone: leave me out, I am no victim."""

    incarnation: Incarnation


class Removed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """A view without you, which marks you as left, is installed."""

    id: ViewId


Message = Status | Prepare | Promise | Nack | Propose | Accept | Install | Reform | Leaving | Removed
MESSAGES: Final[Codec[Message]] = Codec(
    [Status, Prepare, Promise, Nack, Propose, Accept, Install, Reform, Leaving, Removed]
)


# --- records -------------------------------------------------------------------------------------------------------


class Started(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A life began. Durable before anything of it leaves the node."""

    incarnation: Incarnation


class CleanStop(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Everything stopped, the removal installed, no echo of mine can still hold up a lease."""


class RecordHeld(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """The quorum record in force here; with it comes memory."""

    record: QuorumRecord


class Promised(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    id: ViewId


class AcceptedView(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    view: View
    left: tuple[NodeIncarnation, ...] = ()
    active: ViewId = NO_VIEW


class InstalledView(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    id: ViewId


class ActiveView(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    id: ViewId


class ExcludedBy(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """The next life waits until its links were whole for `recover`; an installed view clears it."""

    id: ViewId


class Forgotten(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Others hold this incarnation of mine, which I do not remember: memory is lost."""

    known: Incarnation


class Known(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """Highest incarnation of each node ever seen in an accepted view, and that view's epoch (compaction only)."""

    incarnations: tuple[NodeIncarnation, ...]
    since: tuple[int, ...] = ()


Record = (
    Started
    | CleanStop
    | RecordHeld
    | Promised
    | AcceptedView
    | InstalledView
    | ActiveView
    | ExcludedBy
    | Forgotten
    | Known
)
RECORDS: Final[Codec[Record]] = Codec(
    [
        Started,
        CleanStop,
        RecordHeld,
        Promised,
        AcceptedView,
        InstalledView,
        ActiveView,
        ExcludedBy,
        Forgotten,
        Known,
    ]
)
