"""A virtual-time asyncio without a selector: one `Scheduler`, and an event loop per simulated process on top of it.

Every simulated process has its own `SimLoop`, so ordinary asyncio code (tasks, futures, queues, timeouts) runs
unchanged and still belongs to exactly one process: `hold` keeps back what comes due, `die` makes it vanish, and a
future that leaks from one process into another is refused by asyncio itself ("attached to a different loop").

Order is total and depends on nothing but the calls made: what is ready runs first, first in first out; then the timer
with the smallest (virtual time, sequence number). Virtual time moves only when nothing is ready, and then jumps. No
step costs virtual time, so a program that never lets time pass is caught by counting (`LiveLock`).

Loop states: RUNNING -> HELD -> RUNNING (SIGSTOP, hypervisor pause; nested), any -> DEAD. The tasks of a dead loop are
kept until `bury`, because dropping a suspended coroutine would run its `finally` blocks in a process that is no more.
"""

import asyncio
import gc
import math
import sys
from asyncio import events
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from typing import Any, Final, NoReturn

from corral.base.time import FOREVER, SECOND, Instant
from corral.sim.clock import MILLION, Clock

RUNNING: Final = 0
HELD: Final = 1
DEAD: Final = 2

BURST_MAX: Final = 500_000  # steps at one virtual instant before it is called a live-lock
STEPS_MAX: Final = 200_000_000
COLLECT_EVERY: Final = 1 << 18  # cyclic garbage is collected at fixed step counts, never by allocation counts
CLOSE_TRIES: Final = 32  # how often a buried coroutine may await in its `finally` blocks


class SimulationError(Exception):
    """A run that cannot go on. The message says what, where and when in virtual time."""


class LiveLock(SimulationError):
    """The run takes steps for ever without letting time pass, or more steps than it was given."""


class Stuck(SimulationError):
    """Nothing is ready and no timer is set, but the run was not finished."""


class Escaped(SimulationError):
    """An exception left a callback or a task; it is the `__cause__`."""


class SimHandle(asyncio.TimerHandle):
    """A callback, ready or timed. With a `clock`, `local` is its time on it; without, it follows virtual time."""

    __slots__ = ("clock", "local")

    local: Instant
    _loop: "SimLoop"
    _context: Context

    def __init__(
        self, loop: "SimLoop", callback: Callable[..., Any], args: tuple[Any, ...], context: Context | None
    ) -> None:
        # Not the base class's: that keeps more than is needed, and every step of a run passes here.
        self._loop = loop
        self._callback = callback
        self._args = args
        self._context = copy_context() if context is None else context
        self._cancelled = False
        self._scheduled = False
        self.clock: Clock | None = None

    def __repr__(self) -> str:
        return f"<SimHandle {self._callback} of {self._loop.name}>"

    def when(self) -> float:
        return self.local / SECOND

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._callback = _nothing
            self._args = ()
            if self._scheduled:
                self._loop.scheduler.note_cancelled()


def _nothing() -> None:
    """What a cancelled handle calls, so that it keeps nothing alive."""


