"""Recipes against plain models, step by step: hypothesis draws the steps and shrinks what goes wrong.

Every machine has a few members of one local lockspace and lets the loop turn as far as it goes after each step, so that
what can be granted has been.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import corral
from corral import recipes
from corral.api.dlm import QUERY_ALL, QUEUE_GRANT, Request

MEMBERS = 3
TURNS = 60  # of the loop, after which nothing moves any more


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.cluster = corral.local()
        self.run(self.cluster.__aenter__())
        self.space = self.run(self.cluster.lockspace("s", value_size=64))
        self.tasks: list[asyncio.Task[Any]] = []

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 5))

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = self.loop.create_task(coroutine)
        self.tasks.append(task)
        self.settle()
        return task

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def teardown(self) -> None:
        async def cancelled() -> None:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

        self.run(cancelled())
        self.finish()
        self.settle()
        self.run(self.space.release())  # raises Busy: a lock was left
        self.run(self.cluster.close())
        self.settle()
        self.loop.close()

    def finish(self) -> None:
        """Gives back what is held."""


class Locking(Machine):
    """Mutex and rw-lock over one name: who holds and who waits, in the order of a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.rw = recipes.ReadWriteLock(self.space, "l")
        self.queue: list[tuple[bool, asyncio.Task[Any], asyncio.Event]] = []  # exclusive, holder or waiter, let go

    @rule(kind=st.sampled_from(["read", "write", "mutex"]))
    def ask(self, kind: str) -> None:
        go = asyncio.Event()

        async def hold() -> None:
            if kind == "mutex":
                async with recipes.Mutex(self.space, "l").hold():
                    await go.wait()
            else:
                async with self.rw.read() if kind == "read" else self.rw.write() as held:
                    assert held.valid
                    await go.wait()

        task = self.begin(hold())
        self.queue.append((kind != "read", task, go))

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), how=st.booleans())
    def leave(self, data: st.DataObject, how: bool) -> None:
        """A holder leaves, or is cancelled; a waiter is cancelled."""
        place = data.draw(st.integers(0, len(self.queue) - 1))
        _, task, go = self.queue.pop(place)
        if place < self.holding_before and how:
            go.set()
        else:
            task.cancel()
        self.settle()
        assert task.done()

    @property
    def holding(self) -> int:
        if not self.queue:
            return 0
        if self.queue[0][0]:
            return 1
        return next((n for n, (exclusive, _, _) in enumerate(self.queue) if exclusive), len(self.queue))

    @invariant()
    def those_hold_who_should(self) -> None:
        if hasattr(self, "queue"):
            self.holding_before = self.holding
            locks = self.run(self._granted())
            assert locks == self.holding

    async def _granted(self) -> int:
        answer: asyncio.Future[Any] = self.loop.create_future()
        request = Request("query", b"l", flags=QUERY_ALL | QUEUE_GRANT)
        self.space.submit([request], lambda _handle, completion: answer.set_result(completion))
        report = (await answer).report
        return 0 if report is None else len(report.locks)


class Permits(Machine):
    """A semaphore: never more than n, and never fewer while somebody waits."""

    N = 2

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[asyncio.Task[Any]] = []
        self.out: list[recipes.Permit] = []

    @rule()
    def acquire(self) -> None:
        self.waiting.append(self.begin(recipes.Semaphore(self.space, "s", self.N).acquire()))

    @rule()
    def try_acquire(self) -> None:
        free = len(self.out) < self.N
        try:
            self.out.append(self.run(recipes.Semaphore(self.space, "s", self.N).try_acquire()))
        except corral.WouldBlock:
            assert not free
        else:
            assert free

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.run(self.out.pop(data.draw(st.integers(0, len(self.out) - 1))).release())
        self.settle()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        task = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        task.cancel()
        self.settle()

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "waiting"):
            while self.waiting and self.waiting[0].done():
                self.out.append(self.waiting.pop(0).result())
            assert not any(task.done() for task in self.waiting)
            assert len(self.out) <= self.N
            assert len(self.out) == self.N or not self.waiting
            numbers = [permit.number for permit in self.out]
            assert len(set(numbers)) == len(numbers)

    def finish(self) -> None:
        for permit in self.out:
            self.run(permit.release())


