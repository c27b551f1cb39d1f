"""`corral.base.world.World` for one simulated process. Everything it returns lives and dies with the process."""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from random import Random
from typing import TYPE_CHECKING, Any

from corral.base.time import SECOND, Instant
from corral.base.world import Disk, Local, Network, Processes, Store, Timer
from corral.sim.clock import MILLION
from corral.sim.loop import SimLoop

if TYPE_CHECKING:
    from corral.sim.process import Process


class SimWorld:
    def __init__(self, process: "Process", network: Network, local: Local, processes: Processes) -> None:
        self._process = process
        self._loop: SimLoop = process.loop
        self._clock = process.machine.clock
        self._scheduler = process.simulation.scheduler
        self._network = network
        self._local = local
        self._processes = processes

    @property
    def rng(self) -> Random:
        return self._process.rng

    @property
    def network(self) -> Network:
        return self._network

    @property
    def local(self) -> Local:
        return self._local

    @property
    def process(self) -> Processes:
        return self._processes

    def now(self) -> Instant:
        clock = self._clock  # as clock.local, without another call: every engine step passes here
        return clock.base_local + (self._scheduler.now - clock.base_virtual) * clock.rate // MILLION

    def wall_seconds(self) -> int:
        return self._process.machine.wall_ns() // SECOND

    def wall_ns(self) -> int:
        return self._process.machine.wall_ns()

    def call_at(self, when: Instant, fn: Callable[[], None]) -> Timer:
        return self._loop.call_at_ns(when, fn, context=self._loop.context, clock=self._clock)

    def at_turn_end(self, fn: Callable[[], None]) -> None:
        self._loop.call_soon(fn, context=self._loop.context)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self._process.spawn(coroutine, name)

    def future(self) -> asyncio.Future[Any]:
        return self._loop.create_future()

    async def sleep_until(self, when: Instant) -> None:
        if when <= self.now():
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_at(when, lambda: _wake(woken))
        try:
            await woken
        finally:
            timer.cancel()

    def random_bytes(self, count: int) -> bytes:
        return self._process.rng.randbytes(count)

    def store(self, name: str) -> Store:
        return self._process.machine.state(self._process.state).store(self._process, name)

    async def disk(self, name: str) -> Disk:
        self._process.check_alive()
        return self._process.simulation.open_disk(self._process, name)

    def page(self, path: str, size: int, *, create: bool) -> memoryview:
        """As a mapped file: a creator makes a new one, and who mapped the old one keeps that."""
        pages = self._process.machine.pages
        if create:
            pages[path] = bytearray(size)
        elif path not in pages:
            raise FileNotFoundError(errno.ENOENT, f"there is no page {path}")
        page = pages[path]
        if len(page) < size:
            raise OSError(errno.EINVAL, f"page {path} has {len(page)} bytes, not {size}")
        return memoryview(page)[:size]


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
