"""What all recipes wait with: one deadline for all steps of a call, a bell, and the first of several locks."""

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, Final, TypeVar, final

from corral.api.dlm import EX, Lock, Lockspace
from corral.base.errors import TimedOut
from corral.base.ids import NAME_MAX
from corral.base.time import Seconds

T = TypeVar("T")

SUFFIX_MAX: Final = 19  # bytes that a recipe adds to its name: "/p/" and 16 digits


@final
class Deadline:
    """When a call must be over: `timeout` seconds from now, None never."""

    def __init__(self, timeout: Seconds | None) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError("a timeout is above zero")
        self._loop = asyncio.get_running_loop()
        self._end = None if timeout is None else self._loop.time() + timeout

    def left(self, what: str) -> Seconds | None:
        """Seconds, for the timeout of a lock. Raises TimedOut when there are none."""
        if self._end is None:
            return None
        left = self._end - self._loop.time()
        if left <= 0:
            raise TimedOut(f"{what}: it took longer than its timeout")
        return left

    async def lock(self, space: Lockspace, name: str, what: str) -> Lock:
        """In EX. Raises TimedOut."""
        try:
            return await space.lock(name, EX, timeout=self.left(what))
        except TimedOut as error:
            raise TimedOut(f"{what}: it took longer than its timeout") from error

    async def wait(self, awaitable: Awaitable[T], what: str) -> T:
        """Raises TimedOut; what is waited for is then cancelled."""
        try:
            async with asyncio.timeout_at(self._end):
                return await awaitable
        except TimedOut:
            raise  # of a step within, which says better what it waited for
        except TimeoutError:
            raise TimedOut(f"{what}: it took longer than its timeout") from None


@final
class Bell:
    """Wakes everybody who waits for something to change; each looks for himself what it was."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


def check_name(name: str) -> str:
    length = len(name.encode())
    if not 0 < length <= NAME_MAX - SUFFIX_MAX:
        raise ValueError(f"the name of a recipe is 1 to {NAME_MAX - SUFFIX_MAX} bytes, not {length}")
    return name


async def first_of(
    space: Lockspace,
    names: Iterable[str],
    deadline: Deadline,
    what: str,
    *,
    unless: Coroutine[Any, Any, None] | None = None,
) -> tuple[str, Lock] | None:
    """Asks for all of these in EX and keeps the one that is granted first; the others are taken back. None when
    `unless` ended before. Raises TimedOut, and what asking or `unless` raises."""
    asked = {asyncio.ensure_future(_acquire(space, name)): name for name in names}
    other = None if unless is None else asyncio.ensure_future(unless)
    everything: set[asyncio.Future[Lock] | asyncio.Future[None]] = {*asked}
    if other is not None:
        everything.add(other)
    won: asyncio.Future[Lock] | None = None
    try:
        await deadline.wait(asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED), what)
        won = next((task for task in asked if task.done() and not task.cancelled() and not task.exception()), None)
        for task in everything if won is None else ():
            if task.done():
                task.result()  # raises
        return None if won is None else (asked[won], won.result())
    except BaseException:
        won = None
        raise
    finally:
        if other is not None:
            _abandon(other)
        for task in asked:
            if task is not won:
                _take_back(task)


async def _acquire(space: Lockspace, name: str) -> Lock:
    return await space.lock(name, EX)


def _take_back(task: "asyncio.Future[Lock]") -> None:
    """Without waiting: a request that is still under way is cancelled, a lock that came too late is unlocked."""

    def ended(done: "asyncio.Future[Lock]") -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().unlock_nowait()

    task.cancel()
    task.add_done_callback(ended)


def _abandon(task: "asyncio.Future[None]") -> None:
    task.cancel()
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())  # it has been looked at


async def unique(space: Lockspace, name: str, deadline: Deadline, what: str) -> int:
    """A number that nobody else ever gets under this name: the token of a lock."""
    lock = await deadline.lock(space, name, what)
    token = lock.token
    lock.unlock_nowait()
    return token
