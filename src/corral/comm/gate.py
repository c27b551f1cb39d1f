"""Keeps one round of a service group apart from the next (DESIGN 4, rounds on the wire).

Every frame carries its group's round: older is dropped, the current one is delivered, newer is held, bounded, until
that round starts here. One gate per group port; whoever runs the group (a participant's service manager) feeds it what
comm delivers, calls `advance` when a round starts and `forget` when a session ends.

Invariants:
  COMM-7  What a gate releases belongs to its current round, and per peer comes in the order it was received.
  COMM-8  What is held per peer stays within `frames_max` and `bytes_max`; OVERFLOW tells to break the session.
"""

from typing import Final, final

from corral.base.ids import MemberId

# What became of a batch.
DELIVER: Final = 0  # of the current round: hand it on now
HELD: Final = 1
OLD: Final = 2  # of an older round: dropped and counted
OVERFLOW: Final = 3  # dropped with all the peer had held; its session has to be broken, a FIFO may not have holes

FRAMES_MAX: Final = 16384  # per peer
BYTES_MAX: Final = 16 << 20  # per peer


@final
class _Held:
    """The frames of one peer that came too early."""

    __slots__ = ("batches", "byte_count", "frame_count")

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[bytes]]] = []
        self.frame_count = 0
        self.byte_count = 0


@final
class RoundGate:
    __slots__ = ("_bytes_max", "_frames_max", "_held", "dropped", "round_id")

    def __init__(self, round_id: int = 0, *, frames_max: int = FRAMES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self.round_id = round_id
        self.dropped = 0  # frames of older rounds
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._held: dict[MemberId, _Held] = {}

    def receive(self, peer: MemberId, round_id: int, payloads: list[bytes]) -> int:
        """DELIVER, HELD, OLD or OVERFLOW, for the whole batch."""
        if round_id < self.round_id:
            self.dropped += len(payloads)
            return OLD
        held = self._held.get(peer)
        if round_id == self.round_id:
            if held is None:
                return DELIVER
            # A peer that went on to a newer round has no business in this one; to deliver now would turn its FIFO over.
            self.dropped += len(payloads)
            return OLD
        if held is None:
            held = self._held[peer] = _Held()
        elif held.batches[-1][0] > round_id:
            self.dropped += len(payloads)
            return OLD
        held.frame_count += len(payloads)
        for payload in payloads:
            held.byte_count += len(payload)
        if held.frame_count > self._frames_max or held.byte_count > self._bytes_max:
            del self._held[peer]
            return OVERFLOW
        held.batches.append((round_id, payloads))
        return HELD

    def advance(self, round_id: int) -> list[tuple[MemberId, list[bytes]]]:
        """A round starts: what was held for it, peers in order of their ids. Called with the current round: nothing."""
        assert round_id >= self.round_id, "COMM-7: rounds only rise"
        self.round_id = round_id
        released: list[tuple[MemberId, list[bytes]]] = []
        for peer in sorted(self._held):
            ready = self._release(self._held[peer])
            if ready:
                released.append((peer, ready))
        self._held = {peer: held for peer, held in self._held.items() if held.batches}
        return released

    def _release(self, held: _Held) -> list[bytes]:
        ready: list[bytes] = []
        later: list[tuple[int, list[bytes]]] = []
        for round_id, payloads in held.batches:
            if round_id > self.round_id:
                later.append((round_id, payloads))
                continue
            held.frame_count -= len(payloads)
            for payload in payloads:
                held.byte_count -= len(payload)
            if round_id == self.round_id:
                ready.extend(payloads)
            else:
                self.dropped += len(payloads)
        held.batches = later
        return ready

    def forget(self, peer: MemberId) -> None:
        """The session with this peer is over: nothing of it may be delivered any more (COMM-3)."""
        self._held.pop(peer, None)

    def held_frames(self, peer: MemberId) -> int:
        held = self._held.get(peer)
        return 0 if held is None else held.frame_count

    def held_bytes(self, peer: MemberId) -> int:
        held = self._held.get(peer)
        return 0 if held is None else held.byte_count
