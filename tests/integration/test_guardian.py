"""The guardian of a mount: told by the kernel when the mount's main thread dies, gone when it has nothing to do."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from corral.fuse.guardian import is_stuck

PARENT = """
import os, subprocess, sys, time
guardian = subprocess.Popen([sys.executable, "-m", "corral.fuse.guardian", sys.argv[1], str(os.getpid())])
print(guardian.pid, flush=True)
time.sleep(60)
"""


def start_parent(mountpoint: Path) -> tuple["subprocess.Popen[bytes]", int]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(mountpoint)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    guardian = int(parent.stdout.readline())
    # Not one of those it waits for: they are not blocked while it does.
    try:
        until(lambda: blocks(guardian, signal.SIGINT), "the guardian to be at its post")
    except BaseException:
        end(parent)
        raise
    return parent, guardian


def blocks(pid: int, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigBlk:"):
            return bool(int(line.split()[1], 16) >> number - 1 & 1)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def end(parent: "subprocess.Popen[bytes]") -> None:
    parent.kill()
    parent.wait()
    assert parent.stdout is not None
    parent.stdout.close()


def test_a_guardian_ends_after_its_killed_mount(tmp_path: Path) -> None:
    parent, guardian = start_parent(tmp_path)
    try:
        time.sleep(0.3)
        assert alive(guardian)
    finally:
        end(parent)
    until(lambda: not alive(guardian), "the guardian to end")


def test_a_guardian_ends_when_its_mount_tells_it_to(tmp_path: Path) -> None:
    parent, guardian = start_parent(tmp_path)
    try:
        os.kill(guardian, signal.SIGTERM)
        until(lambda: not alive(guardian), "the guardian to end")
        assert parent.poll() is None
    finally:
        end(parent)


def test_stuck_means_that_more_than_the_first_thread_is_there() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert is_stuck(os.getpid())
    finally:
        release.set()
        thread.join()
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_stuck(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not is_stuck(sleeper.pid)
