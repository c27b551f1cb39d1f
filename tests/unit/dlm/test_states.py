"""Suspended, lapsed, lost: what each state does to those who hold locks and to those who want some."""

import asyncio
import threading

import pytest
from tests.unit.dlm.spaces import WAY, Rig, simulated

from corral.api.dlm import EX, NL, PR, LockWaits, Request, SpaceState
from corral.base.errors import Busy, LockLost, TimedOut
from corral.base.time import SECOND
from corral.providers import watching


async def watched(space, events):
    async for event in space.watch():
        events.append(event)


def states(events):
    return [event.state for event in events if isinstance(event, SpaceState)]


def test_while_a_round_runs_bodies_go_on_kept_locks_are_taken_again_and_requests_wait():
    async def body(world):
        rig = Rig(world, 2)
        await rig.recover()
        space, events = rig.space(1), []
        watching_it = asyncio.ensure_future(watched(space, events))
        async with space.lock("kept", EX, keep=True) as kept:
            token = kept.token
        held = await space.lock("held", EX)
        round = asyncio.ensure_future(rig.recover(stopped_ns=3 * SECOND))
        await asyncio.sleep(0.1)
        assert space.state.state == "suspended"
        assert held.valid
        async with space.lock("kept", EX, keep=True) as again:
            assert (again is kept, again.token) == (True, token)
        with pytest.raises(TimedOut):
            await space.lock("new", EX, timeout=0.5)
        unwilling = asyncio.ensure_future(space.lock("new", EX, wait=False)._acquire())
        leaving = asyncio.ensure_future(held.unlock())
        lowering = asyncio.ensure_future(kept.convert(PR))
        await asyncio.sleep(1)
        assert not unwilling.done()
        assert not leaving.done()
        assert not lowering.done()
        await round
        for task in (unwilling, leaving, lowering):
            await asyncio.wait_for(task, 1)
        assert kept.mode == PR
        assert states(events) == ["running", "suspended", "running"]
        await (await unwilling).unlock()
        await space.close()
        await watching_it
        assert states(events)[-1] == "lost"
        await asyncio.sleep(4 * WAY / 1e9)
        assert rig.empty()

    simulated(body)


def test_a_lapsed_lease_is_told_and_nothing_kept_is_taken_again():
    async def body(world):
        rig = Rig(world, 1)
        await rig.recover()
        native, space, events = rig.native(1), rig.space(1), []
        native.until = world.now() + SECOND
        watching_it = asyncio.ensure_future(watched(space, events))
        async with space.lock("kept", EX, keep=True) as kept:
            token = kept.token
        held = await space.lock("held", EX)
        await asyncio.sleep(0.9)
        assert (held.valid, states(events)) == (True, ["running"])
        await asyncio.sleep(0.2)
        assert (held.valid, states(events)) == (False, ["running", "lapsed"])
        with pytest.raises(TimedOut):
            await space.lock("kept", EX, keep=True, timeout=0.5)
        assert held.mode == EX  # it is not lost yet
        native.until = world.now() + 100 * SECOND
        native.feed()
        await asyncio.sleep(0.1)
        assert (held.valid, states(events)) == (True, ["running", "lapsed", "running"])
        async with space.lock("kept", EX, keep=True) as again:
            assert (again is kept, again.token) == (True, token)
        native.until = 0
        native.lose("this node was cut off")
        await watching_it
        assert events[-1] == SpaceState("lost", "this node was cut off")
        assert space.state == events[-1]

    simulated(body)


def test_without_a_watcher_no_timer_runs():
    async def body(world):
        rig = Rig(world, 1)
        await rig.recover()
        rig.native(1).until = world.now() + SECOND
        space = rig.space(1)
        assert space._watching._timer is None
        it = space.watch()
        await anext(it)
        assert space._watching._timer is not None
        await it.aclose()
        await asyncio.sleep(2)
        assert space._watching._timer is None

    simulated(body)


def test_a_watcher_that_does_not_read_hears_so(monkeypatch):
    monkeypatch.setattr(watching, "EVENTS_MAX", 4)

    async def body(world):
        rig = Rig(world, 1)
        await rig.recover()
        it = rig.space(1).watch()
        await anext(it)
        for _ in range(4):
            rig.native(1).suspend(True)
            rig.native(1).suspend(False)

        async def read_on():
            return [event async for event in it]

        with pytest.raises(Busy, match="events behind"):
            await read_on()

    simulated(body)


