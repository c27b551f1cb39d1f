"""POSIX byte ranges: who has which bytes of a file in which mode, and who waits for some.

`Ranges` is the structure: for each owner (a process or an open file) disjoint spans with a mode, cut, joined and
overwritten by `put`. Ranges are inclusive at both ends, 0 to 2**64 - 1. Two owners conflict where their spans overlap
in incompatible modes. A range of an owner is *set* to PR (read) or EX (write) or to IV (unlock) whatever it was before,
and ranges are joined and split so that it cannot be told how they were set. (A lock of a lockspace has one range and
one of six modes: `extent.py`.)

`RangeLocks` adds waiting: a request that conflicts waits, is tried again in order of arrival whenever something is
given back, and is refused (EDEADLK) if the owner would wait for itself through others, over all resources. As in POSIX
a newcomer that conflicts with no *holder* does not wait for those who wait.

Nothing is returned twice: an operation returns what became of its own request and appends to `effects` what became of
others, as pairs (cookie, status).
Source: fcntl(2), POSIX.1-2017; features 1.5. Deviation from Linux: a circle that a *grant* closes is noticed at once,
and the waiter that it closes is refused; Linux notices when it tries that waiter again, if ever.
"""

from bisect import bisect_left
from typing import NamedTuple, TypeAlias, final

from corral.api.dlm import IV
from corral.dlm.extent import LAST
from corral.dlm.modes import COMPATIBLE, EAGAIN, EDEADLK, EINVAL
from corral.dlm.resource import QUEUED

RangeEffects: TypeAlias = list[tuple[int, int]]


class Span(NamedTuple):
    start: int
    end: int
    mode: int


@final
class Ranges:
    """The spans of each owner of one resource: sorted, disjoint, and joined where neighbours have the same mode."""

    __slots__ = ("_owners",)

    def __init__(self) -> None:
        self._owners: dict[int, list[Span]] = {}

    def __bool__(self) -> bool:
        return bool(self._owners)

    def of(self, owner: int) -> tuple[Span, ...]:
        return tuple(self._owners.get(owner, ()))

    def put(self, owner: int, start: int, end: int, mode: int) -> None:
        """Sets [start, end] of `owner` to `mode` (IV: takes it away), whatever it had there."""
        spans = self._owners.get(owner)
        if spans is None:
            if mode == IV:
                return
            spans = self._owners[owner] = []
        first, behind = _overlapped(spans, start, end)
        # One more at each side may only touch: it is joined if its mode is the same.
        if first and mode != IV and spans[first - 1].end + 1 == start and spans[first - 1].mode == mode:
            first -= 1
        if behind < len(spans) and mode != IV and spans[behind].start == end + 1 and spans[behind].mode == mode:
            behind += 1
        fresh: list[Span] = []
        for span in spans[first:behind]:
            if span.mode == mode:
                start, end = min(start, span.start), max(end, span.end)
        for span in spans[first:behind]:
            if span.start < start:
                fresh.append(Span(span.start, start - 1, span.mode))
        if mode != IV:
            fresh.append(Span(start, end, mode))
        for span in spans[first:behind]:
            if span.end > end:
                fresh.append(Span(end + 1, span.end, span.mode))
        spans[first:behind] = fresh
        if not spans:
            del self._owners[owner]

    def drop(self, owner: int) -> None:
        self._owners.pop(owner, None)

    def blockers(self, owner: int, start: int, end: int, mode: int) -> list[tuple[int, Span]]:
        """Spans of others in the way, by their start, then by owner."""
        if mode == IV:
            return []
        compatible = COMPATIBLE[mode]
        found = []
        for other, spans in self._owners.items():
            if other != owner:
                first, behind = _overlapped(spans, start, end)
                found += [(other, span) for span in spans[first:behind] if not compatible[span.mode]]
        return sorted(found, key=lambda entry: (entry[1].start, entry[0]))


def _overlapped(spans: list[Span], start: int, end: int) -> tuple[int, int]:
    """The slice of spans that overlap [start, end]."""
    first = bisect_left(spans, start, key=lambda span: span.end)
    behind = bisect_left(spans, end + 1, lo=first, key=lambda span: span.start)
    return first, behind


@final
class RangeRequest:
    __slots__ = ("cookie", "end", "mode", "name", "owner", "start")

    def __init__(self, name: bytes, owner: int, start: int, end: int, mode: int, cookie: int) -> None:
        self.name = name
        self.owner = owner
        self.start = start
        self.end = end
        self.mode = mode
        self.cookie = cookie


