"""What the comm engine asks of whoever runs it, besides PeerUp and PeerDown, and the limits it keeps.

The engine appends these to one list in the order in which they have to happen: a frame before the close of its
connection, PeerUp before the first Deliver of its session, PeerDown after the last. Connections and connection attempts
are small integers; the runner knows what is behind them.
"""

from typing import Final, NamedTuple, final

from corral.api.comm import QUEUE_BYTES_MAX, PeerDown, PeerUp
from corral.base.ids import Incarnation, MemberId, NodeId
from corral.base.time import MILLISECOND, SECOND, Nanoseconds


@final
class Write:
    """Queue these frames on the connection."""

    __slots__ = ("connection", "messages")

    def __init__(self, connection: int, messages: list[bytes]) -> None:
        self.connection = connection
        self.messages = messages


@final
class Shut:
    """Close the connection; the engine has forgotten it, its break need not be reported."""

    __slots__ = ("connection",)

    def __init__(self, connection: int) -> None:
        self.connection = connection


@final
class Connect:
    """Connect to the address, where `node`'s certificate is expected; answer with `connected` or `connect_failed`."""

    __slots__ = ("address", "attempt", "node")

    def __init__(self, attempt: int, address: str, node: NodeId) -> None:
        self.attempt = attempt
        self.address = address
        self.node = node


@final
class Abandon:
    """Nobody waits for this attempt any more."""

    __slots__ = ("attempt",)

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt


@final
class Deliver:
    """Consecutive messages of one wakeup for one port and round."""

    __slots__ = ("payloads", "peer", "port", "round_id")

    def __init__(self, peer: MemberId, port: int, round_id: int, payloads: list[bytes]) -> None:
        self.peer = peer
        self.port = port
        self.round_id = round_id
        self.payloads = payloads


class Rejected(NamedTuple):
    """A peer's mistake, told once per kind and node until that node is welcomed; `Statistics.rejects` counts all."""

    kind: str
    node: NodeId | None
    detail: str

    def __str__(self) -> str:
        who = f"node {self.node}" if self.node is not None else "an unknown sender"
        return f"comm refused {who}: {self.kind} ({self.detail})"


class Outdated(NamedTuple):
    """A node of the cluster refuses this process as stale: it has met incarnation `known` of the own node, which is
    higher. No peer that has will ever talk to this process."""

    by: NodeId
    known: Incarnation


@final
class Limits:
    """Every bound of comm and what reaching it means. `for_detect` derives them from the two inputs of DESIGN 5.

    session_timeout_ns: a session without a connection for this long is over.
    handshake_ns: connecting, and then greeting, may each take this long.
    stall_ns: a message unacknowledged for this long (checked every half of it) breaks the session. One and a half of it
        are less than `recover`: when recovery control judges after `recover` who cannot be reached, whatever else is
        broken has shown itself.
    queue_bytes: unacknowledged bytes beyond this break the session (user ports: Busy at `user_queue_bytes`).
    ack_delay_ns, ack_frames: a pure ACK leaves when no frame carried one for that long, or after that many frames.
    guests, guests_per_node: accepted connections that have not yet said a valid hello; one more is closed at once.
    """

    __slots__ = (
        "ack_delay_ns",
        "ack_frames",
        "backoff_max_ns",
        "backoff_min_ns",
        "guests",
        "guests_per_node",
        "handshake_ns",
        "queue_bytes",
        "reconnect_max_ns",
        "session_timeout_ns",
        "stall_ns",
        "user_queue_bytes",
    )

    def __init__(
        self,
        *,
        session_timeout_ns: Nanoseconds,
        handshake_ns: Nanoseconds,
        stall_ns: Nanoseconds,
        queue_bytes: int = QUEUE_BYTES_MAX,
        user_queue_bytes: int = QUEUE_BYTES_MAX // 4,
        ack_delay_ns: Nanoseconds = 20 * MILLISECOND,
        ack_frames: int = 256,
        backoff_min_ns: Nanoseconds = 10 * MILLISECOND,
        reconnect_max_ns: Nanoseconds = 80 * MILLISECOND,
        backoff_max_ns: Nanoseconds = 320 * MILLISECOND,
        guests: int = 128,
        guests_per_node: int = 16,
    ) -> None:
        self.session_timeout_ns = session_timeout_ns
        self.handshake_ns = handshake_ns
        self.stall_ns = stall_ns
        self.queue_bytes = queue_bytes
        self.user_queue_bytes = user_queue_bytes
        self.ack_delay_ns = ack_delay_ns
        self.ack_frames = ack_frames
        self.backoff_min_ns = backoff_min_ns
        self.reconnect_max_ns = reconnect_max_ns  # between attempts while a session hangs on them
        self.backoff_max_ns = backoff_max_ns  # between attempts when nothing does
        self.guests = guests
        self.guests_per_node = guests_per_node

    @staticmethod
    def for_detect(detect_ns: Nanoseconds, recover_ns: Nanoseconds | None = None) -> "Limits":
        return Limits(
            session_timeout_ns=detect_ns,
            handshake_ns=max(detect_ns, SECOND),  # on a saturated machine TLS takes its time
            stall_ns=(5 * detect_ns if recover_ns is None else recover_ns) * 3 // 5,
        )


LOGGED_MAX: Final = 256  # kinds x nodes remembered as told
DETAIL_MAX: Final = 200


@final
class Counters:
    """What one process's comm has seen, summed over all peers. Kinds of rejects are our own words, hence bounded."""

    __slots__ = (
        "_logged",
        "_out",
        "bytes_received",
        "bytes_sent",
        "duplicates",
        "frames_received",
        "frames_sent",
        "rejects",
        "resends",
        "sessions",
    )

    def __init__(self, out: "list[Action]") -> None:
        self._out = out
        self._logged: set[tuple[str, NodeId | None]] = set()
        self.rejects: dict[str, int] = {}
        self.frames_sent = 0
        self.bytes_sent = 0
        self.frames_received = 0
        self.bytes_received = 0
        self.resends = 0
        self.duplicates = 0
        self.sessions = 0

    def reject(self, kind: str, node: NodeId | None, detail: str) -> None:
        """Counts, and tells the first of its kind from that node."""
        self.rejects[kind] = self.rejects.get(kind, 0) + 1
        if (kind, node) not in self._logged and len(self._logged) < LOGGED_MAX:
            self._logged.add((kind, node))
            self._out.append(Rejected(kind, node, detail[:DETAIL_MAX]))

    def welcomed(self, node: NodeId) -> None:
        """The node talks sense again: its next mistake is news."""
        self._logged = {told for told in self._logged if told[1] != node}


Action = Write | Shut | Connect | Abandon | Deliver | Rejected | Outdated | PeerUp | PeerDown
