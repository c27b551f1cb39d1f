"""`lock()` as applications use it, over the local provider, in virtual time."""

import asyncio

import pytest

from corral.api.dlm import CR, EX, NL, PR, Request
from corral.base.errors import Busy, ClusterError, Deadlock, LockLost, TimedOut, WouldBlock
from corral.base.time import SECOND
from corral.providers import locks
from corral.providers.local import LocalLocks
from corral.sim.simulation import Simulation


def locally(body):
    """Runs `body(manager, world)` in a process of a simulated machine."""

    async def main(world):
        await body(LocalLocks(world), world)
        return 0

    with Simulation(1) as sim:
        process = sim.machine(1).start("app", main)

        async def wait():
            while process.alive:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        sim.run(wait())
        assert process.status == 0


def test_a_lock_excludes_hands_over_and_its_token_grows():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        log = []

        async def worker(name):
            async with space.lock("invoice", EX) as held:
                log.append((name, held.mode, held.token))
                await asyncio.sleep(1)
                log.append((name, "leaves"))

        await asyncio.gather(worker("a"), worker("b"))
        (_, _, first), (_, _, second) = log[0], log[2]
        assert [entry[0] for entry in log] == ["a", "a", "b", "b"]
        assert second > first

    locally(body)


def test_a_lockspace_is_made_once_and_released_by_force_if_need_be():
    async def body(manager, world):
        space = await manager.lockspace("orders", exclusive=True)
        with pytest.raises(ClusterError, match="exists already"):
            await manager.lockspace("orders", exclusive=True)
        async with space.lock("kept", EX, keep=True):
            pass
        held = await space.lock("x", EX)
        for force in (0, 1):
            with pytest.raises(Busy):
                await space.release(force)
        await space.release(2)
        with pytest.raises(LockLost):
            await held.convert(NL)
        space = await manager.lockspace("orders", exclusive=True)
        async with space.lock("kept", EX, keep=True):
            pass
        await space.release()

    locally(body)


def test_the_value_travels_with_the_lock():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        anchor = await space.lock("counter", NL)
        for expected in range(3):
            async with space.lock("counter", EX) as held:
                assert held.value_valid
                assert int.from_bytes(held.value, "big") == expected
                await held.unlock(value=(expected + 1).to_bytes(32, "big"))
        await anchor.convert(PR)
        assert int.from_bytes(anchor.value, "big") == 3

    locally(body)


def test_not_waiting_timeouts_and_deadlock_are_errors_of_their_own():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        first = await space.lock("x", EX)
        with pytest.raises(WouldBlock):
            await space.lock("x", PR, wait=False)
        before = world.now()
        with pytest.raises(TimedOut):
            await space.lock("x", PR, timeout=2)
        assert world.now() - before == 2 * SECOND
        await first.convert(PR)
        second = await space.lock("x", PR)
        waiting = asyncio.ensure_future(first.convert(EX))
        await asyncio.sleep(0)
        with pytest.raises(Deadlock):
            await second.convert(EX)
        await second.unlock()
        await waiting
        assert first.mode == EX

    locally(body)


def test_cancelling_the_task_cancels_the_request_and_loses_no_grant():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        holder = await space.lock("x", EX)
        waiting = asyncio.ensure_future(space.lock("x", EX)._acquire())
        await asyncio.sleep(1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        granted = asyncio.ensure_future(space.lock("x", EX)._acquire())
        await asyncio.sleep(1)
        await holder.unlock()  # the grant is on its way when the task is cancelled
        granted.cancel()
        await asyncio.gather(granted, return_exceptions=True)
        async with asyncio.timeout(1):
            await space.lock("x", EX)

    locally(body)


def test_a_kept_lock_is_taken_again_with_its_token_until_somebody_else_wants_it():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True) as held:
            token = held.token
        async with space.lock("x", EX, keep=True) as held:
            assert held.token == token
        async with space.lock("x", PR) as other:
            assert other.token > token
        async with space.lock("x", EX, keep=True) as held:
            assert held.token > token

    locally(body)


def test_a_kept_lock_is_not_taken_again_once_its_lease_has_lapsed():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", PR, keep=True) as held:
            token = held.token
        space.backend.lease_until = lambda: world.now()
        async with space.lock("x", PR, keep=True) as other:
            assert other is not held
            assert not other.valid
        space.backend.lease_until = lambda: world.now() + 1
        async with space.lock("x", PR, keep=True) as again:
            assert (again is held, again.token, again.valid) == (True, token, True)

    locally(body)


def test_a_kept_lock_has_one_user_at_a_time():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", PR, keep=True) as first:
            pass
        async with space.lock("x", PR, keep=True) as inner:
            assert inner is first
            async with space.lock("x", PR, keep=True) as other:
                assert other is not first
            assert (first.mode, other.mode) == (PR, -1)
        async with space.lock("x", PR, keep=True) as held:
            assert held is first

    locally(body)


def test_a_kept_lock_that_is_wanted_while_in_use_goes_when_its_body_ends():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True):
            pass
        async with space.lock("x", EX, keep=True) as held:
            waiting = asyncio.ensure_future(space.lock("x", EX)._acquire())
            await asyncio.sleep(1)
            assert not waiting.done()
            assert held.mode == EX
        other = await waiting
        assert (held.mode, other.mode) == (-1, EX)

    locally(body)


