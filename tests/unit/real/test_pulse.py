"""The pulse: garbage goes in idle turns, what is long-lived is not looked at again, a busy loop is left alone."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from corral.real import pulse as pulses
from corral.real.pulse import Pulse


class Node:
    """Part of a reference cycle."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pulses, "PULSE_SECONDS", 0.005)
    monkeypatch.setattr(pulses, "SETTLED_SECONDS", 0.02)
    monkeypatch.setattr(pulses, "YOUNG_MIN", 100)
    # A loaded test machine is late for other reasons than a busy loop.
    monkeypatch.setattr(pulses, "IDLE_NS", 10**12)
    yield
    gc.unfreeze()
    gc.enable()


def with_pulse(body: Callable[[Pulse], object]) -> None:
    async def main() -> None:
        pulse = Pulse(asyncio.get_running_loop())
        try:
            await body(pulse)  # type: ignore[misc]
        finally:
            pulse.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_automatic_collection_is_off_while_it_runs_and_back_after() -> None:
    async def body(pulse: Pulse) -> None:
        assert not gc.isenabled()

    with_pulse(body)
    assert gc.isenabled()


def test_the_start_up_heap_is_frozen_and_later_cycles_are_collected() -> None:
    async def body(pulse: Pulse) -> None:
        await until(lambda: gc.get_freeze_count() > 1000)
        ghosts = [weakref.ref(Node()) for _ in range(300)]
        assert all(ghost() is not None for ghost in ghosts)
        await until(lambda: all(ghost() is None for ghost in ghosts))
        assert pulse.statistics().collections >= 2
        assert pulse.statistics().longest_collection_ns > 0

    with_pulse(body)


def test_a_busy_loop_collects_only_when_garbage_piles_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "IDLE_NS", -(10**12))  # every turn counts as busy
    monkeypatch.setattr(pulses, "YOUNG_MAX", 5000)

    async def body(pulse: Pulse) -> None:
        gc.collect()
        some = [weakref.ref(Node()) for _ in range(300)]
        before = pulse.statistics().pulses
        await until(lambda: pulse.statistics().pulses > before + 10)
        assert pulse.statistics().collections == 0
        many = [weakref.ref(Node()) for _ in range(6000)]
        await until(lambda: pulse.statistics().collections == 1)
        assert many[0]() is None
        assert some[0]() is None

    with_pulse(body)


def test_many_long_lived_objects_are_frozen_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "FULL_SECONDS", 0.05)
    monkeypatch.setattr(pulses, "FULL_MAX", 10)
    monkeypatch.setattr(pulses, "YOUNG_MIN", 10**9)

    async def body(pulse: Pulse) -> None:
        await until(lambda: pulse.statistics().collections == 1)
        kept = [[number] for number in range(1000)]
        for _ in range(3):
            gc.collect(1)
        frozen = gc.get_freeze_count()
        await until(lambda: gc.get_freeze_count() >= frozen + len(kept))
        assert pulse.statistics().collections == 1

    with_pulse(body)


def test_a_stall_is_measured_and_complaints_are_rationed(caplog: pytest.LogCaptureFixture) -> None:
    async def body(pulse: Pulse) -> None:
        for _ in range(3):
            time.sleep(0.26)  # noqa: ASYNC251
            await asyncio.sleep(0.01)
        assert pulse.statistics().stalls >= 3
        assert pulse.statistics().longest_stall_ns >= 250_000_000
        assert len([message for message in caplog.messages if "stood still" in message]) == 1

    with_pulse(body)
