"""Processes that `corral up` starts: begun in the background, found again by a pid file, ended for good.

A pid file holds pid, start time and boot id, so that a number the kernel gave to a stranger is never mistaken for ours.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from corral.base.ids import NodeId
from corral.base.world import ProcessId
from corral.real.process import boot_id, start_time

END_SECONDS: Final = 10.0

Enter = Callable[[NodeId], Sequence[str]]
"""What the command lines of a node's processes begin with, such as `nsenter --net=FILE`. It must put the rest in its
own place, not beside it: the process that was started is the one the pid file names."""


def here(_node: NodeId) -> Sequence[str]:
    """Every node runs where the caller does."""
    return ()


def spawn(argv: Sequence[str], *, log: Path, pid_file: Path) -> ProcessId:
    """Starts a process in a session of its own, its output appended to `log`."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    process = ProcessId(child.pid, start_time(child.pid) or 0, boot_id())
    pid_file.write_text(f"{process.pid} {process.start} {process.boot_id}\n")
    _children[process] = child
    return process


_children: dict[ProcessId, "subprocess.Popen[bytes]"] = {}


def read_pid_file(path: Path) -> ProcessId | None:
    """The process of that file if it is alive."""
    try:
        words = path.read_text().split()
        process = ProcessId(int(words[0]), int(words[1]), words[2])
    except (OSError, ValueError, IndexError):
        return None
    return process if is_alive(process) else None


def read_participants(path: Path) -> list[ProcessId]:
    """Living processes listed in a participants file (DESIGN 4)."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found: list[ProcessId] = []
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[0].isdigit() and words[1].isdigit():
            process = ProcessId(int(words[0]), int(words[1]), words[2])
            if is_alive(process) and process not in found:
                found.append(process)
    return found


def is_alive(process: ProcessId) -> bool:
    child = _children.get(process)
    if child is not None and child.poll() is not None:
        del _children[process]
        return False
    return process.boot_id == boot_id() and start_time(process.pid) == process.start and not _is_zombie(process.pid)


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def send(process: ProcessId, number: signal.Signals) -> None:
    """Through a pidfd, checked after it was opened: a reused pid is never hit."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        if is_alive(process):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def wait_gone(processes: Iterable[ProcessId], seconds: float) -> list[ProcessId]:
    """Those that are still alive after that time."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < deadline:
        select.select([], [], [], 0.01)
        left = [process for process in left if is_alive(process)]
    return left


def end(processes: Iterable[ProcessId], *, grace: float = END_SECONDS) -> None:
    """SIGTERM, and SIGKILL for those that have not ended in `grace` seconds. A stopped process is continued."""
    chosen = [process for process in processes if is_alive(process)]
    for process in chosen:
        send(process, signal.SIGTERM)
        send(process, signal.SIGCONT)
    for process in wait_gone(chosen, grace):
        send(process, signal.SIGKILL)
    wait_gone(chosen, END_SECONDS)


def kill(processes: Iterable[ProcessId]) -> None:
    chosen = list(processes)
    for process in chosen:
        send(process, signal.SIGKILL)
    wait_gone(chosen, END_SECONDS)
