"""What the network met that its owner never saw."""

from typing import final


@final
class Counters:
    __slots__ = (
        "accepts_failed",
        "connections_refused",
        "datagrams_dropped",
        "half_open_dropped",
        "handshakes_failed",
        "strangers",
    )

    def __init__(self) -> None:
        self.handshakes_failed = 0  # no valid certificate, not TLS, too slow
        self.strangers = 0  # a certificate of our CA that does not name a node of this cluster
        self.half_open_dropped = 0  # gave way to a newer handshake
        self.connections_refused = 0  # over CONNECTIONS_MAX
        self.accepts_failed = 0
        self.datagrams_dropped = 0  # could not be sent at once