def test_a_kept_lock_that_was_converted_is_kept_in_its_new_mode():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True) as held:
            pass
        async with space.lock("x", EX, keep=True) as held:
            await held.convert(PR)
        async with space.lock("x", EX, keep=True) as other:
            assert other is not held
            assert held.mode == -1  # it was in the way
        async with space.lock("y", EX, keep=True) as held:
            await held.unlock()
        async with space.lock("y", EX, keep=True) as other:
            assert other is not held

    locally(body)


@pytest.mark.interpreted
def test_kept_locks_are_bounded(monkeypatch):
    monkeypatch.setattr(locks, "KEPT_MAX", 2)

    async def body(manager, world):
        space = await manager.lockspace("orders")
        kept = []
        for name in ("a", "b", "c", "d"):
            async with space.lock(name, EX, keep=True) as held:
                kept.append(held)
        assert [held.mode for held in kept] == [-1, -1, EX, EX]

    locally(body)


def test_who_has_a_kept_lock_in_hand_takes_it_again_without_waiting():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True) as held:
            token = held.token
            assert not held.kept
            with pytest.raises(WouldBlock, match="in use"), held:
                pytest.fail("it has one user at a time")
        for _ in range(3):
            assert held.kept
            with held as again:
                assert (again is held, held.token, held.valid, held.kept) == (True, token, True, False)
                with pytest.raises(WouldBlock, match="in use"), held:
                    pytest.fail("it has one user at a time")
        async with space.lock("x", PR):
            assert not held.kept
        with pytest.raises(WouldBlock, match="given back"), held:
            pytest.fail("somebody else had it")

    locally(body)


def test_a_kept_lock_is_not_taken_again_by_hand_once_its_lease_has_lapsed():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True) as held:
            pass
        space.backend.lease_until = lambda: world.now()
        assert not held.kept
        with pytest.raises(WouldBlock, match="lapsed"), held:
            pytest.fail("the lease has lapsed")
        space.backend.lease_until = lambda: world.now() + 1
        with held:
            space.backend.lost.set_result("evicted")
            space.backend.lease_until = lambda: 0
            with pytest.raises(WouldBlock, match="in use"), held:
                pytest.fail("it is in use")
        with pytest.raises(WouldBlock, match="lapsed"), held:
            pytest.fail("the loss is known by the lease before it is told")
        await asyncio.sleep(1)
        with pytest.raises(LockLost, match="evicted"), held:
            pytest.fail("it is lost")

    locally(body)


def test_a_lock_lost_while_taken_by_hand_is_told_when_its_body_ends():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True) as held:
            pass

        async def use():
            with held:
                space.backend.lost.set_result("evicted")
                await asyncio.sleep(1)
                assert not held.valid

        with pytest.raises(LockLost, match="evicted"):
            await use()

    locally(body)


def test_a_kept_lock_wanted_while_taken_by_hand_goes_when_its_body_ends():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        async with space.lock("x", EX, keep=True) as held:
            pass
        with held:
            waiting = asyncio.ensure_future(space.lock("x", EX)._acquire())
            await asyncio.sleep(1)
            assert not waiting.done()
            assert held.mode == EX
        other = await waiting
        assert (held.mode, other.mode) == (-1, EX)

    locally(body)


def test_a_pending_lock_is_used_once():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        for keep in (True, False):
            pending = space.lock("x", PR, keep=keep)
            async with pending:
                with pytest.raises(ValueError, match="awaited already"):
                    await pending
            with pytest.raises(ValueError, match="awaited already"):
                await pending.__aenter__()

    locally(body)


def test_a_holder_hears_what_others_want():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        wanted = []
        held = await space.lock("x", EX, on_block=wanted.append)
        reader = asyncio.ensure_future(space.lock("x", CR)._acquire())
        await asyncio.sleep(1)
        assert wanted == [CR]
        await held.unlock()
        await reader

    locally(body)


def test_a_lost_lockspace_cancels_bodies_and_refuses_everything_after():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        waiting = None

        async def holder():
            async with space.lock("x", EX):
                await asyncio.sleep(3600)

        task = asyncio.ensure_future(holder())
        await asyncio.sleep(1)
        waiting = asyncio.ensure_future(space.lock("x", EX)._acquire())
        await asyncio.sleep(1)
        space.backend.lost.set_result("evicted")
        for lost in (task, waiting):
            with pytest.raises(LockLost, match="evicted"):
                await lost
        with pytest.raises(LockLost):
            await space.lock("y", EX)

    locally(body)


def test_a_cancellation_from_outside_is_not_mistaken_for_a_loss():
    async def body(manager, world):
        space = await manager.lockspace("orders")

        async def holder():
            async with space.lock("x", EX):
                await asyncio.sleep(3600)

        task = asyncio.ensure_future(holder())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(1):
            await space.lock("x", EX)

    locally(body)


def test_submit_answers_every_request_once_and_never_from_within():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        answers = []
        requests = [Request("lock", b"x", EX), Request("lock", b"", EX), Request("convert", lock=99, mode=PR)]
        handles = space.submit(requests, lambda handle, completion: answers.append((handle, completion.status)))
        assert answers == []
        await asyncio.sleep(0.1)
        assert sorted(answers) == sorted([(handles[0], 0), (handles[1], -22), (99, -2)])

    locally(body)


def test_opening_a_lockspace_twice_is_the_same_one_and_sizes_must_agree():
    async def body(manager, world):
        space = await manager.lockspace("orders")
        assert await manager.lockspace("orders") is space
        with pytest.raises(ClusterError):
            await manager.lockspace("orders", value_size=64)
        await space.close()
        assert await manager.lockspace("orders", value_size=64) is not space

    locally(body)
