"""A world small enough to read: coroutines, futures and a disk in memory, stepped by hand. No asyncio, no clock.

`run(coroutine)` drives until it is done; `now` moves to the next timer when nothing else can go on.
"""

import heapq
from collections.abc import Callable, Coroutine, Generator, Sequence
from random import Random
from typing import Any

BLOCK = 4096


class Future:
    def __init__(self) -> None:
        self._done = False
        self._result: Any = None
        self._calls: list[Callable[[], None]] = []

    def done(self) -> bool:
        return self._done

    def set_result(self, result: Any) -> None:
        assert not self._done
        self._done = True
        self._result = result
        calls, self._calls = self._calls, []
        for call in calls:
            call()

    def when_done(self, call: Callable[[], None]) -> None:
        if self._done:
            call()
        else:
            self._calls.append(call)

    def add_done_callback(self, call: Callable[["Future"], None]) -> None:
        self.when_done(lambda: call(self))

    def __await__(self) -> Generator[Any, Any, Any]:
        while not self._done:
            yield self
        return self._result


class Timer:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class StuckError(Exception):
    """Nothing can go on and the awaited thing is not done."""


class World:
    """Stepped tasks in FIFO order, or in an order drawn from `rng` when one is given."""

    def __init__(self, rng: Random | None = None, *, delay: bool = False) -> None:
        self._rng = rng
        self._delay = delay  # what is to happen soon happens after a drawn time
        self._ready: list[tuple[Coroutine[Any, Any, Any], Future, str]] = []
        self._timers: list[tuple[int, int, Callable[[], None], Timer]] = []
        self._count = 0
        self._now = 1
        self._wall = 1_700_000_000_000_000_000
        self._bytes = Random(7)
        self.failures: list[BaseException] = []

    def now(self) -> int:
        return self._now

    def wall_ns(self) -> int:
        self._wall += 1000
        return self._wall

    def wall_seconds(self) -> int:
        return self._wall // 1_000_000_000

    def random_bytes(self, count: int) -> bytes:
        return self._bytes.randbytes(count)

    def future(self) -> Future:
        return Future()

    def call_at(self, when: int, call: Callable[[], None]) -> Timer:
        timer = Timer()
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, call, timer))
        return timer

    async def sleep_until(self, when: int) -> None:
        future = self.future()
        self.call_at(when, lambda: future.set_result(None))
        await future

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> Future:
        done = Future()
        self._ready.append((coroutine, done, name))
        return done

    def soon_at(self) -> int:
        return self._now + (self._rng.randrange(8) if self._delay and self._rng is not None else 0)

    def soon(self, call: Callable[[], None]) -> None:
        self.call_at(self.soon_at(), call)

    def step(self) -> bool:
        """One task goes as far as it can, or time moves to the next timer. False when there is nothing to do."""
        if self._ready:
            at = self._rng.randrange(len(self._ready)) if self._rng is not None else 0
            coroutine, done, name = self._ready.pop(at)
            try:
                awaited = coroutine.send(None)
            except StopIteration as stop:
                done.set_result(stop.value)
            except BaseException as error:
                error.add_note(f"in task {name}")
                self.failures.append(error)
                done.set_result(None)
            else:
                awaited.when_done(lambda: self._ready.append((coroutine, done, name)))
            return True
        while self._timers:
            when, _, call, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self._now = max(self._now, when)
                call()
                return True
        return False

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Until this coroutine is done; raises what it or a background task raised."""
        outcome: list[Any] = []

        async def outer() -> None:
            try:
                outcome.append((True, await coroutine))
            except BaseException as error:
                outcome.append((False, error))

        self.spawn(outer(), "main")
        while not outcome:
            if not self.step():
                raise StuckError(coroutine)
            if self.failures:
                raise self.failures.pop(0)
        good, value = outcome[0]
        if not good:
            raise value
        return value

    def settle(self) -> None:
        """Until nothing is left to do now (timers in the future stay)."""
        while self._ready or (self._timers and self._timers[0][0] <= self._now):
            self.step()
            if self.failures:
                raise self.failures.pop(0)

    def abandon(self) -> None:
        """The process is gone: nothing runs any more."""
        for coroutine, _, _ in self._ready:
            coroutine.close()
        self._ready.clear()
        self._timers.clear()


class MemoryDisk:
    """A disk whose every operation completes a step later; keeps a log of writes and flushes when asked to."""

    block_size = BLOCK

    def __init__(self, world: World, blocks: int, content: bytearray | None = None) -> None:
        self.world = world
        self.content = content if content is not None else bytearray(blocks * BLOCK)
        self.log: list[tuple[str, int, bytes]] | None = None
        self.fail_writes: Callable[[int], bool] | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    async def _later(self) -> None:
        future = self.world.future()
        self.world.soon(lambda: future.set_result(None))
        await future

    async def read(self, offset: int, length: int) -> bytearray:
        assert offset % BLOCK == 0
        assert length % BLOCK == 0
        assert offset + length <= self.size, "read beyond the end of the disk"
        await self._later()
        return self.content[offset : offset + length]

    async def write(self, offset: int, buffers: Sequence[Any]) -> None:
        assert offset % BLOCK == 0
        await self._later()
        data = b"".join(bytes(buffer) for buffer in buffers)
        assert len(data) % BLOCK == 0
        assert offset + len(data) <= self.size, "write beyond the end of the disk"
        if self.fail_writes is not None and self.fail_writes(offset):
            raise OSError(5, "planted write error")
        self.content[offset : offset + len(data)] = data
        if self.log is not None:
            self.log.append(("write", offset, data))
        await self._later()

    async def flush(self) -> None:
        """Logged with how many entries it covers: writes that completed before it began."""
        covered = len(self.log) if self.log is not None else 0
        await self._later()
        if self.log is not None:
            self.log.append(("flush", covered, b""))

    async def discard(self, offset: int, length: int) -> None:
        return

    def close(self) -> None:
        return
