"""What comm itself says over a connection: the bodies of HELLO, WELCOME, REFUSE and CLOSE (docs/format/wire.md).

The frame's kind names the body; the tag inside repeats it, so a body under the wrong kind does not decode. Everything a
peer may choose is bounded here: a body that decodes is at most a few hundred bytes of memory.
"""

from typing import Annotated, Any, Final

import msgspec

from corral.base.errors import PeerError
from corral.base.ids import NAME_MAX, NODE_MAX, MemberId
from corral.wire import frame
from corral.wire.codec import Codec

BODY_MAX: Final = 1024  # bytes of a HELLO, WELCOME, REFUSE or CLOSE; ours stay far below
TICKET_MAX: Final = 64
KEY_HALF: Final = 32
REASON_MAX: Final = 200  # characters of a sentence meant for a person
NUMBER_MAX: Final = (1 << 63) - 1
KNOWN_MAX: Final = 1 << 53  # a higher incarnation of ours that a peer claims to know is its mistake
SERIAL_MAX: Final = (1 << 32) - 1

Number = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=REASON_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_MAX)]
Uuid = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Ticket = Annotated[bytes, msgspec.Meta(max_length=TICKET_MAX)]
KeyHalf = Annotated[bytes, msgspec.Meta(min_length=KEY_HALF, max_length=KEY_HALF)]

# Feature masks: a peer's unknown *compatible* bits are ignored; unknown *incompatible* bits mean we must not talk.
# The middle one (read-only compatible) has no meaning on the wire yet and is carried for symmetry with the disk.
COMPATIBLE: Final = 0
READ_ONLY_COMPATIBLE: Final = 0
INCOMPATIBLE: Final = 0

# Why a hello was refused. Append-only.
REFUSE_WAIT: Final = 1  # not (or not yet, or no longer) expected here: try again
REFUSE_CLUSTER: Final = 2  # another cluster's name or uuid
REFUSE_MEMBER: Final = 3  # the member id is not one the certificate's node may use
REFUSE_INCARNATION: Final = 4  # a newer incarnation of that node has been seen
REFUSE_TICKET: Final = 5
REFUSE_TARGET: Final = 6  # whoever was called, it is not this process
REFUSE_SIDE: Final = 7  # the lower member id connects, not this one
REFUSE_ATTEMPT: Final = 8  # an older connection attempt than one already seen
REFUSE_SESSION: Final = 9  # the session to resume is over or was never known here
REFUSE_VERSION: Final = 10  # no common wire version, or an unknown incompatible feature
REFUSE_PROTOCOL: Final = 11  # numbers that cannot be

REFUSALS: Final = {
    REFUSE_WAIT: "not expected here",
    REFUSE_CLUSTER: "another cluster",
    REFUSE_MEMBER: "member id does not fit the certificate",
    REFUSE_INCARNATION: "stale incarnation",
    REFUSE_TICKET: "wrong ticket",
    REFUSE_TARGET: "another process was called",
    REFUSE_SIDE: "the wrong side connected",
    REFUSE_ATTEMPT: "stale connection attempt",
    REFUSE_SESSION: "unknown session",
    REFUSE_VERSION: "no common wire version",
    REFUSE_PROTOCOL: "impossible numbers",
}

# Why a session was ended by a word instead of a broken connection. Append-only.
CLOSE_LEAVING: Final = 1  # the process shuts down in order
CLOSE_DROPPED: Final = 2  # the peer is no longer wanted
CLOSE_OVERFLOW: Final = 3  # the queue towards the peer passed its byte bound
CLOSE_STALLED: Final = 4  # the peer acknowledged nothing for too long
CLOSE_PROTOCOL: Final = 5  # the peer sent what it must not


class Hello(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=frame.HELLO):
    """First frame of whoever connects. `attempt` rises with every connection a process ever tries and becomes the
    number of the session when `resume` is 0. `target.incarnation` 0: whichever is there."""

    cluster: Name
    uuid: Uuid
    me: MemberId
    target: MemberId
    ticket: Ticket
    attempt: Number
    resume: Number
    received: Number
    version_min: Number
    version_max: Number
    compatible: Number
    read_only_compatible: Number
    incompatible: Number
    key_half: KeyHalf


class Welcome(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=frame.WELCOME):
    """The answer: the connection carries `session` from here on; `received` tells what need not be sent again."""

    cluster: Name
    uuid: Uuid
    me: MemberId
    ticket: Ticket
    attempt: Number
    session: Number
    received: Number
    version: Number
    compatible: Number
    read_only_compatible: Number
    incompatible: Number
    key_half: KeyHalf


class Refuse(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=frame.REFUSE):
    """No session over this connection. `me` lets the caller learn a newer incarnation of whoever answers, `known` (with
    INCARNATION, else 0) a newer one of its own node, which it has forgotten."""

    code: Number
    me: MemberId
    reason: Text
    known: Number = 0


class Close(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=frame.CLOSE):
    """The session named in the header is over."""

    code: Number
    reason: Text


BODIES: Final = {frame.HELLO: Hello, frame.WELCOME: Welcome, frame.REFUSE: Refuse, frame.CLOSE: Close}
CODEC: Final[Codec[Any]] = Codec((Hello, Welcome, Refuse, Close))


def control(kind: int, session: int, ack: int, body: Hello | Welcome | Refuse | Close) -> bytes:
    """A whole control frame."""
    payload = CODEC.encode(body)
    assert len(payload) <= BODY_MAX, "our own control bodies are small"
    return frame.pack_header(kind, 0, 0, 0, ack, session, len(payload)) + payload


def body_of(received: frame.Frame) -> Any:
    """The checked body of a control frame. Raises PeerError."""
    if len(received.body) > BODY_MAX:
        raise PeerError(f"control body of {len(received.body)} bytes exceeds {BODY_MAX}")
    body = CODEC.decode(received.body)
    if type(body) is not BODIES.get(received.kind):
        raise PeerError(f"frame kind {received.kind} carries a {type(body).__name__}")
    if not isinstance(body, Close):
        check_member(body.me)
    if isinstance(body, Hello):
        check_member(body.target)
    return body


def check_member(member: MemberId) -> None:
    """Raises PeerError unless every part is in range."""
    if not 1 <= member.node <= NODE_MAX:
        raise PeerError(f"node {member.node} is not in 1..{NODE_MAX}")
    if not 0 <= member.incarnation <= NUMBER_MAX:
        raise PeerError(f"incarnation {member.incarnation} is out of range")
    if not 0 <= member.serial <= SERIAL_MAX:
        raise PeerError(f"serial {member.serial} is out of range")
