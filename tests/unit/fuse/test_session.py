"""The session against a kernel made of a socket pair: negotiation, hostile requests, waiting, interrupts, freezing."""

import asyncio
import errno
import random
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from corral.fuse import Limits, Withdrawn
from corral.fuse import protocol as p
from corral.fuse.session import UnsupportedKernel
from tests.integration.memfs import F_WRLCK, MemoryFilesystem
from tests.unit.fuse.kernel import EVERY_FLAG, Kernel, init_body, request

GETATTR = struct.pack("=IIQ", 0, 0, 0)
NEVER = p.WRITEBACK_CACHE | p.AUTO_INVAL_DATA


def stepped(story: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        asyncio.run(asyncio.wait_for(story(), 10))

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test


# --- INIT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel_minor", "forced", "agreed"), [(45, 45, 45), (99, 45, 45), (38, 45, 38), (45, 36, 36), (31, 45, 31)]
)
def test_the_smaller_minor_is_agreed_on(kernel_minor: int, forced: int, agreed: int) -> None:
    async def story() -> None:
        kernel = await Kernel(MemoryFilesystem(), limits=Limits(minor_max=forced)).start()
        error, payload = await kernel.ask(p.INIT, init_body(minor=kernel_minor))
        major, minor, _, flags = struct.unpack_from("=IIII", payload)
        assert (error, major, minor) == (0, 7, agreed)
        assert not flags & NEVER
        assert flags & p.POSIX_LOCKS
        assert flags & p.FLOCK_LOCKS
        assert bool(flags & p.HANDLE_KILLPRIV_V2) == (agreed >= 33)
        assert bool(flags & p.ATOMIC_O_TRUNC) == (agreed >= 33)
        assert kernel.notifier.has_epoch == (agreed >= 44)
        await kernel.__aexit__()

    asyncio.run(story())


@stepped
async def test_nothing_is_claimed_that_was_not_offered() -> None:
    kernel = await Kernel(MemoryFilesystem()).start()
    _, payload = await kernel.ask(p.INIT, init_body(flags=p.ASYNC_READ | p.MAX_PAGES))
    assert struct.unpack_from("=I", payload, 12)[0] == p.ASYNC_READ | p.MAX_PAGES
    await kernel.__aexit__()


@stepped
async def test_an_old_kernel_is_refused_with_a_sentence() -> None:
    kernel = await Kernel(MemoryFilesystem()).start()
    error, _ = await kernel.ask(p.INIT, init_body(minor=30))
    assert error == errno.EPROTO
    with pytest.raises(UnsupportedKernel, match=r"FUSE 7\.30.*needs 7\.31"):
        await kernel.session.run()
    kernel.socket.close()


@stepped
async def test_a_newer_major_is_asked_to_come_again() -> None:
    kernel = await Kernel(MemoryFilesystem()).start()
    _, payload = await kernel.ask(p.INIT, init_body(major=8))
    assert struct.unpack_from("=II", payload) == (7, p.MINOR)
    error, _ = await kernel.ask(p.INIT, init_body())
    assert error == 0
    await kernel.__aexit__()


@stepped
async def test_requests_before_init_are_refused() -> None:
    kernel = await Kernel(MemoryFilesystem()).start()
    assert await kernel.ask(p.GETATTR, GETATTR) == (errno.EIO, b"")
    await kernel.__aexit__()


# --- hostile requests ----------------------------------------------------------------------------------------------


@stepped
async def test_malformed_requests_are_answered_and_counted() -> None:
    async with Kernel(MemoryFilesystem()) as kernel:
        assert await kernel.ask(p.LOOKUP, b"no end") == (errno.EINVAL, b"")
        assert await kernel.ask(p.READ, b"short") == (errno.EINVAL, b"")
        assert await kernel.ask(p.GETXATTR, b"anything") == (errno.ENOSYS, b"")
        assert await kernel.ask(63) == (errno.ENOSYS, b"")
        assert await kernel.ask(4096) == (errno.ENOSYS, b"")
        assert kernel.session.statistics().malformed == 2
        assert kernel.session.statistics().unsupported == 3


@stepped
async def test_what_is_not_a_request_is_dropped() -> None:
    async with Kernel(MemoryFilesystem()) as kernel:
        kernel.raw(b"x")
        kernel.raw(request(p.GETATTR, GETATTR)[:-1])  # length lies
        kernel.raw(request(p.GETATTR, GETATTR, unique=0))
        kernel.raw(request(p.GETATTR, GETATTR, extensions=0xFFFF))
        assert (await kernel.answer())[:2] == (2, errno.EINVAL)  # the last has a number to answer to
        assert await kernel.silent()
        assert kernel.session.statistics().malformed == 4


