"""Each World against the same promises."""

import asyncio
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from corral.base.ids import NodeId
from corral.base.world import ProcessId, World
from corral.real.world import RealWorld
from corral.sim.simulation import Simulation
from tests.conformance.world_suite import CHECKS, Check, Laboratory
from tests.unit.real.support import credentials


class RealLaboratory:
    """Worlds of one loop and one machine; each has its own sockets, stores and threads. They share a process, so what
    a world says of itself by pid is the same for all: the checks do not depend on it."""

    host = "127.0.0.1"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._worlds: list[RealWorld] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._bugs: list[BaseException] = []

    def run(self, check: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            try:
                async with asyncio.timeout(30):
                    await check(self)
            finally:
                for world in self._worlds:
                    await world.close()
            assert self._bugs == []

        uvloop.run(main())

    def world(self, node: NodeId, state: str = "") -> RealWorld:
        state = state or f"state-{len(self._worlds)}"
        world = RealWorld(
            str(self._directory / state), credentials(node), fatal=lambda error, where: self._bugs.append(error)
        )
        self._worlds.append(world)
        return world

    async def end(self, world: World) -> None:
        assert isinstance(world, RealWorld)
        await world.close()

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def disk(self, size: int) -> str:
        path = self._directory / "disk.img"
        with path.open("wb") as file:
            file.truncate(size)
        return str(path)

    def bystander(self) -> ProcessId:
        child = subprocess.Popen(["sleep", "60"])
        self._children.append(child)
        found = self._worlds[0].process.identify(child.pid)
        assert found is not None
        return found

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()


class SimLaboratory:
    """One machine per node would put a network in between; all processes are on one, as in the real laboratory."""

    host = "10.0.0.1"

    def __init__(self) -> None:
        self._simulation = Simulation(1)
        self._machine = self._simulation.machine(1)
        self._processes: dict[World, Any] = {}
        self._disks = 0

    def run(self, check: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        self._simulation.run(check(self))

    def world(self, node: NodeId, state: str = "") -> World:
        number = len(self._processes)
        process = self._machine.attach(f"p{number}", node=node, state=state or f"state-{number}")
        self._processes[process.world] = process
        return process.world

    async def end(self, world: World) -> None:
        process = self._processes[world]
        process.exit(0)
        await process.wait_gone()

    def path(self, name: str) -> str:
        return f"/run/{name}"

    def disk(self, size: int) -> str:
        self._disks += 1
        name = f"/dev/disk{self._disks}"
        self._simulation.disk(name, size)
        return name

    def bystander(self) -> ProcessId:
        async def main(world: World) -> None:
            await world.future()

        return self._machine.start("bystander", main).identity

    def close(self) -> None:
        self._simulation.close()


@pytest.fixture(params=["real", "sim"])
def laboratory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Laboratory]:
    made = RealLaboratory(tmp_path) if request.param == "real" else SimLaboratory()
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_world(laboratory: Laboratory, check: Check) -> None:
    laboratory.run(check)
