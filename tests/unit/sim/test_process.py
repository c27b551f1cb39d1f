"""Life and death of simulated processes and machines: kill, pause, gone, power, clocks, participants' flock."""

import asyncio
from collections.abc import Sequence

import pytest

from corral.base.time import SECOND
from corral.base.world import Completed, World
from corral.sim.loop import Escaped
from corral.sim.process import ProcessDied
from corral.sim.simulation import Simulation

from .rig import simulate


async def forever(world: World) -> None:
    await asyncio.Event().wait()


class Ticker:
    """A program that notes its machine's clock once a second."""

    def __init__(self) -> None:
        self.ticks: list[int] = []

    async def __call__(self, world: World) -> None:
        while True:
            self.ticks.append(world.now())
            await world.sleep_until(world.now() + SECOND)


def test_main_ends_with_a_status() -> None:
    async def three(world: World) -> int:
        return 3

    async def exits(world: World) -> int:
        raise SystemExit(4)

    async def body(sim: Simulation) -> list[int | None]:
        processes = [sim.machines["n1"].start("p", main) for main in (three, exits)]
        for process in processes:
            await process.wait_gone()
        return [process.status for process in processes]

    assert simulate(body) == [3, 4]


def test_an_exception_that_leaves_a_process_fails_the_run_and_names_it() -> None:
    async def broken(world: World) -> None:
        await asyncio.sleep(1)
        world.spawn(fails(), "the task")
        await asyncio.sleep(1)

    async def fails() -> None:
        raise AssertionError("DLM-1")

    async def body(sim: Simulation) -> None:
        sim.machines["n1"].start("corrald", broken)
        await asyncio.sleep(10)

    with pytest.raises(Escaped, match=r"AssertionError left task 'the task' of n1/corrald .*DLM-1"):
        simulate(body)


def test_a_killed_process_stops_in_the_middle_and_is_gone_soon() -> None:
    async def body(sim: Simulation) -> None:
        ticker = Ticker()
        process = sim.machines["n1"].start("ticker", ticker)
        watcher = sim.machines["n1"].attach("watcher").world.process
        await asyncio.sleep(2.5)
        assert watcher.identify(process.pid) == process.identity
        assert not watcher.is_gone(process.identity)
        watcher.kill(process.identity)
        await watcher.wait_gone(process.identity)
        assert watcher.is_gone(process.identity)
        assert watcher.identify(process.pid) is None
        watcher.kill(process.identity)
        await watcher.wait_gone(process.identity)
        await asyncio.sleep(5)
        assert len(ticker.ticks) == 3

    simulate(body)


def test_a_paused_process_lags_and_catches_up() -> None:
    async def body(sim: Simulation) -> None:
        ticker = Ticker()
        process = sim.machines["n1"].start("ticker", ticker)
        await asyncio.sleep(2.5)
        process.pause()
        process.pause()
        await asyncio.sleep(10)
        assert len(ticker.ticks) == 3
        process.resume()
        await asyncio.sleep(2.1)
        assert len(ticker.ticks) == 6
        assert ticker.ticks[3] - ticker.ticks[2] > 9 * SECOND
        process.pause()
        process.kill()  # SIGKILL needs no SIGCONT
        await process.wait_gone()

    simulate(body)


def test_a_pid_used_again_is_another_process() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        watcher = machine.attach("watcher").world.process
        old = machine.start("old", forever)
        old.kill()
        await old.wait_gone()
        for _ in range(20):
            new = machine.start("new", forever)
            if new.pid == old.pid:
                break
            new.kill()
            await new.wait_gone()
        assert new.pid == old.pid
        assert watcher.is_gone(old.identity)
        watcher.kill(old.identity)
        assert new.alive

    simulate(body, pid_max=10)


def test_call_brings_a_result_or_the_news_of_death() -> None:
    async def body(sim: Simulation) -> None:
        process = sim.machines["n1"].start("p", forever)

        async def work(seconds: float) -> str:
            await asyncio.sleep(seconds)
            if seconds > 5:
                raise ValueError("too long")
            return asyncio.get_running_loop().name  # type: ignore[attr-defined]

        assert await process.call(work(1)) == "n1/p"
        with pytest.raises(ValueError, match="too long"):
            await process.call(work(6))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.call(work(4)), 1)
        sim.loop.call_later(2, process.kill)
        with pytest.raises(ProcessDied):
            await process.call(work(4))
        with pytest.raises(ProcessDied):
            await process.call(work(4))

    simulate(body)


