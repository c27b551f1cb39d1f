"""The World on a running asyncio loop, usually uvloop (contract: base/world.py; `run.run` starts a process on it).

Time is CLOCK_BOOTTIME, which goes on while the machine sleeps; the loop's timers are monotonic and do not. So a timer
is never believed: when it fires it compares, and it sleeps at most a second at a stretch, so that after a suspend
deadlines that passed meanwhile are noticed within a second. A timer never fires early.

An exception that escapes to the loop is our own bug, and a wrong node corrupts where a stopped one is fenced: `fatal`
is called once, which by default ends the process at once.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from functools import partial
from random import Random
from typing import Any, Final, final

from corral.base.time import Instant
from corral.real.disk import THREADS, RealDisk, open_disk
from corral.real.identity import Credentials
from corral.real.local import RealLocal
from corral.real.network import RealNetwork
from corral.real.page import map_page
from corral.real.process import RealProcesses
from corral.real.pulse import Pulse
from corral.real.store import RealStore
from corral.real.turn import Turn
from corral.real.workers import Workers

STATUS_FATAL: Final = 70  # exit status after our own bug (EX_SOFTWARE)
STRETCH_SECONDS: Final = 1.0  # the longest a timer trusts the monotonic clock
CLOSE_SECONDS: Final = 3.0  # how long `close` waits for connections to send what they have

log = logging.getLogger("corral.real")


boottime: Final[Callable[[], Instant]] = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)


def end_process(error: BaseException, where: str) -> None:
    """The default `fatal`."""
    log.critical("stopped by a bug in %s: %s", where, error, exc_info=error)
    logging.shutdown()
    os._exit(STATUS_FATAL)


@final
class RealTimer:
    """Fires once, at or after `when`."""

    __slots__ = ("_fatal", "_fn", "_handle", "_loop", "_when")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        when: Instant,
        fn: Callable[[], None],
        fatal: Callable[[BaseException, str], None],
    ) -> None:
        self._loop = loop
        self._when = when
        self._fn: Callable[[], None] | None = fn
        self._fatal = fatal
        self._handle: asyncio.Handle = self._arm(when - boottime())

    def cancel(self) -> None:
        self._fn = None
        self._handle.cancel()

    def _arm(self, left: int) -> asyncio.Handle:
        if left <= 0:
            return self._loop.call_soon(self._fire)
        # Up to the next millisecond, which is what uvloop counts in: rounding down would only make us turn twice.
        return self._loop.call_later(min(-(-left // 1_000_000) / 1000, STRETCH_SECONDS), self._fire)

    def _fire(self) -> None:
        if self._fn is None:
            return
        left = self._when - boottime()
        if left > 0:
            self._handle = self._arm(left)
            return
        fn, self._fn = self._fn, None
        try:
            fn()
        except Exception as error:
            self._fatal(error, "a timer")


@final
class RealWorld:
    """Must be made while the loop runs. `guest`: the loop belongs to an application. `credentials` (pki.load) are
    needed for network connections only."""

    def __init__(
        self,
        state_directory: str,
        credentials: Credentials | None = None,
        *,
        fatal: Callable[[BaseException, str], None] = end_process,
        guest: bool = False,
    ) -> None:
        self.pulse: Pulse | None = None  # set by run.run
        self._loop = asyncio.get_running_loop()
        self._on_fatal = fatal
        self._dead = False
        self._state_directory = state_directory
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stores: dict[str, RealStore] = {}
        self._disks: list[RealDisk] = []
        self._store_workers = Workers(self._loop, "store", 1)
        self._disk_workers = Workers(self._loop, "disk", THREADS)
        self._process_workers = Workers(self._loop, "process", 2)
        self._rng = Random(os.urandom(16))
        self._turn = Turn(self._loop)
        self.at_turn_end: Final = self._turn.at_end
        self._network = RealNetwork(self._turn, credentials, boottime, self.fatal)
        self._local = RealLocal(self._turn, self.fatal)
        self._process = RealProcesses(self._loop, self._process_workers)
        if not guest:  # the loop of an application has its own idea of what escapes to it
            self._loop.set_exception_handler(self._escaped)

    # --- the contract -----------------------------------------------------------------------------------------------

    @property
    def rng(self) -> Random:
        return self._rng

    @property
    def network(self) -> RealNetwork:
        return self._network

    @property
    def local(self) -> RealLocal:
        return self._local

    @property
    def process(self) -> RealProcesses:
        return self._process

    now = staticmethod(boottime)  # the clock itself: it is read on every step of every engine

    def wall_seconds(self) -> int:
        return int(time.time())

    def wall_ns(self) -> int:
        return time.time_ns()

    def call_at(self, when: Instant, fn: Callable[[], None]) -> RealTimer:
        return RealTimer(self._loop, when, fn, self.fatal)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def future(self) -> asyncio.Future[Any]:
        return self._loop.create_future()

    async def sleep_until(self, when: Instant) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        timer = self.call_at(when, lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            timer.cancel()

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)

    def store(self, name: str) -> RealStore:
        store = self._stores.get(name)
        if store is None:
            store = self._stores[name] = RealStore(self._store_workers, self._state_directory, name)
        return store

    async def disk(self, name: str) -> RealDisk:
        disk = await open_disk(self._disk_workers, name)
        self._disks.append(disk)
        return disk

    def page(self, path: str, size: int, *, create: bool) -> memoryview:
        return map_page(path, size, create=create)

    # --- our own bugs -----------------------------------------------------------------------------------------------

    def fatal(self, error: BaseException, where: str) -> None:
        if not self._dead:
            self._dead = True
            self._on_fatal(error, where)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fatal(error, task.get_name())

    def _escaped(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What callbacks and forgotten futures throw at the loop. The weather of the network is not a bug."""
        error = context.get("exception")
        message = str(context.get("message", ""))
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.fatal(error, message or "a callback")
        else:
            log.warning("%s%s", message, f": {error}" if error is not None else "")

    # --- end --------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """An orderly end: tasks cancelled, connections closed when they sent what they can, I/O finished."""
        me = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not me]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self._network.close()
        self._local.close()
        await self._streams_ended()
        for disk in self._disks:
            disk.close()
        for workers in (self._store_workers, self._disk_workers, self._process_workers):
            await workers.wait_idle()
            workers.close()
        for store in self._stores.values():
            store.close()

    async def _streams_ended(self) -> None:
        """Those that do not end by themselves in time are aborted; that takes a turn or two."""
        for _ in range(round(CLOSE_SECONDS / 0.005)):
            if not self._network.open_streams and not self._local.open_streams:
                break
            await asyncio.sleep(0.005)
        self._network.open_streams.drop()
        self._local.open_streams.drop()
        await asyncio.sleep(0.005 if self._network.open_streams or self._local.open_streams else 0)
