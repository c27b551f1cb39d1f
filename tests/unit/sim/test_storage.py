"""What stores and shared disks keep, and what crashes may do to them and to nothing else."""

import asyncio
import errno
from collections.abc import Coroutine
from typing import Any

import pytest

from corral.base.time import SECOND
from corral.base.world import StoreDamaged, World
from corral.sim.disk import BLOCK, SECTOR, Flushed, Landed
from corral.sim.loop import Escaped
from corral.sim.machine import Machine
from corral.sim.simulation import Simulation

from .rig import simulate


def block(value: int, count: int = 1) -> bytes:
    return bytes([value]) * (BLOCK * count)


# --- stores ---


def test_what_was_appended_is_there_after_a_kill_and_after_a_power_cut() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        process = machine.attach("corrald")
        store = process.world.store("log")
        await store.append([b"one", b"two"])
        process.kill()
        process = machine.attach("corrald")
        await process.world.store("log").append([b"three"])
        machine.power_cut()
        machine.boot()
        assert await machine.attach("corrald").world.store("log").read() == [b"one", b"two", b"three"]
        assert await machine.attach("other").world.store("log").read() == []
        assert await machine.attach("x", state="corrald").world.store("log").read() == [b"one", b"two", b"three"]

    simulate(body)


def test_nobody_waits_for_what_was_queued_before_a_power_cut() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        store = machine.attach("corrald").world.store("log")
        machine.slownesses.append(1_000_000)
        waiting = [asyncio.ensure_future(store.append([b"x"])) for _ in range(10)]
        await asyncio.sleep(0.001)
        machine.slownesses.clear()
        machine.power_cut()
        machine.boot()
        began = sim.now
        await machine.attach("corrald").world.store("log").read()
        assert sim.now - began < SECOND
        for append in waiting:
            append.cancel()

    simulate(body)


def interrupted(operation: str, how: str) -> set[tuple[bytes, ...]]:
    """All outcomes seen over many seeds of an operation that a crash interrupts."""

    async def main(world: World) -> None:
        store = world.store("log")
        await store.append([b"old"])
        await getattr(store, operation)([b"a", b"b"])

    async def body(sim: Simulation) -> tuple[bytes, ...]:
        machine = sim.machines["n1"]
        process = machine.start("p", main)
        while machine.state("p").records("log") != [b"old"]:  # noqa: ASYNC110
            await asyncio.sleep(0.00001)
        await asyncio.sleep(0.00001)
        if how == "kill":
            process.kill()
            await process.wait_gone()
        else:
            machine.power_cut()
        return tuple(machine.state("p").records("log"))

    return {simulate(body, seed=seed) for seed in range(40)}


@pytest.mark.parametrize("how", ["kill", "power cut"])
def test_an_interrupted_append_leaves_a_prefix(how: str) -> None:
    assert interrupted("append", how) == {(b"old",), (b"old", b"a"), (b"old", b"a", b"b")}


@pytest.mark.parametrize("how", ["kill", "power cut"])
def test_an_interrupted_replace_leaves_old_or_new(how: str) -> None:
    assert interrupted("replace", how) == {(b"old",), (b"a", b"b")}


def test_concurrent_appends_land_in_the_order_they_were_asked_for() -> None:
    async def body(sim: Simulation) -> None:
        store = sim.machines["n1"].attach("p").world.store("log")
        wanted = [bytes([number]) for number in range(50)]
        await asyncio.gather(*(store.append([record]) for record in wanted))
        assert await store.read() == wanted

    simulate(body)


def test_a_store_fails_is_lost_or_damaged_as_told() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        store = machine.attach("p").world.store("log")
        state = machine.state("p")
        state.fail_after = 1
        await store.append([b"kept"])
        for _ in range(2):
            with pytest.raises(OSError) as full:
                await store.append([b"refused"])
            assert full.value.errno == errno.ENOSPC
        state.fail_after = None
        assert await store.read() == [b"kept"]
        state.damage("log", "offset 4096")
        with pytest.raises(StoreDamaged, match="p/log: offset 4096"):
            await store.read()
        machine.lose_state("p")
        assert await machine.attach("p").world.store("log").read() == []

    simulate(body)


# --- shared disks ---


def with_disk(body: Any, *, seed: int = 1, **knobs: Any) -> Any:
    async def prepared(sim: Simulation) -> Any:
        sim.disk("/dev/shared", 64 * BLOCK)
        return await body(sim)

    return simulate(prepared, seed=seed, **knobs)


