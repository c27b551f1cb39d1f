"""Processes: who lives, who is gone, killing, running programs, and the list of participants (World.process; DESIGN 4).

A process is named by pid, start time and boot id; everything is decided after a pidfd is open, because an open pidfd
cannot come to mean another process. *Gone* is what the pidfd says: it polls readable when every thread has ended. The
state letter in /proc is not enough: a process whose first thread has ended shows Z while others still write.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from corral.base.time import SECOND, Nanoseconds
from corral.base.world import Completed, Enlistment, ProcessId
from corral.real.workers import Workers

OUTPUT_MAX: Final = 1 << 20  # bytes kept of each stream of a program
DRAIN_SECONDS: Final = 0.5  # after a program ended: how long its pipes may stay open in children it left
PARTICIPANTS_MAX: Final = 4 << 20  # bytes of a participants file that are read
LOCK_RETRY_SECONDS: Final = 0.02

_LEFT: Final = "-"


# --- identity --------------------------------------------------------------------------------------------------------


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


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
            await _readable(self._loop, pidfd)
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
        start = self._workers.submit(_start, list(argv))
        try:
            program = await asyncio.shield(start)
        except asyncio.CancelledError:
            start.add_done_callback(_abandon)
            raise
        return await _Run(self._loop, argv[0], program, stdin).completed(timeout_ns / SECOND)

    # --- participants -----------------------------------------------------------------------------------------------

    async def enlist(self, path: str) -> Enlistment:
        while True:
            # Retried, not waited for: a job that blocks in flock would hold its thread for as long as a muster lasts.
            enlistment: RealEnlistment | None = await self._workers.submit(_enlist, path, self._me)
            if enlistment is not None:
                return enlistment
            await asyncio.sleep(LOCK_RETRY_SECONDS)

    async def muster(self, path: str) -> list[ProcessId] | None:
        listed: list[ProcessId] | None = await self._workers.submit(_muster, path)
        if listed is None:
            return None
        return [process for process in listed if not self.is_gone(process)]


async def _readable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    future = loop.create_future()

    def ready() -> None:
        loop.remove_reader(fd)
        if not future.done():
            future.set_result(None)

    loop.add_reader(fd, ready)
    try:
        await future
    finally:
        loop.remove_reader(fd)


# --- running a program -----------------------------------------------------------------------------------------------

_Program = subprocess.Popen[bytes]


def _start(argv: list[str]) -> _Program:
    """In a session, and so in a process group, of its own. We reap it ourselves and last, so that its pid, which is the
    group's number, cannot be anybody else's when the group is killed."""
    program = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,
    )
    for pipe in (program.stdin, program.stdout, program.stderr):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
    return program


def _abandon(start: "asyncio.Future[_Program]") -> None:
    """Nobody waits for this program any more: it must not run on."""
    if start.cancelled() or start.exception() is not None:
        return
    program = start.result()
    _kill_group(program)
    for pipe in (program.stdin, program.stdout, program.stderr):
        if pipe is not None:
            pipe.close()
    program.wait()


def _kill_group(program: _Program) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # EPERM: only zombies are left of it
        os.killpg(program.pid, signal.SIGKILL)


@final
class _Run:
    """One program: feeds its stdin, keeps the beginning of its output, waits for its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, program: _Program, stdin: bytes) -> None:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stderr is not None
        self._loop = loop
        self._name = name
        self._program = program
        self._stdin = memoryview(stdin)
        self._in = program.stdin
        self._outputs = (program.stdout, program.stderr)
        self._kept = (bytearray(), bytearray())
        self._open = 2
        self._drained = loop.create_future()
        self._pidfd = os.pidfd_open(program.pid)

    async def completed(self, timeout: float) -> Completed:
        program = self._program
        finished = False
        try:
            self._loop.add_writer(self._in.fileno(), self._feed)
            for index, pipe in enumerate(self._outputs):
                self._loop.add_reader(pipe.fileno(), self._take, index)
            async with asyncio.timeout(timeout):
                await _readable(self._loop, self._pidfd)
                await asyncio.wait((self._drained,), timeout=DRAIN_SECONDS)
            finished = True
        except TimeoutError:
            raise TimeoutError(
                errno.ETIMEDOUT, f"{self._name} did not finish within {timeout:g} s and was killed"
            ) from None
        finally:
            if not finished:
                _kill_group(program)
                await self._reapable()
            self._drained.cancel()
            self._close()
            program.wait()
        return Completed(program.returncode, bytes(self._kept[0]), bytes(self._kept[1]))

    async def _reapable(self) -> None:
        """After SIGKILL: short, but a process in an uninterruptible call may take long, and `program.wait` would stop
        the loop for it."""
        waiting = asyncio.ensure_future(_readable(self._loop, self._pidfd))
        while not waiting.done():
            try:
                await asyncio.wait((waiting,))
            except asyncio.CancelledError:
                continue  # whoever cancels again waits a little longer; nothing is left behind

    def _feed(self) -> None:
        try:
            while self._stdin:
                self._stdin = self._stdin[os.write(self._in.fileno(), self._stdin) :]
        except BlockingIOError:
            return
        except OSError:
            pass  # it does not read: its business
        self._loop.remove_writer(self._in.fileno())
        self._in.close()

    def _take(self, index: int) -> None:
        pipe, kept = self._outputs[index], self._kept[index]
        try:
            piece = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        kept += piece[: OUTPUT_MAX - len(kept)]  # what is more is read and dropped, so that the program can go on
        if not piece:
            self._loop.remove_reader(pipe.fileno())
            self._open -= 1
            if not self._open and not self._drained.done():
                self._drained.set_result(None)

    def _close(self) -> None:
        if not self._in.closed:
            self._loop.remove_writer(self._in.fileno())
            self._in.close()
        for pipe in self._outputs:
            self._loop.remove_reader(pipe.fileno())
            pipe.close()
        os.close(self._pidfd)


