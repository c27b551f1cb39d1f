"""Simulated processes: their life and death, and `World.process`.

A process is ALIVE, then DYING (SIGKILL taken or `main` over: none of its code runs any more, but its synchronous I/O
does, so files and sockets are still held), then GONE (everything released, peers learn of it). A power cut skips DYING.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from corral.base.ids import NodeId
from corral.base.time import SECOND, Nanoseconds
from corral.base.world import Completed, Enlistment, ProcessId, World
from corral.sim.connection import SimConnection
from corral.sim.knobs import skewed
from corral.sim.local import SimLocal
from corral.sim.loop import Escaped, SimLoop
from corral.sim.network import SimNetwork
from corral.sim.world import SimWorld

if TYPE_CHECKING:
    from corral.sim.machine import Machine
    from corral.sim.simulation import Simulation

T = TypeVar("T")

Main = Callable[[World], Coroutine[Any, Any, int | None]]
Program = Callable[[World, Sequence[str], bytes], Coroutine[Any, Any, Completed]]

OUTPUT_MAX: Final = 1 << 20
KILLED: Final = -9


class ProcessDied(Exception):
    """What somebody outside awaited from this process will never come."""


class Resource(Protocol):
    """What a process holds and its end releases."""

    def close(self) -> None: ...


class Operation(Protocol):
    """I/O under way: keeps a dying process from being gone; a power cut decides at once what becomes of it."""

    def power_cut(self) -> None: ...


class Process:
    """One process on one machine. Made by `Machine.start` (runs a program) or `Machine.attach` (driven by a test)."""

    def __init__(
        self,
        machine: "Machine",
        name: str,
        *,
        loop: SimLoop | None,
        node: NodeId | None,
        cluster: str,
        state: str,
        uid: int,
    ) -> None:
        simulation: Simulation = machine.simulation
        self.machine = machine
        self.simulation = simulation
        self.program = name
        self.name = f"{machine.name}/{name}"
        self.node = machine.node if node is None else node
        self.cluster = cluster
        self.state = state
        self.uid = uid
        self.gid = uid
        self.pid = machine.new_pid()
        self.identity = ProcessId(
            self.pid, machine.clock.local(simulation.scheduler.now) * 100 // SECOND, machine.boot_id
        )
        self.owns_loop = loop is None
        self.loop: SimLoop = SimLoop(simulation.scheduler, self.name, machine.clock) if loop is None else loop
        if self.owns_loop:
            self.loop.on_exit = self._exited
        self.rng = Random(simulation.rng.getrandbits(64))
        self.alive = True
        self.gone = False
        self.status: int | None = None
        self.connections: dict[SimConnection, None] = {}
        self.resources: dict[Resource, None] = {}
        self.operations: dict[Operation, None] = {}
        self._paused = False
        self._gone_waiters: list[asyncio.Future[None]] = []
        self._callers: dict[asyncio.Future[Any], None] = {}
        network = simulation.network
        self.world = SimWorld(self, SimNetwork(network, self), SimLocal(network, self), SimProcesses(self))
        machine.processes[self.pid] = self
        self.note(f"started as {self.pid}")

    def note(self, what: str) -> None:
        self.simulation.trace.note(self.simulation.scheduler.now, self.name, what)

    def check_alive(self) -> None:
        if not self.alive:
            raise OSError(f"{self.name} is dead")

    # --- running code in it ---

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = self.loop.create_task(coroutine, name=name)
        task.add_done_callback(self._finished, context=self.loop.context)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            failure = Escaped(
                f"{type(error).__name__} left task {task.get_name()!r} of {self.name} "
                f"at {self.simulation.scheduler.now} ns: {error}"
            )
            failure.__cause__ = error
            self.simulation.scheduler.fail(failure)

    def run_main(self, main: Main) -> None:
        self.spawn(self._main(main), "main")

    async def _main(self, main: Main) -> None:
        self.exit(await main(self.world) or 0)

    def _exited(self, code: Any) -> None:
        self.exit(code if isinstance(code, int) else int(code is not None))

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """From outside (a test's body, another process): run this coroutine in here and return its result.
        Raises ProcessDied when the process dies first."""
        if not self.alive:
            coroutine.close()
            raise ProcessDied(self.name)
        if not self.owns_loop:
            return await coroutine
        outer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = self.loop.create_task(coroutine, name="call")
        self._callers[outer] = None

        def done(inner: asyncio.Task[T]) -> None:
            self._callers.pop(outer, None)
            if outer.done():
                if not inner.cancelled():
                    inner.exception()
            elif inner.cancelled():
                outer.cancel()
            elif (error := inner.exception()) is not None:
                outer.set_exception(error)
            else:
                outer.set_result(inner.result())

        task.add_done_callback(done, context=self.loop.context)
        try:
            return await outer
        except asyncio.CancelledError:
            task.cancel()
            raise

    # --- life and death ---

    def pause(self) -> None:
        """SIGSTOP: nothing of it runs, what comes due waits; I/O under way completes."""
        assert self.owns_loop, "a process driven by the test cannot be paused"
        if self.alive and not self._paused:
            self._paused = True
            self.note("paused")
            self.loop.hold()

    def resume(self) -> None:
        if self.alive and self._paused:
            self._paused = False
            self.note("resumed")
            self.loop.release()

    def kill(self) -> None:
        """SIGKILL. It is gone a little later, at the earliest when its I/O under way is done."""
        self._die(KILLED, f"killed with {len(self.operations)} operations under way")

    def exit(self, status: int) -> None:
        self._die(status, f"exits with status {status}")

    def _die(self, status: int, how: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self.status = status
        self.note(how)
        if self.owns_loop:
            self.loop.die()
        for caller in self._callers:
            if not caller.done():
                caller.set_exception(ProcessDied(self.name))
        self._callers.clear()
        knobs = self.simulation.knobs
        self.simulation.scheduler.after(skewed(self.rng, knobs.exit_low, knobs.exit_high), self._reap)

    def operation_done(self, operation: Operation) -> None:
        self.operations.pop(operation, None)
        if not self.alive and not self.operations:
            self._reap()

    def _reap(self) -> None:
        if self.gone or self.operations:
            return
        for connection in list(self.connections):
            connection.abort()
        self._released()

    def vanish(self) -> None:
        """The machine lost power."""
        if self.gone:
            return
        if self.alive:
            self._die(KILLED, "lost power")
        for operation in list(self.operations):
            operation.power_cut()
        self.operations.clear()
        for connection in list(self.connections):
            connection.vanish()
        self._released()

    def _released(self) -> None:
        self.gone = True
        for resource in list(self.resources):
            resource.close()
        self.machine.processes.pop(self.pid, None)
        self.note("gone")
        for waiter in self._gone_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._gone_waiters.clear()

    async def wait_gone(self) -> None:
        if not self.gone:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._gone_waiters.append(waiter)
            await waiter


class SimProcesses:
    """`World.process` of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def me(self) -> ProcessId:
        return self._process.identity

    def identify(self, pid: int) -> ProcessId | None:
        found = self._process.machine.processes.get(pid)
        return None if found is None else found.identity

    def is_gone(self, process: ProcessId) -> bool:
        return self._find(process) is None

    def kill(self, process: ProcessId) -> None:
        found = self._find(process)
        if found is not None:
            found.kill()

    async def wait_gone(self, process: ProcessId) -> None:
        found = self._find(process)
        if found is not None:
            await found.wait_gone()

    def _find(self, process: ProcessId) -> Process | None:
        found = self._process.machine.processes.get(process.pid)
        return found if found is not None and found.identity == process else None

    async def run(self, argv: Sequence[str], stdin: bytes, timeout_ns: Nanoseconds) -> Completed:
        me = self._process
        me.check_alive()
        program = me.simulation.programs.get(argv[0])
        if program is None:
            raise FileNotFoundError(f"no program {argv[0]}")
        loop = asyncio.get_running_loop()
        completed: asyncio.Future[Completed] = loop.create_future()

        async def main(world: World) -> int:
            result = await program(world, argv, stdin)
            if not completed.done():
                completed.set_result(result)
            return result.status

        child = me.machine.start(argv[0].rpartition("/")[2], main, uid=me.uid)
        ended = asyncio.ensure_future(child.wait_gone())
        try:
            async with asyncio.timeout(timeout_ns / SECOND):
                await asyncio.wait((ended, completed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not completed.done():
                child.kill()
        if not completed.done():
            return Completed(child.status or 0, b"", b"")
        status, stdout, stderr = completed.result()
        return Completed(status, stdout[:OUTPUT_MAX], stderr[:OUTPUT_MAX])

    async def enlist(self, path: str) -> Enlistment:
        me = self._process
        me.check_alive()
        await asyncio.sleep(skewed(me.rng, me.simulation.knobs.store_low, me.simulation.knobs.store_high) / SECOND)
        return me.machine.roster(path).enlist(me)

    async def muster(self, path: str) -> list[ProcessId] | None:
        return self._process.machine.roster(path).muster()


class Roster:
    """A participants file: who holds the shared lock, and the lines."""

    def __init__(self, machine: "Machine", path: str) -> None:
        self._machine = machine
        self.path = path
        self.lines: list[ProcessId] = []
        self._holders: dict[SimEnlistment, None] = {}

    def enlist(self, process: Process) -> "SimEnlistment":
        self.lines.append(process.identity)
        enlistment = SimEnlistment(self, process)
        self._holders[enlistment] = None
        return enlistment

    def muster(self) -> list[ProcessId] | None:
        if not self._holders:
            self.lines.clear()
            return None
        running = {process.identity for process in self._machine.processes.values()}
        return [line for line in self.lines if line in running]

    def release(self, enlistment: "SimEnlistment") -> None:
        self._holders.pop(enlistment, None)


class SimEnlistment:
    def __init__(self, roster: Roster, process: Process) -> None:
        self._roster = roster
        self._process = process
        process.resources[self] = None

    def release(self) -> None:
        self._roster.release(self)
        self._process.resources.pop(self, None)

    def close(self) -> None:
        self.release()