def test_every_machine_reads_what_one_wrote() -> None:
    async def body(sim: Simulation) -> None:
        one = await sim.machines["n1"].attach("p").world.disk("/dev/shared")
        other = await sim.machines["n2"].attach("p").world.disk("/dev/shared")
        assert (one.size, one.block_size) == (64 * BLOCK, BLOCK)
        await one.write(BLOCK, [block(1), memoryview(block(2)), bytearray(block(3))])
        assert bytes(await other.read(0, 5 * BLOCK)) == block(0) + block(1) + block(2) + block(3) + block(0)

    with_disk(body)


def test_bad_requests_are_refused() -> None:
    async def body(sim: Simulation) -> None:
        world = sim.machines["n1"].attach("p").world
        disk = await world.disk("/dev/shared")
        with pytest.raises(OSError):
            await disk.write(1, [block(1)])
        with pytest.raises(OSError):
            await disk.write(0, [b"short"])
        with pytest.raises(OSError):
            await disk.read(64 * BLOCK, BLOCK)
        disk.close()
        with pytest.raises(OSError):
            await disk.read(0, BLOCK)
        with pytest.raises(FileNotFoundError):
            await world.disk("/dev/none")

    with_disk(body)


def test_a_write_outlives_its_task_and_its_process_which_is_not_gone_before() -> None:
    async def main(world: World) -> None:
        disk = await world.disk("/dev/shared")
        task = asyncio.create_task(disk.write(0, [block(1)]))
        await asyncio.sleep(0)
        task.cancel()
        await disk.write(BLOCK, [block(2)])

    async def body(sim: Simulation) -> None:
        device = sim.disks["/dev/shared"]
        device.slowness = 100_000
        process = sim.machines["n1"].start("p", main)
        await asyncio.sleep(0.001)
        assert len(process.operations) == 2
        process.kill()
        await asyncio.sleep(1)
        assert not process.gone
        await process.wait_gone()
        assert device.image[:BLOCK] == block(1)
        assert device.image[BLOCK : 2 * BLOCK] == block(2)

    with_disk(body)


def test_a_paused_process_has_its_write_done_and_hears_of_it_later() -> None:
    heard: list[float] = []

    async def main(world: World) -> None:
        disk = await world.disk("/dev/shared")
        await disk.write(0, [block(1)])
        heard.append(asyncio.get_running_loop().time())
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        process = sim.machines["n1"].start("p", main)
        await asyncio.sleep(0.00001)
        process.pause()
        await asyncio.sleep(1)
        assert sim.disks["/dev/shared"].image[:BLOCK] == block(1)
        assert heard == []
        process.resume()
        await asyncio.sleep(0.1)
        assert len(heard) == 1

    with_disk(body)


def sectors(image: bytes) -> list[int]:
    assert all(image[at : at + SECTOR] == bytes([image[at]]) * SECTOR for at in range(0, len(image), SECTOR))
    return [image[at] for at in range(0, len(image), SECTOR)]


def test_a_power_cut_of_the_device_keeps_flushed_writes_and_any_version_of_each_sector_after() -> None:
    async def body(sim: Simulation) -> list[int]:
        device = sim.disks["/dev/shared"]
        disk = await sim.machines["n1"].attach("p").world.disk("/dev/shared")
        await disk.write(0, [block(1, 2)])
        await disk.flush()
        await disk.write(0, [block(2)])
        await disk.write(0, [block(3)])
        device.power_cut()
        assert device.image[BLOCK : 2 * BLOCK] == block(1)
        return sectors(device.image[:BLOCK])

    outcomes = [with_disk(body, seed=seed) for seed in range(60)]
    assert {value for outcome in outcomes for value in outcome} == {1, 2, 3}
    assert [1] * 8 in outcomes
    assert [3] * 8 in outcomes
    assert any(len(set(outcome)) > 1 for outcome in outcomes)


def test_a_flush_covers_what_landed_before_it_was_asked_for_and_no_more() -> None:
    async def body(sim: Simulation) -> int:
        device = sim.disks["/dev/shared"]
        disk = await sim.machines["n1"].attach("p").world.disk("/dev/shared")
        await disk.write(0, [block(1)])
        flush = asyncio.create_task(disk.flush())
        await asyncio.sleep(0)
        await disk.write(BLOCK, [block(2)])
        assert not flush.done()
        await flush
        device.power_cut()
        assert device.image[:BLOCK] == block(1)
        return sum(sectors(device.image[BLOCK : 2 * BLOCK]))

    assert 0 in {with_disk(body, seed=seed, flush_low=SECOND, flush_high=2 * SECOND) for seed in range(20)}


