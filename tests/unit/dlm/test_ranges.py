"""Byte ranges against a dumb model (one mode a byte), and against the kernel's own fcntl on a file."""

import errno
import fcntl
import multiprocessing
import os
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.api.dlm import CR, CW, EX, IV, NL, PR, PW
from corral.dlm.modes import COMPATIBLE
from corral.dlm.ranges import LAST, RangeLocks, Ranges, Span
from corral.dlm.resource import QUEUED

SIZE = 12  # bytes of the small world
NAMES = (b"x", b"y")


class Dumb:
    """held[name][owner][byte] is a mode; everything is recomputed."""

    def __init__(self):
        self.held = {name: {} for name in NAMES}
        self.waiting = []  # (cookie, name, owner, bytes, mode)
        self.ended = []

    def blocking(self, name, owner, where, mode):
        return {
            other
            for other, bytes_ in self.held[name].items()
            for byte in where
            if other != owner and mode != IV and byte in bytes_ and not COMPATIBLE[mode][bytes_[byte]]
        }

    def circle(self, owner, reached):
        while True:
            more = reached | {
                blocker
                for _, name, waiter, where, mode in self.waiting
                if waiter in reached
                for blocker in self.blocking(name, waiter, where, mode)
            }
            if more == reached:
                return owner in reached
            reached = more

    def take(self, name, owner, where, mode):
        bytes_ = self.held[name].setdefault(owner, {})
        for byte in where:
            bytes_.pop(byte, None)
            if mode != IV:
                bytes_[byte] = mode
        for entry in reversed(list(self.waiting)):
            cookie, other, waiter, wanted, asked = entry
            if other != name or waiter == owner or mode == IV or not set(wanted) & set(where):
                continue
            if not COMPATIBLE[mode][asked] and self.circle(waiter, self.blocking(name, waiter, wanted, asked)):
                self.waiting.remove(entry)
                self.ended.append((cookie, -errno.EDEADLK))

    def retry(self):
        while ready := [entry for entry in self.waiting if not self.blocking(*entry[1:])]:
            self.waiting.remove(ready[0])
            self.ended.append((ready[0][0], 0))
            self.take(*ready[0][1:])

    def set(self, name, owner, where, mode, cookie, wait):
        blocking = self.blocking(name, owner, where, mode)
        if not blocking:
            self.take(name, owner, where, mode)
            self.retry()
            return 0
        if not wait:
            return -errno.EAGAIN
        if self.circle(owner, blocking):
            return -errno.EDEADLK
        self.waiting.append((cookie, name, owner, where, mode))
        return QUEUED

    def close(self, name, owner):
        self.waiting = [entry for entry in self.waiting if entry[1:3] != (name, owner)]
        self.held[name].pop(owner, None)
        self.retry()

    def spans(self, name, owner):
        found = []
        for byte, mode in sorted(self.held[name].get(owner, {}).items()):
            if found and found[-1].end + 1 == byte and found[-1].mode == mode:
                found[-1] = found[-1]._replace(end=byte)
            else:
                found.append(Span(byte, byte, mode))
        return tuple(found)