@final
class RangeLocks:
    """Ranges of many resources, and the requests that wait, in order of arrival."""

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held: dict[bytes, Ranges] = {}
        self._waiting: dict[int, RangeRequest] = {}

    def of(self, name: bytes, owner: int) -> tuple[Span, ...]:
        held = self._held.get(name)
        return () if held is None else held.of(owner)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Cookies, longest waiting first."""
        return tuple(self._waiting)

    def conflict(self, name: bytes, owner: int, start: int, end: int, mode: int) -> tuple[int, Span] | None:
        """The first span in the way of such a request, with its owner (F_GETLK)."""
        held = self._held.get(name)
        found = [] if held is None else held.blockers(owner, start, end, mode)
        return found[0] if found else None

    def set(
        self, name: bytes, owner: int, start: int, end: int, mode: int, cookie: int, wait: bool, effects: RangeEffects
    ) -> int:
        """0, QUEUED, -EAGAIN (in the way, and not to wait), -EDEADLK, or -EINVAL (no range, no mode, cookie in use)."""
        if not 0 <= start <= end <= LAST or not IV <= mode < len(COMPATIBLE) or cookie in self._waiting:
            return EINVAL
        request = RangeRequest(name, owner, start, end, mode, cookie)
        blocking = self._blocking(request)
        if not blocking:
            self._grant(request, effects)
            self._retry(name, effects)
            return 0
        if not wait:
            return EAGAIN
        if self._reaches(blocking, owner):
            return EDEADLK
        self._waiting[cookie] = request
        return QUEUED

    def cancel(self, cookie: int) -> bool:
        """Whether it waited: then it does no more."""
        return self._waiting.pop(cookie, None) is not None

    def close(self, name: bytes, owner: int, effects: RangeEffects) -> None:
        """All that the owner has and wants of this resource goes; its requests end without a status."""
        for cookie in [c for c, request in self._waiting.items() if (request.name, request.owner) == (name, owner)]:
            del self._waiting[cookie]
        held = self._held.get(name)
        if held is not None:
            held.drop(owner)
            self._retry(name, effects)

    def gone(self, owner: int, effects: RangeEffects) -> None:
        """The owner died: it has and wants nothing any more, anywhere."""
        for cookie in [cookie for cookie, request in self._waiting.items() if request.owner == owner]:
            del self._waiting[cookie]
        for name in sorted(name for name, held in self._held.items() if held.of(owner)):
            self.close(name, owner, effects)

    # --- leaves ----------------------------------------------------------------------------------------------------

    def _blocking(self, request: RangeRequest) -> list[int]:
        """Owners in the way."""
        held = self._held.get(request.name)
        if held is None:
            return []
        found = held.blockers(request.owner, request.start, request.end, request.mode)
        return sorted({owner for owner, _ in found})

    def _reaches(self, owners: list[int], wanted: int) -> bool:
        """Whether some of these wait for `wanted`, directly or through others."""
        seen: set[int] = set()
        stack = list(owners)
        while stack:
            owner = stack.pop()
            if owner == wanted:
                return True
            if owner not in seen:
                seen.add(owner)
                for request in self._waiting.values():
                    if request.owner == owner:
                        stack += self._blocking(request)
        return False

    def _grant(self, request: RangeRequest, effects: RangeEffects) -> None:
        held = self._held.setdefault(request.name, Ranges())
        held.put(request.owner, request.start, request.end, request.mode)
        if not held:
            del self._held[request.name]
        self._refuse_circles(request.name, request.owner, request.start, request.end, request.mode, effects)

    def _refuse_circles(self, name: bytes, owner: int, start: int, end: int, mode: int, effects: RangeEffects) -> None:
        """Whoever waits and is now in the way of itself through this grant is refused, the last to come first."""
        if mode == IV:
            return
        for cookie, waiter in reversed(list(self._waiting.items())):
            if waiter.name != name or waiter.owner == owner or waiter.end < start or end < waiter.start:
                continue
            if not COMPATIBLE[mode][waiter.mode] and self._reaches(self._blocking(waiter), waiter.owner):
                del self._waiting[cookie]
                effects.append((cookie, EDEADLK))

    def _retry(self, name: bytes, effects: RangeEffects) -> None:
        """Grants what waits for nobody any more; each grant may give something back, so from the front again."""
        again = True
        while again:
            again = False
            for cookie, request in self._waiting.items():
                if request.name == name and not self._blocking(request):
                    del self._waiting[cookie]
                    effects.append((cookie, 0))
                    self._grant(request, effects)
                    again = True
                    break
        held = self._held.get(name)
        if held is not None and not held:
            del self._held[name]