@stepped
async def test_forgetting_more_than_was_looked_up_is_counted() -> None:
    async with Kernel(MemoryFilesystem()) as kernel:
        await kernel.ask(p.MKDIR, struct.pack("=II", 0o755, 0) + b"d\0")
        await kernel.ask(p.LOOKUP, b"d\0")
        kernel.send(p.FORGET, struct.pack("=Q", 1), node=2)
        kernel.send(p.BATCH_FORGET, struct.pack("=IIQQQQ", 2, 0, 2, 9, 12345, 1))
        assert await kernel.silent()
        statistics = kernel.session.statistics()
        assert (statistics.nodes_known, statistics.forgets_excessive) == (0, 2)


class Nowhere:
    """A filesystem that has nothing: every request ends in ENOENT."""

    def __getattr__(self, name: str) -> Any:
        async def method(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOENT, name)

        return method

    async def destroy(self) -> None: ...


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_garbage_leaves_the_session_serving(seed: int) -> None:
    rng = random.Random(seed)

    async def story() -> None:
        async with Kernel(Nowhere()) as kernel:
            for round_ in range(1500):
                body = rng.randbytes(rng.choice((0, 8, 16, 24, 40, 41, 48, 56, 88, 300)))
                if rng.random() < 0.5:
                    body = body.replace(b"\0", b"a") + b"\0"
                opcode = rng.choice((rng.randrange(64), rng.randrange(1 << 32)))
                message = bytearray(request(opcode, body, node=rng.randrange(4), unique=rng.randrange(1 << 62)))
                if rng.random() < 0.1:
                    message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
                if opcode != p.INIT:  # a second one ends the session, and is tested below
                    kernel.raw(bytes(message))
                if round_ % 50 == 0:
                    await _drain(kernel)
            await _drain(kernel)
            assert await kernel.ask(p.GETATTR, GETATTR) == (errno.ENOENT, b"")
            assert kernel.session.statistics().malformed > 100

    asyncio.run(asyncio.wait_for(story(), 20))


async def _drain(kernel: Kernel) -> None:
    """Lets the session work off what waits and throws its answers away, up to that of a question of our own."""
    mark = kernel.send(p.STATFS)
    while (await kernel.answer())[0] != mark:
        pass


@stepped
async def test_a_second_init_ends_the_session() -> None:
    async with Kernel(MemoryFilesystem()) as kernel:
        assert (await kernel.ask(p.INIT, init_body(flags=EVERY_FLAG)))[0] == errno.EPROTO
        with pytest.raises(UnsupportedKernel):
            await kernel.session.run()


@stepped
async def test_a_bug_in_the_filesystem_answers_eio_and_ends_the_session() -> None:
    filesystem = MemoryFilesystem()
    async with Kernel(filesystem) as kernel:
        filesystem.nodes[1].children[b"x"] = None  # type: ignore[assignment]
        filesystem.root.data = None  # type: ignore[assignment]
        assert await kernel.ask(p.GETATTR, GETATTR) == (errno.EIO, b"")
        with pytest.raises(TypeError):
            await kernel.session.run()
        assert filesystem.destroyed


# --- waiting -------------------------------------------------------------------------------------------------------


def write_body(handle: int, offset: int, data: bytes) -> bytes:
    return struct.pack("=QQIIQII", handle, offset, len(data), 0, 0, 0, 0) + data


async def create(kernel: Kernel, name: bytes) -> tuple[int, int]:
    error, payload = await kernel.ask(p.CREATE, struct.pack("=IIII", 2, 0o644, 0, 0) + name + b"\0")
    assert error == 0
    return struct.unpack_from("=Q", payload)[0], struct.unpack_from("=Q", payload, 128)[0]


@stepped
async def test_waiting_writes_keep_their_data_and_others_overtake() -> None:
    filesystem = MemoryFilesystem()
    async with Kernel(filesystem) as kernel:
        node, handle = await create(kernel, b"file")
        filesystem.gate("write")
        writers = {kernel.send(p.WRITE, write_body(handle, 3000 * n, bytes([n]) * 3000), node=node) for n in range(40)}
        assert await kernel.silent()
        statistics = kernel.session.statistics()
        assert (statistics.waiting, statistics.suspended) == (40, 40)  # more than there are buffers to lend
        filesystem.open_gate("write")
        assert {(await kernel.answer())[:2] for _ in range(40)} == {(writer, 0) for writer in writers}
        assert bytes(filesystem.at("file").data) == b"".join(bytes([n]) * 3000 for n in range(40))


def lock_body(handle: int, owner: int, type_: int = F_WRLCK) -> bytes:
    return struct.pack("=QQQQIIII", handle, owner, 0, 100, type_, 1, 0, 0)


