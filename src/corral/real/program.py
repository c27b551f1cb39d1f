"""Running a program: its input, the beginning of its output, its end, and the end of its whole group (World.process).

We reap the program ourselves and last. Until then its pid, which is also the number of its process group, cannot be
given to anybody else, so killing the group at the timeout hits only what the program started.
"""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from typing import Final, final

from corral.base.world import Completed

OUTPUT_MAX: Final = 1 << 20  # bytes kept of each stream of a program
DRAIN_SECONDS: Final = 0.5  # after a program ended: how long its pipes may stay open in children it left

Program = subprocess.Popen[bytes]


def start(argv: list[str]) -> Program:
    """In a thread. In a session, and so in a process group, of its own."""
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


def abandon(start: "asyncio.Future[Program]") -> None:
    """Nobody waits for this program any more: it must not run on."""
    if start.cancelled() or start.exception() is not None:
        return
    program = start.result()
    _kill_group(program)
    for pipe in (program.stdin, program.stdout, program.stderr):
        if pipe is not None:
            pipe.close()
    program.wait()


def _kill_group(program: Program) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # EPERM: only zombies are left of it
        os.killpg(program.pid, signal.SIGKILL)


@final
class Run:
    """One program: feeds its stdin, keeps the beginning of its output, waits for its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, program: Program, stdin: bytes) -> None:
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
                await readable(self._loop, self._pidfd)
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
        waiting = asyncio.ensure_future(readable(self._loop, self._pidfd))
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


async def readable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
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
