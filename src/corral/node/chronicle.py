"""What happened on this node, when: the lines of its log, kept bounded for `corral status` and measured recoveries."""

from collections.abc import Callable
from typing import Final, NamedTuple, final

from corral.base.time import Instant

HAPPENINGS_MAX: Final = 512


class Happening(NamedTuple):
    """`at` is CLOCK_BOOTTIME of this machine, so that processes of one machine can subtract."""

    at: Instant
    kind: str  # link, view, fence, round, active, participant, lease, service
    text: str


@final
class Chronicle:
    def __init__(self, now: Callable[[], Instant], log: Callable[[str], None]) -> None:
        self._now = now
        self._log = log
        self._happenings: list[Happening] = []

    def note(self, kind: str, text: str) -> None:
        if len(self._happenings) >= HAPPENINGS_MAX:
            del self._happenings[: HAPPENINGS_MAX // 4]
        self._happenings.append(Happening(self._now(), kind, text))
        self._log(text)

    def since(self, at: Instant) -> list[Happening]:
        return [happening for happening in self._happenings if happening.at >= at]
