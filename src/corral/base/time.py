"""Time as engines see it: integer nanoseconds of CLOCK_BOOTTIME, always handed in."""

from typing import Final, TypeAlias

Instant: TypeAlias = int  # nanoseconds since boot of this machine; never compared between machines
Nanoseconds: TypeAlias = int  # a length of time
Seconds: TypeAlias = float  # a length of time at the public API only

MICROSECOND: Final = 1_000
MILLISECOND: Final = 1_000_000
SECOND: Final = 1_000_000_000
FOREVER: Final = (1 << 63) - 1  # a deadline that never comes


def from_seconds(seconds: Seconds) -> Nanoseconds:
    return round(seconds * SECOND)


def to_seconds(span: Nanoseconds) -> Seconds:
    return span / SECOND