def test_a_machine_that_loses_power_leaves_its_write_whole_torn_late_or_lost() -> None:
    async def main(world: World) -> None:
        disk = await world.disk("/dev/shared")
        await disk.write(0, [block(1)])

    async def body(sim: Simulation) -> tuple[str, str]:
        device = sim.disks["/dev/shared"]
        sim.machines["n1"].start("p", main)
        await asyncio.sleep(0.00003)
        sim.machines["n1"].power_cut()
        now = sum(sectors(device.image[:BLOCK]))
        await asyncio.sleep(0.02)
        later = sum(sectors(device.image[:BLOCK]))
        await asyncio.sleep(10)
        assert sum(sectors(device.image[:BLOCK])) == later  # nothing lands after the bound
        words = {0: "none", 8: "whole"}
        return words.get(now, "torn"), words.get(later, "torn")

    outcomes = {with_disk(body, seed=seed) for seed in range(60)}
    assert outcomes >= {("none", "none"), ("whole", "whole"), ("torn", "torn"), ("none", "whole")}


def test_nothing_lands_after_everything_lost_power() -> None:
    async def main(world: World) -> None:
        disk = await world.disk("/dev/shared")
        await asyncio.gather(*(disk.write(number * BLOCK, [block(1)]) for number in range(64)))

    async def body(sim: Simulation) -> None:
        device = sim.disks["/dev/shared"]
        sim.machines["n1"].start("p", main)
        await asyncio.sleep(0.0001)
        assert device.writes < 64
        sim.power_cut()
        left = device.image[:]
        await asyncio.sleep(10)
        assert device.image[:] == left

    for seed in range(10):
        with_disk(body, seed=seed)


def test_a_machine_the_device_refuses_writes_no_more() -> None:
    async def body(sim: Simulation) -> None:
        device = sim.disks["/dev/shared"]
        disk = await sim.machines["n1"].attach("p").world.disk("/dev/shared")
        other = await sim.machines["n2"].attach("p").world.disk("/dev/shared")
        under_way = asyncio.create_task(disk.write(0, [block(1)]))
        await asyncio.sleep(0)
        device.refuse("n1")
        with pytest.raises(OSError):
            await under_way
        await other.write(BLOCK, [block(2)])
        assert device.image[: 2 * BLOCK] == block(0) + block(2)
        device.admit("n1")
        await disk.write(0, [block(1)])
        device.error = errno.EIO
        with pytest.raises(OSError):
            await disk.read(0, BLOCK)

    with_disk(body)


def test_watchers_see_who_wrote_when_and_every_flush() -> None:
    async def body(sim: Simulation) -> None:
        seen: list[Landed | Flushed] = []
        sim.disks["/dev/shared"].watch(seen.append)
        process = sim.machines["n1"].attach("p")
        disk = await process.world.disk("/dev/shared")
        await disk.write(BLOCK, [block(1), block(2)])
        await disk.flush()
        landed, flushed = seen
        assert isinstance(landed, Landed)
        assert isinstance(flushed, Flushed)
        assert (landed.machine, landed.process, landed.identity) == ("n1", "n1/p", process.identity)
        assert (landed.offset, landed.data) == (BLOCK, block(1) + block(2))
        assert landed.submitted < landed.landed <= flushed.submitted < flushed.completed

    with_disk(body)


def test_a_buffer_that_changes_while_it_is_written_fails_the_run() -> None:
    async def body(sim: Simulation) -> None:
        disk = await sim.machines["n1"].attach("p").world.disk("/dev/shared")
        buffer = bytearray(block(1))
        task = asyncio.create_task(disk.write(0, [buffer]))
        await asyncio.sleep(0)
        buffer[0] = 9
        await task

    with pytest.raises(Escaped, match="a buffer changed"):
        with_disk(body)


def test_a_slow_disk_is_slow_for_one_machine_or_for_all() -> None:
    async def took(sim: Simulation, operation: Coroutine[Any, Any, Any]) -> int:
        before = sim.now
        await operation
        return sim.now - before

    async def body(sim: Simulation) -> None:
        one: Machine = sim.machines["n1"]
        slow = await one.attach("p").world.disk("/dev/shared")
        fast = await sim.machines["n2"].attach("p").world.disk("/dev/shared")
        one.slownesses.append(100_000)
        assert await took(sim, slow.read(0, BLOCK)) > 5 * SECOND > SECOND > await took(sim, fast.read(0, BLOCK))
        sim.disks["/dev/shared"].slowness = 100_000
        assert await took(sim, fast.read(0, BLOCK)) > 5 * SECOND

    with_disk(body)
