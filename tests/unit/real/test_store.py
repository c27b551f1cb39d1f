"""The store's file, byte by byte: torn tails are cut, other damage is named, replace is all or nothing."""

import asyncio
import errno
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from corral.base.world import StoreDamaged
from corral.real import store as stores
from corral.real.store import FRAME, HEADER_SIZE, RealStore, pack_frame, parse
from tests.unit.real.support import Bench, on_loop

HEADER = stores.MAGIC + bytes(8)
BATCHES = [[b"one"], [b"two", b"", b"three" * 50], [b"four"]]


def frames() -> list[bytes]:
    return [pack_frame(number, batch) for number, batch in enumerate(BATCHES, 1)]


def flat(count: int) -> list[bytes]:
    return [record for batch in BATCHES[:count] for record in batch]


def test_the_format_is_what_its_table_says() -> None:
    content = HEADER + pack_frame(1, [b"ab"])
    assert content[:24] == b"CORRALS1" + bytes(8) + b"FRAM" + (6).to_bytes(4, "little")
    assert content[24:32] == (1).to_bytes(8, "little")
    assert content[HEADER_SIZE + FRAME.size :] == b"\x02\x00\x00\x00ab"


def test_a_tail_torn_at_any_byte_costs_the_last_append_and_nothing_else() -> None:
    pieces = frames()
    good = HEADER + pieces[0] + pieces[1]
    for length in range(len(pieces[2])):
        assert parse(good + pieces[2][:length], "s") == (flat(2), 2, len(good))


def test_a_tail_whose_bytes_never_reached_the_disk_is_torn_too() -> None:
    pieces = frames()
    good = HEADER + pieces[0] + pieces[1]
    for length in range(1, len(pieces[2])):
        lost = pieces[2][:length] + bytes(len(pieces[2]) - length)
        if lost != pieces[2]:
            assert parse(good + lost, "s")[0] == flat(2)


def test_any_flipped_byte_is_damage_or_the_torn_tail() -> None:
    """Never a wrong record: before the last frame it is damage, in the last frame the append is dropped."""
    pieces = frames()
    content = HEADER + b"".join(pieces)
    last = len(content) - len(pieces[2])
    for position in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            spoiled = bytearray(content)
            spoiled[position] ^= flip
            if 8 <= position < HEADER_SIZE:
                assert parse(bytes(spoiled), "s")[0] == flat(3), "reserved bytes are ignored on read"
            elif position >= last:
                assert parse(bytes(spoiled), "s") == (flat(2), 2, last)
            else:
                with pytest.raises(StoreDamaged, match=r"offset|begin"):
                    parse(bytes(spoiled), "s")


@pytest.mark.parametrize("order", [(1, 3), (2,), (1, 1), (2, 1), (1, 2, 2)])
def test_a_missing_or_repeated_frame_is_damage(order: tuple[int, ...]) -> None:
    pieces = frames()
    with pytest.raises(StoreDamaged):
        parse(HEADER + b"".join(pieces[number - 1] for number in order), "s")


def test_records_that_look_like_frames_are_records() -> None:
    inner = pack_frame(1, [b"x"])
    content = HEADER + pack_frame(1, [inner, b"FRAM"]) + pack_frame(2, [inner])
    assert parse(content, "s")[0] == [inner, b"FRAM", inner]


@pytest.mark.parametrize("content", [b"", b"CORRALS1", b"\x00" * 100, b"CORRALS2" + bytes(8)])
def test_a_file_that_is_no_store_is_named(content: bytes) -> None:
    with pytest.raises(StoreDamaged, match=r"s does not begin like a store \(offset 0\): .*remove its state directory"):
        parse(content, "s")


# --- with files ------------------------------------------------------------------------------------------------------


