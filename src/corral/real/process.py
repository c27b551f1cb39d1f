"""Processes: who lives, who is gone, and killing exactly whom is meant (World.process; DESIGN 4).

A process is named by pid, start time and boot id; everything is decided after a pidfd is open, because an open pidfd
cannot come to mean another process. *Gone* is what the pidfd says: it polls readable when every thread has ended. The
state letter in /proc is not enough: a process whose first thread has ended shows Z while others still write.
"""

import asyncio
import contextlib
import errno
import os
import select
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from corral.base.time import SECOND, Nanoseconds
from corral.base.world import Completed, Enlistment, ProcessId
from corral.real import participants, program
from corral.real.workers import Workers

LOCK_RETRY_SECONDS: Final = 0.02


# --- identity --------------------------------------------------------------------------------------------------------


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def machine_id() -> str:
    """Which machine this is, also after a reboot; "" where nothing says."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which the process started; None when the pid is free."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
        # The command name may hold anything, also spaces and parentheses: fields begin after the last one.
        return int(content[content.rindex(b")") + 2 :].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _open_pidfd(pid: int) -> int | None:
    """None when no process has this pid (or it is a thread of another one)."""
    if pid <= 0:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # a thread's number; newer kernels say ENOENT
            return None
        raise


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


@final
class RealProcesses:
    def __init__(self, loop: asyncio.AbstractEventLoop, workers: Workers) -> None:
        self._loop = loop
        self._workers = workers
        self._boot_id = boot_id()
        me = self.identify(os.getpid())
        assert me is not None
        self._me = me

    @property
    def me(self) -> ProcessId:
        return self._me

    def identify(self, pid: int) -> ProcessId | None:
        pidfd = _open_pidfd(pid)
        if pidfd is None:
            return None
        try:
            start = start_time(pid)
            if start is None or _ended(pidfd):
                return None
            return ProcessId(pid, start, self._boot_id)
        finally:
            os.close(pidfd)

    def is_gone(self, process: ProcessId) -> bool:
        pidfd = self._pidfd(process)
        if pidfd is None:
            return True
        try:
            return _ended(pidfd)
        finally:
            os.close(pidfd)

    def kill(self, process: ProcessId) -> None:
        pidfd = self._pidfd(process)
        if pidfd is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)

    async def wait_gone(self, process: ProcessId) -> None:
        pidfd = self._pidfd(process)
        if pidfd is None:
            return
        try:
            await program.readable(self._loop, pidfd)
        finally:
            os.close(pidfd)

    def _pidfd(self, process: ProcessId) -> int | None:
        """A pidfd of exactly this process; None when it is gone."""
        if process.boot_id != self._boot_id:
            return None
        pidfd = _open_pidfd(process.pid)
        if pidfd is not None and start_time(process.pid) != process.start:
            os.close(pidfd)
            return None
        return pidfd

    # --- programs ---------------------------------------------------------------------------------------------------

    async def run(self, argv: Sequence[str], stdin: bytes, timeout_ns: Nanoseconds) -> Completed:
        start = self._workers.submit(program.start, list(argv))
        try:
            started = await asyncio.shield(start)
        except asyncio.CancelledError:
            start.add_done_callback(program.abandon)
            raise
        return await program.Run(self._loop, argv[0], started, stdin).completed(timeout_ns / SECOND)

    # --- participants -----------------------------------------------------------------------------------------------

    async def enlist(self, path: str) -> Enlistment:
        while True:
            # Retried, not waited for: a job that blocks in flock would hold its thread for as long as a muster lasts.
            enlistment: participants.RealEnlistment | None = await self._workers.submit(
                participants.enlist, path, self._me
            )
            if enlistment is not None:
                return enlistment
            await asyncio.sleep(LOCK_RETRY_SECONDS)

    async def muster(self, path: str) -> list[ProcessId] | None:
        listed: list[ProcessId] | None = await self._workers.submit(participants.muster, path)
        if listed is None:
            return None
        return [process for process in listed if not self.is_gone(process)]
