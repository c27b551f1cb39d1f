"""What happened, in order: the story of a run, and one number that stands for all of it.

Every entry (virtual time, who, what) is mixed into `digest`, so two runs with equal digests took the same course. Only
the newest entries are kept unless the whole story was asked for. Text is made when somebody reads it, not before.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final
from zlib import crc32

from corral.base.time import SECOND, Instant

KEEP: Final = 400
_MASK: Final = (1 << 64) - 1
_MULTIPLIER: Final = 6364136223846793005  # Knuth's MMIX generator: odd, well mixed high bits


class Trace:
    def __init__(self, *, whole: bool = False) -> None:
        self.digest = 0
        self.count = 0
        self._entries: deque[tuple[Instant, str, str, int, int]] = deque(maxlen=None if whole else KEEP)

    def note(self, now: Instant, who: str, what: str) -> None:
        """A rare event, told in words."""
        check = crc32(what.encode(), crc32(who.encode()))
        self.count = count = self.count + 1
        self.digest = ((self.digest ^ check ^ (now << 20)) * _MULTIPLIER + count) & _MASK
        self._entries.append((now, who, what, -1, 0))

    def wire(self, now: Instant, who: str, what: str, payloads: Iterable[bytes], size: int) -> None:
        """A frequent event that carries bytes; `who` and `what` are constants of the two ends."""
        check = crc32(who.encode())
        for payload in payloads:
            check = crc32(payload, check)
        self.count = count = self.count + 1
        self.digest = ((self.digest ^ check ^ (now << 20)) * _MULTIPLIER + count) & _MASK
        self._entries.append((now, who, what, size, check))

    def lines(self, last: int | None = None) -> Iterator[str]:
        """The kept entries as text; with `last`, only so many from the end."""
        skip = 0 if last is None else max(0, len(self._entries) - last)
        for index, (now, who, what, size, check) in enumerate(self._entries):
            if index >= skip:
                text = f"{now / SECOND:15.9f} {who} {what}"
                yield text if size < 0 else f"{text} {size} bytes {check:08x}"

    def text(self, last: int | None = None) -> str:
        return "\n".join(self.lines(last))
