"""The thread that runs everything asynchronous of one object, and the way into it from other threads."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar, final

from corral.base.errors import ClusterError

T = TypeVar("T")


@final
class LoopThread:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="corral", daemon=True)
        self._thread.start()

    def call(
        self, coroutine: Coroutine[Any, Any, T], undo: Callable[[T], None] | None = None, *, goes_on: bool = False
    ) -> T:
        """Runs it there and waits. Whoever is interrupted while it waits has asked for nothing: the coroutine is
        cancelled, and if it was faster, `undo` gets what it returned; but what `goes_on` is done all the same.
        Raises ClusterError after `close`."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a callback may not make blocking calls: hand them to another thread")
        done: Future[T] = Future()
        waiting = threading.Lock()  # a signal that interrupts its `acquire` leaves nothing half done, unlike a Future's
        waiting.acquire()
        begun: list[asyncio.Task[T]] = []
        gone = False

        def finish(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                done.set_exception(ClusterError("it was closed meanwhile"))
            elif (error := task.exception()) is not None:
                done.set_exception(error)
            elif gone and undo is not None:
                undo(task.result())
            else:
                done.set_result(task.result())
            waiting.release()

        def begin() -> None:
            task = self._loop.create_task(coroutine)
            self._tasks.add(task)
            begun.append(task)
            task.add_done_callback(finish)

        def give_up() -> None:
            nonlocal gone
            gone = True
            if done.done():
                if undo is not None and done.exception() is None:
                    undo(done.result())
            elif not goes_on:
                begun[0].cancel()

        with self._closing:
            if self._closed:
                coroutine.close()
                raise ClusterError("it is closed")
            self._loop.call_soon_threadsafe(begin)
        try:
            waiting.acquire()
        except BaseException:
            self._loop.call_soon_threadsafe(give_up)
            raise
        return done.result()

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """For `undo`, in that thread: lets it run, and nobody waits."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Ends the thread; calls under way in other threads raise ClusterError."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Closing(ABC):
    """`with` for what is closed at its end."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
