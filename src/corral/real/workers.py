"""A few threads for system calls that block, and one wake-up of the loop for many that ended.

A job always runs to its end: cancelling whoever awaits it changes nothing for the job (World.disk promises that). Jobs
start in the order they were given; with one thread they also end in it.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, final

_Job = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


@final
class Workers:
    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, threads: int) -> None:
        self._loop = loop
        self._name = name
        self._threads_max = threads
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._waking = False
        self._lock = threading.Lock()
        self._unfinished = 0
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._closed = False

    def submit(self, fn: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        """Called from the loop. The future may be cancelled; the job is not."""
        assert not self._closed, "the threads were closed"
        future: asyncio.Future[Any] = self._loop.create_future()
        self._unfinished += 1
        self._idle.clear()
        if len(self._threads) < min(self._unfinished, self._threads_max):
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((future, fn, args))
        return future

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def close(self) -> None:
        """No more jobs; those accepted are waited for (call after `wait_idle` to not block the loop)."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, fn, args = job
            result: Any = None
            error: BaseException | None = None
            try:
                result = fn(*args)
            except BaseException as raised:  # whoever awaits gets it
                error = raised
            with self._lock:
                self._done.append((future, result, error))
                wake, self._waking = not self._waking, True
            if wake:
                try:
                    self._loop.call_soon_threadsafe(self._finish)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return
            del job, future, fn, args, result, error  # do not keep a buffer alive while waiting

    def _finish(self) -> None:
        with self._lock:
            done, self._done = self._done, deque()
            self._waking = False
        self._unfinished -= len(done)
        if not self._unfinished:
            self._idle.set()
        for future, result, error in done:
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
