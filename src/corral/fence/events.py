"""What goes into the fence engine and what comes out, beside `corral.api.fence`'s events for everybody.

In: Start, Stop, AttemptDone, ManualAck, External, FenceRequest (and base's Received and TICK).
Out, for the lift: RoundDone, ExpelNode. For the agents: RunAttempt, CancelAttempt. For a door: Refused.
"""

from typing import NamedTuple

from corral.api.fence import DeviceUse
from corral.base.ids import NodeId, NodeIncarnation
from corral.base.time import Nanoseconds
from corral.base.view import Round

# --- in ------------------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """A round of the FENCE group begins. The first five fields are the same on every member.

    `clean`: the members that joined clean. `startup`: no active view was ever known, so what the `absent` configured
    nodes (those that are not members) did before nobody here knows.
    """

    round: Round
    clean: frozenset[NodeIncarnation]
    startup: bool = False
    absent: tuple[NodeId, ...] = ()
    quorate: bool = True


class Stop(NamedTuple):
    """A newer view came: the round is abandoned."""


class AttemptDone(NamedTuple):
    """The one answer to a RunAttempt, also to a cancelled one; nothing of the attempt runs any more."""

    attempt: int
    ok: bool
    text: str = ""
    wall_seconds: int = 0


class ManualAck(NamedTuple):
    """An operator's word that a victim is off. Incarnation 0: whichever of that node is waited for."""

    victim: NodeIncarnation
    operator: str
    wall_seconds: int = 0


class External(NamedTuple):
    """Another system says that it fenced the victim; `proof` is what the configuration says its word is worth."""

    victim: NodeIncarnation
    proof: int
    text: str
    wall_seconds: int = 0


class FenceRequest(NamedTuple):
    """Somebody wants this node fenced. Incarnation 0: whichever it has."""

    victim: NodeIncarnation
    reason: str


# --- out -----------------------------------------------------------------------------------------------------------


class RunAttempt(NamedTuple):
    """Work through `groups` in order, the devices of a group at once; ok only if every one verified `action`.

    The runner answers with AttemptDone within `timeout_ns` whatever happens, for an unstoppable agent with a failure.
    """

    attempt: int
    victim: NodeIncarnation
    method: str
    groups: tuple[tuple[DeviceUse, ...], ...]
    action: str  # "off" or "on"
    timeout_ns: Nanoseconds


class CancelAttempt(NamedTuple):
    attempt: int


class RoundDone(NamedTuple):
    """Every victim of the round is fenced or averted, as far as this node's start is concerned."""

    round: int


class ExpelNode(NamedTuple):
    """A member is to be fenced: leave it out of the next view, then it is a victim like any other."""

    member: NodeIncarnation
    reason: str


class Refused(NamedTuple):
    """An operator's or a service's request that makes no sense now, and why, in one sentence."""

    victim: NodeIncarnation
    text: str
