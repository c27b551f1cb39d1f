"""The recipes without asyncio: the same, from threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import corral
from corral import recipes


def test_every_recipe_from_plain_threads() -> None:
    with corral.sync.local() as cluster, ThreadPoolExecutor(4) as pool:
        space = cluster.lockspace("s", value_size=256)
        with recipes.blocking.Mutex(space, "m").hold(timeout=5) as held:
            assert held.token
            with pytest.raises(corral.WouldBlock):
                recipes.blocking.Mutex(space, "m").try_hold()
        rw = recipes.blocking.ReadWriteLock(space, "rw")
        with rw.read(timeout=5), rw.read(timeout=5), pytest.raises(corral.WouldBlock):
            rw.write(wait=False)

        semaphore = recipes.blocking.Semaphore(space, "sem", 2)
        with semaphore.hold(timeout=5) as one, semaphore.hold(timeout=5) as two:
            assert {one.number, two.number} == {0, 1}
            assert one.valid
            with pytest.raises(corral.WouldBlock):
                semaphore.try_acquire()

        with recipes.blocking.Counter(space, "c", 5) as counter:
            counts = list(pool.map(lambda _: counter.add(timeout=5), range(20)))
            assert sorted(counts) == list(range(6, 26))
            counter.set(1, timeout=5)
            assert counter.read() == 1
        with recipes.blocking.Register(space, "r", b"a") as register:
            assert register.update(lambda data: data + b"b") == b"ab" == register.read(timeout=1)

        election = recipes.blocking.Election(space, "e", b"me")
        with election.lead(timeout=5) as leadership:
            assert leadership.valid
            assert election.leader(timeout=5) == (leadership.token, b"me")
        assert election.leader() is None

        def party(_: int) -> None:
            with recipes.blocking.DoubleBarrier(space, "b", 3) as barrier:
                barrier.enter(timeout=5)
                barrier.leave(timeout=5)

        list(pool.map(party, range(3)))

        with recipes.blocking.Queue(space, "q") as queue:
            queue.put(b"x", timeout=5)
            first = queue.take(timeout=5)
            assert (first.data, first.valid) == (b"x", True)
            with pytest.raises(ZeroDivisionError), first:
                raise ZeroDivisionError
            with queue.take(timeout=5):
                assert queue.length() == 1
            assert queue.try_take() is None
            with pytest.raises(corral.TimedOut, match="waits for an element"):
                queue.take(timeout=0.01)