@stepped
async def test_an_interrupted_lock_wait_is_eintr_and_leaves_nothing() -> None:
    async with Kernel(MemoryFilesystem()) as kernel:
        node, handle = await create(kernel, b"file")
        assert (await kernel.ask(p.SETLKW, lock_body(handle, 1), node=node))[0] == 0
        waiting = kernel.send(p.SETLKW, lock_body(handle, 2), node=node)
        kernel.send(p.INTERRUPT, struct.pack("=Q", waiting))  # read in the same turn, before the task's first step
        assert (await kernel.answer())[:2] == (waiting, errno.EINTR)
        kernel.send(p.INTERRUPT, struct.pack("=Q", waiting))  # crossed with the answer
        assert await kernel.silent()
        assert kernel.session.statistics().interrupted == 1
        assert (await kernel.ask(p.SETLK, lock_body(handle, 1, 2), node=node))[0] == 0
        assert (await kernel.ask(p.SETLK, lock_body(handle, 3), node=node))[0] == 0


@stepped
async def test_what_changes_something_is_not_interrupted() -> None:
    filesystem = MemoryFilesystem()
    async with Kernel(filesystem) as kernel:
        filesystem.gate("mkdir")
        making = kernel.send(p.MKDIR, struct.pack("=II", 0o755, 0) + b"d\0")
        kernel.send(p.INTERRUPT, struct.pack("=Q", making))
        assert await kernel.silent()
        assert [(waiting.request, waiting.node) for waiting in kernel.session.waiting()] == [("MKDIR", 1)]
        filesystem.open_gate("mkdir")
        assert (await kernel.answer())[:2] == (making, 0)


# --- freezing ------------------------------------------------------------------------------------------------------


@stepped
async def test_answers_are_held_while_frozen_and_leave_in_order() -> None:
    may = [True]
    async with Kernel(MemoryFilesystem(), may_reply=lambda: may[0]) as kernel:
        may[0] = False
        asked = [kernel.send(p.GETATTR, GETATTR) for _ in range(5)]
        await kernel.held(5)
        with pytest.raises(BlockingIOError):
            kernel.socket.recv(100)
        may[0] = True
        kernel.session.thaw()
        assert [(await kernel.answer())[:2] for _ in range(5)] == [(unique, 0) for unique in asked]
        assert kernel.session.statistics().held == 0


@stepped
async def test_frozen_answers_leave_without_being_told() -> None:
    may = [True]
    async with Kernel(MemoryFilesystem(), may_reply=lambda: may[0]) as kernel:
        may[0] = False
        asked = kernel.send(p.GETATTR, GETATTR)
        asyncio.get_running_loop().call_later(0.02, may.__setitem__, 0, True)
        assert (await kernel.answer())[:2] == (asked, 0)


class Killed:
    """Which callers SIGKILL waits for, as /proc would tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pids: set[int] = set()
        monkeypatch.setattr("corral.fuse.session._is_being_killed", lambda pid: pid in self.pids)


def interrupt(kernel: Kernel, unique: int) -> None:
    kernel.send(p.INTERRUPT, struct.pack("=Q", unique))


def while_frozen(story: Callable[[Kernel, list[bool], Killed], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The story begins with the lease lapsed; `may[0] = True` ends that."""

    def test(monkeypatch: pytest.MonkeyPatch) -> None:
        async def whole() -> None:
            may = [True]
            async with Kernel(MemoryFilesystem(), may_reply=lambda: may[0]) as kernel:
                await story(kernel, may, Killed(monkeypatch))

        asyncio.run(asyncio.wait_for(whole(), 10))

    test.__name__ = story.__name__
    return test


@while_frozen
async def test_a_killed_caller_is_let_go_though_its_answer_is_held(
    kernel: Kernel, may: list[bool], killed: Killed
) -> None:
    may[0] = False
    first, second, third = (kernel.send(p.GETATTR, GETATTR, pid=pid) for pid in (1, 2, 3))
    await kernel.held(3)
    killed.pids.add(2)
    interrupt(kernel, second)
    assert (await kernel.answer())[:2] == (second, errno.EINTR)
    may[0] = True
    assert [(await kernel.answer())[:2] for _ in range(2)] == [(first, 0), (third, 0)]
    assert kernel.session.statistics().interrupted == 1


@while_frozen
async def test_who_is_killed_after_the_first_signal_is_let_go_too(
    kernel: Kernel, may: list[bool], killed: Killed
) -> None:
    may[0] = False
    asked = kernel.send(p.GETATTR, GETATTR, pid=7)
    await kernel.held(1)
    interrupt(kernel, asked)  # the kernel says it once
    await asyncio.sleep(0.02)
    assert kernel.session.statistics().held == 1  # a program does not expect EINTR from stat()
    killed.pids.add(7)
    assert (await kernel.answer())[:2] == (asked, errno.EINTR)