class Counting(Machine):
    """A counter whose members come and go, also in the middle of a change."""

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[int, recipes.Counter] = {}
        self.possible: set[int] = {0}

    @rule(number=st.integers(0, MEMBERS - 1))
    def open(self, number: int) -> None:
        if number not in self.members:
            if not self.members:
                self.possible = {7}
            self.members[number] = recipes.Counter(self.space, "c", 7)
            self.run(self.members[number].open())
            self.read(number)

    @precondition(lambda self: self.members)
    @rule(data=st.data(), steps=st.integers(0, 30))
    def close(self, data: st.DataObject, steps: int) -> None:
        """After so many turns of a change, which may then have happened or not."""
        counter = self.members.pop(data.draw(st.sampled_from(sorted(self.members))))

        async def cut_off() -> bool:
            task = asyncio.create_task(counter.add())
            for _ in range(steps):
                await asyncio.sleep(0)
            done = task.done()
            await counter.close()
            await asyncio.gather(task, return_exceptions=True)
            return done

        done = self.run(cut_off())
        after = {value + 1 for value in self.possible}
        self.possible = after if done else self.possible | after

    @precondition(lambda self: self.members)
    @rule(data=st.data(), by=st.integers(-3, 3))
    def add(self, data: st.DataObject, by: int) -> None:
        count = self.run(self.members[data.draw(st.sampled_from(sorted(self.members)))].add(by))
        assert count - by in self.possible
        self.possible = {count}

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def read_one(self, data: st.DataObject) -> None:
        self.read(data.draw(st.sampled_from(sorted(self.members))))

    def read(self, number: int) -> None:
        count = self.run(self.members[number].read())
        assert count in self.possible
        self.possible = {count}

    def finish(self) -> None:
        for counter in self.members.values():
            self.run(counter.close())


class Queueing(Machine):
    """A queue whose takers finish, give back, or vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: list[recipes.Queue] = []
        self.number = 0
        self.model: list[list[Any]] = []  # data, and who has it
        self.taken: dict[bytes, recipes.Element] = {}

    @initialize()
    def open(self) -> None:
        self.queues = [recipes.Queue(self.space, "q") for _ in range(MEMBERS)]
        for queue in self.queues:
            self.run(queue.open())

    @rule(member=st.integers(0, MEMBERS - 1))
    def put(self, member: int) -> None:
        data = b"%d" % self.number
        room = sum(len(known) + 10 for known, _ in self.model) + len(data) + 10 <= 54
        if room:
            self.run(self.queues[member].put(data))
            self.model.append([data, False])
            self.number += 1
        else:
            with pytest.raises(corral.TimedOut, match="waits for"):  # room, or on a busy machine less
                self.run(self.queues[member].put(data, timeout=0.001))

    @rule(member=st.integers(0, MEMBERS - 1))
    def take(self, member: int) -> None:
        element = self.run(self.queues[member].try_take())
        expected = next((entry for entry in self.model if not entry[1]), None)
        if expected is None:
            assert element is None
        else:
            assert element.data == expected[0]
            expected[1] = True
            self.taken[element.data] = element

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), done=st.booleans())
    def end(self, data: st.DataObject, done: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        element = self.taken.pop(name)
        entry = next(entry for entry in self.model if entry[0] == name)
        if done:
            self.run(element.done())
            self.model.remove(entry)
        else:
            self.run(element.give_back())
            entry[1] = False

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def wait_for_one_that_comes_back(self, data: st.DataObject) -> None:
        if all(entry[1] for entry in self.model):
            waiting = self.begin(self.queues[0].take(timeout=4))
            name = data.draw(st.sampled_from(sorted(self.taken)))
            self.run(self.taken.pop(name).give_back())
            self.settle()
            element = waiting.result()
            assert element.data == name
            self.taken[name] = element

    @invariant()
    def as_long_as_it_should_be(self) -> None:
        if self.queues:
            assert self.run(self.queues[1].length()) == len(self.model)

    def finish(self) -> None:
        for element in self.taken.values():
            self.run(element.give_back())
        for queue in self.queues:
            self.run(queue.close())


SETTINGS = settings(max_examples=12, stateful_step_count=20, deadline=None)
for machine in (Locking, Permits, Counting, Queueing):
    machine.TestCase.settings = SETTINGS
TestLocking = Locking.TestCase
TestPermits = Permits.TestCase
TestCounting = Counting.TestCase
TestQueueing = Queueing.TestCase
