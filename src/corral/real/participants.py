"""The list of participants: who may still be alive of an earlier corrald (DESIGN 4, corrald dies).

A text file. Each participant holds a shared flock on it, through an open file description of its own, from before its
line is there until its process ends; a line is `pid start boot_id` after a space, or after `-` when it left in order.
Whoever gets the lock exclusively knows that nobody is left, and empties the file.
"""

import errno
import fcntl
import os
from typing import Final, final

from corral.base.world import ProcessId

PARTICIPANTS_MAX: Final = 4 << 20  # bytes of a participants file that are read

_LEFT: Final = "-"


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


def enlist(path: str, me: ProcessId) -> RealEnlistment | None:
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


def muster(path: str) -> list[ProcessId] | None:
    """None when nobody holds the lock (the file is emptied), else every line that still counts."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return parse_lines(os.pread(fd, PARTICIPANTS_MAX, 0))
        if not _still_named(fd, path):
            return []  # replaced under our hands: ask again
        os.ftruncate(fd, 0)
        os.fsync(fd)
        return None
    finally:
        os.close(fd)


def parse_lines(content: bytes) -> list[ProcessId]:
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
