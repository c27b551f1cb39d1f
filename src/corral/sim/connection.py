"""A connection between two simulated processes: whole messages in order, and exactly one report of its break per end.

Each end sends *segments* (what was queued at one instant) over its outgoing link. A segment that is dropped stalls all
that follow; the kernel tries again with growing pauses, whether or not the process runs, and after `user_timeout`
without acknowledgement the end breaks. So does one whose data arrives but whose acknowledgements are lost (a one-way
partition). The two ends break independently: the last segment of an end that broke is its *farewell*, which the other
end meets behind all data, or, over a dead link, only after the link has healed.

How an end ends: `close` (farewell at once), a killed process (`abort`, at the moment it is *gone*; what socket buffers
did not hold is lost), a power cut (`vanish`: no farewell; the other end finds out by time-out or after the reboot).
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from corral.base.ids import NodeId
from corral.base.world import Buffer, ConnectionHandler, Credentials
from corral.sim.links import DROP, Link

if TYPE_CHECKING:
    from corral.sim.network import Fabric
    from corral.sim.process import Process


class Segment:
    """`messages` None: a farewell, `reason` says why."""

    __slots__ = ("arrival", "messages", "reason", "sent", "size")

    def __init__(self, sent: int, messages: list[bytes] | None, reason: str = "") -> None:
        self.sent = sent
        self.messages = messages
        self.size = 0
        self.reason = reason
        self.arrival = 0


class SimConnection:
    """One end. `peer` is the other; `node` and `credentials` are what this end knows of it."""

    def __init__(
        self,
        fabric: "Fabric",
        process: "Process",
        link: Link,
        name: str,
        node: NodeId | None,
        credentials: Credentials | None,
    ) -> None:
        self._fabric = fabric
        self._scheduler = fabric.scheduler
        self.process = process
        self._link = link
        self.name = name
        self.node = node
        self.credentials = credentials
        self.peer: SimConnection  # set by `join`
        self.handler: ConnectionHandler | None = None  # None: not accepted yet, nobody to tell
        self.open = True
        self._flight: deque[Segment] = deque()  # on their way to the peer, in order of arrival
        self._stalled: list[Segment] = []
        self._stalled_since = 0
        self._retrying = False
        self._unacked_since = -1
        self._last: Segment | None = None
        self._last_arrival = 0
        self._outstanding = 0  # bytes sent and not yet taken by the peer

    # --- what the owner calls ---

    @property
    def pending(self) -> int:
        return max(0, self._outstanding - self._fabric.knobs.window) if self.open else 0

    def send(self, messages: Sequence[Buffer]) -> None:
        if not self.open or not messages:
            return
        now = self._scheduler.now
        batch = [message if type(message) is bytes else bytes(message) for message in messages]
        size = sum(map(len, batch))
        self._outstanding += size
        last = self._last
        if last is not None and last.sent == now and last.messages is not None:
            last.messages.extend(batch)
            last.size += size
            return
        self._last = segment = Segment(now, batch)
        segment.size = size
        self._transmit(segment)

    def close(self) -> None:
        if not self.open:
            return
        self.open = False
        self._stalled.clear()
        self._farewell("closed by the peer")
        self.process.loop.call_soon(self._report, "closed here", context=self.process.loop.context)
        self._forget()

    def not_before(self, arrival: int) -> None:
        """Nothing this end sends arrives earlier: the peer has to know of the connection first."""
        self._last_arrival = arrival

    # --- how it ends otherwise ---

    def abort(self) -> None:
        """The process is gone; its kernel still sends what socket buffers hold, then resets."""
        if not self.open:
            return
        self.open = False
        self._lose_beyond_window()
        self._farewell("reset by the peer")
        self._forget()

    def vanish(self) -> None:
        """The machine lost power: nothing more leaves, not even a farewell."""
        if not self.open:
            return
        self.open = False
        self._stalled.clear()
        self._forget()
        if self.peer.open:
            self._fabric.orphaned(self.peer)

    def breaks(self, reason: str) -> None:
        """In the owner's loop: the one report of the break."""
        if not self.open:
            return
        self.open = False
        self._stalled.clear()
        self._farewell("reset by the peer")
        self._forget()
        self._report(reason)

    def break_at(self, when: int, reason: str) -> None:
        """From outside, at virtual time `when`."""
        self.process.loop.deliver(when, self.breaks, reason)

    def _report(self, reason: str) -> None:
        self._fabric.trace.note(self._scheduler.now, self.name, f"broken: {reason}")
        if self.handler is not None:
            self.handler.broken(reason)

    def _forget(self) -> None:
        self.process.connections.pop(self, None)

    def _farewell(self, reason: str) -> None:
        if self.peer.open:
            self._transmit(Segment(self._scheduler.now, None, reason))

    def _lose_beyond_window(self) -> None:
        if self._outstanding <= self._fabric.knobs.window:
            return
        room = self._fabric.knobs.window - sum(segment.size for segment in self._flight)
        kept: list[Segment] = []
        for segment in self._stalled:
            room -= segment.size
            if room < 0:
                break
            kept.append(segment)
        self._stalled[:] = kept

    # --- the wire ---

    def _transmit(self, segment: Segment) -> None:
        if self._stalled:
            self._stalled.append(segment)
            return
        delay = self._link.judge(segment.size)
        if delay < 0:
            self._stalled.append(segment)
            self._stalled_since = self._scheduler.now
            if not self._retrying:
                self._retrying = True
                first = self._fabric.knobs.retry_first
                self._scheduler.after(first, self._retry, first)
            return
        self._depart(segment, delay)
        peer = self.peer
        if peer._link.rules or peer.process.machine.halted:
            self._watch_acknowledgements()

    def _depart(self, segment: Segment, delay: int) -> None:
        transfer = segment.size * self._fabric.knobs.ns_per_byte
        arrival = max(self._scheduler.now + delay, self._last_arrival) + transfer
        self._last_arrival = segment.arrival = arrival
        self._flight.append(segment)
        self.peer.process.loop.deliver(arrival, self.peer._arrive)

    def _arrive(self) -> None:
        """In the receiver's loop. A process that was paused gets at once all that came meanwhile."""
        if not self.open:
            return
        now = self._scheduler.now
        sender = self.peer
        flight = sender._flight
        messages: list[bytes] = []
        size = 0
        farewell: Segment | None = None
        while flight and flight[0].arrival <= now:
            segment = flight.popleft()
            if segment.messages is None:
                farewell = segment
                break
            messages = messages + segment.messages if messages else segment.messages
            size += segment.size
        if messages:
            sender._outstanding -= size
            self._fabric.trace.wire(now, self.name, "received", messages, size)
            assert self.handler is not None
            self.handler.received(messages)
        if farewell is not None:
            self.breaks(farewell.reason)

    def _retry(self, pause: int) -> None:
        """In the kernel: try the oldest stalled segment again."""
        if not self._stalled or not self.peer.open:
            self._retrying = False
            return
        delay = DROP if self.process.machine.halted else self._link.judge(self._stalled[0].size)
        if delay >= 0:
            self._retrying = False
            stalled, self._stalled = self._stalled, []
            for segment in stalled:
                self._depart(segment, delay)
            return
        knobs = self._fabric.knobs
        now = self._scheduler.now
        if self.open and not self.process.machine.halted and now - self._stalled_since >= knobs.user_timeout:
            self.break_at(now, "timed out")
        pause = min(2 * pause, knobs.retry_last)
        self._scheduler.after(pause, self._retry, pause)

    def _watch_acknowledgements(self) -> None:
        if self._unacked_since < 0 and self.open and not self._acknowledged():
            self._unacked_since = self._scheduler.now
            self._scheduler.after(self._fabric.knobs.retry_first, self._check_acknowledgements)

    def _acknowledged(self) -> bool:
        return not self.peer.process.machine.halted and self.peer._link.judge(0) >= 0

    def _check_acknowledgements(self) -> None:
        if not self.open or self._acknowledged():
            self._unacked_since = -1
            return
        now = self._scheduler.now
        if now - self._unacked_since >= self._fabric.knobs.user_timeout:
            self.break_at(now, "timed out: nothing is acknowledged")
            return
        self._scheduler.after(self._fabric.knobs.retry_first, self._check_acknowledgements)


def join(one: SimConnection, other: SimConnection) -> None:
    """Makes two ends one connection and lets their processes own them."""
    one.peer = other
    other.peer = one
    one.process.connections[one] = None
    other.process.connections[other] = None
