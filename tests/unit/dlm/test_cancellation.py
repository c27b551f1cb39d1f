"""Cancelling a task that locks, at every moment: nothing is leaked, and who goes on knows what it holds.

A script of lock, convert, unlock runs on one member while another member wants the same thing now and then. It is
cancelled around every completion it hears and at every tenth of a message's way; then everything must come free.
"""

import asyncio
from types import NoneType

import pytest
from tests.unit.dlm.spaces import WAY, Rig, simulated

from corral.api.dlm import CR, CW, EX, NL, PR, PW
from corral.base.errors import Deadlock, LockLost, TimedOut, WouldBlock

# Each resource is mastered by the other member, by this one, or by whom the directory finds: two names of each.
NAMES = (b"a", b"b", b"c", b"d")

SCRIPTS = {
    "lock": (),
    "raise": (EX,),
    "lower": (PR, NL),
    "sideways": (CW, PR),
    "up and down": (PR, EX, PW, CR),
}
FIRST = {"lock": EX, "raise": PR, "lower": EX, "sideways": PR, "up and down": NL}


async def script(space, name, modes, first, seen, by):
    """Locks, converts, unlocks; when a conversion is cancelled it goes on with the unlock."""
    if by == "body":
        async with space.lock(name, first) as held:
            seen.append(held)
            for mode in modes:
                await held.convert(mode)
        return
    held = await space.lock(name, first)
    seen.append(held)
    try:
        for mode in modes:
            await held.convert(mode)
    finally:
        await held.unlock()


async def rival(space, name, modes):
    """Somebody else's wishes, so that the script waits, and others wait for it."""
    for mode in modes:
        async with space.lock(name, mode):
            await asyncio.sleep(3 * WAY / 1e9)
        await asyncio.sleep(WAY / 1e9)


async def story(world, name, kind, by, cancel):
    """`cancel`: "none", ("moment", n) or ("time", ns). Returns how many moments there were, and how long it took."""
    rig = Rig(world, 2)
    await rig.recover()
    mine, other = rig.space(1), rig.space(2)
    busy = asyncio.ensure_future(rival(other, name, (PR, EX, CW)))
    await asyncio.sleep(WAY / 1e9 * 2.5)
    seen = []
    began = world.now()
    task = asyncio.ensure_future(script(mine, name, SCRIPTS[kind], FIRST[kind], seen, by))
    moments = 0

    def moment():
        nonlocal moments
        if cancel == ("moment", moments):
            task.cancel()
        moments += 1

    rig.native(1).moment = moment
    if cancel[0] == "time":
        world.call_at(world.now() + cancel[1], task.cancel)
    await asyncio.wait((task,), timeout=2)
    assert task.done(), "the script hangs"
    took = world.now() - began
    if not task.cancelled():
        assert task.exception() is None
    await asyncio.wait_for(busy, 2)
    for node in (2, 1):
        held = await asyncio.wait_for(rig.space(node).lock(name, EX)._acquire(), 2)
        await held.unlock()
    await asyncio.sleep(4 * WAY / 1e9)
    assert rig.empty(), "a lock was leaked"
    return moments, took


