"""Disk on an image file: what is written is read, aligned buffers are not copied, nothing is lost by cancelling."""

import asyncio
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from corral.real import disk as disks
from corral.real.disk import BLOCK, BOUNCE_SIZE, RealDisk, is_aligned
from tests.unit.real.support import Bench, eventually, on_loop

SIZE = 8 << 20


def image(tmp_path: Path, size: int = SIZE) -> str:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


def aligned(length: int, fill: bytes = b"a") -> memoryview:
    memory = mmap.mmap(-1, length)
    memory.write(fill * length)
    return memoryview(memory)


def with_disk(tmp_path: Path, body: Callable[[RealDisk], Any]) -> None:
    path = image(tmp_path)

    async def main(bench: Bench) -> None:
        await body(await bench.world().disk(path))

    on_loop(tmp_path, main)


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also as on a filesystem that refuses O_DIRECT."""
    if request.param == "buffered":
        refuse_direct(monkeypatch)
    return str(request.param)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(disks.os, "open", refusing)


def test_whatever_is_written_is_read(tmp_path: Path, way: str) -> None:
    """Random writes of all kinds of buffers against a bytearray that gets the same."""
    rng = Random(7)

    def buffers(length: int) -> list[Any]:
        kind = rng.randrange(5)
        content = rng.randbytes(length)
        if kind == 0:
            return [content]
        if kind == 1:
            return [bytearray(content)]
        if kind == 2:
            view = aligned(length)
            view[:] = content
            return [view]
        if kind == 3:
            cuts = sorted(rng.randrange(length + 1) for _ in range(5))
            return [content[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        views = [aligned(BLOCK) for _ in range(length // BLOCK)]
        for index, view in enumerate(views):
            view[:] = content[index * BLOCK : (index + 1) * BLOCK]
        return list(views)

    async def body(disk: RealDisk) -> None:
        assert disk.direct == (way == "direct")
        model = bytearray(SIZE)
        for _ in range(60):
            blocks = rng.choice((1, 1, 2, 7, 256, 300, 700))
            offset = rng.randrange(SIZE // BLOCK - blocks) * BLOCK
            pieces = buffers(blocks * BLOCK)
            await disk.write(offset, pieces)
            model[offset : offset + blocks * BLOCK] = b"".join(pieces)
            await disk.read(offset, BLOCK)
        await disk.flush()
        assert await disk.read(0, SIZE) == model
        assert type(await disk.read(BLOCK, BLOCK)) is bytearray

    with_disk(tmp_path, body)


def test_more_vectors_than_the_kernel_takes(tmp_path: Path, way: str) -> None:
    async def body(disk: RealDisk) -> None:
        pieces = [bytes([index % 251]) * 512 for index in range(8 * 300)]
        await disk.write(0, pieces)
        assert await disk.read(0, len(pieces) * 512) == b"".join(pieces)

    with_disk(tmp_path, body)


def test_an_aligned_buffer_is_written_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(disk: RealDisk) -> None:
        seen: list[Any] = []
        real = os.pwritev
        monkeypatch.setattr(
            disks.os, "pwritev", lambda fd, views, offset: (seen.append(views[0]), real(fd, views, offset))[1]
        )
        buffer = aligned(2 * BLOCK)
        await disk.write(0, [buffer])
        assert seen[0].obj is buffer.obj
        await disk.write(0, [memoryview(bytearray(2 * BLOCK + 64))[64:]])
        assert seen[1].obj is not buffer.obj
        assert is_aligned(seen[1])

    with_disk(tmp_path, body)


def test_alignment_is_judged_by_address_and_length() -> None:
    view = aligned(4 * BLOCK)
    assert is_aligned(view)
    assert is_aligned(view[BLOCK:])
    assert not is_aligned(view[512:])
    assert not is_aligned(view[: BLOCK - 512])
    assert not is_aligned(view[:0])
    assert not is_aligned(view.toreadonly())


def test_a_short_write_is_continued_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def short(fd: int, views: Any, offset: int) -> int:
        return real(fd, [memoryview(views[0])[:BLOCK]], offset)

    async def body(disk: RealDisk) -> None:
        pieces = [aligned(3 * BLOCK, b"x"), aligned(BLOCK, b"y"), aligned(2 * BLOCK, b"z")]
        with monkeypatch.context() as patch:
            patch.setattr(disks.os, "pwritev", short)
            await disk.write(BLOCK, pieces)
            await disk.write(8 * BLOCK, [b"q" * 3 * BLOCK])
        expected = bytes(BLOCK) + b"x" * 3 * BLOCK + b"y" * BLOCK + b"z" * 2 * BLOCK + bytes(BLOCK) + b"q" * 3 * BLOCK
        assert await disk.read(0, 11 * BLOCK) == expected

    with_disk(tmp_path, body)


def test_a_cancelled_write_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that had not begun: all threads are busy when it is cancelled."""
    gate = threading.Event()
    real = os.pwritev

    def gated(fd: int, views: Any, offset: int) -> int:
        assert gate.wait(10)
        return real(fd, views, offset)

    async def body(disk: RealDisk) -> None:
        monkeypatch.setattr(disks.os, "pwritev", gated)
        count = disks.THREADS + 5
        writes = [asyncio.ensure_future(disk.write(n * BLOCK, [bytes([n + 1]) * BLOCK])) for n in range(count)]
        await asyncio.sleep(0.02)
        for write in writes:
            write.cancel()
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        gate.set()
        await disk.wait_quiet()
        assert await disk.read(0, count * BLOCK) == b"".join(bytes([n + 1]) * BLOCK for n in range(count))

    with_disk(tmp_path, body)


