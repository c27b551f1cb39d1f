"""As much of a World as agents need: processes that die when told, programs that are coroutines."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from corral.base.time import SECOND
from corral.base.world import Completed, ProcessId
from corral.sim.simulation import Simulation

BOOT = "boot-of-this-machine"
Program = Callable[[dict[str, str]], Coroutine[Any, Any, Completed]]


class FakeProcesses:
    def __init__(self) -> None:
        self.me = ProcessId(1, 1, BOOT)
        self.alive: set[ProcessId] = set()
        self.unkillable: set[ProcessId] = set()
        self.killed: list[ProcessId] = []
        self.programs: dict[str, Program] = {}
        self.ran: list[tuple[str, bytes]] = []

    def is_gone(self, process: ProcessId) -> bool:
        return process not in self.alive

    def kill(self, process: ProcessId) -> None:
        self.killed.append(process)
        if process not in self.unkillable:
            self.alive.discard(process)

    async def wait_gone(self, process: ProcessId) -> None:
        if process in self.alive:
            await asyncio.get_running_loop().create_future()

    async def run(self, argv: Sequence[str], stdin: bytes, timeout_ns: int) -> Completed:
        self.ran.append((" ".join(argv), stdin))
        if argv[0] not in self.programs:
            raise FileNotFoundError(argv[0])
        lines = dict(line.split("=", 1) for line in stdin.decode().splitlines())
        async with asyncio.timeout(timeout_ns / SECOND):
            return await self.programs[argv[0]](lines)


class FakeWorld:
    def __init__(self) -> None:
        self.process = FakeProcesses()

    def now(self) -> int:
        return round(asyncio.get_running_loop().time() * SECOND)

    def wall_seconds(self) -> int:
        return 1_700_000_000

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coroutine, name=name)

    def future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def sleep_until(self, when: int) -> None:
        await asyncio.sleep(max(0, when - self.now()) / SECOND)


def in_virtual_time(body: Coroutine[Any, Any, Any]) -> Any:
    """Runs it on a simulated loop: timeouts cost nothing."""
    return Simulation(0).run(body)