@while_frozen
async def test_what_a_held_answer_promised_is_taken_back(kernel: Kernel, may: list[bool], killed: Killed) -> None:
    node, _ = await create(kernel, b"file")
    known = kernel.session.statistics().nodes_known
    kernel.send(p.FORGET, struct.pack("=Q", 1), node=node)
    assert (await kernel.ask(p.LOOKUP, b"file\0"))[0] == 0
    kernel.send(p.FORGET, struct.pack("=Q", 1), node=node)
    assert await kernel.silent()
    assert kernel.session.statistics().nodes_known == known - 1
    may[0] = False
    asked = kernel.send(p.LOOKUP, b"file\0", pid=7)
    await kernel.held(1)
    assert kernel.session.statistics().nodes_known == known
    killed.pids.add(7)
    interrupt(kernel, asked)
    assert (await kernel.answer())[:2] == (asked, errno.EINTR)
    assert kernel.session.statistics().nodes_known == known - 1


@while_frozen
async def test_what_was_done_is_never_told_as_interrupted(kernel: Kernel, may: list[bool], killed: Killed) -> None:
    node, handle = await create(kernel, b"file")
    may[0] = False
    killed.pids.add(7)
    made = kernel.send(p.MKDIR, struct.pack("=II", 0o755, 0) + b"d\0", pid=7)
    locked = kernel.send(p.SETLKW, lock_body(handle, 1), node=node, pid=7)
    await kernel.held(2)
    interrupt(kernel, made)
    interrupt(kernel, locked)
    await asyncio.sleep(0.02)
    assert kernel.session.statistics().held == 2
    may[0] = True
    assert [(await kernel.answer())[:2] for _ in range(2)] == [(made, 0), (locked, 0)]


@while_frozen
async def test_an_interrupted_wait_ends_though_answers_are_held(
    kernel: Kernel, may: list[bool], killed: Killed
) -> None:
    node, handle = await create(kernel, b"file")
    assert (await kernel.ask(p.SETLKW, lock_body(handle, 1), node=node))[0] == 0
    may[0] = False
    held = kernel.send(p.GETATTR, GETATTR)
    waiting = kernel.send(p.SETLKW, lock_body(handle, 2), node=node, pid=7)
    await kernel.held(1)
    interrupt(kernel, waiting)
    assert (await kernel.answer())[:2] == (waiting, errno.EINTR)
    may[0] = True
    assert (await kernel.answer())[:2] == (held, 0)


@stepped
async def test_withdrawal_turns_held_and_waiting_answers_into_eio() -> None:
    may = [True]
    filesystem = MemoryFilesystem()
    async with Kernel(filesystem, may_reply=lambda: may[0]) as kernel:
        filesystem.gate("mkdir")
        waiting = kernel.send(p.MKDIR, struct.pack("=II", 0o755, 0) + b"d\0")
        await filesystem.arrived["mkdir"].wait()
        may[0] = False
        held = kernel.send(p.GETATTR, GETATTR)
        await kernel.held(1)
        kernel.session.withdraw("the lease lapsed")
        assert {(await kernel.answer())[:2] for _ in range(2)} == {(held, errno.EIO), (waiting, errno.EIO)}
        with pytest.raises(Withdrawn, match="the lease lapsed"):
            await kernel.session.run()
        assert filesystem.destroyed


# --- references ----------------------------------------------------------------------------------------------------


@stepped
async def test_an_answer_the_kernel_did_not_take_is_given_back() -> None:
    filesystem = MemoryFilesystem()
    async with Kernel(filesystem) as kernel:
        operations = kernel.session._operations
        _, payload = await kernel.ask(p.CREATE, struct.pack("=IIII", 2, 0o644, 0, 0) + b"file\0")
        for release in operations.undo(p.CREATE, 1, payload):
            await release
        assert filesystem.at("file").lookups == 0
        assert not filesystem.handles
        await kernel.ask(p.LOOKUP, b"file\0")
        _, payload = await kernel.ask(p.READDIRPLUS, struct.pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0))
        assert filesystem.at("file").lookups == 2
        assert operations.undo(p.READDIRPLUS, 1, payload) == []
        assert filesystem.at("file").lookups == 1
        assert operations.known == {2: 1}


@stepped
async def test_notifications_are_written_by_another_thread_and_complete() -> None:
    async with Kernel(MemoryFilesystem()) as kernel:
        await kernel.notifier.invalidate_inode(7, 4096, 8192)
        assert await kernel.answer() == (0, p.NOTIFY_INVAL_INODE, struct.pack("=Qqq", 7, 4096, 8192))
        await kernel.notifier.invalidate_entry(1, b"name")
        assert await kernel.answer() == (0, p.NOTIFY_INVAL_ENTRY, struct.pack("=QII", 1, 4, 0) + b"name\0")
        assert await kernel.notifier.invalidate_all_entries()
        assert await kernel.answer() == (0, p.NOTIFY_INC_EPOCH, b"")
        assert kernel.session.statistics().notifications == 3
