"""What fence engines tell each other (docs/format/wire.md). Tags are append-only, fields only appended.

A VictimDone is a fact that stays true, so it is told again at the start of every round and taken whenever it comes;
everything else belongs to one round.
"""

from typing import Annotated

import msgspec

from corral.base.ids import NodeId, NodeIncarnation
from corral.base.time import Nanoseconds
from corral.wire.codec import Codec

TEXT_MAX = 1024  # characters of agent output or operator's text that travel
HISTORY_REPLY_MAX = 64

Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53))]


class VictimDone(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """`victim` is no danger any more; `by` is the node that knew first."""

    round: Count
    victim: NodeIncarnation
    how: Annotated[int, msgspec.Meta(ge=1, le=4)]
    proof: Annotated[int, msgspec.Meta(ge=0, le=5)]
    method: Text
    agent: Text
    by: NodeId
    duration_ns: Nanoseconds
    text: Text
    wall_seconds: Count


class TurnFailed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """All my methods failed once; turn `turn` is over and the next in the order takes its own."""

    round: Count
    victim: NodeIncarnation
    turn: Count
    text: Text


class Attempting(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """My agent begins to work on the victim: let it not join before a VictimDone or TurnFailed."""

    round: Count
    victim: NodeIncarnation
    turn: Count
    method: Text


class FencePlease(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A request that reached me: end the delay of this victim, or make it one."""

    round: Count
    victim: NodeIncarnation
    reason: Text


class HistoryQuery(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """A joiner asks what happened before it came."""

    round: Count


class HistoryReply(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Oldest first."""

    round: Count
    facts: Annotated[list[VictimDone], msgspec.Meta(max_length=HISTORY_REPLY_MAX)]


Message = VictimDone | TurnFailed | Attempting | FencePlease | HistoryQuery | HistoryReply

CODEC: Codec[Message] = Codec((VictimDone, TurnFailed, Attempting, FencePlease, HistoryQuery, HistoryReply))
