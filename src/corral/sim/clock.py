"""A machine's clock: how virtual time becomes CLOCK_BOOTTIME there.

local = base_local + (virtual - base_virtual) * (1 + ppm / 1e6), in integers. A clock runs a little fast or slow
(bounded by the run's rho), can be set to another rate, and can stand still while a hypervisor holds the machine.
"""

from typing import Any, Final

from corral.base.time import Instant

MILLION: Final = 1_000_000


class Clock:
    __slots__ = ("_base_local", "_base_virtual", "_numerator", "frozen", "waiting")

    def __init__(self, *, local: Instant = 0, virtual: Instant = 0, ppm: int = 0) -> None:
        self._base_local = local
        self._base_virtual = virtual
        self._numerator = MILLION + ppm
        self.frozen = False
        self.waiting: list[Any] = []  # timers of a frozen clock, in the order they would have fired

    @property
    def ppm(self) -> int:
        return self._numerator - MILLION

    def local(self, virtual: Instant) -> Instant:
        if self.frozen:
            return self._base_local
        return self._base_local + (virtual - self._base_virtual) * self._numerator // MILLION

    def virtual(self, local: Instant) -> Instant:
        """The first virtual instant at which this clock shows `local` or more."""
        assert not self.frozen
        return self._base_virtual - (self._base_local - local) * MILLION // self._numerator

    def set_rate(self, virtual: Instant, ppm: int) -> None:
        """From `virtual` on. Timers set before must be set again by the caller (`Scheduler.take_timers`)."""
        self._base_local = self.local(virtual)
        self._base_virtual = virtual
        self._numerator = MILLION + ppm

    def freeze(self, virtual: Instant) -> None:
        self._base_local = self.local(virtual)
        self.frozen = True

    def thaw(self, virtual: Instant) -> None:
        self._base_virtual = virtual
        self.frozen = False
