"""Processes of the real World: gone means gone, killing never hits another, the participants file tells who is left."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.base.time import MILLISECOND, SECOND
from corral.base.world import ProcessId
from corral.real.process import boot_id, start_time
from corral.real.program import OUTPUT_MAX
from tests.unit.real.support import Bench, eventually, on_loop

Child = subprocess.Popen[bytes]


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def sleeper(children: list[Child]) -> Child:
    children.append(subprocess.Popen(["sleep", "60"]))
    return children[-1]


PARTICIPANT = """
import sys, uvloop, asyncio
from corral.real.world import RealWorld
async def main():
    world = RealWorld("/nonexistent")
    held = await world.process.enlist(sys.argv[1])
    print("in", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if sys.argv[2] == "leave":
        held.release()
    print("out", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
uvloop.run(main())
"""


def participant(children: list[Child], path: str, how: str = "stay") -> Child:
    """A process that enlists, and on a line of input leaves, or pretends to."""
    child = subprocess.Popen(
        [sys.executable, "-c", PARTICIPANT, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    children.append(child)
    assert line_of(child) == b"in\n"
    return child


def line_of(child: Child) -> bytes:
    assert child.stdout is not None
    return child.stdout.readline()


def tell(child: Child) -> None:
    assert child.stdin is not None
    child.stdin.write(b"\n")


# --- gone ------------------------------------------------------------------------------------------------------------


def test_i_am_here(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        process = bench.world().process
        assert process.me == process.identify(os.getpid())
        assert process.me == ProcessId(os.getpid(), start_time(os.getpid()) or 0, boot_id())
        assert not process.is_gone(process.me)

    on_loop(tmp_path, body)


def test_a_killed_process_is_gone_although_its_zombie_is_not_reaped(tmp_path: Path, children: list[Child]) -> None:
    child = sleeper(children)

    async def body(bench: Bench) -> None:
        process = bench.world().process
        identity = process.identify(child.pid)
        assert identity is not None
        assert not process.is_gone(identity)
        waiting = asyncio.ensure_future(process.wait_gone(identity))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        process.kill(identity)
        async with asyncio.timeout(5):
            await waiting
        assert process.is_gone(identity)
        assert process.identify(child.pid) is None, "a zombie is none"
        assert start_time(child.pid) == identity.start, "it really was a zombie"
        process.kill(identity)
        await process.wait_gone(identity)

    on_loop(tmp_path, body)


@pytest.mark.parametrize("wrong", ["start", "boot", "pid"])
def test_a_reused_pid_is_another_process_and_is_never_killed(tmp_path: Path, children: list[Child], wrong: str) -> None:
    child = sleeper(children)

    async def body(bench: Bench) -> None:
        process = bench.world().process
        identity = process.identify(child.pid)
        assert identity is not None
        other = {
            "start": identity._replace(start=identity.start - 1),
            "boot": identity._replace(boot_id="00000000-0000-0000-0000-000000000000"),
            "pid": identity._replace(pid=2**22 + 1),
        }[wrong]
        assert process.is_gone(other)
        process.kill(other)
        await process.wait_gone(other)
        assert child.poll() is None
        assert not process.is_gone(identity)

    on_loop(tmp_path, body)


LEADERLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
time.sleep(0.05)
print("ready", flush=True)
ctypes.CDLL(None).syscall(60, 0)   # exit(2) of this thread alone
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of exit(2)")
def test_a_process_whose_first_thread_has_ended_is_not_gone(tmp_path: Path, children: list[Child]) -> None:
    """/proc says Z for it, while another thread may still be writing to the disk."""
    child = subprocess.Popen([sys.executable, "-c", LEADERLESS], stdout=subprocess.PIPE, bufsize=0)
    children.append(child)
    assert line_of(child) == b"ready\n"

    async def body(bench: Bench) -> None:
        process = bench.world().process
        await eventually(lambda: state_of(child.pid) == "Z")
        identity = process.identify(child.pid)
        assert identity is not None
        assert not process.is_gone(identity)
        process.kill(identity)
        async with asyncio.timeout(5):
            await process.wait_gone(identity)

    on_loop(tmp_path, body)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_thread_is_no_process(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        process = bench.world().process
        numbers: list[int] = []
        stay = threading.Event()
        thread = threading.Thread(target=lambda: (numbers.append(threading.get_native_id()), stay.wait()))
        thread.start()
        await eventually(lambda: bool(numbers))
        assert process.identify(numbers[0]) is None
        assert process.is_gone(ProcessId(numbers[0], process.me.start, process.me.boot_id))
        stay.set()
        thread.join()

    on_loop(tmp_path, body)


@pytest.mark.parametrize("pid", [0, -1])
def test_pids_that_mean_groups_are_nobody(tmp_path: Path, pid: int) -> None:
    async def body(bench: Bench) -> None:
        process = bench.world().process
        assert process.identify(pid) is None
        process.kill(ProcessId(pid, 1, process.me.boot_id))

    on_loop(tmp_path, body)


# --- running programs ------------------------------------------------------------------------------------------------


def test_a_program_gets_its_input_and_gives_output_and_status(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        run = bench.world().process.run
        content = bytes(range(256)) * 1000
        done = await run(["sh", "-c", "cat; echo problem >&2; exit 7"], content, 10 * SECOND)
        assert done == (7, content, b"problem\n")
        assert (await run(["sh", "-c", "kill -TERM $$"], b"", 10 * SECOND)).status == -signal.SIGTERM
        assert (await run(["true"], content, 10 * SECOND)).status == 0, "it need not read its input"

    on_loop(tmp_path, body)


def test_a_program_that_cannot_be_started_is_an_oserror(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(FileNotFoundError):
            await bench.world().process.run(["/no/such/agent"], b"", SECOND)

    on_loop(tmp_path, body)


def test_too_much_output_is_cut_and_the_program_goes_on(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        done = await bench.world().process.run(
            ["sh", "-c", "head -c 3000000 /dev/zero; echo end >&2"], b"", 10 * SECOND
        )
        assert (done.status, len(done.stdout), done.stderr) == (0, OUTPUT_MAX, b"end\n")

    on_loop(tmp_path, body)


@pytest.mark.parametrize("ignores", ["", "trap '' TERM INT HUP; "])
def test_at_the_timeout_the_whole_group_is_killed(tmp_path: Path, ignores: str) -> None:
    async def body(bench: Bench) -> None:
        script = f"{ignores}sleep 60 & echo $! > {tmp_path}/grandchild; wait"
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="sh did not finish within"):
            await bench.world().process.run(["sh", "-c", script], b"", 1000 * MILLISECOND)
        assert time.monotonic() - started < 20
        grandchild = int((tmp_path / "grandchild").read_text())
        await eventually(lambda: start_time(grandchild) is None or state_of(grandchild) == "Z")

    on_loop(tmp_path, body)


def test_cancelling_kills_the_whole_group(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        script = (
            f"sleep 60 & echo $! > {tmp_path}/grandchild.new; mv {tmp_path}/grandchild.new {tmp_path}/grandchild; wait"
        )
        running = asyncio.ensure_future(bench.world().process.run(["sh", "-c", script], b"", 60 * SECOND))
        await eventually((tmp_path / "grandchild").exists)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        grandchild = int((tmp_path / "grandchild").read_text())
        await eventually(lambda: start_time(grandchild) is None or state_of(grandchild) == "Z")

    on_loop(tmp_path, body)


def test_a_background_child_that_keeps_the_pipe_open_does_not_hold_up_the_result(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        started = time.monotonic()
        script = f"(sleep 60 & echo $! > {tmp_path}/left); echo done"
        done = await bench.world().process.run(["sh", "-c", script], b"", 30 * SECOND)
        assert (done.status, done.stdout) == (0, b"done\n")
        assert time.monotonic() - started < 20
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)

    on_loop(tmp_path, body)


# --- participants ----------------------------------------------------------------------------------------------------


def test_a_lone_corrald_gets_the_lock_and_an_empty_file(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        process = bench.world().process
        path = bench.path("participants")
        assert await process.muster(path) is None
        (tmp_path / "participants").write_text("\n 1 2 x\n garbage\n")
        assert await process.muster(path) is None
        assert (tmp_path / "participants").read_bytes() == b""

    on_loop(tmp_path, body)


def test_kill_9_of_a_participant_gives_up_its_lock(tmp_path: Path, children: list[Child]) -> None:
    path = str(tmp_path / "participants")
    first, second = participant(children, path), participant(children, path)

    async def body(bench: Bench) -> None:
        process = bench.world().process
        identities = [process.identify(child.pid) for child in (first, second)]
        assert await process.muster(path) == identities
        for identity in identities:
            assert identity is not None
            process.kill(identity)
            await process.wait_gone(identity)
            left = [other for other in identities if other is not None and not process.is_gone(other)]
            assert await process.muster(path) == (left or None)

    on_loop(tmp_path, body)


def test_who_left_in_order_is_not_among_those_to_be_killed(tmp_path: Path, children: list[Child]) -> None:
    path = str(tmp_path / "participants")
    leaver, stayer = participant(children, path, "leave"), participant(children, path)
    tell(leaver)
    assert line_of(leaver) == b"out\n"

    async def body(bench: Bench) -> None:
        process = bench.world().process
        stays = process.identify(stayer.pid)
        assert stays is not None
        assert await process.muster(path) == [stays]
        process.kill(stays)
        await process.wait_gone(stays)
        assert await process.muster(path) is None
        assert leaver.poll() is None

    on_loop(tmp_path, body)


def test_a_torn_line_hides_nobody(tmp_path: Path, children: list[Child]) -> None:
    path = str(tmp_path / "participants")
    first = participant(children, path)
    with open(path, "a") as file:
        file.write("\n 4711 99")
    second = participant(children, path)

    async def body(bench: Bench) -> None:
        process = bench.world().process
        assert await process.muster(path) == [process.identify(child.pid) for child in (first, second)]

    on_loop(tmp_path, body)


def test_enlisting_waits_for_a_muster_to_end(tmp_path: Path) -> None:
    """A corrald that holds the lock exclusively is emptying the file: a line written then would be lost."""
    import fcntl

    async def body(bench: Bench) -> None:
        process = bench.world().process
        path = bench.path("participants")
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        enlisting = asyncio.ensure_future(process.enlist(path))
        await asyncio.sleep(0.1)
        assert not enlisting.done()
        os.close(fd)
        held = await enlisting
        assert await bench.world().process.muster(path) == [process.me]
        held.release()
        held.release()
        assert await process.muster(path) is None

    on_loop(tmp_path, body)
