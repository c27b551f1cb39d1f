"""What both sides of a handshake say about themselves, and what the caller believes of an answer (DESIGN 4, identity).

The called side's judgement of a hello needs the state of the peer and lives with it (`SessionEngine.judge`, and
`CommEngine._judge` for what comes before a peer is known).
"""

import hmac
from typing import NamedTuple

from corral.base.errors import PeerError
from corral.base.ids import MemberId
from corral.comm import wire
from corral.comm.wire import Hello, Welcome
from corral.wire.frame import VERSION


class Identity(NamedTuple):
    """Who this process is, and of which cluster."""

    cluster: str
    uuid: bytes
    me: MemberId
    ticket: bytes


def hello_from(identity: Identity, target: MemberId, attempt: int, resume: int, received: int, half: bytes) -> Hello:
    return Hello(
        identity.cluster,
        identity.uuid,
        identity.me,
        target,
        identity.ticket,
        attempt,
        resume,
        received,
        VERSION,
        VERSION,
        wire.COMPATIBLE,
        wire.READ_ONLY_COMPATIBLE,
        wire.INCOMPATIBLE,
        half,
    )


def welcome_from(identity: Identity, attempt: int, session: int, received: int, half: bytes) -> Welcome:
    return Welcome(
        identity.cluster,
        identity.uuid,
        identity.me,
        identity.ticket,
        attempt,
        session,
        received,
        VERSION,
        wire.COMPATIBLE,
        wire.READ_ONLY_COMPATIBLE,
        wire.INCOMPATIBLE,
        half,
    )


def check_welcome(identity: Identity, peer: MemberId, ticket: bytes, attempt: int, session: int, body: Welcome) -> None:
    """Raises PeerError unless it answers this attempt with this session, from this peer of this cluster. With an
    incarnation of 0 in `peer` any will do; that an older one is not believed is the caller's to check (COMM-5)."""
    if (body.cluster, body.uuid) != (identity.cluster, identity.uuid):
        raise PeerError(f"WELCOME of cluster {printable(body.cluster)}")
    if (body.me.node, body.me.serial) != (peer.node, peer.serial):
        raise PeerError(f"WELCOME of member {body.me} instead of {peer}")
    if peer.incarnation and body.me.incarnation > peer.incarnation:
        raise PeerError(f"WELCOME of incarnation {body.me.incarnation} instead of {peer.incarnation}")
    if peer.serial and body.me != peer:
        raise PeerError(f"WELCOME of incarnation {body.me.incarnation} instead of {peer.incarnation}")
    if not hmac.compare_digest(body.ticket, ticket):
        raise PeerError("WELCOME with a wrong ticket")
    if body.version != VERSION or body.incompatible & ~wire.INCOMPATIBLE:
        raise PeerError(f"WELCOME in version {body.version}, features {body.incompatible:#x}")
    if body.session != session or body.attempt != attempt:
        raise PeerError(f"WELCOME to session {body.session}, attempt {body.attempt}; asked for {session}, {attempt}")


def printable(text: str) -> str:
    """A peer's words, fit for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[: wire.REASON_MAX])