class Scheduler:
    """Virtual time and the order of all steps of all processes."""

    def __init__(self, *, burst_max: int = BURST_MAX, steps_max: int = STEPS_MAX) -> None:
        self.now: Instant = 0  # virtual nanoseconds since the run began
        self.steps = 0
        self.running = False
        self.current: SimLoop | None = None
        self._ready: deque[SimHandle] = deque()
        self._heap: list[tuple[Instant, int, SimHandle]] = []
        self._sequence = 0
        self._cancelled = 0
        self._failure: BaseException | None = None
        self._burst_max = burst_max
        self._steps_max = steps_max
        self._inspect_at = min(COLLECT_EVERY, steps_max + 1)
        self._generators: dict[int, SimLoop] = {}  # async generator -> the process that first iterated it
        self.kernel = SimLoop(self, "kernel")  # owns what happens whether or not a process lives: wires, disks, power

    # --- what loops and the simulated hardware use ---

    def soon(self, handle: SimHandle) -> None:
        self._ready.append(handle)

    def push(self, when: Instant, handle: SimHandle) -> None:
        """`when` in virtual time; the past means now, after everything already due."""
        self._sequence += 1
        handle._scheduled = True
        heappush(self._heap, (when, self._sequence, handle))

    def after(self, delay: int, callback: Callable[..., Any], *args: Any) -> SimHandle:
        """A kernel event in `delay` virtual nanoseconds: no process can pause it or take it along when it dies."""
        handle = SimHandle(self.kernel, callback, args, self.kernel.context)
        self.push(self.now + delay, handle)
        return handle

    def note_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > 1000 and self._cancelled * 2 > len(self._heap):
            self._heap[:] = [entry for entry in self._heap if not entry[2]._cancelled]
            heapify(self._heap)
            self._cancelled = 0

    def take_timers(self, clock: Clock) -> list[SimHandle]:
        """Removes the timers set on this clock, in firing order; `push` them again when its course is known."""
        taken = sorted(
            entry for entry in self._heap if entry[2].clock is clock
        )  # (when, sequence) is unique, handles are never compared
        if taken:
            gone = {entry[1] for entry in taken}
            self._heap[:] = [entry for entry in self._heap if entry[1] not in gone]
            heapify(self._heap)
        for _, _, handle in taken:
            handle._scheduled = False
        return [handle for _, _, handle in taken if not handle._cancelled]

    def fail(self, error: BaseException) -> None:
        """The first failure ends the run after the present step."""
        if self._failure is None:
            self._failure = error

    # --- the run ---

    def run(self, until: "SimLoop") -> None:
        """Steps until `until.stop()` was called."""
        assert not self.running
        self.running = True
        hooks = sys.get_asyncgen_hooks()
        collecting = gc.isenabled()
        gc.disable()  # automatic collections would make __del__ methods run at moments no seed decides
        sys.set_asyncgen_hooks(firstiter=self._generator_begins, finalizer=self._generator_dropped)
        try:
            self._run(until)
        finally:
            self.current = None
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)
            if collecting:
                gc.enable()
            self.running = False

    def _run(self, until: "SimLoop") -> None:
        ready, heap = self._ready, self._heap
        current: SimLoop | None = None
        burst = 0
        while not until._stopping:
            if ready:
                handle = ready.popleft()
                if handle._cancelled:
                    continue
            elif heap:
                when, _, handle = heappop(heap)
                handle._scheduled = False
                if handle._cancelled:
                    self._cancelled -= 1
                    continue
                if when > self.now:
                    self.now = when
                    burst = 0
            else:
                raise Stuck(f"nothing left to do at {self.now} ns, but {until.name} is not finished")
            loop = handle._loop
            if loop.state:
                loop.refuse(handle)
                continue
            if loop is not current:
                self.current = current = loop
                events._set_running_loop(loop)
            burst += 1
            self.steps += 1
            if burst > self._burst_max or self.steps >= self._inspect_at:
                self._inspect(burst, handle)
            try:
                handle._context.run(handle._callback, *handle._args)
            except KeyboardInterrupt:
                raise
            except SystemExit as error:
                if loop.on_exit is None:
                    raise
                loop.on_exit(error.code)
            except BaseException as error:
                self._escaped(loop, error)
            if self._failure is not None:
                raise self._failure

    def _inspect(self, burst: int, handle: SimHandle) -> None:
        if burst > self._burst_max:
            raise LiveLock(f"{burst} steps at {self.now} ns without letting time pass; next in {handle._loop.name}")
        if self.steps > self._steps_max:
            raise LiveLock(f"{self.steps} steps taken by {self.now} ns")
        self._inspect_at = min(self.steps + COLLECT_EVERY, self._steps_max + 1)
        gc.collect()

    def _escaped(self, loop: "SimLoop", error: BaseException) -> None:
        if loop.state == DEAD:
            return  # a process that killed itself is not heard any more
        failure = Escaped(f"{type(error).__name__} left a callback of {loop.name} at {self.now} ns: {error}")
        failure.__cause__ = error
        self.fail(failure)

    def _generator_begins(self, generator: AsyncGenerator[Any, Any]) -> None:
        if self.current is not None:
            self._generators[id(generator)] = self.current

    def _generator_dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        loop = self._generators.pop(id(generator), self.kernel)
        if loop.state == DEAD:
            loop.keep(generator)
        else:
            loop.create_task(generator.aclose())


