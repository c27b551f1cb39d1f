"""The end of a loop turn: what was collected in it is dealt with there, all of it in one callback of the loop.

Whoever gathers (messages for a stream, requests for a lock manager) registers once when it has the first piece. What a
call makes others register is done in the same round: requests become messages, messages become one write, and the loop
is not asked for another turn between them.
"""

import asyncio
from collections.abc import Callable
from typing import Final, final


@final
class Turn:
    __slots__ = ("_calls", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: Final = loop
        self._calls: list[Callable[[], None]] = []

    def at_end(self, fn: Callable[[], None]) -> None:
        """Calls `fn` once, after everything that is ready now. In the order of registration."""
        calls = self._calls
        if not calls:
            self.loop.call_soon(self._end)
        calls.append(fn)

    def _end(self) -> None:
        calls = self._calls
        done = 0
        try:
            for fn in calls:  # those that are added meanwhile, too
                done += 1
                fn()
        finally:
            del calls[:done]
            if calls:  # one of them failed: that is its own trouble, not that of the rest
                self.loop.call_soon(self._end)
