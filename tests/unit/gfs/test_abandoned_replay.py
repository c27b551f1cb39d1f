"""A round that abandons a replay must not leave writes of it behind: they would land on what others write later."""

import asyncio

from corral.api.gfs import ROOT, Caller
from corral.base.time import SECOND
from corral.base.world import World
from corral.gfs import mkfs
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.mount import mount
from corral.sim.disk import Landed
from corral.sim.simulation import Simulation

DEVICE = "/dev/shared"
SOMEBODY = Caller(0, 0, 1)


async def mounted(world: World, slot: int) -> GfsFilesystem:
    return await mount(world, await world.disk(DEVICE), None, slot=slot)


async def abandoned(sim: Simulation) -> None:
    device = sim.disk(DEVICE, 16 << 20)
    victim = sim.machine(1, hosts=("n1",)).attach("mount").world
    await mkfs.format(victim, await victim.disk(DEVICE), cluster="c", name="n", journals=2, journal_blocks=128)
    fs = await mounted(victim, 1)
    await fs.start(None)
    fs.finish(None)
    await fs.go_live()
    for number in range(40):
        await fs.create(ROOT, b"file%d" % number, 0o100644, 2, SOMEBODY)
    await fs.fsyncdir(ROOT, 0, data_only=False)
    sim.machines["n1"].power_cut()
    await sim.wait_until(sim.now + SECOND)

    survivor = sim.machine(2, hosts=("n2",)).attach("mount").world
    fs = await mounted(survivor, 0)
    landed: list[Landed] = []
    device.watch(lambda event: landed.append(event) if isinstance(event, Landed) else None)
    device.slowness = 1000
    writes = fs.device.writes
    replay = asyncio.get_running_loop().create_task(fs.start(None))
    while fs.device.writes == writes:
        await sim.wait_until(sim.now + SECOND // 100)
    device.slowness = 1
    replay.cancel()
    await fs.start(None)  # the next round's
    assert fs.recovery.replayed == [1]
    assert landed
    recovered = sim.now
    await sim.wait_until(sim.now + 60 * SECOND)
    assert [event.offset for event in landed if event.submitted < recovered < event.landed] == []


def test_the_next_round_waits_for_what_the_abandoned_one_writes() -> None:
    with Simulation(1) as sim:
        sim.run(abandoned(sim))
