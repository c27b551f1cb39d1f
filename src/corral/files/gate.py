"""What stands between the filesystem and its caller: when an answer may leave, and that none is waited for in vain."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EIO
from typing import final

from corral.base.time import SECOND, Nanoseconds


@final
class Gate:
    """`may_act`: whether this node's lease runs. While it does not, answers wait; looked at every `poll_ns`."""

    def __init__(self, may_act: Callable[[], bool], poll_ns: Nanoseconds) -> None:
        self._may_act = may_act
        self._poll = poll_ns / SECOND
        self._inside: set[asyncio.Task[object]] = set()
        self._lost = ""

    def lose(self, reason: str) -> None:
        """The guarantee is lost for good: who waits hears EIO now, and everybody else when he comes."""
        if not self._lost:
            self._lost = reason
            for task in self._inside:
                task.cancel()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around one request of an application. Raises EIO when the guarantee is lost; a request within another one
        (of the same task) is part of it."""
        task = asyncio.current_task()
        assert task is not None
        if task in self._inside:
            yield
            return
        self._refuse()
        self._inside.add(task)
        try:
            try:
                yield
            except OSError:
                await self._wait()  # an error is an answer too
                raise
            await self._wait()
        except asyncio.CancelledError:
            if not self._lost:
                raise
            if task.uncancel():
                raise  # somebody else cancelled it as well
            self._refuse()
        finally:
            self._inside.discard(task)

    async def _wait(self) -> None:
        while not self._may_act():
            self._refuse()
            await asyncio.sleep(self._poll)

    def _refuse(self) -> None:
        if self._lost:
            raise OSError(EIO, self._lost)