class SimLoop(asyncio.BaseEventLoop):
    """The event loop of one process: asyncio's interface over the scheduler and the machine's clock."""

    def __init__(self, scheduler: Scheduler | None = None, name: str = "loop", clock: Clock | None = None) -> None:
        self.scheduler = Scheduler() if scheduler is None else scheduler
        self.name = name
        self.clock = Clock() if clock is None else clock
        self.state = RUNNING
        self.context = copy_context()
        self.on_exit: Callable[[Any], None] | None = None  # takes the code of a SystemExit that reaches this loop
        self._holds = 0
        self._held: list[SimHandle] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._tasks_prune_at = 64
        self._kept: list[AsyncGenerator[Any, Any]] = []
        super().__init__()

    # --- time and callbacks ---

    def now(self) -> Instant:
        """This machine's clock, nanoseconds."""
        return self.clock.local(self.scheduler.now)

    def time(self) -> float:
        return self.clock.local(self.scheduler.now) / SECOND

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> SimHandle:
        handle = SimHandle(self, callback, args, context)
        self.scheduler._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]  # there is one thread

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> SimHandle:
        return self.call_at_ns(self.now() + math.ceil(delay * SECOND), callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> SimHandle:
        return self.call_at_ns(math.ceil(when * SECOND), callback, *args, context=context)

    def call_at_ns(
        self,
        when: Instant,
        callback: Callable[..., Any],
        *args: Any,
        context: Context | None = None,
        clock: Clock | None = None,
    ) -> SimHandle:
        """At `when` on the clock (by default this loop's). FOREVER never fires."""
        handle = SimHandle(self, callback, args, context)
        if when < FOREVER:
            scheduler = self.scheduler
            handle.clock = clock = self.clock if clock is None else clock
            handle.local = when
            rate = clock.rate
            if rate:  # as clock.virtual and self.push, without their calls: drivers set a timer after every step
                at = clock.base_virtual - (clock.base_local - when) * MILLION // rate
                scheduler._sequence = sequence = scheduler._sequence + 1
                handle._scheduled = True
                heappush(scheduler._heap, (max(at, scheduler.now), sequence, handle))
            else:
                clock.waiting.append(handle)
        return handle

    def deliver(self, when: Instant, callback: Callable[..., Any], *args: Any) -> SimHandle:
        """From outside, at virtual `when`: held while the process is, lost when it is dead."""
        handle = SimHandle(self, callback, args, self.context)
        self.scheduler.push(when, handle)
        return handle

    # --- futures and tasks ---

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        if self.state == DEAD:
            coro.close()
            raise RuntimeError(f"{self.name} is dead")
        task: asyncio.Task[Any] = asyncio.Task(
            coro, loop=self, name=None if name is None else str(name), context=context
        )
        tasks = self._tasks
        tasks.append(task)
        if len(tasks) > self._tasks_prune_at:
            tasks[:] = [each for each in tasks if not each.done()]
            self._tasks_prune_at = max(64, 2 * len(tasks))
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("the simulated world has no threads: run_in_executor is refused")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What asyncio would only log (an exception nobody retrieved) fails the run."""
        if self.state == DEAD or self._closed:
            return
        error = context.get("exception")
        message = f"{context.get('message', 'error')} in {self.name} at {self.scheduler.now} ns: {error!r}"
        if isinstance(context.get("task"), asyncio.Task):
            message += f" ({context['task'].get_name()})"
        failure = Escaped(message)
        failure.__cause__ = error
        self.scheduler.fail(failure)

    def unretrieved(self) -> BaseException | None:
        """The exception of a finished task that nobody has looked at, if there is one."""
        for task in self._tasks:
            if task.done() and getattr(task, "_log_traceback", False):
                return task.exception()
        return None

    # --- process states ---

    def hold(self) -> None:
        """Everything that comes due from now on waits; holds nest."""
        if self.state != DEAD:
            self._holds += 1
            self.state = HELD

    def release(self) -> None:
        if self.state != HELD:
            return
        self._holds -= 1
        if not self._holds:
            self.state = RUNNING
            held, self._held = self._held, []
            for handle in held:
                self.scheduler.soon(handle)

    def die(self) -> None:
        self.state = DEAD
        self._held.clear()

    def refuse(self, handle: SimHandle) -> None:
        if self.state == HELD:
            self._held.append(handle)

    def keep(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._kept.append(generator)

    def bury(self) -> None:
        """After the run: ends every coroutine left, with nothing around it that it could still change."""
        self.die()
        self._closed = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                if coroutine is not None:
                    _close(coroutine)  # type: ignore[arg-type]
        for generator in self._kept:
            _close(generator.aclose())

    # --- running it directly (the loop of a test, or of the simulation's own body) ---

    def run_forever(self) -> None:
        if self._closed:
            raise RuntimeError("the event loop is closed")
        if self.is_running():
            raise RuntimeError("the simulation is running already")
        if events._get_running_loop() is not None:
            raise RuntimeError("another event loop is running in this thread")
        self._stopping = False
        try:
            self.scheduler.run(self)
        finally:
            self._stopping = False

    def is_running(self) -> bool:
        return self.scheduler.running

    def set_debug(self, enabled: bool) -> None:
        self._debug = enabled

    async def shutdown_asyncgens(self) -> None:
        """Async generators are ended by `bury`."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none."""

    def close(self) -> None:
        if self.is_running():
            raise RuntimeError("a running loop cannot be closed")
        if not self._closed:
            self.bury()

    def __del__(self) -> None:
        """The base class warns about loops that were not closed; a simulated process may just be dropped."""


def _close(coroutine: Coroutine[Any, Any, Any]) -> None:
    for _ in range(CLOSE_TRIES):
        try:
            coroutine.close()
        except BaseException:  # whatever a dead program does while it is unwound is of no consequence
            continue
        return