# --- the participants file -------------------------------------------------------------------------------------------


@final
class RealEnlistment:
    """Holds the shared lock for as long as the process lives: its open file description is ours alone."""

    def __init__(self, fd: int, path: str, offset: int) -> None:
        self._fd = fd
        self._path = path
        self._offset = offset

    def release(self) -> None:
        """A clean leave: the line no longer counts, the lock is given up."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.pwrite(fd, _LEFT.encode(), self._offset)  # the lock forbids that anybody emptied the file meanwhile
            os.fdatasync(fd)
        except OSError:
            pass  # then a starting corrald may kill us although we left: safe
        finally:
            os.close(fd)


def _enlist(path: str, me: ProcessId) -> RealEnlistment | None:
    """None: a corrald is mustering, try again."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if not _still_named(fd, path):
            os.close(fd)
            return None
        # A line begins with its own newline: what a full disk left of an earlier one must not swallow it.
        line = f"\n {me.pid} {me.start} {me.boot_id}\n".encode()
        append = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            if os.write(append, line) != len(line):
                raise OSError(errno.ENOSPC, f"{path} cannot be written: free space in the state directory")
            offset = os.lseek(append, 0, os.SEEK_CUR) - len(line) + 1
            os.fsync(append)
        finally:
            os.close(append)
        _sync_directory_of(path)
        return RealEnlistment(fd, path, offset)
    except OSError:
        os.close(fd)
        raise


def _muster(path: str) -> list[ProcessId] | None:
    """None when nobody holds the lock (the file is emptied), else every line that still counts."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse_lines(os.pread(fd, PARTICIPANTS_MAX, 0))
        if not _still_named(fd, path):
            return []  # replaced under our hands: ask again
        os.ftruncate(fd, 0)
        os.fsync(fd)
        return None
    finally:
        os.close(fd)


def _parse_lines(content: bytes) -> list[ProcessId]:
    """Only our own uid writes here; what does not read as a line was torn by a crash and is nobody."""
    found: list[ProcessId] = []
    for line in content.decode("ascii", "replace").split("\n"):
        if line.startswith(_LEFT):
            continue
        words = line.split()
        if len(words) == 3 and _is_number(words[0], 9) and _is_number(words[1], 19) and len(words[2]) <= 64:
            process = ProcessId(int(words[0]), int(words[1]), words[2])
            if process not in found:
                found.append(process)
    return found


def _is_number(word: str, digits: int) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= digits


def _still_named(fd: int, path: str) -> bool:
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


def _sync_directory_of(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
