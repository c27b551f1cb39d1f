"""Faults hurt while they last and leave a whole world behind."""

import asyncio
from random import Random

import pytest

from corral.base.time import SECOND
from corral.base.world import World
from corral.sim.faults import KINDS, FullState, Kill, Partition, Pause, PowerCut, Scope, Timed, draw_plan, inject
from corral.sim.links import DROP
from corral.sim.simulation import Simulation

from .rig import simulate

SCOPE = Scope(("n1", "n2", "n3"), ("corrald",))


async def appending(world: World) -> None:
    store = world.store("log")
    while True:
        await asyncio.sleep(0.1)
        try:
            await store.append([b"record"])
        except OSError:
            raise SystemExit(1) from None


def furnish(sim: Simulation) -> None:
    for machine in sim.machines.values():
        machine.install("corrald", appending)
        machine.launch("corrald")


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_plan_every_machine_runs_and_every_link_passes(kind: type) -> None:
    async def body(sim: Simulation) -> None:
        furnish(sim)
        plan = draw_plan(sim.faults_rng, SCOPE, duration_ns=20 * SECOND, count=4, kinds=(kind,))
        await inject(sim, plan)
        assert sim.now == max(timed.end for timed in plan)
        await asyncio.sleep(10)  # the slowest operation under way
        for machine in sim.machines.values():
            process = machine.running("corrald")
            assert machine.powered
            assert not machine.halted
            assert machine.disk_slowness == 1
            assert process is not None
            records = len(machine.state("corrald").records("log"))
            await asyncio.sleep(1)
            assert len(machine.state("corrald").records("log")) > records
        assert all(sim.network.link("10.0.0.1", f"10.0.0.{node}").judge(1) != DROP for node in (1, 2, 3))

    for seed in range(3):
        simulate(body, machines=3, seed=seed)


def test_a_plan_depends_on_its_seed_alone() -> None:
    def drawn(seed: int) -> list[str]:
        plan = draw_plan(Random(seed), SCOPE, duration_ns=60 * SECOND, count=10)
        assert all(0 <= timed.begin <= timed.end <= 60 * SECOND for timed in plan)
        assert plan == sorted(plan, key=lambda timed: timed.begin)
        return [f"{timed.begin} {timed.end} {timed.fault}" for timed in plan]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_all_kinds_are_drawn() -> None:
    plan = draw_plan(Random(1), SCOPE, duration_ns=SECOND, count=500)
    assert {type(timed.fault) for timed in plan} == set(KINDS)


def test_faults_that_overlap_on_one_machine_end_well() -> None:
    async def body(sim: Simulation) -> None:
        furnish(sim)
        before = sim.machines["n1"].running("corrald")
        faults = [Pause("n1", "corrald"), Kill("n1", "corrald"), PowerCut("n1"), FullState("n1", "corrald", 0)]
        await inject(sim, [Timed(n * SECOND, (9 - 2 * n) * SECOND, fault) for n, fault in enumerate(faults)])
        after = sim.machines["n1"].running("corrald")
        assert after is not None
        assert after is not before

    simulate(body, machines=3)


def test_a_partition_drawn_separates_somebody() -> None:
    for seed in range(50):
        cut = Partition.drawn(Random(seed), SCOPE)
        assert cut.one
        assert cut.other
        assert not set(cut.one) & set(cut.other)
