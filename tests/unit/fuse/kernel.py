"""A stand-in for the kernel's end of /dev/fuse: a socket pair that keeps message boundaries, for any bytes."""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from corral.api.gfs import Filesystem
from corral.fuse import protocol as p
from corral.fuse.notify import KernelNotifier
from corral.fuse.session import Limits, Session

OUT = struct.Struct("=IiQ")
EVERY_FLAG = 0xFFFFFFFF


def request(
    opcode: int, body: bytes = b"", *, node: int = 1, unique: int = 2, pid: int = 0, extensions: int = 0
) -> bytes:
    length = p.HEADER_SIZE + len(body)
    return p.HEADER.pack(length, opcode, unique, node, 0, 0, pid, extensions, 0) + body


def init_body(major: int = 7, minor: int = 45, flags: int = EVERY_FLAG) -> bytes:
    return struct.pack("=IIII48x", major, minor, 1 << 17, flags)


class Kernel:
    """`async with Kernel(filesystem) as kernel`: INIT is done. Answers are (errno, payload)."""

    def __init__(
        self, filesystem: Filesystem, *, may_reply: Callable[[], bool] | None = None, limits: Limits | None = None
    ) -> None:
        self.filesystem = filesystem
        self._may_reply = may_reply
        self._limits = limits or Limits()
        self._unique = 10

    async def start(self) -> "Kernel":
        loop = asyncio.get_running_loop()
        self.socket, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        device.setblocking(False)
        self.notifier = KernelNotifier(loop)
        self.session = Session(
            loop, self.filesystem, self.notifier, os.dup(device.fileno()), self._limits, may_reply=self._may_reply
        )
        device.close()
        self.session.start()
        return self

    async def __aenter__(self) -> "Kernel":
        await self.start()
        error, _ = await self.ask(p.INIT, init_body())
        assert error == 0
        return self

    async def __aexit__(self, *_: object) -> None:
        self.session.withdraw("the test is over")
        await asyncio.wait([self.session.closed])
        self.socket.close()

    def send(self, opcode: int, body: bytes = b"", *, node: int = 1, pid: int = 0) -> int:
        self._unique += 2
        self.raw(request(opcode, body, node=node, unique=self._unique, pid=pid))
        return self._unique

    def raw(self, message: bytes) -> None:
        self.socket.send(message)

    async def answer(self) -> tuple[int, int, bytes]:
        """(unique, errno, payload); a notification has unique 0 and its code for errno."""
        message = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 1 << 20), 5)
        length, error, unique = OUT.unpack_from(message)
        assert length == len(message)
        return unique, -error if unique else error, message[OUT.size :]

    async def ask(self, opcode: int, body: bytes = b"", **fields: Any) -> tuple[int, bytes]:
        asked = self.send(opcode, body, **fields)
        unique, error, payload = await self.answer()
        assert unique == asked
        return error, payload

    async def held(self, count: int) -> None:
        """Until the session keeps back that many answers."""
        while self.session.statistics().held != count:  # noqa: ASYNC110 - the session has no event to wait for
            await asyncio.sleep(0)

    async def silent(self) -> bool:
        """Nothing is answered: proven by the order of answers, for the next question's comes first."""
        error, _ = await self.ask(p.STATFS)
        return error == 0
