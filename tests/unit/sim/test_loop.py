"""The virtual-time loop runs ordinary asyncio code, in an order that only the calls decide."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from corral.base.time import FOREVER, SECOND
from corral.sim.clock import Clock
from corral.sim.loop import Escaped, LiveLock, Scheduler, SimLoop, Stuck


def run(coroutine: Coroutine[Any, Any, Any], scheduler: Scheduler | None = None) -> Any:
    loop = SimLoop(scheduler)
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def test_sleep_takes_virtual_time_and_no_other() -> None:
    async def body() -> float:
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time() - before

    assert run(body()) == 3600


def test_equal_times_fire_in_the_order_they_were_set() -> None:
    async def body() -> list[int]:
        fired: list[int] = []
        loop = asyncio.get_running_loop()
        for number in (3, 1, 2):
            loop.call_at(1.0, fired.append, number)
        loop.call_soon(fired.append, 0)
        await asyncio.sleep(1)
        return fired

    assert run(body()) == [0, 3, 1, 2]


def test_ready_callbacks_run_before_time_moves() -> None:
    async def body() -> list[str]:
        seen: list[str] = []
        loop = asyncio.get_running_loop()

        def first() -> None:
            seen.append("first timer")
            loop.call_soon(seen.append, "ready")

        loop.call_at(1.0, first)
        loop.call_at(1.0, seen.append, "second timer")
        await asyncio.sleep(2)
        return seen

    assert run(body()) == ["first timer", "ready", "second timer"]


def test_cancelled_timers_do_not_fire_and_do_not_pile_up() -> None:
    async def body() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        for _ in range(20_000):
            loop.call_later(1000, pytest.fail, "a cancelled timer fired").cancel()
        size = len(loop.scheduler._heap)
        await asyncio.sleep(2000)
        return size

    assert run(body()) < 3000


def test_forever_never_fires() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        loop.call_at_ns(FOREVER, pytest.fail, "the end of time came").cancel()
        await asyncio.sleep(10**9)

    run(body())


def test_asyncio_primitives() -> None:
    """Queue, Event, Lock, Condition, Semaphore, gather, wait, shield, TaskGroup, timeout, wait_for, cancellation."""

    async def body() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=2)

        async def produce() -> None:
            for number in range(5):
                await queue.put(number)

        async def consume() -> list[int]:
            return [await queue.get() for _ in range(5)]

        _, got = await asyncio.gather(produce(), consume())
        assert got == [0, 1, 2, 3, 4]

        event, lock, condition, semaphore = asyncio.Event(), asyncio.Lock(), asyncio.Condition(), asyncio.Semaphore(2)
        order: list[str] = []

        async def worker(name: str) -> None:
            await event.wait()
            async with semaphore, lock:
                order.append(name)
                await asyncio.sleep(1)
            async with condition:
                condition.notify_all()

        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(worker(name))
            event.set()
            async with condition:
                await condition.wait_for(lambda: len(order) == 3)
        assert order == ["a", "b", "c"]

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(6)
        assert await asyncio.wait_for(asyncio.sleep(1, "done"), 5) == "done"

        slow = asyncio.ensure_future(asyncio.sleep(2, "slow"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(slow), 1)
        done, pending = await asyncio.wait({slow}, timeout=10)
        assert (len(done), len(pending)) == (1, 0)
        assert slow.result() == "slow"

        task = asyncio.create_task(asyncio.sleep(100))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [await each for each in asyncio.as_completed([asyncio.sleep(2, "b"), asyncio.sleep(1, "a")])] == [
            "a",
            "b",
        ]

    run(body())


def test_an_async_generator_left_behind_is_closed_in_its_loop() -> None:
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(10):
                yield number
        finally:
            await asyncio.sleep(1)
            closed.append("closed")

    async def body() -> None:
        async for number in numbers():
            if number == 3:
                break
        await asyncio.sleep(5)

    run(body())
    assert closed == ["closed"]


def test_asyncio_runner_accepts_the_loop() -> None:
    async def body() -> float:
        await asyncio.sleep(9)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=SimLoop) as runner:
        assert runner.run(body()) == 9


def test_threads_are_refused() -> None:
    async def body() -> None:
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.to_thread(print)

    run(body())


def test_waiting_for_nothing_is_stuck() -> None:
    async def body() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="nothing left to do"):
        run(body())


def test_a_live_lock_is_found() -> None:
    async def body() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(LiveLock, match="without letting time pass"):
        run(body(), Scheduler(burst_max=1000))


def test_the_number_of_steps_is_bounded() -> None:
    async def body() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1)

    with pytest.raises(LiveLock, match="steps taken"):
        run(body(), Scheduler(steps_max=2000))


def test_an_exception_in_a_callback_ends_the_run() -> None:
    async def body() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)
        pytest.fail("the run went on")

    with pytest.raises(Escaped, match="ZeroDivisionError") as caught:
        run(body())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_nobody_retrieves_ends_the_run() -> None:
    async def fails() -> None:
        raise ValueError("dropped")

    async def body() -> None:
        asyncio.ensure_future(fails())  # noqa: RUF006 - dropping it is the point
        for _ in range(200):  # the loop lets go of finished tasks a little later
            await asyncio.create_task(asyncio.sleep(1))

    with pytest.raises(Escaped, match="dropped"):
        run(body())


def test_loops_share_time_and_futures_do_not_leak_between_them() -> None:
    scheduler = Scheduler()
    one, other = SimLoop(scheduler, "one"), SimLoop(scheduler, "other")
    ticks: list[float] = []

    async def in_other() -> None:
        for _ in range(3):
            await asyncio.sleep(1)
            ticks.append(asyncio.get_running_loop().time())

    async def in_one() -> None:
        task = other.create_task(in_other())
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            await task
        await asyncio.sleep(2.5)

    one.run_until_complete(in_one())
    assert ticks == [1, 2]
    one.close()
    other.close()


def test_a_held_loop_runs_late_and_a_dead_one_never() -> None:
    scheduler = Scheduler()
    main, other = SimLoop(scheduler, "main"), SimLoop(scheduler, "other")
    seen: list[tuple[float, str]] = []
    unwound: list[str] = []

    async def ticking() -> None:
        try:
            while True:
                await asyncio.sleep(1)
                seen.append((asyncio.get_running_loop().time(), "tick"))
        finally:
            unwound.append("finally")

    async def body() -> None:
        other.create_task(ticking())
        await asyncio.sleep(2.5)
        other.hold()
        await asyncio.sleep(3)
        other.release()
        await asyncio.sleep(1.7)
        other.die()
        await asyncio.sleep(10)

    main.run_until_complete(body())
    assert [when for when, _ in seen] == [1, 2, 5.5, 6.5]
    assert unwound == []  # a killed program runs no cleanup while its world exists
    other.close()
    main.close()
    assert unwound == ["finally"]


def test_a_clock_never_shows_less_than_the_time_asked_for() -> None:
    for ppm in (-500, -1, 0, 1, 333, 100_000):
        clock = Clock(local=7 * SECOND + 13, virtual=11, ppm=ppm)
        for ahead in (0, 1, 2, 999, SECOND, 12345678901):
            local = 7 * SECOND + 13 + ahead
            virtual = clock.virtual(local)
            assert clock.local(virtual) >= local
            assert virtual == 11 or clock.local(virtual - 1) < local


def test_a_clock_stands_still_and_changes_its_rate_without_a_jump() -> None:
    clock = Clock()
    clock.freeze(100)
    assert clock.local(500) == 100
    clock.thaw(500)
    assert clock.local(600) == 200
    clock.set_rate(600, 1_000_000)
    assert (clock.local(600), clock.local(700), clock.virtual(400)) == (200, 400, 700)
