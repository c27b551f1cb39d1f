"""A machine's clock: how virtual time becomes CLOCK_BOOTTIME there.

local = base_local + (virtual - base_virtual) * (1 + ppm / 1e6), in integers. A clock runs a little fast or slow
(bounded by the run's rho), can be set to another rate, and can stand still while a hypervisor holds the machine.
"""

from typing import Any, Final, final

from corral.base.time import Instant

MILLION: Final = 1_000_000


@final
class Clock:
    """`rate` is local nanoseconds per million virtual ones; 0 while it stands still."""

    __slots__ = ("_thawed_rate", "base_local", "base_virtual", "rate", "waiting")

    def __init__(self, *, local: Instant = 0, virtual: Instant = 0, ppm: int = 0) -> None:
        self.base_local = local
        self.base_virtual = virtual
        self.rate = MILLION + ppm
        self._thawed_rate = self.rate
        self.waiting: list[Any] = []  # timers of a frozen clock, in the order they would have fired

    @property
    def frozen(self) -> bool:
        return not self.rate

    def local(self, virtual: Instant) -> Instant:
        return self.base_local + (virtual - self.base_virtual) * self.rate // MILLION

    def virtual(self, local: Instant) -> Instant:
        """The first virtual instant at which this clock shows `local` or more; not of a frozen clock."""
        return self.base_virtual - (self.base_local - local) * MILLION // self.rate

    def set_rate(self, virtual: Instant, ppm: int) -> None:
        """From `virtual` on. Timers set before must be set again by the caller (`Scheduler.take_timers`)."""
        self._rebase(virtual)
        self.rate = self._thawed_rate = MILLION + ppm

    def freeze(self, virtual: Instant) -> None:
        self._rebase(virtual)
        self.rate = 0

    def thaw(self, virtual: Instant) -> None:
        self._rebase(virtual)
        self.rate = self._thawed_rate

    def _rebase(self, virtual: Instant) -> None:
        self.base_local = self.local(virtual)
        self.base_virtual = virtual