SETTING = st.tuples(
    st.just("set"), st.sampled_from(NAMES), st.integers(1, 4), st.integers(0, SIZE - 1), st.integers(0, SIZE - 1),
    st.sampled_from((IV, IV, PR, PR, EX, EX, NL, CR, CW, PW)), st.booleans(),
)  # fmt: skip
STEP = st.one_of(
    SETTING,
    SETTING,
    SETTING,
    st.tuples(st.just("close"), st.sampled_from(NAMES), st.integers(1, 4)),
    st.tuples(st.just("gone"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_ranges_go_as_byte_by_byte(steps):
    dumb, locks = Dumb(), RangeLocks()
    for cookie, (what, *rest) in enumerate(steps):
        effects = []
        dumb.ended.clear()
        if what == "set":
            name, owner, one, other, mode, wait = rest
            start, end = sorted((one, other))
            got = locks.set(name, owner, start, end, mode, cookie, wait, effects)
            assert got == dumb.set(name, owner, range(start, end + 1), mode, cookie, wait)
        elif what == "close":
            locks.close(*rest, effects)
            dumb.close(*rest)
        elif what == "gone":
            locks.gone(*rest, effects)
            dumb.waiting = [entry for entry in dumb.waiting if entry[2] != rest[0]]
            for name in NAMES:
                dumb.close(name, *rest)
        else:
            assert locks.cancel(*rest) == any(entry[0] == rest[0] for entry in dumb.waiting)
            dumb.waiting = [entry for entry in dumb.waiting if entry[0] != rest[0]]
        assert sorted(effects) == sorted(dumb.ended)
        assert locks.waiting == tuple(entry[0] for entry in dumb.waiting)
        for name in NAMES:
            for owner in range(1, 5):
                assert locks.of(name, owner) == dumb.spans(name, owner)


def test_the_ends_of_the_world():
    ranges = Ranges()
    ranges.put(1, 0, LAST, PR)
    ranges.put(1, LAST, LAST, EX)
    ranges.put(1, 0, 0, EX)
    assert ranges.of(1) == (Span(0, 0, EX), Span(1, LAST - 1, PR), Span(LAST, LAST, EX))
    ranges.put(1, 0, LAST, IV)
    assert not ranges
    for start, end in ((-1, 3), (4, 3), (0, LAST + 1)):
        assert RangeLocks().set(b"x", 1, start, end, EX, 1, True, []) == -errno.EINVAL


def test_a_circle_over_two_files_is_refused_and_the_message_of_who_is_in_the_way_is_right():
    locks, effects = RangeLocks(), []
    assert locks.set(b"x", 1, 0, 9, EX, 1, True, effects) == 0
    assert locks.set(b"y", 2, 0, 9, EX, 2, True, effects) == 0
    assert locks.conflict(b"y", 1, 5, 5, PR) == (2, Span(0, 9, EX))
    assert locks.set(b"y", 1, 5, 5, PR, 3, True, effects) == QUEUED
    assert locks.set(b"x", 2, 0, 0, PR, 4, True, effects) == -errno.EDEADLK
    locks.gone(2, effects)
    assert effects == [(3, 0)]


# --- the kernel ------------------------------------------------------------------------------------------------------

TYPES = {IV: fcntl.F_UNLCK, PR: fcntl.F_RDLCK, EX: fcntl.F_WRLCK}
FLOCK = "hhqqi4x"  # short l_type, l_whence; off_t l_start, l_len; pid_t l_pid


def process(path, orders):
    """One owner: does what it is told with the file, and answers each order."""
    file = os.open(path, os.O_RDWR)
    while (order := orders.recv()) is not None:
        command, start, end, mode = order
        if command == "close":  # any close gives back all of the process's locks on that file
            os.close(os.open(path, os.O_RDWR))
            orders.send(0)
            continue
        lock = struct.pack(FLOCK, TYPES[mode], os.SEEK_SET, start, end - start + 1, 0)
        try:
            found = struct.unpack(FLOCK, fcntl.fcntl(file, command, lock))
            orders.send(found if command == fcntl.F_GETLK else 0)
        except OSError as error:
            orders.send(-error.errno)


class Kernel:
    def __init__(self, path, owners):
        path.write_bytes(bytes(SIZE))
        context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may never run
        self.pipes, self.processes = {}, {}
        for owner in owners:
            self.pipes[owner], theirs = context.Pipe()
            self.processes[owner] = context.Process(target=process, args=(path, theirs), daemon=True)
            self.processes[owner].start()

    def order(self, owner, *order):
        self.pipes[owner].send(order)

    def answer(self, owner):
        assert self.pipes[owner].poll(60), f"owner {owner} still waits"
        return self.pipes[owner].recv()

    def has_answered(self, owner):
        return self.pipes[owner].poll(0)

    def end(self):
        for pipe, child in zip(self.pipes.values(), self.processes.values(), strict=True):
            if child.is_alive():
                child.kill()
            child.join()
            pipe.close()


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_go_as_in_the_kernel(tmp_path, seed):
    """Which of several that wait for the same bytes comes first, and which of several blockers the kernel follows to
    look for a circle, is its own affair: such steps are left out."""
    rng = random.Random(seed)
    owners = (1, 2, 3)
    kernel, locks = Kernel(tmp_path / "file", owners), RangeLocks()
    waits = {}  # owner -> (cookie, start, end, mode)
    seen = set()
    try:
        for cookie in range(250):
            owner = rng.choice([owner for owner in owners if owner not in waits])
            start, end = sorted((rng.randrange(SIZE), rng.randrange(SIZE)))
            mode = rng.choice((IV, PR, EX))
            effects = []
            choice = rng.random()
            if choice < 0.04:
                kernel.order(owner, "close", 0, 0, IV)
                assert kernel.answer(owner) == 0
                locks.close(b"f", owner, effects)
            elif choice < 0.2 and mode != IV:
                kernel.order(owner, fcntl.F_GETLK, start, end, mode)
                kind, _, where, length, pid = kernel.answer(owner)
                found = locks.conflict(b"f", owner, start, end, mode)
                assert (kind == fcntl.F_UNLCK) == (found is None)
                if found is not None:
                    theirs = next(other for other in owners if kernel.processes[other].pid == pid)
                    told = {fcntl.F_RDLCK: PR, fcntl.F_WRLCK: EX}[kind]
                    assert Span(where, where + length - 1, told) in locks.of(b"f", theirs)
            else:
                if in_the_way(waits, start, end, mode):
                    continue
                blockers = {
                    other
                    for other in owners
                    for span in locks.of(b"f", other)
                    if other != owner and mode != IV and span.start <= end and start <= span.end
                    and not COMPATIBLE[mode][span.mode]
                }  # fmt: skip
                wait = rng.random() < 0.6 and len(blockers) <= 1 and len(waits) < len(owners) - 1
                kernel.order(owner, fcntl.F_SETLKW if wait else fcntl.F_SETLK, start, end, mode)
                status = locks.set(b"f", owner, start, end, mode, cookie, wait, effects)
                seen.add(status)
                if status == QUEUED:
                    waits[owner] = (cookie, start, end, mode)
                else:
                    assert kernel.answer(owner) == status
            for ended, status in effects:
                waiter = next(other for other, entry in waits.items() if entry[0] == ended)
                assert kernel.answer(waiter) == status
                del waits[waiter]
            assert not [waiter for waiter in waits if kernel.has_answered(waiter)]
        assert {0, QUEUED, -errno.EAGAIN} <= seen
    finally:
        kernel.end()


def test_the_kernel_refuses_the_same_circle(tmp_path):
    kernel, locks = Kernel(tmp_path / "file", (1, 2, 3)), RangeLocks()
    try:
        for owner in (1, 2, 3):
            kernel.order(owner, fcntl.F_SETLK, owner, owner, EX)
            assert kernel.answer(owner) == locks.set(b"f", owner, owner, owner, EX, owner, False, []) == 0
        for owner in (1, 2):
            kernel.order(owner, fcntl.F_SETLKW, owner + 1, owner + 1, PR)
            assert locks.set(b"f", owner, owner + 1, owner + 1, PR, 10 + owner, True, []) == QUEUED
        while not waits_in_the_kernel(kernel, 2):
            time.sleep(0.01)
        kernel.order(3, fcntl.F_SETLKW, 1, 1, PR)
        assert kernel.answer(3) == locks.set(b"f", 3, 1, 1, PR, 13, True, []) == -errno.EDEADLK
        effects = []
        kernel.order(3, "close", 0, 0, IV)
        assert kernel.answer(3) == 0
        locks.close(b"f", 3, effects)
        assert kernel.answer(2) == 0
        assert effects == [(12, 0)]
        assert not kernel.has_answered(1)
    finally:
        kernel.end()


def waits_in_the_kernel(kernel, count):
    """/proc/locks shows who waits by an arrow."""
    with open("/proc/locks") as table:
        pids = {child.pid for child in kernel.processes.values()}
        return len({line.split()[5] for line in table if "->" in line} & {str(pid) for pid in pids}) >= count


def in_the_way(waits, start, end, mode):
    """Would this be in the way of somebody who waits, or the other way round?"""
    return any(
        mode != IV and entry[1] <= end and start <= entry[2] and not COMPATIBLE[mode][entry[3]]
        for entry in waits.values()
    )
