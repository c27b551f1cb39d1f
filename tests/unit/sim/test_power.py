"""The power switch speaks the fence agents' protocol, and says `off` only when nothing can be written any more."""

import asyncio

import pytest

from corral.base.time import SECOND
from corral.base.world import Completed, World
from corral.providers.agents.metadata import parse_metadata
from corral.sim.disk import BLOCK
from corral.sim.power import METADATA, PATH, STATUS_OFF, PowerSwitch
from corral.sim.simulation import Simulation

from .rig import simulate


async def forever(world: World) -> None:
    await asyncio.Event().wait()


async def ask(sim: Simulation, **lines: str) -> Completed:
    stdin = "".join(f"{name}={value}\n" for name, value in lines.items()).encode()
    asker = sim.machines["n1"].attach("asker")
    return await asker.world.process.run([PATH], stdin, 10 * SECOND)


def test_metadata_is_what_corral_expects_of_an_agent() -> None:
    metadata = parse_metadata(METADATA, "fence_sim")
    assert metadata.names_victim_by == "plug"
    assert {"on", "off", "reboot", "status", "metadata"} <= metadata.actions


def test_off_on_reboot_and_status() -> None:
    async def body(sim: Simulation) -> None:
        switch = PowerSwitch(sim)
        switch.install()
        machine = sim.machines["n2"]
        machine.install("corrald", forever)
        assert (await ask(sim, action="metadata")).stdout == METADATA
        assert (await ask(sim, action="status", plug="n2")).status == 0
        assert (await ask(sim, action="off", plug="node2")).status == 0
        assert not machine.powered
        assert (await ask(sim, action="status", plug="n2")).status == STATUS_OFF
        assert (await ask(sim, action="on", plug="n2")).status == 0
        before = machine.running("corrald")
        assert before is not None
        assert (await ask(sim, action="reboot", plug="n2")).status == 0
        assert before.gone
        assert machine.running("corrald") is not None
        assert switch.cuts == 2
        assert (await ask(sim, action="off", plug="n9")).status == 1
        switch.works = False
        assert (await ask(sim, action="off", plug="n2")).status == 1
        assert machine.powered

    simulate(body)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_lands_after_off_was_answered(seed: int) -> None:
    async def writing(world: World) -> None:
        disk = await world.disk("shared")
        while True:
            await asyncio.gather(*(disk.write(number * BLOCK, [bytes(BLOCK)]) for number in range(8)))

    async def body(sim: Simulation) -> None:
        device = sim.disk("shared", 8 * BLOCK)
        PowerSwitch(sim).install()
        sim.machines["n2"].start("writer", writing)
        await ask(sim, action="off", plug="n2")
        written = device.writes
        assert written > 0
        await asyncio.sleep(10)
        assert device.writes == written

    simulate(body, seed=seed)
