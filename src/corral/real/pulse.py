"""The loop's pulse: how long it ever stood still, and garbage collection in turns that have time for it (DESIGN 5).

Automatic collections are off: one of the whole heap would stop heartbeats. Once the process has started its heap is
frozen; after that only young objects are looked at, in turns in which the loop has nothing else to do. Engine graphs
are acyclic, so reference counts free nearly everything, and the collector is there for the cycles of exceptions.
"""

import asyncio
import gc
import logging
import time
from typing import Final, NamedTuple, final

PULSE_SECONDS: Final = 0.025  # how often the loop's punctuality is looked at
STALL_WARN_NS: Final = 250_000_000  # a longer stall is worth a line: nobody should take it for a network failure
STALL_WARN_EVERY: Final = 10.0  # seconds between such lines
IDLE_NS: Final = 3_000_000  # a pulse later than this says the loop is busy: no collection now
SETTLED_SECONDS: Final = 2.0  # after so long the start-up heap is what it will be
YOUNG_MIN: Final = 2_000  # new container objects that make a young collection worth while
YOUNG_MAX: Final = 20_000  # ... and so many are collected in a busy turn too: garbage must not grow without bound
MIDDLE_EVERY: Final = 8  # young collections per one of the middle generation
FULL_SECONDS: Final = 600.0  # between collections of all that is not frozen
FULL_MAX: Final = 50_000  # more old objects than that are frozen unseen: looking at them would take over 5 ms

log = logging.getLogger("corral.loop")


class LoopStatistics(NamedTuple):
    longest_stall_ns: int  # the longest time the loop was late for a pulse
    stalls: int  # how many were longer than STALL_WARN_NS
    pulses: int
    collections: int
    longest_collection_ns: int


@final
class Pulse:
    """A timer that knows how late it is: measures stalls, and uses punctual turns for garbage collection."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._longest = self._stalls = self._pulses = self._collections = self._longest_collection = 0
        self._warned = -STALL_WARN_EVERY
        self._held_back = 0
        self._young = 0
        self._frozen = False
        self._started = loop.time()
        self._full_at = self._started + FULL_SECONDS
        self._due = 0
        self._handle: asyncio.TimerHandle | None = None
        self._collecting = gc.isenabled()
        gc.disable()
        self._arm()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._collecting:
            gc.enable()

    def statistics(self) -> LoopStatistics:
        return LoopStatistics(self._longest, self._stalls, self._pulses, self._collections, self._longest_collection)

    def reset(self) -> None:
        """Forgets the longest stall so far: the next `statistics` speaks of what comes."""
        self._longest = self._stalls = 0

    def _arm(self) -> None:
        self._due = time.monotonic_ns() + int(PULSE_SECONDS * 1e9)
        self._handle = self._loop.call_later(PULSE_SECONDS, self._beat)

    def _beat(self) -> None:
        late = time.monotonic_ns() - self._due
        self._pulses += 1
        if late > self._longest:
            self._longest = late
        if late > STALL_WARN_NS:
            self._stalled(late)
        self._collect(late)
        self._arm()

    def _stalled(self, late: int) -> None:
        self._stalls += 1
        now = self._loop.time()
        if now - self._warned < STALL_WARN_EVERY:
            self._held_back += 1
            return
        more = f" ({self._held_back} more were not shown)" if self._held_back else ""
        self._warned, self._held_back = now, 0
        log.warning("this process stood still for %d ms: an overloaded or paused machine%s", late // 1_000_000, more)

    def _collect(self, late: int) -> None:
        fresh = gc.get_count()[0]
        if late > IDLE_NS and fresh < YOUNG_MAX:
            return
        now = self._loop.time()
        if not self._frozen:
            if now - self._started >= SETTLED_SECONDS:
                self._frozen = True
                self._timed(2)
                gc.freeze()
            return
        if now >= self._full_at:
            self._full_at = now + FULL_SECONDS
            if len(gc.get_objects(generation=2)) <= FULL_MAX:
                self._timed(2)
            gc.freeze()  # what survived is long-lived: the next one need not look at it again
        elif fresh >= YOUNG_MIN:
            self._young += 1
            self._timed(0 if self._young % MIDDLE_EVERY else 1)

    def _timed(self, generation: int) -> None:
        begin = time.monotonic_ns()
        gc.collect(generation)
        self._collections += 1
        self._longest_collection = max(self._longest_collection, time.monotonic_ns() - begin)
        self._due = time.monotonic_ns()
