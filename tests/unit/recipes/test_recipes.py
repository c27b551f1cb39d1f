"""Every recipe over a local lockspace, where tasks are the members: what it promises, and how it refuses."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

import corral
from corral import recipes
from corral.providers.locks import LockSpace

Story = Callable[[LockSpace], Coroutine[Any, Any, None]]


def over(value_size: int = 256) -> Callable[[Story], Callable[[], None]]:
    """Runs a story in a local lockspace, at most ten seconds long; nothing may be held at its end."""

    def decorate(story: Story) -> Callable[[], None]:
        async def body() -> None:
            async with corral.local() as cluster, asyncio.timeout(10):
                space = await cluster.lockspace("s", value_size=value_size)
                await story(space)
                for _ in range(10):
                    await asyncio.sleep(0)
                await space.release()  # raises Busy if a lock was left

        @wraps(story)
        def test() -> None:
            asyncio.run(body())

        del test.__wrapped__  # pytest would look for a fixture `space`
        return test

    return decorate


async def refused(awaitable: Awaitable[Any], waits_for: str) -> None:
    with pytest.raises(corral.TimedOut, match=waits_for):
        await awaitable


# --- mutex -----------------------------------------------------------------------------------------------------------


@over()
async def test_a_mutex_lets_one_in_after_the_other(space: LockSpace) -> None:
    inside = 0
    tokens: list[int] = []

    async def one() -> None:
        nonlocal inside
        async with recipes.Mutex(space, "m").hold(timeout=5) as held:
            inside += 1
            assert inside == 1
            tokens.append(held.token)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(one() for _ in range(20)))
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 20


@over()
async def test_a_mutex_is_not_reentrant_unless_it_is_said_so(space: LockSpace) -> None:
    mutex = recipes.Mutex(space, "m")
    async with mutex.hold():
        with pytest.raises(RuntimeError, match="not reentrant"):
            async with mutex.hold():
                pass
        with pytest.raises(corral.WouldBlock):
            async with recipes.Mutex(space, "m").try_hold():
                pass
    again = recipes.Mutex(space, "m", reentrant=True)
    async with again.hold() as outer:
        async with again.hold() as inner:
            assert inner is outer
        with pytest.raises(corral.WouldBlock):
            async with mutex.try_hold():
                pass
    async with mutex.try_hold():
        pass


@over()
async def test_a_cancelled_wait_for_a_mutex_leaves_nothing(space: LockSpace) -> None:
    async def enter(mutex: recipes.Mutex, timeout: float | None) -> None:
        async with mutex.hold(timeout=timeout):
            raise AssertionError

    async with recipes.Mutex(space, "m").hold():
        waiting = asyncio.create_task(enter(recipes.Mutex(space, "m"), None))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await refused(enter(recipes.Mutex(space, "m"), 0.01), "'m'")
    async with recipes.Mutex(space, "m").try_hold():
        pass


@over()
async def test_the_body_of_a_mutex_whose_lockspace_is_lost_is_cancelled(space: LockSpace) -> None:
    async def work() -> None:
        async with recipes.Mutex(space, "m").hold():
            await asyncio.sleep(60)

    working = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    await space.close()
    with pytest.raises(corral.LockLost):
        await working
    with pytest.raises(corral.LockLost):
        async with recipes.Mutex(space, "m").hold():
            pass


# --- rw-lock ---------------------------------------------------------------------------------------------------------


@over()
async def test_readers_share_and_nobody_overtakes_a_waiting_writer(space: LockSpace) -> None:
    lock = recipes.ReadWriteLock(space, "rw")
    order: list[str] = []

    async def read(name: str) -> None:
        async with lock.read(timeout=5):
            order.append(name)

    async def write(name: str) -> None:
        async with lock.write(timeout=5):
            order.append(name)

    async with lock.read(), lock.read(wait=False):
        with pytest.raises(corral.WouldBlock):
            await lock.write(wait=False)
        tasks = []
        for task in (write("w1"), read("r1"), read("r2"), write("w2"), read("r3")):
            tasks.append(asyncio.create_task(task))
            await asyncio.sleep(0.005)
        assert order == []
    await asyncio.gather(*tasks)
    assert [order[0], sorted(order[1:3]), *order[3:]] == ["w1", ["r1", "r2"], "w2", "r3"]


@over()
async def test_a_writer_goes_on_as_a_reader_and_lets_no_writer_in_between(space: LockSpace) -> None:
    lock = recipes.ReadWriteLock(space, "rw")
    async with lock.write() as held:
        writer = asyncio.ensure_future(lock.write(timeout=5)._acquire())
        await asyncio.sleep(0.005)
        await held.convert(corral.PR)
        assert not writer.done()
    await (await writer).unlock()


# --- semaphore -------------------------------------------------------------------------------------------------------


@over()
async def test_a_semaphore_has_n_permits_and_serves_in_order(space: LockSpace) -> None:
    semaphore = recipes.Semaphore(space, "s", 2)
    first, second = await semaphore.acquire(), await recipes.Semaphore(space, "s", 2).acquire(timeout=1)
    assert {first.number, second.number} == {0, 1}
    assert first.valid
    with pytest.raises(corral.WouldBlock):
        await semaphore.try_acquire()
    await refused(semaphore.acquire(timeout=0.02), "one of 2 permits")
    order: list[int] = []

    async def one(number: int) -> None:
        async with semaphore.hold(timeout=5):
            order.append(number)
            await asyncio.sleep(0.002)

    tasks = []
    for number in range(5):
        tasks.append(asyncio.create_task(one(number)))
        await asyncio.sleep(0.002)
    tasks[1].cancel()
    await first.release()
    await second.release()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3, 4]
    await (await semaphore.try_acquire()).release()


@over()
async def test_all_must_agree_on_the_number_of_permits(space: LockSpace) -> None:
    permit = await recipes.Semaphore(space, "s", 2).acquire()
    with pytest.raises(ValueError, match="2 permits elsewhere, not 3"):
        await recipes.Semaphore(space, "s", 3).acquire()
    await permit.release()
    await (await recipes.Semaphore(space, "s", 3).acquire(timeout=1)).release()


# --- register and counter --------------------------------------------------------------------------------------------


@over()
async def test_a_counter_counts_every_acknowledged_addition_once(space: LockSpace) -> None:
    async def member() -> list[int]:
        async with recipes.Counter(space, "c", 100) as counter:
            return [await counter.add(timeout=5) for _ in range(20)]

    members = [asyncio.create_task(member()) for _ in range(4)]
    async with recipes.Counter(space, "c", 100) as counter:
        counts = [count for mine in await asyncio.gather(*members) for count in mine]
        assert sorted(counts) == list(range(101, 181))
        with pytest.raises(ValueError, match="64 bits"):
            await counter.add(1 << 63)
        await counter.set(-5)
        assert await counter.read() == -5
    async with recipes.Counter(space, "c", 7) as again:
        assert await again.read() == 7  # nobody had it open


@over(value_size=32)
async def test_a_register_says_what_it_has_no_room_for_and_what_its_change_raised(space: LockSpace) -> None:
    async with recipes.Register(space, "r", b"x") as register:
        assert register.capacity == 22
        with pytest.raises(ValueError, match="23 bytes are too many"):
            await register.update(lambda _: bytes(23))
        with pytest.raises(ZeroDivisionError):
            await register.update(lambda _: bytes(1 // 0))
        assert await register.update(lambda data: data + b"y") == b"xy"
        assert await register.read() == b"xy"
    with pytest.raises(ValueError, match="not open"):
        await register.update(bytes)


@over()
async def test_a_change_without_the_consent_of_a_member_times_out_and_is_carried_on_later(space: LockSpace) -> None:
    async with recipes.Counter(space, "c") as counter:
        await counter.add()
        hanging = await space.lock("c/b", corral.PR)  # lets go of a, and not of b
        await refused(counter.add(timeout=0.05), "every member to let go")
        await refused(counter.read(timeout=0.05), "c/b: waits for")  # it may have happened: nobody may say yet
        await hanging.unlock()
        assert await counter.read(timeout=1) == 2
        assert await counter.add(timeout=1) == 3


@over()
async def test_a_change_cut_off_at_any_step_is_whole_or_has_not_happened(space: LockSpace) -> None:
    async with recipes.Counter(space, "c") as watcher:
        for steps in range(40):
            before = await watcher.read()
            counter = recipes.Counter(space, "c")
            await counter.open()
            adding = asyncio.create_task(counter.add(timeout=5))
            for _ in range(steps):
                await asyncio.sleep(0)
            done = adding.done()
            await counter.close()
            after = await watcher.read(timeout=1)
            assert after in ((before + 1,) if done else (before, before + 1))
            await asyncio.gather(adding, return_exceptions=True)


# --- election --------------------------------------------------------------------------------------------------------


@over()
async def test_leaders_follow_each_other_and_observers_know_them(space: LockSpace) -> None:
    observer = recipes.Election(space, "e")
    assert await observer.leader(timeout=1) is None
    seen: list[bytes | None] = []
    known = {name: asyncio.Event() for name in (b"a", b"b", b"c", None)}

    async def observe() -> None:
        async for leader in observer.observe(every=0.002):
            seen.append(leader.identity if leader is not None else None)
            if len(seen) > 1:
                known[seen[-1]].set()

    observing = asyncio.create_task(observe())
    await asyncio.sleep(0.01)

    async def lead(name: bytes) -> int:
        async with recipes.Election(space, "e", name).lead(timeout=5) as leadership:
            assert leadership.valid
            assert await observer.leader(timeout=1) == (leadership.token, name)
            known[None].clear()
            await known[name].wait()
            return leadership.token

    tokens = await asyncio.gather(*(lead(name) for name in (b"a", b"b", b"c")))
    await known[None].wait()
    observing.cancel()
    assert tokens == sorted(tokens)
    assert [name for name in seen if name is not None] == [b"a", b"b", b"c"]


@over()
async def test_a_candidate_gives_up_in_time(space: LockSpace) -> None:
    async def lead(timeout: float) -> None:
        async with recipes.Election(space, "e", b"late").lead(timeout=timeout):
            raise AssertionError

    async with recipes.Election(space, "e", b"first").lead():
        await refused(lead(0.02), "'e'")
    with pytest.raises(ValueError):
        async with recipes.Election(space, "e", bytes(250)).lead():
            pass


# --- barrier ---------------------------------------------------------------------------------------------------------


@over()
async def test_all_enter_together_and_leave_together_turn_after_turn(space: LockSpace) -> None:
    inside: set[int] = set()
    out: list[int] = []

    async def party(number: int) -> None:
        async with recipes.DoubleBarrier(space, "b", 3) as barrier:
            for turn in range(3):
                inside.add(number)
                await barrier.enter(timeout=5)
                assert inside == {0, 1, 2}
                await asyncio.sleep(0.001 * number)
                out.append(turn)
                await barrier.leave(timeout=5)
                assert out.count(turn) == 3
                inside.clear()
                await asyncio.sleep(0.02)

    await asyncio.gather(*(party(number) for number in range(3)))


@over()
async def test_a_party_that_dies_is_not_counted_and_keeps_nobody_inside(space: LockSpace) -> None:
    async with recipes.DoubleBarrier(space, "b", 2) as one, recipes.DoubleBarrier(space, "b", 2) as two:
        early = recipes.DoubleBarrier(space, "b", 2)
        await early.open()
        gone = asyncio.create_task(early.enter(timeout=5))
        await asyncio.sleep(0.01)
        gone.cancel()  # without a word: its number is still in
        await asyncio.gather(gone, return_exceptions=True)
        await refused(one.enter(timeout=0.05), "2 parties to enter")
        await asyncio.gather(one.enter(timeout=5), two.enter(timeout=5))
        with pytest.raises(ValueError, match="in already"):
            await one.enter()
        await two.close()
        await one.leave(timeout=5)
        await early.close()


@over(value_size=32)
async def test_a_barrier_for_more_than_a_value_block_can_name_is_refused(space: LockSpace) -> None:
    with pytest.raises(ValueError, match="need value blocks of 39 bytes"):
        await recipes.DoubleBarrier(space, "b", 3).open()


# --- queue -----------------------------------------------------------------------------------------------------------


@over()
async def test_elements_come_in_order_once_and_back_from_who_did_not_finish(space: LockSpace) -> None:
    async with recipes.Queue(space, "q") as one, recipes.Queue(space, "q") as two:
        for data in (b"a", b"b", b"c"):
            await one.put(data)
        first = await two.take(timeout=1)
        second = await one.take(timeout=1)
        assert (first.data, second.data, await one.length()) == (b"a", b"b", 3)
        await first.give_back()
        again = await one.take(timeout=1)
        assert (again.data, again.number, again.token > first.token) == (b"a", first.number, True)
        with pytest.raises(ZeroDivisionError):
            async with again:
                raise ZeroDivisionError
        async with await two.take(timeout=1) as third:
            assert third.data == b"a"
        await second.done()
        async with await two.take(timeout=1) as last:
            assert last.data == b"c"
        assert await one.try_take() is None
        await refused(one.take(timeout=0.02), "waits for an element")
        await one.put(b"d")
        taken = await one.take(timeout=1)
        waiting = asyncio.create_task(two.take(timeout=0.05))
        await asyncio.sleep(0.01)
        await taken.done()
        await refused(waiting, "waits for an element")  # what it waited for came, and was done


@over(value_size=64)
async def test_a_full_queue_makes_its_producers_wait(space: LockSpace) -> None:
    async with recipes.Queue(space, "q") as queue:
        with pytest.raises(ValueError, match="leaves room for 44"):
            await queue.put(bytes(45))
        await queue.put(bytes(20))
        await refused(queue.put(bytes(20), timeout=0.02), "waits for room for 20 bytes")
        putting = asyncio.create_task(queue.put(bytes(20), timeout=5))
        await asyncio.sleep(0.01)
        async with await queue.take():
            pass
        await putting
        assert await queue.length() == 1
        async with await queue.take():
            pass


@over(value_size=128)
async def test_many_producers_and_takers_some_of_whom_give_up(space: LockSpace) -> None:
    done: list[bytes] = []

    async def produce(name: int) -> None:
        async with recipes.Queue(space, "q") as queue:
            for number in range(10):
                await queue.put(b"%d-%d" % (name, number), timeout=8)

    async def take(name: int) -> None:
        async with recipes.Queue(space, "q") as queue:
            turn = 0
            while len(done) < 30:
                turn += 1
                try:
                    element = await queue.take(timeout=0.5)
                except corral.TimedOut:
                    continue
                await asyncio.sleep(0.001)
                if (turn + name) % 4 == 0:
                    await element.give_back()
                else:
                    await element.done()
                    done.append(element.data)

    async with recipes.Queue(space, "q"):
        await asyncio.gather(*(produce(name) for name in range(3)), *(take(name) for name in range(3)))
    assert sorted(done) == sorted(b"%d-%d" % (name, number) for name in range(3) for number in range(10))
    for name in range(3):
        mine = [data for data in done if data.startswith(b"%d-" % name)]
        assert len(mine) == 10
