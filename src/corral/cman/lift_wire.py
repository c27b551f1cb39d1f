"""Messages and records of recovery control (port LIFT). Tags and fields are append-only."""

import msgspec

from corral.base.ids import MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.view import Round
from corral.base.world import ProcessId
from corral.cman.groups import Group
from corral.wire.codec import Codec


class Begin(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Coordinator to all: `round` of `group` begins. For FENCE `group` is None and the last three fields count."""

    view: ViewId
    sequence: int
    round: Round
    group: Group | None
    clean: tuple[NodeIncarnation, ...] = ()
    startup: bool = False
    absent: tuple[NodeId, ...] = ()


class Done(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Member to coordinator: everything of ours in that group has started."""

    view: ViewId
    round: int
    group: str


class Finish(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Coordinator to all: every member has started."""

    view: ViewId
    round: int
    group: str


class Join(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    view: ViewId
    group: str
    level: int
    slots: int
    member: MemberId
    address: str
    ticket: bytes
    process: ProcessId


class Depart(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """A participant left `group` (clean) or is *gone* (not clean; then of every group, and `group` is empty)."""

    view: ViewId
    group: str
    member: MemberId
    clean: bool


class Refuse(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    view: ViewId
    group: str
    member: MemberId
    departure: bool  # a Depart is refused: there is nothing to leave. Else a Join
    reason: str


class Unreachable(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """`member` lost its session to `peer` in `group` (down), or has one again."""

    view: ViewId
    group: str
    member: MemberId
    peer: MemberId
    down: bool


class Evict(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    view: ViewId
    member: MemberId
    reason: str


LiftMessage = Begin | Done | Finish | Join | Depart | Refuse | Unreachable | Evict
CODEC: Codec[LiftMessage] = Codec((Begin, Done, Finish, Join, Depart, Refuse, Unreachable, Evict))


class Identity(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The processes of one incarnation that anybody has seen: what the `process` agent must see gone."""

    node: NodeIncarnation
    processes: tuple[ProcessId, ...]


class LiftState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one node keeps on disk: the highest round begun, and of the members of the newest active view and of those
    accepted since, who was fenced or averted, and by which processes they would be recognised."""

    round: int = 0
    fenced: tuple[NodeIncarnation, ...] = ()
    identities: tuple[Identity, ...] = ()


class Attachment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a member says of itself in its promise. Every member of the new view gets all of them."""

    state: LiftState
    process: ProcessId
    table_view: ViewId
    table_sequence: int
    last_number: int
    table: tuple[Group, ...]


STATE_CODEC: Codec[LiftState] = Codec((LiftState,))
ATTACHMENT_CODEC: Codec[Attachment] = Codec((Attachment,))
