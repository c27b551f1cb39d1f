"""One at a time: an EX lock with the manners of a mutex.

    mutex = Mutex(space, "invoices")
    async with mutex.hold(timeout=5) as held:
        held.token

Mutual exclusion is between holders, whatever process, task or thread they are in; who asks waits behind those who
asked before. Not reentrant: a task that holds it and asks again gets RuntimeError instead of waiting for itself. With
`reentrant=True` it goes in again, and the lock is given back when the outermost body is left.

Losing the lock for good cancels the body and raises LockLost, as `lock()` itself does.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, final

from corral.api.dlm import EX, Lock, Lockspace
from corral.base.time import Seconds


@final
class Mutex:
    """The lock is named `name`: who takes that in EX by himself keeps the mutex out, and the other way round."""

    def __init__(self, space: Lockspace, name: str, *, reentrant: bool = False) -> None:
        self.name: Final = name
        self._space = space
        self._reentrant = reentrant
        self._holders: dict[asyncio.Task[Any], Lock] = {}  # tasks in a body, at most one of them past its request

    def hold(self, *, timeout: Seconds | None = None) -> AbstractAsyncContextManager[Lock]:
        """Raises TimedOut, and LockLost when it is lost in the body."""
        return self._hold(timeout, wait=True)

    def try_hold(self) -> AbstractAsyncContextManager[Lock]:
        """Raises WouldBlock when somebody has it."""
        return self._hold(None, wait=False)

    @asynccontextmanager
    async def _hold(self, timeout: Seconds | None, *, wait: bool) -> AsyncIterator[Lock]:
        task = asyncio.current_task()
        assert task is not None
        mine = self._holders.get(task)
        if mine is not None:
            if not self._reentrant:
                raise RuntimeError(f"this task holds mutex {self.name} already; it is not reentrant")
            yield mine
            return
        async with self._space.lock(self.name, EX, wait=wait, timeout=timeout) as held:
            self._holders[task] = held
            try:
                yield held
            finally:
                del self._holders[task]