def test_programs_run_as_processes_of_their_own() -> None:
    async def program(world: World, argv: Sequence[str], stdin: bytes) -> Completed:
        await asyncio.sleep(float(argv[1]))
        return Completed(int(argv[2]), stdin, bytes(3 << 20))

    async def body(sim: Simulation) -> None:
        sim.program("/sbin/fence_it", program)
        processes = sim.machines["n1"].attach("corrald").world.process
        result = await processes.run(["/sbin/fence_it", "1", "2"], b"on", 5 * SECOND)
        assert (result.status, result.stdout, len(result.stderr)) == (2, b"on", 1 << 20)
        with pytest.raises(TimeoutError):
            await processes.run(["/sbin/fence_it", "9", "0"], b"", 5 * SECOND)
        await asyncio.sleep(1)
        assert [process.program for process in sim.machines["n1"].processes.values()] == ["corrald"]
        with pytest.raises(OSError):
            await processes.run(["/sbin/none"], b"", SECOND)
        sim.loop.call_later(1, lambda: sim.machines["n1"].running("fence_it").kill())  # type: ignore[union-attr]
        assert (await processes.run(["/sbin/fence_it", "3", "0"], b"", 5 * SECOND)).status == -9

    simulate(body)


def test_muster_names_the_living_and_takes_the_lock_when_all_are_gone() -> None:
    path = "/state/participants"

    async def participant(world: World) -> None:
        await world.process.enlist(path)
        await asyncio.Event().wait()

    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        corrald = machine.attach("corrald").world.process
        assert await corrald.muster(path) is None
        one, other = machine.start("one", participant), machine.start("other", participant)
        await asyncio.sleep(1)
        both = await corrald.muster(path)
        assert both is not None
        assert sorted(both) == [one.identity, other.identity]
        one.kill()
        assert await corrald.muster(path) == both  # dying is not gone
        await one.wait_gone()
        assert await corrald.muster(path) == [other.identity]
        other.kill()
        await other.wait_gone()
        assert await corrald.muster(path) is None
        assert machine.roster(path).lines == []
        mine = await corrald.enlist(path)
        assert await corrald.muster(path) == [corrald.me]
        mine.release()
        assert await corrald.muster(path) is None

    simulate(body)


def test_a_page_is_shared_within_a_machine_and_gone_with_its_power() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        one, other = machine.attach("one").world, machine.attach("other").world
        with pytest.raises(FileNotFoundError):
            other.page("/run/page", 64, create=False)
        page = one.page("/run/page", 64, create=True)
        view = other.page("/run/page", 64, create=False)
        page[3] = 9
        assert view[3] == 9
        machine.power_cut()
        machine.boot()
        with pytest.raises(FileNotFoundError):
            machine.attach("after").world.page("/run/page", 64, create=False)

    simulate(body)


def test_a_reboot_brings_a_new_boot_id_a_new_clock_and_the_installed_programs() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        machine.install("corrald", forever)
        machine.install("tool", forever, at_boot=False)
        before = machine.launch("corrald")
        await asyncio.sleep(100)
        machine.power_cut()
        assert before.gone
        await asyncio.sleep(1)
        machine.boot()
        after = machine.running("corrald")
        assert after is not None
        assert after.identity.boot_id != before.identity.boot_id
        assert after.world.now() < 60 * SECOND
        assert after.world.process.is_gone(before.identity)
        assert machine.running("tool") is None

    simulate(body)


@pytest.mark.parametrize(("clock_stops", "missing"), [(True, 10), (False, 0)])
def test_a_halted_machine_does_nothing_and_its_clock_may_stand_still(clock_stops: bool, missing: int) -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        ticker = Ticker()
        machine.start("ticker", ticker)
        machine.set_drift(0)
        before = machine.clock.local(sim.now)
        await asyncio.sleep(2.5)
        machine.halt(clock_stops=clock_stops)
        await asyncio.sleep(10)
        assert len(ticker.ticks) == 3
        machine.unhalt()
        await asyncio.sleep(1)
        assert len(ticker.ticks) == 4
        assert machine.clock.local(sim.now) - before == (13.5 - missing) * SECOND

    simulate(body)


def test_timers_follow_a_clock_that_changes_its_rate() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        ticker = Ticker()
        machine.start("ticker", ticker)
        await asyncio.sleep(0.5)
        machine.set_drift(1_000_000)  # twice as fast
        await asyncio.sleep(10)
        assert 20 <= len(ticker.ticks) <= 22

    simulate(body)


def test_wall_clocks_jump_and_boot_time_does_not() -> None:
    async def body(sim: Simulation) -> None:
        machine = sim.machines["n1"]
        world = machine.attach("p").world
        boot, wall = world.now(), world.wall_seconds()
        machine.jump_wall_clock(-3600 * SECOND)
        assert (world.now() - boot, world.wall_seconds() - wall) == (0, -3600)
        assert abs(world.wall_ns() // SECOND - world.wall_seconds()) <= 1

    simulate(body)