def test_a_wait_of_five_seconds_is_told_with_who_is_in_the_way():
    async def body(world):
        rig = Rig(world, 2)
        await rig.recover()
        events = []
        watching_it = asyncio.ensure_future(watched(rig.space(1), events))
        held = await rig.space(2).lock("x", EX)
        for request in (rig.space(1).lock("x", PR)._acquire(), rig.space(1).lock("y", PR)._acquire()):
            waiting = asyncio.ensure_future(request)
            await asyncio.sleep(6)
            if not waiting.done():
                ((wait),) = [event for event in events if isinstance(event, LockWaits)]
                assert (wait.resource, wait.mode) == (b"x", PR)
                assert 5 * SECOND <= wait.waited_ns < 6 * SECOND
                assert [(lock.member.node, lock.granted) for lock in wait.blockers] == [(2, EX)]
                await asyncio.sleep(60)
                await held.unlock()
            await (await asyncio.wait_for(waiting, 1)).unlock()
        assert len(events) == 2  # the state, and the one wait
        watching_it.cancel()

    simulated(body)


def test_a_lost_lock_says_so_at_every_door_and_kept_ones_need_a_new_grant():
    async def body(world):
        rig = Rig(world, 1)
        await rig.recover()
        space = rig.space(1)
        async with space.lock("kept", EX, keep=True) as kept:
            pass
        held = await space.lock("held", EX)
        inner_ended = []

        async def nested():
            async with space.lock("a", EX):
                try:
                    async with space.lock("b", EX):
                        await asyncio.sleep(3600)
                finally:
                    inner_ended.append(True)

        async def quick():
            async with space.lock("c", EX):
                await started.wait()  # and then it is over in the very turn of the loss

        async def stubborn():
            async with space.lock("d", EX):
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    return "swallowed"

        started = asyncio.Event()
        tasks = [asyncio.ensure_future(each()) for each in (nested, quick, stubborn)]
        await asyncio.sleep(0.1)
        rig.native(1).lose("evicted")
        started.set()
        for task in tasks:
            with pytest.raises(LockLost, match="evicted"):
                await asyncio.wait_for(task, 1)
            assert not task.cancelling()
        assert inner_ended == [True]
        assert not held.valid
        for ask in (held.convert(NL), held.unlock(), kept.convert(NL)):
            with pytest.raises(LockLost, match="evicted"):
                await ask
        with pytest.raises(LockLost):
            async with space.lock("kept", EX, keep=True):
                pass

    simulated(body)


def test_who_cancels_a_body_that_is_lost_as_well_gets_its_cancellation():
    async def body(world):
        for swallows in (False, True):
            rig = Rig(world, 1)
            await rig.recover()
            go = asyncio.Event()

            async def holder(rig=rig, go=go, swallows=swallows):
                async with rig.space(1).lock("a", EX):
                    if swallows:
                        await go.wait()
                    else:
                        await asyncio.sleep(3600)

            task = asyncio.ensure_future(holder())
            await asyncio.sleep(0.1)
            go.set()
            rig.native(1).lose("evicted")
            await asyncio.sleep(0) if not swallows else None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 1)

    simulated(body)


def test_another_thread_is_refused_and_nothing_has_happened():
    async def body(world):
        rig = Rig(world, 1)
        await rig.recover()
        space = rig.space(1)
        async with space.lock("kept", EX, keep=True):
            pass
        held = await space.lock("x", PR)
        refused = []

        def elsewhere():
            async def main():
                calls = (
                    lambda: space.submit([Request("lock", b"y", EX)], lambda *_: None),
                    lambda: space.lock("y", EX)._acquire(),
                    lambda: space.lock("kept", EX, keep=True).__aenter__(),
                    lambda: held.convert(EX),
                    lambda: held.unlock(),
                    lambda: space.release(2),
                    lambda: space.close(),
                    lambda: space.watch(),
                )
                for call in calls:
                    try:
                        result = call()
                        if asyncio.iscoroutine(result):
                            await result
                    except RuntimeError as error:
                        refused.append(str(error))

            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(refused) == 8
        assert all("corral.sync" in sentence for sentence in refused)
        assert sorted(rig.granted(1, b"x")) == [PR]
        assert rig.granted(1, b"y") == []
        await held.unlock()

    simulated(body)
