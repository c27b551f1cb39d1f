"""Log lines about strangers: one per source and minute, the rest counted, memory bounded.

Anybody who reaches a port can fail a handshake a thousand times a second; the log must stay readable and the table of
sources small. What was held back is said in the next line of that source.
"""

import logging
from typing import Final, final

from corral.base.time import SECOND, Instant

INTERVAL_NS: Final = 60 * SECOND
SOURCES_MAX: Final = 256
LINES_MAX: Final = 20  # per interval, over all sources


@final
class Complaints:
    __slots__ = ("_lines", "_log", "_sources", "_window", "suppressed")

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._sources: dict[str, tuple[Instant, int]] = {}  # source → when its last line was, how many were held back
        self._window: Instant = 0
        self._lines = 0
        self.suppressed = 0

    def about(self, now: Instant, source: str, sentence: str) -> None:
        if now - self._window >= INTERVAL_NS:
            self._window, self._lines = now, 0
        since, held = self._sources.pop(source, (now - INTERVAL_NS, 0))
        if now - since < INTERVAL_NS or self._lines >= LINES_MAX:
            self._sources[source] = (since, held + 1)
            self.suppressed += 1
        else:
            self._lines += 1
            more = f" ({held} more like it were not shown)" if held else ""
            self._log.warning("%s%s", sentence, more)
            self._sources[source] = (now, 0)
        if len(self._sources) > SOURCES_MAX:
            del self._sources[next(iter(self._sources))]  # the one heard of longest ago
