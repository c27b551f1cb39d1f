"""What travels over corrald's Unix socket, and over its lock service's (docs/format/ipc.md).

Whole messages, each one msgspec array with an integer tag. Tags below 32 are spoken to corrald, 32 and up by it; lock
service messages start at 64. Tags and fields are append-only.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from corral.api.cman import Peer
from corral.api.dlm import Completion, LockWaits, Request
from corral.base.ids import MemberId
from corral.base.view import Round, View
from corral.wire.codec import MESSAGE_MAX, Codec

IPC_VERSION: Final = 1
PARTICIPANT: Final = "participant"
CLIENT: Final = "client"


# --- to corrald ------------------------------------------------------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """First message. `role`: PARTICIPANT (gets a serial and a line of the page) or CLIENT. `purpose` is for humans."""

    version: int
    role: str
    purpose: str = ""


class Register(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    group: str
    level: int
    slots: int
    address: str
    ticket: bytes


class Deregister(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    group: str


class StartDone(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    group: str
    round: int


class Reach(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    group: str
    peer: MemberId
    down: bool


class Ask(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """A question or command of a person: answered by one `Answer` with the same id."""

    id: int
    what: str
    arguments: dict[str, Any] = {}


class Watch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """From now on send `ViewNow` whenever it changes (and at once)."""


class Waits(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """What a start under way here waits for, for people; empty: nothing but its own work."""

    group: str
    what: str


ToCorrald = Attach | Register | Deregister | StartDone | Reach | Ask | Watch | Waits
TO_CORRALD: Codec[ToCorrald] = Codec((Attach, Register, Deregister, StartDone, Reach, Ask, Watch, Waits))


# --- from corrald ----------------------------------------------------------------------------------------------------


class Attached(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=32):
    me: MemberId  # a client gets corrald's own
    cluster: str
    page: str
    page_slot: int
    lock_socket: str
    host: str  # where this node's members listen
    detect_ns: int
    recover_ns: int
    cluster_uuid: bytes


class StopGroups(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=33):
    """Stop these, in this order; empty: all, from the top."""

    groups: tuple[str, ...]


class StartRound(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=34):
    round: Round
    number: int
    peers: tuple[Peer, ...]


class FinishRound(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=35):
    group: str
    round: int


class JoinRefused(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=36):
    group: str
    reason: str


class LeftGroup(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=37):
    group: str


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=38):
    """`error` empty: it was done, `body` is the result; else one sentence with cause and next step."""

    id: int
    error: str
    body: Any = None


class ViewNow(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=39):
    view: View | None
    active: bool


class Refusal(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=40):
    """corrald closes the connection after this."""

    reason: str


FromCorrald = Attached | StopGroups | StartRound | FinishRound | JoinRefused | LeftGroup | Answer | ViewNow | Refusal
FROM_CORRALD: Codec[FromCorrald] = Codec(
    (Attached, StopGroups, StartRound, FinishRound, JoinRefused, LeftGroup, Answer, ViewNow, Refusal)
)


# --- lock service ----------------------------------------------------------------------------------------------------


class OpenSpace(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=64):
    space: int  # the client's own number for it
    name: str
    value_size: int
    exclusive: bool = False  # refuse if this node is in the lockspace already


class SubmitBatch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=65):
    """(handle, cookie, request) each. Handles and cookies are the client's own; a completion brings both back. With
    the cookie 0 none comes."""

    space: int
    requests: list[tuple[int, int, Request]]


class CloseSpace(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=66):
    """Frees every lock of this client in the space."""

    space: int


class ReleaseSpace(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=67):
    """This node leaves the lockspace, for every client here, unless it is busy for that `force`."""

    space: int
    force: int


class Opened(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=80):
    """`error` empty: requests may be submitted. `page_slot` and `serial` are the lock service's, as in the page."""

    space: int
    error: str
    page_slot: int = 0
    serial: int = 0


class CompletedBatch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=81):
    space: int
    completions: list[tuple[int, int, Completion]]


class BlockingBatch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=82):
    """(handle, mode) each: somebody wants `mode` and this lock is in the way."""

    space: int
    blocked: list[tuple[int, int]]


class SpaceGone(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=83):
    """Every lock of this space is lost for good."""

    space: int
    reason: str


class Released(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=84):
    """`error` empty: this node has left the lockspace; the client's number for it is free."""

    space: int
    error: str


class SpaceSuspended(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=85):
    """A recovery of this space has begun, or the last one has finished."""

    space: int
    suspended: bool


class WaitingTold(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=86):
    """A request of this client has waited for longer than is normal."""

    space: int
    waits: LockWaits


ToLockService = OpenSpace | SubmitBatch | CloseSpace | ReleaseSpace
TO_LOCK_SERVICE: Codec[ToLockService] = Codec((OpenSpace, SubmitBatch, CloseSpace, ReleaseSpace))
FromLockService = Opened | CompletedBatch | BlockingBatch | SpaceGone | Released | SpaceSuspended | WaitingTold
FROM_LOCK_SERVICE: Codec[FromLockService] = Codec(
    (Opened, CompletedBatch, BlockingBatch, SpaceGone, Released, SpaceSuspended, WaitingTold)
)


def in_messages(codec: Codec[Any], batch: Callable[[list[Any]], Any], items: list[Any]) -> list[bytes]:
    """`batch(items)` encoded, in as many messages as it takes for none to be longer than a stream carries: values and
    reports have no common size. One item fits always."""
    payload = codec.encode(batch(items))
    if len(payload) <= MESSAGE_MAX or len(items) == 1:
        return [payload]
    middle = len(items) // 2
    return in_messages(codec, batch, items[:middle]) + in_messages(codec, batch, items[middle:])
