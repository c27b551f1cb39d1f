"""What goes into the LiftEngine and what it decides (`lift.py` says when)."""

from typing import final

from corral.base.engine import Received, Tick
from corral.base.ids import MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.view import Round, View
from corral.base.world import ProcessId
from corral.cman.groups import Group
from corral.cman.lift_wire import Attachment, LiftMessage

# --- events ----------------------------------------------------------------------------------------------------------


@final
class Promised:
    """This node promised a proposal: stop everything, and say with which table (Stopped)."""

    __slots__ = ("id",)

    def __init__(self, id: ViewId) -> None:
        self.id = id


@final
class Installed:
    """A view, with what each member attached to its promise. The same on every member.

    `accepted`: the newest active view any member knew and every quorate view accepted since; `first`: none was ever
    active. `left`: who left cleanly since then. `unclean`: members whose rejoin averts no fence.
    """

    __slots__ = ("accepted", "attachments", "first", "left", "unclean", "view")

    def __init__(
        self,
        view: View,
        attachments: dict[NodeIncarnation, Attachment],
        accepted: tuple[View, ...],
        *,
        first: bool,
        left: tuple[NodeIncarnation, ...] = (),
        unclean: tuple[NodeIncarnation, ...] = (),
    ) -> None:
        self.view = view
        self.attachments = attachments
        self.accepted = accepted
        self.first = first
        self.left = left
        self.unclean = unclean


@final
class LocalJoin:
    """A participant of this node asks to join a group. Kept until it is a member, also across views.

    Each is answered by its first StartGroup or by Refused, or given up by LocalLeave, which is answered by Left. Only
    then may that participant ask to join that group again.
    """

    __slots__ = ("address", "group", "level", "member", "process", "slots", "ticket")

    def __init__(
        self, member: MemberId, group: str, level: int, slots: int, address: str, ticket: bytes, process: ProcessId
    ) -> None:
        self.member = member
        self.group = group
        self.level = level
        self.slots = slots
        self.address = address
        self.ticket = ticket
        self.process = process


@final
class LocalLeave:
    """A participant leaves a group cleanly, having finished with it."""

    __slots__ = ("group", "member")

    def __init__(self, member: MemberId, group: str) -> None:
        self.member = member
        self.group = group


@final
class LocalGone:
    """A participant of this node is *gone*, by proof."""

    __slots__ = ("member",)

    def __init__(self, member: MemberId) -> None:
        self.member = member


@final
class LocalDone:
    """A local member (for FENCE: the node itself) has started that round."""

    __slots__ = ("group", "member", "round_id")

    def __init__(self, member: MemberId, group: str, round_id: int) -> None:
        self.member = member
        self.group = group
        self.round_id = round_id


@final
class LocalReach:
    """A local member lost its session to a peer of its group, or has it again."""

    __slots__ = ("down", "group", "member", "peer")

    def __init__(self, member: MemberId, group: str, peer: MemberId, down: bool) -> None:
        self.member = member
        self.group = group
        self.peer = peer
        self.down = down


@final
class Fenced:
    """An incarnation is cut off, or its fence was averted by a clean rejoin."""

    __slots__ = ("node",)

    def __init__(self, node: NodeIncarnation) -> None:
        self.node = node


LiftEvent = (
    Promised
    | Installed
    | LocalJoin
    | LocalLeave
    | LocalGone
    | LocalDone
    | LocalReach
    | Fenced
    | Received[LiftMessage]
    | Tick
)


# --- decisions -------------------------------------------------------------------------------------------------------


@final
class StopAll:
    """Every group stops, from the top."""

    __slots__ = ()


@final
class StartFence:
    __slots__ = ("absent", "clean", "round", "startup")

    def __init__(
        self, round: Round, clean: frozenset[NodeIncarnation], startup: bool, absent: tuple[NodeId, ...]
    ) -> None:
        self.round = round
        self.clean = clean
        self.startup = startup
        self.absent = absent


@final
class StartGroup:
    """Stop `stops` (groups above it in its stack, topmost first) and the group itself, then start it here."""

    __slots__ = ("group", "local", "round", "stops")

    def __init__(self, group: Group, round: Round, local: tuple[MemberId, ...], stops: tuple[str, ...]) -> None:
        self.group = group
        self.round = round
        self.local = local
        self.stops = stops


@final
class FinishGroup:
    __slots__ = ("group", "round")

    def __init__(self, group: str, round: Round) -> None:
        self.group = group
        self.round = round


@final
class ViewActive:
    __slots__ = ("view",)

    def __init__(self, view: View) -> None:
        self.view = view


@final
class Left:
    """The departure of a local member from a group has been ordered."""

    __slots__ = ("group", "member")

    def __init__(self, member: MemberId, group: str) -> None:
        self.member = member
        self.group = group


@final
class Refused:
    __slots__ = ("group", "member", "reason")

    def __init__(self, member: MemberId, group: str, reason: str) -> None:
        self.member = member
        self.group = group
        self.reason = reason


@final
class EvictLocal:
    __slots__ = ("member", "reason")

    def __init__(self, member: MemberId, reason: str) -> None:
        self.member = member
        self.reason = reason


@final
class Stopped:
    """The answer to Promised: what this node attaches to that promise. Until a view is installed nothing changes it."""

    __slots__ = ("attachment", "id")

    def __init__(self, id: ViewId, attachment: Attachment) -> None:
        self.id = id
        self.attachment = attachment