def failing(number: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_errors_keep_their_number_and_name_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(disk: RealDisk) -> None:
        for name, attempt in (
            ("pwritev", lambda: disk.write(BLOCK, [bytes(BLOCK)])),
            ("preadv", lambda: disk.read(BLOCK, BLOCK)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(disks.os, name, failing(errno.EIO))
                with pytest.raises(OSError, match=r"disk\.img: (write|read) of 4096 bytes at 4096 failed") as raised:
                    await attempt()
                assert raised.value.errno == errno.EIO

    with_disk(tmp_path, body)


def test_after_a_failed_flush_no_flush_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(disk: RealDisk) -> None:
        await disk.flush()
        with monkeypatch.context() as patch:
            patch.setattr(disks.os, "fdatasync", failing(errno.EIO))
            with pytest.raises(OSError, match="flush failed"):
                await disk.flush()
        with pytest.raises(OSError, match="flush failed") as raised:
            await disk.flush()
        assert raised.value.errno == errno.EIO

    with_disk(tmp_path, body)


def test_the_error_of_a_cancelled_write_is_raised_by_the_next_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(disk: RealDisk) -> None:
        gate = threading.Event()
        with monkeypatch.context() as patch:
            patch.setattr(disks.os, "pwritev", lambda *args: (gate.wait(10), failing(errno.EIO)())[1])
            write = asyncio.ensure_future(disk.write(0, [bytes(BLOCK)]))
            await asyncio.sleep(0.02)
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)
            gate.set()
            await disk.wait_quiet()
        with pytest.raises(OSError, match="write of 4096 bytes at 0 failed"):
            await disk.flush()

    with_disk(tmp_path, body)


def test_close_waits_for_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor closed under a running write could already be another file when the write begins."""

    async def body(disk: RealDisk) -> None:
        gate, real = threading.Event(), os.pwritev
        monkeypatch.setattr(disks.os, "pwritev", lambda *args: (gate.wait(10), real(*args))[1])
        write = asyncio.ensure_future(disk.write(0, [bytes(BLOCK)]))
        await asyncio.sleep(0.02)
        disk.close()
        os.fstat(disk._fd)
        gate.set()
        await write
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(disk._fd)
        with pytest.raises(OSError, match="is closed"):
            await disk.read(0, BLOCK)
        with pytest.raises(OSError, match="is closed"):
            await disk.flush()
        disk.close()

    with_disk(tmp_path, body)


def test_where_o_direct_is_refused_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "corral.disk")
    refuse_direct(monkeypatch)

    async def body(disk: RealDisk) -> None:
        assert not disk.direct
        await disk.write(0, [b"x" * BLOCK])
        await disk.flush()
        assert len([message for message in caplog.messages if "does not take O_DIRECT" in message]) == 1

    with_disk(tmp_path, body)


def test_a_filesystem_that_takes_the_flag_and_refuses_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_takes_direct", lambda fd: False)

    async def body(disk: RealDisk) -> None:
        assert not disk.direct
        await disk.write(0, [b"x" * BLOCK])
        assert bytes(await disk.read(0, BLOCK)) == b"x" * BLOCK

    with_disk(tmp_path, body)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, BLOCK), (0, 100), (-BLOCK, BLOCK), (SIZE, BLOCK), (SIZE - BLOCK, 2 * BLOCK)]
)
def test_wrong_ranges_are_the_callers_error(tmp_path: Path, offset: int, length: int) -> None:
    async def body(disk: RealDisk) -> None:
        with pytest.raises(ValueError, match=r"disk\.img"):
            await disk.read(offset, length)
        with pytest.raises(ValueError, match=r"disk\.img"):
            await disk.write(offset, [bytes(length)])

    with_disk(tmp_path, body)


def test_a_grown_image_is_seen_and_a_cut_one_is_an_error(tmp_path: Path) -> None:
    async def body(disk: RealDisk) -> None:
        os.truncate(disk.path, SIZE + BLOCK)
        assert len(await disk.read(SIZE, BLOCK)) == BLOCK
        assert disk.size == SIZE + BLOCK
        os.truncate(disk.path, BLOCK)
        with pytest.raises(OSError, match="cut short while in use") as raised:
            await disk.read(0, 4 * BLOCK)
        assert raised.value.errno == errno.EIO

    with_disk(tmp_path, body)


def test_discarded_blocks_are_given_back(tmp_path: Path) -> None:
    async def body(disk: RealDisk) -> None:
        await disk.write(0, [b"x" * (1 << 20)])
        await disk.flush()
        before = os.stat(disk.path).st_blocks
        await disk.discard(BLOCK, (1 << 20) - BLOCK)
        if os.stat(disk.path).st_blocks < before:  # else this filesystem does not punch holes: best effort
            assert await disk.read(BLOCK, BLOCK) == bytes(BLOCK)
        assert bytes(await disk.read(0, BLOCK)) == b"x" * BLOCK
        assert disk.size == SIZE

    with_disk(tmp_path, body)


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_what_cannot_be_a_disk_is_a_sentence(tmp_path: Path, what: str) -> None:
    async def body(bench: Bench) -> None:
        path = bench.path("nothing") if what == "missing" else str(tmp_path)
        with pytest.raises(OSError, match=f"cannot open {path}: "):
            await bench.world().disk(path)

    on_loop(tmp_path, body)


def test_transfers_longer_than_a_threads_buffer(tmp_path: Path) -> None:
    async def body(disk: RealDisk) -> None:
        content = Random(3).randbytes(2 * BOUNCE_SIZE + BLOCK)
        await disk.write(BLOCK, [b"", content[:100], content[100:]])
        assert await disk.read(BLOCK, len(content)) == content

    with_disk(tmp_path, body)


def test_many_at_once_run_in_few_threads(tmp_path: Path) -> None:
    async def body(disk: RealDisk) -> None:
        await asyncio.gather(*(disk.write(n * BLOCK, [bytes([n % 256]) * BLOCK]) for n in range(500)))
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("disk")]
        assert 1 <= len(threads) <= disks.THREADS
        await eventually(lambda: not disk._under_way)

    with_disk(tmp_path, body)