def test_appends_survive_a_restart_in_order(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        world = bench.world(state="s")
        store = world.store("promises")
        assert await store.read() == []
        for batch in BATCHES:
            await store.append(batch)
        assert await store.read() == flat(3)
        await world.close()
        again = bench.world(state="s").store("promises")
        assert await again.read() == flat(3)
        await again.append([b"five"])
        assert await again.read() == [*flat(3), b"five"]

    on_loop(tmp_path, body)


def test_modes_keep_others_out(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.world(state="s").store("promises").append([b"x"])
        assert stat.S_IMODE(os.stat(bench.path("s")).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(bench.path("s/promises.store")).st_mode) == 0o600

    on_loop(tmp_path, body)


def test_replace_is_all_or_nothing_at_any_failing_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the nth system call of a replace, then look at what a crash at that moment leaves."""

    async def body(bench: Bench) -> None:
        seen = set()
        for fail_at in range(1, 20):
            shutil.rmtree(bench.path("s"), ignore_errors=True)
            world = bench.world(state="s")
            store = world.store("promises")
            await store.append([b"old 1"])
            await store.append([b"old 2"])
            calls = _FailAt(monkeypatch, fail_at)
            try:
                await store.replace([b"new"])
                calls.undo()
                assert await store.read() == [b"new"]
                assert seen == {b"old", b"new"}, "the loop really met both sides of the rename"
                return
            except OSError:
                calls.undo()
            await world.close()
            records = await bench.world(state="s").store("promises").read()
            assert records in ([b"old 1", b"old 2"], [b"new"])
            seen.add(records[0][:3])
        raise AssertionError("replace never succeeded")

    on_loop(tmp_path, body)


class _FailAt:
    """Makes the nth call of those a store makes to change its files fail with EIO."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        self._context = monkeypatch.context()
        patch = self._context.__enter__()
        for name in ("pwrite", "fdatasync", "fsync", "rename", "ftruncate"):
            patch.setattr(stores.os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.EIO, "planted")
            return real(*args, **kwargs)

        return call

    def undo(self) -> None:
        self._context.__exit__(None, None, None)


def test_an_append_that_cannot_be_written_raises_and_leaves_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        store = bench.world(state="s").store("promises")
        await store.append([b"kept"])
        real = os.pwrite

        def full(fd: int, data: Any, offset: int) -> int:
            real(fd, bytes(data)[:7], offset)
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(stores.os, "pwrite", full)
            with pytest.raises(OSError, match="cannot be written: No space left on device; free space") as raised:
                await store.append([b"lost"])
            assert raised.value.errno == errno.ENOSPC
        await store.append([b"after"])
        assert await store.read() == [b"kept", b"after"]

    on_loop(tmp_path, body)


def test_after_a_failed_sync_nothing_is_promised_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(bench: Bench) -> None:
        store = bench.world(state="s").store("promises")
        await store.append([b"kept"])

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(stores.os, "fdatasync", fail)
            with pytest.raises(OSError, match="could not be made durable"):
                await store.append([b"unsure"])
        for attempt in (store.append([b"x"]), store.replace([b"x"])):
            with pytest.raises(OSError, match="failed before"):
                await attempt

    on_loop(tmp_path, body)


def test_a_removed_state_directory_is_noticed_at_the_next_append(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        store = bench.world(state="s").store("promises")
        await store.append([b"x"])
        shutil.rmtree(bench.path("s"))
        with pytest.raises(OSError, match="was removed while in use"):
            await store.append([b"y"])

    on_loop(tmp_path, body)


def test_the_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "STORE_MAX", 1000)

    async def body(bench: Bench) -> None:
        store = bench.world(state="s").store("promises")
        await store.append([bytes(500)])
        with pytest.raises(OSError, match="would grow over") as raised:
            await store.append([bytes(500)])
        assert raised.value.errno == errno.EFBIG
        await store.replace([b"small"])
        await store.append([bytes(500)])
        assert len(await store.read()) == 2

    on_loop(tmp_path, body)


def test_two_processes_never_share_a_store(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.world(state="s").store("promises").append([b"x"])
        with pytest.raises(OSError, match="in use by another process"):
            await bench.world(state="s").store("promises").read()

    on_loop(tmp_path, body)


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


def test_a_torn_tail_is_cut_off_the_file_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "corral.store")

    async def body(bench: Bench) -> None:
        world = bench.world(state="s")
        await world.store("promises").append([b"x"])
        await world.close()
        path = bench.path("s/promises.store")
        whole = content_of(path)
        with open(path, "ab") as file:  # noqa: ASYNC230
            file.write(frames()[1][:30])
        assert await bench.world(state="s").store("promises").read() == [b"x"]
        assert content_of(path) == whole
        assert [message for message in caplog.messages if "cut short" in message] != []

    on_loop(tmp_path, body)


def test_concurrent_appends_keep_the_order_of_their_calls(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        store: RealStore = bench.world(state="s").store("promises")
        await asyncio.gather(*(store.append([str(number).encode()]) for number in range(50)))
        assert await store.read() == [str(number).encode() for number in range(50)]

    on_loop(tmp_path, body)
