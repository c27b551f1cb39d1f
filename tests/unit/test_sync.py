"""`corral.sync` from many threads: what is shared, what is interrupted, what is closed under somebody's feet."""

import inspect
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import corral
from corral import sync
from corral.api.dlm import EX, NL, PR, SpaceState
from corral.base.errors import Busy, ClusterError, LockLost, TimedOut, WouldBlock
from corral.sync.loop import LoopThread


def test_many_threads_share_one_cluster_and_lose_no_increment():
    with sync.local() as cluster:
        space = cluster.lockspace("counters")
        keeper = space.lock("n", NL)

        def add(_):
            for _ in range(20):
                held = space.lock("n", EX, timeout=30)
                number = int.from_bytes(held.value[:8], "little")
                held.unlock(value=(number + 1).to_bytes(8, "little"))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(8)))
        keeper.convert(PR)
        assert int.from_bytes(keeper.value[:8], "little") == 160


def test_a_lockspace_is_made_once_released_and_watched():
    with sync.local() as cluster:
        space = cluster.lockspace("x", exclusive=True)
        with pytest.raises(ClusterError, match="exists"):
            cluster.lockspace("x", exclusive=True)
        held = space.lock("a", EX)
        with pytest.raises(Busy):
            space.release()
        with pytest.raises(WouldBlock):
            space.lock("a", PR, wait=False)
        events = []
        watching = threading.Thread(target=lambda: events.extend(space.watch()))
        watching.start()
        while space._space._watching._watchers == []:
            time.sleep(0.001)
        assert space.state == SpaceState("running", "")
        space.release(2)
        watching.join(5)
        assert [event.state for event in events] == ["running", "lost"]
        with pytest.raises(LockLost):
            held.unlock()

        def lose():
            with cluster.lockspace("y").lock("b", EX) as lost:
                cluster.lockspace("y").close()
                assert not lost.valid

        with pytest.raises(LockLost):
            lose()


SOURCE, FIRST = inspect.getsourcelines(LoopThread.call)
WAITS = FIRST + max(at for at, line in enumerate(SOURCE) if "waiting.acquire()" in line)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("after", [0.0, 0.0002, 0.0005, 0.001, 0.005, 0.05])
def test_an_interrupted_wait_leaves_nothing_behind(after):
    """Also when the lock is granted just as the wait ends: the first half is free, the second is held for 1 ms."""

    interrupted = 0

    def interrupt(_number, frame):
        nonlocal interrupted
        while frame is not None:
            if (frame.f_code, frame.f_lineno) == (LoopThread.call.__code__, WAITS):
                interrupted += 1
                raise Interrupted
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with sync.local() as cluster:
            space = cluster.lockspace("x")
            for _ in range(20):
                holder = space.lock("a", EX, timeout=5)
                freeing = threading.Timer(after, holder.unlock)
                freeing.start()
                try:
                    signal.setitimer(signal.ITIMER_REAL, after + 0.0003)
                    space.lock("a", EX).unlock()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupted:
                    pass  # while it waited for the lock, or for the answer to the unlock
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                freeing.join()
                space.lock("a", EX, timeout=5).unlock()
        assert interrupted or not after
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_call_from_a_callback_is_refused_not_stuck():
    with sync.local() as cluster:
        space = cluster.lockspace("x")
        refused = []

        def wanted(_mode):
            try:
                held.unlock()
            except RuntimeError as error:
                refused.append(str(error))

        held = space.lock("a", EX, on_block=wanted)
        with pytest.raises(TimedOut):
            space.lock("a", PR, timeout=0.1)
        assert refused == ["a callback may not make blocking calls: hand them to another thread"]
        held.unlock()


def test_who_waits_while_it_is_closed_hears_so():
    cluster = sync.local()
    space = cluster.lockspace("x")
    space.lock("a", EX)
    heard = []

    def wait():
        try:
            space.lock("a", EX)
        except ClusterError as error:
            heard.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    cluster.close()
    waiting.join(5)
    assert len(heard) == 1
    for call in (lambda: space.lock("a", EX), lambda: cluster.lockspace("z"), lambda: space.release()):
        with pytest.raises(ClusterError, match="closed"):
            call()
    assert corral.sync is sync
