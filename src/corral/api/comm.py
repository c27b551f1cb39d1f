"""Comm's contract: exactly once and FIFO within a session; after PeerDown nothing of that session is delivered."""

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from corral.base.ids import MemberId

QUEUE_BYTES_MAX: Final = 64 << 20  # per peer; an engine port over it breaks the session, a user port gets Busy


class PeerUp(NamedTuple):
    """A session with this peer begins. Sessions with one peer are numbered upwards."""

    peer: MemberId
    session: int


class PeerDown(NamedTuple):
    """The session is over. `refused`: the reconnect was refused outright, i.e. nobody listens there any more."""

    peer: MemberId
    session: int
    reason: str
    refused: bool = False


class Comm(Protocol):
    """Messages between members.

    `deliver(peer, round, payloads)` is called from the loop with all that one wakeup brought for the port, in order;
    `watch` callbacks come in order with deliveries: PeerUp before the session's first message, PeerDown after its last.
    """

    @property
    def me(self) -> MemberId: ...

    @property
    def address(self) -> str:
        """Where others reach this member."""

    def send(self, peer: MemberId, port: int, round_id: int, payload: bytes) -> None:
        """Engine ports: never Busy; a queue over its bound breaks the session. To a peer without a session: dropped
        (the PeerDown that said so has been or is being delivered)."""

    def listen(self, port: int, deliver: Callable[[MemberId, int, list[bytes]], None]) -> None: ...

    def unlisten(self, port: int) -> None: ...

    def watch(self, changed: Callable[[PeerUp | PeerDown], None]) -> None: ...

    def set_peer(self, peer: MemberId, address: str, ticket: bytes) -> None:
        """This member is expected at that address with that ticket: connect (the lower member id does) and accept.
        corralds are configured by node and learn the incarnation from the hello; their ticket is empty."""

    def drop_peer(self, peer: MemberId) -> None:
        """Breaks the session and forgets the peer."""
