"""The conformance suite itself: every bug planted here must be caught by the check it is meant for."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.real import local, network, page, participants, process, store, stream, world
from tests.conformance import world_suite
from tests.conformance.test_world import RealLaboratory

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: list[tuple[str, Plant]] = []


def caught_by(check: str) -> Callable[[Plant], Plant]:
    def note(plant: Plant) -> Plant:
        PLANTS.append((check, plant))
        return plant

    return note


@caught_by("timers_fire_once_and_never_early")
def timers_round_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world, "boottime", lambda: world.time.clock_gettime_ns(world.time.CLOCK_BOOTTIME) + 3_000_000)


@caught_by("a_cancelled_timer_never_fires")
def cancel_forgets_the_callback(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world.RealTimer, "cancel", lambda timer: None)


@caught_by("a_buffer_is_the_senders_again_after_the_turn")
def sent_buffers_are_kept_for_a_later_turn(patch: pytest.MonkeyPatch) -> None:
    real = stream.Stream._flush

    def late(self: stream.Stream) -> None:
        self._loop.call_later(0.1, real, self)

    patch.setattr(stream.Stream, "_flush", late)


@caught_by("what_one_turn_sends_arrives_together")
def every_message_is_a_delivery(patch: pytest.MonkeyPatch) -> None:
    real = stream.Stream._deliver

    def one_by_one(self: stream.Stream, messages: list[bytes]) -> None:
        for message in messages:
            real(self, [message])

    patch.setattr(stream.Stream, "_deliver", one_by_one)


@caught_by("messages_arrive_whole_and_in_order_both_ways")
def the_backlog_is_overtaken(patch: pytest.MonkeyPatch) -> None:
    def unordered(self: stream.Stream) -> None:
        self._flushing = False
        out, self._out = self._out, []
        content = memoryview(b"".join(out))
        self._queued = 0
        assert self._transport is not None
        self._transport.write(content[len(content) // 2 :])
        self._transport.write(content[: len(content) // 2])

    patch.setattr(stream.Stream, "_flush", unordered)


@caught_by("a_close_delivers_what_was_sent_and_breaks_both_sides_once")
def close_drops_what_is_queued(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream.Stream, "close", lambda self: self._close("closed by this side", abort=True))


@caught_by("a_close_delivers_what_was_sent_and_breaks_both_sides_once")
def the_break_is_reported_from_inside_close(patch: pytest.MonkeyPatch) -> None:
    real = stream.Stream.close

    def reporting(self: stream.Stream) -> None:
        real(self)
        self._report()

    patch.setattr(stream.Stream, "close", reporting)


@caught_by("what_is_sent_on_accepting_waits_for_the_connector")
def delivery_does_not_wait_for_connect(patch: pytest.MonkeyPatch) -> None:
    def at_once(self: stream.Stream, handler: Any) -> None:
        self._handler = handler
        self._limit = stream.MESSAGE_LIMIT
        self._release()

    patch.setattr(stream.Stream, "open", at_once)


@caught_by("the_wrong_node_is_an_error_but_no_refusal")
def the_node_in_the_certificate_is_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(network.RealNetwork, "_check_node", lambda *args: None)


@caught_by("nobody_listening_is_refused")
def every_failure_to_connect_is_a_timeout(patch: pytest.MonkeyPatch) -> None:
    async def failing(self: Any, address: str) -> Any:
        raise TimeoutError(110, "timed out")

    real = network.RealNetwork._connected

    async def connected(self: Any, address: str) -> Any:
        try:
            return await real(self, address)
        except ConnectionRefusedError:
            return await failing(self, address)

    patch.setattr(network.RealNetwork, "_connected", connected)


@caught_by("a_socket_answers_for_one_process_at_a_time")
def a_living_socket_is_replaced(patch: pytest.MonkeyPatch) -> None:
    def clear(path: str) -> None:
        Path(path).unlink(missing_ok=True)

    patch.setattr(local, "_clear_stale", clear)


@caught_by("another_with_the_same_pid_is_never_killed")
def a_pid_is_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(process.RealProcesses, "_pidfd", lambda self, found: process._open_pidfd(found.pid))


@caught_by("the_participants_file_tells_who_is_left")
def a_muster_never_finds_anybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(participants, "muster", lambda path: None)


@caught_by("records_outlive_their_process_in_order")
def the_last_append_is_lost(patch: pytest.MonkeyPatch) -> None:
    real = store.parse

    def forgetful(content: bytes, path: str) -> tuple[list[bytes], int, int]:
        records, sequence, end = real(content, path)
        return records[:-1], sequence, end

    patch.setattr(store, "parse", forgetful)


@caught_by("replace_leaves_only_the_new_records")
def replace_appends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store.RealStore, "_replace", store.RealStore._append)


@caught_by("a_write_goes_on_when_its_task_is_cancelled")
def cancelling_a_task_cancels_its_write(patch: pytest.MonkeyPatch) -> None:
    async def yielding(self: Any, offset: int, buffers: Any) -> None:
        await asyncio.sleep(0.001)
        await real(self, offset, buffers)

    real = world.RealDisk.write
    patch.setattr(world.RealDisk, "write", yielding)


@caught_by("a_discard_spoils_nothing_else")
def a_discard_is_too_long(patch: pytest.MonkeyPatch) -> None:
    real = world.RealDisk.discard

    async def longer(self: Any, offset: int, length: int) -> None:
        await real(self, offset, length + 4096)

    patch.setattr(world.RealDisk, "discard", longer)


@caught_by("a_page_is_one_memory_until_its_creator_makes_another")
def a_new_page_is_the_old_file(patch: pytest.MonkeyPatch) -> None:
    def reuse(path: str, size: int) -> int:
        fd = page.os.open(path, page.os.O_RDWR | page.os.O_CREAT)
        page.os.posix_fallocate(fd, 0, size)
        return fd

    patch.setattr(page, "_create", reuse)


@pytest.mark.parametrize(("check", "plant"), PLANTS, ids=[plant.__name__ for _, plant in PLANTS])
def test_a_planted_bug_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, plant: Plant) -> None:
    monkeypatch.setattr(world_suite, "PATIENCE", 1.0)
    by_name = {each.__name__: each for each in world_suite.CHECKS}
    laboratory = RealLaboratory(tmp_path)
    plant(monkeypatch)
    try:
        with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
            laboratory.run(by_name[check])
    finally:
        monkeypatch.undo()
        laboratory.close()
