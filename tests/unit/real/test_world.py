"""The World itself: time, timers, tasks, and what becomes of our own bugs."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from corral.base.time import MILLISECOND, SECOND
from corral.base.world import World
from corral.real import world as worlds
from corral.real.run import Stopped, run
from corral.real.workers import Workers
from corral.real.world import STATUS_FATAL, RealWorld
from tests.unit.real.support import Bench, eventually, on_loop


def test_is_a_world(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world: World = bench.world()
        assert abs(world.now() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < SECOND
        assert abs(world.wall_ns() - time.time_ns()) < SECOND
        assert abs(world.wall_seconds() - time.time()) < 2
        assert (len(world.random_bytes(16)), world.random_bytes(16) != world.random_bytes(16)) == (16, True)
        assert world.store("x") is world.store("x"), "one process opens a store once"

    on_loop(tmp_path, body)


@pytest.mark.parametrize("delay", [-SECOND, 0, 1, 300_000, MILLISECOND, 2_700_001, 20 * MILLISECOND])
def test_a_timer_fires_once_and_never_early(tmp_path: Path, delay: int) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        fired: list[int] = []
        when = world.now() + delay
        world.call_at(when, lambda: fired.append(world.now()))
        assert fired == [], "never from inside call_at"
        await eventually(lambda: bool(fired))
        await asyncio.sleep(0.005)
        assert len(fired) == 1
        assert when <= fired[0] < when + 2 * SECOND

    on_loop(tmp_path, body)


def test_a_cancelled_timer_stays_silent_also_when_it_is_due(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        fired: list[str] = []
        later = world.call_at(world.now(), lambda: fired.append("later"))
        world.call_at(world.now() + MILLISECOND, lambda: fired.append("end"))
        later.cancel()
        later.cancel()
        await eventually(lambda: bool(fired))
        assert fired == ["end"]

    on_loop(tmp_path, body)


def test_after_a_suspend_a_deadline_is_noticed_although_the_loops_clock_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine sleeps an hour: CLOCK_BOOTTIME jumps, the loop's timers do not."""
    jump = 0
    real = time.clock_gettime_ns
    monkeypatch.setattr(worlds, "STRETCH_SECONDS", 0.02)
    monkeypatch.setattr(worlds, "boottime", lambda: real(time.CLOCK_BOOTTIME) + jump)

    async def body(bench: Bench) -> None:
        nonlocal jump
        world = bench.world()
        fired: list[bool] = []
        world.call_at(world.now() + 3600 * SECOND, lambda: fired.append(True))
        await asyncio.sleep(0.05)
        assert fired == []
        jump = 3601 * SECOND
        await eventually(lambda: bool(fired))

    on_loop(tmp_path, body)


def test_sleep_until_can_be_cancelled(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        start = world.now()
        await world.sleep_until(start + 3 * MILLISECOND)
        assert world.now() >= start + 3 * MILLISECOND
        sleeping = asyncio.ensure_future(world.sleep_until(start + 3600 * SECOND))
        await asyncio.sleep(0)
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping

    on_loop(tmp_path, body)


# --- our own bugs ----------------------------------------------------------------------------------------------------


class Bug(Exception):
    pass


def raise_bug(*_: Any) -> None:
    raise Bug("planted")


async def raise_bug_later() -> None:
    await asyncio.sleep(0)
    raise Bug("planted")


@pytest.mark.parametrize("where", ["task", "timer", "accept", "datagram"])
def test_an_exception_that_escapes_is_fatal_once(tmp_path: Path, where: str) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        if where == "task":
            world.spawn(raise_bug_later(), "a task")
            world.spawn(raise_bug_later(), "another task")
        elif where == "timer":
            world.call_at(world.now(), lambda: raise_bug())
        elif where == "accept":
            await world.local.listen(bench.path("s"), raise_bug)  # type: ignore[arg-type]
            connecting = asyncio.ensure_future(world.local.connect(bench.path("s"), None))  # type: ignore[arg-type]
            await eventually(lambda: bool(bench.bugs))
            connecting.cancel()
        else:
            target = await world.network.datagrams("127.0.0.1:0", raise_bug)
            target.send(target.address, b"x")
        await eventually(lambda: bool(bench.bugs))
        await asyncio.sleep(0.01)
        assert [str(error) for error, _ in bench.bugs] == ["planted"]
        bench.bugs.clear()

    on_loop(tmp_path, body)


def test_a_cancelled_task_is_no_bug(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world()
        task = world.spawn(world.sleep_until(world.now() + 3600 * SECOND), "sleeper")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.01)

    on_loop(tmp_path, body)


def test_by_default_a_bug_ends_the_process(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from corral.real.world import RealWorld
async def bug(): raise KeyError("planted")
async def main():
    world = RealWorld(sys.argv[1]); world.spawn(bug(), "the culprit"); await asyncio.sleep(30)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=20, check=False)
    assert done.returncode == STATUS_FATAL
    assert b"stopped by a bug in the culprit" in done.stderr


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_returns_what_main_returns_and_closes_everything(tmp_path: Path) -> None:
    async def main(world: RealWorld) -> list[bytes]:
        await world.store("s").append([b"x"])
        await world.local.listen(str(tmp_path / "sock"), raise_bug)  # type: ignore[arg-type]
        world.spawn(world.sleep_until(world.now() + 3600 * SECOND), "sleeper")
        return await world.store("s").read()

    assert run(main, state_directory=str(tmp_path)) == [b"x"]
    assert sorted(os.listdir(tmp_path)) == ["s.store"]
    assert [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("store", "disk", "process"))
    ] == []


@pytest.mark.parametrize("where", ["the culprit", "callback"])
def test_run_ends_main_when_there_is_a_bug(tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str) -> None:
    cancelled: list[bool] = []

    async def main(world: RealWorld) -> None:
        if where == "callback":
            asyncio.get_running_loop().call_soon(raise_bug)
        else:
            world.spawn(raise_bug_later(), where)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(Stopped, match=f"{where}.*: planted"):
        run(main, state_directory=str(tmp_path))
    assert cancelled == [True]
    assert "stopped by a bug in" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_main_which_may_end_in_order(tmp_path: Path, number: signal.Signals) -> None:
    async def main(world: RealWorld) -> str:
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return "in order"
        return "never"

    assert run(main, state_directory=str(tmp_path)) == "in order"


def test_the_pulse_sees_a_stall_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "corral.loop")

    async def main(world: RealWorld) -> None:
        assert world.pulse is not None
        await asyncio.sleep(0.05)
        time.sleep(0.3)  # noqa: ASYNC251
        await asyncio.sleep(0.05)
        statistics = world.pulse.statistics()
        assert statistics.longest_stall_ns > 250 * MILLISECOND
        assert statistics.stalls >= 1
        world.pulse.reset()
        assert world.pulse.statistics().longest_stall_ns == 0

    run(main, state_directory=str(tmp_path))
    assert "stood still for" in caplog.text


# --- workers ---------------------------------------------------------------------------------------------------------


def test_jobs_of_one_thread_run_in_order_and_bring_results_and_errors() -> None:
    async def main() -> None:
        workers = Workers(asyncio.get_running_loop(), "test", 1)
        seen: list[int] = []
        futures = [workers.submit(seen.append, number) for number in range(20)]
        failing = workers.submit(raise_bug)
        cancelled = workers.submit(seen.append, 99)
        cancelled.cancel()
        await asyncio.gather(*futures)
        with pytest.raises(Bug):
            await failing
        await workers.wait_idle()
        assert seen == [*range(20), 99], "a cancelled job runs all the same"
        workers.close()
        workers.close()

    asyncio.run(main())
