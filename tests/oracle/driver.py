"""Runs in the guest: makes the calls of each run through libdlm, three times, and writes down what came of them.

    python driver.py PLAN RECORD

PLAN has a run a line, {"seed": n, "operations": [...]}; RECORD gets {"seed": n, "recordings": [steps, steps, steps]}
with the steps of docs/design/dlm-oracle.md. libdlm runs without threads: after each call its file is read until
nothing has come for a while. A lock that has ended is not called any more, because the kernel gives its number to the
next one. A block that holds what nobody wrote in this run is "<undefined>".

Nothing but the standard library: the guest has no other.
"""

import ctypes
import errno
import json
import os
import select
import sys
from pathlib import Path
from typing import Any, Final

LIBRARY: Final = "libdlm_lt.so.3"
LOCKSPACE: Final = b"oracle"
TIMES: Final = 3
QUIET_MS: Final = 2
MODES: Final = ("NL", "CR", "CW", "PR", "PW", "EX")
VALBLK: Final = 8
CANCEL: Final = 2
CONVERT: Final = 4
FORCEUNLOCK: Final = 0x20000
ECANCEL: Final = 0x10001
EUNLOCK: Final = 0x10002
STATUS: Final = {errno.EAGAIN: "EAGAIN", errno.EDEADLK: "EDEADLK"}  # others are told by their numbers
BLOCK: Final = 32

Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class StatusBlock(ctypes.Structure):
    _fields_ = [
        ("status", ctypes.c_int),
        ("id", ctypes.c_uint32),
        ("flags", ctypes.c_char),
        ("value", ctypes.c_void_p),
    ]


class Library:
    """The calls of libdlm that we make; all return 0 or a negative errno."""

    def __init__(self) -> None:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
        library.dlm_create_lockspace.restype = ctypes.c_void_p
        library.dlm_create_lockspace.argtypes = [ctypes.c_char_p, ctypes.c_uint]
        library.dlm_ls_get_fd.argtypes = [ctypes.c_void_p]
        library.dlm_release_lockspace.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        library.dlm_ls_lock.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.POINTER(StatusBlock),
            ctypes.c_uint32,
            ctypes.c_char_p,
            ctypes.c_uint,
            ctypes.c_uint32,
            Callback,
            ctypes.c_void_p,
            Callback,
            ctypes.c_void_p,
        ]
        library.dlm_ls_unlock.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.POINTER(StatusBlock),
            ctypes.c_void_p,
        ]
        self.library = library
        self.space = library.dlm_create_lockspace(LOCKSPACE, 0o600)
        if not self.space:
            raise OSError(ctypes.get_errno(), "dlm_create_lockspace")
        self.file = library.dlm_ls_get_fd(self.space)
        self.poll = select.poll()
        self.poll.register(self.file, select.POLLIN)

    def release(self) -> None:
        self.library.dlm_release_lockspace(LOCKSPACE, self.space, 1)

    def lock(self, mode: int, block: StatusBlock, flags: int, name: bytes, number: int) -> int:
        result = self.library.dlm_ls_lock(
            self.space, mode, block, flags, name, len(name), 0, COMPLETED, number, BLOCKED, None
        )
        return -ctypes.get_errno() if result else 0

    def unlock(self, block: StatusBlock, flags: int, number: int) -> int:
        result = self.library.dlm_ls_unlock(self.space, block.id, flags, block, number)
        return -ctypes.get_errno() if result else 0

    def until_quiet(self) -> None:
        while self.poll.poll(QUIET_MS):
            self.library.dlm_dispatch(self.file)


class Lock:
    def __init__(self, name: bytes) -> None:
        self.name = name
        self.memory = ctypes.create_string_buffer(BLOCK)
        self.block = StatusBlock(0, 0, b"\0", ctypes.addressof(self.memory))
        self.new = True  # its request is not over
        self.ended = False


class Player:
    """One run."""

    def __init__(self, library: Library, names: str) -> None:
        self.library = library
        self.names = names
        self.locks: dict[int, Lock] = {}
        self.written = {""}
        self.events: list[list[Any]] = []

    def play(self, operations: list[list[Any]]) -> list[list[Any]]:
        steps = []
        for operation in operations:
            lock = self.locks.get(operation[1])
            if lock is None or not lock.ended:
                self.events = []
                result = self.call(operation)
                self.library.until_quiet()
                steps.append([operation, [result, *self.events]])
        self.end()
        return steps

    def call(self, operation: list[Any]) -> int:
        kind, number = operation[:2]
        if kind == "lock":
            _, _, resource, mode, flags = operation
            lock = self.locks[number] = Lock(f"{self.names}.{resource}".encode())
            return self.library.lock(MODES.index(mode), lock.block, flags, lock.name, number)
        lock = self.locks[number]
        if kind == "cancel":
            return self.library.unlock(lock.block, CANCEL, number)
        flags, value = operation[-2:]
        if value is not None:
            self.written.add(value)
            lock.memory.raw = value.encode().ljust(BLOCK, b"\0")
        if kind == "unlock":
            return self.library.unlock(lock.block, flags, number)
        mode = MODES.index(operation[2])
        return self.library.lock(mode, lock.block, flags | CONVERT, lock.name, number)

    def end(self) -> None:
        for number, lock in self.locks.items():
            if lock.block.id and not lock.ended:
                self.library.unlock(lock.block, FORCEUNLOCK, number)
        self.library.until_quiet()

    def completed(self, number: int) -> None:
        lock = self.locks[number]
        status = abs(lock.block.status)
        if status == EUNLOCK or (lock.new and status):
            lock.ended = True
        lock.new = False
        text = lock.memory.raw.split(b"\0", 1)[0].decode(errors="replace")
        text = text if text in self.written else "<undefined>"
        self.events.append([number, "ast", STATUS.get(status, status), lock.block.flags[0], text])

    def blocked(self, number: int) -> None:
        self.events.append([number, "bast"])


player: Player  # the one whose calls are being made
COMPLETED: Final = Callback(lambda number: player.completed(number or 0))
BLOCKED: Final = Callback(lambda number: player.blocked(number or 0))


def main(plan: str, record: str) -> None:
    global player
    library = Library()
    with Path(plan).open() as runs, Path(record).open("w") as out:
        for line in runs:
            run = json.loads(line)
            recordings = []
            for time in range(TIMES):
                player = Player(library, f"{run['seed']}.{time}")
                recordings.append(player.play(run["operations"]))
            out.write(json.dumps({"seed": run["seed"], "recordings": recordings}) + "\n")
            out.flush()
            os.fsync(out.fileno())
    library.release()


if __name__ == "__main__":
    main(*sys.argv[1:])
