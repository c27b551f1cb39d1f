"""The shared page: how corrald tells its participants, without a message, whether they may still act (DESIGN 4).

One small mapping a node. corrald writes the lease and the round; each participant has a line of its own, where corrald
writes `frozen` and the participant its progress. A reader compares the lease before each grant, reply and device write.
A light client reads the line of the lock service that holds its locks.

======= ==== =============================================================================================
offset  size meaning (little-endian u64 words)
======= ==== =============================================================================================
0       8    magic "corralP1"
8       8    sequence: odd while corrald changes the words below
16      8    lease_until, ns of CLOCK_BOOTTIME; 0 before the first lease
24      8    id of the newest round begun
32      8    corrald's progress counter
64 + 64 s    line of the participant with page slot s: +0 frozen (0 or 1), +8 progress, +16 serial,
                  +24 blocked (1: a start of this participant waits for others or advances, so it may last)
======= ==== =============================================================================================
"""

from typing import Final, final

from corral.base.time import Instant

MAGIC: Final = int.from_bytes(b"corralP1", "little")
PAGE_SIZE: Final = 4096
LINES: Final = (PAGE_SIZE - 64) // 64
_SEQUENCE: Final = 1
_LEASE: Final = 2
_ROUND: Final = 3
_PROGRESS: Final = 4
_LINE: Final = 8  # words


@final
class PageWriter:
    """corrald's side."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("B").cast("Q")
        for index in range(PAGE_SIZE // 8):
            self._words[index] = 0
        self._words[0] = MAGIC
        self._slots: dict[int, int] = {}  # serial -> page slot

    def publish(self, lease_until: Instant, round_id: int) -> None:
        words = self._words
        words[_SEQUENCE] += 1
        words[_LEASE] = max(lease_until, 0)
        words[_ROUND] = round_id
        words[_PROGRESS] += 1
        words[_SEQUENCE] += 1

    def add(self, serial: int) -> int | None:
        """A line for this participant; None when all are taken."""
        taken = set(self._slots.values())
        slot = next((slot for slot in range(LINES) if slot not in taken), None)
        if slot is not None:
            self._slots[serial] = slot
            base = _LINE * (slot + 1)
            self._words[base + 2] = serial  # first: whose line it was must never see it thawed
            self._words[base] = 0
            self._words[base + 1] = 0
            self._words[base + 3] = 0
        return slot

    def freeze(self, serial: int) -> None:
        slot = self._slots.get(serial)
        if slot is not None:
            self._words[_LINE * (slot + 1)] = 1

    def progress(self, serial: int) -> int:
        slot = self._slots.get(serial)
        return 0 if slot is None else self._words[_LINE * (slot + 1) + 1]

    def blocked(self, serial: int) -> bool:
        slot = self._slots.get(serial)
        return slot is not None and self._words[_LINE * (slot + 1) + 3] != 0

    def remove(self, serial: int) -> None:
        """Only when the participant is gone: until then its line must keep saying frozen."""
        slot = self._slots.pop(serial, None)
        if slot is not None:
            self._words[_LINE * (slot + 1)] = 1


@final
class PageReader:
    """A participant's side, or that of a light client, which reads the line of the lock service that holds its locks:
    when that one is frozen or gone, somebody else may have them. `serial`: whose line it is; by default that of now.
    """

    def __init__(self, memory: memoryview, slot: int, serial: int | None = None) -> None:
        if len(memory) < PAGE_SIZE:
            raise ValueError(f"the shared page has {len(memory)} bytes, not {PAGE_SIZE}")
        self._words = memory.cast("B").cast("Q")
        if self._words[0] != MAGIC:
            raise ValueError("the shared page does not begin with its magic")
        if not 0 <= slot < LINES:
            raise ValueError(f"the shared page has no line {slot}")
        self._line = _LINE * (slot + 1)
        self._serial = self._words[self._line + 2] if serial is None else serial

    def lease_until(self) -> Instant:
        """0 when frozen, or when the line is another's by now. A torn read is impossible to mistake: it is tried again,
        and after that counts as no lease."""
        words = self._words
        line = self._line
        if words[line] or words[line + 2] != self._serial:
            return 0
        before: int = words[_SEQUENCE]
        lease: int = words[_LEASE]
        if before == words[_SEQUENCE] and not before & 1:
            return lease
        for _ in range(8):
            before = words[_SEQUENCE]
            lease = words[_LEASE]
            if before == words[_SEQUENCE] and not before & 1:
                return lease
        return 0

    def tick(self, *, blocked: bool) -> None:
        """This participant's loop still turns; `blocked`: a start of it may last (Service.blocked_by)."""
        self._words[self._line + 1] += 1
        self._words[self._line + 3] = int(blocked)
