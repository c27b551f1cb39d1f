"""Runs in the guest: makes the calls of each run through libdlm, three times, and writes down what came of them.

    python driver.py PLAN RECORD [ADDRESS ...]
    python driver.py serve -

PLAN has a run a line, {"seed": n, "operations": [...]}; RECORD gets {"seed": n, "recordings": [steps, steps, steps]}
with the steps of docs/design/dlm-oracle.md. libdlm runs without threads: after each call its file is read until
nothing has come for a while. A lock that has ended is not called any more, because the kernel gives its number to the
next one. A block that holds what nobody wrote in this run is "<undefined>".

With several nodes the first one plays: the others `serve` it at their ADDRESS, each with its share of the locks. A step
is over when all have been quiet. A busy lock is not converted then: what such a call does to a block that is on its way
to another node depends on who is quicker.

Nothing but the standard library: the guest has no other.
"""

import ctypes
import errno
import json
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

LIBRARY: Final = "libdlm_lt.so.3"
LOCKSPACE: Final = b"oracle"
TIMES: Final = 3
QUIET_MS: Final = 2
QUIET_FAR_MS: Final = 10  # with messages between nodes
PORT: Final = 7000
JOIN_SECONDS: Final = 60
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

    def __init__(self, quiet_ms: int) -> None:
        self.quiet_ms = quiet_ms
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
        while self.poll.poll(self.quiet_ms):
            self.library.dlm_dispatch(self.file)


class Lock:
    def __init__(self, name: bytes) -> None:
        self.name = name
        self.memory = ctypes.create_string_buffer(BLOCK)
        self.block = StatusBlock(0, 0, b"\0", ctypes.addressof(self.memory))
        self.new = True  # its request is not over
        self.busy = False
        self.ended = False


class Player:
    """The locks of one run on this node."""

    def __init__(self, library: Library, names: str, conversions_wait: bool) -> None:
        self.library = library
        self.names = names
        self.conversions_wait = conversions_wait
        self.locks: dict[int, Lock] = {}
        self.written = {""}
        self.heard: list[list[Any]] = []

    def call(self, operation: list[Any]) -> int | None:
        """What the call returned; None: it was not made."""
        kind, number = operation[:2]
        if kind == "lock":
            _, _, resource, mode, flags = operation
            lock = self.locks[number] = Lock(f"{self.names}.{resource}".encode())
            return self.started(lock, self.library.lock(MODES.index(mode), lock.block, flags, lock.name, number))
        lock = self.locks[number]
        if lock.ended or (kind == "convert" and lock.busy and self.conversions_wait):
            return None
        if kind == "cancel":
            return self.library.unlock(lock.block, CANCEL, number)
        flags, value = operation[-2:]
        if value is not None:
            self.written.add(value)
            lock.memory.raw = value.encode().ljust(BLOCK, b"\0")
        if kind == "unlock":
            return self.library.unlock(lock.block, flags, number)
        mode = MODES.index(operation[2])
        return self.started(lock, self.library.lock(mode, lock.block, flags | CONVERT, lock.name, number))

    def started(self, lock: Lock, result: int) -> int:
        lock.busy = lock.busy or result == 0
        return result

    def events(self) -> list[list[Any]]:
        """What has come since the last time, once nothing has come for a while."""
        self.library.until_quiet()
        heard, self.heard = self.heard, []
        return heard

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
        lock.new = lock.busy = False
        text = lock.memory.raw.split(b"\0", 1)[0].decode(errors="replace")
        text = text if text in self.written else "<undefined>"
        self.heard.append([number, "ast", STATUS.get(status, status), lock.block.flags[0], text])

    def blocked(self, number: int) -> None:
        self.heard.append([number, "bast"])


player: Player  # the one whose calls are being made
COMPLETED: Final = Callback(lambda number: player.completed(number or 0))
BLOCKED: Final = Callback(lambda number: player.blocked(number or 0))


class Near:
    """This node, as the one that plays sees it."""

    def __init__(self, library: Library, conversions_wait: bool) -> None:
        self.library = library
        self.conversions_wait = conversions_wait

    def begin(self, names: str) -> None:
        global player
        player = Player(self.library, names, self.conversions_wait)

    def call(self, operation: list[Any]) -> int | None:
        return player.call(operation)

    def events(self) -> list[list[Any]]:
        return player.events()

    def end(self) -> None:
        player.end()


class Far:
    """Another node: the same calls, made there by `serve`, one line of JSON each way."""

    def __init__(self, address: str) -> None:
        with connected(address) as connection:
            self.stream = connection.makefile("rw")

    def ask(self, *request: Any) -> Any:
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        return json.loads(self.stream.readline())

    def begin(self, names: str) -> None:
        self.ask("begin", names)

    def call(self, operation: list[Any]) -> Any:
        return self.ask("call", operation)

    def events(self) -> Any:
        return self.ask("events")

    def end(self) -> None:
        self.ask("end")

    def close(self) -> None:
        """The other node has no more to do."""
        self.stream.close()


def connected(address: str) -> socket.socket:
    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((address, PORT), JOIN_SECONDS)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def serve(near: Near) -> None:
    """Does what the node that plays asks, until it has no more."""
    with socket.create_server(("", PORT)) as listener:
        connection, _ = listener.accept()
    with connection, connection.makefile("rw") as stream:
        for line in stream:
            what, *arguments = json.loads(line)
            stream.write(json.dumps(getattr(near, what)(*arguments)) + "\n")
            stream.flush()


def play(nodes: list[Near | Far], names: str, operations: list[list[Any]]) -> list[list[Any]]:
    """One run; lock n is of node n modulo their number."""
    for node in nodes:
        node.begin(names)
    steps = []
    for operation in operations:
        result = nodes[operation[1] % len(nodes)].call(operation)
        if result is not None:
            steps.append([operation, [result, *until_quiet(nodes)]])
    for node in nodes:
        node.end()
    until_quiet(nodes)
    return steps


def until_quiet(nodes: list[Near | Far]) -> list[list[Any]]:
    """What all nodes heard until none heard any more."""
    heard = [event for node in nodes for event in node.events()]
    last = heard if len(nodes) > 1 else []
    while last:
        last = [event for node in nodes for event in node.events()]
        heard += last
    return heard


def main(plan: str, record: str, *addresses: str) -> None:
    """`addresses`: of the other nodes; "serve" in the place of the plan: do what another node asks."""
    several = plan == "serve" or bool(addresses)
    library = Library(QUIET_FAR_MS if several else QUIET_MS)
    near = Near(library, conversions_wait=several)
    if plan == "serve":
        serve(near)
    else:
        others = [Far(address) for address in addresses]
        nodes: list[Near | Far] = [near, *others]
        with Path(plan).open() as runs, Path(record).open("w") as out:
            for line in runs:
                run = json.loads(line)
                recordings = [play(nodes, f"{run['seed']}.{again}", run["operations"]) for again in range(TIMES)]
                out.write(json.dumps({"seed": run["seed"], "recordings": recordings}) + "\n")
                out.flush()
                os.fsync(out.fileno())
        for other in others:
            other.close()
    library.release()


if __name__ == "__main__":
    main(*sys.argv[1:])
