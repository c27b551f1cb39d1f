"""The bytes of a resource that a lock is about: first and last, 0 to 2**64 - 1. None: all of them."""

from typing import Final, TypeAlias

LAST: Final = (1 << 64) - 1

Extent: TypeAlias = tuple[int, int] | None


def illegal(extent: Extent) -> bool:
    return extent is not None and not (len(extent) == 2 and 0 <= extent[0] <= extent[1] <= LAST)


def overlap(one: Extent, other: Extent) -> bool:
    return one is None or other is None or (one[0] <= other[1] and other[0] <= one[1])


def within(one: Extent, other: Extent) -> bool:
    """All of `one` is in `other`."""
    return other is None or (one is not None and other[0] <= one[0] and one[1] <= other[1])


def common(one: Extent, other: Extent) -> Extent:
    """Of two that overlap."""
    if one is None or other is None:
        return other if one is None else one
    return max(one[0], other[0]), min(one[1], other[1])