@pytest.mark.parametrize("by", ["body", "unlock"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_cancelled_at_every_moment_leaks_nothing(kind, by):
    async def body(world):
        cancelled = 0
        for name in NAMES:
            moments, took = await story(world, name, kind, by, "none")
            for number in range(moments):
                await story(world, name, kind, by, ("moment", number))
                cancelled += 1
            for tenth in range(10 * took // WAY):
                await story(world, name, kind, by, ("time", tenth * WAY // 10))
                cancelled += 1
        assert cancelled > 50

    simulated(body)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("old", "new"), [(PR, EX), (NL, EX), (EX, PR), (PW, NL), (PR, CW), (CW, PR), (NL, NL)])
def test_after_a_cancelled_conversion_the_lock_says_what_it_holds(name, old, new):
    """Without anybody in the way: each conversion is granted, so only what comes first decides."""

    async def body(world):
        for tenth in range(25):
            rig = Rig(world, 2)
            await rig.recover()
            keeper = await rig.space(2).lock(name, NL)
            held = await rig.space(1).lock(name, old)
            converting = asyncio.ensure_future(held.convert(new))
            await asyncio.sleep(tenth * WAY / 10 / 1e9)
            if converting.done():
                break
            converting.cancel()
            await asyncio.gather(converting, return_exceptions=True)
            assert converting.cancelled()
            assert held.mode <= min(old, new)  # what it holds whatever comes
            await held.convert(held.mode)  # waits until it is settled
            assert [held.mode] == rig.granted(1, name)
            if new > old and {old, new} != {PR, CW}:
                assert held.mode == old, "a raised mode that nobody heard of is lowered again"
            await held.convert(EX)
            assert rig.granted(1, name) == [EX]
            await held.unlock()
            await keeper.unlock()
            await asyncio.sleep(4 * WAY / 1e9)
            assert rig.empty()

    simulated(body)


def test_a_lowered_lock_never_says_more_than_it_holds():
    """EX to PR is granted at once, wherever the answer is: the body that was cancelled must not believe in EX."""

    async def body(world):
        for tenth in range(1, 20):
            rig = Rig(world, 2)
            await rig.recover()
            keeper = await rig.space(2).lock(b"a", NL)  # mastered there
            held = await rig.space(1).lock(b"a", EX)
            converting = asyncio.ensure_future(held.convert(PR))
            reader = asyncio.ensure_future(rig.space(2).lock(b"a", PR)._acquire())
            await asyncio.sleep(tenth * WAY / 10 / 1e9)
            converting.cancel()
            await asyncio.gather(converting, return_exceptions=True)
            for _ in range(40):
                if reader.done():
                    assert held.mode <= PR, "two locks that exclude each other"
                await asyncio.sleep(WAY / 10 / 1e9)
            for lock in (held, await asyncio.wait_for(reader, 1), keeper):
                await lock.unlock()

    simulated(body)


def test_what_comes_after_a_cancelled_conversion_waits_for_its_end_and_no_longer_than_told():
    async def body(world):
        rig = Rig(world, 2)
        await rig.recover()
        keeper = await rig.space(2).lock(b"a", PR)
        held = await rig.space(1).lock(b"a", PR)
        for native in rig.natives:
            native.until = world.now()  # nothing is granted or told until the lease runs again
        converting = asyncio.ensure_future(held.convert(EX))
        await asyncio.sleep(WAY / 1e9)
        converting.cancel()
        await asyncio.gather(converting, return_exceptions=True)
        with pytest.raises(WouldBlock):
            await held.convert(PR, wait=False)
        with pytest.raises(TimedOut):
            await held.convert(PR, timeout=0.5)
        waiting = asyncio.ensure_future(held.convert(NL, timeout=5))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        for native in rig.natives:
            native.until = world.now() + 10**12
            native.feed()
        await asyncio.wait_for(waiting, 1)
        assert held.mode == NL
        await held.unlock()
        await keeper.unlock()

    simulated(body)


def test_an_unlock_overtakes_a_conversion_under_way_and_frees_everything():
    async def body(world):
        for waits in (False, True):
            rig = Rig(world, 2)
            await rig.recover()
            keeper = await rig.space(2).lock(b"a", PR if waits else NL)
            held = await rig.space(1).lock(b"a", PR)
            converting = asyncio.ensure_future(held.convert(EX))
            await asyncio.sleep(WAY / 2 / 1e9)
            await held.unlock()
            await asyncio.gather(converting, return_exceptions=True)
            await keeper.unlock()
            await asyncio.sleep(4 * WAY / 1e9)
            assert rig.empty()

    simulated(body)


def test_a_value_that_is_too_long_is_refused_and_the_lock_stays():
    async def body(world):
        rig = Rig(world, 1)
        await rig.recover()
        held = await rig.space(1).lock(b"a", EX)
        for ask in (held.unlock(value=bytes(33)), held.convert(PR, value=bytes(33))):
            with pytest.raises(ValueError, match="at most 32 bytes"):
                await ask
        assert held.mode == EX
        await held.unlock(value=bytes(32))
        assert rig.empty()

    simulated(body)


def test_a_loss_in_the_middle_of_everything_ends_everything():
    async def body(world):
        for tenth in range(0, 60, 3):
            rig = Rig(world, 2)
            await rig.recover()
            tasks = [
                asyncio.ensure_future(script(rig.space(1), name, SCRIPTS[kind], FIRST[kind], [], by))
                for name in NAMES
                for kind in SCRIPTS
                for by in ("body", "unlock")
            ]
            await asyncio.sleep(tenth * WAY / 10 / 1e9)
            cut = [task for task in tasks[::3] if not task.done()]
            for task in cut:
                task.cancel()
            rig.native(1).lose("evicted")
            await asyncio.wait(tasks, timeout=2)
            for task in tasks:
                assert task.done()
                if not (task in cut and task.cancelled()):
                    assert isinstance(
                        task.exception(), LockLost | Deadlock | NoneType
                    )  # (they convert against each other)
            with pytest.raises(LockLost, match="evicted"):
                await rig.space(1).lock("y", EX)

    simulated(body)
